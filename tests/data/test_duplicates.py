import cv2
import numpy as np
import pytest
from PIL import Image

from dinov2.data.duplicates import groups_of_equals, groups_of_neighbours, perceptual_hash


def picture(seed):
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((120, 120), Image.BICUBIC))


def distance(a, b):
    return (a ^ b).bit_count()


@pytest.mark.parametrize(
    "change",
    [
        lambda image: cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 50])[1], cv2.IMREAD_COLOR),
        lambda image: cv2.resize(image, (60, 60), interpolation=cv2.INTER_AREA),
        lambda image: (image * 0.8 + 20).astype(np.uint8),
    ],
)
def test_a_copy_that_was_encoded_rescaled_or_brightened_keeps_its_hash_but_for_few_bits(change):
    for seed in range(20):
        assert distance(perceptual_hash(picture(seed)), perceptual_hash(change(picture(seed)))) <= 6


def test_different_pictures_differ_in_about_half_of_the_bits():
    hashes = [perceptual_hash(picture(seed)) for seed in range(40)]
    distances = [distance(a, b) for i, a in enumerate(hashes) for b in hashes[:i]]
    assert min(distances) > 10
    assert 28 < np.mean(distances) < 36


def test_equals_are_grouped():
    assert [group.tolist() for group in groups_of_equals(np.array([5, 1, 5, 2, 1, 5, 7]))] == [[0, 2, 5], [1, 4]]
    assert groups_of_equals(np.array([])) == []


def flip(value, bits):
    for bit in bits:
        value ^= 1 << int(bit)
    return value


def test_the_lookup_finds_what_comparing_all_pairs_finds():
    rng = np.random.default_rng(0)
    bases = [int(value) for value in rng.integers(0, 1 << 63, 300, dtype=np.uint64)]
    hashes = np.array(
        bases + [flip(base, rng.choice(64, rng.integers(0, 12), replace=False)) for base in bases], np.uint64
    )
    distances = np.array([[distance(int(a), int(b)) for b in hashes] for a in hashes])
    for limit in (0, 3, 7):
        found = {tuple(group.tolist()) for group in groups_of_neighbours(hashes, limit)}
        want = {(i, i + 300) for i in range(300) if distances[i, i + 300] <= limit}
        assert found == want


def test_neighbours_of_neighbours_are_one_group_and_equal_hashes_too():
    chain = [0, flip(0, range(6)), flip(0, range(12)), (1 << 63) - 1, (1 << 63) - 1]
    assert [group.tolist() for group in groups_of_neighbours(np.array(chain, np.uint64))] == [[0, 1, 2], [3, 4]]
    assert groups_of_neighbours(np.array([], np.uint64)) == []


def test_a_hundred_thousand_hashes_are_looked_up_in_seconds():
    hashes = np.random.default_rng(0).integers(0, 1 << 63, 100_000, dtype=np.uint64)
    hashes[1] = hashes[0] ^ np.uint64(0b10101)
    assert [group.tolist() for group in groups_of_neighbours(hashes)] == [[0, 1]]
