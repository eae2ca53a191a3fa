"""Train DINOv2: what happens, in the order in which it happens.

python dinov2/train/train.py --config-file CONFIG --output-dir DIR [key=value ...]
torchrun --standalone --nproc_per_node=4 dinov2/train/train.py --config-file CONFIG --output-dir DIR
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError
from torch import Tensor

from dinov2 import distributed
from dinov2.data.multicrop import TooManyUnreadable
from dinov2.fsdp import CheckpointError, FSDPCheckpointer, clip_gradients, full_state_dict, set_gradient_sync
from dinov2.logging import MetricLogger, build_trackers
from dinov2.models.weights import save_backbone
from dinov2.train.build import (
    TrainBatches,
    build_train_dataset,
    describe_data,
)
from dinov2.train.engine import prepare_backbone
from dinov2.train.flops import ideal_step_time
from dinov2.train.health import HealthMonitor, append_reading, read_history
from dinov2.train.profiling import DEFAULT_STEPS, profiled_steps
from dinov2.train.resume import compare_with_checkpoint, run_identity, set_logs_aside
from dinov2.train.schedules import ScheduleValues, build_schedulers, total_iterations
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.train.watch import NonFiniteLossError, StepWatch, stop_on_signal
from dinov2.utils.config import get_effective_batch_size, setup, write_config
from dinov2.utils.errors import exit_code_of
from dinov2.utils.utils import fix_random_seeds

logger = logging.getLogger("dinov2")

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: a signal asked to stop, a checkpoint is written, the same command goes on
EXIT_NOT_FINITE = 76  # the loss was not finite; the last good checkpoint stands


class TrainingInterrupted(Exception):
    """A signal asked the run to stop; its checkpoint is complete."""


def get_args_parser(add_help: bool = True) -> argparse.ArgumentParser:
    """Options of the training command."""
    parser = argparse.ArgumentParser(
        "dinov2 train", description="Train DINOv2 on folders of images.", add_help=add_help
    )
    parser.add_argument("--config-file", default="", metavar="FILE", help="YAML file; what it leaves out has defaults")
    parser.add_argument("--no-resume", action="store_true", help="start anew even if the output folder has checkpoints")
    parser.add_argument("--eval-only", action="store_true", help="score the newest checkpoint and write its weights")
    parser.add_argument("--eval", type=str, default="", help="with --eval-only: the checkpoint folder to score")
    parser.add_argument(
        "--profile", action="store_true", help=f"trace {DEFAULT_STEPS} steps, or train.profile_steps, into profile/"
    )
    parser.add_argument("--output-dir", "--output_dir", default="", type=str, help="where logs and weights go")
    parser.add_argument("opts", nargs="*", default=None, metavar="key=value", help="settings that override the file's")
    return parser


def build_optimizer(cfg: Any, params_groups: list[dict[str, Any]]) -> torch.optim.AdamW:
    """AdamW, fused; its learning rates and weight decays are set at every step."""
    return torch.optim.AdamW(params_groups, betas=(cfg.optim.adamw_beta1, cfg.optim.adamw_beta2), fused=True)


def apply_optim_scheduler(optimizer: torch.optim.Optimizer, lr: float, wd: float, last_layer_lr: float) -> None:
    """Set every group's learning rate and weight decay from the schedules and the group's multipliers."""
    for group in optimizer.param_groups:
        group["weight_decay"] = wd * group["wd_multiplier"]
        group["lr"] = (last_layer_lr if group["is_last_layer"] else lr) * group["lr_multiplier"]


def freeze_backbone(optimizer: torch.optim.Optimizer) -> None:
    """Let only the heads learn at this step."""
    for group in optimizer.param_groups:
        if group["submodule"] == "backbone":
            group["lr"] = 0.0


def accumulate_gradients(model: SSLMetaArch, batches: Sequence[Any], teacher_temp: float) -> dict[str, Tensor]:
    """Forward and backward over the batches of one step; each loss term's mean over them."""
    totals: dict[str, Tensor] = {}
    for number, batch in enumerate(batches, start=1):
        if len(batches) > 1:
            set_gradient_sync(model.student, number == len(batches))
        for name, loss in model.forward_backward(batch, teacher_temp, loss_scale=1 / len(batches)).items():
            totals[name] = totals.get(name, 0.0) + loss / len(batches)
    return totals


