"""How local files are read: any name, compressed or not, records with holes, marks of editors."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from corpus_files import Words, jsonl, local, words

from skipcal.errors import ConfigError, Unavailable
from skipcal.evaluation.judge.prompts import load_judge_prompts
from skipcal.evaluation.tasks.freebaseqa import read_questions
from skipcal.text.corpora import SHUFFLE_BUFFER, CorpusSample, resolve_corpora, sample_corpus
from skipcal.text.local_files import ending, read_records, stem

TEXTS = [words(100 * n, 9) for n in range(30)]
PACK: dict[str, Any] = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
ODD = [
    "a [v2]",
    "a*b?",
    "{a,b}",
    "a::b",
    "http:",
    "!x",
    "#x@1",
    "x=y",
    "~",
    "-x",
    "ü 日本",
    ".hidden",
    "__x__",
]


def drawn(path: Path, **settings: Any) -> CorpusSample:
    return sample_corpus(local(path), Words(), **{"prompts": 20, "prompt_tokens": 4, "seed": 3, **settings})


@pytest.mark.parametrize("name", ODD)
def test_a_path_is_no_pattern(tmp_path: Path, name: str) -> None:
    plain = jsonl(tmp_path / "plain.jsonl", TEXTS)
    (tmp_path / name).mkdir()
    for other in ("a v", "a 2", "axb", "a"):  # what a pattern would find instead
        jsonl(tmp_path / f"{other}.jsonl", [words(9000, 9)] * 30)
    odd = jsonl(tmp_path / name / f"{name}.jsonl", TEXTS)
    assert drawn(odd).prompts == drawn(plain).prompts
    packed = tmp_path / name / f"{name}.jsonl.gz"
    packed.write_bytes(gzip.compress(odd.read_bytes()))
    assert drawn(packed).prompts == drawn(plain).prompts
    table = tmp_path / name / f"{name}.parquet"
    pd.DataFrame({"text": TEXTS}).to_parquet(table)
    assert drawn(table).prompts == drawn(plain).prompts


@pytest.mark.parametrize("name", ["d.jsonl", "d.parquet"])
def test_documents_are_drawn_as_the_library_draws_them(tmp_path: Path, name: str) -> None:
    """Profiles that were made before files were read here are drawn again by their seed."""
    from datasets import load_dataset

    path = tmp_path / name
    if name == "d.jsonl":
        jsonl(path, TEXTS)
    else:
        pd.DataFrame({"text": TEXTS}).to_parquet(path, row_group_size=7)
    kind = {"d.jsonl": "json", "d.parquet": "parquet"}[name]
    theirs = load_dataset(kind, data_files=str(path), split="train", streaming=True)
    order = [record["text"] for record in theirs.shuffle(seed=3, buffer_size=SHUFFLE_BUFFER)]
    assert drawn(path).prompts == [Words()(text)["input_ids"][:4] for text in order[:20]]


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".txt"])
def test_a_compressed_file_is_the_file_it_holds(tmp_path: Path, kind: str, packed: str) -> None:
    plain = tmp_path / f"plain{kind}"
    if kind == ".txt":
        plain.write_text("\n\n".join(TEXTS))
    else:
        jsonl(plain, TEXTS)
    path = tmp_path / f"d{kind}{packed}"
    path.write_bytes(PACK[packed](plain.read_bytes()))
    (corpus,) = resolve_corpora([], [str(path)])
    assert (corpus.name, corpus.stream) == ("d", kind == ".txt")
    assert drawn(path).prompts == drawn(plain).prompts


@pytest.mark.parametrize("packed", PACK)
def test_a_damaged_compressed_file_is_refused_in_one_line(tmp_path: Path, packed: str) -> None:
    whole = PACK[packed](json.dumps({"text": words(0, 999)}).encode())
    for content in (b"no archive", whole[: len(whole) // 2]):
        for kind in (".jsonl", ".txt"):
            path = tmp_path / f"d{kind}{packed}"
            path.write_bytes(content)
            with pytest.raises(Unavailable, match=r"could not be read") as refused:
                drawn(path)
            assert "\n" not in str(refused.value)


def test_what_a_name_says() -> None:
    assert ending(Path("A.JSONL.GZ")) == ".jsonl"
    assert (ending(Path("a.tar.gz")), ending(Path("a.parquet.gz"))) == (".gz", ".gz")
    assert (stem(Path("x/c4.v1.json.gz")), stem(Path("a.b.txt")), stem(Path(".txt"))) == (
        "c4.v1",
        "a.b",
        ".txt",
    )
    with pytest.raises(ConfigError, match=r"'a\.csv\.gz' has the ending '\.gz'; expected \.txt, \.jsonl or"):
        resolve_corpora([], ["a.csv.gz"])


@pytest.mark.parametrize("hole", [{"text": None}, {"text": ""}, {"id": 7}, {}])
def test_a_record_without_text_is_passed_over_and_counted(tmp_path: Path, hole: dict[str, Any]) -> None:
    records = [hole if n == 5 else {"text": text, "id": n} for n, text in enumerate(TEXTS)]
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    sample = drawn(path, prompts=29)
    assert sorted(row[0] for row in sample.prompts) == [100 * n for n in range(30) if n != 5]
    with pytest.raises(Unavailable, match=r"it has 29 documents \(of 30\) of 4 tokens"):
        drawn(path, prompts=30)


def test_a_null_of_a_table_is_passed_over_and_counted(tmp_path: Path) -> None:
    pd.DataFrame({"text": [*TEXTS, None]}).to_parquet(tmp_path / "d.parquet")
    with pytest.raises(Unavailable, match=r"it has 30 documents \(of 31\) of 4 tokens"):
        drawn(tmp_path / "d.parquet", prompts=31)


@pytest.mark.parametrize(
    ("records", "columns"),
    [([{"body": "w1", "n": 2}, {"body": "w1", "m": 2}], "body, m, n"), ([{"text": None}] * 3, "text")],
)
def test_a_file_without_any_text_is_refused_with_its_columns(
    tmp_path: Path, records: list[dict[str, Any]], columns: str
) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(Unavailable, match=rf"no text in column 'text' \(columns: {columns}\); name one"):
        drawn(path)


def test_json_is_one_record_a_line_or_an_array(tmp_path: Path) -> None:
    lines, array = jsonl(tmp_path / "lines.json", TEXTS), tmp_path / "array.json"
    array.write_text(json.dumps([{"text": text} for text in TEXTS], indent=1))
    assert drawn(array).prompts == drawn(lines).prompts
    array.write_text('[{"text": "w1"}, 7]')
    with pytest.raises(
        Unavailable, match=r"array\.json, entry 2 is no JSON object; expected one record a line"
    ):
        drawn(array)
    array.write_text('[{"text": "w1"}')
    with pytest.raises(Unavailable, match=r"array\.json is no valid JSON"):
        drawn(array)


def test_text_may_hold_line_separators_and_half_a_character(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "w1\u2028w2"}\r\n\n{"text": "w3 w4 \\ud800"}\n', newline="")
    assert [record["text"] for _, record in read_records(path)] == ["w1\u2028w2", "w3 w4 \ud800"]

    class Strict(Words):
        def __call__(self, text: str, **kwargs: Any) -> dict[str, list[int]]:
            return super().__call__(text.encode().decode().replace("?", ""))

    assert len(sample_corpus(local(path), Strict(), prompts=2, prompt_tokens=2, seed=0).prompts) == 2


MARK = b"\xef\xbb\xbf"


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    for name in ("d.jsonl", "d.txt", "d.jsonl.gz"):
        plain, marked = tmp_path / name, tmp_path / f"marked-{name}"
        content = (json.dumps({"text": TEXTS[0]}) if "json" in name else TEXTS[0]).encode()
        pack = gzip.compress if name.endswith(".gz") else bytes
        plain.write_bytes(pack(content))
        marked.write_bytes(pack(MARK + content))
        assert drawn(marked, prompts=1).prompts == drawn(plain, prompts=1).prompts


def test_the_files_of_tasks_may_be_compressed_and_marked(tmp_path: Path) -> None:
    record = {"id": "1", "question": "Who?", "answers": ["Ada"]}
    release = {"Questions": [{"RawQuestion": "Who?", "Parses": [{"Answers": [{"AnswersName": ["Ada"]}]}]}]}
    contents = {"q.jsonl": json.dumps(record), "q.json": json.dumps(release)}
    for name, content in contents.items():
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(MARK + content.encode()))
        (question,) = read_questions(tmp_path / f"{name}.gz").values()
        assert (question.text, question.aliases) == ("Who?", ("Ada",))
    (tmp_path / "p.jsonl").write_bytes(MARK + b"{")
    with pytest.raises(ConfigError, match=r"p\.jsonl:1: not JSON \(Expecting property name"):
        load_judge_prompts(tmp_path / "p.jsonl")
