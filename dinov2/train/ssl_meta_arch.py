"""The method: a student that learns, from masked and small views, to say what its own moving average says."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dinov2.configs import load_and_merge_config
from dinov2.data.collate import Batch
from dinov2.distributed import get_global_size
from dinov2.fsdp import ShardedGradScaler, get_fsdp_wrapper, local_tensors, resolve_precision
from dinov2.layers import DINOHead, NestedTensorBlock
from dinov2.loss import DINOLoss, GramLoss, KoLeoLoss, iBOTPatchLoss
from dinov2.models import DinoVisionTransformer, build_model_from_cfg
from dinov2.models.weights import load_weights
from dinov2.train.vitals import neighbour_distances, prototype_entropy, teacher_agreement
from dinov2.utils.param_groups import fuse_params_groups, get_params_groups_with_decay

logger = logging.getLogger("dinov2")

N_GLOBAL = 2  # global views of an image: the recipe is written for two


class TeacherTargets(NamedTuple):
    """Probabilities over the prototypes, without gradient."""

    cls: Tensor  # (views, batch, prototypes), one slice per global view
    patches: Tensor  # (masked patches, prototypes)


class StudentOutputs(NamedTuple):
    """What the student says of the same images."""

    features: Tensor  # (views, batch, dim) class tokens of the global views, before the head
    global_cls: Tensor  # (views, batch, prototypes) logits
    local_cls: Tensor  # (local views, batch, prototypes) logits
    patches: Tensor  # (masked patches, prototypes) logits
    patch_features: Tensor  # (views * batch, patches, dim) patch tokens of the global views, before the head


def freeze_lowest_layers(backbone: DinoVisionTransformer, n_blocks: int) -> None:
    """Stop the lowest blocks of a backbone, and all that comes before them, from learning; 0 leaves all free.

    Nothing below the first block that learns needs a backward pass, so the mask token stays as it is too.
    """
    if n_blocks == 0:
        return
    backbone.requires_grad_(False)
    backbone.norm.requires_grad_(True)
    for block in islice(backbone.iterate_blocks(), n_blocks, None):
        block.requires_grad_(True)


def build_heads(cfg: Any, embed_dim: int, *, separate: bool) -> dict[str, DINOHead]:
    """The projection heads that a configuration describes: `dino_head` and, if `separate`, `ibot_head`."""
    sections = {"dino_head": cfg.dino, "ibot_head": cfg.ibot} if separate else {"dino_head": cfg.dino}
    return {
        name: DINOHead(
            in_dim=embed_dim,
            out_dim=section.head_n_prototypes,
            hidden_dim=section.head_hidden_dim,
            bottleneck_dim=section.head_bottleneck_dim,
            nlayers=section.head_nlayers,
        )
        for name, section in sections.items()
    }


def build_guide(cfg: Any) -> nn.ModuleDict:
    """The frozen network that a student of configuration `cfg` learns from (`distillation`), heads included.

    Raises:
        ValueError: it has no heads, or gives targets that the student's heads or patches cannot meet.
    """
    source = cfg.distillation
    theirs = load_and_merge_config(source.config_file)
    same = ["student.patch_size", "student.in_chans", "dino.head_n_prototypes"]
    if cfg.ibot.loss_weight > 0:
        same += ["ibot.separate_head", *(["ibot.head_n_prototypes"] if cfg.ibot.separate_head else [])]
    differing = [
        f"  {key}: {OmegaConf.select(theirs, key)} there, {OmegaConf.select(cfg, key)} here"
        for key in same
        if OmegaConf.select(theirs, key) != OmegaConf.select(cfg, key)
    ]
    if differing:
        raise ValueError(
            f"distillation.config_file={source.config_file}: set these to what the network to learn from has:\n"
            + "\n".join(differing)
        )
    theirs.crops.global_crops_size = cfg.crops.global_crops_size
    backbone, embed_dim = build_model_from_cfg(theirs, only_teacher=True)
    heads = nn.ModuleDict(
        build_heads(theirs, embed_dim, separate=bool(cfg.ibot.loss_weight > 0 and cfg.ibot.separate_head))
    )
    load_weights(backbone, source.checkpoint, min_match=1.0)
    load_weights(heads, source.checkpoint, min_match=1.0)
    return nn.ModuleDict({"backbone": backbone, **heads}).requires_grad_(False)


def _leave_guide_out(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    for name in [name for name in state_dict if name.startswith(f"{prefix}guide.")]:
        del state_dict[name]


def _miss_no_guide(module: nn.Module, incompatible_keys: Any) -> None:
    missing = incompatible_keys.missing_keys
    missing[:] = [name for name in missing if not name.startswith("guide.")]


class SSLMetaArch(nn.Module):
    """Student and teacher of DINOv2, with their losses.

    `student` and `teacher` are ModuleDicts with the same keys: `backbone`, `dino_head` and, when
    `ibot.separate_head`, `ibot_head`. Under `distillation`, a third one, the frozen `guide`, gives the targets; the
    teacher is then no more than the moving average that is exported. Checkpoints leave the guide out: its own file has
    it. With a `gram.loss_weight`, `gram_teacher` holds the backbone of an earlier teacher.

    Args:
        cfg: a whole configuration (`dinov2.configs`).
        device: where the model will train; None for the CPU. It decides the precision (`resolve_precision`).

    Source: Oquab et al., "DINOv2: learning robust visual features without supervision", TMLR 2024, section 4.
    """

    def __init__(self, cfg: Any, device: torch.device | None = None):
        super().__init__()
        self.cfg = cfg
        device = device or torch.device("cpu")
        self.do_dino = cfg.dino.loss_weight > 0
        self.do_koleo = cfg.dino.koleo_loss_weight > 0
        self.do_ibot = cfg.ibot.loss_weight > 0
        self.ibot_separate_head = bool(self.do_ibot and cfg.ibot.separate_head)
        self.use_sinkhorn = cfg.train.centering == "sinkhorn_knopp"

        student_backbone, teacher_backbone, self.embed_dim = build_model_from_cfg(cfg)
        heads = nn.ModuleDict(self._build_heads())
        if cfg.student.pretrained_weights:
            load_weights(student_backbone, cfg.student.pretrained_weights)
            if cfg.student.pretrained_heads:
                load_weights(heads, cfg.student.pretrained_weights, min_match=1.0)
        freeze_lowest_layers(student_backbone, cfg.optim.freeze_layers)
        self.student = nn.ModuleDict({"backbone": student_backbone, **heads})
        self.teacher = nn.ModuleDict({"backbone": teacher_backbone, **self._build_heads()})
        self.teacher.requires_grad_(False)
        self.distils = cfg.distillation.enabled
        if self.distils:
            self.guide = build_guide(cfg)
            self.register_state_dict_post_hook(_leave_guide_out)
            self.register_load_state_dict_post_hook(_miss_no_guide)
        self.do_gram = cfg.gram.loss_weight > 0
        self.gram_started = False
        if self.do_gram:
            self.gram_teacher = nn.ModuleDict({"backbone": build_model_from_cfg(cfg, only_teacher=True)[0]})
            self.gram_teacher.requires_grad_(False)
        self.target_role = "guide" if self.distils else "teacher"  # who gives the targets

        self.dino_loss = DINOLoss(cfg.dino.head_n_prototypes)
        self.ibot_patch_loss = iBOTPatchLoss(
            cfg.ibot.head_n_prototypes if self.ibot_separate_head else cfg.dino.head_n_prototypes
        )
        self.gram_loss = GramLoss()
        self.koleo_loss = KoLeoLoss(distributed=cfg.dino.koleo_distributed)
        self.loss_weights = {
            "dino_local_crops_loss": cfg.dino.loss_weight,
            "dino_global_crops_loss": cfg.dino.loss_weight,
            "koleo_loss": N_GLOBAL,  # reported with its weight, as the mean over the views; what counts is their sum
            "gram_loss": cfg.gram.loss_weight,
            "ibot_loss": 2 * cfg.ibot.loss_weight,  # reported, as in DINOv2, at half of what counts
        }
        self.precision = {
            role: {part: resolve_precision(cfg.compute_precision, role, part, device) for part in getattr(self, role)}
            for role in ("student", "teacher")
        }
        self.precision["guide"] = self.precision["gram_teacher"] = self.precision["teacher"]
        computes_in_half = any(p.compute == torch.float16 for p in self.precision["student"].values())
        self.fp16_scaler = ShardedGradScaler(device, enabled=cfg.compute_precision.grad_scaler and computes_in_half)
        self._warned_koleo = False
        self.watched = False  # whether the next step measures `vital_signs`
        self.vital_signs: dict[str, Tensor] = {}  # of the newest batch of the newest watched step

    def _build_heads(self) -> dict[str, DINOHead]:
        return build_heads(self.cfg, self.embed_dim, separate=self.ibot_separate_head)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    @property
    def input_dtype(self) -> torch.dtype:
        """What crops are cast to before they travel to the device: on a GPU, the precision of both backbones."""
        computes = {self.precision[role]["backbone"].compute for role in ("student", "teacher")}
        return computes.pop() if self.device.type == "cuda" and len(computes) == 1 else torch.float32

    def forward(self, inputs: Any) -> None:
        """Not for use: training calls `forward_backward`, everything else the backbones."""
        raise NotImplementedError("call forward_backward, or one of the backbones")

    # One step -----------------------------------------------------------------------------------------------------

    def forward_backward(self, images: Batch, teacher_temp: float, *, loss_scale: float = 1.0) -> dict[str, Tensor]:
        """Accumulate the student's gradients for one batch; return each loss term, detached.

        Args:
            images: a collated batch on the model's device.
            teacher_temp: softmax temperature of the teacher.
            loss_scale: what the gradients are multiplied by: 1 / (batches accumulated in one step).
        """
        targets = self.teacher_targets(images, teacher_temp)
        outputs = self.student_outputs(images)
        terms = self.loss_terms(targets, outputs, images)
        self.backprop_loss(loss_scale * sum(self.loss_weights[name] * term for name, term in terms.items()))
        if self.watched:
            self.vital_signs = self._measure_vital_signs(targets, outputs)
        return {name: term.detach() for name, term in terms.items()}

    @torch.no_grad()
    def teacher_targets(self, batch: Batch, teacher_temp: float) -> TeacherTargets:
        """What the teacher (or the guide) says of the unmasked global views: of each image, at the masked patches."""
        role = self.target_role
        tokens = self._run(role, "backbone", batch["collated_global_crops"], is_training=True)
        cls_tokens = tokens["x_norm_clstoken"]
        patch_tokens = self._masked_patches(tokens, batch)
        cls_logits, patch_logits = self._apply_heads(role, cls_tokens, patch_tokens)

        if self.use_sinkhorn:
            cls = self.dino_loss.sinkhorn_knopp_teacher(cls_logits, teacher_temp)
            n_masked = batch["n_masked_patches"]
            patches = self.ibot_patch_loss.sinkhorn_knopp_teacher(patch_logits, teacher_temp, n_masked)
        else:
            cls = self.dino_loss.softmax_center_teacher(cls_logits, teacher_temp)
            self.dino_loss.update_center(cls_logits)
            patches = self.ibot_patch_loss.softmax_center_teacher(patch_logits.unsqueeze(0), teacher_temp).squeeze(0)
            if self.do_ibot:
                self.ibot_patch_loss.update_center(patch_logits.unsqueeze(0))
        return TeacherTargets(cls=cls.unflatten(0, (N_GLOBAL, -1)), patches=patches)

    def student_outputs(self, batch: Batch) -> StudentOutputs:
        """What the student says of the masked global views and of the local ones.

        When it distils it sees every patch; the masks then only choose the patches whose loss is counted.
        """
        crops, masks = [batch["collated_global_crops"]], [None if self.distils else batch["collated_masks"]]
        if len(batch["collated_local_crops"]):
            crops.append(batch["collated_local_crops"])
            masks.append(None)
        tokens = self._run("student", "backbone", crops, masks=masks, is_training=True)
        features = tokens[0]["x_norm_clstoken"]
        cls_logits, patch_logits = self._apply_heads(
            "student", torch.cat([t["x_norm_clstoken"] for t in tokens]), self._masked_patches(tokens[0], batch)
        )
        global_cls, local_cls = cls_logits.split([len(features), len(cls_logits) - len(features)])
        batch_size = len(features) // N_GLOBAL
        return StudentOutputs(
            features=features.unflatten(0, (N_GLOBAL, batch_size)),
            global_cls=global_cls.unflatten(0, (N_GLOBAL, batch_size)),
            local_cls=local_cls.unflatten(0, (-1, batch_size)),
            patches=patch_logits,
            patch_features=tokens[0]["x_norm_patchtokens"],
        )

    def loss_terms(self, targets: TeacherTargets, outputs: StudentOutputs, batch: Batch) -> dict[str, Tensor]:
        """The terms under DINOv2's names and in its units; `loss_weights` makes the objective of them.

        A class token of the student meets the teacher's of every other global view: N_GLOBAL * (N_GLOBAL - 1) pairs
        of global views and N_GLOBAL * (local views) more, and both terms are divided by the number of all pairs.
        """
        n_local = len(outputs.local_cls)
        n_pairs = N_GLOBAL * (N_GLOBAL - 1) + N_GLOBAL * n_local
        first, second = targets.cls
        terms = {}
        if self.do_dino:
            if n_local:
                terms["dino_local_crops_loss"] = self.dino_loss(outputs.local_cls, [first, second]) / n_pairs
            one_meets_two = self.dino_loss([outputs.global_cls[0]], [second])
            two_meets_one = self.dino_loss([outputs.global_cls[1]], [first])
            terms["dino_global_crops_loss"] = (one_meets_two + two_meets_one) / n_pairs
        if self.do_koleo and self._has_neighbours(outputs.features):
            spread = torch.stack([self.koleo_loss(view) for view in outputs.features]).mean()
            terms["koleo_loss"] = self.cfg.dino.koleo_loss_weight * spread
        elif self.do_koleo:
            self._warn_without_koleo()
        if self.do_ibot:
            patch_loss = self.ibot_patch_loss.forward_masked(
                outputs.patches,
                targets.patches,
                student_masks_flat=batch["collated_masks"],
                masks_weight=batch["masks_weight"],
            )
            terms["ibot_loss"] = patch_loss / 2
        if self.gram_started:
            terms["gram_loss"] = self.gram_loss(outputs.patch_features, self._gram_targets(batch))
        return terms

    @torch.no_grad()
    def _gram_targets(self, batch: Batch) -> Tensor:
        """(views * batch, patches, dim): what the Gram teacher sees in the unmasked global views."""
        tokens = self._run("gram_teacher", "backbone", batch["collated_global_crops"], is_training=True)
        return tokens["x_norm_patchtokens"]

    def _measure_vital_signs(self, targets: TeacherTargets, outputs: StudentOutputs) -> dict[str, Tensor]:
        """What `dinov2.train.vitals` tells of a batch; every rank enters."""
        signs = {
            "teacher_agreement": teacher_agreement(outputs.global_cls, targets.cls),
            "dino_prototype_entropy": prototype_entropy(targets.cls.flatten(0, 1)),
        }
        if self.do_ibot:
            signs["ibot_prototype_entropy"] = prototype_entropy(targets.patches)
        if self._has_neighbours(outputs.features):
            distances = neighbour_distances(outputs.features, distributed=self.koleo_loss.distributed)
            signs["koleo_distance"], signs["koleo_distance_min"] = distances
        return signs

    def backprop_loss(self, loss: Tensor) -> None:
        """Gradients of the (scaled, under fp16) loss."""
        self.fp16_scaler.scale(loss).backward()

    def _run(self, role: str, part: str, *args: Any, **kwargs: Any) -> Any:
        """A sub-module's output, computed in that sub-module's precision."""
        dtype = self.precision[role][part].compute
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32):
            return getattr(self, role)[part](*args, **kwargs)

    def _masked_patches(self, tokens: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """(masked patches, dim): patch tokens of the global views where the student saw the mask token."""
        patch_tokens = tokens["x_norm_patchtokens"].flatten(0, 1)
        if not self.do_ibot:
            return patch_tokens[:0]
        return patch_tokens.index_select(0, batch["mask_indices_list"])

    def _apply_heads(self, role: str, cls_tokens: Tensor, patch_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of class tokens and of patches, through one head or each through its own."""
        if self.ibot_separate_head:
            return self._run(role, "dino_head", cls_tokens), self._run(role, "ibot_head", patch_tokens)
        logits = self._run(role, "dino_head", torch.cat([cls_tokens, patch_tokens]))
        return tuple(logits.split([len(cls_tokens), len(patch_tokens)]))

    def _has_neighbours(self, features: Tensor) -> bool:
        return features.shape[1] > 1 or (self.koleo_loss.distributed and get_global_size() > 1)

    def _warn_without_koleo(self) -> None:
        if not self._warned_koleo:
            logger.warning("KoLeo is left out: a local batch of one image has no nearest neighbour")
            self._warned_koleo = True

    # The teacher --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def update_teacher(self, m: float) -> None:
        """Move every parameter of the teacher towards the student's: teacher = m * teacher + (1 - m) * student."""
        teacher = local_tensors(self.teacher.parameters())
        student = local_tensors(self.student.parameters())
        get_ema_multi_avg_fn(m)(teacher, student, None)

    @torch.no_grad()
    def update_gram_teacher(self, iteration: int) -> None:
        """Before the step `iteration`: start Gram anchoring and renew its teacher when `gram` says so."""
        gram = self.cfg.gram
        since = iteration - gram.start_iteration
        self.gram_started = self.do_gram and since >= 0
        if self.gram_started and (since == 0 or (gram.update_every > 0 and since % gram.update_every == 0)):
            earlier, now = self.gram_teacher["backbone"].parameters(), self.teacher["backbone"].parameters()
            for kept, parameter in zip(local_tensors(earlier), local_tensors(now), strict=True):
                kept.copy_(parameter)

    def apply_center_updates(self) -> None:
        """Settle the centres, which lag one batch behind: before a checkpoint, so that nothing is pending."""
        self.dino_loss.apply_center_update()
        self.ibot_patch_loss.apply_center_update()

    def train(self, mode: bool = True) -> SSLMetaArch:
        """Train the student; the teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        for role in self.frozen_roles():
            getattr(self, role).eval()
        return self

    def frozen_roles(self) -> list[str]:
        """The networks beside student and teacher."""
        return [*(["guide"] if self.distils else []), *(["gram_teacher"] if self.do_gram else [])]

    # Building -----------------------------------------------------------------------------------------------------

    def get_params_groups(self) -> list[dict[str, Any]]:
        """Groups of the student's parameters for the optimizer, with their multipliers and their sub-module's name."""
        return [group for name in self.student for group in self._groups_of(name)]

    def _groups_of(self, name: str) -> Iterator[dict[str, Any]]:
        factor = self.cfg.optim.backbone_lr_mult if name == "backbone" else 1.0
        for group in self.get_maybe_fused_params_for_submodel(self.student[name]):
            yield {**group, "lr_multiplier": factor * group["lr_multiplier"], "submodule": name}

    def get_maybe_fused_params_for_submodel(self, m: nn.Module) -> list[dict[str, Any]]:
        """Groups of one sub-module, with layer-wise learning-rate decay; equal ones are joined."""
        groups = get_params_groups_with_decay(
            model=m,
            lr_decay_rate=self.cfg.optim.layerwise_decay,
            patch_embed_lr_mult=self.cfg.optim.patch_embed_lr_mult,
        )
        return list(fuse_params_groups(groups))

    def prepare_for_distributed_training(self) -> None:
        """Start the teacher as the student and spread both over the processes (does nothing more on one)."""
        for name in self.student:
            self.teacher[name].load_state_dict(self.student[name].state_dict())
        for role in ("student", "teacher", *self.frozen_roles()):
            for name, module in getattr(self, role).items():
                settings = self.cfg.compute_precision["student" if role == "student" else "teacher"][name]
                precision = self.precision[role][name]
                get_fsdp_wrapper(settings, {NestedTensorBlock}, device=self.device, precision=precision)(module)
