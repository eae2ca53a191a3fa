"""What the launcher can start: a program of this package with its arguments, its config and the data that it reads."""

import argparse
import copy
import enum
from collections.abc import Callable, Sequence

from omegaconf import DictConfig

from dinov2.configs import check
from dinov2.utils.config import get_cfg_from_args


class SubmissionError(RuntimeError):
    """A job that cannot run as asked for; the message says what to change."""


class Task:
    """A program of this package that the launcher can start; each subclass names one.

    Args:
        args: of the program and of the launcher together.
    """

    program: str  # its file, below the folder that holds the package
    get_args_parser: Callable[..., argparse.ArgumentParser]  # of the program alone
    for_training = False  # whether its config must name training data
    resume_code: int | None = None  # its exit code when it was told to stop and has left a checkpoint
    data_arguments: tuple[str, ...] = ()  # arguments that name data

    def __init__(self, args: argparse.Namespace):
        self.args = args

    @property
    def takes_config(self) -> bool:
        """Whether the program gets a resolved config; an evaluation may find all it needs in a weights file."""
        return self.for_training or bool(getattr(self.args, "config_file", ""))

    def arguments(self) -> list[str]:
        """Return the command line of the program without output folder and, in a resolved config, overrides."""
        elsewhere = ("config_file", "opts") if self.takes_config else ()
        parser = type(self).get_args_parser(add_help=False)
        return command_line(parser, self.args, leave_out=("output_dir", "no_resume", *elsewhere))

    def first_arguments(self) -> list[str]:
        """Return what holds for the first start only: a job that comes back from the queue is to resume."""
        return ["--no-resume"] if getattr(self.args, "no_resume", False) else []

    def config(self, output_dir: str, overrides: Sequence[str] = ()) -> DictConfig | None:
        """Return the checked config of a run.

        Raises:
            ConfigError: it has problems.
            SubmissionError: a sweep without a config to change.
        """
        if not self.takes_config:
            if overrides:
                raise SubmissionError("--sweep changes values of a config: give one with --config-file")
            return None
        args = copy.copy(self.args)
        args.output_dir = output_dir
        args.opts = [*(self.args.opts or []), *overrides]
        return check(get_cfg_from_args(args), for_training=self.for_training)

    def data_paths(self, cfg: DictConfig | None) -> dict[str, str]:
        """Return what each path is that the program's arguments name as data, by path."""
        actions = type(self).get_args_parser(add_help=False)._actions
        return {
            path: action.option_strings[0]
            for action in actions
            if action.dest in self.data_arguments
            for path in folders(getattr(self.args, action.dest))
        }


def folders(value: str | Sequence[str] | None) -> list[str]:
    """Return the paths in a dataset option: a path, several, or a string such as `ImageNet:split=TRAIN:root=/data`."""
    if not value:
        return []
    if not isinstance(value, str):
        return [path for each in value for path in folders(each)]
    if ":" not in value:
        return [value]
    return [part.partition("=")[2] for part in value.split(":") if part.partition("=")[0] in ("root", "extra")]


def command_line(parser: argparse.ArgumentParser, args: argparse.Namespace, leave_out: Sequence[str] = ()) -> list[str]:
    """Write parsed arguments as the words that parse to them; those at their default are left out.

    Raises:
        TypeError: the parser has a kind of argument that this cannot write.
    """
    words: list[str] = []
    positional: list[str] = []
    for action in parser._actions:  # argparse offers no public view of its options
        value = getattr(args, action.dest, action.default)
        if action.dest in ("help", *leave_out) or value == action.default:
            continue
        values = [
            str(v.value if isinstance(v, enum.Enum) else v) for v in (value if isinstance(value, list) else [value])
        ]
        if not action.option_strings:
            positional += values
        elif action.nargs == 0 and isinstance(value, bool):  # a flag; --no-... where it has two names
            words.append(action.option_strings[0 if value or len(action.option_strings) == 1 else -1])
        elif isinstance(action, argparse._StoreAction):
            words += [action.option_strings[0], *values]
        else:
            raise TypeError(f"cannot write {action.option_strings[0]}, a {type(action).__name__}, as a command line")
    return words + positional
