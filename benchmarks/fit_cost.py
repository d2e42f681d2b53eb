"""What `skipcal fit` takes: memory measured against the number of windows, and arithmetic for larger models.

    python benchmarks/fit_cost.py          results/fit_cost.json, about 4 minutes on two cores

Memory: the peak of a process that measures damage and runs two sweeps over 32 to 512 windows of a small
random model. Arithmetic: multiplications and bytes of each step for a shape, turned into time by the
rates of this machine's matrix products. The same arithmetic for SmolLM2 stands beside what its fit took.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import save

from skipcal.arch.check import tiny_model
from skipcal.arch.locate import input_device, locate
from skipcal.configs.fit import MAPS, SURROGATE_BUDGET, FitConfig
from skipcal.core.surrogates import rank_for
from skipcal.fit.damage import fisher_damage
from skipcal.fit.on_policy import Sweep
from skipcal.profiles.schema import SkipProfile
from skipcal.speed.hardware import peak_memory
from skipcal.speed.shapes import shape_config

WINDOWS = (32, 128, 512)
WINDOW_TOKENS = 128
CALIBRATION = {
    "windows": 56,
    "window_tokens": 512,
    "damage_windows": 16,
    "loop_windows": 20,
    "loop_passes": 24,
}


@torch.no_grad()
def fit_windows(windows: int) -> None:
    """Print the peak memory of a fit to so many windows, as a child process does."""
    model = tiny_model(
        "llama", hidden_size=256, intermediate_size=768, num_hidden_layers=6, head_dim=64, vocab_size=1000
    )
    architecture = locate(model)
    rows = torch.randint(3, 1000, (windows, WINDOW_TOKENS)).tolist()
    ids = (torch.tensor([row]) for row in rows[:8])
    damage = fisher_damage(model, architecture, ids, first=26, seed=0)
    sweep = Sweep(
        architecture, rows, layers=range(1, 5), damage=damage, rank=16, maps=8, first=26, batch_size=4
    )
    fitted = sweep.fit()
    sweep.fit(fitted.gates, fitted.scores.threshold(0.25))
    print(peak_memory(input_device(model))["bytes"])


def measured_memory() -> list[dict[str, int]]:
    rows = []
    for windows in WINDOWS:
        done = subprocess.run(
            [sys.executable, __file__, "--windows", str(windows)], check=True, capture_output=True, text=True
        )
        rows.append({"windows": windows, "tokens": windows * WINDOW_TOKENS, "peak_bytes": int(done.stdout)})
    return rows


def rates() -> dict[str, float]:
    """This machine's multiplications and additions per second, and seconds of an eigendecomposition."""
    a, b = torch.randn(2048, 1024), torch.randn(1024, 1024)
    symmetric = (b + b.T).double()
    return {
        "float32_flop_per_s": 2 * a.numel() * 1024 / best(lambda: a @ b),
        "float64_flop_per_s": 2 * a.numel() * 1024 / best(lambda: a.double() @ b.double()),
        "eigh_1024_s": best(lambda: torch.linalg.eigh(symmetric)),
    }


