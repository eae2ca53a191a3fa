"""What a GPU must do as the CPU does: whole steps of a tiny training, in bf16, fused and compiled, without waiting."""

import copy

import pytest
import torch
from tiny_training import make_batch, make_model, objective, tiny_config

from dinov2.fsdp import FSDPCheckpointer
from dinov2.train.engine import prepare_backbone
from dinov2.train.train import accumulate_gradients, apply_optim_scheduler, build_optimizer, clip_and_step

pytestmark = pytest.mark.gpu

SETTINGS = {"train.centering": "sinkhorn_knopp", "ibot.separate_head": True, "dino.koleo_loss_weight": 0.01}


def gpu_model(**changes):
    return make_model(tiny_config(**SETTINGS, **changes), device="cuda")


def gpu_batch(step):
    batch = make_batch(step)
    return {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def train(model, optimizer, steps, start=0):
    """The objective of each step; everything stays on the device until the last one is done."""
    terms = []
    for step in range(start, start + steps):
        apply_optim_scheduler(optimizer, 1e-3, 0.05, 1e-3)
        optimizer.zero_grad(set_to_none=True)
        terms.append(accumulate_gradients(model, [gpu_batch(step)], 0.05))
        clip_and_step(optimizer, model, 3.0)
        model.update_teacher(0.9)
    return [objective(model, each) for each in terms]


def optimizer_of(model):
    return build_optimizer(model.cfg, model.get_params_groups())


def test_bf16_is_chosen_and_its_losses_stay_near_those_of_the_cpu_in_float32():
    model = gpu_model()
    if torch.cuda.is_bf16_supported(including_emulation=False):
        assert {precision.compute for precision in model.precision["student"].values()} == {torch.bfloat16}
    ours = train(model, optimizer_of(model), 4)
    reference = make_model(tiny_config(**SETTINGS))
    optimizer = optimizer_of(reference)
    for step, value in enumerate(ours):
        apply_optim_scheduler(optimizer, 1e-3, 0.05, 1e-3)
        optimizer.zero_grad(set_to_none=True)
        terms = accumulate_gradients(reference, [make_batch(step)], 0.05)
        clip_and_step(optimizer, reference, 3.0)
        reference.update_teacher(0.9)
        assert value == pytest.approx(objective(reference, terms), rel=0.03)


@pytest.mark.parametrize("backend", ["varlen", "flex", "xformers"])
def test_every_attention_backend_trains_as_sdpa_does(backend):
    if backend == "xformers":
        pytest.importorskip("xformers")
    settings = {"compute_precision.dtype": "bf16"}
    expected = gpu_model(**settings, **{"student.attention_backend": "sdpa"})
    model = gpu_model(**settings, **{"student.attention_backend": backend})
    wanted = train(expected, optimizer_of(expected), 3)
    assert train(model, optimizer_of(model), 3) == pytest.approx(wanted, rel=0.03)


def test_the_fused_optimizer_moves_the_weights_as_the_plain_one_does():
    fused = gpu_model(**{"compute_precision.dtype": "fp32"})
    plain = copy.deepcopy(fused)
    optimizer = torch.optim.AdamW(plain.get_params_groups(), betas=(0.9, 0.999), foreach=False, fused=False)
    apply_optim_scheduler(optimizer, 1e-3, 0.05, 1e-3)
    plain.forward_backward(gpu_batch(0), 0.05)
    for module in plain.student.values():
        torch.nn.utils.clip_grad_norm_(module.parameters(), 3.0)
    optimizer.step()
    train(fused, optimizer_of(fused), 1)
    for (name, one), other in zip(fused.student.named_parameters(), plain.student.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_step_never_waits_for_the_device(dtype):
    model = gpu_model(**{"compute_precision.dtype": dtype})
    optimizer = optimizer_of(model)
    train(model, optimizer, 2)  # state is allocated, kernels are chosen
    batch = gpu_batch(2)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.zero_grad(set_to_none=True)
        terms = accumulate_gradients(model, [batch], 0.05)
        clip_and_step(optimizer, model, 3.0)
        model.update_teacher(0.9)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert objective(model, terms) > 0


@pytest.mark.slow
def test_compiled_blocks_train_as_eager_ones_do():
    settings = {"compute_precision.dtype": "bf16"}
    eager, compiled = gpu_model(**settings), gpu_model(**settings)
    for role in ("student", "teacher"):
        prepare_backbone(getattr(compiled, role)["backbone"], "none", compiled=True)
    wanted = train(eager, optimizer_of(eager), 3)
    assert train(compiled, optimizer_of(compiled), 3) == pytest.approx(wanted, rel=0.03)


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_recomputed_activations_give_the_same_losses_in_less_memory(kind):
    peaks, losses = [], []
    for checkpointing in ("none", kind):
        model = make_model(tiny_config(**SETTINGS, **{"compute_precision.dtype": "bf16"}), depth=8, device="cuda")
        prepare_backbone(model.student["backbone"], checkpointing, compiled=False)
        optimizer = optimizer_of(model)
        train(model, optimizer, 1)
        torch.cuda.reset_peak_memory_stats()
        losses.append(train(model, optimizer, 2, start=1))
        peaks.append(torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated())
        del model, optimizer
        torch.cuda.empty_cache()
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert peaks[1] < peaks[0]


def test_an_asynchronous_checkpoint_holds_the_weights_of_its_own_step(tmp_path):
    model = gpu_model(**{"compute_precision.dtype": "fp32"})
    optimizer = optimizer_of(model)
    train(model, optimizer, 2)
    checkpointer = FSDPCheckpointer(model, tmp_path, optimizer=optimizer, scaler=model.fp16_scaler, asynchronous=True)
    model.apply_center_updates()
    checkpointer.save("model_0000001", iteration=2)
    expected = {name: weight.clone() for name, weight in model.state_dict().items()}
    straight = train(model, optimizer, 2, start=2)  # goes on while the files are written
    checkpointer.close()
    assert not checkpointer.last_save_failed

    again = gpu_model(**{"compute_precision.dtype": "fp32"})
    resumed = optimizer_of(again)
    loader = FSDPCheckpointer(again, tmp_path, optimizer=resumed, scaler=again.fp16_scaler)
    assert loader.resume_or_load()["iteration"] == 2
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, expected[name]), name
    assert train(again, resumed, 2, start=2) == pytest.approx(straight, rel=1e-4)
