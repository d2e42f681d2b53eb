"""Perplexity and KL divergence to the full model, teacher-forced over windows of text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skipcal.arch.limits import check_ids, check_length
from skipcal.arch.locate import input_device
from skipcal.calibrate.passes import teacher_forced_report
from skipcal.configs.sweep import PerplexitySettings
from skipcal.core.host import Watcher
from skipcal.core.policy import Policy
from skipcal.core.report import SkipReport
from skipcal.evaluation.statistics import Scale, Share
from skipcal.evaluation.tasks.answers import Subject
from skipcal.evaluation.tasks.task import ALL, Metrics, Record
from skipcal.runtime.session import skipping
from skipcal.text.batching import batches
from skipcal.text.corpora import resolve_corpora, sample_corpus
from skipcal.text.opening import prefill_tokens

PASS_TOKENS = 1024  # of one forward pass; logits of more would fill memory before they save time


@dataclass(frozen=True)
class Perplexity:
    """Windows of known text.

    A window is a text of its own, with the special tokens that begin one: its first `prompt_tokens` are
    the prefill, these tokens among them, and the warm-up starts anew. Scored are all tokens after the
    prompt, and apart those predicted by a step past the warm-up; the same positions for every method,
    those without a warm-up too. watcher: of the passes with skipping, see `SkipSession.watch`.
    """

    windows: dict[str, list[int]]
    subsets: dict[str, str]
    prompt_tokens: int
    warm_up_tokens: int
    new_tokens: int
    source: dict[str, Any]
    name: str = "perplexity"
    watcher: Watcher | None = None

    @property
    def scales(self) -> Mapping[str, Scale]:
        """Perplexities are exponentials of mean negative log-likelihoods."""
        return {"perplexity": "exp", "perplexity_after_warm_up": "exp"}

    @property
    def ids(self) -> Sequence[str]:
        """Corpus and number of each window."""
        return list(self.windows)

    def subset(self, key: str) -> str:
        """The corpus."""
        return self.subsets[key]

    def header(self) -> dict[str, Any]:
        """Where the windows come from, and which positions are scored."""
        return {**self.source, "prompt_tokens": self.prompt_tokens, "warm_up_tokens": self.warm_up_tokens}

    def run(
        self, subject: Subject, policy: Policy, ids: Sequence[str], batch_size: int
    ) -> Iterator[tuple[list[Record], SkipReport]]:
        """Two passes over each batch: the full model's, unless `subject` kept it, and the policy's."""
        model: Any = subject.loaded.model
        device = input_device(model)
        for keys in self._batches(ids, batch_size):
            rows = torch.tensor([self.windows[key] for key in keys], device=device)
            with torch.no_grad():
                full = subject.full_passes.log_probabilities(model, rows, self.prompt_tokens - 1)
                with skipping(
                    model,
                    policy=policy,
                    teacher_forced=True,
                    prompt_tokens=self.prompt_tokens,
                    architecture=subject.architecture,
                ) as run:
                    if self.watcher is not None:
                        run.watch(self.watcher)
                    logits = model(input_ids=rows, use_cache=False).logits
                yield (
                    [
                        {"id": key, **self._scores(row, mine, theirs)}
                        for key, row, mine, theirs in zip(keys, rows, logits, full, strict=True)
                    ],
                    run.report,
                )

    def reports(
        self, subject: Subject, policy: Policy, ids: Sequence[str], batch_size: int
    ) -> Iterator[SkipReport]:
        """Of passes without a language model's head, which for large vocabularies is most of the work."""
        groups = ([self.windows[key] for key in keys] for keys in self._batches(ids, batch_size))
        yield teacher_forced_report(
            subject.loaded.model, subject.architecture, policy, groups, prompt_tokens=self.prompt_tokens
        )

    def _batches(self, ids: Sequence[str], batch_size: int) -> Iterator[Sequence[str]]:
        width = len(next(iter(self.windows.values())))
        return batches(ids, max(1, min(batch_size, PASS_TOKENS // width)))

    def _scores(self, row: Tensor, logits: Tensor, theirs: Tensor) -> Record:
        """Sums over the scored tokens of one window: ids [seq], logits [seq, vocabulary].

        theirs: the full model's log-probabilities at the scored positions.
        """
        first = self.prompt_tokens - 1  # the prompt's last position predicts the first scored token
        past = self.warm_up_tokens + 1  # scored tokens before the first step past the warm-up
        mine = logits[first:-1].float().log_softmax(-1)
        targets = row[first + 1 :, None]
        nll = -mine.gather(-1, targets)[:, 0].double()
        full_nll = -theirs.gather(-1, targets).double().sum()
        mine, theirs = mine[past:], theirs[past:]
        divergence = (theirs.exp() * (theirs - mine)).sum(-1).double()
        return {
            "tokens": len(nll),
            "nll": float(nll.sum()),
            "full_nll": float(full_nll),
            "tokens_after_warm_up": len(divergence),
            "nll_after_warm_up": float(nll[past:].sum()),
            "kl": float(divergence.sum()),
            "top1": int((mine.argmax(-1) == theirs.argmax(-1)).sum()),
        }

    def metrics(self, record: Record, full: Record) -> Metrics:
        """Perplexity, and over the steps past the warm-up what a token loses, in nats.

        excess_nll: negative log-likelihood over the full model's. kl: divergence of the predictions.
        """
        after = record["tokens_after_warm_up"]
        shares = {
            "perplexity": Share(record["nll"], record["tokens"]),
            "perplexity_after_warm_up": Share(record["nll_after_warm_up"], after),
            "excess_nll": Share(record["nll_after_warm_up"] - full["nll_after_warm_up"], after),
            "kl": Share(record["kl"], after),
            "top1_agreement": Share(record["top1"], after),
        }
        return {
            (where, name): share
            for where in (ALL, self.subset(record["id"]))
            for name, share in shares.items()
        }


def load_perplexity(settings: PerplexitySettings, subject: Subject, seed: int) -> Perplexity:
    """Cut the windows.

    Raises Unavailable where text is missing or too short, ConfigError for windows beyond the context.
    """
    what = f"a window of {settings.window_tokens} tokens does"
    check_length(subject.loaded.model, settings.window_tokens, what, lower="--window-tokens")
    windows, sources = text_rows(settings, subject, settings.windows, settings.window_tokens, seed)
    # What the tokenizer begins a text with is no text: it is never scored.
    given = max(settings.prompt_tokens, prefill_tokens(subject.loaded.tokenizer))
    return Perplexity(
        windows=windows,
        subsets={key: key.rpartition("/")[0] for key in windows},
        prompt_tokens=given,
        warm_up_tokens=settings.warm_up,
        new_tokens=settings.window_tokens - given,
        source={"corpora": sources, "window_tokens": settings.window_tokens, "seed": seed},
    )


def text_rows(
    settings: Any, subject: Subject, count: int, length: int, seed: int
) -> tuple[dict[str, list[int]], list[dict[str, Any]]]:
    """`count` rows of `length` tokens from each corpus by id, and where they come from."""
    names = settings.corpus if settings.corpus or settings.data_files else ["embedded"]
    rows: dict[str, list[int]] = {}
    sources = []
    for corpus in resolve_corpora(names, settings.data_files, text_column=settings.text_column):
        sample = sample_corpus(
            corpus, subject.loaded.tokenizer, prompts=count, prompt_tokens=length, seed=seed
        )
        check_ids(subject.loaded.model, sample.prompts)
        rows |= {f"{corpus.name}/{number}": row for number, row in enumerate(sample.prompts)}
        found = sample.corpus
        sources.append(
            {
                "name": found.name,
                "source": found.source,
                "config": found.config,
                "split": found.split,
                "revision": found.revision,
                "sha256": sample.sha256,
                "text_column": None if found.stream else settings.text_column,
                "format": found.format,
                "opening": sample.opening,
                "joined_by": sample.joined_by,
                "rows": count,
            }
        )
    return rows, sources