def best(run: Callable[[], Any], times: int = 5) -> float:
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def computed(shape: str, element_bytes: int) -> dict[str, Any]:
    """Multiplications (two operations each) and bytes of a fit with skipcal's defaults; see CALIBRATION."""
    config = shape_config(shape)
    with torch.device("meta"):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(config)
    layers, hidden = config.num_hidden_layers, config.hidden_size
    head = config.vocab_size * hidden
    in_layers = sum(p.numel() for p in model.get_decoder().layers.parameters())
    ffn = 3 * hidden * config.intermediate_size + hidden
    candidates = layers - 2
    rank = rank_for(SURROGATE_BUDGET, hidden, ffn * element_bytes, element_bytes, maps=MAPS)
    tokens = CALIBRATION["windows"] * CALIBRATION["window_tokens"]
    damage_tokens = CALIBRATION["damage_windows"] * CALIBRATION["window_tokens"]
    loop_tokens = CALIBRATION["loop_windows"] * CALIBRATION["window_tokens"] * CALIBRATION["loop_passes"]
    sweeps = FitConfig().sweeps
    on_policy = (1 + (sweeps - 1) / 2) * tokens  # the last over all windows, those before over half
    swept = on_policy + tokens / 2
    # Of a token in a layer: its damage, its surrogate twice, its region and `down` for the fit of its map.
    per_token = hidden**2 + 2 * (2 * rank + MAPS) * hidden + (rank + MAPS) * hidden
    float32 = 2 * (
        3 * damage_tokens * (in_layers + head)
        + damage_tokens * layers * hidden**2
        + (swept + on_policy) * in_layers  # with skipping on, the full model's stream as well
        + swept * candidates * per_token
        + loop_tokens * in_layers
    )
    # Sums of u uT, u fT, and of the gate's inputs twice: for its fit and for the tokens' sensitivity; of
    # down u with itself and with f for the maps.
    maps = rank**2 + rank * hidden
    float64 = 2 * (swept * candidates * (3 * hidden**2 + maps) + damage_tokens * layers * hidden**2)
    weights = sum(p.numel() for p in model.parameters()) * element_bytes
    fisher = layers * (4 * hidden**2 + 8 * (hidden + 1) ** 2)
    # Two matrices, and as much three times over while they are solved; and those of each map.
    moments = 8 * (4 * 2 * hidden**2 + MAPS * maps)
    logits = 3 * 4 * CALIBRATION["window_tokens"] * config.vocab_size
    return {
        "shape": shape,
        "rank": rank,
        "float32_flop": float32,
        "float64_flop": float64,
        "eigendecompositions": 2 * (sweeps + 1) * candidates,  # of the damage, and of what is predicted
        "bytes": {"weights": weights, "damage": fisher, "moments": moments, "logits": logits},
        "bytes_total": weights + fisher + moments + logits,
        "disk_bytes": 3 * tokens * hidden * element_bytes,  # h and f, and the full model's stream
        "surrogate_bytes": candidates * element_bytes * ((rank + MAPS) * hidden + MAPS * (rank + 1) * hidden),
    }


def seconds_here(cost: dict[str, Any], rate: dict[str, float], hidden: int) -> float:
    eigh: float = rate["eigh_1024_s"] * (hidden / 1024) ** 3 * cost["eigendecompositions"]
    products: float = (
        cost["float32_flop"] / rate["float32_flop_per_s"] + cost["float64_flop"] / rate["float64_flop_per_s"]
    )
    return products + eigh


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--windows", type=int, help="only fit to so many windows, and print the peak memory")
    parser.add_argument(
        "--fitted", default="smollm2-135m-instruct", help="profile whose fit is compared with"
    )
    parser.add_argument("--how", default="", help="what has to be said of that fit: precision, threads")
    options = parser.parse_args()
    if options.windows is not None:
        fit_windows(options.windows)
        return
    rate = rates()
    shapes = []
    for shape, element_bytes in (("smollm2-135m", 4), ("llama-2-7b", 2), ("llama-2-13b", 2)):
        cost = computed(shape, element_bytes)
        cost["seconds_on_this_machine"] = seconds_here(cost, rate, shape_config(shape).hidden_size)
        shapes.append(cost)
    gate = SkipProfile.load(options.fitted).gate
    assert gate is not None
    save(
        "fit_cost",
        f"python benchmarks/fit_cost.py --fitted {Path(options.fitted).name} --how '{options.how}'",
        {
            "memory": measured_memory(),
            "rates": rate,
            "calibration": CALIBRATION,
            "computed": shapes,
            "fit_of_smollm2": {
                "seconds": gate.fit.seconds,
                "peak_memory_bytes": gate.fit.peak_memory_bytes,
                "tokens": gate.fit.tokens,
                "how": options.how,
            },
        },
    )


if __name__ == "__main__":
    main()
