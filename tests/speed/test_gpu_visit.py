"""The visit to a GPU, rehearsed on a CPU; and what becomes of steps that fail, die or hang."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from warm_python import environment

from skipcal.ops import settings
from skipcal.speed.files import load_result

ROOT = Path(__file__).resolve().parents[2]
VISIT = ROOT / "benchmarks" / "gpu_visit"
STEPS = """
import os, subprocess, sys, time

def works(visit, *, answer):
    yield {"answer": answer, "said": "half"}
    yield {"device": visit.device, "said": "all of it"}

def fails(visit):
    yield {"found": 1}
    raise ValueError("planted\\nand more")

def dies(visit):
    print("last words", flush=True)
    os._exit(3)

def hangs(visit):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield {"child": child.pid, "said": "begun"}
    time.sleep(600)
"""


def is_running(pid: int) -> bool:
    """A child that was killed and that nobody has waited for yet runs no more."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_what_fails_dies_or_hangs_stops_nothing_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "planted.py").write_text(STEPS)
    monkeypatch.syspath_prepend(str(VISIT.parent))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    step, plan = import_module("gpu_visit.steps").Step, import_module("gpu_visit.plan")
    planned = [
        step("fails", 60, "planted:fails"), step("dies", 60, "planted:dies"),
        step("hangs", 3, "planted:hangs"), step("elsewhere", 60, "planted:works", left_out="there is none"),
        step("works", 60, "planted:works", {"answer": 42}),
    ]  # fmt: skip
    monkeypatch.setitem(plan.PLANS, "check", lambda visit: planned)
    monkeypatch.setattr(
        sys, "argv", ["gpu_visit", "check", "--device", "cpu", "--output", str(tmp_path / "out")]
    )
    begin = time.monotonic()
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(VISIT), run_name="__main__")
    assert int(left.value.code or 0) == 1
    assert time.monotonic() - begin < 60, "the step that hangs was not stopped"
    found = json.loads((tmp_path / "out" / "gpu_check.json").read_text())["steps"]
    assert {name: step["state"] for name, step in found.items()} == {
        "fails": "failed", "dies": "failed", "hangs": "timed out", "elsewhere": "left out", "works": "passed",
    }  # fmt: skip
    assert found["fails"]["said"] == "ValueError: planted" and found["fails"]["values"]["found"] == 1
    assert found["dies"]["said"] == "exit code 3; last words"
    assert found["works"]["said"] == "all of it"
    assert found["works"]["values"] == {"answer": 42, "device": "cpu"}
    assert found["hangs"]["said"] == "over 3 s; begun"
    assert not is_running(found["hangs"]["values"]["child"])
    printed = capsys.readouterr().out.partition("\n\n")[2].splitlines()
    assert [line.split()[0] for line in printed[:-1]] == ["fails", "dies", "hangs", "elsewhere", "works"]
    assert printed[-1].startswith("5 steps, 3 failed, ")
    log = (tmp_path / "out" / "gpu_check.log").read_text()
    assert "===== dies =====\nlast words" in log and "ValueError: planted" in log


@pytest.fixture(scope="module")
def visited(tmp_path_factory: pytest.TempPathFactory, warm: str) -> Path:
    """Both calls side by side, on tiny shapes: some steps of each."""
    folder = tmp_path_factory.mktemp("visit")
    steps = {
        "check": ["if_node", "captured", "bench", "trace", "ffn"],
        "measure": ["decode", "settings", "model_folder", "profile", "generate"],
    }
    calls = []
    for what, names in steps.items():
        only = [option for name in names for option in ("--only", name)]
        command = [warm, str(VISIT), what, "--device", "cpu", "--output", str(folder), *only]
        command += ["--time-limit", "900"]
        calls.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()))
    said = "".join(call.communicate()[0] for call in calls)
    assert [call.returncode for call in calls] == [0, 0], said
    return folder


def values(folder: Path, what: str) -> dict[str, Any]:
    steps = json.loads((folder / f"gpu_{what}.json").read_text())["steps"]
    return {name: step["values"] for name, step in steps.items()}


