"""Transforms of single images with torchvision, for evaluation and for datasets with labels."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision import transforms

IMAGENET_DEFAULT_MEAN = (0.485, 0.456, 0.406)
IMAGENET_DEFAULT_STD = (0.229, 0.224, 0.225)


class GaussianBlur(transforms.RandomApply):
    """Blur with probability `p`, with a 9-tap Gaussian whose standard deviation is uniform between two radii.

    DINOv2's released code blurs with probability `1 - p`; this one does what its name says.

    Args:
        p: probability of a blur.
        radius_min: smallest standard deviation, pixels.
        radius_max: largest one.
    """

    def __init__(self, *, p: float = 0.5, radius_min: float = 0.1, radius_max: float = 2.0):
        super().__init__([transforms.GaussianBlur(kernel_size=9, sigma=(radius_min, radius_max))], p=p)


class MaybeToTensor(transforms.ToTensor):
    """Turn a PIL image or an array into a float tensor; leave a tensor as it is."""

    def __call__(self, pic) -> Tensor:
        """Convert `pic`, `H x W x C` in 0..255, to `C x H x W` in 0..1."""
        return pic if isinstance(pic, torch.Tensor) else super().__call__(pic)


def make_normalize_transform(
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN, std: Sequence[float] = IMAGENET_DEFAULT_STD
) -> transforms.Normalize:
    """Subtract `mean` and divide by `std`, per channel, for images scaled to 0..1."""
    return transforms.Normalize(mean=mean, std=std)


def make_classification_train_transform(
    *,
    crop_size: int = 224,
    interpolation: transforms.InterpolationMode = transforms.InterpolationMode.BICUBIC,
    hflip_prob: float = 0.5,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> transforms.Compose:
    """Random resized crop of `crop_size` pixels, perhaps mirrored, as a normalised tensor."""
    steps = [transforms.RandomResizedCrop(crop_size, interpolation=interpolation)]
    if hflip_prob > 0:
        steps.append(transforms.RandomHorizontalFlip(hflip_prob))
    return transforms.Compose([*steps, MaybeToTensor(), make_normalize_transform(mean, std)])


def make_classification_eval_transform(
    *,
    resize_size: int = 256,
    interpolation: transforms.InterpolationMode = transforms.InterpolationMode.BICUBIC,
    crop_size: int = 224,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> transforms.Compose:
    """Shorter side to `resize_size`, the centre square of `crop_size`, as a normalised tensor; sizes in pixels."""
    return transforms.Compose(
        [
            transforms.Resize(resize_size, interpolation=interpolation),
            transforms.CenterCrop(crop_size),
            MaybeToTensor(),
            make_normalize_transform(mean, std),
        ]
    )
