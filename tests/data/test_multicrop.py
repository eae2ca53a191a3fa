import itertools
import logging
import os
from collections import Counter, namedtuple

import numpy as np
import pytest
import torch

from dinov2.data import multicrop
from dinov2.data.augmentations import DataAugmentationDINO
from dinov2.data.decode import UnreadableImage
from dinov2.data.masking import MaskingGenerator
from dinov2.data.multicrop import MultiCropLoader, TooManyUnreadable
from dinov2.data.samplers import PermutedStream

CPU = torch.device("cpu")


class Pictures:
    """Images that show their own number in their colour; some cannot be read."""

    def __init__(self, count=40, unreadable=()):
        self.count, self.bad = count, set(unreadable)

    def __len__(self):
        return self.count

    def read(self, index):
        if index in self.bad:
            raise UnreadableImage(f"/cells/{index}.jpg", "ends too early")
        image = np.random.default_rng(index).integers(0, 60, (40, 48, 3), dtype=np.uint8)
        image[..., 0] = 4 * index % 256
        return image


def plain_augmentation():
    """Crops that keep the colours."""
    return augmentation(color_jitter=0, grayscale=0, blur_global_1=0, blur_global_2=0, solarize_global_2=0)


def augmentation(n_local=2, **options):
    return DataAugmentationDINO((0.3, 1), (0.1, 0.3), n_local, global_crops_size=28, local_crops_size=14, **options)


def loader(dataset=None, **options):
    settings = {
        "augmentation": augmentation(),
        "batch_size": 4,
        "mask_generator": MaskingGenerator((4, 4), max_num_patches=8),
        "mask_ratio_tuple": (0.1, 0.5),
        "mask_probability": 0.5,
        "n_tokens": 16,
        "dtype": torch.float32,
        "num_workers": 0,
        "seed": 5,
    }
    return MultiCropLoader(dataset or Pictures(), **settings | options)


def first(count, **options):
    """Copies of the first batches."""
    with_loader = loader(**options)
    batches = itertools.islice(iter(with_loader), count)
    return [
        {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
        for batch in (with_loader.to_device(batch, CPU) for batch in batches)
    ]


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs):
        assert one.keys() == other.keys()
        for key, value in one.items():
            same = torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]
            assert same, key


@pytest.fixture
def two_cpus(monkeypatch):
    monkeypatch.setattr(multicrop, "resolve_num_workers", lambda requested, _: requested)


@pytest.mark.usefixtures("two_cpus")
@pytest.mark.parametrize("augment_on", ["cpu", "device"])
def test_batches_do_not_depend_on_the_number_of_workers(augment_on):
    expected = first(6, augment_on=augment_on)
    for num_workers in (1, 2):
        assert_same(first(6, num_workers=num_workers, augment_on=augment_on), expected)


def test_a_run_that_starts_in_the_middle_sees_what_the_whole_run_saw():
    assert_same(first(3, start_iteration=4), first(7)[4:])


def test_another_seed_gives_other_batches():
    assert not torch.equal(first(1)[0]["collated_masks"], first(1, seed=6)[0]["collated_masks"])


def numbers_in(batch):
    """Which image each first global crop shows."""
    red = batch["collated_global_crops"][:4, 0].mean((1, 2)) * 0.229 + 0.485
    return (red * 255 / 4).round().int().tolist()


def test_rank_r_of_w_holds_every_wth_position_of_the_shuffled_stream():
    stream = PermutedStream(40, 5)[np.arange(24)].reshape(3, 4, 2)
    for rank in range(2):
        batches = first(3, augmentation=plain_augmentation(), rank=rank, world_size=2)
        assert [numbers_in(batch) for batch in batches] == stream[:, :, rank].tolist()


def test_two_ranks_see_together_what_one_process_with_the_double_batch_sees():
    whole = first(2, batch_size=8)
    for rank in range(2):
        half = first(2, rank=rank, world_size=2)
        for one, other in zip(half, whole):
            views = other["collated_global_crops"].unflatten(0, (2, 8))[:, rank::2]
            assert torch.equal(one["collated_global_crops"], views.flatten(0, 1))


