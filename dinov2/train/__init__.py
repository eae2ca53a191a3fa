"""Training: what happens, in order (`train.py`), and the method (`ssl_meta_arch.py`)."""

from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.train.train import get_args_parser, main

__all__ = ["SSLMetaArch", "get_args_parser", "main"]
