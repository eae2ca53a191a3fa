"""Every key of `ssl_default_config.yaml`: its type here, its meaning and unit in the comment beside it.

Defaults live in the YAML file alone. `docs/configuration.md` is generated from both; tests keep the three in step.
"""

import dataclasses
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Pair = tuple[float, float]  # lowest, highest


@dataclass
class ModelSection:
    """Weights to evaluate (upstream spells this section in capitals)."""

    WEIGHTS: str  # of the model to evaluate, where --pretrained-weights is not given: a file or a hub name


@dataclass
class MixedPrecision:
    """Number formats of one sub-module."""

    param_dtype: str  # forward and backward pass: fp32, bf16 or fp16
    reduce_dtype: str  # gradients on their way between processes: fp32, bf16 or fp16
    buffer_dtype: str  # no effect: buffers stay in fp32; kept because DINOv2's files have it


@dataclass
class SubModulePrecision:
    """Sharding and number formats of one sub-module."""

    sharding_strategy: str  # NO_SHARD (a full copy each), SHARD_GRAD_OP, FULL_SHARD, HYBRID_SHARD; one process: none
    mixed_precision: MixedPrecision


@dataclass
class ModelPrecision:
    """Sharding and number formats of a student or a teacher."""

    backbone: SubModulePrecision
    dino_head: SubModulePrecision
    ibot_head: SubModulePrecision


@dataclass
class ComputePrecision:
    """Number formats and sharding."""

    grad_scaler: bool  # dynamic loss scaling; used only where something computes in fp16
    dtype: str  # auto: fp32 on CPU, bf16 for fp16 on GPUs that have it; config: as given below; fp32, bf16, fp16: all
    teacher: ModelPrecision
    student: ModelPrecision


@dataclass
class DinoSection:
    """Loss on the class token, and its head."""

    loss_weight: float  # factor on the DINO loss; 0 leaves it out
    head_n_prototypes: int  # outputs of the head: pseudo-classes
    head_bottleneck_dim: int  # width before the prototypes
    head_nlayers: int  # linear layers before the prototypes
    head_hidden_dim: int  # width of the hidden layers
    koleo_loss_weight: float  # factor on KoLeo, which spreads the embeddings of a batch; 0 leaves it out
    koleo_distributed: bool  # look for nearest neighbours in the batch of all processes, not of each


@dataclass
class IbotSection:
    """Loss on masked patches, and its head."""

    loss_weight: float  # factor on the iBOT loss; 0 leaves it out
    mask_sample_probability: float  # share of the global crops that are masked, 0..1
    mask_ratio_min_max: Pair  # share of patches masked in a masked crop, lowest and highest, 0..1
    separate_head: bool  # a head of its own, with the four keys below; false: the DINO head
    head_n_prototypes: int  # outputs of the separate head
    head_bottleneck_dim: int  # width before the prototypes
    head_nlayers: int  # linear layers before the prototypes
    head_hidden_dim: int  # width of the hidden layers


@dataclass
class TrainSection:
    """Data, output and machinery of a run."""

    batch_size_per_gpu: int  # images per process and forward pass
    dataset_path: str | list[str]  # a folder, a list of folders, or a dataset string (ImageNet:split=TRAIN:root=…)
    path_preserved: str | list[str]  # folders, among those of dataset_path, of which a share is held out of training
    frac: float  # the share held out of each folder of path_preserved, 0..1
    exclude: str  # a text file of image paths to leave out, one a line, such as `dinov2 check` writes
    output_dir: str  # folder for logs, checkpoints and weights; made if absent
    saveckp_freq: int  # epochs between checkpoints when checkpoint.period_iterations is 0
    seed: int  # of weights, order of images, crops and masks
    num_workers: int | str  # loader processes per process at most, never more than its CPUs; auto: as many as those
    OFFICIAL_EPOCH_LENGTH: int  # iterations that one "epoch" of a schedule lasts, whatever the size of the data
    cache_dataset: bool  # keep decoded images in a memory-mapped file when they fit in cache_max_gb
    cache_max_gb: float  # largest file of decoded images, gigabytes
    cache_dir: str  # where indexes and decoded images are kept; empty: $DINOV2_CACHE or ~/.cache/dinov2
    max_unreadable_share: float  # the run stops when more than this share of the images it tried is unreadable, 0..1
    centering: str  # of the teacher's outputs: centering or sinkhorn_knopp
    augment_on: str  # cpu: all augmentation in the workers; device: colour, blur, normalisation on the training device
    device: str  # auto, cpu, cuda or cuda:N
    compile: bool  # torch.compile the blocks of the backbone
    gradient_accumulation_steps: int  # forward passes per optimizer step; the effective batch grows by it
    activation_checkpointing: str  # recompute instead of keep: none, selective (attention kept) or full
    log_period: int  # iterations between log lines
    peak_tflops: float  # of the device, TFLOP/s, to tell the share reached (MFU); 0: known GPUs by name, else not told
    profile_steps: int  # steps to trace into OUTPUT/profile after the first 5 of a start; 0: none
    loggers: list[str]  # experiment trackers beside TensorBoard: wandb, mlflow (each an extra to install)


