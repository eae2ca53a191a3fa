"""What benchmarks share: tables, and their place in a Markdown file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def table(head: Sequence[str], rows: Sequence[Sequence[str]], rule: str = "---") -> str:
    """A Markdown table; `rule` aligns its columns, "---:" to the right."""
    lines = [head, [rule] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_section(path: Path, name: str, section: str) -> None:
    """Put the section of benchmark `name` in its place in a Markdown file, or at the end."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    text = path.read_text() if path.exists() else "# Benchmarks\n"
    section = f"{begin}\n{section.rstrip()}\n\n{end}\n"
    if begin in text:
        before, rest = text.split(begin, 1)
        text = before + section + rest.split(end, 1)[1].lstrip("\n")
    else:
        text = f"{text.rstrip()}\n\n{section}"
    path.write_text(text)
