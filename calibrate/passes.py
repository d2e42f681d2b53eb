"""The passes of a calibration through the model: continue, capture, and skip."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from skipcal.arch.blocks import ending_before
from skipcal.arch.loading import LoadedModel
from skipcal.arch.locate import Architecture, input_device
from skipcal.calibrate.capture import capture
from skipcal.calibrate.influence import layer_cosines
from skipcal.calibrate.trace_store import Held, as_ids
from skipcal.configs.run import ProfileConfig
from skipcal.core.policy import Policy, SkipPolicy
from skipcal.core.report import SkipReport
from skipcal.errors import SkipcalError, Unavailable
from skipcal.runtime.greedy import greedy_decoding, until_stop
from skipcal.runtime.session import skipping
from skipcal.text.batching import batches, padded
from skipcal.text.opening import prefill_tokens

ENDED_EARLY = (
    "every text ended within the warm-up, so no skip ratio can be measured; lower --warm-up-tokens or "
    "take more prompts"
)

SkipCounts = tuple[int, int]  # skipped FFN blocks, decode steps past the warm-up


class Passes:
    """Runs rows of token ids through one model, in batches.

    prompt_tokens: positions of a row below it are the prefill, in captures and with skipping. In mode
                   prefill that is what the tokenizer begins a text with, at least the first position.
    """

    def __init__(self, loaded: LoadedModel, architecture: Architecture, config: ProfileConfig) -> None:
        """Take batch size, lengths and mode from `config`."""
        self._model: Any = loaded.model
        self._architecture = architecture
        self._device = input_device(loaded.model)
        self._batch_size = config.batch_size
        self._new_tokens = config.new_tokens
        self._generates = config.mode == "generate"
        self._cut = config.prompt_tokens
        known = prefill_tokens(loaded.tokenizer)
        self.prompt_tokens = config.prompt_tokens if self._generates else known

    def continued(self, prompts: list[list[int]], what: str) -> list[list[int]]:
        """Each prompt with what the model, as it is set up now, writes after it greedily."""
        with progress(what, len(prompts)) as bar:
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

    def captured(self, prompts: list[list[int]], first: int) -> Held:
        """One batch: its prompts continued, then a clean forward; cosines of the positions past the prompt.

        first: number of the first prompt within its corpus. In mode prefill nothing is continued.
        """
        rows = self._continue(prompts) if self._generates else prompts
        ids, mask = padded(rows, self._device, side="right")
        with (
            capture(self._model, architecture=self._architecture) as recorder,
            layer_cosines(self._architecture) as layers,
        ):
            _stack_pass(self._architecture, ids, mask)
        kept = mask.cpu().numpy().astype(bool)
        kept[:, : self.prompt_tokens] = False
        row, position = np.nonzero(kept)
        cosine, norm_ratio = (values[kept.ravel()].T for values in recorder.take())  # [layers, tokens]
        _refuse_overflow(cosine, str(self._model.dtype))
        return Held(
            {
                **as_ids(rows),
                "prompt": (row + first).astype(np.int32),
                "position": position.astype(np.int32),
                "cosine": cosine,
                "norm_ratio": norm_ratio,
                "layer_cosine_sum": layers.take(kept.ravel()),
            }
        )

    def teacher_forced(self, policy: SkipPolicy, groups: Iterable[list[list[int]]]) -> SkipCounts:
        """Counts with skipping on, over known rows in batches."""
        return _counts(
            teacher_forced_report(
                self._model, self._architecture, policy, groups, prompt_tokens=self.prompt_tokens
            )
        )

    def decoded(self, policy: SkipPolicy, groups: Iterable[list[list[int]]]) -> SkipCounts:
        """Counts of decoding the prompts that the rows of each batch begin with."""
        with skipping(self._model, policy=policy, architecture=self._architecture) as run:
            for group in groups:
                self._continue([row[: self._cut] for row in group])
        return _counts(run.report)


def progress(what: str, prompts: int, *, shown: bool = True) -> Any:
    """A bar with the time that is left, where stderr is a terminal; shown: False in all processes but one."""
    return tqdm(total=prompts, desc=what, unit="prompt", leave=False, disable=None if shown else True)


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
    groups = batches(rows, batch_size)
    report = teacher_forced_report(model, architecture, policy, groups, prompt_tokens=prompt_tokens)
    return skip_ratio(_counts(report), architecture.num_layers)


def teacher_forced_report(
    model: Any,
    architecture: Architecture,
    policy: Policy,
    groups: Iterable[list[list[int]]],
    *,
    prompt_tokens: int,
) -> SkipReport:
    """The report of `policy` over batches of known rows, in parallel passes.

    A pass ends behind the last FFN that the policy may skip: what comes after it changes no count.
    """
    device = input_device(model)
    asked = policy.make_rule().layers if policy.unit == "ffn" else ()
    rest = architecture.blocks[max(asked) + 1 :] if asked else ()
    with skipping(
        model, policy=policy, teacher_forced=True, prompt_tokens=prompt_tokens, architecture=architecture
    ) as run:
        for group in groups:
            with ending_before(rest[0]) if rest else nullcontext():
                _stack_pass(architecture, *padded(group, device, side="right"))
    return run.report


@torch.no_grad()
def summed_loss(model: Any, rows: Any, first: int) -> tuple[float, int]:
    """Summed loss in nats, and of how many tokens: those that positions from `first` on predict.

    rows: token ids of equal length, [rows, seq], one pass over all of them.
    """
    ids = torch.as_tensor(rows, device=input_device(model))
    logits = model(input_ids=ids, use_cache=False).logits[:, first:-1].float().flatten(0, 1)
    targets = ids[:, first + 1 :].flatten().to(logits.device)
    return float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum")), len(targets)


def mean_loss(model: Any, rows: Sequence[Sequence[int]], first: int, *, batch_size: int) -> float:
    """Nats a token over rows of equal length, in batches; see `summed_loss`."""
    each = [summed_loss(model, batch, first) for batch in batches(rows, batch_size)]
    return sum(total for total, _ in each) / sum(count for _, count in each)


def skip_ratio(counts: SkipCounts, num_layers: int) -> float:
    """Skipped blocks / (L x decode steps past the warm-up). Raises Unavailable when there is no such step."""
    skipped, steps = counts
    if not steps:
        raise Unavailable(ENDED_EARLY)
    return skipped / (num_layers * steps)


@torch.no_grad()
def _stack_pass(architecture: Architecture, ids: torch.Tensor, mask: torch.Tensor) -> None:
    # The stack alone: the LM head is a fifth of this work and nobody reads the logits.
    architecture.stack(input_ids=ids, attention_mask=mask, use_cache=False)


def _counts(report: SkipReport) -> SkipCounts:
    return report.skipped_blocks, report.decode_steps_after_warm_up


def _refuse_overflow(cosine: np.ndarray, dtype: str) -> None:
    """Raise SkipcalError for cosines that are no numbers: hours later no statistic of them would be one."""
    wrong = ~np.isfinite(cosine).all(axis=1)
    if wrong.any():
        raise SkipcalError(
            f"the cosines of layer {int(wrong.argmax())} are not finite: the model overflows in "
            f"{dtype.removeprefix('torch.')}; try --dtype float32 or bfloat16"
        )
