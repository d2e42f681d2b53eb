"""Memory of a long calibration: resident set over a million generated tokens of a tiny random model.

The weights are tiny so that what grows with tokens would show; finished batches go to files, as they do
in `skipcal profile`.

python benchmarks/long_run.py          about 6 minutes on one core that is free
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from common import save

from skipcal.arch.check import tiny_model
from skipcal.arch.loading import LoadedModel
from skipcal.calibrate.passes import Passes
from skipcal.calibrate.pipeline import calibrate_model
from skipcal.calibrate.saturation import write_trace
from skipcal.configs.run import ProfileConfig

TOKENS = 1_000_000
PROMPT_TOKENS, NEW_TOKENS, BATCH = 16, 128, 64
INTERVAL_S = 0.05
LAYERS = 8


class Words:
    """w17 is token 17."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word[1:]) for word in text.split()]}


@dataclass
class Memory:
    """Resident set of this process in MiB, sampled all the time, by phase."""

    phase: str = "start"
    samples: list[tuple[str, float]] = field(default_factory=list)

    def watch(self) -> None:
        page = os.sysconf("SC_PAGE_SIZE") / 2**20
        while self.phase != "end":
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.samples.append((self.phase, pages * page))
            time.sleep(INTERVAL_S)

    def peak(self, phase: str) -> float:
        return max(mib for name, mib in self.samples if name == phase)

    def timeline(self, points: int = 60) -> list[dict[str, Any]]:
        """Evenly spaced samples."""
        step = max(1, len(self.samples) // points)
        return [{"phase": phase, "rss_mib": round(mib, 1)} for phase, mib in self.samples[::step]]


class Watched(Passes):
    """Tells in which half of the prompts the run is."""

    memory: Memory
    prompts: int

    def captured(self, prompts: list[list[int]], first: int) -> Any:
        self.memory.phase = "capture, first half" if 2 * first < self.prompts else "capture, second half"
        part = super().captured(prompts, first)
        if first + len(prompts) >= self.prompts:
            self.memory.phase = "statistics and closed loop"
        return part


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=TOKENS, help="generated tokens to capture")
    tokens = parser.parse_args().tokens
    prompts = -(-tokens // NEW_TOKENS)
    memory = Memory()
    Watched.memory, Watched.prompts = memory, prompts
    with (
        tempfile.TemporaryDirectory() as place,
        patch("skipcal.calibrate.pipeline.Passes", Watched),
    ):
        result, trace_bytes = calibrated(Path(place), prompts, memory)
    first, second = (memory.peak(f"capture, {half} half") for half in ("first", "second"))
    after = memory.peak("statistics and closed loop")
    save(
        "long_run",
        f"python benchmarks/long_run.py --tokens {tokens}",
        {
            "model": f"llama, random weights, hidden 32, {LAYERS} layers",
            "tokens": result.profile.calibration.corpora[0].tokens,
            "layers": LAYERS,
            "batch": BATCH,
            "trace_parquet_bytes": trace_bytes,
            "peak_rss_mib": {
                "capture_first_half": first,
                "capture_second_half": second,
                "statistics_and_closed_loop": after,
                "trace_to_parquet": memory.peak("trace"),
            },
            "second_half_over_first": second / first,
            "whole_over_first_half": max(second, after, memory.peak("trace")) / first,
            "timeline": memory.timeline(),
        },
    )


def calibrated(place: Path, prompts: int, memory: Memory) -> tuple[Any, int]:
    """The calibration, and the size of its trace file."""
    torch.manual_seed(0)
    model = tiny_model("llama", num_hidden_layers=LAYERS)
    model.generation_config.eos_token_id = None
    tokenizer: Any = Words()
    ids = torch.randint(3, 97, (prompts * PROMPT_TOKENS,), generator=torch.Generator().manual_seed(0))
    text = place / "words.txt"
    text.write_text(" ".join(f"w{n}" for n in ids.tolist()))
    config = ProfileConfig(
        data_files=[str(text)], prompts=prompts, prompt_tokens=PROMPT_TOKENS, new_tokens=NEW_TOKENS,
        batch_size=BATCH, cold_s=1, cold_e=LAYERS - 1, device="cpu",
    )  # fmt: skip
    watcher = threading.Thread(target=memory.watch, daemon=True)
    watcher.start()
    loaded = LoadedModel(model=model, tokenizer=tokenizer, name="tiny", revision=None)
    result = calibrate_model(loaded, config, keep_in=place / "unfinished")
    memory.phase = "trace"
    write_trace(result.traces, place / "trace.parquet", overwrite=False)
    memory.phase = "end"
    watcher.join()
    return result, (place / "trace.parquet").stat().st_size


if __name__ == "__main__":
    main()
