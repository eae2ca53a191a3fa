from .collate import Batch, collate_data_and_cast
from .masking import MaskingGenerator

__all__ = ["Batch", "MaskingGenerator", "collate_data_and_cast"]
