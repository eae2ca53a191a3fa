import logging
import multiprocessing
import os
import pickle
import tarfile
import time
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2.data import ImageDataset, UnreadableImage
from dinov2.data.augmentations import DataAugmentationDINO
from dinov2.data.cache import CachedImages, cache_decoded
from dinov2.data.masking import MaskingGenerator
from dinov2.data.multicrop import MultiCropLoader


@pytest.fixture
def dataset(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "cells").mkdir()
    for i in range(20):
        pixels = rng.integers(0, 256, (30 + i, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "cells" / f"{i:02}.png")
    return ImageDataset(tmp_path / "cells", cache_dir=tmp_path / "cache")


class Counted:
    """A dataset that counts its reads."""

    def __init__(self, dataset):
        self.dataset, self.reads = dataset, 0

    def __len__(self):
        return len(self.dataset)

    def path(self, index):
        return self.dataset.path(index)

    def read(self, index):
        self.reads += 1
        return self.dataset.read(index)


def read_all(images):
    return [images.read(i).copy() for i in range(len(images))]


def same(ours, theirs):
    return all(np.array_equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_each_image_is_decoded_once_whoever_reads_it(dataset, tmp_path):
    expected = read_all(dataset)
    counted = Counted(dataset)
    for _ in range(3):
        assert same(read_all(CachedImages(counted, tmp_path / "file.pixels", 10**6)), expected)
    assert counted.reads == 20


def test_images_that_find_no_room_are_decoded_each_time(dataset, tmp_path):
    expected = read_all(dataset)
    counted = Counted(dataset)
    images = CachedImages(counted, tmp_path / "file.pixels", 10 * 5000)
    assert same(read_all(images), expected)
    assert same(read_all(images), expected)
    assert 20 < counted.reads < 40
    assert os.stat(tmp_path / "file.pixels").st_size < 10 * 5000 + 8192


def test_an_image_that_changed_is_not_taken_from_the_file(dataset, tmp_path):
    read_all(CachedImages(dataset, tmp_path / "file.pixels", 10**6))
    Image.new("RGB", (40, 30), (9, 8, 7)).save(dataset.path(3))
    os.utime(dataset.path(3), (time.time() + 5, time.time() + 5))
    assert CachedImages(dataset, tmp_path / "file.pixels", 10**6).read(3)[0, 0].tolist() == [9, 8, 7]


def test_a_shard_written_anew_under_the_same_names_is_read_anew(tmp_path):
    shard = tmp_path / "cells.tar"

    def write(colour):
        Image.new("RGB", (16, 16), colour).save(tmp_path / "cell.png")
        with tarfile.open(shard, "w") as archive:
            archive.add(tmp_path / "cell.png", "class/cell.png")
        return ImageDataset(shard, cache_dir=tmp_path / "cache")

    assert CachedImages(write((1, 2, 3)), tmp_path / "file.pixels", 10**6).read(0)[0, 0].tolist() == [1, 2, 3]
    os.utime(shard, (time.time() - 100, time.time() - 100))
    assert CachedImages(write((9, 8, 7)), tmp_path / "file.pixels", 10**6).read(0)[0, 0].tolist() == [9, 8, 7]


def test_an_unreadable_image_stays_unreadable(dataset, tmp_path):
    os.truncate(dataset.path(5), 60)
    images = CachedImages(dataset, tmp_path / "file.pixels", 10**6)
    for _ in range(2):
        with pytest.raises(UnreadableImage, match=r"05\.png"):
            images.read(5)


def _read_in_own_order(images, seed, answers):
    order = np.random.default_rng(seed).permutation(len(images)).tolist()
    sums = {index: int(images.read(index).astype(np.int64).sum()) for index in order * 3}
    answers.put([sums[index] for index in range(len(images))])


def test_processes_that_fill_the_file_at_the_same_time_read_the_right_pixels(dataset, tmp_path):
    expected = [int(pixels.astype(np.int64).sum()) for pixels in read_all(dataset)]
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    processes = [
        context.Process(
            target=_read_in_own_order,
            args=(CachedImages(dataset, tmp_path / "file.pixels", 10**6), seed, answers),
        )
        for seed in range(3)
    ]
    for process in processes:
        process.start()
    assert [answers.get(timeout=60) for _ in processes] == [expected] * 3
    for process in processes:
        process.join()
    taken = np.fromfile(tmp_path / "file.pixels", np.int64, 5)[4]
    assert taken <= 4096 + 20 * (50 * 40 * 3 + 64)  # nothing was written twice


def test_a_copy_by_pickle_shares_the_file(dataset, tmp_path):
    counted = Counted(dataset)
    images = CachedImages(counted, tmp_path / "file.pixels", 10**6)
    expected = read_all(images)
    copy = pickle.loads(pickle.dumps(images))
    assert same(read_all(copy), expected)
    assert copy.dataset.reads == counted.reads


def test_a_file_for_other_images_is_replaced(dataset, tmp_path):
    (tmp_path / "file.pixels").write_bytes(b"something else")
    assert same(read_all(CachedImages(dataset, tmp_path / "file.pixels", 10**6)), read_all(dataset))


def test_a_dataset_larger_than_the_limit_is_left_as_it_is(dataset, caplog):
    logging.getLogger("dinov2").propagate = True
    caplog.set_level(logging.INFO, logger="dinov2")
    assert cache_decoded(dataset, max_gb=1e-5) is dataset
    assert "more than train.cache_max_gb" in caplog.text


def test_the_cached_dataset_is_still_the_dataset(dataset, tmp_path):
    images = cache_decoded(dataset, max_gb=0.1, cache_dir=tmp_path / "cache")
    assert isinstance(images, CachedImages)
    assert images.summary.used == len(images) == 20
    assert images.path(3) == dataset.path(3)
    assert images.spans == dataset.spans


def test_crops_are_the_same_with_and_without_the_cache(dataset, tmp_path):
    def batches(images):
        loader = MultiCropLoader(
            images,
            DataAugmentationDINO((0.3, 1), (0.1, 0.3), 2, 28, 14),
            batch_size=4,
            mask_generator=MaskingGenerator((2, 2)),
            mask_ratio_tuple=(0.1, 0.5),
            mask_probability=0.5,
            n_tokens=4,
            dtype=torch.float32,
            num_workers=0,
            seed=0,
        )
        return [batch["collated_global_crops"].clone() for batch in islice(iter(loader), 12)]

    cached = cache_decoded(dataset, max_gb=0.1, cache_dir=tmp_path / "cache")
    assert all(torch.equal(one, other) for one, other in zip(batches(cached), batches(dataset)))
