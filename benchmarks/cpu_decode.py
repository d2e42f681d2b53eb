"""How much of the skipped bytes becomes time on a CPU: the embedded model, batch 1, greedy.

    python benchmarks/cpu_decode.py          about 3 minutes on two cores

The skip ratio is forced: with a threshold of -1 the first FFN of the region arms every token, and
`max_skips` FFNs after it are skipped. 7 and 8 of 30 layers take turns and average to a ratio of 0.25.
A token reads every weight once (the tied embedding as the LM head), so the ideal speed-up is the
bytes of the full model over the bytes that are left.

Every step of an arm does the same work, so an arm's time is the median over all its steps: these
machines stall now and then, and a mean or a total would measure the stalls.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import interleave, rounds_option, save
from transformers.generation.streamers import BaseStreamer

from skipcal.arch.loading import load_model
from skipcal.arch.locate import locate
from skipcal.runtime.policy import SkipPolicy
from skipcal.runtime.session import skipping

NEW_TOKENS = 25
SKIPS = (2, 7, 8, 15)


class Clock(BaseStreamer):
    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def step_s(model: Any, inputs: Any) -> list[float]:
    """Seconds of each decode step, the prefill left out."""
    clock = Clock()
    model.generate(
        **inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, streamer=clock
    )
    return [after - before for before, after in itertools.pairwise(clock.times[1:])]  # [0] is the prompt


def speed_up(full: list[list[float]], other: list[list[float]]) -> dict[str, float]:
    """Ratio of median steps over all rounds, and its range round by round."""
    each = [statistics.median(f) / statistics.median(o) for f, o in zip(full, other, strict=True)]
    return {"median": median_step(full) / median_step(other), "min": min(each), "max": max(each)}


def median_step(rounds: list[list[float]]) -> float:
    return statistics.median(itertools.chain.from_iterable(rounds))


def main() -> None:
    rounds = rounds_option(15)
    loaded = load_model(device="cpu")
    model: Any = loaded.model
    inputs = loaded.tokenizer("The history of printing begins with", return_tensors="pt")
    architecture = locate(model)
    full_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    block_bytes = architecture.blocks[1].weight_bytes
    reports: dict[int, Any] = {}

    def skipping_arm(skips: int) -> Callable[[], list[float]]:
        policy = SkipPolicy(cold_s=4, cold_e=28, threshold=-1.0, max_skips=skips, warm_up_tokens=0)

        def run() -> list[float]:
            with skipping(model, policy=policy, architecture=architecture) as session:
                seconds = step_s(model, inputs)
            reports[skips] = session.report
            return seconds

        return run

    never = SkipPolicy(cold_s=4, cold_e=28, threshold=2.0, warm_up_tokens=0)

    def watching() -> list[float]:
        with skipping(model, policy=never, architecture=architecture):
            return step_s(model, inputs)

    arms: dict[str, Callable[[], list[float]]] = {
        "full": lambda: step_s(model, inputs),
        "watching": watching,
    }
    arms |= {str(skips): skipping_arm(skips) for skips in SKIPS}
    seconds = interleave(arms, rounds)
    rows = []
    for skips in SKIPS:
        ideal = full_bytes / (full_bytes - skips * block_bytes)
        realised = speed_up(seconds["full"], seconds[str(skips)])
        assert abs(reports[skips].skip_ratio - skips / architecture.num_layers) < 1e-9
        rows.append(
            {
                "skip_ratio": reports[skips].skip_ratio,
                "ideal_speed_up": ideal,
                "speed_up": realised,
                "realised_over_ideal": realised["median"] / ideal,
                "weight_bytes_saved_per_token": reports[skips].weight_bytes_saved / (NEW_TOKENS - 1),
            }
        )
    full_s = median_step(seconds["full"])
    at_a_quarter = 2 * full_s / (median_step(seconds["7"]) + median_step(seconds["8"]))
    ideal = full_bytes / (full_bytes - 7.5 * block_bytes)
    save(
        "cpu_decode",
        f"python benchmarks/cpu_decode.py --rounds {rounds}",
        {
            "model": loaded.name,
            "dtype": "float32",
            "batch": 1,
            "new_tokens": NEW_TOKENS,
            "rounds": rounds,
            "full_tok_per_s": 1 / full_s,
            "weight_bytes_per_token": full_bytes,
            "full_over_watching": speed_up(seconds["full"], seconds["watching"]),
            "by_skip_ratio": rows,
            "at_0.25": {
                "ideal_speed_up": ideal,
                "speed_up": at_a_quarter,
                "realised_over_ideal": at_a_quarter / ideal,
            },
        },
    )


if __name__ == "__main__":
    main()
