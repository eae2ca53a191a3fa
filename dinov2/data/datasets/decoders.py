"""What an `ExtendedVisionDataset` makes of the bytes and the target it stores."""

from typing import Any

from PIL import Image

from ..decode import decode_rgb


class Decoder:
    """Something that decodes itself."""

    def decode(self) -> Any:
        """Return what was encoded."""
        raise NotImplementedError


class ImageDataDecoder(Decoder):
    """The content of an image file.

    Args:
        image_data: the file's bytes.
        path: named in errors.
    """

    def __init__(self, image_data: bytes, path: str = "") -> None:
        self._image_data = image_data
        self._path = path

    def decode(self) -> Image.Image:
        """Return the RGB image; raises UnreadableImage."""
        return Image.fromarray(decode_rgb(self._image_data, path=self._path))


class TargetDecoder(Decoder):
    """A target that is stored as it is."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def decode(self) -> Any:
        """Return the target."""
        return self._target