def test_a_check_tells_what_the_engine_and_the_kernels_do(visited: Path) -> None:
    found = values(visited, "check")
    assert found["if_node"]["additions"] == 2 and not found["if_node"]["captured"]
    bench = found["bench"]
    arms = {arm["arm"]: arm for arm in bench["result"]["cases"][0]["arms"]}
    assert [arm["skip_ratio"] for arm in arms.values()] == [0.0, 0.0, 0.0, 0.25]
    for name in ("full", "watching", "skipping"):
        assert (arms[name]["engine"], arms[name]["prepared_passes"], arms[name]["eager_passes"]) == (
            "graph",
            4,
            0,
        )
        assert arms[name]["setup_s"] > 0 and arms[name]["comparable"]
    # Two proofs of each of three arms in two rounds, of layers and of logits.
    assert [proof["of"].startswith("layer") for proof in bench["proofs"][:2]] == [True, False]
    assert len(bench["proofs"]) >= 2 * 2 * 3 * 2
    assert all(0 <= proof["error"] <= proof["limit"] for proof in bench["proofs"])
    traced = found["trace"]["a_token"]
    assert set(traced) == {"full", "watching", "skip-2"}
    assert traced["watching"]["launches"] > traced["full"]["launches"] > 100, "the rule asks something"
    assert all(0 < t["busy_us"] <= t["span_us"] for t in traced.values())
    assert 0 < found["ffn"]["ffn"]["error"] < 1e-5  # float32, interpreted
    assert [row["settings"] for row in found["ffn"]["tried"]["down"]] == [[4, 1024, 4, 2]]


def test_a_measurement_leaves_results_for_the_tables(visited: Path) -> None:
    result = load_result(visited / "gpu_decode_tiny.json")
    assert result["command"] == "python benchmarks/gpu_visit measure"
    assert result["settings"]["ratios"] == [0.25] and result["cases"][0]["rounds"] == 1
    found = values(visited, "measure")
    generated = found["generate"]["generated"]
    assert generated["new_tokens"] == 9 and generated["report"]["prepared_passes"] == 8
    assert generated["setup_s"] >= generated["report"]["setup_s"] > 0
    ratio = {point["target_skip_ratio"]: point for point in found["profile"]["operating_points"]}
    assert ratio[0.25]["verified_skip_ratio"] == pytest.approx(0.25, abs=0.1)
    assert len(list(visited.iterdir())) == 6  # a document and a log of each call, the result, settings


def test_defaults_are_timed_beside_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(VISIT.parent))
    for part, by_rows in import_module("candidates").CANDIDATES.items():
        kernel = part if part in settings.DEFAULTS else "project"
        for rows, tried in by_rows.items():
            assert settings.DEFAULTS[kernel][rows] in tried and len({*tried}) == len(tried) > 1


def test_settings_that_a_measurement_leaves_are_those_that_launches_get(
    visited: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = settings.read_table(visited / "settings.json")
    assert table.made_by["cpu"]["command"] == "python benchmarks/gpu_visit measure"
    launches = {(row.kernel, row.rows, row.outputs, row.inputs) for row in table.launches}
    wide = {("gate_up", rows, 24, 16) for rows in (1, 16)} | {("down", rows, 16, 24) for rows in (1, 16)}
    assert launches == wide | {("project", rows, n, 16) for rows in (1, 16) for n in (16, 48)}
    monkeypatch.setattr(settings, "TABLE", visited / "settings.json")
    tried = {}
    for each in values(visited, "measure")["settings"]["tried"]:
        us, _ = each.pop("us"), each.pop("part")
        tried[settings.Launch(**each)] = us
    for row in table.launches:
        x = torch.zeros(row.rows, row.inputs)
        assert settings.settings_for(row.kernel, x, row.outputs)[:3] == row.settings[:3]
        default, other = tried[row.launch]
        assert row.default_us == default[-1] and row.us in (default[-1], other[-1])
        assert (row.us == other[-1]) == (other[-1] <= 0.99 * default[-1])
        assert list(row.settings) == (other if row.us == other[-1] else default)[:-1]
