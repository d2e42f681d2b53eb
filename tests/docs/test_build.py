"""The documentation builds without a warning, and leaves nothing of the public interface out."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
from pages import ROOT
from warm_python import environment

import skipcal

pytest.importorskip("sphinx")
pytest.importorskip("myst_parser")


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory, warm: str) -> Path:
    """The pages as `make docs` builds them; any warning fails."""
    target = tmp_path_factory.mktemp("html")
    options = re.search(r"sphinx-build (.+) docs build/docs", (ROOT / "Makefile").read_text())
    assert options and {"-W", "-n"} <= set(options[1].split())
    done = subprocess.run(
        [warm, "-m", "sphinx", *options[1].split(), str(ROOT / "docs"), str(target)],
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    return target


class _Page(HTMLParser):
    """Ids, links and pictures of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.targets: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids.add(given.get("id") or "")
        target = given.get("href") if tag == "a" else given.get("src") if tag == "img" else None
        if target:
            self.targets.append(target)


def parsed(html: Path) -> Iterator[tuple[Path, _Page]]:
    for file in sorted(html.rglob("*.html")):
        if "_static" not in file.parts:
            yield file, _Page(file.read_text(encoding="utf-8"))


def test_every_public_name_has_an_entry(html: Path) -> None:
    described = {name for _, page in parsed(html) for name in page.ids}
    assert {f"skipcal.{name}" for name in skipcal.__all__} <= described


def test_every_error_has_an_entry(html: Path) -> None:
    page = (html / "api" / "errors.html").read_text(encoding="utf-8")
    names = re.findall(r"^class (\w+)\((?!Exception)", (ROOT / "errors.py").read_text(), re.M)
    assert len(names) > 8
    assert all(f'id="skipcal.errors.{name}"' in page for name in names)
    tree = re.search(r"<pre>(?:(?!</pre>).)*ProcessLost", re.sub(r"<(?!/?pre)[^>]+>", "", page), re.S)
    assert tree and "├── ConfigError           2  an option" in tree[0]


def test_every_link_leads_somewhere(html: Path) -> None:
    pages = {file: page for file, page in parsed(html)}
    inner = 0
    for file, page in pages.items():
        for target in page.targets:
            place, fragment = urldefrag(unquote(target))
            if re.match(r"[a-z]+:", target):
                continue
            inner += 1
            there = (file.parent / place).resolve() if place else file
            assert there.exists(), f"{file.name}: {target}"
            if fragment and there in pages and not there.name.startswith(("genindex", "search")):
                assert fragment in pages[there].ids, f"{file.name}: {target}"
    assert inner > 500


def test_every_page_can_be_reached(html: Path) -> None:
    """Also by people who only follow the sidebar of the first page."""
    start = (html / "index.html").read_text(encoding="utf-8")
    for source in (ROOT / "docs").rglob("*.md"):
        name = source.relative_to(ROOT / "docs").with_suffix(".html").as_posix()
        assert name == "index.html" or f'href="{name}"' in start, name
        assert (html / name).exists()


def test_a_docstring_is_laid_out(html: Path) -> None:
    """`name: meaning` lines become a list, and an example stays code."""
    page = (html / "api" / "runtime.html").read_text(encoding="utf-8")
    words = re.sub(r"<[^>]+>|\s+", " ", page)
    assert re.search(r"<dt[^>]*><code[^>]*><span[^>]*>teacher_forced</span></code></dt>", page)
    assert "skip in parallel forward passes over whole sequences" in re.sub(r" +", " ", words)
    example = re.search(
        r"<pre>(?:(?!</pre>).)*run\.report\.skip_ratio", re.sub(r"<(?!/?pre)[^>]+>", "", page), re.S
    )
    assert example and "with skipcal.skipping(model, profile) as run:" in example[0]
