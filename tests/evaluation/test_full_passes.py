"""The full model's passes are kept within a run, and no number tells."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from skipcal.arch.loading import LoadedModel
from skipcal.arch.locate import locate
from skipcal.configs.sweep import SweepConfig
from skipcal.core.policy import Policy
from skipcal.core.report import SkipReport
from skipcal.evaluation import full_passes
from skipcal.evaluation.sweep import run_sweep
from skipcal.evaluation.tasks.answers import Subject
from skipcal.evaluation.tasks.perplexity import Perplexity
from skipcal.evaluation.tasks.task import Record
from skipcal.profiles.methods import Ask, make_policy
from skipcal.profiles.schema import SkipProfile
from skipcal.runtime.session import skipping

PROMPT, WARM_UP, LENGTH = 4, 2, 20
METHODS = ["ffn-skip", "random", "static"]
WORDS = 97  # of the model's vocabulary
BATCH_BYTES = 2 * (LENGTH - PROMPT) * WORDS * 4


@pytest.fixture
def subject(subject: Subject) -> Subject:
    """With nothing that another test kept."""
    return Subject(subject.loaded, subject.architecture, chat_template=False)


@pytest.fixture
def passes(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many windows each forward pass has had; blocks are located by a shorter row, which is none."""
    seen: list[int] = []
    kind = type(subject.loaded.model)
    original: Any = kind.forward

    def counted(self: Any, *args: Any, **named: Any) -> Any:
        if named["input_ids"].shape[1] == LENGTH:
            seen.append(len(named["input_ids"]))
        return original(self, *args, **named)

    monkeypatch.setattr(kind, "forward", counted)
    return seen


def task_of(count: int, prompt_tokens: int = PROMPT, warm_up: int = WARM_UP) -> Perplexity:
    drawn = torch.randint(3, WORDS, (count, LENGTH), generator=torch.Generator().manual_seed(3))
    windows = {f"text/{n}": row for n, row in enumerate(drawn.tolist())}
    return Perplexity(
        windows=windows, subsets=dict.fromkeys(windows, "text"), prompt_tokens=prompt_tokens,
        warm_up_tokens=warm_up, new_tokens=LENGTH - prompt_tokens, source={},
    )  # fmt: skip


def policies(profile: SkipProfile) -> list[Policy]:
    ask = Ask(target_skip_ratio=0.25, new_tokens=LENGTH - PROMPT, warm_up_tokens=WARM_UP)
    return [make_policy(name, profile, ask) for name in ("full", *METHODS)]


def records(task: Perplexity, subject: Subject, policy: Policy, ids: list[str] | None = None) -> list[Record]:
    return [record for found, _ in task.run(subject, policy, ids or task.ids, 2) for record in found]


def naive(task: Perplexity, subject: Subject, policy: Policy) -> list[Record]:
    """Two passes over every batch of two windows, whatever was computed before."""
    model: Any = subject.loaded.model
    found: list[Record] = []
    for first in range(0, len(task.ids), 2):
        keys = list(task.ids)[first : first + 2]
        ids = torch.tensor([task.windows[key] for key in keys])
        with torch.no_grad():
            full = model(input_ids=ids, use_cache=False).logits
            with skipping(model, policy=policy, teacher_forced=True, prompt_tokens=PROMPT):
                logits = model(input_ids=ids, use_cache=False).logits
        for n, key in enumerate(keys):
            mine, theirs = (x[n, PROMPT - 1 : -1].float().log_softmax(-1) for x in (logits, full))
            after, before = mine[WARM_UP + 1 :], theirs[WARM_UP + 1 :]
            targets = ids[n, PROMPT:, None]
            nll, full_nll = (-x.gather(-1, targets)[:, 0].double() for x in (mine, theirs))
            found.append(
                {
                    "id": key,
                    "tokens": LENGTH - PROMPT,
                    "nll": float(nll.sum()),
                    "full_nll": float(full_nll.sum()),
                    "tokens_after_warm_up": LENGTH - PROMPT - WARM_UP - 1,
                    "nll_after_warm_up": float(nll[WARM_UP + 1 :].sum()),
                    "kl": float((before.exp() * (before - after)).sum(-1).double().sum()),
                    "top1": int((after.argmax(-1) == before.argmax(-1)).sum()),
                }
            )
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_records_are_bit_for_bit_those_of_two_passes(
    subject: Subject, profile: SkipProfile, dtype: torch.dtype
) -> None:
    task = task_of(5)
    model: Any = copy.deepcopy(subject.loaded.model)
    model.to(dtype)
    loaded = LoadedModel(model=model, tokenizer=subject.loaded.tokenizer, name="tiny", revision=None)
    subject = Subject(loaded, locate(model), chat_template=False)
    with subject.full_passes.kept():
        for policy in policies(profile):
            assert records(task, subject, policy) == naive(task, subject, policy)


