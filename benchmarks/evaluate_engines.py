"""FreebaseQA by SmolLM2, evaluated by the eager engine in transformers and by vLLM: records and times.

    .venv-vllm/bin/python benchmarks/evaluate_engines.py freebaseqa_eval.jsonl     make vllm comes first

The same sweep twice in one process, in float32: 200 questions, the full model and the gate of the shipped
profile, 16 rows at a time. Records are compared by their texts, and by what was skipped. Where a text
differs, the eager engine is asked how far apart the two tokens are at the first place. Times are of whole
sweeps, vLLM's with its start: on a machine that does other things as well they say little.
"""

from __future__ import annotations

import os

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from common import save

from skipcal.arch.loading import LoadedModel, load_model
from skipcal.arch.locate import locate
from skipcal.configs.sweep import SweepConfig
from skipcal.evaluation.arms import Arm
from skipcal.evaluation.sweep import run_sweep
from skipcal.evaluation.tasks.answers import Subject
from skipcal.evaluation.tasks.freebaseqa import load_freebaseqa
from skipcal.profiles.methods import Ask, make_policy, recommended_ratio
from skipcal.profiles.schema import SkipProfile
from skipcal.runtime.greedy import greedy_decoding
from skipcal.runtime.session import skipping

PROFILE = "smollm2-135m-instruct"
METHOD = "gate"
ENGINES = ("eager", "vllm")
BATCH = 16

Records = dict[str, dict[str, Any]]


def config(file: Path, items: int, engine: str) -> SweepConfig:
    return SweepConfig.model_validate(
        {
            "profile": PROFILE,
            "methods": [METHOD],
            "tasks": {"freebaseqa": {"data_file": str(file), "items": items}},
            "batch_size": BATCH,
            "engine": engine,
        }
    )


def records(folder: Path, arm: Arm) -> Records:
    [file] = (folder / "records" / "freebaseqa").glob(f"{arm.label}-*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()[1:]]
    return {row["id"]: row for row in rows}


def skipped(found: Records) -> list[int]:
    """By layer, over all records, each of which stands for its share of its batch."""
    shares = [torch.tensor(row["report"]["skipped_per_layer"]) / row["batch"] for row in found.values()]
    return [round(n) for n in torch.stack(shares).double().sum(dim=0).tolist()]


def gap(loaded: LoadedModel, asked: SweepConfig, arm: Arm, mine: Any, theirs: Any) -> dict[str, Any]:
    """How far apart two tokens are in score, by the eager engine, where two texts part."""
    profile = SkipProfile.load(PROFILE)
    subject = Subject(loaded, locate(loaded.model), True, "eager")
    settings = asked.settled(profile.policy.warm_up_tokens).tasks.freebaseqa
    assert settings is not None
    task = load_freebaseqa(settings, subject, asked.seed)
    ask = Ask(target_skip_ratio=None, new_tokens=task.new_tokens, warm_up_tokens=task.warm_up_tokens)
    at = next(n for n, (a, b) in enumerate(zip(mine["tokens"], theirs["tokens"], strict=False)) if a != b)
    prompt = torch.tensor([task.prompt(task.items[mine["id"]], subject)])
    model: Any = loaded.model
    with (
        skipping(model, policy=make_policy(arm.method, profile, ask), engine="eager"),
        torch.no_grad(),
        greedy_decoding(model),
    ):
        out = model.generate(
            input_ids=prompt, max_new_tokens=at + 1, output_scores=True, return_dict_in_generate=True
        )
    scores = out.scores[at][0]
    apart = scores[mine["tokens"][at]] - scores[theirs["tokens"][at]]
    return {"id": mine["id"], "token": at, "scores_apart": float(apart)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path, help="questions, .jsonl")
    parser.add_argument("--items", type=int, default=200, help="questions that are asked")
    given = parser.parse_args()
    profile = SkipProfile.load(PROFILE)
    loaded = load_model(device="cpu", dtype="float32")
    arms = [Arm("full", None), Arm(METHOD, recommended_ratio(profile))]
    seconds, found = {}, {}
    with tempfile.TemporaryDirectory() as place:
        for engine in ENGINES:
            begin = time.monotonic()
            run_sweep(loaded, profile, config(given.file, given.items, engine), Path(place, engine))
            seconds[engine] = time.monotonic() - begin
            found[engine] = {arm: records(Path(place, engine), arm) for arm in arms}
            print(engine, f"{seconds[engine]:.0f} s", flush=True)
    compared = {}
    for arm in arms:
        mine, theirs = (found[engine][arm] for engine in ENGINES)
        assert list(mine) == list(theirs)
        by_layer = [(a, b) for a, b in zip(skipped(mine), skipped(theirs), strict=True)]
        compared[arm.method] = {
            "records": len(mine),
            "texts_equal": sum(row["tokens"] == theirs[key]["tokens"] for key, row in mine.items()),
            "decode_steps": sum(len(row["tokens"]) - 1 for row in mine.values()),
            "skips": {"eager": sum(a for a, _ in by_layer), "vllm": sum(b for _, b in by_layer)},
            "largest_difference_of_a_layer": max(abs(a - b) for a, b in by_layer),
            "texts_that_part": [
                gap(loaded, config(given.file, given.items, "eager"), arm, row, theirs[key])
                for key, row in mine.items()
                if row["tokens"] != theirs[key]["tokens"]
            ],
        }
        print(arm.method, compared[arm.method], flush=True)
    result = {
        "vllm": metadata.version("vllm-cpu"),
        "profile": PROFILE,
        "task": "freebaseqa",
        "file": given.file.name,
        "batch_size": BATCH,
        "compared": compared,
        "seconds": {engine: round(value, 1) for engine, value in seconds.items()},
    }
    save("evaluate_engines", "python benchmarks/evaluate_engines.py freebaseqa_eval.jsonl", result)


if __name__ == "__main__":
    main()
