"""The other side of `benchmarks/against_lightly.py`: trains with lightly-train, in that package's own environment."""

import json
import sys
import time
from functools import partial
from pathlib import Path

import lightly_train
from lightly_train._methods.dinov2.dinov2 import DINOv2
from lightly_train._models.dinov2_vit.dinov2_vit_src.layers import MemEffAttention
from lightly_train._models.dinov2_vit.dinov2_vit_src.layers import NestedTensorBlock as Block
from lightly_train._models.dinov2_vit.dinov2_vit_src.models.vision_transformer import DinoVisionTransformer


def main(settings: dict) -> None:
    ends: list[float] = []
    finish_step = DINOv2.on_train_batch_end  # moves the teacher

    def finish_and_note(*args, **kwargs) -> None:
        finish_step(*args, **kwargs)
        ends.append(time.monotonic())

    DINOv2.on_train_batch_end = finish_and_note
    steps = settings["epochs"] * settings["steps_per_epoch"]
    crops, heads = settings["crops"], settings["heads"]
    lightly_train.pretrain(
        out=settings["out"],
        data=settings["data"],
        model=DinoVisionTransformer(
            img_size=crops["global_crops_size"],
            patch_size=14,
            embed_dim=192,
            depth=12,
            num_heads=3,
            init_values=1e-5,
            block_chunks=0,
            drop_path_rate=0.0,
            block_fn=partial(Block, attn_class=MemEffAttention),
        ),
        method="dinov2",
        method_args={
            "ibot_separate_head": True,
            "hidden_dim": heads["head_hidden_dim"],
            "dino_bottleneck_dim": heads["head_bottleneck_dim"],
            "ibot_bottleneck_dim": heads["head_bottleneck_dim"],
            "output_dim": heads["head_n_prototypes"],
            "center_method": "sinkhorn_knopp",
            "momentum_start": 0.97,
            "teacher_temp_warmup_steps": steps // 2,
            "warmup_steps": steps // 6,
            "student_freeze_last_layer_steps": 0,
            "layerwise_decay": 1.0,
            "weight_decay_end": 0.2,
        },
        optim_args={"lr": settings["base_lr"]},
        transform_args={
            "image_size": [crops["global_crops_size"]] * 2,
            "random_resize": dict(zip(("min_scale", "max_scale"), crops["global_crops_scale"], strict=True)),
            "color_jitter": {"strength": 1.0, "brightness": 0.25, "contrast": 0.25, "saturation": 0.2, "hue": 0.03},
            "random_gray_scale": 0.0,
            "gaussian_blur": {"sigmas": [0.1, 0.5]},
            "global_view_1": {"gaussian_blur": {"sigmas": [0.1, 0.5]}, "solarize": None},
            "local_view": {
                "num_views": crops["local_crops_number"],
                "view_size": [crops["local_crops_size"]] * 2,
                "random_resize": dict(zip(("min_scale", "max_scale"), crops["local_crops_scale"], strict=True)),
                "gaussian_blur": {"sigmas": [0.1, 0.5]},
            },
        },
        epochs=settings["epochs"],
        batch_size=settings["batch"],
        num_workers=1,
        accelerator="cpu",
        devices=1,
        precision=settings["precision"],
        seed=settings["seed"],
        overwrite=True,
    )
    Path(settings["out"], "step_ends.json").write_text(json.dumps(ends))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
