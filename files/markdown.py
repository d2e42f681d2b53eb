"""Markdown of values: tables, text that is no markup, lines inside a fence."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from skipcal.files.reading import one_line


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in lines)


def escaped(text: str) -> str:
    """Text of a profile so that Markdown shows it as it is: no tag, link, picture, code or cell."""
    plain = one_line(text, 2000).replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([`|])|(?<=!)(\[)|(?<=\])(\()", lambda match: f"\\{match[0]}", plain)


def fenced(line: str) -> str:
    """A line that cannot end the fence around it."""
    return line.replace("```", "` ` `")