def test_a_batch_has_the_keys_shapes_and_consistent_masks_of_the_collate_function():
    (batch,) = first(1, dtype=torch.bfloat16)
    assert batch["collated_global_crops"].shape == (8, 3, 28, 28)
    assert batch["collated_local_crops"].shape == (8, 3, 14, 14)
    assert batch["collated_global_crops"].dtype == torch.bfloat16
    masks = batch["collated_masks"]
    assert torch.equal(masks.flatten().nonzero().flatten(), batch["mask_indices_list"])
    assert batch["n_masked_patches"].tolist() == [int(masks.sum())]
    assert int(masks.sum()) <= batch["upperbound"]
    assert len(batch["masks_weight"]) == int(masks.sum())
    assert batch["masks_weight"].sum() == pytest.approx((masks.sum(1) > 0).sum().item(), abs=1e-4)


def test_without_local_crops_the_batch_has_none():
    (batch,) = first(1, augmentation=augmentation(n_local=0))
    assert len(batch["collated_local_crops"]) == 0


@pytest.mark.usefixtures("two_cpus")
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("hold", [1, 3])
def test_as_many_batches_stay_valid_as_are_held(num_workers, hold):
    expected = first(12)
    held = []
    for number, batch in enumerate(itertools.islice(iter(loader(num_workers=num_workers, hold=hold)), 12)):
        held = [*held, (number, batch)][-hold:]
        for which, still_valid in held:
            assert_same([still_valid], [expected[which]])


class SixteenBit(Pictures):
    def read(self, index):
        return np.random.default_rng(index).integers(0, 4096, (40, 48, 2)).astype(np.uint16)


def test_images_of_two_channels_become_batches_of_two_channels():
    two = augmentation(mean=(0.0, 0.0), std=(1.0, 1.0))
    (batch,) = first(1, dataset=SixteenBit(), augmentation=two, dtype=torch.float16)
    assert batch["collated_local_crops"].shape == (8, 2, 14, 14)
    assert batch["collated_global_crops"].abs().max() < 1
    with pytest.raises(ValueError, match="is for RGB"):
        loader(SixteenBit(), augmentation=two, augment_on="device")


def test_augmenting_on_the_device_gives_the_same_crops_to_within_a_level():
    options = {"augmentation": augmentation(vertical_flip=0.5, rotate90=True, hed_jitter=0.05), "batch_size": 16}
    on_cpu, on_device = (loader(augment_on=where, **options) for where in ("cpu", "device"))
    raw = next(iter(on_device))
    assert raw["collated_global_crops"].dtype == torch.uint8
    finished = on_device.to_device(raw, CPU)
    assert "crop_parameters" not in finished
    assert_levels_agree(next(iter(on_cpu)), finished)


def assert_levels_agree(expected, finished):
    assert expected.keys() == finished.keys()
    for key in ("collated_global_crops", "collated_local_crops"):
        levels = (expected[key] - finished[key]).abs() * 255 * 0.225
        assert levels.mean() < 0.01
        assert levels.max() < 5


@pytest.mark.gpu
def test_a_gpu_finishes_the_crops_as_the_cpu_does():
    device = torch.device("cuda")
    on_device = loader(augment_on="device", pin_memory=True, batch_size=16)
    finished = on_device.to_device(next(iter(on_device)), device)
    assert finished["collated_global_crops"].is_cuda
    on_host = {key: value.cpu() if isinstance(value, torch.Tensor) else value for key, value in finished.items()}
    assert_levels_agree(next(iter(loader(batch_size=16))), on_host)


@pytest.mark.usefixtures("two_cpus")
def test_an_unreadable_image_is_named_once_and_replaced_the_same_way_every_time(caplog):
    caplog.set_level(logging.WARNING, logger="dinov2")
    logging.getLogger("dinov2").propagate = True
    dataset = Pictures(unreadable=(3, 17))
    with_loader = loader(dataset, max_unreadable_share=0.2)
    ours = [batch["collated_global_crops"].clone() for batch in itertools.islice(iter(with_loader), 20)]
    assert with_loader.unreadable == {"/cells/3.jpg": "ends too early", "/cells/17.jpg": "ends too early"}
    assert Counter(record.getMessage() for record in caplog.records).most_common(1)[0][1] == 1
    assert with_loader.data_stats.unreadable >= 4  # 80 images drawn out of 40, so both came twice
    others = itertools.islice(iter(loader(dataset, max_unreadable_share=0.2, num_workers=2)), 20)
    assert all(torch.equal(one, other["collated_global_crops"]) for one, other in zip(ours, others))