def clip_and_step(optimizer: torch.optim.Optimizer, model: SSLMetaArch, clip_grad: float) -> dict[str, Tensor]:
    """Clip each sub-module's gradients (0: do not) and move the weights, unless a gradient is not finite.

    Whether to skip is decided on the device, by norms that are the same on all ranks, so the host does not wait.

    Returns:
        The gradient norm of each sub-module before clipping.
    """
    scaler = model.fp16_scaler
    max_norm = clip_grad * scaler.scale_factor if scaler.enabled else clip_grad
    norms = {
        name: clip_gradients(module, max_norm if clip_grad > 0 else None) for name, module in model.student.items()
    }
    found_inf = (~torch.isfinite(sum(norms.values()))).float()
    optimizer.found_inf, optimizer.grad_scale = found_inf, scaler.scale_factor
    optimizer.step()
    norms = {f"grad_norm_{name}": norm / scaler.scale_factor for name, norm in norms.items()}
    scaler.update(found_inf)
    return norms


def do_train(cfg: Any, model: SSLMetaArch, resume: bool = False, *, profile_steps: int = 0) -> dict[str, float]:
    """Train to the end of the schedules; return the mean of every metric since the last (re)start.

    Args:
        cfg: a whole configuration with an absolute `train.output_dir`.
        model: on its device, prepared for distributed training.
        resume: go on from the newest checkpoint in the output folder, if there is one.
        profile_steps: steps of this start to trace; 0: as `train.profile_steps` says.

    Raises:
        TrainingInterrupted: a signal asked to stop; the checkpoint is complete.
        TooManyUnreadable: too many images cannot be read; the checkpoint is complete.
        NonFiniteLossError: the loss was not finite twice in a row; the last good checkpoint stands.
        ResumeError: the checkpoint belongs to a run with other settings.
    """
    model.train()
    optimizer = build_optimizer(cfg, model.get_params_groups())
    schedules = build_schedulers(cfg)
    checkpointer = build_checkpointer(cfg, model, optimizer)
    dataset = build_train_dataset(cfg)
    describe_data(cfg, dataset)
    identity = run_identity(cfg, dataset)
    start, stop = resume_or_start(cfg, identity, checkpointer, resume), total_iterations(cfg)
    data = TrainBatches(cfg, dataset, device=model.device, dtype=model.input_dtype, start_iteration=start)
    history = earlier_readings(cfg, start)
    health = HealthMonitor(cfg, device=model.device, held_out=dataset.preserved_images, history=history)
    metrics = build_metric_logger(cfg, model)
    watch = StepWatch(model.device)
    interrupted, unwritten = False, None
    with (
        contextlib.closing(checkpointer),
        contextlib.closing(metrics),
        stop_on_signal() as stop_request,
        profiled_steps(cfg.train.output_dir, profile_steps or cfg.train.profile_steps, model.device) as step_is_done,
    ):
        if start == 0:
            report_health(cfg, model, health, metrics, iteration=0)
        elif is_due(start, cfg.evaluation.eval_period_iterations, last=stop) and not was_read(history, start):
            unwritten = write_weights(cfg, model, start)  # the stop came first
            report_health(cfg, model, health, metrics, iteration=start)
        steps = metrics.log_every(
            data, cfg.train.log_period, "Training", stop, start, should_stop=lambda: watch.stop_agreed
        )
        for iteration, batches in enumerate(steps, start=start):
            now = schedules.at(iteration)
            apply_optim_scheduler(optimizer, now.lr, now.weight_decay, now.last_layer_lr)
            if iteration < cfg.optim.freeze_backbone_epochs * cfg.train.OFFICIAL_EPOCH_LENGTH:
                freeze_backbone(optimizer)

            model.watched = iteration % cfg.train.log_period == 0 or iteration == stop - 1  # the steps reported
            model.update_gram_teacher(iteration)
            optimizer.zero_grad(set_to_none=True)
            losses = accumulate_gradients(model, batches, now.teacher_temp)
            grad_norms = clip_and_step(optimizer, model, cfg.optim.clip_grad)
            model.update_teacher(now.momentum)

            # Under loss scaling a gradient that overflows is in order: the scale adapts.
            watched = losses if model.fp16_scaler.enabled else {**losses, **grad_norms}
            means = watch.observe(iteration, watched, stop=bool(stop_request or data.fault))
            losses = {name: means[name] for name in losses}
            metrics.update(total_loss=sum(losses.values()), **losses, **grad_norms, **schedule_metrics(now))
            metrics.set_latest(**(model.vital_signs if model.watched else {}))

            done = iteration + 1
            interrupted = watch.stop_agreed and done < stop
            if interrupted or is_due(done, checkpoint_period(cfg), last=stop):
                save(identity, checkpointer, model, done)
            if done == stop or (not interrupted and is_due(done, cfg.evaluation.eval_period_iterations, last=stop)):
                unwritten = write_weights(cfg, model, done)
                report_health(cfg, model, health, metrics, iteration=done)
            step_is_done()
        watch.finish()
        checkpointer.wait()
    if checkpointer.last_save_failed:
        raise CheckpointError("the last checkpoint could not be written, see the log; the one before it stands")
    raise_data_fault(data)
    if interrupted:
        raise TrainingInterrupted(f"stopped after {done} of {stop} iterations, as a signal asked; all is saved")
    if unwritten is not None:
        raise unwritten
    return {name: meter.global_avg for name, meter in metrics.meters.items()}