@dataclass
class StudentSection:
    """The backbone (the teacher's is the same)."""

    arch: str  # vit_tiny, vit_small, vit_base, vit_large or vit_giant2
    patch_size: int  # side of a patch, pixels
    drop_path_rate: float  # stochastic depth: share of samples (or residual paths) dropped per block, 0..1
    layerscale: float  # initial value of LayerScale; 0: none
    drop_path_uniform: bool  # the same rate in every block; false: growing linearly with depth
    pretrained_weights: str  # backbone to start from, for student and teacher: a file or a hub name; empty: none
    pretrained_heads: bool  # take the heads of that file too; it must have them, of the same sizes
    ffn_layer: str  # mlp, swiglu, swiglufused or identity
    block_chunks: int  # groups in the names of the blocks, as in upstream's sharded runs; 0: none
    qkv_bias: bool  # biases in the query, key and value projection
    proj_bias: bool  # bias in the output projection of attention
    ffn_bias: bool  # biases in the feed-forward layers
    num_register_tokens: int  # extra tokens without a place in the image
    interpolate_antialias: bool  # resize position embeddings with antialiasing
    interpolate_offset: float  # added to the target size when position embeddings are resized, patches; 0: exact size
    in_chans: int  # image channels
    attention_backend: str  # auto, sdpa, flex, varlen or xformers


@dataclass
class TeacherSection:
    """How the teacher follows the student."""

    momentum_teacher: float  # share of the old teacher kept per iteration at the start, 0..1
    final_momentum_teacher: float  # the same at the end; a cosine lies between
    warmup_teacher_temp: float  # softmax temperature of the teacher at the start
    teacher_temp: float  # and after the warm-up
    warmup_teacher_temp_epochs: int  # length of that linear warm-up, epochs


@dataclass
class DistillationSection:
    """A frozen, larger network tells the student what to say, in place of the student's own moving average."""

    enabled: bool  # learn from the network below; the student's moving average is still what is exported
    config_file: str  # configuration of the run that made it, such as RUN/config.yaml
    checkpoint: str  # its weights with heads, such as RUN/eval/training_N/teacher_checkpoint.pth


@dataclass
class GramSection:
    """Gram anchoring: the patch similarities of an earlier teacher hold those of the student in place in long runs."""

    loss_weight: float  # factor on the Gram loss; 0 leaves it out
    start_iteration: int  # from when on; the teacher of that moment becomes the Gram teacher
    update_every: int  # iterations until the Gram teacher becomes the teacher of the moment again; 0: never


@dataclass
class OptimSection:
    """AdamW and its schedules."""

    epochs: int  # length of the run, in epochs of train.OFFICIAL_EPOCH_LENGTH iterations
    weight_decay: float  # at the start
    weight_decay_end: float  # at the end; a cosine lies between
    base_lr: float  # peak learning rate for the reference batch of the scaling rule
    lr: float  # peak learning rate of this run; set from base_lr by the scaling rule, whatever is given
    warmup_epochs: int  # linear warm-up of the learning rate from 0, epochs
    min_lr: float  # learning rate at the end
    clip_grad: float  # largest gradient norm per sub-module; 0: no clipping
    freeze_last_layer_epochs: int  # epochs in which the prototypes stay as they are
    scaling_rule: str  # sqrt_wrt_1024: base_lr * sqrt(batch / 1024); linear_wrt_256: base_lr * batch / 256
    patch_embed_lr_mult: float  # factor on the learning rate of the patch embedding
    layerwise_decay: float  # factor on the learning rate from one block to the one below, 0..1
    adamw_beta1: float  # memory of the gradient's mean, 0..1
    adamw_beta2: float  # memory of the gradient's square, 0..1
    freeze_backbone_epochs: int  # epochs in which only the heads learn, for backbones that start from weights
    freeze_layers: int  # lowest blocks of the backbone that never learn, with all that comes before them; 0: all learn
    backbone_lr_mult: float  # factor on the learning rate of the whole backbone; below 1 where it starts from weights


