"""What decoding in bfloat16 gains over float32 on a CPU: batch 1, greedy, both engines.

    python benchmarks/cpu_dtypes.py          results/cpu_dtypes.json

The embedded model with its gate, and a random Llama of a billion parameters with a random one. Arms take
turns; one in bfloat16 is told as its speed over the same in float32 in that round, and one that skips as its
speed over the full model of its own precision and engine as well.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from common import ratios, save
from cpu_decode import RUNS

from skipcal.arch.locate import locate
from skipcal.configs.bench import BenchConfig
from skipcal.speed.arms import FULL, PLAIN, Bench, Run, endless_greedy, random_prompt, skip_arm
from skipcal.speed.bench import forced_by, load_subject
from skipcal.speed.cost import step_bytes
from skipcal.speed.timing import interleave

MODELS = ("smollm2", "llama-1b")
DTYPES, ENGINES = ("float32", "bfloat16"), ("eager", "recorded")
RATIO = 0.25


@dataclass(frozen=True)
class Side:
    """One model in one precision: its arms by name, and what is known of it beforehand."""

    model: Any
    arms: dict[str, Callable[[], Run]]
    known: dict[str, float]


def side_of(name: str, dtype: str, new_tokens: int) -> Side:
    """Load the model."""
    asked: dict[str, Any] = {**RUNS[f"{name}-gate"], "dtype": dtype, "new_tokens": new_tokens}
    config = BenchConfig(device="cpu", **asked)
    subject = load_subject(config)
    architecture = locate(subject.model)
    forced = forced_by(config, subject, architecture)
    skips = round(RATIO * architecture.num_layers)
    (context,) = config.context_tokens
    ids = random_prompt(subject.model, batch_size=1, tokens=context, seed=config.seed)
    found: dict[str, Callable[[], Run]] = {}
    for engine in ENGINES:
        arms = Bench(subject.model, architecture, ids, new_tokens, engine, forced).arms([skips], peers=False)
        found.setdefault(PLAIN, arms[PLAIN])  # no engine's
        found[f"{FULL}, {engine}"] = arms[FULL]
        found[f"gate, {engine}"] = arms[skip_arm(skips)]
    read = step_bytes(subject.model, architecture, batch_size=1, tokens=context + new_tokens / 2)
    known = {"weight_bytes_per_step": read.weights, "skip_ratio": skips / architecture.num_layers}
    return Side(subject.model, found, known)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15, help="counted rounds of every arm")
    parser.add_argument("--new-tokens", type=int, default=12)
    parser.add_argument("--only", choices=sorted(MODELS), action="append", help="one of them; repeatable")
    given = parser.parse_args()
    found: dict[str, Any] = {}
    for name in given.only or MODELS:
        sides = {dtype: side_of(name, dtype, given.new_tokens) for dtype in DTYPES}
        with ExitStack() as greedy:
            for side in sides.values():
                greedy.enter_context(endless_greedy(side.model))
            runs = interleave(
                {f"{dtype}, {arm}": run for dtype, side in sides.items() for arm, run in side.arms.items()},
                given.rounds,
            )
        steps = {key: [statistics.median(run.timing.step_s) for run in each] for key, each in runs.items()}
        found[name] = {
            dtype: {
                **side.known,
                "arms": {
                    arm: {
                        "step_ms": 1e3 * statistics.median(steps[f"{dtype}, {arm}"]),
                        "over_float32": ratios(steps[f"float32, {arm}"], steps[f"{dtype}, {arm}"]),
                        "over_full": ratios(
                            steps[f"{dtype}, {arm.replace('gate', FULL)}"], steps[f"{dtype}, {arm}"]
                        ),
                    }
                    for arm in side.arms
                },
            }
            for dtype, side in sides.items()
        }
    options = "".join(f" --only {name}" for name in given.only or ())
    command = (
        f"python benchmarks/cpu_dtypes.py --rounds {given.rounds} --new-tokens {given.new_tokens}{options}"
    )
    save("cpu_dtypes", command, {"models": found})


if __name__ == "__main__":
    main()
