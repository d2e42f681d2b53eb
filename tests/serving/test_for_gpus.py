"""What is written for GPUs, on structures of vLLM: its runner V2 and its CUDA graphs need one to run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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


def test_models_are_cut_at_their_ffns_beside_where_vllm_cuts_them(vllm: None, tmp_path: Path) -> None:
    modes = ["NONE", "PIECEWISE", "FULL", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE"]
    answers = in_vllm({"cut": modes}, tmp_path)
    for mode, (own, cut, graphs, refused) in zip(modes, answers, strict=True):
        assert "vllm::unified_attention_with_output" in own
        assert cut == [*own, "skipcal::ffn"]
        assert graphs == (mode if mode == "NONE" else "PIECEWISE")
        assert refused == []
