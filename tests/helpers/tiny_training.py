"""A training small enough for a test: two blocks, small heads, batches of noise."""

import torch
from omegaconf import OmegaConf
from torch.distributed.tensor import DTensor, distribute_tensor

from dinov2.configs import dinov2_default_config
from dinov2.train.ssl_meta_arch import SSLMetaArch

IMAGES, LOCALS, GLOBAL_SIZE, LOCAL_SIZE, PATCHES = 4, 3, 56, 28, 16


def tiny_config(**changes):
    settings = {
        "dino": {"head_n_prototypes": 40, "head_bottleneck_dim": 16, "head_hidden_dim": 32},
        "ibot": {"head_n_prototypes": 24, "head_bottleneck_dim": 12, "head_hidden_dim": 24},
        "student": {"arch": "vit_tiny", "patch_size": 14, "drop_path_rate": 0.0, "num_register_tokens": 1},
        "crops": {"global_crops_size": GLOBAL_SIZE, "local_crops_size": LOCAL_SIZE, "local_crops_number": LOCALS},
    }
    dotted = OmegaConf.from_dotlist([f"{key}={value}" for key, value in changes.items()])
    return OmegaConf.merge(dinov2_default_config, settings, dotted)


def make_model(cfg, depth=2, device="cpu"):
    torch.manual_seed(0)
    model = SSLMetaArch(cfg, torch.device(device)).to(device)
    gram = [model.gram_teacher] if model.do_gram else []
    for role in (model.student, model.teacher, *gram):  # two blocks are enough to tell a fault
        role["backbone"].blocks = role["backbone"].blocks[:depth]
        role["backbone"].n_blocks = depth
    model.prepare_for_distributed_training()
    with torch.no_grad():  # a teacher of its own, so that swapping the two would show
        for parameter in model.teacher.parameters():
            noise = 0.02 * torch.randn(parameter.shape).to(device)
            if isinstance(parameter, DTensor):
                noise = distribute_tensor(noise, parameter.device_mesh, parameter.placements)
            parameter.add_(noise)
    return model.train()


def make_batch(step, images=IMAGES, locals_=LOCALS):
    generator = torch.Generator().manual_seed(step)
    masks = torch.rand(2 * images, PATCHES, generator=generator) < 0.4
    masks[1::2] = False
    masks[0, 0] = True
    weights = (1 / masks.sum(1).clamp(min=1)).unsqueeze(1).expand_as(masks)[masks]
    return {
        "collated_global_crops": torch.randn(2 * images, 3, GLOBAL_SIZE, GLOBAL_SIZE, generator=generator),
        "collated_local_crops": torch.randn(locals_ * images, 3, LOCAL_SIZE, LOCAL_SIZE, generator=generator),
        "collated_masks": masks,
        "mask_indices_list": masks.flatten().nonzero().flatten(),
        "masks_weight": weights,
        "upperbound": int(masks.sum()),
        "n_masked_patches": masks.sum().view(1),
    }


def objective(model, losses):
    return sum(model.loss_weights[name] * value.item() for name, value in losses.items())
