"""How much of the skipped bytes becomes time on a CPU: batch 1, greedy, float32.

    python benchmarks/cpu_decode.py          results/cpu_decode_{smollm2,llama-1b}{,-gate}.json

The embedded model under the paper's rule and under its gate, and a random Llama of a billion parameters,
eight times the size, under the same and a random gate. float32, because matrix times vector in bfloat16
does not reach the bandwidth of memory on these CPUs (cpu_dtypes.py). What is measured, and how, stands in
skipcal.speed.bench; `skipcal bench` measures the same for any model.

Many rounds of few tokens: the bandwidth that other guests of the machine leave changes from one second to
the next by several per cent, so that the arms of a round have to follow each other quickly.
"""

from __future__ import annotations

import argparse
from typing import Any

from common import save

from skipcal.configs.bench import BenchConfig
from skipcal.speed.bench import check_shape, load_subject, run_bench

RUNS: dict[str, dict[str, Any]] = {
    "smollm2": {"context_tokens": [16]},
    "smollm2-gate": {"profile": "smollm2-135m-instruct", "context_tokens": [16]},
    "llama-1b": {"shape": "llama-1b", "context_tokens": [16]},
    "llama-1b-gate": {"shape": "llama-1b", "rule": "gate", "context_tokens": [16]},
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=40, help="counted rounds of every arm")
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--only", choices=sorted(RUNS), help="one of them")
    options = parser.parse_args()
    for name in [options.only] if options.only else RUNS:
        config = BenchConfig(
            **RUNS[name], device="cpu", dtype="float32", rounds=options.rounds, new_tokens=options.new_tokens
        )
        check_shape(config)
        how = f"--only {name} --rounds {options.rounds} --new-tokens {options.new_tokens}"
        command = f"python benchmarks/cpu_decode.py {how}"
        save(f"cpu_decode_{name}", command, run_bench(config, load_subject(config)))


if __name__ == "__main__":
    main()
