"""Counting, pass by pass: of all requests together, and of each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from operator import add

import numpy as np
from torch import Tensor

from skipcal.serving.clock import BatchTokens, Bools
from skipcal.serving.counts import KEPT, RequestReport, ServingReport
from skipcal.serving.requests import FULL


class Tally:
    """The counts of an engine.

    report: over all requests since it started.
    """

    def __init__(self, method: str, layers: int) -> None:
        """method: what a request gets that says nothing. Nothing has run."""
        self.report = ServingReport(
            method=method, skipped_per_layer=[0] * layers, unread_per_layer=[0] * layers
        )
        self._running: dict[str, RequestReport] = {}
        self._ended: dict[str, RequestReport] = {}  # the oldest first, KEPT at most

    def requests(self, request_id: str | None = None) -> list[RequestReport]:
        """Of the answers to a request, by the id that its client knows; None: all that are kept."""
        kept = [*self._ended.values(), *self._running.values()]
        return kept if request_id is None else [r for r in kept if belongs(r.request_id, request_id)]

    def add(
        self,
        tokens: BatchTokens,
        ruled: Bools,
        skipped: Mapping[int, Tensor | bool],
        methods: Sequence[str],
    ) -> list[RequestReport]:
        """Count a pass; the reports of its requests, [requests].

        ruled: tokens to which a rule applied, [tokens]; skipped: by layer which of these skipped, [ruled], or
        whether the only one did; methods: what each request is judged by, [requests].
        """
        self._end(tokens.ended)
        each = [self._of(tokens, n, method) for n, method in enumerate(methods)]
        count = len(each)
        steps = np.bincount(tokens.owner[tokens.counted], minlength=count).tolist()
        after = np.bincount(tokens.owner[tokens.counted & ruled], minlength=count).tolist()
        for request, decoded, past in zip(each, steps, after, strict=True):
            request.decode_steps += decoded
            request.decode_steps_after_warm_up += past
            if request.target_skip_ratio == FULL:
                self.report.opted_out_steps += decoded
            else:
                self.report.decode_steps += decoded
                self.report.decode_steps_after_warm_up += past
        if ruled.any():
            add_skips = self._add_skips_of_one if len(ruled) == 1 else self._add_skips
            add_skips(tokens, ruled, skipped, each)
        return each

    def add_later(self, skipped: Iterable[tuple[RequestReport, list[int]]], unread: list[int]) -> None:
        """Count what passes have skipped that were added without it.

        skipped: by layer, of the requests whose reports `add` has returned; unread: FFNs, by layer.
        """
        for request, by_layer in skipped:
            _add(request.skipped_per_layer, by_layer)
            _add(self.report.skipped_per_layer, by_layer)
        _add(self.report.unread_per_layer, unread)

    def _add_skips(
        self,
        tokens: BatchTokens,
        ruled: Bools,
        skipped: Mapping[int, Tensor | bool],
        each: Sequence[RequestReport],
    ) -> None:
        mask = np.zeros((len(self.report.skipped_per_layer), np.count_nonzero(ruled)), dtype=bool)
        for layer, skip in skipped.items():
            mask[layer] = skip.cpu().numpy() if isinstance(skip, Tensor) else skip
        self.report.passes += 1
        if ruled.all():
            _add(self.report.unread_per_layer, np.all(mask, axis=1).tolist())
        once = mask & tokens.counted[ruled]
        owner = tokens.owner[ruled]
        _add(self.report.skipped_per_layer, once.sum(axis=1).tolist())
        for n in np.unique(owner):
            _add(each[n].skipped_per_layer, once[:, owner == n].sum(axis=1).tolist())

    def _add_skips_of_one(
        self,
        tokens: BatchTokens,
        ruled: Bools,
        skipped: Mapping[int, Tensor | bool],
        each: Sequence[RequestReport],
    ) -> None:
        """The same for a pass of a single token, the usual one of a lone request."""
        self.report.passes += 1
        once = bool(tokens.counted[0])
        for layer in [layer for layer, skip in skipped.items() if skip]:
            self.report.unread_per_layer[layer] += 1
            self.report.skipped_per_layer[layer] += once
            each[0].skipped_per_layer[layer] += once

    def _of(self, tokens: BatchTokens, place: int, method: str) -> RequestReport:
        name, target = tokens.requests[place], tokens.targets[place]
        found = self._running.get(name)
        if found is None:
            found = self._running[name] = RequestReport(
                request_id=name,
                method="full" if target == FULL else method,
                target_skip_ratio=target,
                skipped_per_layer=[0] * len(self.report.skipped_per_layer),
            )
        return found

    def _end(self, names: Sequence[str]) -> None:
        for name in names:
            if name in self._running:  # else its only pass has failed
                self._ended[name] = self._running.pop(name)
        while len(self._ended) > KEPT:
            del self._ended[next(iter(self._ended))]


# What vLLM puts after the id: the place of a prompt, where one request may have several of them.
PLACES = {"cmpl-": r"(-\d+)?", "resp_": r"(_\d+)?"}


def belongs(name: str, request_id: str) -> bool:
    """Whether vLLM calls an answer to the request `name`.

    It puts an answer's number before the id where a request asks for several, and eight characters last.
    """
    place = next((place for kind, place in PLACES.items() if request_id.startswith(kind)), "")
    return re.fullmatch(rf"(\d+_)?{re.escape(request_id)}{place}(-[0-9a-f]{{8}})?", name) is not None


def _add(sums: list[int], more: Iterable[int]) -> None:
    sums[:] = map(add, sums, more)
