"""Calibration text: how prompts are cut from corpora.

A *document* corpus gives one prompt per document, its first tokens. A *stream* corpus is one
text, cut into consecutive windows. A *question set* gives documents, or in the formats that join
items random windows over several of them. Each prompt begins as `skipcal.text.opening` says. What
is taken is drawn by seed; so are the held-out prompts, which share no document, window or item with
the others.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any

from skipcal.errors import ConfigError, Unavailable, first_words
from skipcal.text.formats import JOINED_FORMATS, QUESTION_SETS, SEPARATOR
from skipcal.text.known import KNOWN_CORPORA, Corpus, likely, resolve_corpora
from skipcal.text.local_files import read_records, read_text, whole_characters
from skipcal.text.opening import opening, opening_names, text_ids, window
from skipcal.text.retry import retried

__all__ = [
    "KNOWN_CORPORA",
    "Corpus",
    "CorpusSample",
    "file_sha256",
    "resolve_corpora",
    "sample_corpus",
]

SHUFFLE_BUFFER = 10_000  # documents of a streamed corpus among which the seed draws
STREAM_CHARACTERS = 20_000_000  # of a stream corpus, its beginning; WikiText-2 has 11 million
RECORD_SEPARATOR = ""  # between the records of a stream corpus: those of WikiText are lines, with their ends
OVERLAP_TOKENS = 16  # a run this long in two rows is no chance; templates and idioms are shorter
_TRIES = 8  # windows drawn over joined items for each that is wanted, before a set counts as too small


@dataclass(frozen=True)
class CorpusSample:
    """Prompts cut from one corpus, as token ids: each of `prompt_tokens` tokens.

    opening:   the special tokens that each begins with, by name.
    joined_by: what stands between the texts that were made one before it was cut; None: none were.
    """

    corpus: Corpus
    prompts: list[list[int]]
    held_out: list[list[int]]
    documents: int  # read, short ones included; 1 for a stream
    short_documents: int
    sha256: str | None
    opening: list[str]
    joined_by: str | None


def sample_corpus(
    corpus: Corpus,
    tokenizer: Any,
    *,
    prompts: int,
    prompt_tokens: int,
    seed: int,
    held_out: int = 0,
    avoid: Iterable[list[int]] = (),
) -> CorpusSample:
    """Draw `prompts` + `held_out` different prompts of `prompt_tokens` tokens each.

    avoid: rows of token ids; text that has OVERLAP_TOKENS tokens in a row with one is passed over.
           Shorter rows exclude nothing.
    Raises Unavailable when the text cannot be read, or is too short for so many; ConfigError when the
    tokens that the tokenizer begins a text with leave no room for one.
    """
    wanted = prompts + held_out
    begun = len(opening(tokenizer))
    if prompt_tokens <= begun:
        raise ConfigError(
            f"rows of {prompt_tokens} tokens leave no room for text beside the {begun} that the tokenizer "
            "begins one with; ask for longer ones"
        )
    on_hub = not corpus.local and corpus.source != "embedded"
    if on_hub and (corpus.revision is None or corpus.revision.startswith("refs/")):
        found = retried(lambda: _commit(corpus), f"corpus {corpus.name!r}")
        corpus = replace(corpus, revision=found)
    digest = file_sha256(Path(corpus.source)) if corpus.local else None
    used = _Runs(avoid)

    def draw() -> tuple[list[list[int]], int, int]:
        if corpus.format in JOINED_FORMATS:
            return _joined(corpus, tokenizer, (prompts, held_out), prompt_tokens, seed, used)
        read = _windows if corpus.stream else _openings
        return read(corpus, tokenizer, wanted, prompt_tokens, seed, used)

    rows, documents, short = retried(draw, f"corpus {corpus.name!r}") if on_hub else draw()
    if corpus.format in JOINED_FORMATS:
        what = "windows over joined questions"
    else:
        what = "windows" if corpus.stream else f"documents (of {documents})"
    if len(rows) < wanted:
        apart = " apart from the text to be avoided" if used else ""
        raise Unavailable(
            f"corpus {corpus.name!r} is too short: it has {len(rows)} {what} of {prompt_tokens} tokens"
            f"{apart}, {wanted} are wanted; ask for fewer or shorter ones, or pass more text"
        )
    return CorpusSample(
        corpus=replace(corpus, source=Path(corpus.source).name) if corpus.local else corpus,
        prompts=rows[:prompts],
        held_out=rows[prompts:],
        documents=documents,
        short_documents=short,
        sha256=digest,
        opening=opening_names(tokenizer),
        joined_by=_joined_by(corpus),
    )


class _Runs:
    """Rows of tokens that other rows must not repeat, by their runs of OVERLAP_TOKENS tokens."""

    def __init__(self, rows: Iterable[list[int]]) -> None:
        self._runs = {run for row in rows for run in self._of(row)}

    def __bool__(self) -> bool:
        return bool(self._runs)

    def meet(self, ids: list[int]) -> bool:
        """Whether a run of `ids` is a run of the rows."""
        return bool(self._runs) and not self._runs.isdisjoint(self._of(ids))

    @staticmethod
    def _of(ids: list[int]) -> Iterator[tuple[int, ...]]:
        return (tuple(ids[i : i + OVERLAP_TOKENS]) for i in range(len(ids) - OVERLAP_TOKENS + 1))


def _windows(
    corpus: Corpus, tokenizer: Any, wanted: int, length: int, seed: int, used: _Runs
) -> tuple[list[list[int]], int, int]:
    """Windows of a stream, drawn by seed among all of its first STREAM_CHARACTERS."""
    ids = text_ids(tokenizer, _stream_text(corpus))
    begun = opening(tokenizer)
    room = length - len(begun)

    def free(row: list[int]) -> bool:
        return len(row) == length and not used.meet(row[len(begun) :])

    starts = [
        start for start in range(0, len(ids) - room + 1, room) if free(window(ids, start, length, begun))
    ]
    drawn = random.Random(seed).sample(starts, min(wanted, len(starts)))
    return [window(ids, start, length, begun) for start in drawn], 1, 0


def _openings(
    corpus: Corpus, tokenizer: Any, wanted: int, length: int, seed: int, used: _Runs
) -> tuple[list[list[int]], int, int]:
    """First tokens of documents, in an order drawn by seed; short documents are passed over."""
    rows: list[list[int]] = []
    begun = opening(tokenizer)
    documents = short = 0
    with _data_errors(corpus):
        for text in _shuffled_texts(corpus, seed):
            if len(rows) == wanted:
                break
            documents += 1
            row = window(text_ids(tokenizer, text), 0, length, begun)
            if len(row) < length:
                short += 1
            elif not used.meet(row[len(begun) :]):
                rows.append(row)
    return rows, documents, short


def _joined(
    corpus: Corpus, tokenizer: Any, wanted: tuple[int, int], length: int, seed: int, used: _Runs
) -> tuple[list[list[int]], int, int]:
    """Windows over joined items for prompts and held-out prompts, the number of items read, and 0.

    Each of the two draws from items of its own, in proportion to the windows wanted.
    """
    with _data_errors(corpus):
        items = list(islice(_shuffled_texts(corpus, seed), SHUFFLE_BUFFER))
    free = [text for text in items if not used or not used.meet(text_ids(tokenizer, text))]
    cut = round(len(free) * wanted[0] / sum(wanted))
    draw = random.Random(seed)
    parts = ((free[:cut], wanted[0]), (free[cut:], wanted[1]))
    rows = [row for texts, count in parts for row in _item_windows(texts, tokenizer, count, length, draw)]
    return rows, len(items), 0


def _item_windows(
    texts: Sequence[str], tokenizer: Any, count: int, length: int, draw: random.Random
) -> list[list[int]]:
    """Up to `count` different windows; every item is used before one is used again."""
    deck = _endless(texts, draw)
    begun = opening(tokenizer)
    room = length - len(begun)
    rows: list[list[int]] = []
    for _ in range(_TRIES * count):
        if len(rows) == count:
            break
        chosen: dict[str, None] = {}  # a set that keeps the order
        ids: list[int] = []
        while len(ids) <= room and len(chosen) < len(set(texts)):
            chosen[next(deck)] = None
            ids = text_ids(tokenizer, SEPARATOR.join(chosen))
        if len(ids) < room:
            break  # all items together are too short
        start = draw.randrange(len(ids) - room + 1)
        row = window(ids, start, length, begun)
        if len(row) == length and row not in rows:
            rows.append(row)
    return rows


def _endless(texts: Sequence[str], draw: random.Random) -> Iterator[str]:
    while True:
        yield from draw.sample(texts, len(texts))


def _stream_text(corpus: Corpus) -> str:
    if corpus.source == "embedded":
        folder = resources.files("skipcal.text") / "embedded"
        files = sorted((f for f in folder.iterdir() if f.name.endswith(".txt")), key=lambda f: f.name)
        return SEPARATOR.join(file.read_text(encoding="utf-8") for file in files)
    if corpus.local:
        return _read_text(Path(corpus.source))
    with _data_errors(corpus):
        pieces, size = [], 0
        for piece in _texts(_records(corpus), corpus):
            pieces.append(piece)
            size += len(piece)
            if size >= STREAM_CHARACTERS:
                break
    return RECORD_SEPARATOR.join(pieces)


def _joined_by(corpus: Corpus) -> str | None:
    if corpus.source == "embedded" or corpus.format in JOINED_FORMATS:
        return SEPARATOR
    return RECORD_SEPARATOR if corpus.stream and not corpus.local else None


def _read_text(path: Path) -> str:
    text = read_text(path, STREAM_CHARACTERS)
    if not text.strip():
        raise Unavailable(f"{path} is empty; pass a file with text in it")
    return text


def _records(corpus: Corpus) -> Any:
    from datasets import IterableDataset, load_dataset

    if corpus.local:  # not by load_dataset, for which a path is a pattern
        return IterableDataset.from_generator(_local_records, gen_kwargs={"path": corpus.source})
    return load_dataset(
        corpus.source,
        corpus.config,
        data_files={corpus.split: corpus.data_files} if corpus.data_files else None,
        split=corpus.split,
        revision=corpus.revision,
        streaming=True,
    )


def _local_records(path: str) -> Iterator[dict[str, Any]]:
    return (record for _, record in read_records(Path(path)))


def _shuffled_texts(corpus: Corpus, seed: int) -> Iterator[str]:
    return _texts(_records(corpus).shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER), corpus)


def _texts(records: Iterable[dict[str, Any]], corpus: Corpus) -> Iterator[str]:
    """The text of each record; empty for one whose text is missing, unless that is so in all of them."""
    columns: set[str] = set()
    found = 0
    for record in records:
        if corpus.questions is not None and corpus.format is not None:
            yield QUESTION_SETS[corpus.questions].item(record, corpus.format).text(corpus.format)
            continue
        columns |= record.keys()
        text = record.get(corpus.text_column)
        # On the hub every record has all columns. A file's records may differ, and it has an end.
        lacking = text is None and (corpus.local or corpus.text_column in record)
        if not lacking and not isinstance(text, str):
            raise _no_text(corpus, columns)
        found += not lacking
        yield whole_characters(text or "")
    if columns and not found:
        raise _no_text(corpus, columns)


def _no_text(corpus: Corpus, columns: Iterable[str]) -> Unavailable:
    as_questions = ", or read it as questions with NAME:in-context=PATH"
    return Unavailable(
        f"corpus {corpus.name!r} has no text in column {corpus.text_column!r} "
        f"(columns: {', '.join(sorted(columns)) or 'none'}); name one with --text-column"
        f"{as_questions if corpus.name in QUESTION_SETS else ''}"
    )


@contextmanager
def _data_errors(corpus: Corpus) -> Iterator[None]:
    """Turn whatever a data library raises into one line; there are dozens of classes."""
    try:
        yield
    except Unavailable:
        raise
    except Exception as error:
        reason = first_words(error)
        advice = (
            "check the file"
            if corpus.local
            else likely(corpus.source)
            + "check the name and the network, or pass local text with --data-files PATH"
        )
        raise Unavailable(
            f"corpus {corpus.name!r} ({corpus.source}) could not be read "
            f"({type(error).__name__}: {reason}); {advice}"
        ) from error


def _commit(corpus: Corpus) -> str | None:
    """The commit a hub data set is at now: it is read at that commit, and recorded."""
    from huggingface_hub import HfApi

    with _data_errors(corpus):
        return HfApi().dataset_info(corpus.source, revision=corpus.revision).sha


def file_sha256(path: Path) -> str:
    """Sha256 of a data file. Raises Unavailable if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise Unavailable(f"{path} cannot be read ({error.strerror}); check the path") from error
