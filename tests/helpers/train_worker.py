"""One process of a tiny training on fixed batches, started by torchrun or alone; rank 0 writes what happened.

usage: train_worker.py OUT STEPS STRATEGY CENTERING [CHECKPOINT_FOLDER [key=value ...]]
"""

import json
import sys
from pathlib import Path

import torch
from tiny_training import make_batch, make_model, objective, tiny_config

from dinov2 import distributed
from dinov2.fsdp import FSDPCheckpointer, full_state_dict
from dinov2.train.train import accumulate_gradients, apply_optim_scheduler, build_optimizer, clip_and_step

GLOBAL_BATCH = 4


def shard_of(batch, rank, world):
    """The images of one rank; masks and weights follow their crops."""
    images = GLOBAL_BATCH // world
    own = torch.arange(rank * images, (rank + 1) * images)
    globals_ = torch.cat([own, own + GLOBAL_BATCH])
    n_local = len(batch["collated_local_crops"]) // GLOBAL_BATCH
    locals_ = torch.cat([own + view * GLOBAL_BATCH for view in range(n_local)])
    masks = batch["collated_masks"][globals_]
    weights = (1 / masks.sum(1).clamp(min=1)).unsqueeze(1).expand_as(masks)[masks]
    return {
        "collated_global_crops": batch["collated_global_crops"][globals_],
        "collated_local_crops": batch["collated_local_crops"][locals_],
        "collated_masks": masks,
        "mask_indices_list": masks.flatten().nonzero().flatten(),
        "masks_weight": weights,
        "upperbound": int(masks.sum()),
        "n_masked_patches": masks.sum().view(1),
    }


def main(out, steps, strategy, centering, checkpoints="", *settings):
    torch.set_num_threads(1)
    distributed.enable(device="cpu")
    rank, world = distributed.get_global_rank(), distributed.get_global_size()
    changes = {
        f"compute_precision.{role}.{part}.sharding_strategy": strategy
        for role in ("student", "teacher")
        for part in ("backbone", "dino_head", "ibot_head")
    }
    # Near-duplicate features, as an untrained network makes them, turn rounding into other neighbours: a small weight.
    changes |= {"train.centering": centering, "ibot.separate_head": True, "dino.koleo_distributed": True}
    cfg = tiny_config(**changes, **{"dino.koleo_loss_weight": 0.01}, **dict(s.split("=") for s in settings))
    model = make_model(cfg)
    optimizer = build_optimizer(cfg, model.get_params_groups())
    done = 0
    checkpointer = FSDPCheckpointer(model, checkpoints, optimizer=optimizer, save_to_disk=bool(checkpoints))
    if checkpoints:
        done = checkpointer.resume_or_load().get("iteration", 0)
    losses = []
    for step in range(done, int(steps)):
        apply_optim_scheduler(optimizer, 1e-3, 0.05, 1e-3)
        optimizer.zero_grad()
        model.update_gram_teacher(step)
        terms = accumulate_gradients(model, [shard_of(make_batch(step), rank, world)], 0.05)
        terms = {name: distributed.mean_over_ranks(term) for name, term in terms.items()}
        norms = clip_and_step(optimizer, model, 3.0)
        model.update_teacher(0.9)
        losses.append({"objective": objective(model, terms), **{k: float(v) for k, v in {**terms, **norms}.items()}})
    model.apply_center_updates()
    checkpointer.save(f"model_{int(steps) - 1:07d}", iteration=int(steps))
    weights = full_state_dict(model)
    if rank == 0:
        sums = {name: float(weight.double().abs().sum()) for name, weight in weights.items()}
        Path(out).write_text(json.dumps({"start": done, "losses": losses, "weights": sums}))
    distributed.disable()


if __name__ == "__main__":
    main(*sys.argv[1:])
