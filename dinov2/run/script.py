"""The sbatch script of a job: plain text that says all that will happen, readable a year later."""

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

PACKAGE_ROOT = Path(__file__).resolve().parents[2]  # the folder that holds `dinov2`
JOB_ID = "%j"  # in an output folder: the id of the job, of the whole array for a sweep
JOB_FOLDER = "slurm"  # in the output folder: one folder per job with all that the launcher writes

# A task that dies can leave others waiting for it in a collective: they are ended after this time. It is long enough
# for rank 0 to finish a file that the others need not wait for.
SECONDS_AFTER_FIRST_EXIT = 300

_DIRECTIVES = {"tasks_per_node": "ntasks-per-node", "timeout_min": "time"}

_TEMPLATE = """\
#!/bin/bash
{directives}

# {title}
# submitted from {cwd} with
#   {command_line}

id=${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}
{run}
job=$run/{job_folder}/$id # config.yaml and the logs of the tasks
export PYTHONPATH={package_root}${{PYTHONPATH:+:$PYTHONPATH}}
export PYTHONUNBUFFERED=1
# Where the processes meet: this script runs on the first node, so the port is free where rank 0 will listen.
export MASTER_PORT=$({python} -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')

echo "$(date '+%F %T') job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start $((${{SLURM_RESTART_COUNT:-0}} + 1)): $run"
{srun}
code=$?
echo "$(date '+%F %T') job $SLURM_JOB_ID: exit code $code"
{after}exit $code
"""

_SRUN = """\
srun --kill-on-bad-exit=0 --wait={wait}{cpus} --open-mode=append --output="$job/task_%t.log" \\
  {command}"""

_FIRST = """\
first=({arguments}) # not when the job comes back from the queue
[ "${{SLURM_RESTART_COUNT:-0}}" = 0 ] || first=()
"""

_AFTER_INTERRUPTION = """\
# {code}: the training was told to stop, wrote a checkpoint and can go on. Any other code but 0 is a failure.
# A job that somebody cancelled or requeued is in none of these states: it is left alone.
if [ $code = {code} ] &&
  scontrol show job --oneliner "$SLURM_JOB_ID" | grep -qE 'JobState=(RUNNING|SIGNALING|STOPPED)'; then
  echo "$(date '+%F %T') job $SLURM_JOB_ID: back to the queue, to resume from its checkpoint"
  scontrol requeue "$SLURM_JOB_ID" && sleep 60 # SLURM ends this script
fi
"""


def directives(parameters: Mapping[str, int | str]) -> list[str]:
    """Write resources as options of sbatch: {"timeout_min": 60} -> ["--time=60"]."""
    return [f"--{_DIRECTIVES.get(name, name.replace('_', '-'))}={value}" for name, value in parameters.items()]


def render(
    program: str,
    arguments: Sequence[str],
    *,
    parameters: Mapping[str, int | str],
    output_dir: str,
    runs: Sequence[str] = (),
    takes_config: bool = True,
    first_arguments: Sequence[str] = (),
    resume_code: int | None = None,
    title: str = "",
    command_line: Sequence[str] = (),
) -> str:
    """Write the script of a job, or of an array with one job per run.

    Args:
        program: a file of this package, run once per task.
        arguments: of the program, without its config file and output folder.
        parameters: see `dinov2.utils.cluster.get_slurm_executor_parameters`.
        output_dir: of the job; `%j` in it becomes the job id.
        runs: folders below output_dir, one per job of an array; none: one job, whose folder is output_dir.
        takes_config: pass `--config-file` with the resolved config of the run.
        first_arguments: of the program, when the job starts for the first time and not when it comes back.
        resume_code: the exit code that puts the job back in the queue; None where the program cannot resume.
        title: what this is, for the reader.
        command_line: what the user typed, for the reader.
    """
    pattern = "%A" if runs else "%j"  # as sbatch understands it
    folder = pattern.join(part.replace("%", "%%") for part in output_dir.split(JOB_ID))
    log = f"{folder}/{JOB_FOLDER}/{pattern}/{'batch_%a.log' if runs else 'batch.log'}"
    options = [*directives(parameters), "--requeue", "--open-mode=append", "--export=ALL", f"--output={log}"]
    folder = '"$id"'.join(shlex.quote(part) if part else "" for part in output_dir.split(JOB_ID))
    run = f"run={folder}"
    if runs:
        names = "\n".join(f"  {shlex.quote(name)}" for name in runs)
        run = f"runs=(\n{names}\n)\n{run}/${{runs[SLURM_ARRAY_TASK_ID]}}"
    command = f'{shlex.join([sys.executable, str(PACKAGE_ROOT / program)])} --output-dir "$run"'
    command += ' --config-file "$job/config.yaml"' if takes_config else ""
    command += ' "${first[@]}"' if first_arguments else ""
    command += f" {shlex.join(arguments)}" if arguments else ""
    if resume_code is not None:
        # Until the training listens (while Python starts), a signal is ignored instead of fatal.
        command = f"""bash -c 'trap "" USR2 TERM; exec "$@"' dinov2 {command}"""
    srun = _SRUN.format(
        wait=SECONDS_AFTER_FIRST_EXIT,
        cpus=f" --cpus-per-task={parameters['cpus_per_task']}" if "cpus_per_task" in parameters else "",
        command=command,
    )
    if first_arguments:
        srun = _FIRST.format(arguments=shlex.join(first_arguments)) + srun
    if resume_code is not None:
        srun = "trap '' TERM # the tasks need the time to write their checkpoint\n" + srun
    return _TEMPLATE.format(
        directives="\n".join(f"#SBATCH {_quoted(option)}" for option in options),
        title=title,
        cwd=os.getcwd(),
        command_line=shlex.join(command_line).replace("\n", "\\n"),
        run=run,
        job_folder=JOB_FOLDER,
        package_root=shlex.quote(str(PACKAGE_ROOT)),
        python=shlex.quote(sys.executable),
        srun=srun,
        after=_AFTER_INTERRUPTION.format(code=resume_code) if resume_code is not None else "",
    )


def _quoted(option: str) -> str:
    name, _, value = option.partition("=")
    return f"{name}={shlex.quote(value)}" if value else option
