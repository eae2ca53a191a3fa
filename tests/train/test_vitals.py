"""Vital signs against plain formulas, and that watching changes nothing."""

import math

import numpy as np
import pytest
import torch
from ranks import run_ranks
from tiny_training import make_batch, make_model, tiny_config

from dinov2.train.flops import ideal_step_time, peak_flops, step_flops
from dinov2.train.vitals import neighbour_distances, prototype_entropy, teacher_agreement


def entropy_by_hand(rows):
    share = np.mean(rows, axis=0)
    return -sum(p * math.log(p) for p in share if p > 0) / math.log(len(share))


def test_prototypes_used_evenly_have_entropy_one_and_a_single_one_has_none():
    assert prototype_entropy(torch.full((3, 8), 1 / 8)).item() == pytest.approx(1)
    assert prototype_entropy(torch.eye(8)).item() == pytest.approx(1)
    assert prototype_entropy(torch.eye(8)[[2, 2, 2]]).item() == 0
    rows = torch.rand(5, 8).softmax(1)
    assert prototype_entropy(rows).item() == pytest.approx(entropy_by_hand(rows.numpy()), rel=1e-5)


def test_agreement_is_with_the_teacher_of_the_other_view():
    teacher = torch.eye(4)[torch.tensor([[0, 1, 2], [3, 1, 0]])]
    student = torch.eye(4)[torch.tensor([[3, 1, 2], [0, 2, 2]])]  # meets view 2: yes yes no; meets view 1: yes no yes
    assert teacher_agreement(student, teacher).item() == pytest.approx(4 / 6)


def test_neighbour_distances_are_those_of_a_double_loop():
    features = torch.randn(2, 5, 3)
    unit = (features / features.norm(dim=-1, keepdim=True)).double().numpy()
    nearest = [min(np.linalg.norm(v[i] - v[j]) for j in range(5) if j != i) for v in unit for i in range(5)]
    mean, smallest = neighbour_distances(features, distributed=False)
    assert mean.item() == pytest.approx(np.mean(nearest), rel=1e-5)
    assert smallest.item() == pytest.approx(np.min(nearest), rel=1e-5)


def test_watching_a_step_changes_no_loss_and_no_gradient():
    plain, watched = (make_model(tiny_config(**{"train.centering": "sinkhorn_knopp"})) for _ in range(2))
    watched.watched = True
    losses = [model.forward_backward(make_batch(0), 0.05) for model in (plain, watched)]
    assert losses[0] == losses[1]
    for a, b in zip(plain.student.parameters(), watched.student.parameters()):
        assert a.grad is b.grad or torch.equal(a.grad, b.grad)
    assert plain.vital_signs == {}
    assert set(watched.vital_signs) == {
        "teacher_agreement",
        "dino_prototype_entropy",
        "ibot_prototype_entropy",
        "koleo_distance",
        "koleo_distance_min",
    }


def test_two_processes_tell_the_signs_of_the_whole_batch(tmp_path):
    body = """
from dinov2.train.vitals import neighbour_distances, prototype_entropy, teacher_agreement
torch.manual_seed(0)
student, teacher, features = torch.randn(2, 6, 4), torch.randn(2, 6, 4).softmax(-1), torch.randn(2, 6, 3)
patches = torch.randn(7, 5).softmax(-1)
if world == 2:
    student, teacher, features = (x[:, 3 * rank : 3 * rank + 3] for x in (student, teacher, features))
    patches = patches[:2] if rank == 0 else patches[2:]
answers["signs"] = [
    float(sign)
    for sign in (
        teacher_agreement(student, teacher),
        prototype_entropy(patches),
        *neighbour_distances(features, distributed=True),
    )
]
"""
    one, two = run_ranks(body, tmp_path, world=1), run_ranks(body, tmp_path)
    assert two[0]["signs"] == two[1]["signs"] == pytest.approx(one[0]["signs"], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("Tesla V100-SXM2-16GB", 125),
        ("NVIDIA L4", 121),
        ("NVIDIA RTX A1000", None),
    ],
)
def test_the_peak_of_a_gpu_is_found_by_its_name(name, tflops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peak = peak_flops(torch.device("cuda"), torch.float16)
    assert peak == (tflops and tflops * 1e12)
    assert peak_flops(torch.device("cuda"), torch.float32) is None


def test_without_a_known_peak_there_is_no_utilisation_and_a_given_one_counts():
    cfg = tiny_config(**{"train.batch_size_per_gpu": 4})
    model = make_model(cfg)
    assert ideal_step_time(model, cfg) is None
    cfg.train.peak_tflops = 0.5
    assert ideal_step_time(model, cfg) == pytest.approx(step_flops(model, cfg, 4) / 0.5e12)


def test_the_operations_of_a_backbone_are_those_that_pytorch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    from dinov2.train.flops import backbone_flops

    backbone = make_model(tiny_config()).teacher["backbone"]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone(torch.zeros(1, 3, 56, 56))
    assert backbone_flops(backbone, 56) == pytest.approx(counter.get_total_flops(), rel=0.02)
