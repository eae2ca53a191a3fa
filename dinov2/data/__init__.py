from .adapters import DatasetWithEnumeratedTargets
from .augmentations import DataAugmentationDINO
from .collate import Batch, collate_data_and_cast
from .datasets.custom_image_datasets import ImageDataset, LabelledDataset
from .decode import UnreadableImage, decode_rgb, read_rgb
from .loaders import (
    SamplerType,
    make_custom_dataset,
    make_data_loader,
    make_dataset,
    make_eval_dataset,
    make_labelled_dataset,
    resolve_num_workers,
)
from .masking import MaskingGenerator
from .multicrop import MultiCropLoader

__all__ = [
    "Batch",
    "DataAugmentationDINO",
    "DatasetWithEnumeratedTargets",
    "ImageDataset",
    "LabelledDataset",
    "MaskingGenerator",
    "MultiCropLoader",
    "SamplerType",
    "UnreadableImage",
    "collate_data_and_cast",
    "decode_rgb",
    "make_custom_dataset",
    "make_data_loader",
    "make_dataset",
    "make_eval_dataset",
    "make_labelled_dataset",
    "read_rgb",
    "resolve_num_workers",
]
