"""Follow the logs of a job until it ends."""

import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

POLL_S = 2.0
# States in which a job stays. PREEMPTED and NODE_FAIL are not among them: such a job goes back to the queue, or is
# shown as cancelled or failed a moment later.
FINAL_STATES = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "OUT_OF_MEMORY",
    "TIMEOUT",
}


def follow(job_id: str, logs: Mapping[str, Path]) -> int:
    """Print what is added to each log until all jobs have ended; return 0 if all completed, else an exit code.

    Args:
        job_id: of the job or of the array.
        logs: the log of each run by its name, which starts each line where there are several.
    """
    offsets = dict.fromkeys(logs, 0)
    known: dict[str, tuple[str, int]] = {}
    try:
        while True:
            states = job_states(job_id)
            for job, (state, _) in states.items():
                if known.get(job, ("", 0))[0] != state:
                    print(f"--- job {job} is {state}", flush=True)
            known |= states
            for name, path in logs.items():
                offsets[name] = _print_new(path, offsets[name], f"{name}: " if len(logs) > 1 else "")
            if all(state in FINAL_STATES for state, _ in states.values()):  # also when SLURM has forgotten the job
                break
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        print(f"--- the job goes on; stop it with scancel {job_id}", file=sys.stderr)
        return 130
    return max((code or int(state != "COMPLETED") for state, code in known.values()), default=1)


def job_states(job_id: str) -> dict[str, tuple[str, int]]:
    """Return state and exit code of each job of the array, by its id; empty when SLURM no longer knows it.

    A controller that does not answer is asked again.
    """
    command = ["scontrol", "show", "job", "--oneliner", job_id]
    while (answer := subprocess.run(command, capture_output=True, text=True)).returncode:
        if "Invalid job id" in answer.stderr:
            return {}
        time.sleep(POLL_S)
    return {job["JobId"]: (job["JobState"], int(job["ExitCode"].split(":")[0])) for job in _records(answer.stdout)}


def _records(text: str) -> list[dict[str, str]]:
    return [dict(re.findall(r"(\w+)=(\S*)", line)) for line in text.splitlines() if "JobState=" in line]


def _print_new(path: Path, offset: int, prefix: str) -> int:
    """Print the whole lines behind the offset, and return where they end."""
    if not path.exists():
        return offset
    with path.open("rb") as log:
        log.seek(offset)
        new = log.read()
    new = new[: new.rfind(b"\n") + 1]
    for line in new.decode(errors="replace").splitlines():
        print(f"{prefix}{line}", flush=True)
    return offset + len(new)
