"""Write the tables of configuration.md from the schema and the defaults: python docs/make_configuration.py."""

import dataclasses
import inspect
import re
import typing
from collections.abc import Iterator
from pathlib import Path

from omegaconf import OmegaConf

from dinov2.configs import dinov2_default_config
from dinov2.configs.schema import Config, Pair

PAGE = Path(__file__).with_name("configuration.md")
BEGIN, END = "<!-- tables: begin (python docs/make_configuration.py) -->", "<!-- tables: end -->"
TYPE_NAMES = {
    Pair: "[low, high]",
    str | list[str]: "text or list",
    int | str: "integer or text",
    bool | str: "true/false or text",
    list[float]: "list of numbers",
    list[str]: "list of texts",
    int: "integer",
    float: "number",
    bool: "true/false",
    str: "text",
}


def comments(section: type) -> dict[str, str]:
    """Return the comment beside every field of a section."""
    found = re.findall(r"^    (\w+): [^#\n]+?#\s*(.+)$", inspect.getsource(section), flags=re.MULTILINE)
    return dict(found)


def rows(section: type, prefix: str) -> Iterator[str]:
    """Yield one table row per key of a section and of the sections within."""
    said = comments(section)
    for name, kind in typing.get_type_hints(section).items():
        key = f"{prefix}.{name}"
        if dataclasses.is_dataclass(kind):
            yield from rows(kind, key)
        else:
            default = OmegaConf.select(dinov2_default_config, key)
            yield f"| `{key}` | {TYPE_NAMES[kind]} | `{shown(default)}` | {said[name]} |"


def shown(value: object) -> str:
    """Return a default as one writes it in a configuration."""
    if OmegaConf.is_list(value):
        return f"[{', '.join(shown(item) for item in value)}]"
    return {True: "true", False: "false"}.get(value, str(value)) if isinstance(value, bool) else str(value) or "''"


def tables() -> str:
    """Return one table per section."""
    parts = []
    for name, section in typing.get_type_hints(Config).items():
        head = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
        parts.append("\n".join([f"### {name}", "", inspect.getdoc(section), "", *head, *rows(section, name)]))
    return "\n\n".join(parts)


def page(text: str) -> str:
    """Return the page with its tables replaced by those of today."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
