import random

import numpy as np
import pytest
import torch

from dinov2.data.collate import collate_data_and_cast, draw_masks
from dinov2.data.masking import MaskingGenerator


def sample(value: float, n_local: int = 3) -> dict:
    return {
        "global_crops": [torch.full((3, 28, 28), value + view / 10) for view in range(2)],
        "local_crops": [torch.full((3, 14, 14), value + view / 10) for view in range(n_local)],
    }


def collate(samples, **overrides):
    options = {
        "mask_ratio_tuple": (0.1, 0.5),
        "mask_probability": 0.5,
        "dtype": torch.float32,
        "n_tokens": 256,
        "mask_generator": MaskingGenerator((16, 16), max_num_patches=128),
        "rng": random.Random(0),
    }
    return collate_data_and_cast(samples, **options | overrides)


def test_crops_come_view_by_view_in_the_type_asked_for():
    batch = collate([sample(1.0), sample(2.0)], dtype=torch.bfloat16)
    assert batch["collated_global_crops"].dtype == torch.bfloat16
    assert batch["collated_global_crops"][:, 0, 0, 0].float().tolist() == pytest.approx([1.0, 2.0, 1.1, 2.1], abs=0.01)
    assert batch["collated_local_crops"].shape == (6, 3, 14, 14)


def test_pairs_with_a_target_give_the_same_batch_as_bare_samples():
    bare, pairs = collate([sample(1.0)]), collate([(sample(1.0), None)])
    assert torch.equal(bare["collated_global_crops"], pairs["collated_global_crops"])
    assert torch.equal(bare["collated_masks"], pairs["collated_masks"])


def test_a_batch_without_local_crops_has_no_rows_of_them():
    assert len(collate([sample(1.0, n_local=0)])["collated_local_crops"]) == 0


def test_every_masked_position_weighs_one_over_the_masked_positions_of_its_crop():
    batch = collate([sample(float(i)) for i in range(8)])
    masks, weights = batch["collated_masks"], batch["masks_weight"]
    per_crop = masks.sum(1)
    assert torch.equal(masks.flatten().nonzero().flatten(), batch["mask_indices_list"])
    assert batch["n_masked_patches"].tolist() == [int(per_crop.sum())]
    assert weights.dtype == torch.float32
    expected = torch.cat([torch.full((int(count),), 1 / count) for count in per_crop if count])
    torch.testing.assert_close(weights, expected)


def test_half_of_the_crops_are_masked_with_ratios_spread_over_the_range():
    def first_cells(count):
        return np.arange(100) < count

    masks = draw_masks(8, 100, (0.1, 0.5), 0.5, first_cells)
    counts = sorted(masks["collated_masks"].sum(1).tolist())
    assert counts[:4] == [0, 0, 0, 0]
    assert all(low <= count <= low + 10 for low, count in zip((10, 20, 30, 40), counts[4:]))
    assert masks["upperbound"] == 20 + 30 + 40 + 50


def test_masks_depend_on_their_rng_only():
    generator = MaskingGenerator((16, 16))
    one, two = (draw_masks(8, 256, (0.1, 0.5), 0.5, generator, random.Random(7)) for _ in range(2))
    assert torch.equal(one["collated_masks"], two["collated_masks"])


def test_an_empty_batch_and_a_missing_generator_are_refused():
    with pytest.raises(ValueError, match="at least one sample"):
        collate([])
    with pytest.raises(ValueError, match="needs a mask_generator"):
        collate([sample(1.0)], mask_generator=None)