@torch.no_grad()
def do_test(cfg: Any, model: SSLMetaArch, iteration: int | str) -> Path:
    """Write the teacher's weights; every rank enters, the main one writes.

    `eval/training_N/` gets `teacher_checkpoint.pth` (`{"teacher": {"backbone.…", "dino_head.…"}}`, DINOv2's layout) and
    the backbone alone under the plain hub names with its configuration inside (`teacher_backbone.pth`, `.safetensors`).

    Args:
        cfg: a whole configuration.
        model: prepared for distributed training.
        iteration: the number of iterations done, or the folder's name.

    Returns:
        The folder.

    Raises:
        CheckpointError: they could not be written, a full disk for example; on every rank.
    """
    name = iteration if isinstance(iteration, str) else f"training_{iteration}"
    folder = Path(cfg.train.output_dir) / "eval" / name
    weights = full_state_dict(model.teacher)
    problem = ""
    if distributed.is_main_process():
        try:
            _write_teacher(folder, weights, OmegaConf.to_container(cfg, resolve=True))
            logger.info("wrote the teacher's weights to %s", folder)
        except (OSError, RuntimeError, SafetensorError) as error:  # PyTorch tells a full disk as a RuntimeError
            free = shutil.disk_usage(cfg.train.output_dir).free / 2**20
            problem = f"the teacher's weights could not be written to {folder} ({free:.0f} MiB free there): {error}"
    if problem := distributed.broadcast_object(problem):
        raise CheckpointError(problem)
    return folder


