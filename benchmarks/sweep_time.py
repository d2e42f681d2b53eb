"""What a sweep of perplexity takes, with the full model's passes kept for all arms and computed for each.

    python benchmarks/sweep_time.py          results/sweep_time.json, about 2 minutes on two cores

The full model and four methods over a batch of windows of the embedded text, by the embedded model. Both ways
take turns, after a round that is not counted; their records have to be the same to the last digit.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd
from common import ratios, save

from skipcal.arch.loading import LoadedModel, load_model
from skipcal.configs.sweep import SweepConfig
from skipcal.evaluation import full_passes
from skipcal.evaluation.sweep import run_sweep
from skipcal.profiles.schema import SkipProfile
from skipcal.speed.timing import interleave

PROFILE = "smollm2-135m-instruct"
METHODS = ["ffn-skip", "gate", "random", "static"]
BOUNDS = {"kept": full_passes.KEPT_BYTES, "computed for each arm": 0}


def timed(loaded: LoadedModel, config: SweepConfig, most_bytes: int) -> tuple[float, dict[str, str]]:
    """Seconds of one sweep from nothing, and its records by file, its table among them."""
    profile = SkipProfile.load(PROFILE)
    with tempfile.TemporaryDirectory() as place, mock.patch.object(full_passes, "KEPT_BYTES", most_bytes):
        begin = time.perf_counter()
        frame: pd.DataFrame = run_sweep(loaded, profile, config, Path(place)).frame
        seconds = time.perf_counter() - begin
        written = {path.name: path.read_text() for path in Path(place).rglob("*.jsonl")}
    return seconds, {**written, "table": frame.to_csv()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds of both ways")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--window-tokens", type=int, default=512)
    options = parser.parse_args()
    perplexity = {"windows": options.windows, "window_tokens": options.window_tokens}
    config = SweepConfig.model_validate(
        {"profile": PROFILE, "methods": METHODS, "ratios": [0.25], "tasks": {"perplexity": perplexity}}
    )
    loaded = load_model(device="cpu")
    model: Any = loaded.model
    rounds = interleave(
        {way: partial(timed, loaded, config, most) for way, most in BOUNDS.items()}, options.rounds
    )
    if any(kept[1] != anew[1] for kept, anew in zip(*rounds.values(), strict=True)):
        raise SystemExit("the two ways disagree: nothing was written")
    seconds = {way: [taken for taken, _ in found] for way, found in rounds.items()}
    save(
        "sweep_time",
        f"python benchmarks/sweep_time.py --rounds {options.rounds} --windows {options.windows} "
        f"--window-tokens {options.window_tokens}",
        {
            "model": {"name": loaded.name, "dtype": str(model.dtype).removeprefix("torch.")},
            "profile": PROFILE,
            "config": config.recorded(),
            "kept_bytes_at_most": full_passes.KEPT_BYTES,
            "records_are_equal": True,
            "seconds": seconds,
            "kept_over_computed": ratios(*seconds.values()),
        },
    )


if __name__ == "__main__":
    main()
