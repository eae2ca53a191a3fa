"""The whole training command, small enough for a test."""

import json

TINY = {
    "train.OFFICIAL_EPOCH_LENGTH": 4,
    "train.batch_size_per_gpu": 4,
    "train.num_workers": 0,
    "train.log_period": 1,
    "train.device": "cpu",
    "train.centering": "sinkhorn_knopp",
    "dino.head_n_prototypes": 32,
    "dino.head_bottleneck_dim": 16,
    "dino.head_hidden_dim": 32,
    "student.arch": "vit_tiny",
    "student.patch_size": 14,
    "student.drop_path_rate": 0.2,
    "teacher.warmup_teacher_temp_epochs": 1,
    "optim.epochs": 2,
    "optim.warmup_epochs": 1,
    "optim.freeze_last_layer_epochs": 0,
    "crops.global_crops_size": 28,
    "crops.local_crops_size": 14,
    "crops.local_crops_number": 2,
    "evaluation.eval_period_iterations": 4,
    "checkpoint.period_iterations": 2,
}


def arguments(folder, output_dir, *extra, **changes):
    settings = {"train.dataset_path": folder, **TINY, **changes}
    return ["--output-dir", str(output_dir), *extra, *(f"{key}={value}" for key, value in settings.items())]


def losses_of(output_dir):
    rows = [json.loads(line) for line in (output_dir / "training_metrics.json").read_text().splitlines()]
    return {row["iteration"]: row["total_loss"] for row in rows}
