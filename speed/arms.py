"""The arms of a measurement: ways to decode the same tokens, each timed by plain `generate()`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

from skipcal.arch.locate import Architecture, input_device
from skipcal.arch.patch import InstancePatches
from skipcal.core.policy import Policy
from skipcal.core.report import SkipReport
from skipcal.runtime.engines.choice import fastest
from skipcal.runtime.session import skipping
from skipcal.speed.forced import Forced
from skipcal.speed.timing import StepClock, Timing

PLAIN = "plain"  # transformers' generate(), no session
FULL = "full"  # the twin: the same session and engine, asked about no layer
WATCHING = "watching"  # every decision made, nothing skipped
STATIC_COMPILED = "hf-static-compiled"


@dataclass(frozen=True)
class Run:
    """One run of one arm. report: of the timed part, None outside a session; setup_s: of all of it."""

    timing: Timing
    report: SkipReport | None
    setup_s: float = 0.0


@dataclass(frozen=True)
class Bench:
    """A model and a prompt to decode from. ids: [batch, seq]."""

    model: Any
    architecture: Architecture
    ids: Tensor
    new_tokens: int
    engine: str
    forced: Forced

    def arms(self, skips: list[int], *, peers: bool) -> dict[str, Callable[[], Run]]:
        """What to measure, by name: the plain and the full model, watching, so many skips a token."""
        forced = self.forced
        found = {
            PLAIN: self._plain,
            FULL: self._skipping(forced.full()),
            WATCHING: self._skipping(forced.watching()),
        }
        found |= {skip_arm(count): self._skipping(forced.skipping(count)) for count in skips}
        if peers and self.ids.device.type == "cuda":
            found[STATIC_COMPILED] = lambda: self._plain(cache_implementation="static")
        return found

    def _skipping(self, policy: Policy) -> Callable[[], Run]:
        # "auto" may begin slowly; what is measured is a long run.
        engine = fastest(self.ids.device.type) if self.engine == "auto" else self.engine

        def run() -> Run:
            with skipping(
                self.model, policy=policy, engine=engine, architecture=self.architecture
            ) as session:
                if self.ids.device.type == "cuda":
                    self._generate(self.new_tokens)  # captures steps, for each length that is to come
                elif engine != "eager":
                    self._generate(3)  # records a step, and proves the first two
                before = session.report
                timing = self._generate(self.new_tokens)
                report = session.report
                return Run(timing, report.since(before), report.setup_s)

        return run

    def _plain(self, **options: Any) -> Run:
        return Run(self._generate(self.new_tokens, **options), None)

    def _generate(self, new_tokens: int, **options: Any) -> Timing:
        clock = StepClock(self.ids.device)
        output = self.model.generate(
            input_ids=self.ids,
            attention_mask=torch.ones_like(self.ids),
            max_new_tokens=new_tokens,
            logits_processor=LogitsProcessorList([clock]),
            **options,
        )
        assert output.shape[1] == self.ids.shape[1] + new_tokens  # nothing ends a row
        return clock.timing()


def skip_arm(count: int) -> str:
    """Name of the arm that skips `count` FFN blocks of every token."""
    return f"skip-{count}"


@contextmanager
def endless_greedy(model: Any) -> Iterator[None]:
    """Inside, `generate()` is greedy and goes on to its last token, whatever the model would do."""
    patches = InstancePatches()
    plain = GenerationConfig(do_sample=False, use_cache=True, pad_token_id=0)
    patches.set(model, "generation_config", plain)
    try:
        yield
    finally:
        patches.restore()


def random_prompt(model: Any, *, batch_size: int, tokens: int, seed: int) -> Tensor:
    """Token ids [batch, seq], the same for the same seed on any device."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (batch_size, tokens), generator=generator)
    return ids.to(input_device(model))
