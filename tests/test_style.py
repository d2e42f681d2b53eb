"""The style leaves matplotlib as it was, and as a backend that started inside wants it."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pytest

from skipcal.style import as_text, style, write_figure


@pytest.mark.parametrize("fails", [False, True])
def test_settings_come_back_but_for_what_the_backend_switched_on(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A notebook's backend starts with the first figure: were it left passive, no later one would show."""
    monkeypatch.setitem(matplotlib.rcParams, "interactive", False)
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 7.0)
    try:
        with style():
            assert matplotlib.rcParams["font.size"] == 10
            matplotlib.interactive(True)  # as the backend does
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert matplotlib.rcParams["font.size"] == 7.0
    assert plt.isinteractive()


def test_a_name_that_looks_like_a_formula_is_shown_as_it_is(tmp_path: Path) -> None:
    figure, ax = plt.subplots()
    for name in ("$x^$", "a$b", "_hidden", "plain"):
        ax.plot([0, 1], label=as_text(name))
    shown = [text.get_text().strip() for text in ax.legend().get_texts()]
    assert shown == [r"\$x^\$", r"a\$b", "_hidden", "plain"]
    write_figure(figure, tmp_path / "a.svg", overwrite=False)
    drawn = (tmp_path / "a.svg").read_text()
    assert all(name in drawn for name in ("$x^$", "a$b", "_hidden"))
