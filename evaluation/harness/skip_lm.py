"""A model under a policy, as lm-eval (EleutherAI/lm-evaluation-harness) wants it."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from skipcal.arch.limits import check_ids
from skipcal.arch.loading import LoadedModel, fingerprint
from skipcal.arch.locate import Architecture, input_device, locate, unwrap
from skipcal.core.policy import Policy
from skipcal.core.report import SkipReport
from skipcal.core.whole_layers import ShortGPT
from skipcal.errors import ConfigError, first_words
from skipcal.evaluation.harness.required import HFLM, harness_version, hash_args
from skipcal.evaluation.records import RecordFile, digest
from skipcal.runtime.greedy import greedy_decoding, overruled, sampled_decoding
from skipcal.runtime.session import SkipSession, idle_report, skipping
from skipcal.text.batching import padded
from skipcal.text.chat_template import WITHOUT, refusal
from skipcal.text.opening import opening_names

logger = logging.getLogger(__name__)

Row = tuple[int, tuple[int, ...]]  # a likelihood to compute: tokens of the prefill, all input tokens

BATCHES_PER_SAVE = 16  # an interruption loses as many; with fewer, equal rows meet more seldom


class SkipLM(HFLM):  # type: ignore[misc]
    """A model under a policy, as lm-eval wants it.

    Likelihoods: the context is the prefill and each token of the continuation but the last is a
    decode step, teacher-forced, so that a score is what decoding token by token gives. **The warm-up
    counts from the context's end**: where `policy.warm_up_tokens` is 25, the short continuations of a
    multiple-choice task are scored by the full model entirely, and a continuation of one token always
    is, for the prefill predicts it. A run in which no token came after the warm-up says so. Each
    window of `loglikelihood_rolling` is a text of its own: its warm-up starts anew.
    Generation: plain `generate()` inside `skipping`, by the task's settings; the model's own, as a
    penalty, are not used, save for sampling.

    loaded:        a LoadedModel; or a model, and its tokenizer beside it.
    chat_template: whether `run_lm_eval` applies the tokenizer's, where it has one. For
                   `lm_eval.simple_evaluate`, pass its `apply_chat_template` too.
    cache:         folder for answers. Each policy, model and dtype has a file of its own there, from
                   which an interrupted run goes on. Sampled answers are not kept.
    label:         name in bars, warnings and file names; the policy's method by default.

    lm-eval's own `use_cache` is refused: it is keyed by the text of a request alone, so one method
    would get another's numbers. One process only. Raises ConfigError for both.
    """

    def __init__(
        self,
        loaded: LoadedModel | PreTrainedModel,
        policy: Policy,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        batch_size: int = 8,
        chat_template: bool = True,
        max_length: int | None = None,
        cache: Path | None = None,
        label: str | None = None,
        architecture: Architecture | None = None,
        parallelize: bool = False,
    ) -> None:
        """Check that the policy fits the model; nothing is left on it."""
        _refuse_processes(parallelize)
        if batch_size < 1:
            raise ConfigError(f"batch size {batch_size} is below 1")
        model: Any = loaded.model if isinstance(loaded, LoadedModel) else loaded
        tokenizer = loaded.tokenizer if isinstance(loaded, LoadedModel) else tokenizer
        if tokenizer is None or tokenizer.eos_token_id is None:
            raise ConfigError("lm-eval needs a tokenizer with an end-of-sequence token (eos_token)")
        with _at_level("lm_eval", logging.ERROR):  # it warns of every model that is passed as an object
            # A copy, for HFLM gives a tokenizer without padding token one.
            super().__init__(
                pretrained=model,
                tokenizer=copy.deepcopy(tokenizer),
                backend="causal",
                batch_size=batch_size,
                max_length=max_length,
            )
        self._device = input_device(model)
        self.policy = policy
        self.label = label or policy.method
        self.uses_chat_template = chat_template and bool(tokenizer.chat_template)
        self._architecture = architecture or locate(unwrap(model))
        self._outcomes: dict[str, list[dict[str, Any]]] = {}  # by task, one for each request
        self._reports: list[SkipReport] = []  # of the batches since the last save
        self._decoding: SkipSession  # while texts are generated
        self._cut = 0  # requests that were too long
        self._nothing = idle_report(self._architecture, policy)
        with self._session():  # to raise now what a session would refuse
            pass
        self._file = self._cache_file(cache) if cache else None

    @property
    def report(self) -> SkipReport:
        """Counts over all requests so far, those answered from the cache included."""
        return self.report_on(list(self._outcomes))

    def report_on(self, tasks: Sequence[str]) -> SkipReport:
        """Counts over the requests of some tasks."""
        records = [record for task in tasks for record in self._outcomes.get(task, [])]
        return self._summed(records)

    def _summed(self, records: list[dict[str, Any]]) -> SkipReport:
        return SkipReport.from_shares(self._nothing, [(r["report"], r["batch"]) for r in records])

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Refuse lm-eval's cache."""
        raise ConfigError(
            "lm-eval's use_cache would mix the numbers of methods, for it is keyed by the text of a request "
            "alone; leave it out and give SkipLM(..., cache=FOLDER)"
        )

    # What lm-eval calls

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as the template has it. Raises ConfigError where it refuses."""
        try:
            text: str = super().apply_chat_template(chat_history, add_generation_prompt)
        except Exception as error:  # HFLM has tried it without a system message
            raise refusal(error, WITHOUT) from error
        return text

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood of the continuation, whether greedy decoding gives it) of each request."""
        return [(value, greedy) for value, greedy in self._answer("loglikelihood", requests)]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text, window by window."""
        return self._answer("loglikelihood_rolling", requests)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Generated text of each request, up to its first stop sequence."""
        with self._session() as self._decoding:  # one for all batches, so that steps are prepared once
            return self._answer("generate_until", requests)

    # Requests: by task, from the cache or by the model

    def _answer(self, kind: str, requests: list[Any]) -> list[Any]:
        keyed = [(_key(kind, request, place), request) for place, request in enumerate(requests)]
        by_task: dict[str, dict[str, Any]] = {}
        for key, request in keyed:
            by_task.setdefault(request.task_name or "", {})[key] = request
        # Task by task, so that no batch, and with it no count of skips, belongs to two.
        found = {task: self._records(kind, task, asked) for task, asked in by_task.items()}
        for task, records in found.items():
            self._outcomes.setdefault(task, []).extend(records.values())
            self._warn(task, self._summed(list(records.values())))
        return [found[request.task_name or ""][key]["answer"] for key, request in keyed]

    def _records(self, kind: str, task: str, asked: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """A record for each request: its answer, and the counts of the requests it was run with."""
        known = self._file.done if self._file else {}
        records = {key: known[key] for key in asked if key in known}
        missing = sorted(asked.keys() - records.keys(), key=lambda key: (*_length(asked[key]), key))
        size = self.batch_size * BATCHES_PER_SAVE
        with tqdm(
            total=len(asked),
            initial=len(records),
            desc=f"{task} {self.label}".strip(),
            unit="request",
            disable=None,
        ) as bar:
            for start in range(0, len(missing), size):
                keys = missing[start : start + size]
                try:
                    answers = getattr(super(), kind)([asked[key] for key in keys], disable_tqdm=True)
                except AssertionError as error:  # HFLM's checks of lengths
                    raise ConfigError(f"lm-eval cannot run {task}: {first_words(error)}") from error
                made = self._saved(keys, answers)
                records |= made
                bar.update(len(keys))
        return records

    def _saved(self, keys: list[str], answers: list[Any]) -> dict[str, dict[str, Any]]:
        report = SkipReport.merged([self._nothing, *self._reports])
        self._reports = []
        shared = {"batch": len(keys), "report": report.counts()}
        made = {
            key: {"id": key, "answer": answer, **shared} for key, answer in zip(keys, answers, strict=True)
        }
        if self._file:
            self._file.append(*(record for record in made.values() if _keepable(record)))
        return made

    def _warn(self, task: str, report: SkipReport) -> None:
        """Say when a method's numbers are the full model's, and when texts were cut."""
        if self._cut:
            logger.warning(
                "%s: %d texts are longer than the model's context of %d tokens; their beginning was cut off",
                task, self._cut, self.max_length,
            )  # fmt: skip
            self._cut = 0
        # ShortGPT takes its layers out of the prefill too.
        if self.policy.method == "full" or isinstance(self.policy, ShortGPT) or report.skipped_blocks:
            return
        if report.decode_steps_after_warm_up:
            reason, advice = "nothing was skipped", ""
        elif report.decode_steps:
            reason = f"no token came after the warm-up of {self.policy.warm_up_tokens}"
            advice = "; lower --warm-up-tokens"
        else:
            reason, advice = "every answer is one token, which the prefill predicts", ""
        logger.warning("%s on %s: %s: its numbers are the full model's%s", self.label, task, reason, advice)

    def _cache_file(self, folder: Path) -> RecordFile:
        model = unwrap(self.model)
        policy: Any = self.policy
        header = {
            "model": fingerprint(model),
            "dtype": str(model.dtype).removeprefix("torch."),
            "attention": model.config._attn_implementation,
            "policy": {"kind": type(policy).__name__, **policy.to_dict()},
            "chat_template": self.uses_chat_template,
            "max_length": self.max_length,
            "vocabulary": len(self.tokenizer),
            "opening": opening_names(self.tokenizer),
            "lm_eval": harness_version,
        }
        if overruled(model):  # answers of a skipcal that used them must not be mixed with these
            header["overruled"] = overruled(model)
        return RecordFile(folder / f"{self.label}-{digest(header)}.jsonl", header)

    # The model

    @contextlib.contextmanager
    def _session(self, **options: Any) -> Iterator[SkipSession]:
        # A session without decode steps is no mistake here; `_warn` speaks for all of them.
        with (
            _at_level("skipcal.runtime.session", logging.ERROR),
            skipping(self.model, policy=self.policy, architecture=self._architecture, **options) as run,
        ):
            yield run

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Score (anything, context ids, continuation ids); the longest rows first.

        Continuations that differ in their last token only share a row, if they begin at one place.
        """
        places: dict[Row, list[int]] = {}
        for place, (_, context, continuation) in enumerate(requests):
            places.setdefault(self._row(context, continuation), []).append(place)
        ordered = sorted(places, key=lambda row: (-len(row[1]), row))
        size = override_bs or self.batch_size
        results: dict[int, tuple[float, bool]] = {}
        for start in range(0, len(ordered), size):
            batch = ordered[start : start + size]
            for row, logits in zip(batch, self._row_logits(batch), strict=True):
                scores = logits.float().log_softmax(-1)
                results |= {place: _score(scores, requests[place][2]) for place in places[row]}
        return [results[place] for place in range(len(requests))]

    def _row(self, context: list[int], continuation: list[int]) -> Row:
        """What the model is given, cut on the left as HFLM does it; the last token is only predicted."""
        if not context or not 0 < len(continuation) <= self.max_length:
            raise ConfigError(
                f"a request has {len(context)} context tokens and {len(continuation)} to score; expected at "
                f"least one of each, and no more than the model's context of {self.max_length}"
            )
        tokens = (context + continuation)[-(self.max_length + 1) :]
        self._cut += len(tokens) < len(context) + len(continuation)
        return len(tokens) - len(continuation), tuple(tokens[:-1])

    def _row_logits(self, rows: list[Row]) -> list[Tensor]:
        """Logits [continuation, vocabulary] of each row, from one right-padded pass."""
        check_ids(unwrap(self.model), (tokens for _, tokens in rows))
        ids, mask = padded([tokens for _, tokens in rows], self.device, side="right")
        prompts = [prompt for prompt, _ in rows]
        with torch.no_grad(), self._session(teacher_forced=True, prompt_tokens=prompts) as run:
            logits = self.model(
                input_ids=ids, attention_mask=mask, use_cache=False
            ).logits  # [batch, seq, vocab]
        self._reports.append(run.report)
        return [logits[i, prompt - 1 : len(tokens)] for i, (prompt, tokens) in enumerate(rows)]

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        """`generate()` from left-padded ids [batch, seq]; `generate_until` takes care of the rest."""
        if not options.get("do_sample"):
            options.pop("temperature", None)
        model: Any = unwrap(self.model)
        if model.generation_config.eos_token_id is None:  # generate() would not pad rows that are over
            options.setdefault("eos_token_id", self.eot_token_id)
        stops = StoppingCriteriaList([_StopStrings(self.tokenizer, stop, context.shape[1])])
        check_ids(model, context.tolist())
        decoding = sampled_decoding if options.get("do_sample") else greedy_decoding
        before = self._decoding.report
        with decoding(model):
            generated: Tensor = model.generate(
                input_ids=context,
                max_new_tokens=max_length - context.shape[1],
                stopping_criteria=stops,
                pad_token_id=self.tokenizer.pad_token_id,
                use_cache=True,
                **options,
            )
        self._reports.append(self._decoding.report.since(before))
        return generated


class _StopStrings(StoppingCriteria):
    """Ends a row at its first stop sequence.

    lm-eval's own criterion answers for the whole batch, so rows that are over would go on counting.
    """

    def __init__(self, tokenizer: Any, stops: list[str], prompt_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._stops = [stop for stop in stops if stop]
        self._prompt_tokens = prompt_tokens
        # Two more than a sequence encodes to, as in lm-eval: in a text it may be cut otherwise.
        lengths = [len(tokenizer.encode(stop, add_special_tokens=False)) for stop in self._stops]
        self._look_back = max(lengths, default=0) + 2

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        tails = self._tokenizer.batch_decode(input_ids[:, self._prompt_tokens :][:, -self._look_back :])
        over = [any(stop in tail for stop in self._stops) for tail in tails]
        return torch.tensor(over, device=input_ids.device)


def _key(kind: str, request: Any, place: int) -> str:
    """Name of a request in a cache file; one that samples has a name of its own each time."""
    name: str = hash_args(kind, request.args)
    return f"{name}#{place}" if _samples(request) else name


def _samples(request: Any) -> bool:
    options = request.args[1] if len(request.args) > 1 else None
    return isinstance(options, dict) and bool(options.get("do_sample") or options.get("temperature"))


def _keepable(record: dict[str, Any]) -> bool:
    answer = record["answer"]
    value = answer[0] if isinstance(answer, tuple) else answer
    return "#" not in record["id"] and (isinstance(value, str) or math.isfinite(value))


def _length(request: Any) -> tuple[int, str]:
    """Sort key: the longest first, and side by side what begins alike."""
    texts = [part for part in request.args if isinstance(part, str)]
    return -sum(map(len, texts)), texts[0]


def _score(scores: Tensor, continuation: list[int]) -> tuple[float, bool]:
    """Sum over a continuation, and whether each token is the likeliest; scores [continuation, vocabulary]."""
    targets = torch.tensor(continuation, device=scores.device)
    total = scores.gather(-1, targets[:, None]).sum()
    return float(total), bool((scores.argmax(-1) == targets).all())


def _refuse_processes(parallelize: bool) -> None:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if parallelize or processes > 1:
        given = "parallelize=True" if parallelize else f"{processes} processes"
        raise ConfigError(
            f"lm-eval under a policy runs in one process, got {given}; load the model over several devices "
            "with --device-map auto instead"
        )


@contextlib.contextmanager
def _at_level(name: str, level: int) -> Iterator[None]:
    log = logging.getLogger(name)
    before = log.level
    log.setLevel(level)
    try:
        yield
    finally:
        log.setLevel(before)
