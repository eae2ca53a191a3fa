"""What an installed copy holds and needs, and what a checkout may not hold."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from email import message_from_string
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "dinov2"
PICTURE_FOLDERS = ("docs/", "notebooks/")
LARGEST_FILE = 2_000_000  # bytes; notebooks with their outputs are the largest


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel built from a copy of the package, so that nothing is left in the checkout."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(PACKAGE, copy / "dinov2", ignore=shutil.ignore_patterns("__pycache__"))
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, "dist"], cwd=copy, check=True, capture_output=True)
    (path,) = (copy / "dist").glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


@pytest.fixture(scope="module")
def metadata(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return message_from_string(wheel.read(name).decode())


@pytest.fixture(scope="module")
def tracked_files():
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip(f"not a git checkout: {listing.stderr.strip()}")
    return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel):
    files = (path.relative_to(ROOT) for path in PACKAGE.rglob("*") if path.is_file())
    ours = {str(path) for path in files if "__pycache__" not in path.parts}
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == ours


def test_the_wheel_says_which_python_it_needs_and_carries_the_licence(wheel, metadata):
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


def requirements(metadata, *, extras: bool) -> set[str]:
    """Names of the distributions that are required, with or without those that only an extra asks for."""
    lines = metadata.get_all("Requires-Dist")
    return {normal(re.match(r"[\w.-]+", line)[0]) for line in lines if extras or "extra ==" not in line}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imported_modules(tree: ast.AST, *, on_import: bool) -> Iterator[str]:
    """Top names of modules imported; `on_import` leaves out those in functions and in `try`, which may be missing."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]
        elif not (on_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Try)):
            yield from imported_modules(node, on_import=on_import)


@pytest.mark.parametrize("on_import", [True, False], ids=["by importing", "by calling"])
def test_what_the_package_imports_is_declared(metadata, on_import):
    declared = requirements(metadata, extras=not on_import)
    installed = packages_distributions()

    def is_provider(distribution: str, module: str) -> bool:
        if module in installed:
            return distribution in map(normal, installed[module])
        return distribution == module or distribution.startswith(f"{module}-")  # an extra that is not installed here

    undeclared = {
        f"{path.relative_to(ROOT)}: {module}"
        for path in PACKAGE.rglob("*.py")
        for module in imported_modules(ast.parse(path.read_text(encoding="utf-8")), on_import=on_import)
        if module not in sys.stdlib_module_names and module != "dinov2"
        if not any(is_provider(name, module) for name in declared)
    }
    assert undeclared == set()


def test_an_error_names_an_extra_that_exists(metadata):
    advice = re.compile(r"dinov2\[(\w+)\]|MissingExtra\(\"\w+\", \"(\w+)\"")
    named = {
        first or second
        for path in PACKAGE.rglob("*.py")
        for first, second in advice.findall(path.read_text(encoding="utf-8"))
    }
    assert named
    assert named <= set(metadata.get_all("Provides-Extra"))


def test_the_command_explains_itself():
    answer = subprocess.run([sys.executable, "-m", "dinov2", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    for command in ("demo", "synth", "train", "check"):
        assert command in answer.stdout


def test_pictures_are_kept_only_where_documents_show_them(tracked_files):
    pictures = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".gif")
    elsewhere = [
        name
        for name in (path.relative_to(ROOT).as_posix() for path in tracked_files)
        if name.lower().endswith(pictures) and not name.startswith(PICTURE_FOLDERS)
    ]
    assert elsewhere == []


def test_no_file_is_large(tracked_files):
    assert [path for path in tracked_files if path.stat().st_size > LARGEST_FILE] == []


def test_links_between_documents_lead_somewhere(tracked_files):
    broken = [
        f"{path.relative_to(ROOT)}: {target}"
        for path in tracked_files
        if path.suffix == ".md"
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8"))
        if "://" not in target and not (path.parent / target).exists()
    ]
    assert broken == []


def test_ci_is_a_script_that_can_be_run():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
