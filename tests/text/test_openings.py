"""Rows cut from corpora begin as the tokenizer begins a text."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from corpus_files import jsonl, local, prose
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from special_tokens import AROUND, around, ids_of, naive_rows

from skipcal.arch.embedded import embedded_model_folder
from skipcal.errors import ConfigError
from skipcal.text.corpora import CorpusSample, resolve_corpora, sample_corpus

BOS = ids_of("<s>")[0]
ANY = st.tuples(st.sampled_from(AROUND), st.sampled_from(["never", "first", "always"]))
quick = settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])


def rows(sample: CorpusSample) -> list[list[int]]:
    return sorted(sample.prompts + sample.held_out)


@quick
@given(kind=ANY, length=st.integers(4, 20))
def test_a_stream_is_cut_into_windows_that_each_begin_as_a_text(
    kind: Any, length: int, tmp_path: Path
) -> None:
    (before, after), space = kind
    tokenizer = around(before, after, space)
    path = tmp_path / "s.txt"
    path.write_text(prose(0, 60))
    every = naive_rows(tokenizer, before, path.read_text(), length)
    sample = sample_corpus(
        local(path), tokenizer, prompts=len(every) - 2, prompt_tokens=length, seed=3, held_out=2
    )
    assert rows(sample) == sorted(every)
    assert (sample.opening, sample.joined_by) == (list(before), None)


@quick
@given(kind=ANY, length=st.integers(4, 20))
def test_documents_begin_alike_and_end_in_their_text(kind: Any, length: int, tmp_path: Path) -> None:
    (before, after), space = kind
    tokenizer = around(before, after, space)
    texts = [prose(seed, 1 + seed % 7) for seed in range(40)]
    naive = [naive_rows(tokenizer, before, text, length)[:1] for text in texts]
    long = [found[0] for found in naive if found]
    path = jsonl(tmp_path / "d.jsonl", texts)
    sample = sample_corpus(local(path), tokenizer, prompts=len(long), prompt_tokens=length, seed=3)
    assert rows(sample) == sorted(long)
    assert sample.short_documents <= len(texts) - len(long)
    assert sample.joined_by is None


@quick
@given(kind=ANY, length=st.integers(20, 60))
def test_windows_over_joined_questions_begin_alike(kind: Any, length: int, tmp_path: Path) -> None:
    (before, after), space = kind
    tokenizer = around(before, after, space)
    asked = [{"question": prose(n, 4), "answer": f"{prose(n + 100, 3)}\n#### {n}"} for n in range(20)]
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in asked))
    corpus = resolve_corpora([], [f"gsm8k:in-context={path}"])[0]
    sample = sample_corpus(corpus, tokenizer, prompts=6, prompt_tokens=length, seed=3, held_out=2)
    for row in rows(sample):
        assert len(row) == length
        assert row[: len(before)] == ids_of(*before)
        assert all(token > 3 for token in row[len(before) :])  # no special token within
    assert sample.joined_by == "\n\n"


def test_what_joins_the_records_of_a_stream_is_recorded() -> None:
    embedded = resolve_corpora(["embedded"], [])[0]
    sample = sample_corpus(embedded, around(("<s>",), ()), prompts=2, prompt_tokens=9, seed=0)
    assert (sample.opening, sample.joined_by) == (["<s>"], "\n\n")


def test_a_stream_that_has_openings_of_its_own_gets_no_second(tmp_path: Path) -> None:
    tokenizer = around(("<s>",), ())
    path = tmp_path / "s.txt"
    path.write_text("<s>" + "<s>".join("abcdefg" for _ in range(30)))
    sample = sample_corpus(local(path), tokenizer, prompts=26, prompt_tokens=9, seed=0)
    assert all(row[0] == BOS != row[1] and len(row) == 9 for row in sample.prompts)


@pytest.mark.parametrize("before", [("<s>",), ("<s>", "<sop>")])
def test_a_row_with_no_room_for_text_is_refused(before: tuple[str, ...], tmp_path: Path) -> None:
    (path := tmp_path / "s.txt").write_text(prose(0, 60))
    tokenizer = around(before, ())
    with pytest.raises(ConfigError, match=f"beside the {len(before)} that the tokenizer begins one with"):
        sample_corpus(local(path), tokenizer, prompts=1, prompt_tokens=len(before), seed=0)
    sample = sample_corpus(local(path), tokenizer, prompts=1, prompt_tokens=len(before) + 1, seed=0)
    assert sample.prompts[0][:-1] == ids_of(*before)


def test_the_rows_of_a_tokenizer_that_adds_none_are_what_they_always_were(tmp_path: Path) -> None:
    """The sums are those of the first version: by its rows the shipped profile and all results were made."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded_model_folder())
    texts = [
        " ".join(f"Text {n} tells of {k} ships, and of none." for k in range(n % 9 + 1)) for n in range(60)
    ]
    sums = [
        {"question": f"What are {n} and {n + 2} eggs?", "answer": f"There are two more.\n#### {2 * n + 2}"}
        for n in range(60)
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(record) + "\n" for record in sums))
    files = [f"d={jsonl(tmp_path / 'd.jsonl', texts)}", f"gsm8k:in-context={tmp_path / 'q.jsonl'}"]
    found = {}
    for corpus in resolve_corpora(["embedded"], files):
        sample = sample_corpus(corpus, tokenizer, prompts=12, prompt_tokens=64, seed=7, held_out=4)
        drawn = json.dumps([sample.prompts, sample.held_out])
        found[corpus.name] = hashlib.sha256(drawn.encode()).hexdigest()
        assert sample.opening == []
    assert found == {
        "embedded": "5e19eb6c7b530bac5efdd35368ec820d1b1dc7ea21d90fb07f53d0a42149764d",
        "d": "90a71a48610af0547e2e40fa62b439c496f6d964e73e7277c59175afd5dc50ed",
        "gsm8k:in-context": "48a4d172c8ee9e68436ea36c47e982489a8e009790b746261b9b2c95e93e2548",
    }
