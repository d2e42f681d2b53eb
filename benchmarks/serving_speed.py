"""Tokens a second inside vLLM with skipping and without, by requests that run together.

    .venv-vllm/bin/python benchmarks/serving_speed.py     make vllm comes first; nothing else may run

SmolLM2 in float32, eager, two threads. Arms take turns within each round, and each is told as its ratio to
vLLM without the plug-in in the same round. Requests begin together and write as many tokens each, prompts are
short. `gate, never` asks the gate before each FFN and skips none: what the plug-in costs.
"""

from __future__ import annotations

import os

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "0",
}  # fmt: skip
os.environ.setdefault("OMP_NUM_THREADS", "2")

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from typing import Any

import torch
from common import ratios, save
from prompts import PROMPTS

from skipcal.arch.embedded import embedded_model_folder
from skipcal.arch.loading import load_model
from skipcal.core.gate import NEVER
from skipcal.core.policy import Policy
from skipcal.profiles.methods import Ask, make_policy
from skipcal.profiles.schema import SkipProfile
from skipcal.runtime.greedy import greedy_decoding
from skipcal.serving.runner import watch

PROFILE = "smollm2-135m-instruct"
BATCHES = (1, 2, 8)
WARM_UP = 0


def policies(profile: SkipProfile) -> dict[str, Policy]:
    def ask(method: str) -> Any:
        return make_policy(method, profile, Ask(target_skip_ratio=0.25, new_tokens=0, warm_up_tokens=WARM_UP))

    gate = ask("gate")
    return {
        "gate, never": replace(gate, threshold=NEVER),
        "gate": gate,
        "static": ask("static"),
        "static+surrogates": ask("static+surrogates"),
    }


class Arms:
    """vLLM and transformers on the same prompts; each arm decodes a batch and says how long it took."""

    def __init__(self, new_tokens: int, dtype: str = "float32") -> None:
        from vllm import LLM

        self._new = new_tokens
        self._profile = SkipProfile.load(PROFILE)
        self._policies = policies(self._profile)
        self._model = load_model(dtype=dtype)
        self._rows = [self._model.tokenizer(text).input_ids for text in PROMPTS]
        self._llm = LLM(
            str(embedded_model_folder()), dtype=dtype, enforce_eager=True, enable_prefix_caching=False,
            skip_tokenizer_init=True, max_model_len=512, max_num_seqs=max(BATCHES), async_scheduling=False,
        )  # fmt: skip
        self.counts: dict[tuple[int, str], dict[str, Any]] = {}

    @property
    def names(self) -> list[str]:
        return ["vllm", *self._policies, "transformers"]

    def seconds(self, name: str, batch: int) -> float:
        if name == "transformers":
            return self._timed(lambda: self._transformers(batch))
        if name == "vllm":
            return self._timed(lambda: self._vllm(batch))
        with self._hosted(self._policies[name]) as host:
            self._vllm(1, new_tokens=1)  # the first pass of a host is the proof, which takes longer
            found = self._timed(lambda: self._vllm(batch))
        report = host.report
        self.counts[batch, name] = {"skipped": report.skip_ratio, "unread": report.unread_ratio}
        return found

    @staticmethod
    def _timed(run: Callable[[], None]) -> float:
        started = time.perf_counter()
        run()
        return time.perf_counter() - started

    @contextmanager
    def _hosted(self, policy: Policy) -> Any:
        watched = watch(self._llm.llm_engine.model_executor.driver_worker.worker, policy)
        try:
            yield watched.host
        finally:
            watched.detach()

    def _vllm(self, batch: int, new_tokens: int | None = None) -> None:
        from vllm import SamplingParams

        new = new_tokens or self._new
        outs = self._llm.generate(
            [{"prompt_token_ids": row} for row in self._rows[:batch]],
            SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False),
            use_tqdm=False,
        )
        assert all(len(out.outputs[0].token_ids) == new for out in outs)

    def _transformers(self, batch: int) -> None:
        rows: list[list[int]] = self._rows[:batch]
        model: Any = self._model.model
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        before = model.generation_config.eos_token_id
        with torch.no_grad(), greedy_decoding(model):
            model.generation_config.eos_token_id = None
            try:
                output = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=self._new)
            finally:
                model.generation_config.eos_token_id = before
        assert output.shape[1] == width + self._new


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds of every arm")
    parser.add_argument("--new-tokens", type=int, default=48)
    options = parser.parse_args()
    arms = Arms(options.new_tokens)
    result: dict[str, Any] = {}
    for batch in BATCHES:
        for name in arms.names:  # a round that does not count
            arms.seconds(name, batch)
        found: dict[str, list[float]] = {name: [] for name in arms.names}
        for turn in range(options.rounds):
            for name in arms.names[turn % len(arms.names) :] + arms.names[: turn % len(arms.names)]:
                found[name].append(arms.seconds(name, batch))
        tokens = batch * options.new_tokens
        result[str(batch)] = {
            name: {
                "tokens_per_s": tokens / statistics.median(seconds),
                "over_vllm": ratios(found["vllm"], seconds),
                **arms.counts.get((batch, name), {}),
            }
            for name, seconds in found.items()
        }
    save(
        "serving_speed",
        f"python benchmarks/serving_speed.py --rounds {options.rounds} --new-tokens {options.new_tokens}",
        {
            "vllm": metadata.version("vllm-cpu"), "profile": PROFILE, "dtype": "float32", "mode": "eager",
            "target_skip_ratio": 0.25, "warm_up_tokens": WARM_UP, "new_tokens": options.new_tokens,
            "requests": result,
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
