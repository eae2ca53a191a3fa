import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from dinov2.data.samplers import EpochSampler, InfiniteSampler, PermutedStream, ShardedInfiniteSampler, WeightedStream

INFINITE = [
    lambda **kw: InfiniteSampler(shuffle=True, **kw),
    lambda **kw: InfiniteSampler(shuffle=False, **kw),
    lambda **kw: ShardedInfiniteSampler(shuffle=True, **kw),
    lambda **kw: ShardedInfiniteSampler(shuffle=True, use_new_shuffle_tensor_slice=True, **kw),
    lambda **kw: ShardedInfiniteSampler(shuffle=False, **kw),
]


def take(sampler, count):
    return list(itertools.islice(iter(sampler), count))


@pytest.mark.parametrize("make", INFINITE)
@pytest.mark.parametrize("advance", [1, 4, 10, 14, 37])
@pytest.mark.parametrize(("start", "step"), [(0, 1), (1, 2), (2, 3)])
def test_an_advanced_sampler_goes_on_where_the_other_stopped(make, advance, start, step):
    where = {"sample_count": 11, "seed": 7, "start": start, "step": step}
    whole = take(make(**where), advance + 25)
    assert take(make(**where, advance=advance), 25) == whole[advance:]


def test_the_infinite_stream_is_one_torch_draw_per_position():
    generator = torch.Generator().manual_seed(5)
    expected = []
    for _ in range(2):
        order = list(range(9))
        for i in range(9):
            j = int(torch.randint(i, 9, (1,), generator=generator))
            order[i], order[j] = order[j], order[i]
        expected += order
    assert take(InfiniteSampler(sample_count=9, shuffle=True, seed=5), 18) == expected
    assert take(InfiniteSampler(sample_count=9, shuffle=True, seed=5, start=1, step=2), 8) == [
        *expected[:9][1::2],
        *expected[9:][1::2],
    ]


def test_the_old_sharded_shuffle_is_inside_out_with_one_torch_draw_per_element():
    seed, start, step, count = 7, 1, 2, 11
    generator = torch.Generator().manual_seed(seed)
    shard = torch.randperm(count, generator=generator)[start::step][: count // step].tolist()
    expected = []
    for number in range(3):
        generator.manual_seed(seed + start + (number << 24))
        result = []
        for i, value in enumerate(shard):
            j = int(torch.randint(0, i + 1, (1,), generator=generator)) if i else 0
            result.append(value)
            result[i], result[j] = result[j], value
        expected += result
    sampler = ShardedInfiniteSampler(sample_count=count, shuffle=True, seed=seed, start=start, step=step)
    assert take(sampler, 15) == expected


def test_shards_of_different_ranks_are_disjoint():
    shards = [take(ShardedInfiniteSampler(sample_count=12, shuffle=True, start=r, step=3), 4) for r in range(3)]
    assert sorted(itertools.chain(*shards)) == list(range(12))


@pytest.mark.parametrize("make", INFINITE)
def test_a_stream_that_would_stay_empty_is_refused(make):
    with pytest.raises(ValueError, match="use fewer processes or more images"):
        make(sample_count=3, start=4, step=8)


def test_epochs_repeat_and_cut_the_samples_in_order():
    assert list(EpochSampler(size=7, sample_count=5, start=0, step=1)) == [0, 1, 2, 3, 4, 0, 1]
    sampler = EpochSampler(size=10, sample_count=25, start=1, step=3)
    assert list(sampler) == [1, 4, 7]
    assert len(sampler) == 3


def shuffled_epoch(seed, epoch, **where):
    sampler = EpochSampler(size=50, sample_count=50, shuffle=True, seed=seed, **{"start": 0, "step": 1} | where)
    sampler.set_epoch(epoch)
    return list(sampler)


def test_the_order_of_an_epoch_depends_on_the_seed_and_the_epoch():
    orders = [shuffled_epoch(seed, epoch) for seed, epoch in ((0, 0), (1, 0), (0, 1), (2, 3), (3, 2))]
    assert len({tuple(order) for order in orders}) == 5
    assert all(sorted(order) == list(range(50)) for order in orders)


def test_ranks_share_a_shuffled_epoch_between_them():
    ranks = [shuffled_epoch(3, 4, start=rank, step=2) for rank in range(2)]
    assert [index for pair in zip(*ranks) for index in pair] == shuffled_epoch(3, 4)


@pytest.mark.parametrize("count", [1, 2, 5, 64, 1000])
def test_every_pass_of_the_permuted_stream_holds_every_sample_once(count):
    stream = PermutedStream(count, seed=3)
    passes = stream[np.arange(3 * count)].reshape(3, count)
    assert (np.sort(passes, axis=1) == np.arange(count)).all()
    if count > 5:
        assert not np.array_equal(passes[0], passes[1])


def test_the_permuted_stream_is_random_access_and_reaches_all_orders_alike():
    stream = PermutedStream(1000, seed=1)
    assert np.array_equal(stream[np.array([1500, 3, 999])], stream[np.arange(2000)][[1500, 3, 999]])
    orders = Counter(tuple(PermutedStream(3, seed)[np.arange(3)].tolist()) for seed in range(3000))
    assert len(orders) == 6
    chi2 = sum((count - 500) ** 2 / 500 for count in orders.values())
    assert chi2 < 20.5  # 0.1 % of true randomness lies above, at 5 degrees of freedom


def test_a_permutation_of_a_hundred_million_needs_no_memory_for_it():
    stream = PermutedStream(100_000_000, seed=0)
    drawn = stream[np.arange(100_000)]
    assert drawn.min() >= 0
    assert drawn.max() < 100_000_000
    assert len(np.unique(drawn)) == 100_000
    assert abs(drawn.mean() / 1e8 - 0.5) < 0.005


def test_a_weighted_stream_visits_every_sample_of_a_span_before_any_again():
    stream = WeightedStream([(0, 100, 1.0), (100, 120, 5.0)], seed=2)
    drawn = stream[np.arange(8000)]
    second = drawn[drawn >= 100]
    assert abs(len(second) / 8000 - 0.5) < 0.01
    assert (np.sort(second[:200].reshape(10, 20), axis=1) == np.arange(100, 120)).all()
    assert np.array_equal(stream[np.array([7000, 5])], drawn[[7000, 5]])


def test_a_source_that_would_hardly_ever_be_drawn_is_refused():
    with pytest.raises(ValueError, match="raise its weight"):
        WeightedStream([(0, 1_000_000, 1.0), (1_000_000, 1_000_001, 1.0)], seed=0)
