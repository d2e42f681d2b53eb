"""Seconds until a call's first tokens are heard: on a fresh machine, in a new process, later in a session.

    python benchmarks/first_token.py --shape llama-2-7b             on a GPU; results/first_token.json
    python benchmarks/first_token.py --device cpu --output runs     the embedded model: a rehearsal

A session has four calls of generate(): of so many rows, of as many, of another number, of the first again. By
the third token a step is made and proven twice; the first should wait for none of it. A process has two
sessions, and after them a call without one. On a GPU processes take turns: the first of a round finds no
compiled kernels, as on a fresh machine, the second finds those of the first. Loading a model is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import save
from transformers.generation.streamers import BaseStreamer

from skipcal.arch.locate import input_device, locate
from skipcal.arch.placement import pick_device
from skipcal.configs.bench import BenchConfig
from skipcal.runtime.engines.choice import fastest
from skipcal.runtime.session import SkipSession, skipping
from skipcal.speed.arms import endless_greedy, random_prompt
from skipcal.speed.bench import load_subject
from skipcal.speed.forced import ForcedCosine
from skipcal.speed.hardware import environment

NEW_TOKENS = 8
CALLS = ("first", "the same rows", "other rows", "the first rows again")
SESSIONS = 2
TIMES = ("first_token_s", "third_token_s", "setup_s")


class Heard(BaseStreamer):
    """The time of each token; the prompt comes first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to come."""


def timed(model: Any, rows: int, tokens: int, session: SkipSession | None) -> dict[str, float]:
    """One call: seconds to its first and third token, and those of them in which steps were prepared."""
    ids = random_prompt(model, batch_size=rows, tokens=tokens, seed=rows)
    if ids.device.type == "cuda":
        torch.cuda.synchronize()
    heard, before = Heard(), 0.0 if session is None else session.setup_s
    start = time.perf_counter()
    model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, streamer=heard
    )
    setup = 0.0 if session is None else session.setup_s - before
    return dict(zip(TIMES, (heard.times[1] - start, heard.times[3] - start, setup), strict=True))


@torch.no_grad()
def process(config: BenchConfig) -> dict[str, Any]:
    """All calls of one process: by session, and the one without."""
    model = load_subject(config).model
    architecture = locate(model)
    rule, device = ForcedCosine(architecture.num_layers), input_device(model).type
    engine = fastest(device) if config.engine == "auto" else config.engine
    (one, other), (tokens,) = config.batch_size, config.context_tokens
    sessions = []
    with endless_greedy(model):
        for _ in range(SESSIONS):
            opened = skipping(model, policy=rule.watching(), engine=engine, architecture=architecture)
            with opened as session:
                sessions.append([timed(model, rows, tokens, session) for rows in (one, one, other, one)])
        plain = timed(model, one, tokens, None)
    report = session.report
    if report.eager_passes:
        raise SystemExit(f"steps ran eagerly: {report.engine_reason}")
    return {
        "sessions": sessions,
        "plain": plain,
        "engine": f"{report.engine}: {report.engine_reason}",
        "environment": environment(input_device(model)),
    }


def processes(arguments: list[str], rounds: int, *, on_gpu: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """What each process measured, and which kernels it found."""
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            for kernels in ("none", "compiled") if on_gpu else ("none needed",):
                done = subprocess.run(
                    [sys.executable, *arguments, "--here"],
                    env={**os.environ, "TRITON_CACHE_DIR": folder},
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                )
                yield kernels, json.loads(done.stdout.splitlines()[-1])


def summed_up(found: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row for each call, by kernels and session: medians, least and most over rounds."""
    kinds = dict.fromkeys(kernels for kernels, _ in found)
    rows = []
    for kernels in kinds:
        measured = [result for kind, result in found if kind == kernels]
        for session in range(SESSIONS):
            for place, call in enumerate(CALLS):
                each = [result["sessions"][session][place] for result in measured]
                rows.append({"kernels": kernels, "session": session + 1, "call": call, **_over(each)})
        rows.append(
            {"kernels": kernels, "session": None, "call": "plain", **_over([r["plain"] for r in measured])}
        )
    return rows


def _over(each: list[dict[str, float]]) -> dict[str, Any]:
    values = {name: [one[name] for one in each] for name in TIMES}
    return {
        name: {"median": statistics.median(v), "min": min(v), "max": max(v)} for name, v in values.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", help="by default the embedded one")
    model.add_argument("--shape", help="random weights of a known shape")
    parser.add_argument("--device")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--batch-size", type=int, nargs=2, default=[4, 1], help="of first and of other rows")
    parser.add_argument("--context-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="folder for the result; default: results/")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    config = BenchConfig(
        model=options.model,
        shape=options.shape,
        device=options.device,
        dtype=options.dtype,
        engine=options.engine,
        batch_size=options.batch_size,
        context_tokens=[options.context_tokens],
    )
    if options.here:
        print(json.dumps(process(config)))
        return
    on_gpu = pick_device(config.device).type == "cuda"
    found = list(processes(sys.argv, options.rounds, on_gpu=on_gpu))
    save(
        "first_token",
        f"python {' '.join(sys.argv)}",
        {
            "model": config.shape or config.model or "the embedded one",
            "dtype": config.dtype,
            "batch_size": config.batch_size,
            "context_tokens": options.context_tokens,
            "rounds": options.rounds,
            "engine": found[-1][1]["engine"],
            "environment": found[-1][1]["environment"],
            "calls": summed_up(found),
        },
        folder=options.output,
    )


if __name__ == "__main__":
    main()
