"""Cutting prompts from text: windows and documents, seeds, provenance, and bad files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from corpus_files import Template, Words, jsonl, local, words

from skipcal.errors import ConfigError, Unavailable
from skipcal.text.batching import batches
from skipcal.text.corpora import (
    KNOWN_CORPORA,
    OVERLAP_TOKENS,
    Corpus,
    resolve_corpora,
    sample_corpus,
)


def test_a_text_file_is_one_stream_cut_into_windows(tmp_path: Path) -> None:
    path = tmp_path / "stream.txt"
    path.write_text(words(0, 50) + "\n\n" + words(50, 53))
    sample = sample_corpus(local(path), Words(), prompts=7, prompt_tokens=10, seed=0, held_out=3)
    rows = sample.prompts + sample.held_out
    assert sorted(row[0] for row in rows) == list(range(0, 100, 10))  # every window once
    assert all(row == list(range(row[0], row[0] + 10)) for row in rows)
    assert (len(sample.prompts), sample.documents, sample.short_documents) == (7, 1, 0)
    assert sample.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert sample.corpus.source == "stream.txt"  # no folder of this computer


def test_a_document_gives_its_first_tokens_and_short_ones_are_counted(tmp_path: Path) -> None:
    texts = [words(1000 * n, 3 if n % 4 == 0 else 12) for n in range(20)]
    sample = sample_corpus(
        local(jsonl(tmp_path / "d.jsonl", texts)), Words(), prompts=15, prompt_tokens=5, seed=0
    )
    assert sorted(row[0] for row in sample.prompts) == [1000 * n for n in range(20) if n % 4]
    assert all(row == list(range(row[0], row[0] + 5)) for row in sample.prompts)
    assert sample.documents - sample.short_documents == 15
    assert 0 < sample.short_documents <= 5


def test_the_seed_decides_and_held_out_prompts_are_others(tmp_path: Path) -> None:
    corpus = local(jsonl(tmp_path / "d.jsonl", [words(100 * n, 9) for n in range(60)]))

    def drawn(seed: int) -> tuple[list[list[int]], list[list[int]]]:
        sample = sample_corpus(corpus, Words(), prompts=10, prompt_tokens=4, seed=seed, held_out=10)
        return sample.prompts, sample.held_out

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    prompts, held_out = drawn(1)
    assert not {row[0] for row in prompts} & {row[0] for row in held_out}


def test_parquet_and_another_column(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    pd.DataFrame({"body": [words(0, 9), words(50, 9)], "n": [1, 2]}).to_parquet(path)
    sample = sample_corpus(local(path, text_column="body"), Words(), prompts=2, prompt_tokens=4, seed=0)
    assert sorted(row[0] for row in sample.prompts) == [0, 50]
    with pytest.raises(Unavailable, match=r"no text in column 'text' \(columns: body, n\)"):
        sample_corpus(local(path), Words(), prompts=2, prompt_tokens=4, seed=0)


def test_the_embedded_text_is_long_enough_for_calibration_and_verification() -> None:
    class Spaces:
        def __call__(self, text: str, **kwargs: Any) -> dict[str, list[int]]:
            return {"input_ids": list(range(len(text.split())))}

    corpus = resolve_corpora(["embedded"], [])[0]
    sample = sample_corpus(corpus, Spaces(), prompts=64, prompt_tokens=64, seed=0, held_out=16)
    assert len(sample.prompts) + len(sample.held_out) == 80


def test_names_resolve_to_pinned_sources() -> None:
    wikitext, c4, other = resolve_corpora(["wikitext", "c4", "some/set"], [])
    assert (wikitext.source, wikitext.config) == ("Salesforce/wikitext", "wikitext-2-raw-v1")
    assert (c4.source, c4.config) == ("allenai/c4", "en")
    assert c4.data_files == "en/c4-train.00000-of-01024.json.gz"
    assert all(len(corpus.revision or "") == 40 for corpus in (wikitext, c4))
    assert other == Corpus("some/set", "some/set")
    assert resolve_corpora(["c4"], [], text_column="body")[0].text_column == "body"
    assert {n for n, c in KNOWN_CORPORA.items() if not c.questions} == {"wikitext", "c4", "pile", "embedded"}


def test_the_hub_is_asked_for_exactly_what_the_table_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """No network in tests: the library's loader is replaced, its arguments are the point."""
    from datasets import Dataset

    asked: dict[str, Any] = {}

    def load(path: str, name: str | None, **options: Any) -> Any:
        asked.update(path=path, name=name, **options)
        return Dataset.from_list([{"text": words(0, 30)}, {"text": words(40, 30)}]).to_iterable_dataset()

    monkeypatch.setattr("datasets.load_dataset", load)
    c4 = resolve_corpora(["c4"], [])[0]
    sample = sample_corpus(c4, Words(), prompts=2, prompt_tokens=4, seed=0)
    assert sorted(row[0] for row in sample.prompts) == [0, 40]
    assert asked == {
        "path": "allenai/c4",
        "name": "en",
        "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"},
        "split": "train",
        "revision": c4.revision,
        "streaming": True,
    }


