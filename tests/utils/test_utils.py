import math
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dinov2.utils.dtype import as_torch_dtype
from dinov2.utils.utils import CosineScheduler, fix_random_seeds, get_sha, has_batchnorms


def test_a_cosine_schedule_freezes_warms_up_and_falls_to_its_final_value():
    schedule = CosineScheduler(1.0, 0.2, total_iters=10, warmup_iters=3, start_warmup_value=0.4, freeze_iters=2)
    assert [schedule[i] for i in range(5)] == pytest.approx([0.0, 0.0, 0.4, 0.7, 1.0])
    half_cosine = [0.2 + 0.4 * (1 + math.cos(math.pi * i / 5)) for i in range(5)]
    assert [schedule[i] for i in range(5, 10)] == pytest.approx(half_cosine)
    assert schedule[10] == schedule[10_000] == 0.2


def test_a_schedule_may_be_all_warm_up():
    schedule = CosineScheduler(0.07, 0.07, total_iters=4, warmup_iters=4, start_warmup_value=0.04)
    assert [schedule[i] for i in range(5)] == pytest.approx([0.04, 0.05, 0.06, 0.07, 0.07])


def test_a_warm_up_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match="9 warm-up iterations do not fit into 5"):
        CosineScheduler(1.0, 0.0, total_iters=5, warmup_iters=9)


def test_seeds_fix_every_generator():
    drawn = []
    for _ in range(2):
        fix_random_seeds(5)
        drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert drawn[0] == drawn[1]
    fix_random_seeds(6)
    assert drawn[0] != (random.random(), np.random.rand(), torch.rand(1).item())


def test_batch_norms_are_found_at_any_depth():
    assert has_batchnorms(nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm2d(2))))
    assert not has_batchnorms(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))


def test_the_code_version_is_that_of_the_checkout():
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert get_sha().startswith(f"sha: {head.stdout.strip() or 'unknown'}")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("fp32", torch.float32),
        ("fp16", torch.float16),
        ("bf16", torch.bfloat16),
        ("float16", torch.float16),
        ("torch.bfloat16", torch.bfloat16),
        ("int64", torch.int64),
        (torch.uint8, torch.uint8),
    ],
)
def test_number_formats_have_short_names_and_torch_names(name, dtype):
    assert as_torch_dtype(name) is dtype


@pytest.mark.parametrize("name", ["fp8", "nn", "float"])
def test_an_unknown_number_format_is_refused_except_for_torch_aliases(name):
    if name == "float":
        assert as_torch_dtype(name) is torch.float32
        return
    with pytest.raises(ValueError, match=name):
        as_torch_dtype(name)


def test_importing_the_configs_needs_no_torch():
    code = "import sys, dinov2.configs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
