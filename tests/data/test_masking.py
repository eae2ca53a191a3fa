import random

import numpy as np
import pytest

from dinov2.data.masking import MaskingGenerator


def test_a_mask_never_has_more_patches_than_asked_for_and_rarely_many_fewer():
    generator = MaskingGenerator((16, 16), max_num_patches=128)
    rng = random.Random(0)
    counts = np.array([generator(70, rng=rng).sum() for _ in range(300)])
    assert counts.max() <= 70
    assert counts.mean() > 66


def test_the_first_block_is_a_rectangle_with_an_aspect_between_its_bounds():
    generator = MaskingGenerator((32, 32), min_num_patches=100, max_num_patches=101)
    rng = random.Random(1)
    for _ in range(100):
        mask = np.zeros((32, 32), dtype=bool)
        area = generator._add_block(mask, 101, rng)
        rows, columns = np.nonzero(mask)
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert area == height * width
        assert 0.3 * 0.85 < height / width < 1 / 0.3 / 0.85  # whole patches move the aspect a little


def test_without_a_number_nothing_is_masked_unless_the_generator_has_one():
    assert MaskingGenerator((8, 8))().sum() == 0
    assert 0 < MaskingGenerator((8, 8), num_masking_patches=20)(rng=random.Random(0)).sum() <= 20


def test_the_stream_of_its_own_rng_does_not_touch_the_global_one():
    generator = MaskingGenerator(14)
    random.seed(3)
    expected = random.random()
    random.seed(3)
    first = generator(60, rng=random.Random(5))
    assert random.random() == expected
    assert np.array_equal(first, generator(60, rng=random.Random(5)))


@pytest.mark.parametrize("size", [(7, 9), 14])
def test_it_describes_itself_and_its_shape(size):
    generator = MaskingGenerator(size)
    assert "MaskingGenerator(grid" in repr(generator)
    assert generator(3).shape == generator.get_shape()


def test_a_grid_of_one_patch_ends_with_an_empty_mask():
    assert MaskingGenerator(1)(1).sum() == 0
