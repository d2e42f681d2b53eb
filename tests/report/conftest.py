"""A real headless browser, in which a page may neither fetch nor complain."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
Open = Callable[..., Any]


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    place = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if place is None:
        pytest.skip(f"needs a browser: none of {', '.join(BROWSERS)} is on PATH")
    with api.sync_playwright() as playwright:
        quiet = ["--no-sandbox", "--disable-background-networking", "--disable-component-update"]
        browser = playwright.chromium.launch(executable_path=place, args=quiet)
        yield browser
        browser.close()


@contextmanager
def _opening(chromium: Any) -> Iterator[Open]:
    faults: list[str] = []
    contexts = []

    def watch(route: Any) -> None:
        if route.request.url.startswith(("file:", "data:", "blob:")):
            route.continue_()
        else:
            faults.append(f"request: {route.request.url}")
            route.abort()

    def refuse(dialog: Any) -> None:
        faults.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def opened(path: Path, width: int = 1200, dark: bool = False) -> Any:
        context = chromium.new_context(
            viewport={"width": width, "height": 800}, color_scheme="dark" if dark else "light"
        )
        contexts.append(context)
        context.route("**/*", watch)
        page = context.new_page()
        page.set_default_timeout(120_000)  # of a busy machine
        page.on("console", lambda m: faults.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("dialog", refuse)
        page.goto(path.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not faults


@pytest.fixture
def open_page(chromium: Any) -> Iterator[Open]:
    """`open_page(path, width=1200, dark=False)`; afterwards nothing was fetched and nothing went wrong."""
    with _opening(chromium) as opened:
        yield opened


@pytest.fixture(scope="module")
def page(chromium: Any, whole: Path) -> Iterator[Any]:
    """The page at `whole`, opened once: 2 s of a quiet core. Whoever changes it puts it back."""
    with _opening(chromium) as opened:
        yield opened(whole)
