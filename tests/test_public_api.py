"""The names that code written for DINOv2 imports, and how it calls them; public_api.txt lists them.

Ours may take more parameters, with defaults; it may not lose, rename or reorder one, nor change a listed default.
"""

import ast
import importlib
import inspect
import operator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
TABLE = Path(__file__).with_name("public_api.txt").read_text(encoding="utf-8").splitlines()
ROWS = [line for line in TABLE if line and not line.startswith("#")]


def find(dotted: str):
    """The object behind a dotted name: its longest part that is a module, then attributes of that."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        name = ".".join(parts[:end])
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not name.startswith(error.name):  # one of the module's own imports is what is missing
                raise
            continue
        return operator.attrgetter(".".join(parts[end:]))(module) if parts[end:] else module
    raise ModuleNotFoundError(dotted)


def promised(arguments: str) -> tuple[list[str], dict[str, object]]:
    """Names in order, and the defaults given, of "a, b=1, c"."""
    pairs = [argument.partition("=") for argument in arguments.split(", ") if argument]
    return [name for name, _, _ in pairs], {name: ast.literal_eval(value) for name, sign, value in pairs if sign}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.partition("(")[0])
def test_a_public_name_is_there_and_takes_what_callers_of_dinov2_give_it(row):
    dotted, bracket, arguments = row.removesuffix(")").partition("(")
    found = find(dotted)
    if not bracket:
        return
    by_position, _, by_keyword = arguments.partition("*, ")
    (first, defaults), (rest, more_defaults) = promised(by_position.rstrip(", ")), promised(by_keyword)
    ours = inspect.signature(found).parameters
    named = {name: p for name, p in ours.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}

    assert {*first, *rest} <= set(named) or any(p.kind is p.VAR_KEYWORD for p in ours.values())
    assert [name for name, p in named.items() if p.kind is not p.KEYWORD_ONLY][: len(first)] == first
    defaults |= more_defaults
    assert {name: named[name].default for name in defaults if name in named} == defaults
    added_without_default = {name for name, p in named.items() if p.default is p.empty} - {*first, *rest}
    assert added_without_default == set()


def test_a_model_is_told_by_keyword_that_it_is_training():
    from dinov2.models.vision_transformer import DinoVisionTransformer

    assert inspect.signature(DinoVisionTransformer.forward).parameters["is_training"].default is False


def test_torch_hub_builds_a_backbone_from_a_clone():
    model = torch.hub.load(str(ROOT), "dinov2_vits14_reg", source="local", pretrained=False)
    assert (model.embed_dim, model.patch_size, model.num_register_tokens) == (384, 14, 4)


def test_torch_hub_offers_every_backbone():
    tree = ast.parse((ROOT / "hubconf.py").read_text(encoding="utf-8"))
    offered = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert {f"dinov2_vit{size}14{registers}" for size in "sblg" for registers in ("", "_reg")} <= offered
