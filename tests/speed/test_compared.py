"""By which engine an arm really ran, in every round, and what follows for its row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from skipcal.configs.bench import BenchConfig
from skipcal.core.report import SkipReport
from skipcal.plots.speed import plot_speed_up
from skipcal.runtime.engines.recorded import RecordedEngine
from skipcal.speed.arms import Run
from skipcal.speed.bench import load_subject, run_bench
from skipcal.speed.compared import Compared, break_even_of, wanted_engine
from skipcal.speed.cost import StepBytes
from skipcal.speed.table import to_frame, to_markdown, to_text
from skipcal.speed.timing import Spread, Timing

WHOLE = SkipReport(
    decode_steps=4, decode_steps_after_warm_up=4, skipped_per_layer=(0, 2, 2, 0), weight_bytes_saved=40,
    engine="recorded", engine_reason="asked for", method="ffn-skip", unit="ffn", byte_shares=(0.1,) * 4,
    prepared_passes=4,
)  # fmt: skip
PARTLY = replace(WHOLE, prepared_passes=3, eager_passes=1, engine_reason="one step differs")
GAVE_UP = replace(PARTLY, engine="eager", engine_reason="given up")
EAGER = replace(WHOLE, engine="eager", prepared_passes=0, eager_passes=4, engine_reason="no other")


def row(rounds: list[SkipReport], wanted: str = "recorded") -> dict[str, Any]:
    runs = [Run(Timing(0.5, (1.0,) * 4), report, setup_s=place) for place, report in enumerate(rounds)]
    arms = {"plain": runs, "full": runs, "skip-1": runs}
    compared = Compared(arms, StepBytes(100, 0), Spread(1e-6, 1e-6, 1e-6, 1), 1, wanted)
    return compared.row("skipping", (("skip-1", 1.0),))


@pytest.mark.parametrize(
    ("rounds", "wanted", "engine", "comparable"),
    [
        ([WHOLE, WHOLE], "recorded", "recorded", True),
        ([WHOLE, PARTLY], "recorded", "recorded and eager", False),
        ([WHOLE, GAVE_UP], "recorded", "recorded and eager", False),
        ([WHOLE, EAGER], "recorded", "recorded and eager", False),
        ([EAGER, EAGER], "recorded", "eager", False),
        ([EAGER, EAGER], "eager", "eager", True),
    ],
)
def test_every_pass_of_every_round_has_to_be_the_wanted_engines(
    rounds: list[SkipReport], wanted: str, engine: str, comparable: bool
) -> None:
    found = row(rounds, wanted)
    assert (found["engine"], found["comparable"]) == (engine, comparable)


def test_passes_set_up_and_reasons_are_those_of_all_rounds() -> None:
    found = row([WHOLE, WHOLE, PARTLY])
    assert (found["prepared_passes"], found["eager_passes"]) == (11, 1)
    assert found["setup_s"] == 1  # of 0, 1 and 2
    assert found["engine_reason"] == "asked for; or: one step differs"


def test_skips_and_bytes_are_those_of_all_rounds() -> None:
    less = replace(WHOLE, skipped_per_layer=(0, 0, 2, 0), weight_bytes_saved=20)
    found = row([WHOLE, WHOLE, less, less])
    assert found["skip_ratio"] == pytest.approx((0.25 + 0.125) / 2)
    assert found["bytes_per_step"] == pytest.approx(100 - (10 + 5) / 2)


def test_auto_is_content_with_the_eager_engine_where_no_arm_has_another() -> None:
    def runs(*reports: SkipReport) -> dict[str, list[Run]]:
        return {"full": [Run(Timing(0.5, (1.0,)), report) for report in reports], "plain": []}

    assert wanted_engine("auto", "cpu", runs(EAGER, EAGER)) == "eager"
    assert wanted_engine("auto", "cpu", runs(EAGER, PARTLY)) == "recorded"
    assert wanted_engine("graph", "cpu", runs(EAGER, EAGER)) == "graph"


def arm(name: str, ratio: float, speed_up: float, comparable: bool = True) -> dict[str, Any]:
    gain = {"median": speed_up}
    return {"arm": name, "skip_ratio": ratio, "speed_up_over_full": gain, "comparable": comparable,
            "engine": "graph and eager"}  # fmt: skip


def test_a_row_that_cannot_be_compared_is_left_out_of_the_break_even() -> None:
    rows = [arm("full", 0.0, 1.0), arm("watching", 0.0, 0.9), arm("skipping", 0.5, 1.1)]
    slow = arm("skipping", 0.25, 0.5)
    assert break_even_of([*rows, slow])[0] == pytest.approx(0.25 + 0.25 * 0.5 / 0.6)
    assert break_even_of([*rows, {**slow, "comparable": False}])[0] == pytest.approx(0.25)
    for place, name in enumerate(("full", "watching")):
        marked = [{**r, "comparable": i != place} for i, r in enumerate(rows)]
        assert break_even_of(marked) == (None, f"{name} ran by graph and eager")
    ratio, reason = break_even_of([*rows[:2], {**rows[2], "comparable": False}])
    assert ratio is None and reason.startswith("no skipping arm ran by")


def test_an_engine_that_gives_up_in_the_last_round_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three rounds, the first uncounted, in the last one the arm that skips a half stops halfway."""
    sessions: list[RecordedEngine] = []
    prepare = RecordedEngine.prepare

    def giving_up(self: RecordedEngine, given: dict[str, Any]) -> bool:
        if self not in sessions:
            sessions.append(self)
        if len(sessions) == 9 and self.prepared_passes == 3:
            self._give_up("planted")
            return False
        return prepare(self, given)

    monkeypatch.setattr(RecordedEngine, "prepare", giving_up)
    config = BenchConfig(
        shape="tiny", device="cpu", engine="recorded", ratios=[0.25, 0.5], new_tokens=5, rounds=2,
        context_tokens=[4],
    )  # fmt: skip
    result = run_bench(config, load_subject(config))
    (case,) = result["cases"]
    found = {(a["arm"], a["skip_ratio"]): a for a in case["arms"]}
    assert [key for key, a in found.items() if not a["comparable"]] == [("skipping", 0.5)]
    wrong, right = found["skipping", 0.5], found["skipping", 0.25]
    assert (right["prepared_passes"], right["eager_passes"]) == (8, 0)
    # One step was run by the session before the clock, and two within.
    assert (wrong["prepared_passes"], wrong["eager_passes"]) == (4 + 1, 3)
    assert wrong["engine"] == "recorded and eager" and "planted" in wrong["engine_reason"]
    assert wrong["setup_s"] > 0
    note = "* skipping 0.5 cannot be compared: of its passes 5 were prepared and 3 eager (asked for"
    assert note in to_text(result) and f"\\{note}" in to_markdown(result)
    assert "skipping 0.5 *" in to_text(result) and "| 0.5 * |" in to_markdown(result)
    line = plot_speed_up(to_frame(result)).lines[0]
    assert np.asarray(line.get_xdata()).tolist() == [0.0, 0.25]


@pytest.mark.usefixtures("references")
def test_the_graphs_full_model_is_the_same_step_as_watching() -> None:
    """Else what skipping gains over it would hold what the kernels gain."""
    config = BenchConfig(
        shape="tiny", device="cpu", engine="graph", ratios=[0.25], new_tokens=3, rounds=1, context_tokens=[4]
    )
    (case,) = run_bench(config, load_subject(config))["cases"]
    full, watching = (next(a for a in case["arms"] if a["arm"] == name) for name in ("full", "watching"))
    assert full["engine_reason"] == watching["engine_reason"]
    assert "8 layers fused" in full["engine_reason"]
    assert full["comparable"] and watching["comparable"]
