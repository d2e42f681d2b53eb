"""Damage to JSON: of its values, of its structure, of its bytes."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

Path = tuple[str | int, ...]

NUMBERS: list[Any] = [
    0, -1, 1, 2, 10**6, 2**31, 2**63 - 1, 2**63, -(2**63), 10**30, -(10**30), 10**4000, 0.0, -0.0, 0.5, 1.5,
    -1.5, 98.0, 5e-324, 1e300, -1e300,
]  # fmt: skip
ATOMS: list[Any] = [
    None, True, False, "", "0.5", "nan", "null", "x" * 3000, "\n", "\x1b[31m", "\u202e", "\u0000",
    "é\U0001f600", "../../etc/passwd", "a.safetensors", [], {}, [None], [[]], {"": 0}, [0.5] * 300,
    {"a": {"b": [1, {"c": None}]}}, ["a", 1, None], "skipcal.profile/1", "gate", "cosine", "static",
]  # fmt: skip
LITERALS = [
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "-1e999",
    "1" * 5000,
    "01",
    "+1",
    "0x1",
    ".5",
    "1.",
    "--1",
    "tru",
]
KEYS = ["", "x", "threshold ", "Threshold", "a\nb", "\x1b[2J", "k" * 5000, "rule", "layers", "0", "é"]
BYTES = [
    b"\xff",
    b"\xfe",
    b"\x00",
    b"\xef\xbb\xbf",
    b"\xc0\x80",
    b"\xed\xa0\x80",
    b'"',
    b"{",
    b"}",
    b",",
    b"\\ud800",
]


def places(value: Any, path: Path = ()) -> list[Path]:
    """Paths of all that a document holds; of a list its ends alone, for its middle is like them."""
    found = [path] if path else []
    if isinstance(value, dict):
        for key in value:
            found += places(value[key], (*path, key))
    elif isinstance(value, list):
        for n in {0, 1, len(value) - 1} & set(range(len(value))):
            found += places(value[n], (*path, n))
    return found


class Mutator:
    """Damages one document, in a way that follows from the seed."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._document = document
        self._text = json.dumps(document)
        self._places = places(document)
        self._values = [at(document, path) for path in self._places]

    def structural(self, random: Random) -> tuple[str, dict[str, Any]]:
        """What was done, and the document after one to three changes."""
        document, told = json.loads(self._text), []
        for _ in range(random.choice((1, 1, 1, 2, 3))):
            path = random.choice(self._places)
            try:
                parent: Any = at(document, path[:-1])
                told.append(self._change(random, parent, path))
            except (KeyError, IndexError, TypeError):  # an earlier change took it away
                continue
        return "; ".join(told), document

    def _change(self, random: Random, parent: Any, path: Path) -> str:
        key = path[-1]
        kinds = ["delete", "number", "atom", "other", "type", "length"]
        kind = random.choice([*kinds, "rename", "add"] if isinstance(parent, dict) else kinds)
        value = parent[key]
        if kind == "delete":
            del parent[key]
        elif kind == "number":
            parent[key] = random.choice(NUMBERS)
        elif kind == "atom":
            parent[key] = copy.deepcopy(random.choice(ATOMS))
        elif kind == "other":  # a value that is right elsewhere
            parent[key] = copy.deepcopy(random.choice(self._values))
        elif kind == "type":
            parent[key] = random.choice([str(value), [value], {"value": value}, bool(value)])
        elif kind == "length":
            whole = value if isinstance(value, list) else parent if isinstance(parent, list) else [value]
            parent[key] = random.choice([whole[:-1], whole + whole[-1:], whole * 2, []])
        elif kind == "rename":
            parent[random.choice(KEYS)] = parent.pop(key)
        else:
            new = random.choice(KEYS)
            parent[new] = copy.deepcopy(random.choice([*ATOMS, *self._values]))
            path = (*path[:-1], new)
        return f"{kind} {'.'.join(map(str, path))}"

    def textual(self, random: Random) -> tuple[str, bytes]:
        """What was done, and the bytes of the document after it."""
        text = self._text
        raw = text.encode()
        kind = random.choice(["cut", "literal", "bytes", "twice", "flip", "nest", "glue"])
        at = random.randrange(len(raw))
        if kind == "cut":
            return kind, raw[:at]
        if kind == "literal":  # in place of a value
            starts = [n + 2 for n in range(len(text) - 2) if text[n : n + 2] == ": "]
            start = random.choice(starts)
            end = min(n for n in (text.find(",", start), text.find("}", start)) if n > 0)
            return kind, (text[:start] + random.choice(LITERALS) + text[end:]).encode()
        if kind == "bytes":
            return kind, raw[:at] + random.choice(BYTES) + raw[at:]
        if kind == "twice":  # a key twice in one object
            key = random.choice([k for k in self._document if k != "layers"])
            return kind, b"{" + json.dumps(key).encode() + b": " + random.choice(
                [b"null", b"{}"]
            ) + b"," + raw[1:]
        if kind == "flip":
            return kind, raw[:at] + bytes([raw[at] ^ (1 << random.randrange(8))]) + raw[at + 1 :]
        if kind == "nest":
            depth = random.choice([10, 150, 300, 2000, 40_000])
            deep = random.choice(
                [b"[" * depth + b"]" * depth, b'{"a":' * depth + b"1" + b"}" * depth, b"[" * depth]
            )
            return kind, raw[:-1] + b', "config": ' + deep + b"}" if random.random() < 0.5 else deep
        return kind, random.choice(
            [raw + raw, b"\xef\xbb\xbf" + raw, raw + b"\x00", text.encode("utf-16"), b" " + raw]
        )


def at(document: Any, path: Path) -> Any:
    for key in path:
        document = document[key]
    return document
