"""What is written for GPUs, on structures of vLLM: its runner V2 and its CUDA graphs need one to run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vllm_process import in_vllm

FIRST_PASS = {"a": [5, 0, 3, 3], "b": [2, 4, 8, 2]}  # a whole prompt beside a chunk of one
LATER = {"b": [2, 8, 8, 1], "a": [5, 5, 3, 1]}
AGAIN = {"a": [1, 0, 3, 7]}  # preempted: in another slot, and all of it at once


def test_the_second_runner_tells_steps_wishes_and_what_is_counted(vllm: None, tmp_path: Path) -> None:
    events: list[dict[str, Any]] = [
        {"pass": {}},
        {"add": {"a": None, "b": {"skipcal": 0}, "_warmup_0_": None}},
        {"pass": {"_warmup_0_": [0, 9, 2, 1]}},
        {"pass": FIRST_PASS},
        {"pass": LATER},
        {"add": {"a": None}},
        {"pass": AGAIN},
        {"pass": {}},
        {"finish": ["a"]},
        {"pass": {"a": [1, 7, 3, 1]}},
    ]
    *passes, restored = in_vllm({"second_runner": events}, tmp_path)
    assert passes == [
        None,
        None,
        [[-3, -2, -1, -4, -3], [True] * 3 + [False] * 2, [False] * 5, "ids"],
        [[0, 2], [False, True], [True, True], "ids"],
        [[-3, -2, -1, 0, 1, 2, 3], [True] * 7, [False] * 6 + [True], "ids"],
        None,
        None,
    ]
    assert restored


NAMES = ["engine", "worker that cannot", "two processes", "adapters"]
GRAPHS = {
    "NONE": ["NONE", "NONE", "NONE", "NONE"],
    "PIECEWISE": ["PIECEWISE"] * 4,
    "FULL": ["FULL_AND_PIECEWISE", "PIECEWISE", "PIECEWISE", "PIECEWISE"],
    "FULL_DECODE_ONLY": ["FULL_DECODE_ONLY", "PIECEWISE", "PIECEWISE", "PIECEWISE"],
    "FULL_AND_PIECEWISE": ["FULL_AND_PIECEWISE", "PIECEWISE", "PIECEWISE", "PIECEWISE"],
}


def test_models_are_cut_at_their_ffns_and_whole_graphs_stay_where_they_can_decide(
    vllm: None, tmp_path: Path
) -> None:
    answers = in_vllm({"cut": list(GRAPHS)}, tmp_path)
    for (mode, graphs), (own, cut, refused, found, said) in zip(GRAPHS.items(), answers, strict=True):
        assert "vllm::unified_attention_with_output" in own
        assert cut == [*own, "skipcal::ffn"]
        assert refused == []
        assert found == graphs
        told = dict(zip(NAMES, said, strict=True))
        if mode in ("NONE", "PIECEWISE"):
            assert said == [None] * 4
            continue
        assert (told["engine"] is None) == (mode != "FULL")
        assert told["worker that cannot"].endswith("not within (graphs over [1, 2])")
        assert told["two processes"].startswith(f"CUDA graphs are PIECEWISE instead of {mode}:")
        assert told["adapters"].endswith("not within (adapters are not in skipcal's ops)")


DECODED = [4, 6]  # steps of two requests, of which one has a target


@pytest.mark.parametrize("runner", ["first", "second"])
def test_whole_graphs_are_replayed_only_where_they_decide(runner: str, vllm: None, tmp_path: Path) -> None:
    can, cannot, nobodys = in_vllm({"whole": runner}, tmp_path)
    asked = ["asked", [None, 0.25], 4]  # graphs are made for 1 and 4
    assert can == ["FULL", asked, ["replay", DECODED, 4]]
    assert cannot == ["PIECEWISE", asked, ["run", DECODED]]
    assert nobodys == ["FULL", *([["replay", None, 4]] if runner == "second" else [])]