def test_a_hub_set_is_pinned_to_the_commit_it_is_at(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset

    revisions = []

    def load(path: str, name: str | None, **options: Any) -> Any:
        revisions.append(options["revision"])
        return Dataset.from_list([{"body": words(0, 30)}]).to_iterable_dataset()

    monkeypatch.setattr("datasets.load_dataset", load)
    monkeypatch.setattr(
        "huggingface_hub.HfApi.dataset_info", lambda *a, **k: type("Info", (), {"sha": "f" * 40})()
    )
    corpus = resolve_corpora(["some/set"], [], text_column="body")[0]
    sample = sample_corpus(corpus, Words(), prompts=1, prompt_tokens=4, seed=0)
    assert revisions == ["f" * 40] == [sample.corpus.revision]


def test_local_files_are_named_by_stem_or_by_hand(tmp_path: Path) -> None:
    named = resolve_corpora([], ["wiki=/data/a.txt", "/data/b.jsonl"])
    assert [(c.name, c.stream) for c in named] == [("wiki", True), ("b", False)]
    with pytest.raises(ConfigError, match=r"'\.csv'; expected"):
        resolve_corpora([], ["a.csv"])
    with pytest.raises(ConfigError, match="'a' is taken"):
        resolve_corpora([], ["x/a.txt", "y/a.txt"])
    with pytest.raises(ConfigError, match="'pooled' is taken"):
        resolve_corpora([], ["pooled.txt"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b"  \n \n", "is empty"),
        ("a.txt", b"\xff\xfe\x00binary", "is not UTF-8 text"),
        ("a.txt", b"w1 \x00 w2", "is binary"),
        ("a.txt", b"w1 w2 w3", "too short: it has 0 windows of 4 tokens, 1 are wanted"),
        ("a.jsonl", b'{"text": "w1"}\n', r"too short: it has 0 documents \(of 1\) of 4 tokens"),
        ("a.jsonl", b'{"text": "w1 w2', "a.jsonl:1 is no JSON object"),
        ("a.jsonl", b'{"text": 7}\n', "no text in column 'text'"),
        ("a.jsonl", b"", "could not be read|too short"),
        ("a.parquet", b"PAR1 this is none", "could not be read"),
    ],
)
def test_text_that_cannot_be_used_is_refused_in_one_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(Unavailable, match=message) as refused:
        sample_corpus(local(path), Words(), prompts=1, prompt_tokens=4, seed=0)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["missing.txt", "missing.jsonl", "missing.parquet"])
def test_a_missing_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(Unavailable, match="No such file"):
        sample_corpus(local(tmp_path / name), Words(), prompts=1, prompt_tokens=4, seed=0)


def test_a_hub_set_while_offline_is_refused_with_advice_and_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"waited for {seconds} s"))
    corpus = resolve_corpora(["nobody/no-such-set"], [])[0]
    with pytest.raises(Unavailable, match="pass local text with --data-files PATH") as refused:
        sample_corpus(corpus, Words(), prompts=1, prompt_tokens=4, seed=0)
    assert "\n" not in str(refused.value)


class Answer(Exception):
    """A hub's answer with an error's status, as the hub library raises it."""

    def __init__(self, status: int) -> None:
        super().__init__(f"{status} from the hub")
        self.response = type("Response", (), {"status_code": status})()


