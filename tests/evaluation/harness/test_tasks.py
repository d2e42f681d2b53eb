"""Tasks of lm-eval under several policies: rows of results, and what is refused."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from transformers import PreTrainedTokenizerFast

from skipcal.arch.loading import LoadedModel
from skipcal.core.policy import Policy, SkipPolicy
from skipcal.errors import ConfigError, Unavailable
from skipcal.evaluation.arms import Arm
from skipcal.evaluation.sweep import COLUMNS

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
from lm_eval.tasks import TaskManager
from lm_eval_requests import FULL, RANDOM, SOME

from skipcal.evaluation.harness import lm_eval as ours
from skipcal.evaluation.harness.lm_eval import run_lm_eval
from skipcal.evaluation.harness.skip_lm import SkipLM


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    items = [
        {
            "question": " ".join(f"w{(5 * n + k) % 90 + 3}" for k in range(4)),
            "choices": [" ".join(f"w{(11 * n + 7 * c + k) % 90 + 3}" for k in range(4)) for c in range(3)],
            "gold": n % 3,
            "text": " ".join(f"w{(7 * n + k * k) % 90 + 3}" for k in range(20)),
            "answer": f"w{n + 3}",
        }
        for n in range(12)
    ]
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return folder


@pytest.fixture
def tasks(data: Path) -> dict[str, dict[str, Any]]:
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(data / "items.jsonl")},
            "cache_dir": str(data / "cache"),
        },
        "test_split": "test",
    }
    return {
        "choice": {
            **common,
            "task": "choice",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{gold}}",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "cloze": {
            **common,
            "task": "cloze",
            "output_type": "loglikelihood",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{choices[0]}}",
            "metric_list": [{"metric": "perplexity"}],
        },
        "rolling": {
            **common,
            "task": "rolling",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
        "answering": {
            **common,
            "task": "answering",
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["w90"], "max_gen_toks": 6, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
            "filter_list": [
                {
                    "name": "first-word",
                    "filter": [
                        {"function": "regex", "regex_pattern": "(w[0-9]+)"},
                        {"function": "take_first"},
                    ],
                }
            ],
        },
    }


@contextlib.contextmanager
def without_defaults() -> Iterator[None]:
    """An index without lm-eval's own tasks, which take seconds to read."""

    def index(**options: Any) -> Any:
        return TaskManager(**{**options, "include_defaults": False})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours, "TaskManager", index)
        yield


def cell(frame: pd.DataFrame, method: str, metric: str) -> Any:
    found = frame[(frame.method == method) & (frame.metric == metric)]
    assert len(found) == 1
    return found.iloc[0]


