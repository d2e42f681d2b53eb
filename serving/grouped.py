"""Several rules asked as one: tokens of a pass may belong to requests with targets of their own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from skipcal.core.host import PassTokens
from skipcal.core.rule import Rule
from skipcal.core.surrogates import Surrogates
from skipcal.serving.targets import RequestRule

# What stands in, [skipping, hidden], in a layer, for those of the streams [ruled, hidden] that skip: a mask
# [ruled]; None: all do.
StandIn: TypeAlias = Callable[[int, Tensor, Tensor | None], Tensor | None]


def together(each: Sequence[RequestRule], device: torch.device) -> tuple[Rule, StandIn]:
    """One rule for the tokens of a pass, and what stands in for what they skip.

    each: what each token is judged by, [tokens].
    """
    first = each[0]
    if all(judged is first for judged in each):
        return first.rule, of_those_that_skip(first.surrogates)
    places: dict[int, list[int]] = {}
    for place, judged in enumerate(each):
        places.setdefault(id(judged), []).append(place)
    kinds = {own[0]: torch.tensor(own, device=device) for own in places.values()}
    rule = GroupedRule([Part(each[place].rule, own) for place, own in kinds.items()])
    if all(each[place].surrogates is first.surrogates for place in kinds):
        return rule, of_those_that_skip(first.surrogates)

    def stand_in(layer: int, h: Tensor, skip: Tensor | None) -> Tensor:
        found = torch.zeros_like(h)
        for place, own in kinds.items():
            skipping = own if skip is None else own[skip[own]]
            s = each[place].surrogates(layer, h[skipping])
            if s is not None:
                found[skipping] = s
        return found if skip is None else found[skip]

    return rule, stand_in


def of_those_that_skip(surrogates: Surrogates) -> StandIn:
    """Surrogates of one kind for all tokens; nothing is computed for those that run."""

    def stand_in(layer: int, h: Tensor, skip: Tensor | None) -> Tensor | None:
        return surrogates(layer, h if skip is None else h[skip])

    return stand_in


@dataclass(frozen=True, eq=False)
class Part:
    """A rule, and the places of its tokens among those of the pass: [its tokens] int64."""

    rule: Rule
    places: Tensor


class GroupedRule:
    """Each rule judges its own tokens, by their own streams, and knows nothing of the others.

    It is a Rule itself; its state is that of the parts, in their order.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        """Every token of the pass belongs to one part."""
        self._parts = parts
        self.learns = any(part.rule.learns for part in parts)
        self.layers: Collection[int] = frozenset().union(*(part.rule.layers for part in parts))

    def start(self, tokens: PassTokens, device: torch.device) -> list[Any]:
        """Each part starts with its own tokens."""
        return [part.rule.start(_some(tokens, part.places), device) for part in self._parts]

    def before(self, layer: int, state: list[Any], h: Tensor) -> tuple[Tensor, list[Any]]:
        """The answers of the parts that have a say in this layer; tokens of the others do not skip."""
        skip, after = torch.zeros(len(h), dtype=torch.bool, device=h.device), list(state)
        for n, part in enumerate(self._parts):
            if layer in part.rule.layers:
                skip[part.places], after[n] = part.rule.before(layer, state[n], h[part.places])
        return skip, after

    def after(self, layer: int, state: list[Any], h: Tensor, f: Tensor, ran: Tensor | bool) -> list[Any]:
        """Each part learns of its own tokens, those in `ran`."""
        found = list(state)
        everyone = torch.as_tensor(ran, device=h.device).expand(len(h))
        for n, part in enumerate(self._parts):
            if part.rule.learns and layer in part.rule.layers:
                own = part.places
                found[n] = part.rule.after(layer, state[n], h[own], f[own], everyone[own])
        return found


def _some(tokens: PassTokens, places: Tensor) -> PassTokens:
    assert tokens.active is not None and isinstance(tokens.step, Tensor)
    return replace(
        tokens,
        active=tokens.active[places],
        counted=None if tokens.counted is None else tokens.counted[places],
        step=tokens.step[places],
        ids=None if tokens.ids is None else tokens.ids[places],
    )
