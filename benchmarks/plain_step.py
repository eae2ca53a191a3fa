"""An optimizer step in the style of the published trainer: the baseline of `benchmarks/train_step.py`.

It computes what our step computes, from our modules' weights, as that trainer goes about it: one eager pass per crop
size, heads over a buffer of the most patches that a batch can mask, a log-softmax per pair of crops in float32,
PyTorch's default AdamW, losses read by the host at every step; float32 on a CPU, float16 with loss scaling on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.data.collate import Batch
from dinov2.train.ssl_meta_arch import SSLMetaArch

STUDENT_TEMP = 0.1


class PlainStep:
    """Call it with a batch: one step of training `model` in place; returns the losses as numbers."""

    def __init__(self, cfg: Any, model: SSLMetaArch, *, teacher_temp: float = 0.05, momentum: float = 0.999):
        self.cfg, self.student, self.teacher = cfg, model.student, model.teacher
        self.device, self.teacher_temp, self.momentum = model.device, teacher_temp, momentum
        self.half = self.device.type == "cuda"
        groups = [{**group, "lr": 1e-6} for group in model.get_params_groups()]
        self.optimizer = torch.optim.AdamW(groups, betas=(cfg.optim.adamw_beta1, cfg.optim.adamw_beta2))
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.half)
        self.patch_head = "ibot_head" if cfg.ibot.separate_head else "dino_head"

    def __call__(self, batch: Batch) -> dict[str, float]:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.float16, enabled=self.half):
            terms = self.losses(batch)
        self.scaler.scale(sum(terms.values())).backward()
        self.scaler.unscale_(self.optimizer)
        for module in self.student.values():
            nn.utils.clip_grad_norm_(module.parameters(), self.cfg.optim.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.update_teacher()
        return {name: term.item() for name, term in terms.items()}

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        images = len(batch["collated_global_crops"]) // 2
        targets, patch_targets = self.targets(batch, images)
        masks = batch["collated_masks"]
        cls, patches = backbone(self.student["backbone"], batch["collated_global_crops"], masks)
        local_cls, _ = backbone(self.student["backbone"], batch["collated_local_crops"])
        said = self.student["dino_head"](torch.cat([local_cls, cls]))
        *locals_, one, two = said.split(images)
        said_patches = self.head_of_masked_patches(self.student, patches, batch)

        pairs = 2 + 2 * len(locals_)
        weights = self.cfg.dino
        patch_loss = cross_entropy(said_patches, patch_targets) * batch["masks_weight"]
        return {
            "local": weights.loss_weight * dino_loss(locals_, targets) / pairs,
            "global": weights.loss_weight * (dino_loss([one], targets[1:]) + dino_loss([two], targets[:1])) / pairs,
            "koleo": weights.koleo_loss_weight * sum(koleo_loss(view) for view in cls.split(images)),
            "patch": self.cfg.ibot.loss_weight * patch_loss.sum() / len(masks),
        }

    @torch.no_grad()
    def targets(self, batch: Batch, images: int) -> tuple[list[Tensor], Tensor]:
        cls, patches = backbone(self.teacher["backbone"], batch["collated_global_crops"])
        logits = self.teacher["dino_head"](cls)
        patch_logits = self.head_of_masked_patches(self.teacher, patches, batch)
        return list(sinkhorn(logits, self.teacher_temp).split(images)), sinkhorn(patch_logits, self.teacher_temp)

    def head_of_masked_patches(self, networks: nn.ModuleDict, patches: Tensor, batch: Batch) -> Tensor:
        chosen = patches.flatten(0, 1).index_select(0, batch["mask_indices_list"])
        buffer = chosen.new_zeros(batch["upperbound"], chosen.shape[1])
        buffer[: len(chosen)].copy_(chosen)
        return networks[self.patch_head](buffer)[: len(chosen)]

    @torch.no_grad()
    def update_teacher(self) -> None:
        teacher, student = list(self.teacher.parameters()), list(self.student.parameters())
        torch._foreach_mul_(teacher, self.momentum)
        torch._foreach_add_(teacher, student, alpha=1 - self.momentum)


def backbone(vit: nn.Module, images: Tensor, masks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Class tokens `(B, D)` and patch tokens `(B, N, D)` of one crop size."""
    x = vit.prepare_tokens_with_masks(images, masks)
    for block in vit.iterate_blocks():
        x = residual(block, x, lambda x, b=block: b.ls1(attention(b.attn, b.norm1(x))))
        x = residual(block, x, lambda x, b=block: b.ls2(b.mlp(b.norm2(x))))
    x = vit.norm(x)
    return x[:, 0], x[:, 1 + vit.num_register_tokens :]


def residual(block: nn.Module, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
    """Add a branch, computed for a random subset of the images where stochastic depth is above 0.1."""
    rate = block.sample_drop_ratio if block.training else 0.0
    if rate <= 0.1:
        return x + block.drop_path(branch(x))
    kept = max(int(len(x) * (1 - rate)), 1)
    rows = torch.randperm(len(x), device=x.device)[:kept]
    update = branch(x[rows])
    return torch.index_add(x.flatten(1), 0, rows, update.flatten(1).to(x.dtype), alpha=len(x) / kept).view_as(x)


def attention(module: nn.Module, x: Tensor) -> Tensor:
    images, tokens, width = x.shape
    qkv = module.qkv(x).reshape(images, tokens, 3, module.num_heads, width // module.num_heads)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(query, key, value)
    return module.proj(mixed.transpose(1, 2).reshape(images, tokens, width))


def dino_loss(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    return sum(cross_entropy(logits, targets).mean() for logits in student for targets in teacher)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return -(targets * F.log_softmax(logits.float() / STUDENT_TEMP, dim=-1)).sum(-1)


def koleo_loss(features: Tensor) -> Tensor:
    with torch.autocast(features.device.type, enabled=False):
        features = F.normalize(features.float(), dim=-1, eps=1e-8)
        products = features @ features.T
        products.fill_diagonal_(-1)
        neighbours = features[products.argmax(1)]
        return -(F.pairwise_distance(features, neighbours, 2, 1e-8) + 1e-8).log().mean()


def sinkhorn(logits: Tensor, temperature: float) -> Tensor:
    share = torch.exp(logits.float() / temperature).T
    prototypes, samples = share.shape
    share /= share.sum()
    for _ in range(3):
        share /= share.sum(1, keepdim=True)
        share /= prototypes
        share /= share.sum(0, keepdim=True)
        share /= samples
    return (share * samples).T