def _write_teacher(folder: Path, weights: dict[str, Tensor], settings: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / ".teacher_checkpoint.partial"
    try:
        torch.save({"teacher": weights}, partial)
        partial.replace(folder / "teacher_checkpoint.pth")
    finally:
        partial.unlink(missing_ok=True)
    backbone = {key.removeprefix("backbone."): w for key, w in weights.items() if key.startswith("backbone.")}
    for suffix in (".pth", ".safetensors"):
        save_backbone(backbone, folder / f"teacher_backbone{suffix}", settings)


def write_weights(cfg: Any, model: SSLMetaArch, iteration: int) -> CheckpointError | None:
    """`do_test` within a run, which weights that cannot be written do not end: return what went wrong, if anything."""
    try:
        do_test(cfg, model, iteration)
    except CheckpointError as error:
        logger.error("%s", error)
        return error
    return None


def report_health(cfg: Any, model: SSLMetaArch, health: HealthMonitor, metrics: MetricLogger, iteration: int) -> None:
    """Score the teacher; every rank enters. The numbers go to `eval_metrics.json`, the log and TensorBoard."""
    if cfg.evaluation.eval_period_iterations <= 0:
        return
    signs = health.measure(model.teacher["backbone"], alarm=iteration > 0)
    if not signs:
        return
    logger.info("health after %d iterations: %s", iteration, "  ".join(f"{k}={v:.4g}" for k, v in signs.items()))
    metrics.log_scalars(iteration, {f"eval/{name}": value for name, value in signs.items()})
    if distributed.is_main_process():
        append_reading(cfg.train.output_dir, iteration, signs)


# Pieces of a run --------------------------------------------------------------------------------------------------


def earlier_readings(cfg: Any, start: int) -> list[dict[str, float]]:
    """The readings of the run up to where it goes on, as the main process finds them: the same on every rank."""
    found = read_history(cfg.train.output_dir, before=start) if start and distributed.is_main_process() else []
    return distributed.broadcast_object(found)


def was_read(history: list[dict[str, float]], iteration: int) -> bool:
    """Whether there is a reading of that iteration."""
    return any(row["iteration"] == iteration for row in history)


def raise_data_fault(data: TrainBatches) -> None:
    """Raise on every rank what made one of them stop: too many images that cannot be read."""
    faults = [fault for fault in distributed.gather_objects(data.fault and str(data.fault)) if fault]
    if faults:
        raise TooManyUnreadable(f"{faults[0]}\nThe run has stopped, all is saved")


def build_metric_logger(cfg: Any, model: SSLMetaArch) -> MetricLogger:
    """Losses, speeds and schedules to the console, `training_metrics.json` and TensorBoard."""
    output_dir = Path(cfg.train.output_dir)
    return MetricLogger(
        output_file=output_dir / "training_metrics.json",
        tensorboard_dir=output_dir / "tensorboard",
        images_per_iteration=get_effective_batch_size(cfg),
        window_size=cfg.train.log_period,  # a report tells of the iterations since the one before
        ideal_iteration_time=ideal_step_time(model, cfg),
        writers=build_trackers(cfg.train.loggers, output_dir, OmegaConf.to_container(cfg, resolve=True)),
    )


def build_checkpointer(cfg: Any, model: SSLMetaArch, optimizer: torch.optim.Optimizer) -> FSDPCheckpointer:
    """Checkpoints under `checkpoints/` of the output folder, written while training goes on where that is asked for."""
    asynchronous = cfg.checkpoint.asynchronous
    return FSDPCheckpointer(
        model,
        Path(cfg.train.output_dir) / "checkpoints",
        optimizer=optimizer,
        scaler=model.fp16_scaler,
        keep_last=cfg.checkpoint.keep_last,
        keep_every=cfg.checkpoint.keep_every_iterations,
        asynchronous=model.device.type == "cuda" if asynchronous == "auto" else asynchronous,
    )


def resume_or_start(cfg: Any, identity: dict[str, Any], checkpointer: FSDPCheckpointer, resume: bool) -> int:
    """The number of iterations already done: those of the newest checkpoint, or 0.

    The output folder's `config.yaml` is written here: one that is refused leaves the old one as it was.
    """
    if not resume:
        checkpointer.set_aside()
    found = checkpointer.get_checkpoint_file()
    if found:
        compare_with_checkpoint(identity, found)
    else:
        set_logs_aside(cfg.train.output_dir)
    if distributed.is_main_process():
        write_config(cfg, cfg.train.output_dir)
    if not found:
        return 0
    extra = checkpointer.load(found)
    logger.info("resuming from %s, after %d iterations", found, extra["iteration"])
    return extra["iteration"]


def save(identity: dict[str, Any], checkpointer: FSDPCheckpointer, model: SSLMetaArch, done: int) -> None:
    """Write the checkpoint that a run of `done` iterations goes on from."""
    model.apply_center_updates()
    checkpointer.save(f"model_{done - 1:07d}", iteration=done, config=identity)


def checkpoint_period(cfg: Any) -> int:
    """Iterations between checkpoints."""
    return cfg.checkpoint.period_iterations or cfg.train.saveckp_freq * cfg.train.OFFICIAL_EPOCH_LENGTH


def is_due(done: int, period: int, *, last: int) -> bool:
    """Whether something that happens every `period` iterations, and after the last, happens after `done` of them."""
    return period > 0 and (done % period == 0 or done == last)


def schedule_metrics(now: ScheduleValues) -> dict[str, float]:
    """The schedules under the names that DINOv2 logs them by."""
    return {
        "lr": now.lr,
        "wd": now.weight_decay,
        "mom": now.momentum,
        "last_layer_lr": now.last_layer_lr,
        "teacher_temp": now.teacher_temp,
    }


def choose_device(requested: str) -> torch.device:
    """`auto`: this process's GPU where there is one, else the CPU."""
    if requested != "auto":
        return torch.device(requested)
    if torch.cuda.is_available():
        return torch.device("cuda", distributed.get_local_rank() % torch.cuda.device_count())
    return torch.device("cpu")


def build_model(cfg: Any) -> SSLMetaArch:
    """Student and teacher on this process's device, ready to train."""
    device, rank = choose_device(cfg.train.device), distributed.get_global_rank()
    fix_random_seeds(cfg.train.seed)  # replicas must start alike: nobody sends weights around
    model = SSLMetaArch(cfg, device).to(device)
    if rank > 0:
        fix_random_seeds(cfg.train.seed + rank)  # but drop other samples
    prepare_backbone(model.student["backbone"], cfg.train.activation_checkpointing, compiled=cfg.train.compile)
    for role in ("teacher", *model.frozen_roles()):
        prepare_backbone(getattr(model, role)["backbone"], "none", compiled=cfg.train.compile)
    model.prepare_for_distributed_training()
    return model


def main(args: argparse.Namespace | Sequence[str] | None = None) -> int:
    """Train, or with `--eval-only` score and export a checkpoint; return the exit code.

    Args:
        args: parsed options, or the command line to parse; by default the process's own.
    """
    if not isinstance(args, argparse.Namespace):
        args = get_args_parser().parse_args(args)
    cfg = setup(args, for_training=not args.eval_only, write=False)
    profile_steps = cfg.train.profile_steps or (DEFAULT_STEPS if args.profile else 0)
    try:
        model = build_model(cfg)
        if args.eval_only:
            export_checkpoint(cfg, model, args.eval)
        else:
            do_train(cfg, model, resume=not args.no_resume, profile_steps=profile_steps)
    except TrainingInterrupted as reason:
        logger.warning("%s. The same command goes on from there (exit code %d)", reason, EXIT_INTERRUPTED)
        return EXIT_INTERRUPTED
    except NonFiniteLossError as reason:
        logger.error("%s (exit code %d)", reason, EXIT_NOT_FINITE)
        return EXIT_NOT_FINITE
    finally:
        distributed.disable()
    return 0


def export_checkpoint(cfg: Any, model: SSLMetaArch, checkpoint: str = "") -> None:
    """Score the teacher of a checkpoint (the newest when none is named) and write its weights.

    Raises:
        CheckpointError: there is none.
    """
    checkpointer = FSDPCheckpointer(model, Path(cfg.train.output_dir) / "checkpoints", save_to_disk=False)
    found = checkpoint or checkpointer.get_checkpoint_file()
    if not found:
        raise CheckpointError(f"no checkpoint in {checkpointer.save_dir}; train first, or name one with --eval")
    done = checkpointer.load(found)["iteration"]
    held_out = build_train_dataset(cfg).preserved_images if cfg.train.dataset_path else None
    health = HealthMonitor(cfg, device=model.device, held_out=held_out, history=earlier_readings(cfg, done))
    do_test(cfg, model, done)
    with contextlib.closing(build_metric_logger(cfg, model)) as metrics:
        report_health(cfg, model, health, metrics, done)


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
