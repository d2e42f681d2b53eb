"""What capture costs: time over the same forward pass without hooks, and memory by prompt.

python benchmarks/capture.py          about 3 minutes on two cores
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from typing import Any

import torch
from common import ratios, rounds_option, save

from skipcal.arch.check import tiny_model
from skipcal.arch.loading import load_model
from skipcal.arch.locate import locate
from skipcal.calibrate.capture import capture
from skipcal.speed.timing import interleave

BATCH, LENGTH = 8, 192  # a prompt of 64 tokens and 128 generated ones
MEMORY_PASSES = 2000


def timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def peak_rss_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def memory() -> dict[str, float]:
    """Growth of the peak between the first and the second half of many passes, traces thrown away."""
    model: Any = tiny_model("llama")
    ids = torch.randint(3, 97, (BATCH, LENGTH))
    peaks = []
    with capture(model) as recorder:
        for _ in range(2):
            for _ in range(MEMORY_PASSES // 2):
                model.model(ids, use_cache=False)
                recorder.take()
            peaks.append(peak_rss_mib())
    return {
        "tokens": MEMORY_PASSES * BATCH * LENGTH,
        "peak_rss_mib_first_half": peaks[0],
        "peak_rss_mib_second_half": peaks[1],
    }


@torch.no_grad()
def main() -> None:
    rounds = rounds_option(15)
    used = memory()
    loaded = load_model(device="cpu")
    stack = locate(loaded.model).stack
    ids = torch.randint(3, 40_000, (BATCH, LENGTH))
    architecture = locate(loaded.model)

    def plain() -> float:
        return timed(lambda: stack(input_ids=ids, use_cache=False))

    def captured() -> float:
        with capture(loaded.model, architecture=architecture) as recorder:
            return timed(lambda: (stack(input_ids=ids, use_cache=False), recorder.take()))

    seconds = interleave({"plain": plain, "captured": captured}, rounds)
    save(
        "capture",
        f"python benchmarks/capture.py --rounds {rounds}",
        {
            "model": loaded.name,
            "dtype": "float32",
            "batch": BATCH,
            "length": LENGTH,
            "captured_over_plain": ratios(seconds["captured"], seconds["plain"]),
            "memory": used,
        },
    )


if __name__ == "__main__":
    main()
