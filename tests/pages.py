"""What the README and the pages of docs/ ask a reader to type."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]
# What a block's language means for the tests. Text without one is output, a formula or a file's form.
RUN = ("console", "python")
NOT_RUN = {"", "bash", "yaml", "{eval-rst}", "{toctree}"}

_BLOCK = re.compile(r"^```(?P<language>[^\n]*)\n(?P<text>.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Snippet:
    """A block of a page. line: where its text starts, counted from 1."""

    page: str
    line: int
    language: str
    text: str

    @property
    def commands(self) -> list[list[str]]:
        """The commands of a console block as words: lines after `$ `, continued after a backslash."""
        joined = self.text.replace("\\\n", " ")
        found = re.findall(r"^\$ ([^\n]+)$", joined, re.M)
        return [shlex.split(command, comments=True) for command in found]


def text_of(page: str) -> str:
    """The page as it is written."""
    return (ROOT / page).read_text(encoding="utf-8")


def snippets(page: str) -> Iterator[Snippet]:
    """All blocks of a page, in its order."""
    text = text_of(page)
    for block in _BLOCK.finditer(text):
        line = text.count("\n", 0, block.start("text")) + 1
        yield Snippet(page, line, block["language"].strip(), block["text"])
