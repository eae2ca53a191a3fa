"""Data sets by class; `registry` makes them from strings."""

from .custom_image_datasets import DatasetSummary, ImageDataset, LabelledDataset
from .image_net import ImageNet
from .image_net_22k import ImageNet22k

__all__ = ["DatasetSummary", "ImageDataset", "ImageNet", "ImageNet22k", "LabelledDataset"]
