"""Names of number formats, as configs spell them."""

import torch

TypeSpec = str | torch.dtype

_SHORT_NAMES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp64": torch.float64,
}


def as_torch_dtype(dtype: TypeSpec) -> torch.dtype:
    """Return the torch dtype of a short name (fp32, fp16, bf16), of torch's own (float16, int64, …) or of itself.

    Raises:
        ValueError: no such number format.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    name = dtype.removeprefix("torch.")
    found = _SHORT_NAMES.get(name) or getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"unknown number format {dtype!r}; known: {', '.join(_SHORT_NAMES)} and torch's own names")
    return found
