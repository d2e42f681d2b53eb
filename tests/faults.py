"""Faults planted into prepared steps, each of which the proof has to find."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from torch import Tensor

from skipcal.ops.rotary_cache import rotary_cache
from skipcal.runtime.engines import graph_layer, graph_step, recorded_step
from skipcal.runtime.engines.graph_rules import StepInputs

Plant = Callable[[pytest.MonkeyPatch], None]


def padding_in_sight(patch: pytest.MonkeyPatch) -> None:
    attention = graph_step.DecodeStep._attention
    patch.setattr(graph_step.DecodeStep, "_attention", lambda self, length, _: attention(self, length, None))


def the_next_place_in_sight(patch: pytest.MonkeyPatch) -> None:
    attention = graph_step.DecodeStep._attention
    patch.setattr(
        graph_step.DecodeStep, "_attention", lambda self, length, valid: attention(self, length + 1, valid)
    )


def the_next_position(patch: pytest.MonkeyPatch) -> None:
    before = StepInputs.set_no_sync

    def wrong(self: StepInputs, *, positions: Tensor | None, place: int, **given: Any) -> None:
        before(self, positions=positions, place=place, **given)
        self.positions_static.add_(1)

    patch.setattr(StepInputs, "set_no_sync", wrong)


def a_matrix_of_another_layer(patch: pytest.MonkeyPatch, name: str, *, of: str = "_weights") -> None:
    before = graph_step.DecodeStep._blocks

    def wrong(self: graph_step.DecodeStep, *args: Any) -> Any:
        ffns, rule, how = before(self, *args)
        one, other = ffns[len(ffns) // 2 : len(ffns) // 2 + 2]
        theirs = getattr(getattr(other, of), name)
        setattr(one, of, replace(getattr(one, of), **{name: theirs}))
        return ffns, rule, how

    patch.setattr(graph_step.DecodeStep, "_blocks", wrong)


def the_cache_written_elsewhere(patch: pytest.MonkeyPatch) -> None:
    def wrong(qkv: Tensor, cos: Tensor, sin: Tensor, place: Tensor, *cache: Tensor, **given: Any) -> Tensor:
        return rotary_cache(qkv, cos, sin, place + 1, *cache, **given)

    build = graph_step.DecodeStep._build

    def built(self: graph_step.DecodeStep) -> None:
        build(self)  # which tries the layers alone
        patch.setattr(graph_layer, "rotary_cache", wrong)

    patch.setattr(graph_step.DecodeStep, "_build", built)


def rows_of_each_other(patch: pytest.MonkeyPatch) -> None:
    before = StepInputs.set_no_sync

    def wrong(self: StepInputs, *, ids: Tensor, **given: Any) -> None:
        before(self, ids=ids.roll(1, 0), **given)

    patch.setattr(StepInputs, "set_no_sync", wrong)


# By name, with the rows that are decoded; of one row nothing is padded, and nothing can be swapped.
IN_A_GRAPH: dict[str, tuple[int, Plant]] = {
    "mask: padding in sight": (3, padding_in_sight),
    "mask: one place too many": (1, the_next_place_in_sight),
    "position": (1, the_next_position),
    "weight: gate": (1, lambda patch: a_matrix_of_another_layer(patch, "gate")),
    "weight: up": (3, lambda patch: a_matrix_of_another_layer(patch, "up")),
    "weight: down": (1, lambda patch: a_matrix_of_another_layer(patch, "down")),
    **{
        f"weight: {name}": (rows, partial(a_matrix_of_another_layer, name=name, of="_attention"))
        for name, rows in (("q", 1), ("v", 3), ("o", 1))
    },
    "cache: written elsewhere": (1, the_cache_written_elsewhere),
    "rows swapped": (3, rows_of_each_other),
}


def recorded_padding_in_sight(patch: pytest.MonkeyPatch) -> None:
    before = recorded_step.RecordedStep.settle

    def wrong(self: recorded_step.RecordedStep, given: dict[str, Any]) -> None:
        before(self, given)
        self._mask = None

    patch.setattr(recorded_step.RecordedStep, "settle", wrong)


def recorded_next_position(patch: pytest.MonkeyPatch) -> None:
    before = recorded_step.RecordedStep._positions
    patch.setattr(
        recorded_step.RecordedStep, "_positions", lambda self, positions: before(self, positions) + 1
    )


def recorded_rows_of_each_other(patch: pytest.MonkeyPatch) -> None:
    before = recorded_step.RecordedStep.run_no_sync
    patch.setattr(
        recorded_step.RecordedStep,
        "run_no_sync",
        lambda self, ids, positions, tokens: before(self, ids.roll(1, 0), positions, tokens),
    )


RECORDED: dict[str, tuple[int, Plant]] = {
    "mask: padding in sight": (3, recorded_padding_in_sight),
    "position": (1, recorded_next_position),
    "rows swapped": (3, recorded_rows_of_each_other),
}
