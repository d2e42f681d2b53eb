"""Calibration text: which corpora there are, and how prompts are cut from them.

A *document* corpus gives one prompt per document, its first tokens. A *stream* corpus is one
text, cut into consecutive windows. Which documents or windows are taken is drawn by seed; so are
the held-out prompts, which never overlap the others.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any

from skipcal.errors import ConfigError, Unavailable

SHUFFLE_BUFFER = 10_000  # documents of a streamed corpus among which the seed draws
STREAM_CHARACTERS = 20_000_000  # of a stream corpus, its beginning; WikiText-2 has 11 million
_TEXT_SUFFIXES = (".txt",)
_TABLE_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class Corpus:
    """Where a text is. `source` is a hub id, "embedded", or a path when `local`."""

    name: str
    source: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    data_files: str | None = None
    text_column: str = "text"
    stream: bool = False
    local: bool = False


KNOWN_CORPORA = {
    corpus.name: corpus
    for corpus in (
        Corpus(
            "wikitext",
            "Salesforce/wikitext",
            config="wikitext-2-raw-v1",
            revision="b08601e04326c79dfdd32d625aee71d232d685c3",
            stream=True,  # its records are lines
        ),
        Corpus(
            "c4",
            "allenai/c4",
            config="en",
            revision="1588ec454efa1a09f29cd18ddd04fe05fc8653a2",
            data_files="en/c4-train.00000-of-01024.json.gz",  # listing all shards is slow and rate limited
        ),
        Corpus("embedded", "embedded", stream=True),
    )
}


@dataclass(frozen=True)
class CorpusSample:
    """Prompts cut from one corpus, as token ids: each of `prompt_tokens` tokens."""

    corpus: Corpus
    prompts: list[list[int]]
    held_out: list[list[int]]
    documents: int  # read, short ones included; 1 for a stream
    short_documents: int
    sha256: str | None


def resolve_corpora(
    names: Iterable[str], data_files: Iterable[str], *, text_column: str = "text"
) -> list[Corpus]:
    """Corpora by name (a known one, else a hub id) and by local file (PATH or NAME=PATH)."""
    corpora = []
    for name in names:
        known = KNOWN_CORPORA.get(name, Corpus(name, name))
        corpora.append(replace(known, text_column=text_column))
    for entry in data_files:
        label, separator, path = entry.partition("=")
        if not separator or Path(entry).exists():
            label, path = Path(entry).stem, entry
        suffix = Path(path).suffix.lower()
        if suffix not in (*_TEXT_SUFFIXES, *_TABLE_BUILDERS):
            raise ConfigError(
                f"data file {path!r} has the ending {suffix!r}; expected .txt, .jsonl, .json or .parquet"
            )
        stream = suffix in _TEXT_SUFFIXES
        corpora.append(Corpus(label, path, stream=stream, local=True, text_column=text_column))
    repeated = {c.name for c in corpora if sum(c.name == other.name for other in corpora) > 1}
    if repeated or "pooled" in {c.name for c in corpora}:
        wrong = sorted(repeated) or ["pooled"]
        raise ConfigError(f"corpus name {wrong[0]!r} is taken; name data files apart with NAME=PATH")
    return corpora


def sample_corpus(
    corpus: Corpus,
    tokenizer: Any,
    *,
    prompts: int,
    prompt_tokens: int,
    seed: int,
    held_out: int = 0,
) -> CorpusSample:
    """Draw `prompts` + `held_out` different prompts of `prompt_tokens` tokens each.

    Raises Unavailable when the text cannot be read, or is too short for so many.
    """
    wanted = prompts + held_out
    if not corpus.local and corpus.source != "embedded" and corpus.revision is None:
        corpus = replace(corpus, revision=_commit(corpus))
    digest = _sha256(Path(corpus.source)) if corpus.local else None
    if corpus.stream:
        rows, documents, short = _windows(corpus, tokenizer, wanted, prompt_tokens, seed)
    else:
        rows, documents, short = _openings(corpus, tokenizer, wanted, prompt_tokens, seed)
    if len(rows) < wanted:
        what = "windows" if corpus.stream else f"documents (of {documents})"
        raise Unavailable(
            f"corpus {corpus.name!r} is too short: it has {len(rows)} {what} of {prompt_tokens} tokens, "
            f"{wanted} are wanted; lower --prompts or --prompt-tokens, or pass more text"
        )
    return CorpusSample(
        corpus=replace(corpus, source=Path(corpus.source).name) if corpus.local else corpus,
        prompts=rows[:prompts],
        held_out=rows[prompts:],
        documents=documents,
        short_documents=short,
        sha256=digest,
    )


def _windows(
    corpus: Corpus, tokenizer: Any, wanted: int, length: int, seed: int
) -> tuple[list[list[int]], int, int]:
    """Windows of a stream, drawn by seed among all of its first STREAM_CHARACTERS."""
    text = _stream_text(corpus)
    # verbose=False: the stream is longer than the model's context, and is never given to it whole.
    ids = tokenizer(text, verbose=False)["input_ids"]
    starts = range(0, len(ids) - length + 1, length)
    drawn = random.Random(seed).sample(starts, min(wanted, len(starts)))
    return [ids[start : start + length] for start in drawn], 1, 0


def _openings(
    corpus: Corpus, tokenizer: Any, wanted: int, length: int, seed: int
) -> tuple[list[list[int]], int, int]:
    """First tokens of documents, in an order drawn by seed; short documents are passed over."""
    rows: list[list[int]] = []
    documents = short = 0
    with _data_errors(corpus):
        records = _records(corpus).shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        for text in _texts(records, corpus):
            if len(rows) == wanted:
                break
            documents += 1
            ids = tokenizer(text, verbose=False)["input_ids"]
            if len(ids) < length:
                short += 1
            else:
                rows.append(ids[:length])
    return rows, documents, short


def _stream_text(corpus: Corpus) -> str:
    if corpus.source == "embedded":
        folder = resources.files("skipcal.calibrate") / "text"
        files = sorted((f for f in folder.iterdir() if f.name.endswith(".txt")), key=lambda f: f.name)
        return "\n\n".join(file.read_text(encoding="utf-8") for file in files)
    if corpus.local:
        return _read_text(Path(corpus.source))
    with _data_errors(corpus):
        pieces, size = [], 0
        for piece in _texts(_records(corpus), corpus):
            pieces.append(piece)
            size += len(piece)
            if size >= STREAM_CHARACTERS:
                break
    return "".join(pieces)


def _read_text(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(STREAM_CHARACTERS)
    except UnicodeDecodeError as error:
        raise Unavailable(f"{path} is not UTF-8 text (byte {error.start}); pass a text file") from error
    except OSError as error:
        raise Unavailable(f"{path} cannot be read ({error.strerror}); check the path") from error
    if "\0" in text:
        raise Unavailable(f"{path} is binary, not text; pass a UTF-8 text file")
    if not text.strip():
        raise Unavailable(f"{path} is empty; pass a file with text in it")
    return text


def _records(corpus: Corpus) -> Any:
    from datasets import load_dataset

    if corpus.local:
        path = Path(corpus.source)
        if not path.is_file():
            raise Unavailable(f"{path} cannot be read (no such file); check the path")
        builder = _TABLE_BUILDERS[path.suffix.lower()]
        return load_dataset(builder, data_files=str(path), split="train", streaming=True)
    return load_dataset(
        corpus.source,
        corpus.config,
        data_files={corpus.split: corpus.data_files} if corpus.data_files else None,
        split=corpus.split,
        revision=corpus.revision,
        streaming=True,
    )


def _texts(records: Iterable[dict[str, Any]], corpus: Corpus) -> Iterator[str]:
    for record in records:
        text = record.get(corpus.text_column)
        if not isinstance(text, str):
            columns = ", ".join(sorted(record)) or "none"
            raise Unavailable(
                f"corpus {corpus.name!r} has no text in column {corpus.text_column!r} "
                f"(columns: {columns}); name one with --text-column"
            )
        yield text


@contextmanager
def _data_errors(corpus: Corpus) -> Iterator[None]:
    """Turn whatever a data library raises into one line; there are dozens of classes."""
    try:
        yield
    except Unavailable:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        advice = (
            "check the file"
            if corpus.local
            else "check the name and the network, or pass local text with --data-files PATH"
        )
        raise Unavailable(
            f"corpus {corpus.name!r} ({corpus.source}) could not be read "
            f"({type(error).__name__}: {reason}); {advice}"
        ) from error


def _commit(corpus: Corpus) -> str | None:
    """The commit a hub data set is at now: it is read at that commit, and recorded."""
    from huggingface_hub import HfApi

    with _data_errors(corpus):
        return HfApi().dataset_info(corpus.source).sha


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise Unavailable(f"{path} cannot be read ({error.strerror}); check the path") from error


def batches(rows: list[list[int]], size: int) -> Iterator[list[list[int]]]:
    """Consecutive groups of at most `size` rows."""
    remaining = iter(rows)
    while group := list(islice(remaining, size)):
        yield group
