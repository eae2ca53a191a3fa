import subprocess
import sys

import pytest

from dinov2.run.script import PACKAGE_ROOT, render


def lines(**options):
    defaults = {"parameters": {"nodes": 1, "tasks_per_node": 2, "timeout_min": 60}, "output_dir": "/out"}
    return render("dinov2/train/train.py", options.pop("arguments", []), **defaults | options).splitlines()


def test_resources_become_directives():
    script = lines()
    assert script[:4] == ["#!/bin/bash", "#SBATCH --nodes=1", "#SBATCH --ntasks-per-node=2", "#SBATCH --time=60"]
    assert "#SBATCH --output=/out/slurm/%j/batch.log" in script


def test_the_job_id_stands_where_the_output_folder_says_it():
    script = lines(output_dir="/out 50%/%j/x")
    assert "#SBATCH --output='/out 50%%/%j/x/slurm/%j/batch.log'" in script
    assert """run='/out 50%/'"$id"/x""" in script


def test_a_sweep_has_one_folder_for_each_job_of_the_array():
    script = lines(runs=["0_a=1", "1_a=2"])
    assert "#SBATCH --output=/out/slurm/%A/batch_%a.log" in script
    start = script.index("runs=(")
    assert script[start : start + 5] == ["runs=(", "  0_a=1", "  1_a=2", ")", "run=/out/${runs[SLURM_ARRAY_TASK_ID]}"]


def test_what_holds_for_the_first_start_is_left_out_when_the_job_comes_back(tmp_path):
    script = lines(first_arguments=["--no-resume"])
    start = script.index("first=(--no-resume) # not when the job comes back from the queue")
    shell = "\n".join([*script[start : start + 2], 'echo "${first[@]}"'])
    for restarts, said in ((None, "--no-resume"), ("0", "--no-resume"), ("1", "")):
        environment = {"SLURM_RESTART_COUNT": restarts} if restarts else {}
        assert subprocess.check_output(["bash", "-uc", shell], env=environment, text=True).strip() == said


@pytest.mark.parametrize("resume_code", [None, 75])
@pytest.mark.parametrize("runs", [(), ("0_a=1",)])
def test_every_script_is_sound_bash(resume_code, runs):
    script = "\n".join(lines(resume_code=resume_code, runs=runs, arguments=["--x", "it's; rm -rf"]))
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_only_a_task_that_can_resume_goes_back_to_the_queue():
    assert not any("requeue" in line for line in lines() if not line.startswith("#"))
    assert '  scontrol requeue "$SLURM_JOB_ID" && sleep 60 # SLURM ends this script' in lines(resume_code=75)


def test_the_module_is_started_with_the_python_that_submitted_it():
    script = lines(arguments=["--eval-only"])
    program = f"{sys.executable} {PACKAGE_ROOT}/dinov2/train/train.py"
    assert script[script.index("code=$?") - 1].strip() == (
        f'{program} --output-dir "$run" --config-file "$job/config.yaml" --eval-only'
    )
