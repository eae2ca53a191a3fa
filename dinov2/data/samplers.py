"""Which image comes when.

The samplers keep DINOv2's streams. A rank takes every `step`-th element of each pass, from `start` on; by default these
are the rank and the number of processes. `advance` counts elements of the rank's own stream, so a sampler that is
advanced by `n` goes on exactly where one that gave `n` elements stopped, however many processes there are.
"""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler

from dinov2.distributed import get_global_rank, get_global_size


def _own_slice(sample_count: int, start: int | None, step: int | None) -> tuple[int, int]:
    """Fill in the rank and the number of processes; refuse a slice that would be empty for ever."""
    start = get_global_rank() if start is None else start
    step = get_global_size() if step is None else step
    if sample_count < 1:
        raise ValueError("cannot sample from an empty dataset (sample_count is 0)")
    if start >= sample_count:
        raise ValueError(
            f"a sampler that starts at {start} gets none of {sample_count} samples: use fewer processes or more images"
        )
    return start, step


def _index_dtype(size: int) -> torch.dtype:
    return torch.int32 if size <= 2**31 else torch.int64


class EpochSampler(Sampler[int]):
    """`size` indices per epoch out of `sample_count`, repeating samples where `size` is larger.

    When shuffled, the order depends on both the seed and the epoch (`set_epoch`).
    """

    def __init__(
        self,
        *,
        size: int,
        sample_count: int,
        shuffle: bool = False,
        seed: int = 0,
        start: int | None = None,
        step: int | None = None,
    ):
        self._size = size
        self._sample_count = sample_count
        self._shuffle = shuffle
        self._seed = seed
        self._start = get_global_rank() if start is None else start
        self._step = get_global_size() if step is None else step
        self._epoch = 0

    def __iter__(self) -> Iterator[int]:
        indices = np.arange(self._size) % self._sample_count
        if self._shuffle:
            whole_passes = np.arange(-(-self._size // self._sample_count) * self._sample_count) % self._sample_count
            rng = np.random.default_rng([self._seed, self._epoch])
            indices = rng.choice(whole_passes, self._size, replace=False)
        yield from indices[self._start :: self._step].tolist()

    def __len__(self) -> int:
        return len(range(self._start, self._size, self._step))

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration."""
        self._epoch = epoch


class InfiniteSampler(Sampler[int]):
    """Passes over the samples without end, each in a new order when shuffled.

    Raises:
        ValueError: `start` lies behind the last sample, so that the stream would be empty.
    """

    def __init__(
        self,
        *,
        sample_count: int,
        shuffle: bool = False,
        seed: int = 0,
        start: int | None = None,
        step: int | None = None,
        advance: int = 0,
    ):
        self._sample_count = sample_count
        self._shuffle = shuffle
        self._seed = seed
        self._start, self._step = _own_slice(sample_count, start, step)
        self._advance = advance

    def __iter__(self) -> Iterator[int]:
        passes = self._shuffled_passes() if self._shuffle else itertools.repeat(range(self._sample_count))
        whole_passes, rest = divmod(self._advance, len(range(self._start, self._sample_count, self._step)))
        own = (one_pass[self._start :: self._step] for one_pass in itertools.islice(passes, whole_passes, None))
        yield from itertools.islice(itertools.chain.from_iterable(map(_as_ints, own)), rest, None)

    def _shuffled_passes(self) -> Iterator[torch.Tensor]:
        # One generator for all passes: a pass can only be reached through those before it, as in DINOv2.
        generator = torch.Generator().manual_seed(self._seed)
        while True:
            yield torch.randperm(self._sample_count, dtype=_index_dtype(self._sample_count), generator=generator)
            torch.randint(1, (1,), generator=generator)  # DINOv2 also draws for the last position of a pass


class ShardedInfiniteSampler(Sampler[int]):
    """Like `InfiniteSampler`, but each rank shuffles its own shard, and any pass can be reached at once.

    The shards come from one permutation for all passes. Shuffled shards have equal lengths: the last
    `sample_count % step` samples of that permutation are left out.

    Args:
        sample_count: samples in the dataset.
        shuffle: a new order in each pass.
        seed: of the permutation, and with the rank and the pass of the order in a shard.
        start: first element of the shard; the rank when None.
        step: distance between elements of the shard; the number of processes when None.
        advance: elements of the own stream to skip.
        use_new_shuffle_tensor_slice: shuffle shards with one call of `torch.randperm`; another, faster stream.

    Raises:
        ValueError: the shard has no sample, so that the stream would be empty.
    """

    def __init__(
        self,
        *,
        sample_count: int,
        shuffle: bool = False,
        seed: int = 0,
        start: int | None = None,
        step: int | None = None,
        advance: int = 0,
        use_new_shuffle_tensor_slice: bool = False,
    ):
        self._sample_count = sample_count
        self._shuffle = shuffle
        self._seed = seed
        self._start, self._step = _own_slice(sample_count, start, step)
        if shuffle and sample_count < self._step:
            raise ValueError(
                f"{sample_count} samples cannot be shared by {self._step} processes: use fewer processes or more images"
            )
        self._advance = advance
        self._order = _fast_order if use_new_shuffle_tensor_slice else _inside_out_order

    def __iter__(self) -> Iterator[int]:
        shard: torch.Tensor | range = range(self._sample_count)[self._start :: self._step]
        if self._shuffle:
            generator = torch.Generator().manual_seed(self._seed)
            everything = torch.randperm(self._sample_count, dtype=_index_dtype(self._sample_count), generator=generator)
            shard = everything[self._start :: self._step][: self._sample_count // self._step]
        whole_passes, rest = divmod(self._advance, len(shard))
        passes = (self._one_pass(shard, number) for number in itertools.count(whole_passes))
        yield from itertools.islice(itertools.chain.from_iterable(passes), rest, None)

    def _one_pass(self, shard: torch.Tensor | range, number: int) -> list[int] | range:
        if not self._shuffle:
            return shard
        return shard[self._order(len(shard), self._seed + self._start + (number << 24))].tolist()


def _as_ints(indices: torch.Tensor | range) -> list[int] | range:
    return indices.tolist() if isinstance(indices, torch.Tensor) else indices


def _fast_order(count: int, seed: int) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def _inside_out_order(count: int, seed: int) -> torch.Tensor:
    """The inside-out Fisher-Yates shuffle with one draw of torch's Mersenne twister per element after the first.

    NumPy's twister gives the same 32-bit words for the same seed, all at once.
    """
    words = np.random.RandomState(seed & 0xFFFFFFFF).randint(0, 2**32, size=max(0, count - 1), dtype=np.uint32)
    partners = (words % np.arange(2, count + 1, dtype=np.uint32)).tolist()
    order = [0] * min(count, 1)
    for i, j in enumerate(partners, start=1):
        order.append(order[j] if j < i else i)
        order[j] = i
    return torch.tensor(order, dtype=torch.long)


class PermutedStream:
    """Random access to an endless shuffled stream: position -> sample, in constant memory.

    Each pass is its own pseudo-random permutation, a six-round Feistel network over the next power of four that is
    walked until it lands inside the dataset. Nothing is stored, so 100 million images cost no shuffling memory, any
    worker can compute any position, and a resumed run needs its iteration number only.

    Source: Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002 (cycle walking).
    """

    _ROUNDS = 6

    def __init__(self, sample_count: int, seed: int):
        if sample_count < 1:
            raise ValueError("cannot sample from an empty dataset (sample_count is 0)")
        self.sample_count = sample_count
        self.seed = seed
        self._half_bits = np.uint64(max(1, -(-(sample_count - 1).bit_length() // 2)))

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        """Sample indices at stream positions, both int64 arrays of one shape."""
        positions = np.asarray(positions, dtype=np.int64)
        keys = self._round_keys(positions // self.sample_count)
        values = (positions % self.sample_count).astype(np.uint64)
        outside = np.ones(values.shape, dtype=bool)
        while outside.any():
            values[outside] = self._permute(values[outside], keys[:, outside])
            outside = values >= self.sample_count
        return values.astype(np.int64)

    def _round_keys(self, passes: np.ndarray) -> np.ndarray:
        seed = _mix(np.uint64(self.seed & 0xFFFFFFFFFFFFFFFF))
        rounds = np.arange(1, self._ROUNDS + 1, dtype=np.uint64).reshape(-1, *[1] * passes.ndim)
        return _mix(_mix(seed ^ passes.astype(np.uint64)) ^ rounds)

    def _permute(self, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
        mask = (np.uint64(1) << self._half_bits) - np.uint64(1)
        left, right = values >> self._half_bits, values & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        return (left << self._half_bits) | right


class WeightedStream:
    """An endless shuffled stream over several spans of samples, each drawn as often as its weight says.

    A sample of weight 2 comes twice as often as one of weight 1. The spans alternate in one fixed pattern; within a
    span every sample comes once before any comes again. Random access and constant memory as in `PermutedStream`.

    Args:
        spans: first sample, one after the last, and weight of each span.
        seed: of the pattern and of the orders.
    """

    _PATTERN = 4096  # positions; shares of spans are rounded to multiples of 1 / 4096

    def __init__(self, spans: Sequence[tuple[int, int, float]], seed: int):
        self._starts = np.array([start for start, _, _ in spans])
        mass = np.array([(stop - start) * weight for start, stop, weight in spans])
        bounds = np.rint(np.cumsum([0, *mass]) / mass.sum() * self._PATTERN).astype(int)
        if (np.diff(bounds) < 1).any():
            raise ValueError(
                f"a source has less than 1 / {self._PATTERN} of all draws; raise its weight or leave it out"
            )
        self._per_pattern = np.diff(bounds)
        spans_in_order = np.repeat(np.arange(len(spans)), self._per_pattern)
        self._pattern = spans_in_order[PermutedStream(self._PATTERN, seed)[np.arange(self._PATTERN)]]
        self._before = np.array([(self._pattern[:i] == span).sum() for i, span in enumerate(self._pattern)])
        self._streams = [
            PermutedStream(stop - start, seed + number + 1) for number, (start, stop, _) in enumerate(spans)
        ]

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        """Sample indices at stream positions, both int64 arrays of one shape."""
        rounds, offsets = np.divmod(np.asarray(positions, dtype=np.int64), self._PATTERN)
        spans = self._pattern[offsets]
        ordinals = rounds * self._per_pattern[spans] + self._before[offsets]
        samples = np.empty_like(ordinals)
        for span, (start, stream) in enumerate(zip(self._starts, self._streams)):
            samples[spans == span] = start + stream[ordinals[spans == span]]
        return samples


def _mix(words: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64: a bijection of 64-bit words that leaves no visible structure."""
    with np.errstate(over="ignore"):
        words = words + np.uint64(0x9E3779B97F4A7C15)
        words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
