"""A result as a frame, as text and in the documentation; the scripts that make results."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from skipcal.files.writing import dump_json
from skipcal.speed.table import break_even_said, to_frame, to_markdown, to_text

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "benchmarks"


def script(monkeypatch: pytest.MonkeyPatch, name: str, *args: str | Path) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
    runpy.run_path(str(SCRIPTS / name), run_name="__main__")


def test_the_frame_has_a_row_for_each_arm(result: dict[str, Any]) -> None:
    frame = to_frame(result)
    assert len(frame) == 2 * 6
    first = frame[(frame["arm"] == "skipping") & (frame["batch_size"] == 2)].iloc[0]
    arm = next(arm for arm in result["cases"][1]["arms"] if arm["arm"] == "skipping")
    assert first["speed_up_over_full"] == arm["speed_up_over_full"]["median"]
    assert first["speed_up_over_full_max"] == arm["speed_up_over_full"]["max"]
    assert first["step_ms"] == arm["step_ms"]["median"]


def test_the_text_says_what_was_measured(result: dict[str, Any]) -> None:
    text = to_text(result)
    assert "random weights: speed only, no quality" in text
    assert text.count("break-even skip ratio:") == 2
    assert "skipping 0.25" in text and "watching" in text
    assert "engine recorded (" in text
    ratio = result["cases"][0]["arms"][-1]["realised_over_ideal"]
    assert f"{ratio:.3f}" in text


def test_no_break_even_point_comes_with_its_reason() -> None:
    assert break_even_said({"break_even": {"skip_ratio": None, "reason": "slower"}}) == "none, slower"
    assert break_even_said({"break_even": {"skip_ratio": 0.1, "reason": "why"}}) == "0.100 (why)"


def test_the_tables_of_the_docs_are_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "<!-- speed: cpu_decode_smollm2 -->" in (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    script(monkeypatch, "readme_table.py", "--check")


def test_a_block_of_a_page_is_made_from_its_result(
    result: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "speed.md"
    page.write_text("before\n<!-- speed: x_decode_tiny -->\nold\n<!-- end speed -->\nafter\n")
    args = ("--page", page, "--results", tmp_path)
    with pytest.raises(SystemExit, match=r"speed.md is not up to date"):
        script(monkeypatch, "readme_table.py", "--check", *args)
    script(monkeypatch, "readme_table.py", *args)
    assert "Not measured yet: `python benchmarks/x_decode.py`." in page.read_text()
    (tmp_path / "x_decode_tiny.json").write_text(dump_json(result))
    script(monkeypatch, "readme_table.py", *args)
    text = page.read_text()
    assert to_markdown(result) in text
    assert text.startswith("before\n") and text.endswith("<!-- end speed -->\nafter\n")
    arm = result["cases"][0]["arms"][-1]
    assert f"| 1 | 8 | 0.5 | {arm['step_ms']['median']:.2f} |" in text
    script(monkeypatch, "readme_table.py", "--check", *args)
