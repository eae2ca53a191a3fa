from .adapters import DatasetWithEnumeratedTargets
from .augmentations import DataAugmentationDINO
from .collate import Batch, collate_data_and_cast
from .datasets.custom_image_datasets import ImageDataset, LabelledDataset
from .decode import UnreadableImage, decode_rgb, read_rgb
from .masking import MaskingGenerator

__all__ = [
    "Batch",
    "DataAugmentationDINO",
    "DatasetWithEnumeratedTargets",
    "ImageDataset",
    "LabelledDataset",
    "MaskingGenerator",
    "UnreadableImage",
    "collate_data_and_cast",
    "decode_rgb",
    "read_rgb",
]
