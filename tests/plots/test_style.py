"""The style leaves matplotlib as it was, and as a backend that started inside wants it."""

from __future__ import annotations

import matplotlib
import matplotlib.pyplot as plt
import pytest

from skipcal.plots.style import style


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
