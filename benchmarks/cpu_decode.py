"""How much of the skipped bytes becomes time on a CPU: the embedded model, batch 1, greedy.

    python benchmarks/cpu_decode.py          about 4 minutes on two cores

The skip ratio is forced: with a threshold of -1 the first FFN of the region arms every token, and
`max_skips` FFNs after it are skipped. 7 and 8 of 30 layers take turns and average to a ratio of 0.25.
A token reads every weight once (the tied embedding as the LM head), so the ideal speed-up is the
bytes of the full model over the bytes that are left.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import interleave, ratios, rounds_option, save
from transformers.generation.streamers import BaseStreamer

from skipcal.arch.loading import load_model
from skipcal.arch.locate import locate
from skipcal.runtime.policy import SkipPolicy
from skipcal.runtime.session import skipping

NEW_TOKENS = 64
SKIPS = (2, 7, 8, 15)


class Clock(BaseStreamer):
    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def decode_s(model: Any, inputs: Any) -> float:
    """Seconds of NEW_TOKENS - 1 decode steps, the prefill left out."""
    clock = Clock()
    model.generate(
        **inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, streamer=clock
    )
    return clock.times[-1] - clock.times[1]  # [0] is the prompt, [1] the prefill's token


def main() -> None:
    rounds = rounds_option(15)
    loaded = load_model(device="cpu")
    model: Any = loaded.model
    inputs = loaded.tokenizer("The history of printing begins with", return_tensors="pt")
    architecture = locate(model)
    full_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    block_bytes = architecture.blocks[1].weight_bytes
    reports: dict[int, Any] = {}

    def skipping_arm(skips: int) -> Callable[[], float]:
        policy = SkipPolicy(cold_s=4, cold_e=28, threshold=-1.0, max_skips=skips, warm_up_tokens=0)

        def run() -> float:
            with skipping(model, policy=policy, architecture=architecture) as session:
                seconds = decode_s(model, inputs)
            reports[skips] = session.report
            return seconds

        return run

    never = SkipPolicy(cold_s=4, cold_e=28, threshold=2.0, warm_up_tokens=0)

    def watching() -> float:
        with skipping(model, policy=never, architecture=architecture):
            return decode_s(model, inputs)

    arms: dict[str, Callable[[], float]] = {"full": lambda: decode_s(model, inputs), "watching": watching}
    arms |= {str(skips): skipping_arm(skips) for skips in SKIPS}
    seconds = interleave(arms, rounds)
    rows = []
    for skips in SKIPS:
        ideal = full_bytes / (full_bytes - skips * block_bytes)
        speed_up = ratios(seconds["full"], seconds[str(skips)])
        assert abs(reports[skips].skip_ratio - skips / architecture.num_layers) < 1e-9
        rows.append(
            {
                "skip_ratio": reports[skips].skip_ratio,
                "ideal_speed_up": ideal,
                "speed_up": speed_up,
                "realised_over_ideal": speed_up["median"] / ideal,
                "weight_bytes_saved_per_token": reports[skips].weight_bytes_saved / (NEW_TOKENS - 1),
            }
        )
    at_a_quarter = [
        2 * f / (a + b) for f, a, b in zip(seconds["full"], seconds["7"], seconds["8"], strict=True)
    ]
    ideal = full_bytes / (full_bytes - 7.5 * block_bytes)
    save(
        "cpu_decode",
        f"python benchmarks/cpu_decode.py --rounds {rounds}",
        {
            "model": loaded.name,
            "dtype": "float32",
            "batch": 1,
            "new_tokens": NEW_TOKENS,
            "full_tok_per_s": (NEW_TOKENS - 1) / statistics.median(seconds["full"]),
            "weight_bytes_per_token": full_bytes,
            "watching_over_full": ratios(seconds["watching"], seconds["full"]),
            "by_skip_ratio": rows,
            "at_0.25": {
                "ideal_speed_up": ideal,
                "speed_up": statistics.median(at_a_quarter),
                "realised_over_ideal": statistics.median(at_a_quarter) / ideal,
            },
        },
    )


if __name__ == "__main__":
    main()
