"""From the configuration to batches on the training device."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dinov2.data import DataAugmentationDINO, ImageDataset, MaskingGenerator, MultiCropLoader, make_custom_dataset
from dinov2.data.cache import cache_decoded
from dinov2.data.collate import Batch
from dinov2.data.datasets.registry import is_dataset_string, parse_dataset_string
from dinov2.data.multicrop import TooManyUnreadable
from dinov2.distributed import get_global_rank, get_global_size, is_main_process
from dinov2.train.schedules import total_iterations
from dinov2.utils.config import get_effective_batch_size

logger = logging.getLogger("dinov2")


def build_train_dataset(cfg: Any) -> ImageDataset:
    """The images of `train.dataset_path`, less those held out."""
    return make_custom_dataset(
        image_folders(cfg.train.dataset_path),
        path_preserved=cfg.train.path_preserved,
        frac=cfg.train.frac,
        exclude=cfg.train.exclude,
        in_chans=cfg.student.in_chans,
        cache_dir=cfg.train.cache_dir,
    )


def image_folders(dataset_path: Any) -> Any:
    """The folder that a data set string such as `ImageNet:split=TRAIN:root=R:extra=E` means; paths as they are."""
    if not isinstance(dataset_path, str) or not is_dataset_string(dataset_path):
        return dataset_path
    _, options = parse_dataset_string(dataset_path)
    return Path(options["root"]) / options["split"].value if "split" in options else Path(options["root"])


def build_augmentation(cfg: Any) -> DataAugmentationDINO:
    """The two global and the local views of the recipe, with the probabilities of `augmentations`."""
    crops = cfg.crops
    return DataAugmentationDINO(
        tuple(crops.global_crops_scale),
        tuple(crops.local_crops_scale),
        crops.local_crops_number,
        global_crops_size=crops.global_crops_size,
        local_crops_size=crops.local_crops_size,
        **cfg.augmentations,
    )


class TrainBatches:
    """Batches on the device, one list of `train.gradient_accumulation_steps` per iteration, for ever.

    Args:
        cfg: a whole configuration.
        dataset: training images.
        device: where the batches go.
        dtype: of the crops.
        start_iteration: optimizer steps already done; the stream goes on where that run left it.
    """

    def __init__(
        self, cfg: Any, dataset: ImageDataset, *, device: torch.device, dtype: torch.dtype, start_iteration: int = 0
    ):
        self.device = device
        self.steps = cfg.train.gradient_accumulation_steps
        side = cfg.crops.global_crops_size // cfg.student.patch_size
        n_tokens = side**2
        images = dataset
        if cfg.train.cache_dataset:
            images = cache_decoded(dataset, cfg.train.cache_max_gb, cfg.train.cache_dir or None)
        self.loader = MultiCropLoader(
            images,
            build_augmentation(cfg),
            batch_size=cfg.train.batch_size_per_gpu,
            mask_generator=MaskingGenerator(input_size=(side, side), max_num_patches=0.5 * n_tokens),
            mask_ratio_tuple=tuple(cfg.ibot.mask_ratio_min_max),
            mask_probability=cfg.ibot.mask_sample_probability,
            n_tokens=n_tokens,
            dtype=dtype,
            num_workers=cfg.train.num_workers,
            seed=cfg.train.seed,
            start_iteration=start_iteration * self.steps,
            rank=get_global_rank(),
            world_size=get_global_size(),
            pin_memory=device.type == "cuda",
            augment_on=cfg.train.augment_on,
            max_unreadable_share=cfg.train.max_unreadable_share,
            hold=self.steps,
        )

    @property
    def fault(self) -> TooManyUnreadable | None:
        """Why the run must stop: too many images cannot be read."""
        return self.loader.fault

    def __iter__(self) -> Iterator[list[Batch]]:
        batches = iter(self.loader)
        while True:
            yield [self.loader.to_device(next(batches), self.device) for _ in range(self.steps)]


def describe_data(cfg: Any, dataset: ImageDataset) -> None:
    """Say, before the first step, what the run will learn from, and keep the list of held-out images."""
    iterations, batch = total_iterations(cfg), get_effective_batch_size(cfg)
    logger.info("%s", dataset.summary)
    logger.info(
        "%d iterations of %d images (%d 'epochs' of %d iterations) are %.1f passes over the %d training images",
        iterations,
        batch,
        cfg.optim.epochs,
        cfg.train.OFFICIAL_EPOCH_LENGTH,
        iterations * batch / len(dataset),
        len(dataset),
    )
    if is_main_process() and len(dataset.preserved_images):
        path = Path(cfg.train.output_dir) / "held_out_images.txt"
        dataset.write_preserved(path)
        logger.info("%d held-out images are listed in %s", len(dataset.preserved_images), path)