def test_policies_are_compared_on_tasks(
    loaded: LoadedModel, tasks: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policies: list[tuple[str | Arm, Policy]] = [(Arm("ffn-skip", 0.25), SOME), ("full", FULL)]
    frame = run_lm_eval(loaded, policies, list(tasks.values()), cache=tmp_path, limit=10)
    assert tuple(frame.columns) == COLUMNS
    assert capsys.readouterr().out == ""
    assert list(zip(frame.task, frame.subset, frame.metric, strict=True))[:6] == [
        ("choice", "all", "acc"),
        ("choice", "all", "acc_norm"),
        ("cloze", "all", "perplexity"),
        ("rolling", "all", "word_perplexity"),
        ("rolling", "all", "bits_per_byte"),
        ("answering", "first-word", "exact_match"),
    ]
    assert set(frame.n) == {10}
    mine, full = cell(frame, "ffn-skip", "acc"), cell(frame, "full", "acc")
    assert mine.target_skip_ratio == 0.25
    assert mine.realised_skip_ratio > 0 == full.realised_skip_ratio
    assert mine.ci_high - mine.ci_low == pytest.approx(
        2 * 1.96 * math.sqrt(mine.value * (1 - mine.value) / 9)
    )
    for metric in frame.metric.unique():
        mine, full = cell(frame, "ffn-skip", metric), cell(frame, "full", metric)
        assert mine.difference == pytest.approx(mine.value - full.value)
        assert mine.difference_ci_low <= mine.difference <= mine.difference_ci_high
        assert math.isnan(full.difference)
    assert cell(frame, "ffn-skip", "word_perplexity").difference != 0
    assert cell(frame, "full", "perplexity").ci_high > cell(frame, "full", "perplexity").value
    assert math.isnan(cell(frame, "full", "word_perplexity").ci_low)  # lm-eval has no standard error for it

    again = run_lm_eval(loaded, policies, list(tasks.values()), cache=tmp_path, limit=10)
    pd.testing.assert_frame_equal(again, frame)


def test_bars_of_the_harness_are_off_in_files_and_back_afterwards() -> None:
    modules: list[Any] = [importlib.import_module(name) for name in ("lm_eval.api.task", "tqdm")]
    before = [module.tqdm for module in modules]
    with ours._quiet_harness():
        assert all(module.tqdm.keywords == {"disable": True} for module in modules)
    assert [module.tqdm for module in modules] == before


def test_few_shot_examples_are_the_same_for_all_policies(loaded: LoadedModel, tasks: Any) -> None:
    task = {**tasks["choice"], "fewshot_split": "test"}
    same = replace(FULL, warm_up_tokens=3)
    frame = run_lm_eval(loaded, {"full": FULL, "same": same}, [task], num_fewshot=2, seed=5, limit=6)
    acc = frame[frame.metric == "acc"]
    assert acc.value.nunique() == 1
    assert (acc.difference.iloc[1], acc.difference_ci_low.iloc[1]) == (0, 0)


def test_a_group_gets_its_aggregate_and_the_counts_of_its_tasks(
    loaded: LoadedModel, tasks: Any, tmp_path: Path
) -> None:
    other = {**tasks["choice"], "task": "other", "doc_to_target": "{{(gold + 1) % 3}}"}
    group = {"group": "both", "task": ["choice", "other"], "aggregate_metric_list": [{"metric": "acc"}]}
    for name, written in (("choice", tasks["choice"]), ("other", other), ("both", group)):
        (tmp_path / f"{name}.yaml").write_text(json.dumps(written))
    with without_defaults():
        frame = run_lm_eval(
            loaded, {"full": FULL, "random": RANDOM}, ["both"], limit=4, include_path=tmp_path
        )
    row = frame[(frame.method == "random") & (frame.task == "both")].iloc[0]
    leaves = frame[(frame.method == "random") & (frame.task != "both") & (frame.metric == "acc")]
    assert row.n == 8
    assert row.value == pytest.approx(leaves.value.mean())
    assert 0 < leaves.realised_skip_ratio.min() <= row.realised_skip_ratio <= leaves.realised_skip_ratio.max()


def test_a_task_of_a_folder_runs_by_its_name(loaded: LoadedModel, tasks: Any, tmp_path: Path) -> None:
    """lm-eval's own tasks, which take seconds to index, are left alone."""
    (tmp_path / "answering.yaml").write_text(json.dumps(tasks["answering"]))
    frame = run_lm_eval(
        loaded, {"random": RANDOM}, ["answering"], include_path=tmp_path, limit=2,
        gen_kwargs={"max_gen_toks": 3},
    )  # fmt: skip
    assert list(frame.task) == ["answering"]
    assert frame.difference.isna().all()
    by_file = run_lm_eval(loaded, {"random": RANDOM}, [str(tmp_path / "answering.yaml")], limit=2)
    assert list(by_file.task) == ["answering"]


def test_a_chat_template_is_applied_where_there_is_one(loaded: LoadedModel, tasks: Any) -> None:
    assert not SkipLM(loaded, FULL).uses_chat_template
    plain = run_lm_eval(loaded, {"full": FULL}, [tasks["choice"]], limit=4)
    template = (
        "{% for m in messages %}w10 {{ m.content }}{% endfor %}{% if add_generation_prompt %} w11{% endif %}"
    )
    chat: Any = PreTrainedTokenizerFast(
        tokenizer_object=loaded.tokenizer.backend_tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
    )
    chat.chat_template = template
    lm = SkipLM(loaded.model, FULL, tokenizer=chat)
    assert lm.uses_chat_template
    assert not SkipLM(loaded.model, FULL, tokenizer=chat, chat_template=False).uses_chat_template
    seen: list[str] = []
    original = SkipLM.loglikelihood

    def spying(self: Any, asked: list[Any], disable_tqdm: bool = False) -> Any:
        seen.extend(each.args[0] for each in asked)
        return original(self, asked, disable_tqdm)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SkipLM, "loglikelihood", spying)
        run_lm_eval(replace(loaded, tokenizer=chat), {"full": FULL}, [tasks["choice"]], limit=4)
    assert seen[0].startswith("w10 ")
    assert seen[0].rstrip().endswith("w11")
    assert len(plain) == 2