def test_four_arms_take_one_full_pass_a_batch(
    subject: Subject, profile: SkipProfile, passes: list[int]
) -> None:
    task = task_of(5)
    arms = policies(profile)
    for policy in arms:
        records(task, subject, policy)
    assert len(passes) == 3 * (4 + 4)  # nothing is kept where no run asks for it
    passes.clear()
    with subject.full_passes.kept():
        for policy in arms:
            records(task, subject, policy)
    assert len(passes) == 3 * (4 + 1)


@pytest.mark.parametrize(
    ("most", "kept"), [(0, 0), (BATCH_BYTES - 1, 0), (BATCH_BYTES, 1), (3 * BATCH_BYTES - 1, 2)]
)
def test_no_more_is_kept_than_the_bound(
    subject: Subject, profile: SkipProfile, passes: list[int], monkeypatch: pytest.MonkeyPatch,
    most: int, kept: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(full_passes, "KEPT_BYTES", most)
    task = task_of(6)
    arms = policies(profile)
    expected = [naive(task, subject, policy) for policy in arms]
    passes.clear()
    with subject.full_passes.kept():
        assert [records(task, subject, policy) for policy in arms] == expected
    assert len(passes) == 3 * 4 + kept + (3 - kept) * 4


def test_other_rows_another_order_and_another_prompt_are_other_batches(
    subject: Subject, profile: SkipProfile, passes: list[int]
) -> None:
    task = task_of(4)
    policy = policies(profile)[1]
    with subject.full_passes.kept():
        records(task, subject, policy)
        for other, ids, full in (
            (task, ["text/0", "text/1"], 0),
            (task, ["text/1", "text/0"], 1),
            (task, ["text/1", "text/2", "text/3"], 2),  # a run that goes on after the first window
            (task_of(4, prompt_tokens=PROMPT + 1), ["text/0", "text/1"], 1),
            (task_of(4, warm_up=WARM_UP + 3), ["text/0", "text/1", "text/2", "text/3"], 0),
        ):
            passes.clear()
            records(other, subject, policy, ids)
            assert len(passes) == (len(ids) + 1) // 2 + full


def test_nothing_outlives_the_run(subject: Subject, profile: SkipProfile) -> None:
    """Not even one that fails: the next may be of other weights."""
    task = task_of(2)
    full = policies(profile)[0]
    model = copy.deepcopy(subject.loaded.model)
    loaded = LoadedModel(model=model, tokenizer=subject.loaded.tokenizer, name="tiny", revision=None)
    mine = Subject(loaded, subject.architecture, chat_template=False)

    with pytest.raises(KeyboardInterrupt), mine.full_passes.kept():
        before = records(task, mine, full)
        raise KeyboardInterrupt
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1.5)
    for after in (records(task, mine, full), records(task, mine, full)):
        assert [r["full_nll"] for r in after] == [r["nll"] for r in after]
        assert [r["full_nll"] for r in after] != [r["full_nll"] for r in before]
    with mine.full_passes.kept():
        assert records(task, mine, full) == after


def test_a_sweep_writes_the_same_records_with_one_full_pass_a_batch(
    loaded: LoadedModel, profile: SkipProfile, text_file: Path, tmp_path: Path,
    passes: list[int], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Two warm-ups share the passes, for the windows are the same."""
    task = {"data_files": [str(text_file)], "windows": 5, "window_tokens": LENGTH}
    config = SweepConfig.model_validate(
        {"profile": "tiny.json", "methods": METHODS, "ratios": [0.25], "warm_ups": [WARM_UP, 4],
         "tasks": {"perplexity": task}, "batch_size": 2}
    )  # fmt: skip
    written, counts = [], []
    for most in (full_passes.KEPT_BYTES, 0):
        monkeypatch.setattr(full_passes, "KEPT_BYTES", most)
        passes.clear()
        folder = tmp_path / str(most)
        run_sweep(loaded, profile, config, folder)
        counts.append(len(passes))
        written.append({p.name: p.read_text() for p in sorted(folder.rglob("*.jsonl"))})
    assert written[0] == written[1] and len(written[0]) == 2 * 4
    assert counts == [3 * (2 * 4 + 1), 3 * (2 * 4 + 2 * 4)]


def test_reports_are_those_of_the_scored_passes_without_a_head(
    subject: Subject, profile: SkipProfile, passes: list[int]
) -> None:
    """Matching a threshold asks for ratios alone; nothing is predicted for that."""
    task = task_of(5)
    for policy in policies(profile):
        scored = SkipReport.merged([report for _, report in task.run(subject, policy, task.ids, 2)])
        passes.clear()
        alone = SkipReport.merged(list(task.reports(subject, policy, task.ids, 2)))
        assert passes == []
        assert alone.counts() == scored.counts()
        assert alone.skipped_blocks > 0 or policy.method == "full"
