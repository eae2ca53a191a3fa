"""Dataset strings: `ImageNet:split=TRAIN:root=…:extra=…`, and whatever `ImageDataset` opens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .custom_image_datasets import ImageDataset, LabelledDataset
from .image_net import ImageNet
from .image_net_22k import ImageNet22k

DATASETS: dict[str, type] = {
    "ImageNet": ImageNet,
    "ImageNet22k": ImageNet22k,
    "ImageDataset": ImageDataset,
    "LabelledDataset": LabelledDataset,
}


def is_dataset_string(text: str) -> bool:
    """Say whether a string is meant as `Name:key=value…` rather than as a path."""
    name, _, arguments = text.partition(":")
    return name in DATASETS or (name.isidentifier() and "=" in arguments)


def parse_dataset_string(text: str) -> tuple[type, dict[str, Any]]:
    """Return the class that a dataset string names, and its arguments.

    Raises:
        ValueError: an unknown name, key or split; the message lists the known ones.
    """
    name, *arguments = text.split(":")
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r} in {text!r}; known are {', '.join(DATASETS)}, or give a folder")
    kwargs: dict[str, Any] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        known = _STRING_KEYS[name]
        if not equals or key not in known:
            raise ValueError(f"{argument!r} in {text!r} is not one of {', '.join(f'{key}=…' for key in known)}")
        kwargs[key] = value
    if "split" in kwargs:
        kwargs["split"] = _split(DATASETS[name], kwargs["split"])
    return DATASETS[name], kwargs


def make_registered_dataset(
    dataset_str: str, transform: Callable | None = None, target_transform: Callable | None = None
) -> Any:
    """Make the data set that a dataset string names; see `parse_dataset_string`."""
    dataset_class, kwargs = parse_dataset_string(dataset_str)
    if target_transform is not None:
        kwargs["target_transform"] = target_transform
    return dataset_class(transform=transform, **kwargs)


_STRING_KEYS = {
    "ImageNet": ("root", "extra", "split"),
    "ImageNet22k": ("root", "extra"),
    "ImageDataset": ("root",),
    "LabelledDataset": ("data_path", "root"),
}


def _split(dataset_class: type, name: str) -> Any:
    try:
        return dataset_class.Split[name]
    except KeyError:
        known = ", ".join(split.name for split in dataset_class.Split)
        raise ValueError(f"{dataset_class.__name__} has no split {name!r}; it has {known}") from None
