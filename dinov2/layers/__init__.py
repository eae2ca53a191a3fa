"""Building blocks of the vision transformer: torch only, no knowledge of models, data or processes."""

from .attention import ATTENTION_BACKENDS, Attention, MemEffAttention
from .block import Block, CausalAttentionBlock, NestedTensorBlock
from .dino_head import DINOHead
from .drop_path import DropPath
from .layer_scale import LayerScale
from .mlp import Mlp
from .patch_embed import PatchEmbed
from .swiglu_ffn import SwiGLUFFN, SwiGLUFFNAligned, SwiGLUFFNFused

__all__ = [
    "ATTENTION_BACKENDS",
    "Attention",
    "Block",
    "CausalAttentionBlock",
    "DINOHead",
    "DropPath",
    "LayerScale",
    "MemEffAttention",
    "Mlp",
    "NestedTensorBlock",
    "PatchEmbed",
    "SwiGLUFFN",
    "SwiGLUFFNAligned",
    "SwiGLUFFNFused",
]
