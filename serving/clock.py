"""Which tokens of a flattened batch are decode steps, at which step of their request, seen how often.

A token at position p of a request with P prompt tokens is decode step p - P; of the prompt's own tokens that
is negative. It is a property of the token, not of the pass in which it is computed. So a prompt may come in
chunks, and what a preempted request has written may be computed again in one pass: it takes the decisions
that it took before.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from skipcal.serving.requests import FULL

Ints: TypeAlias = NDArray[np.integer]
Bools: TypeAlias = NDArray[np.bool_]


@dataclass(frozen=True)
class BatchTokens:
    """The tokens of one pass, those of a request side by side.

    steps:    [tokens], decode step; negative: prompt.
    counted:  [tokens], decode steps that no earlier pass has computed.
    owner:    [tokens], whose it is: a place in `targets` and `requests`.
    targets:  [requests], what each asks for; see `skipcal.serving.requests.target_asked`.
    requests: [requests], their names.
    ended:    names of requests that have ended since the pass before.
    """

    steps: Ints
    counted: Bools
    owner: Ints
    targets: tuple[float | None, ...]
    requests: tuple[str, ...]
    ended: tuple[str, ...] = ()

    @property
    def skips(self) -> Bools:
        """Whether the request wants skipping, [tokens]."""
        return np.array([target != FULL for target in self.targets], dtype=bool)[self.owner]


class Clock:
    """Tells the tokens of each pass, and remembers of each request how far it has been counted."""

    def __init__(self) -> None:
        """No request has been seen."""
        self._ends: dict[str, int] = {}  # by request: the first decode step that is not counted yet

    def tokens(
        self,
        requests: Sequence[str],
        *,
        computed: Ints,
        prompt: Ints,
        starts: Ints,
        targets: Sequence[float | None],
        alive: Collection[str],
    ) -> BatchTokens:
        """The tokens of a pass.

        computed: tokens of each request that earlier passes have computed, [requests]; prompt: tokens of its
        prompt; starts: where its tokens begin in the batch, and the end of all, [requests + 1]; targets: what
        it asks for; alive: the requests that have not finished, preempted ones too.
        """
        ended = tuple(name for name in self._ends if name not in alive)
        for name in ended:
            del self._ends[name]
        steps = decode_steps(computed, prompt, starts)
        lengths = np.diff(starts)
        ends = np.array([self._ends.get(name, 0) for name in requests], dtype=np.int64)
        counted = steps >= np.repeat(ends, lengths)
        after = np.maximum(ends, computed - prompt + lengths)
        self._ends.update(zip(requests, after.tolist(), strict=True))
        owner = np.repeat(np.arange(len(lengths)), lengths)
        return BatchTokens(steps, counted, owner, tuple(targets), tuple(requests), ended)


def decode_steps(computed: Ints, prompt: Ints, starts: Ints) -> Ints:
    """Decode step of each token, [tokens]; the arguments are those of `Clock.tokens`."""
    first = computed - prompt
    if starts[-1] == len(first):  # each request has one token, as while all of them decode
        return first
    steps: Ints = np.repeat(first - starts[:-1], np.diff(starts)) + np.arange(starts[-1])
    return steps
