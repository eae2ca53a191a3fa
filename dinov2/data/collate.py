"""From augmented samples to the batch that the trainer reads."""

import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor


class Masks(TypedDict):
    """Which patches of the global crops the student does not see: `C` crops of `N` patches, `M` masked in all."""

    collated_masks: Tensor  # (C, N) bool
    mask_indices_list: Tensor  # (M,) int64, positions in the flattened masks
    masks_weight: Tensor  # (M,) float32, 1 / masked patches of the same crop
    upperbound: int  # M is never larger, whatever the draws: buffers of this length have a constant shape
    n_masked_patches: Tensor  # (1,) int64, M


class Batch(Masks):
    """One training batch of `B` images.

    Crops are ordered view by view: crop `v` of image `i` is row `v * B + i`.
    """

    collated_global_crops: Tensor  # (2B, 3, H, W)
    collated_local_crops: Tensor  # (LB, 3, h, w); no rows without local crops


def draw_masks(
    n_crops: int,
    n_tokens: int,
    mask_ratio_tuple: tuple[float, float],
    mask_probability: float,
    mask_generator: Callable[..., np.ndarray],
    rng: random.Random | None = None,
) -> Masks:
    """Mask a share of the global crops of a batch.

    `int(n_crops * mask_probability)` crops are masked. Their ratios are spread over `mask_ratio_tuple`: the range is
    cut into as many equal parts as there are masked crops, and each part gives one ratio. Which crop gets which is
    shuffled.

    Args:
        n_crops: global crops in the batch.
        n_tokens: patches of a global crop.
        mask_ratio_tuple: smallest and largest share of the patches of a crop to mask.
        mask_probability: share of the crops to mask.
        mask_generator: from a number of patches to a boolean mask of `n_tokens` elements; gets `rng` unless None.
        rng: source of the draws; Python's global one when None.
    """
    draws = rng or random
    extra = {} if rng is None else {"rng": rng}
    bounds = _ratio_bounds(n_crops, mask_ratio_tuple, mask_probability)
    masks = [mask_generator(int(n_tokens * draws.uniform(low, high)), **extra) for low, high in pairwise(bounds)]
    masks += [mask_generator(0, **extra) for _ in range(n_crops - len(masks))]
    draws.shuffle(masks)

    stacked = np.stack(masks).reshape(n_crops, n_tokens)
    flat_indices = np.flatnonzero(stacked)
    per_crop = stacked.sum(1)
    weights = np.repeat(1 / np.maximum(per_crop, 1), per_crop).astype(np.float32)
    return {
        "collated_masks": torch.from_numpy(stacked),
        "mask_indices_list": torch.from_numpy(flat_indices),
        "masks_weight": torch.from_numpy(weights),
        "upperbound": mask_upperbound(n_crops, n_tokens, mask_ratio_tuple, mask_probability),
        "n_masked_patches": torch.full((1,), len(flat_indices), dtype=torch.long),
    }


def mask_upperbound(n_crops: int, n_tokens: int, mask_ratio_tuple: tuple[float, float], mask_probability: float) -> int:
    """Most patches that `draw_masks` ever masks."""
    return sum(int(n_tokens * high) for high in _ratio_bounds(n_crops, mask_ratio_tuple, mask_probability)[1:])


def _ratio_bounds(n_crops: int, mask_ratio_tuple: tuple[float, float], mask_probability: float) -> np.ndarray:
    return torch.linspace(*mask_ratio_tuple, int(n_crops * mask_probability) + 1).numpy()


def collate_data_and_cast(
    samples_list: Sequence[dict[str, Any] | tuple[dict[str, Any], Any]],
    mask_ratio_tuple: tuple[float, float],
    mask_probability: float,
    dtype: torch.dtype,
    n_tokens: int | None = None,
    mask_generator: Callable[..., np.ndarray] | None = None,
    rng: random.Random | None = None,
) -> Batch:
    """Stack augmented samples view by view, cast the crops, and draw the masks (see `draw_masks`).

    Args:
        samples_list: what `DataAugmentationDINO` returns, one per image, or pairs of that and an ignored target.
        mask_ratio_tuple: smallest and largest share of the patches of a crop to mask.
        mask_probability: share of the global crops to mask.
        dtype: of the crops.
        n_tokens: patches of a global crop; `mask_generator`'s own number when None.
        mask_generator: a `MaskingGenerator` or a function like one.
        rng: source of the masks' draws; Python's global one when None.

    Raises:
        ValueError: no sample, or no mask generator.
    """
    if not samples_list:
        raise ValueError("collate_data_and_cast needs at least one sample, got none")
    if mask_generator is None:
        raise ValueError("collate_data_and_cast needs a mask_generator, such as MaskingGenerator((16, 16))")
    samples = [sample if isinstance(sample, dict) else sample[0] for sample in samples_list]
    global_crops = _stack_by_view([sample["global_crops"] for sample in samples], dtype)
    local_crops = _stack_by_view([sample["local_crops"] for sample in samples], dtype)
    if local_crops is None:
        local_crops = global_crops.new_empty((0, *global_crops.shape[1:]))
    n_tokens = mask_generator.num_patches if n_tokens is None else n_tokens
    masks = draw_masks(len(global_crops), n_tokens, mask_ratio_tuple, mask_probability, mask_generator, rng)
    return {"collated_global_crops": global_crops, "collated_local_crops": local_crops, **masks}


def _stack_by_view(crops_of_samples: list[Sequence[Tensor]], dtype: torch.dtype) -> Tensor | None:
    """`(views * samples, C, H, W)`, view by view; None when there are no crops."""
    crops = [crop for view in zip(*crops_of_samples, strict=True) for crop in view]
    return torch.stack(crops).to(dtype) if crops else None