@dataclass
class CropsSection:
    """Crops of one image."""

    global_crops_scale: Pair  # share of the image's area in a global crop, lowest and highest, 0..1
    local_crops_number: int  # local crops per image; 0: none
    local_crops_scale: Pair  # share of the image's area in a local crop, lowest and highest, 0..1
    global_crops_size: int  # side of a global crop, pixels; a multiple of student.patch_size
    local_crops_size: int  # side of a local crop, pixels; a multiple of student.patch_size


@dataclass
class AugmentationsSection:
    """What happens to a crop; probabilities between 0 and 1."""

    horizontal_flip: float  # probability of a mirror image
    vertical_flip: float  # probability of turning upside down
    rotate90: bool  # a random quarter turn (0, 90, 180 or 270 degrees)
    color_jitter: float  # probability of the four jitters below
    brightness: float  # factor drawn from 1 - x .. 1 + x
    contrast: float  # factor drawn from 1 - x .. 1 + x
    saturation: float  # factor drawn from 1 - x .. 1 + x
    hue: float  # shift drawn from -x .. x, turns of the colour circle, 0..0.5
    grayscale: float  # probability of losing colour
    blur_global_1: float  # probability of a blur of the first global crop
    blur_global_2: float  # probability of a blur of the second global crop
    blur_local: float  # probability of a blur of a local crop
    blur_sigma: Pair  # standard deviation of the 9-tap Gaussian, lowest and highest, pixels
    solarize_global_2: float  # probability of inverting the bright pixels of the second global crop
    hed_jitter: float  # strength of the stain jitter: standard deviation of the factor per stain; 0: off
    mean: list[float]  # per channel, subtracted from images scaled to 0..1
    std: list[float]  # per channel, divided by afterwards


@dataclass
class EvaluationSection:
    """Scores while training."""

    eval_period_iterations: int  # iterations between evaluations; 0: never
    fit_dataset_path: str  # labelled images (folder per class, or CSV) that kNN and linear probe learn from
    eval_dataset_path: str  # labelled images that they are scored on
    batch_size: int  # images per forward pass
    linear_probe: bool  # score a linear probe besides kNN
    image_size: int  # side of the images shown to the probes, pixels; 0: crops.global_crops_size


@dataclass
class CheckpointSection:
    """Which checkpoints are written and kept."""

    period_iterations: int  # iterations between checkpoints; 0: every train.saveckp_freq epochs
    keep_last: int  # newest checkpoints that are kept
    keep_every_iterations: int  # checkpoints at multiples of this are kept for ever; 0: none is
    asynchronous: bool | str  # write while training goes on, from a copy in host memory: true, false, auto (on GPUs)


@dataclass
class Config:
    """A whole configuration."""

    MODEL: ModelSection
    compute_precision: ComputePrecision
    dino: DinoSection
    ibot: IbotSection
    train: TrainSection
    student: StudentSection
    teacher: TeacherSection
    distillation: DistillationSection
    gram: GramSection
    optim: OptimSection
    crops: CropsSection
    augmentations: AugmentationsSection
    evaluation: EvaluationSection
    checkpoint: CheckpointSection


def walk(section: type = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every key in dotted form, with its type: ("train.seed", int), …"""
    for name, kind in typing.get_type_hints(section).items():
        if dataclasses.is_dataclass(kind):
            yield from walk(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", kind


def section_names(section: type = Config, prefix: str = "") -> Iterator[str]:
    """Yield every section in dotted form: "compute_precision", "compute_precision.teacher", …"""
    for name, kind in typing.get_type_hints(section).items():
        if dataclasses.is_dataclass(kind):
            yield f"{prefix}{name}"
            yield from section_names(kind, f"{prefix}{name}.")
