"""The base of data sets that store encoded images and targets, as DINOv2's ImageNet does."""

from typing import Any

import numpy as np
from torchvision.datasets import VisionDataset

from ..decode import decode_rgb
from .decoders import ImageDataDecoder, TargetDecoder


class ExtendedVisionDataset(VisionDataset):
    """A data set whose items are decoded from `get_image_data` and `get_target`, which a subclass gives."""

    def get_image_data(self, index: int) -> bytes:
        """Return the encoded image."""
        raise NotImplementedError

    def get_target(self, index: int) -> Any:
        """Return the target."""
        raise NotImplementedError

    def read(self, index: int) -> np.ndarray:
        """Return image `index` as an RGB array (height, width, 3), uint8; raises UnreadableImage."""
        return decode_rgb(self.get_image_data(index), path=f"{type(self).__name__} image {index}")

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image = ImageDataDecoder(self.get_image_data(index), path=f"{type(self).__name__} image {index}").decode()
        target = TargetDecoder(self.get_target(index)).decode()
        if self.transforms is not None:
            image, target = self.transforms(image, target)
        return image, target
