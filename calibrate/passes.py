"""The passes of a calibration through the model: continue, capture, and skip."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from skipcal.arch.loading import LoadedModel
from skipcal.arch.locate import Architecture, input_device
from skipcal.calibrate.capture import capture
from skipcal.calibrate.influence import layer_cosines
from skipcal.calibrate.saturation import Trace
from skipcal.configs.run import ProfileConfig
from skipcal.errors import Unavailable
from skipcal.runtime.batching import batches, padded
from skipcal.runtime.greedy import greedy_decoding, until_stop
from skipcal.runtime.policy import Policy, SkipPolicy
from skipcal.runtime.report import SkipReport
from skipcal.runtime.session import skipping

ENDED_EARLY = (
    "every text ended within the warm-up, so no skip ratio can be measured; lower --warm-up-tokens or "
    "take more prompts"
)


class Passes:
    """Runs rows of token ids through one model, in batches.

    prompt_tokens: positions of a row below it are the prefill, in captures and with skipping.
    """

    def __init__(self, loaded: LoadedModel, architecture: Architecture, config: ProfileConfig) -> None:
        """Take batch size, lengths and mode from `config`."""
        self._model: Any = loaded.model
        self._architecture = architecture
        self._device = input_device(loaded.model)
        self._batch_size = config.batch_size
        self._new_tokens = config.new_tokens
        self._cut = config.prompt_tokens
        self.prompt_tokens = config.prompt_tokens if config.mode == "generate" else 1

    def continued(self, prompts: list[list[int]], what: str) -> list[list[int]]:
        """Each prompt with what the model, as it is set up now, writes after it greedily."""
        with self._bar(what, len(prompts)) as bar:
            rows = []
            for batch in batches(prompts, self._batch_size):
                rows += self._continue(batch)
                bar.update(len(batch))
        return rows

    def _continue(self, prompts: list[list[int]]) -> list[list[int]]:
        ids = torch.tensor(prompts, device=self._device)
        with greedy_decoding(self._model) as stops:
            output = self._model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=self._new_tokens
            )
        length = ids.shape[1]
        return [row[:length] + until_stop(row[length:], stops) for row in output.tolist()]

    def trace(self, corpus: str, rows: list[list[int]]) -> Trace:
        """One clean forward over every row; cosines of the positions past the prompt."""
        parts = []
        first = self.prompt_tokens
        with (
            capture(self._model, architecture=self._architecture) as recorder,
            layer_cosines(self._architecture) as layers,
            self._bar(f"capture {corpus}", len(rows)) as bar,
        ):
            done = 0
            for batch in batches(rows, self._batch_size):
                ids, mask = padded(batch, self._device, side="right")
                _stack_pass(self._architecture, ids, mask)
                cosine, norm_ratio = recorder.take()
                kept = mask.cpu().numpy().astype(bool)
                kept[:, :first] = False
                row, position = np.nonzero(kept)
                parts.append(
                    Trace(
                        corpus=corpus,
                        prompt=(row + done).astype(np.int32),
                        position=position.astype(np.int32),
                        cosine=cosine[kept.ravel()],
                        norm_ratio=norm_ratio[kept.ravel()],
                        prompt_tokens=first,
                        layer_cosine_sum=layers.take(kept.ravel()),
                    )
                )
                done += len(batch)
                bar.update(len(batch))
        return Trace.merge(parts)

    def teacher_forced(self, policy: SkipPolicy, rows: list[list[int]]) -> float:
        """Skip ratio with skipping on, over known rows."""
        return teacher_forced_ratio(
            self._model,
            self._architecture,
            policy,
            rows,
            batch_size=self._batch_size,
            prompt_tokens=self.prompt_tokens,
        )

    def decoded(self, policy: SkipPolicy, rows: list[list[int]]) -> float:
        """Skip ratio of decoding the prompts that `rows` begin with."""
        with skipping(self._model, policy=policy, architecture=self._architecture) as run:
            self.continued([row[: self._cut] for row in rows], "decode")
        return _known_ratio(run.report)

    @staticmethod
    def _bar(what: str, total: int) -> Any:
        return tqdm(total=total, desc=what, unit="prompt", leave=False, disable=None)


def teacher_forced_ratio(
    model: Any,
    architecture: Architecture,
    policy: Policy,
    rows: list[list[int]],
    *,
    batch_size: int,
    prompt_tokens: int = 1,
) -> float:
    """Skip ratio of `policy` over known rows, in parallel passes.

    Raises Unavailable when no token lies past the warm-up.
    """
    device = input_device(model)
    with skipping(
        model, policy=policy, teacher_forced=True, prompt_tokens=prompt_tokens, architecture=architecture
    ) as run:
        for batch in batches(rows, batch_size):
            _stack_pass(architecture, *padded(batch, device, side="right"))
    return _known_ratio(run.report)


@torch.no_grad()
def _stack_pass(architecture: Architecture, ids: torch.Tensor, mask: torch.Tensor) -> None:
    # The stack alone: the LM head is a fifth of this work and nobody reads the logits.
    architecture.stack(input_ids=ids, attention_mask=mask, use_cache=False)


def _known_ratio(report: SkipReport) -> float:
    if math.isnan(report.skip_ratio):
        raise Unavailable(ENDED_EARLY)
    return report.skip_ratio
