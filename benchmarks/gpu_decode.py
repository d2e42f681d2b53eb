"""What skipping gains on a GPU: Llama-2 7B and 13B in bfloat16 with random weights, batch 1 to 8.

    python benchmarks/gpu_decode.py          results/gpu_decode_llama-2-7b.json, gpu_decode_llama-2-13b.json

What is measured, and how, stands in skipcal.speed.bench; `skipcal bench` measures the same for any
model. With --time-limit no round begins that is not expected to end in time.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path

from common import save

from skipcal.configs.bench import BenchConfig
from skipcal.speed.bench import check_shape, load_subject, run_bench


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", action="append", help="repeatable; default: llama-2-7b, llama-2-13b")
    parser.add_argument("--batch-size", type=int, action="append", help="repeatable; default: 1, 2, 4, 8")
    parser.add_argument("--context-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds of every arm")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--peers", action="store_true", help="also the full model, static cache, compiled")
    parser.add_argument("--time-limit", type=float, default=540.0, help="seconds for everything")
    parser.add_argument("--output", type=Path, help="folder for the results; default: results/")
    options = parser.parse_args()
    end = time.monotonic() + options.time_limit
    shapes = options.shape or ["llama-2-7b", "llama-2-13b"]
    for place, shape in enumerate(shapes):
        config = BenchConfig(
            shape=shape,
            dtype=options.dtype,
            device=options.device,
            engine=options.engine,
            batch_size=options.batch_size or [1, 2, 4, 8],
            context_tokens=[options.context_tokens],
            new_tokens=options.new_tokens,
            rounds=options.rounds,
            peers=options.peers,
        )
        check_shape(config)
        subject = load_subject(config)
        share = max(end - time.monotonic(), 0.0) / (len(shapes) - place)
        result = run_bench(config, subject, time_limit_s=share)
        del subject  # before the next is made
        command = f"python benchmarks/gpu_decode.py {shlex.join(sys.argv[1:])}".rstrip()
        save(f"gpu_decode_{shape}", command, result, folder=options.output)


if __name__ == "__main__":
    main()
