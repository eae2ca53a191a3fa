"""The room plan of docs/architecture.md as a test: which room may know which, and who may know of other processes."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "dinov2"

# Room -> the rooms below it. An import of any other room of ours is an arrow that points the wrong way.
BELOW = {
    "configs": "",
    "distributed": "",
    "layers": "",
    "data": "distributed",
    "fsdp": "distributed",
    "logging": "distributed",
    "loss": "distributed",
    "models": "layers",
    "hub": "layers models",
    "utils": "configs distributed logging models",
    "eval": "configs data distributed logging models utils",
    "train": "configs data distributed eval fsdp layers logging loss models utils",
    "run": "configs eval logging train utils",
}
KNOW_OTHER_PROCESSES = {"distributed", "fsdp"}
# Beside the rooms: the package's own names, and the command line, which is above everything.
TOP_FILES = {"__init__.py", "__main__.py", "cli.py"}


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, wherever the statement stands, and its uses of `torch.distributed`."""
    parents = (PACKAGE.name, *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                above = parents[: len(parents) + 1 - level] if level else ()
                yield from (".".join([*above, *filter(None, [module]), alias.name]) for alias in names)
            case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(name)), *_]):
                yield name
            case ast.Attribute() if ast.unparse(node).startswith("torch.distributed"):
                yield "torch.distributed"


def files_of(room: str) -> list[Path]:
    return sorted((PACKAGE / room).rglob("*.py"))


def is_script(path: Path) -> bool:
    return '__name__ == "__main__"' in path.read_text(encoding="utf-8")


def test_the_plan_and_the_folders_agree():
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(BELOW)
    assert {path.name for path in PACKAGE.glob("*.py")} <= TOP_FILES


def test_every_folder_with_python_files_is_a_package():
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert [folder for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def test_the_arrows_have_no_cycle():
    seen = set()
    for room, below in BELOW.items():  # listed from the bottom up
        assert set(below.split()) <= seen, f"{room} points at a room listed after it"
        seen.add(room)


@pytest.mark.parametrize("room", BELOW)
def test_a_room_imports_only_rooms_below_it(room):
    allowed = {room, *BELOW[room].split()}
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in files_of(room)
        for name in imports(path)
        if name.startswith("dinov2.") and name.split(".")[1] in {*BELOW, "cli"} - allowed
    ]
    assert wrong == []


@pytest.mark.parametrize("room", sorted(set(BELOW) - KNOW_OTHER_PROCESSES))
def test_only_the_edge_of_the_package_uses_torch_distributed(room):
    wrong = {path.relative_to(PACKAGE) for path in files_of(room) for name in imports(path) if is_collective(name)}
    assert wrong == set()


def is_collective(name: str) -> bool:
    return name == "torch.distributed" or name.startswith("torch.distributed.")


@pytest.mark.parametrize("folder", sorted({path.parent for path in PACKAGE.rglob("*.py") if is_script(path)}))
def test_no_file_beside_a_script_shadows_a_standard_module(folder):
    # `python dinov2/train/train.py` puts that script's folder first on the path, before the standard library.
    beside = {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert beside & sys.stdlib_module_names == set()


def test_the_command_line_answers_without_loading_torch():
    probe = "import sys, dinov2, dinov2.cli; print(sorted({'torch', 'numpy', 'omegaconf'} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