def test_the_rest_of_the_batch_is_as_if_the_image_had_been_readable():
    dataset = Pictures(unreadable=(int(PermutedStream(40, 5)[np.array([2])][0]),))
    ours = first(1, dataset=dataset)[0]["collated_global_crops"]
    theirs = first(1)[0]["collated_global_crops"]
    same = [torch.equal(one, other) for one, other in zip(ours, theirs)]
    assert same == [True, True, False, True] * 2


def test_too_large_a_share_of_unreadable_images_stops_the_run_with_their_names():
    with pytest.raises(TooManyUnreadable, match=r"max_unreadable_share=0.05.*(\n.*)*/cells/\d+\.jpg"):
        first(20, dataset=Pictures(unreadable=range(10)), max_unreadable_share=0.05)


def test_bad_luck_in_the_first_pass_does_not_stop_a_run():
    in_order = PermutedStream(1000, 5)[np.arange(1000)]
    first_images = Pictures(1000, unreadable=in_order[np.arange(0, 240, 40)])  # 2.5 % of 240, 0.6 % of all
    assert len(first(60, dataset=first_images, max_unreadable_share=0.01)) == 60


def test_a_few_unreadable_images_never_stop_a_run():
    assert len(first(20, dataset=Pictures(unreadable=range(5)), max_unreadable_share=0.0)) == 20


def test_a_dataset_of_which_nothing_can_be_read_ends_with_an_error():
    with pytest.raises(TooManyUnreadable, match="100 images in a row"):
        first(3, dataset=Pictures(unreadable=range(40)))


def test_a_run_learns_of_too_many_unreadable_images_in_time_to_save_and_stop():
    with_loader = loader(Pictures(unreadable=range(40)))
    batches = iter(with_loader)
    assert next(batches)["collated_global_crops"].isfinite().all()  # black images, but a whole batch
    assert isinstance(with_loader.fault, TooManyUnreadable)
    next(batches)  # the other processes may ask for one more before they have heard
    with pytest.raises(TooManyUnreadable):
        next(batches)


def test_sources_are_drawn_by_their_weights():
    span = namedtuple("span", "start stop weight")

    class TwoSources(Pictures):
        spans = (span(0, 30, 1.0), span(30, 40, 6.0))

    seen = Counter()
    for batch in itertools.islice(iter(loader(TwoSources(), augmentation=plain_augmentation())), 100):
        seen.update(numbers_in(batch))
    from_second = sum(count for number, count in seen.items() if number >= 30) / 400
    assert abs(from_second - 60 / 90) < 0.08
    assert len(seen) == 40


def test_the_stats_count_images_and_time():
    with_loader = loader()
    list(itertools.islice(iter(with_loader), 3))
    stats = with_loader.data_stats
    assert (stats.batches, stats.images, stats.unreadable) == (3, 12, 0)
    assert stats.wait_seconds >= 0
    assert stats.worker_seconds > 0


def test_too_little_shared_memory_is_said_before_the_workers_start(monkeypatch):
    room = namedtuple("room", "f_bavail f_frsize")
    monkeypatch.setattr(os, "statvfs", lambda path: room(100, 1024))
    monkeypatch.setattr(multicrop, "resolve_num_workers", lambda requested, _: requested)
    with pytest.raises(ValueError, match="--shm-size"):
        loader(num_workers=2)


@pytest.mark.parametrize(("option", "value"), [("augment_on", "moon"), ("hold", 0), ("batch_size", 0)])
def test_an_option_that_cannot_be_is_refused(option, value):
    with pytest.raises(ValueError, match=option):
        loader(**{option: value})
