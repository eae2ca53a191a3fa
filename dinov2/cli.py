"""The `dinov2` command: finds the module of a sub-command, hands it the arguments, and says plainly what went wrong.

A sub-command is one row of `COMMANDS`: its module has `get_args_parser()` and `main(argv)`, imported when asked for.
"""

import difflib
import importlib
import sys
import textwrap
from collections.abc import Sequence

from dinov2 import __version__
from dinov2.utils.errors import USER_ERROR, exit_code_of

# name: (module, what it does)
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("dinov2.train.demo", "train a small model on drawn cells in minutes and show that it learnt"),
    "synth": ("dinov2.data.synthetic", "draw labelled images of stained blood cells"),
    "check": ("dinov2.data.audit", "read every image of a folder and report what is wrong with it"),
    "train": ("dinov2.train.train", "train a model on folders of images"),
    "estimate": ("dinov2.train.estimate", "tell what a run costs in time and memory before it starts"),
    "evaluate": ("dinov2.eval.cross_validation", "score a model on labelled images by cross-validation"),
    "embed": ("dinov2.eval.embed", "write the embeddings of images to Parquet, NumPy or AnnData"),
    "visualize": ("dinov2.eval.visualize", "draw maps of features, patches as colours, attention, neighbours"),
    "explore": ("dinov2.eval.visualize.explorer", "write a web page to look through images by their features"),
    "export": ("dinov2.hub.export", "write a model for timm, Hugging Face, ONNX or torch.export"),
    "consolidate": ("dinov2.fsdp.checkpointer", "gather a sharded training checkpoint into one file"),
    "submit": ("dinov2.run.submit", "start a training run on a SLURM cluster"),
}


def describe() -> str:
    """Return the text of `dinov2 --help`."""
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:{width}}  {what}" for name, (_, what) in COMMANDS.items())
    return textwrap.dedent(
        """\
        usage: dinov2 [--help] [--version] [--debug] COMMAND ...

        DINOv2 for cells: train, score and look into a vision model on folders of cell images.

        commands:
        {rows}

        `dinov2 COMMAND --help` tells the options of one command.
        --debug shows the whole traceback of an error."""
    ).format(rows=rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command and return its exit code: 2 for a mistake of the user's, said in one message."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [word for word in arguments if word != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(describe())
        return 0 if arguments else USER_ERROR
    if arguments[0] == "--version":
        print(f"dinov2 {__version__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        return _complain(_unknown(name))
    module = importlib.import_module(COMMANDS[name][0])
    code = exit_code_of(module.main, rest, name=f"dinov2 {name}", debug=debug)
    if code == USER_ERROR and not debug:
        print(f"(`dinov2 --debug {name} …` shows the traceback)", file=sys.stderr)
    return code


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
    hint = f"did you mean `dinov2 {near[0]}`?" if near else f"commands: {', '.join(COMMANDS)}"
    return f"dinov2: no command {name!r}; {hint}"


def _complain(message: str) -> int:
    print(message, file=sys.stderr)
    return USER_ERROR
