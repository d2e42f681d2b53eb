"""Files of text, and tokenizers of words and of characters, whose windows can be told by eye."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from skipcal.text.corpora import (
    Corpus,
    CorpusSample,
    resolve_corpora,
    sample_corpus,
)


class Words:
    """A tokenizer of words: their ids are what follows the letter w."""

    def __call__(self, text: str, **kwargs: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word[1:]) for word in text.split()]}


class Characters:
    """A tokenizer of characters, which can be read back."""

    def __call__(self, text: str, **kwargs: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}


class Template(Words):
    """As Words, within the lines of a question; what is not a letter w and a number is token 1."""

    def __call__(self, text: str, **kwargs: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word[1:]) if word[0] == "w" else 1 for word in text.split()]}


def text_of(row: list[int]) -> str:
    return "".join(map(chr, row))


def words(first: int, count: int) -> str:
    return " ".join(f"w{n}" for n in range(first, first + count))


def prose(seed: int, words: int) -> str:
    """Words that no other seed has in this order."""
    draw = random.Random(seed)
    return " ".join("".join(draw.choices("abcdefgh", k=draw.randint(1, 6))) for _ in range(words))


def local(path: Path, **settings: Any) -> Corpus:
    return resolve_corpora([], [str(path)], **settings)[0]


def jsonl(path: Path, texts: list[str], column: str = "text") -> Path:
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts))
    return path


def problems(path: Path, count: int) -> Path:
    """A local file of SVAMP records, all different."""
    bodies = [f"Ann has {n} apples and eats one." for n in range(count)]
    records = [{"body": body, "question": "Is it?", "answer": n - 1.0} for n, body in enumerate(bodies)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def sampled(label: str, path: Path, **settings: Any) -> CorpusSample:
    corpus = resolve_corpora([], [f"{label}={path}"])[0]
    return sample_corpus(corpus, Characters(), **{"prompts": 5, "prompt_tokens": 150, "seed": 3, **settings})
