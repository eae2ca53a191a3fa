"""Images that occur twice: byte for byte, or nearly so to the eye."""

from __future__ import annotations

import hashlib

import cv2
import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from tqdm import tqdm

from .decode import UnreadableImage
from .manifest import PathList

NEAR_BITS = 6  # of 64; re-encoded, rescaled or brightened copies differ by less, different cells by 10 and more
_LARGEST_BUCKET = 512  # candidates looked at per lookup: keeps the search linear where very many images look alike
_PAIRS_AT_ONCE = 1 << 22
_BITS_SET = np.array([number.bit_count() for number in range(1 << 16)], np.uint8)


def perceptual_hash(image: np.ndarray) -> int:
    """Return 64 bits that change little when an image is re-encoded, rescaled or brightened.

    Each bit says whether one of the 64 lowest spatial frequencies of the image, scaled to 32 x 32 gray, is stronger
    than their median (the usual "pHash").

    Args:
        image: uint8 RGB (height, width, 3).
    """
    gray = cv2.resize(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (32, 32), interpolation=cv2.INTER_AREA)
    frequencies = cv2.dct(gray.astype(np.float32))[:8, :8].ravel()
    frequencies[0] = 0  # the mean brightness
    bits = frequencies > np.median(frequencies[1:])
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def content_hashes(paths: PathList) -> np.ndarray:
    """Return a uint64 per image file that is the same for the same bytes; 0 where a file cannot be read."""
    hashes = np.zeros(len(paths), np.uint64)
    for position in tqdm(range(len(paths)), desc="looking for copies", unit="image", leave=False):
        try:
            data = paths.read(position)
        except (OSError, UnreadableImage):
            continue
        hashes[position] = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
    return hashes


def groups_of_equals(keys: np.ndarray) -> list[np.ndarray]:
    """Return the positions of equal rows, one sorted array per value that occurs more than once.

    Args:
        keys: one sortable value per position.
    """
    _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    repeated = np.flatnonzero(counts[inverse] > 1)
    return _by_label(repeated, inverse[repeated])


def groups_of_neighbours(hashes: np.ndarray, max_distance: int = NEAR_BITS) -> list[np.ndarray]:
    """Return the positions of hashes linked by at most `max_distance` different bits, as `groups_of_equals` does.

    Two hashes that differ in at most seven bits agree in one of their four quarters up to one bit. So each is looked
    up by its quarters and by those with one bit flipped: 68 lookups, whatever the number of hashes.

    Args:
        hashes: uint64, from `perceptual_hash`.
        max_distance: at most 7.
    """
    if max_distance > 7:
        raise ValueError(f"max_distance={max_distance}: the lookup finds pairs that differ in at most 7 bits")
    values, inverse = np.unique(np.asarray(hashes, np.uint64), return_inverse=True)
    pairs = [pair for shift in (0, 16, 32, 48) for pair in _pairs_by_quarter(values, shift, max_distance)]
    first, second = np.concatenate([np.empty((2, 0), np.int64), *pairs], axis=1)
    links = coo_matrix((np.ones(len(first), bool), (first, second)), shape=(len(values), len(values)))
    label = connected_components(links, directed=False)[1][inverse] if len(values) else inverse
    repeated = np.flatnonzero(np.bincount(label, minlength=1)[label] > 1)
    return _by_label(repeated, label[repeated])


def _pairs_by_quarter(values: np.ndarray, shift: int, max_distance: int):
    """Yield (2, pairs) arrays of positions i < j whose 16 bits at `shift` agree up to one bit, and that are near."""
    quarter = ((values >> np.uint64(shift)) & np.uint64(0xFFFF)).astype(np.int64)
    order = np.argsort(quarter, kind="stable")
    starts = np.searchsorted(quarter[order], np.arange((1 << 16) + 1))
    for flip in (0, *(1 << bit for bit in range(16))):
        first = starts[quarter ^ flip]
        counts = np.minimum(starts[(quarter ^ flip) + 1] - first, _LARGEST_BUCKET)
        bounds = np.searchsorted(np.cumsum(counts), np.arange(0, counts.sum() + _PAIRS_AT_ONCE, _PAIRS_AT_ONCE))
        for start, stop in zip(bounds, [*bounds[1:], len(values)]):
            some = counts[start:stop]
            i = np.repeat(np.arange(start, stop), some)
            within = np.arange(len(i)) - np.repeat(np.cumsum(some) - some, some)
            j = order[np.repeat(first[start:stop], some) + within]
            near = (i < j) & (_distance(values[i], values[j]) <= max_distance)
            yield np.stack([i[near], j[near]])


def _distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return _BITS_SET[(a ^ b).view(np.uint16).reshape(-1, 4)].sum(1)


def _by_label(positions: np.ndarray, labels: np.ndarray) -> list[np.ndarray]:
    order = np.argsort(labels, kind="stable")
    edges = np.flatnonzero(np.diff(labels[order])) + 1
    groups = np.split(positions[order], edges) if len(positions) else []
    return sorted(groups, key=lambda group: group[0])
