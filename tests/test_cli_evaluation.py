"""The commands evaluate, sweep and compare: what they print and write, and how they fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from command_line import refused, run


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, its profile, text and questions."""
    import torch
    from conftest import lively
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    with torch.no_grad():
        model: Any = lively("llama", num_hidden_layers=8)
    model.save_pretrained(folder / "tiny")
    words = Tokenizer(WordLevel({f"w{n}": n for n in range(97)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1")
    tokenizer.save_pretrained(folder / "tiny")
    (folder / "text.txt").write_text(" ".join(f"w{(n * n + 7 * n) % 97}" for n in range(1500)))
    rows = [{"id": f"q{n}", "question": f"w{n} w{n + 1}", "answers": [f"w{n}"]} for n in range(5)]
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(
        "profile", "--model", folder / "tiny", "--device", "cpu", "--data-files", folder / "text.txt",
        "--prompts", "6", "--prompt-tokens", "8", "--new-tokens", "14", "--warm-up-tokens", "2",
        "--cold-s", "1", "--cold-e", "7", "-o", folder / "p.json",
    )  # fmt: skip
    return folder


@pytest.fixture
def here(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "text.txt", "q.jsonl", "p.json"):
        (tmp_path / name).symlink_to(place / name)
    return tmp_path


MODEL = ("--model", "tiny", "--device", "cpu", "--profile", "p.json")
TEXT = ("--data-files", "text.txt", "--items", "3", "--window-tokens", "60")


def test_evaluate_prints_a_method_beside_the_full_model(here: Path) -> None:
    done = run("evaluate", *MODEL, "--task", "perplexity", *TEXT, "--target-skip-ratio", "0.25")
    assert "## Methods at 0.25" in done.stdout
    assert "| full |" in done.stdout and "| ffn-skip |" in done.stdout
    folders = list((here / "runs").iterdir())
    assert [f.name[:9] for f in folders] == ["evaluate-"]
    again = run("evaluate", *MODEL, "--task", "perplexity", *TEXT, "--target-skip-ratio", "0.25")
    assert again.stdout == done.stdout
    assert list((here / "runs").iterdir()) == folders


def test_json_is_the_tidy_table(here: Path) -> None:
    done = run(
        "evaluate", *MODEL, "--task", "freebaseqa", "--data-files", "freebaseqa=q.jsonl",
        "--method", "random", "--method", "static", "--target-skip-ratio", "0.25", "--new-tokens", "9",
        "-o", "out", "--json",
    )  # fmt: skip
    rows = json.loads(done.stdout)
    assert {row["method"] for row in rows} == {"full", "random", "static"}
    assert {
        "task",
        "target_skip_ratio",
        "realised_skip_ratio",
        "metric",
        "value",
        "ci_low",
        "ci_high",
        "n",
    } <= set(rows[0])
    stored = pd.read_csv("out/results.csv")
    assert stored["value"].tolist() == pytest.approx([row["value"] for row in rows])
    assert {p.name for p in (here / "out").iterdir()} == {
        "records", "results.csv", "results.parquet", "tables.md", "sweep.json", "quality.png",
    }  # fmt: skip


def test_the_profiles_recommendation_is_the_default(here: Path) -> None:
    rows = json.loads(run("evaluate", *MODEL, "--task", "perplexity", *TEXT, "--json").stdout)
    policy = json.loads(Path("p.json").read_text())["policy"]
    assert {row["threshold"] for row in rows if row["method"] == "ffn-skip"} == {policy["threshold"]}


def test_sweep_takes_a_file_or_lists(here: Path) -> None:
    Path("s.yaml").write_text(
        "profile: p.json\nmodel: tiny\ndevice: cpu\nmethods: [random, shortgpt]\nratios: [0.125, 0.25]\n"
        "tasks:\n  perplexity: {data_files: [text.txt], windows: 3, window_tokens: 60}\n"
    )
    first = run("sweep", "--config", "s.yaml", "-o", "one")
    second = run(
        "sweep", *MODEL, "--methods", "random,shortgpt", "--ratios", "0.125,0.25", "--tasks", "perplexity",
        "--config", "s.yaml", "-o", "two",
    )  # fmt: skip
    assert first.stdout.splitlines()[:12] == second.stdout.splitlines()[:12]
    a, b = (pd.read_parquet(f"{name}/results.parquet") for name in ("one", "two"))
    pd.testing.assert_frame_equal(a, b)
    message = refused("sweep", "--config", "s.yaml", "--ratios", "0.5", "-o", "one", code=2)
    assert "holds results of other settings; pass --overwrite" in message
    run("sweep", "--config", "s.yaml", "--ratios", "0.5", "-o", "one", "--overwrite")
    assert set(pd.read_csv("one/results.csv")["target_skip_ratio"].dropna()) == {0.5}


def test_compare_with_and_without_text(here: Path) -> None:
    Path("other.json").write_bytes(Path("p.json").read_bytes())
    done = run("compare", "p.json", "other.json")
    assert "cold_s" in done.stdout
    document = json.loads(run("compare", "p.json", "other.json", "--json").stdout)
    assert len(document["profiles"]) == 2 and document["transfer"] is None
    run(
        "compare", "p.json", "other.json", "--model", "tiny", "--device", "cpu", "--data-files", "text.txt",
        "--prompts", "3", "--prompt-tokens", "8", "--text-tokens", "40", "-o", "out",
    )  # fmt: skip
    assert {"compare.csv", "transfer.csv", "curves.png"} <= {p.name for p in Path("out").iterdir()}


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("--task", "perplexty"), 2, "did you mean 'perplexity'"),
        (("--task", "perplexity", "--method", "ramdom"), 2, "did you mean 'random'"),
        ((), 2, "no task is asked for"),
        (("--task", "perplexity", "--target-skip-ratio", "1.5"), 2, "--target-skip-ratio 1.5 cannot be used"),
        (("--task", "perplexity", "--target-skip-ratio", "0"), 2, "--target-skip-ratio 0 cannot be used"),
        (("--task", "perplexity", "--target-skip-ratio", "0.99"), 2, "out of reach"),
        (("--task", "perplexity", "--limit", "3"), 2, "--limit 3 is for --lm-eval-tasks"),
        (("--task", "perplexity", "--new-tokens", "9"), 2, "--new-tokens 9 has no effect on perplexity"),
        (("--task", "perplexity"), 2, "512 tokens does not fit the model's context of 256; lower --window"),
        (("--task", "freebaseqa"), 4, "--data-files freebaseqa=PATH"),
        (("--task", "freebaseqa", "--data-files", "freebaseqa=none.jsonl"), 4, "none.jsonl cannot be read"),
        (("--task", "mtbench", "--judge-base-url", "http://localhost:1"), 2, "name it with --judge-model"),
        (("--lm-eval-tasks", "arc_easy", "--items", "3"), 2, "--items has no effect on --lm-eval-tasks"),
    ],
)
def test_mistakes_are_one_line(here: Path, args: tuple[str, ...], code: int, message: str) -> None:
    assert message in refused("evaluate", *MODEL, *args, code=code)
    assert not list(Path.cwd().glob("runs/*/results.csv"))


