"""The five schedules of a run: one value of each per iteration."""

from __future__ import annotations

from typing import Any, NamedTuple

from dinov2.utils.utils import CosineScheduler


class ScheduleValues(NamedTuple):
    """What the schedules say at one iteration."""

    lr: float
    weight_decay: float
    momentum: float  # of the teacher's moving average
    teacher_temp: float
    last_layer_lr: float


class Schedules(NamedTuple):
    """Learning rate, weight decay, teacher momentum, teacher temperature and learning rate of the heads' last layers.

    Unpacks in this order, as DINOv2's `build_schedulers` does.
    """

    lr: CosineScheduler
    weight_decay: CosineScheduler
    momentum: CosineScheduler
    teacher_temp: CosineScheduler
    last_layer_lr: CosineScheduler

    def at(self, iteration: int) -> ScheduleValues:
        """Every value at `iteration`, counted from 0; past the end, the final values."""
        return ScheduleValues(*(float(schedule[iteration]) for schedule in self))


def total_iterations(cfg: Any) -> int:
    """Optimizer steps of the whole run: "epochs" of `train.OFFICIAL_EPOCH_LENGTH`, not passes over the data."""
    return cfg.optim.epochs * cfg.train.OFFICIAL_EPOCH_LENGTH


def build_schedulers(cfg: Any) -> Schedules:
    """The schedules of DINOv2's recipe (paper, appendix A, table 16) for the lengths and values in `cfg`.

    Learning rate: linear warm-up from 0, then cosine to `min_lr`; weight decay and momentum: cosine; temperature:
    linear warm-up, then constant; last layers: as the learning rate, but 0 for `freeze_last_layer_epochs`.
    """
    optim, teacher, epoch = cfg.optim, cfg.teacher, cfg.train.OFFICIAL_EPOCH_LENGTH
    total = total_iterations(cfg)
    lr = {
        "base_value": optim.lr,
        "final_value": optim.min_lr,
        "total_iters": total,
        "warmup_iters": optim.warmup_epochs * epoch,
        "start_warmup_value": 0,
    }
    temp_warmup = teacher.warmup_teacher_temp_epochs * epoch
    schedules = Schedules(
        lr=CosineScheduler(**lr),
        weight_decay=CosineScheduler(optim.weight_decay, optim.weight_decay_end, total),
        momentum=CosineScheduler(teacher.momentum_teacher, teacher.final_momentum_teacher, total),
        # constant after its warm-up: the last value holds past the end of the schedule
        teacher_temp=CosineScheduler(
            teacher.teacher_temp,
            teacher.teacher_temp,
            total_iters=temp_warmup,
            warmup_iters=temp_warmup,
            start_warmup_value=teacher.warmup_teacher_temp,
        ),
        last_layer_lr=CosineScheduler(**lr),
    )
    schedules.last_layer_lr.schedule[: optim.freeze_last_layer_epochs * epoch] = 0
    return schedules