@pytest.mark.parametrize(
    ("failures", "attempts"),
    [
        ([ConnectionResetError("gone"), Answer(429)], 3),
        ([TimeoutError("slow"), Answer(503), Answer(500)], 4),
        ([Answer(429)] * 4, 4),  # and no more
        ([Answer(404)], 1),
        ([Answer(401)], 1),
        ([ValueError("no such config")], 1),
    ],
)
def test_a_busy_hub_is_asked_again_and_a_refusal_is_taken(
    monkeypatch: pytest.MonkeyPatch, failures: list[Exception], attempts: int
) -> None:
    from datasets import Dataset

    waited: list[float] = []
    asked = []

    def load(*args: Any, **options: Any) -> Any:
        asked.append(args)
        if len(asked) <= len(failures):
            raise failures[len(asked) - 1]
        return Dataset.from_list([{"text": words(5, 30)}]).to_iterable_dataset()

    monkeypatch.setattr("datasets.load_dataset", load)
    monkeypatch.setattr("time.sleep", waited.append)
    c4 = resolve_corpora(["c4"], [])[0]
    if attempts > len(failures):
        assert sample_corpus(c4, Words(), prompts=1, prompt_tokens=4, seed=0).prompts == [[5, 6, 7, 8]]
    else:
        with pytest.raises(Unavailable, match=str(failures[-1])):
            sample_corpus(c4, Words(), prompts=1, prompt_tokens=4, seed=0)
    assert len(asked) == attempts
    assert waited == [2, 8, 30][: attempts - 1]


def test_batches_keep_order_and_lose_nothing() -> None:
    rows = [[n] for n in range(7)]
    assert [len(batch) for batch in batches(rows, 3)] == [3, 3, 1]
    assert [row for batch in batches(rows, 3) for row in batch] == rows


# Text that is to be avoided


def test_text_to_be_avoided_is_passed_over_in_streams_documents_and_items(tmp_path: Path) -> None:
    stream = tmp_path / "s.txt"
    stream.write_text(words(0, 1000))
    used = [list(range(95, 95 + 2 * OVERLAP_TOKENS))]  # 27 of them lie in the window that begins at 100
    rows = sample_corpus(local(stream), Words(), prompts=19, prompt_tokens=50, seed=0, avoid=used).prompts
    assert sorted(row[0] for row in rows) == [start for start in range(0, 1000, 50) if start != 100]
    with pytest.raises(Unavailable, match="apart from the text to be avoided"):
        sample_corpus(local(stream), Words(), prompts=20, prompt_tokens=50, seed=0, avoid=used)

    documents = jsonl(tmp_path / "d.jsonl", [words(100 * n, 40) for n in range(6)])
    rows = sample_corpus(
        local(documents), Words(), prompts=5, prompt_tokens=30, seed=0, avoid=[list(range(205, 230))]
    ).prompts
    assert sorted(row[0] for row in rows) == [0, 100, 300, 400, 500]

    questions = tmp_path / "q.jsonl"
    bodies = [{"body": words(100 * n, 25), "question": "w7", "answer": "w8"} for n in range(60)]
    questions.write_text("".join(json.dumps(record) + "\n" for record in bodies))
    corpus = resolve_corpora([], [f"svamp:in-context={questions}"])[0]
    settings: dict[str, Any] = {"prompts": 5, "prompt_tokens": 60, "seed": 3}
    first = sample_corpus(corpus, Template(), **settings)
    again = sample_corpus(corpus, Template(), **settings, avoid=first.prompts)
    seen, new = ({t // 100 for row in s.prompts for t in row if t > 9} for s in (first, again))
    cut = [token // 100 for row in first.prompts for token in (row[0], row[-1])]  # less than a run, maybe
    assert len(seen) > 5
    assert seen & new <= set(cut)


def test_short_rows_to_be_avoided_exclude_nothing(tmp_path: Path) -> None:
    stream = tmp_path / "s.txt"
    stream.write_text(words(0, 100))
    short = [list(range(OVERLAP_TOKENS - 1))]
    rows = sample_corpus(local(stream), Words(), prompts=5, prompt_tokens=20, seed=0, avoid=short).prompts
    assert len(rows) == 5
