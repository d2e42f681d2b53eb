"""Perplexity and KL against decoding token by token with the naive decoder."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from gated import with_gate
from transformers import DynamicCache

from skipcal.arch.loading import LoadedModel
from skipcal.arch.locate import locate
from skipcal.configs.sweep import PerplexitySettings
from skipcal.core.policy import SkipPolicy
from skipcal.evaluation.tasks.answers import Subject
from skipcal.evaluation.tasks.perplexity import Perplexity, load_perplexity
from skipcal.profiles.methods import METHODS, Ask, make_policy
from skipcal.profiles.schema import SkipProfile

SHIPPED = SkipProfile.load("smollm2-135m-instruct")


def task_of(windows: dict[str, list[int]], prompt_tokens: int, warm_up: int) -> Perplexity:
    return Perplexity(
        windows=windows, subsets=dict.fromkeys(windows, "text"), prompt_tokens=prompt_tokens,
        warm_up_tokens=warm_up, new_tokens=20, source={},
    )  # fmt: skip


def stepped(model: Any, text: list[int], policy: SkipPolicy | None, prompt_tokens: int) -> torch.Tensor:
    """Log-probabilities [scored tokens, vocabulary] of the naive decoder, one token at a time."""
    cache = DynamicCache(config=model.config)
    logits, _, _ = oracle.step(model, cache, torch.tensor([text[:prompt_tokens]]), None)
    rows = [logits]
    for s, token in enumerate(text[prompt_tokens:-1]):
        rule = policy if policy is not None and s >= policy.warm_up_tokens else None
        logits, _, _ = oracle.step(model, cache, torch.tensor([[token]]), rule)
        rows.append(logits)
    return torch.stack(rows).double().log_softmax(-1)


def check_against_stepping(
    subject: Subject, windows: dict[str, list[int]], policy: SkipPolicy, prompt_tokens: int, tolerance: float
) -> None:
    model: Any = subject.loaded.model
    task = task_of(windows, prompt_tokens, policy.warm_up_tokens)
    records = {r["id"]: r for group, _ in task.run(subject, policy, task.ids, 8) for r in group}
    for key, text in windows.items():
        mine, theirs = (stepped(model, text, p, prompt_tokens) for p in (policy, None))
        nll = -mine.gather(-1, torch.tensor(text[prompt_tokens:])[:, None])[:, 0]
        after = policy.warm_up_tokens + 1
        divergence = (theirs.exp() * (theirs - mine)).sum(-1)[after:]
        record = records[key]
        assert record["tokens"] == len(nll)
        assert record["tokens_after_warm_up"] == len(divergence)
        assert math.exp(record["nll"] / len(nll)) == pytest.approx(float(nll.mean().exp()), rel=tolerance)
        assert record["nll_after_warm_up"] == pytest.approx(float(nll[after:].sum()), rel=tolerance)
        assert record["kl"] == pytest.approx(float(divergence.sum()), rel=10 * tolerance, abs=1e-4)
        assert record["top1"] == int((mine[after:].argmax(-1) == theirs[after:].argmax(-1)).sum())
        assert record["kl"] > 0.01


@pytest.mark.parametrize(("prompt_tokens", "warm_up"), [(1, 0), (1, 3), (5, 2)])
def test_teacher_forced_scores_are_those_of_stepping(
    subject: Subject, profile: SkipProfile, prompt_tokens: int, warm_up: int
) -> None:
    windows = {f"w/{n}": torch.randint(3, 97, (20,)).tolist() for n in range(3)}
    policy = SkipPolicy(
        cold_s=1, cold_e=7, threshold=profile.cosine_policy_for(0.25).threshold, warm_up_tokens=warm_up
    )
    check_against_stepping(subject, windows, policy, prompt_tokens, 1e-3)


@pytest.mark.slow
def test_perplexity_is_that_of_stepping_on_the_embedded_model(smollm: LoadedModel) -> None:
    text = "Lighthouses warn ships of rocks. The first of them were fires on hills, later towers of stone."
    ids = smollm.tokenizer(text)["input_ids"]
    subject = Subject(smollm, locate(smollm.model), chat_template=False)
    policy = SkipPolicy(cold_s=1, cold_e=17, threshold=0.985, warm_up_tokens=4)
    check_against_stepping(subject, {"t/0": ids}, policy, 1, 1e-3)


@pytest.mark.parametrize("method", sorted({*METHODS} - {"static+fitted", "ffn-skip+damage"}))
def test_no_method_gives_the_full_models_perplexity_by_accident(
    subject: Subject, profile: SkipProfile, text_file: Path, method: str
) -> None:
    settings = PerplexitySettings(data_files=[str(text_file)], windows=3, window_tokens=40, warm_up_tokens=4)
    task = load_perplexity(settings, subject, seed=0)
    ask = Ask(target_skip_ratio=0.25, new_tokens=task.new_tokens, warm_up_tokens=4)
    gated = with_gate(profile)
    results = []
    for name in ("full", method):
        pairs = list(task.run(subject, make_policy(name, gated, ask), task.ids, 2))
        results.append([record for group, _ in pairs for record in group])
        skipped = sum(report.skipped_blocks for _, report in pairs)
    full, mine = results
    if method == "full":
        assert skipped == 0
        assert [r["kl"] for r in mine] == [0.0] * 3
        assert [r["nll"] for r in mine] == [r["nll"] for r in full]
    else:
        assert skipped > 0
        assert all(a["nll"] != b["nll"] and a["kl"] > 1e-3 for a, b in zip(mine, full, strict=True))


def test_windows_come_from_every_corpus_and_are_scored_apart(subject: Subject, text_file: Path) -> None:
    settings = PerplexitySettings(
        data_files=[f"one={text_file}", f"two={text_file}"], windows=2, window_tokens=30, warm_up_tokens=3
    )
    task = load_perplexity(settings, subject, seed=1)
    assert list(task.ids) == ["one/0", "one/1", "two/0", "two/1"]
    record = {"id": "two/1", "nll": 8.0, "tokens": 4, "nll_after_warm_up": 2.0, "tokens_after_warm_up": 2,
              "kl": 1.0, "top1": 1}  # fmt: skip
    metrics = task.metrics(record, record)
    assert metrics["two", "perplexity"] == metrics["all", "perplexity"]
    assert ("one", "perplexity") not in metrics
    assert task.header()["corpora"][0]["sha256"] == task.header()["corpora"][1]["sha256"]
