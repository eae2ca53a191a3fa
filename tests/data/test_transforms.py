import numpy as np
import pytest
import torch
from PIL import Image

from dinov2.data import transforms


def noise(height=40, width=30):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_the_blur_happens_with_its_probability():
    torch.manual_seed(0)
    image = noise()
    blur = transforms.GaussianBlur(p=0.9, radius_min=1.0)
    changed = [np.asarray(blur(image)).tobytes() != image.tobytes() for _ in range(200)]
    assert 0.83 < np.mean(changed) < 0.97


@pytest.mark.parametrize(("p", "changes"), [(0.0, False), (1.0, True)])
def test_a_blur_of_probability_zero_or_one_is_certain(p, changes):
    image = noise()
    assert (np.asarray(transforms.GaussianBlur(p=p, radius_min=1.0)(image)).tobytes() != image.tobytes()) is changes


def test_tensors_pass_unchanged_and_images_are_scaled_to_one():
    tensor = torch.rand(3, 4, 4)
    assert transforms.MaybeToTensor()(tensor) is tensor
    white = transforms.MaybeToTensor()(Image.new("RGB", (5, 4), "white"))
    assert white.shape == (3, 4, 5)
    assert white.min() == 1


def test_the_evaluation_picture_is_the_centre_of_the_resized_one():
    image = Image.new("RGB", (400, 300))
    image.paste((255, 255, 255), (100, 50, 300, 250))  # a white square around the centre
    picture = transforms.make_classification_eval_transform(resize_size=150, crop_size=90)(image)
    assert picture.shape == (3, 90, 90)
    white = (1 - torch.tensor(transforms.IMAGENET_DEFAULT_MEAN)) / torch.tensor(transforms.IMAGENET_DEFAULT_STD)
    torch.testing.assert_close(picture[:, 45, 45], white, rtol=0, atol=1e-5)


def test_the_training_picture_has_the_size_asked_for():
    assert transforms.make_classification_train_transform(crop_size=64)(noise(120, 100)).shape == (3, 64, 64)
