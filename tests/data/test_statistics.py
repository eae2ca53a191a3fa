import numpy as np
import pytest
from PIL import Image

from dinov2.data.datasets import ImageDataset
from dinov2.data.statistics import channel_statistics, image_moments


def test_mean_and_deviation_are_those_of_all_pixels(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (6, 10, 12, 3), dtype=np.uint8)
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    found = channel_statistics(ImageDataset(tmp_path))
    pixels = images.reshape(-1, 3) / 255
    np.testing.assert_allclose(found.mean, pixels.mean(0), atol=1e-9)
    np.testing.assert_allclose(found.std, pixels.std(0), atol=1e-9)
    assert (found.images, found.unreadable) == (6, 0)
    assert str(found).startswith(f"augmentations:\n  mean: [{pixels[:, 0].mean():.4f}, ")


@pytest.mark.parametrize(("dtype", "largest"), [(np.uint8, 255), (np.uint16, 65535), (np.float32, 1), (np.float64, 1)])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_moments_are_in_units_of_the_types_range(dtype, largest, channels):
    image = (np.random.default_rng(0).random((8, 9, channels)) * largest).astype(dtype)
    mean, square = image_moments(image)
    scaled = image.astype(np.float64) / largest
    np.testing.assert_allclose(mean, scaled.mean((0, 1)), rtol=1e-6)
    np.testing.assert_allclose(square, (scaled**2).mean((0, 1)), rtol=1e-6)


def test_unreadable_images_are_counted_and_a_sample_is_enough(tmp_path):
    for i in range(20):
        Image.new("RGB", (4, 4), (51, 102, 204)).save(tmp_path / f"{i:02}.png")
    (tmp_path / "19.png").write_bytes(b"broken")
    found = channel_statistics(ImageDataset(tmp_path))
    assert (found.images, found.unreadable) == (19, 1)
    np.testing.assert_allclose(found.mean, (0.2, 0.4, 0.8))
    np.testing.assert_allclose(found.std, 0, atol=1e-7)
    assert channel_statistics(ImageDataset(tmp_path), max_images=5).images in (4, 5)