# Refusals


def test_what_cannot_run_is_refused(loaded: LoadedModel, tasks: Any, tmp_path: Path) -> None:
    def run(names: Any, policies: Any = None, **options: Any) -> None:
        with without_defaults():
            run_lm_eval(loaded, policies or {"full": FULL}, names, include_path=tmp_path, **options)

    (tmp_path / "answering.yaml").write_text(json.dumps(tasks["answering"]))
    with pytest.raises(ConfigError, match=r"'anwsering' is not known; did you mean 'answering'\?"):
        run(["anwsering"])
    with pytest.raises(ConfigError, match="lm-eval ls tasks"):
        run(["zzzz"])
    with pytest.raises(ConfigError, match="no lm-eval task"):
        run([])
    with pytest.raises(ConfigError, match="limit 0"):
        run(["answering"], limit=0)
    with pytest.raises(ConfigError, match="'a' twice"):
        run(["answering"], [("a", FULL), ("a", SOME)])
    with pytest.raises(ConfigError, match="no folder"):
        run_lm_eval(loaded, {"full": FULL}, ["answering"], include_path=tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="'choice' cannot be used"):
        run([{**tasks["choice"], "output_typ": "x"}])
    with pytest.raises(ConfigError, match="code that a model wrote"):
        run([{**tasks["answering"], "unsafe_code": True}])
    for path in ("nobody/no-such-data", str(tmp_path / "nothing")):
        with pytest.raises(Unavailable, match="the data of lm-eval task 'choice' cannot be had") as caught:
            run([{**tasks["choice"], "dataset_path": path, "dataset_kwargs": {}}])
        assert "\n" not in str(caught.value)


def test_several_processes_are_refused(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="parallelize"):
        SkipLM(loaded, SOME, parallelize=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="one process, got 2 processes"):
        SkipLM(loaded, SOME)


def test_a_model_object_needs_its_tokenizer(loaded: LoadedModel) -> None:
    with pytest.raises(ConfigError, match="end-of-sequence"):
        SkipLM(loaded.model, SOME)
    assert SkipLM(loaded.model, SOME, tokenizer=loaded.tokenizer).label == "ffn-skip"
    with pytest.raises(ConfigError, match="batch size 0"):
        SkipLM(loaded, SOME, batch_size=0)


def test_a_missing_library_is_named_with_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lm_eval", "skip_lm", "required"):
        monkeypatch.delitem(sys.modules, f"skipcal.evaluation.harness.{name}")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r'lm-eval is not installed; .* pip install "skipcal\[eval\]"'):
        importlib.import_module("skipcal.evaluation.harness.lm_eval")


def test_importing_skipcal_leaves_the_library_out() -> None:
    code = "import sys, skipcal, skipcal.cli, skipcal.evaluation; assert 'lm_eval' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_the_embedded_model_skips_in_a_task(smollm: LoadedModel, tmp_path: Path) -> None:
    lines = [
        {"q": "The capital of France is", "choices": ["Paris, a city on the Seine", "the moon over the sea"]},
        {"q": "Water is made of", "choices": ["hydrogen and oxygen atoms", "wood and paper and glue"]},
    ]
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = {
        "task": "two",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "two.jsonl")}, "cache_dir": str(tmp_path)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 0,
    }
    some = SkipPolicy(cold_s=1, cold_e=26, threshold=0.98, warm_up_tokens=1)
    frame = run_lm_eval(smollm, {"full": FULL, "ffn-skip": some}, [task], chat_template=False)
    assert cell(frame, "full", "acc").value == 1.0
    assert 0 < cell(frame, "ffn-skip", "acc").realised_skip_ratio < 1