def test_a_run_that_cannot_begin_leaves_the_folder_as_it_was(here: Path) -> None:
    def evaluated(folder: str, window: str, *more: str) -> tuple[str, ...]:
        text = ("--data-files", "text.txt", "--items", "2", "--window-tokens", window)
        return ("evaluate", *MODEL, "--task", "perplexity", *text, "-o", folder, *more)

    assert "lower --window-tokens" in refused(*evaluated("out", "400"), code=2)
    assert not list(Path("out").iterdir())
    run(*evaluated("out", "60"))  # nothing holds the folder for the settings that were refused
    held = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    refused(*evaluated("out", "400", "--overwrite"), code=2)
    assert {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()} == held


def test_bad_items_are_one_line(here: Path) -> None:
    for rows, message in (
        ('{"id": "a", "question": "w1"}\n', "question 'a' has no answers"),
        ('{"id": "a", "question": "w1", "answers": [""]}\n', "question 'a' has an empty answer"),
        ('{"id": "a", "question": "w1", "answers": ["x"]}\n' * 2, "the id 'a' stands there twice"),
    ):
        Path("bad.jsonl").write_text(rows)
        line = refused(
            "evaluate", *MODEL, "--task", "freebaseqa", "--data-files", "freebaseqa=bad.jsonl", code=4
        )
        assert message in line


