"""Several runs of one command, for every combination of some config values."""

import itertools
import re
from collections.abc import Sequence


def expand(sweeps: Sequence[str]) -> dict[str, list[str]]:
    """Return the config overrides of each run, by the name of its folder.

    Args:
        sweeps: `key=value,value,...` each; a comma inside brackets belongs to its value.

    Raises:
        ValueError: a sweep has no key, no values, or the key of another one.

    >>> expand(["optim.base_lr=1e-4,2e-4"])
    {'0_optim.base_lr=1e-4': ['optim.base_lr=1e-4'], '1_optim.base_lr=2e-4': ['optim.base_lr=2e-4']}
    """
    choices: dict[str, list[str]] = {}
    for sweep in sweeps:
        key, equals, text = sweep.partition("=")
        values = [value.strip() for value in re.split(r",(?![^\[\(]*[\]\)])", text) if value.strip()]
        if not (key.strip() and equals and values):
            raise ValueError(f"--sweep {sweep!r} is not of the form key=value,value, such as optim.base_lr=1e-4,2e-4")
        if key.strip() in choices:
            raise ValueError(f"--sweep names the key twice: give all values of {key.strip()} at once")
        choices[key.strip()] = values
    runs = [
        [f"{key}={value}" for key, value in zip(choices, values)] for values in itertools.product(*choices.values())
    ]
    digits = len(str(len(runs) - 1))
    return {f"{index:0{digits}d}_{_file_name(','.join(run))}": run for index, run in enumerate(runs)} if choices else {}


def _file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._=,+-]+", "-", text)[:100]
