"""How well the proof of a captured step tells faults from rounding: tests/prove_steps.py [--output FILE]

Random Llamas of 16 to 48 layers whose blocks add little or much, of one row and of several with padding, in
float32, bfloat16 and float16 in turn, uncaptured on a CPU. Each is proven twice as it is, and every fifth of
a kind again with a fault of tests/faults.py. A deviation over its limit is an alarm. tests/step_proof.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import conftest  # noqa: F401  (finds the package)
import pytest
import torch
from engines import ROWS, generated
from faults import IN_A_GRAPH

from skipcal.arch.check import tiny_model
from skipcal.arch.locate import locate
from skipcal.core.policy import SkipPolicy
from skipcal.files.writing import dump_json
from skipcal.runtime.engines import graph_step, step_engine
from skipcal.runtime.engines.step_proof import Deviation
from skipcal.speed.hardware import environment

_FAULTY = 5
_DEVIATIONS = 2  # of a proof: of the layers, of the result
_LISTENING = 12.0  # of weights by which tokens depend on each other: else a wrong query is no fault
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random_llama(draw: random.Random, dtype: torch.dtype, *, scale: float) -> Any:
    """Its weights are `scale` times as large as they are initialised: its blocks add little, or much."""
    torch.manual_seed(draw.randrange(2**31))
    model: Any = tiny_model("llama", num_hidden_layers=draw.randint(16, 48))
    for block in locate(model).blocks:
        for parameter in block.layer.parameters():
            if parameter.dim() == 2:
                parameter.mul_(scale)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model.to(dtype)


def deviations(model: Any, rows: int) -> list[Deviation]:
    """Of two proofs, whether they are noise or not."""
    found: list[Deviation] = []
    layers = len(model.model.layers)
    policy = SkipPolicy(cold_s=1, cold_e=layers - 1, threshold=2.0, warm_up_tokens=0)

    def note(self: Any, step: Any, given: Any) -> bool:
        """Decoded eagerly meanwhile: a fault may write where there is no room for it in the end."""
        if len(found) < 2 * _DEVIATIONS:
            found.extend(step.deviations(given))
        return False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_engine.StepEngine, "_prove", note)
        _, report = generated(model, policy, "graph", ROWS[:rows], max_new_tokens=4)
    assert len(found) == 2 * _DEVIATIONS, report.engine_reason
    return found


@torch.no_grad()
def main() -> None:
    """Print each model's outcome, and write all together."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", type=int, default=200)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    os.environ["TRITON_INTERPRET"] = "0"  # the interpreter takes a millisecond for each block
    graph_step.FIRST_SLOTS = 32
    draw = random.Random(0)
    kinds = {str(dtype).removeprefix("torch."): _nothing_yet() for dtype in DTYPES}
    for number in range(options.models):
        dtype = DTYPES[number % len(DTYPES)]
        kind = kinds[str(dtype).removeprefix("torch.")]
        model = random_llama(draw, dtype, scale=14.0 ** draw.random())
        found = deviations(model, draw.choice([1, 3]))
        kind["models"] += 1
        kind["false_alarms"] += any(not each.is_noise for each in found)
        kind["largest_noise"] = max(kind["largest_noise"], *(each.error for each in found))
        kind["limit"] = found[0].limit
        if number // len(DTYPES) % _FAULTY:
            continue
        name, (rows, plant) = draw.choice(list(IN_A_GRAPH.items()))
        listening = random_llama(draw, dtype, scale=_LISTENING)
        with pytest.MonkeyPatch.context() as patch:
            plant(patch)
            size = max(each.error / each.limit for each in deviations(listening, rows))
        kind["faults"].setdefault(name, []).append(size)
        print(number, dtype, len(model.model.layers), name, f"{size:.2f} of the limit", flush=True)
    for kind in kinds.values():
        kind["faults"] = {name: _told(sizes) for name, sizes in sorted(kind["faults"].items())}
    document = {"command": " ".join(["python", *sys.argv]), "environment": environment(), "dtypes": kinds}
    print(json.dumps(document, indent=1))
    if options.output is not None:
        options.output.write_text(dump_json(document), encoding="utf-8")


def _nothing_yet() -> dict[str, Any]:
    return {"models": 0, "false_alarms": 0, "largest_noise": 0.0, "faults": {}}


def _told(sizes: list[float]) -> dict[str, Any]:
    """How many of the faults were found; the least of them, in units of the limit."""
    return {"planted": len(sizes), "found": sum(size > 1 for size in sizes), "least_over_limit": min(sizes)}


if __name__ == "__main__":
    main()
