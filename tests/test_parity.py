"""The numbers that DINOv2 itself computes, where they lie beside the checkout (`../shared/reference`)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Out by design: upstream's dense heads rest on libraries that no longer install.
LEFT_OUT = {"keys.hub.depth_linear_head_keys"}


def failures(reference: Path, section: str, only: str = "") -> list[str]:
    command = [sys.executable, str(reference / "check_parity.py"), str(ROOT), "--shims", "never", "--section", section]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, "--only", only], capture_output=True, text=True, env=environment, timeout=1500, check=False
    )
    lines = run.stdout.splitlines()
    assert lines, run.stderr
    assert not lines[-1].startswith("0 passed"), run.stdout
    return [line for line in lines if line.startswith("FAIL") and line.split()[1] not in LEFT_OUT]


@pytest.mark.slow
@pytest.mark.parametrize("section", ["keys", "vit", "losses", "config"])
def test_all_numbers_of_a_section_are_those_of_the_reference(shared_reference, section):
    assert failures(shared_reference, section) == []


@pytest.mark.parametrize(
    ("section", "only"),
    [("keys", "vit_small"), ("vit", "small_518_reg_aa.98x98"), ("vit", "list_of_crops.small_swiglu")],
)
def test_a_sample_of_numbers_is_that_of_the_reference(shared_reference, section, only):
    assert failures(shared_reference, section, only) == []
