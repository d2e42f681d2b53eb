"""What a judge is asked, and how its verdict is read out of an answer."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Literal

Winner = Literal["A", "B", "tie"]

_RATING = re.compile(r"\[\[\s*(-?[0-9]+(?:\.[0-9]+)?)\s*(?:/\s*10)?\s*\]\]")
_WINNER = re.compile(r"\[\[\s*([ABC])\s*\]\]")
_WINNERS: dict[str, Winner] = {"A": "A", "B": "B", "C": "tie"}


@dataclass(frozen=True)
class JudgeRequest:
    """One question to the judge. `form` says which verdict its answer must hold."""

    id: str
    form: Literal["rating", "pair"]
    system: str
    user: str

    @property
    def prompt_sha256(self) -> str:
        """Of form and both messages: what an answer on disk must have been given to."""
        return hashlib.sha256("\0".join((self.form, self.system, self.user)).encode()).hexdigest()


@dataclass(frozen=True)
class Verdict:
    """What the judge said. `rating` in [0, 10] or `winner`; neither where no attempt gave one."""

    id: str
    rating: float | None
    winner: Winner | None
    raw: str
    attempts: int  # requests sent for it


def read_rating(text: str) -> float | None:
    """The last rating of an answer, as in [[7]], [[7.5]] or [[8/10]]; None if it is not in [0, 10]."""
    marks = _RATING.findall(text)
    return float(marks[-1]) if marks and 0 <= float(marks[-1]) <= 10 else None


def read_winner(text: str) -> Winner | None:
    """The last pair verdict of an answer: [[A]], [[B]], or [[C]] for a tie."""
    marks = _WINNER.findall(text)
    return _WINNERS[marks[-1]] if marks else None