def test_a_judge_without_a_key_or_out_of_reach_is_exit_5_and_answers_are_kept(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    Path("b.jsonl").write_text(
        json.dumps({"question_id": 1, "category": "writing", "turns": ["w1 w2", "w3"]}) + "\n"
    )
    bench = ("evaluate", *MODEL, "--task", "mtbench", "--data-files", "mtbench=b.jsonl", "--new-tokens", "8",
             "--warm-up-tokens", "2", "-o", "out", "--judge-model", "gpt-4")  # fmt: skip
    assert "OPENAI_API_KEY" in refused(*bench, code=5)
    kept = {p: p.read_text() for p in Path("out/records").rglob("*.jsonl")}
    assert len(kept) == 2
    line = refused(*bench, "--judge-base-url", "https://judge.invalid/v1", code=5)
    assert "judge.invalid" in line
    assert {p: p.read_text() for p in kept} == kept


def test_sweep_lists_are_read_strictly(here: Path) -> None:
    line = refused("sweep", *MODEL, "--tasks", "perplexity", "--ratios", "0.1;0.2", "-o", "x", code=2)
    assert "--ratios '0.1;0.2': expected numbers separated by commas" in line
    line = refused("sweep", *MODEL, "--tasks", "perplexity,", "-o", "x", code=2)
    assert "--tasks 'perplexity,': expected names or numbers" in line


def test_compare_refuses_what_it_cannot_do(here: Path) -> None:
    assert "smollm2" in refused("compare", "p.json", "smollm2-135m-instruct", code=3).lower()
    refused("compare", "p.json", "none.json", code=4)


def test_lm_eval_tasks_beside_the_full_model(here: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    rows = [{"text": " ".join(f"w{(n * k) % 97}" for k in range(1, 9))} for n in range(3, 7)]
    Path("docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("words.yaml").write_text(
        "task: words\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: "
        f"{here / 'docs.jsonl'}\ntest_split: test\noutput_type: loglikelihood_rolling\n"
        "doc_to_text: ''\ndoc_to_target: '{{text}}'\nmetric_list:\n  - metric: word_perplexity\n"
    )
    done = run(
        "evaluate", *MODEL, "--lm-eval-tasks", str(here / "words.yaml"), "--target-skip-ratio", "0.25",
        "--warm-up-tokens", "0", "--limit", "3", "-o", "out", "--json",
    )  # fmt: skip
    rows = json.loads(done.stdout)
    values = {row["method"]: row["value"] for row in rows}
    assert set(values) == {"full", "ffn-skip"}
    assert values["full"] != values["ffn-skip"]
    assert {row["n"] for row in rows} == {3}
    assert pd.read_csv("out/results.csv")["value"].tolist() == pytest.approx(list(values.values()))


@pytest.mark.slow
def test_the_embedded_sweep_runs_every_method(tmp_path: Path) -> None:
    run("sweep", "--config", "embedded-sweep", "--device", "cpu", "-o", tmp_path / "out")
    frame = pd.read_parquet(tmp_path / "out" / "results.parquet")
    kl = frame[(frame["metric"] == "kl") & (frame["subset"] == "all")]
    assert len(kl) == 1 + 6 * 2
    assert (kl[kl["method"] != "full"]["value"] > 0.05).all()
    skipping = frame[frame["method"] != "full"]
    off = (skipping["realised_skip_ratio"] - skipping["target_skip_ratio"]).abs()
    assert (off[skipping["method"] != "ffn-skip"] < 0.06).all()
    assert set(skipping["method"]) == {
        "ffn-skip", "random", "no-input-adaptive", "static", "shortgpt", "skipdecode",
    }  # fmt: skip


def test_the_full_model_alone_has_a_table(here: Path) -> None:
    done = run("evaluate", *MODEL, "--task", "perplexity", *TEXT, "--method", "full")
    assert "## The full model" in done.stdout and "| full | 0.000 |" in done.stdout


def test_profiles_of_the_same_name_do_not_share_a_folder(here: Path) -> None:
    Path("d").mkdir()
    document = json.loads(Path("p.json").read_text())
    document["policy"]["threshold"] = 0.5
    Path("d/p.json").write_text(json.dumps(document))
    for name in ("p.json", "d/p.json"):
        run(
            "evaluate", "--model", "tiny", "--device", "cpu", "--profile", name, "--task", "perplexity", *TEXT
        )
    assert len(list(Path("runs").iterdir())) == 2


def test_compare_refuses_options_without_a_meaning(here: Path) -> None:
    Path("other.json").write_bytes(Path("p.json").read_bytes())
    assert "--dtype has no effect without text" in refused(
        "compare", "p.json", "other.json", "--dtype", "float16", code=2
    )
    assert "--overwrite has no effect" in refused("compare", "p.json", "other.json", "--overwrite", code=2)
