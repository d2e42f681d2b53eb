"""Whatever a file is called: every reader finds it, every writer makes it, and nothing else is touched."""

from __future__ import annotations

import gzip
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from command_line import run
from conftest import saved
from corpus_files import Words, words
from documents import document
from hypothesis import example, given, settings
from hypothesis import strategies as st

from skipcal.arch.loading import LoadedModel
from skipcal.commands.generate import _prompt
from skipcal.compare.comparison import load_profiles
from skipcal.configs.run import load_config, without_folder
from skipcal.files.output import Output
from skipcal.profiles.schema import SkipProfile
from skipcal.text.corpora import resolve_corpora, sample_corpus
from skipcal.text.local_files import read_records

ODD = "ab[]{}()*?!~=:;,#@%&$^+-_ .'\"\\|<>\t\n\u00fc\u65e5\u0301\u202e\U0001f600\udcff"
# What a file system takes: no slash, and not more bytes than a name may have with an ending and more.
NAMES = st.text(st.sampled_from(ODD), min_size=1, max_size=40).filter(lambda name: name.strip(".") != "")
TEXTS = [words(100 * n, 9) for n in range(8)]


@contextmanager
def folder() -> Iterator[Path]:
    """An empty one; afterwards there may be nothing in it."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)
        assert os.listdir(name) == []


def any_name(test: Any) -> Any:
    for name in ("[v2]", "-o", "~", "a=b", "$x^$", "__x__", "\udcff", "a\nb", "x" * 200):
        test = example(name=name)(test)
    test = given(name=NAMES)(test)
    return settings(max_examples=40, deadline=None)(test)


SMALL = SkipProfile.model_validate_json(json.dumps(document(layers=2)))


@any_name
def test_text_is_read_from_a_file_of_any_name(name: str) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    tables = {".jsonl": lines, ".json.gz": gzip.compress(lines), ".txt": "\n".join(TEXTS).encode()}
    for ending, content in tables.items():
        with folder() as place:
            path = place / f"{name}{ending}"
            path.write_bytes(content)
            for entry in (str(path), f"mine={path}"):
                (corpus,) = resolve_corpora([], [entry])
                sample = sample_corpus(corpus, Words(), prompts=8, prompt_tokens=9, seed=0)
                assert {row[0] for row in sample.prompts} == {100 * n for n in range(8)}
                assert without_folder(entry).endswith(f"{name}{ending}")
            path.unlink()
    with folder() as place:
        pd.DataFrame({"text": TEXTS}).to_parquet(place / "x")
        path = (place / "x").rename(place / f"{name}.parquet")
        assert [record["text"] for _, record in read_records(path)] == TEXTS
        path.unlink()


@any_name
def test_profiles_settings_and_prompts_are_read_from_a_file_of_any_name(name: str) -> None:
    with folder() as place:
        path = place / f"{name}.json"
        path.write_text(SMALL.to_json())
        assert SkipProfile.load(str(path)).to_json() == SMALL.to_json()
        assert list(load_profiles([str(path)])) == [path.stem]
        path.write_text("prompts: 3\n")
        assert load_config(path, {}).prompts == 3
        assert _prompt(None, path) == "prompts: 3\n"
        path.unlink()


@any_name
def test_outputs_are_written_to_a_file_of_any_name(name: str) -> None:
    with folder() as place:
        path = place / f"{name}.json"
        output = Output(path, overwrite=False)
        assert output.write(SMALL.save) == path
        output.release()
        SMALL.save(path, overwrite=True)
        path.unlink()


@pytest.mark.parametrize("name", ["[v2] {a}*", "-o", "a=b", "$x^$ \u00fc", "_x", "~"])
def test_a_profile_is_made_from_to_and_shown_by_files_of_odd_names(
    worded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    model = saved(worded.model, tmp_path / name)
    text = Path(f"{name}.txt")
    text.write_text(" ".join(f"w{n % 90 + 3}" for n in range(400)))
    run(
        "profile", "--model", Path(model).name, "--data-files", text, "--prompts", "2", "--prompt-tokens",
        "8", "--new-tokens", "6", "--warm-up-tokens", "2", "--cold-s", "1", "--cold-e", "7", "-o",
        f"{name}.json", "--trace", f"{name}.parquet",
    )  # fmt: skip
    run("plot", "-o", f"{name}.svg", "--", f"{name}.json")
    run("report", "--no-tokens", "-o", f"{name}.html", "--", f"{name}.json")
    run("show", "--", f"{name}.json")
    made = {f"{name}{ending}" for ending in ("", ".txt", ".json", ".parquet", ".svg", ".html")}
    assert set(os.listdir()) == made
