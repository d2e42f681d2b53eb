"""Who skips, decided on the device: a rule between the layers of one captured pass.

`skips` are flags of rows, those of a layer side by side: [layers + 1, rows], the last layer is nobody's, to
be written to. A rule writes those of the layers it is asked of; of all others the host has said before the
pass what they are. `active` are flags too: 1, a row to which the rule applies.
"""

from __future__ import annotations

from copy import copy
from typing import Protocol, Self

import torch
from torch import Tensor

from skipcal.core.cosine import CosineRule
from skipcal.core.gate import GateRule
from skipcal.ops.arm import UNLIMITED, arm
from skipcal.ops.gate import gate


class StepRule(Protocol):
    """A rule in a captured pass."""

    @property
    def wants_f(self) -> bool:
        """Whether `after` needs f itself."""

    def start(self) -> None:
        """A new token of each row."""

    def before(self, layer: int, h: Tensor) -> Tensor:
        """Flags [rows] of those that skip FFN `layer`, also kept in `skips`. h: [rows, hidden]."""

    def after(self, layer: int, h: Tensor, f: Tensor | None, sums: Tensor | None) -> None:
        """FFN `layer` ran for the other rows; f: [rows, hidden], sums: as skipcal.ops.ffn makes them."""


class Unasked:
    """No rule: flags are what the host has said before the pass, 0 where it has said nothing."""

    wants_f = False

    def __init__(self, skips: Tensor) -> None:
        """Show rows of `skips`, and write none."""
        self._skips = skips

    def start(self) -> None:
        """Nothing begins."""

    def before(self, layer: int, h: Tensor) -> Tensor:
        """As was said."""
        return self._skips[layer]

    def after(self, layer: int, h: Tensor, f: Tensor | None, sums: Tensor | None) -> None:
        """Nobody learns."""

    def over(self, rows: int) -> Self:
        """The same over the first rows."""
        found = copy(self)
        found._skips = self._skips[:, :rows]
        return found


class FusedGate:
    """The rule `gate`, whose decision is one launch, warm-up and all."""

    wants_f = False

    def __init__(
        self, rule: GateRule, *, active: Tensor, skips: Tensor, threshold: Tensor | None = None
    ) -> None:
        """Take the probes of `rule`; threshold: [rows] float32 by row, None: the rule's."""
        device, gates = skips.device, rule.gates
        self._active, self._skips = active, skips
        self._place = {layer: n for n, layer in enumerate(gates.layers)}
        self._weight_static = gates.weight.to(device)
        self._log_norm_static = gates.log_norm_weight.to(device)
        self._bias_static = gates.bias.to(device)
        self._threshold_static = threshold
        if threshold is None:
            self._threshold_static = torch.tensor(rule.threshold, dtype=torch.float32, device=device)

    def start(self) -> None:
        """Nothing begins."""

    def before(self, layer: int, h: Tensor) -> Tensor:
        """Rows past their warm-up whose score lies below the threshold."""
        n = self._place[layer]
        assert self._threshold_static is not None
        return gate(
            h,
            self._weight_static[n],
            log_norm_weight=self._log_norm_static[n],
            bias=self._bias_static[n],
            threshold=self._threshold_static,
            active=self._active,
            skip=self._skips[layer],
        ).skip

    def after(self, layer: int, h: Tensor, f: Tensor | None, sums: Tensor | None) -> None:
        """Nothing is learnt from the FFN."""

    def over(self, rows: int) -> Self:
        """The same over the first rows, each of which has a threshold."""
        found = copy(self)
        assert self._threshold_static is not None
        found._active, found._skips = self._active[:rows], self._skips[:, :rows]
        found._threshold_static = self._threshold_static[:rows]
        return found


class FusedCosine:
    """The rule `cosine` in one small kernel a layer, from sums that the FFN's kernel leaves.

    Threshold and `max_skips` are values on the device: new ones need no new capture. Rows past their warm-up
    do not skip the first layer of the region: the host has said so.
    """

    wants_f = False

    def __init__(
        self,
        rule: CosineRule,
        *,
        active: Tensor,
        live: Tensor,
        skips: Tensor,
        threshold: Tensor | None = None,
        limit: Tensor | None = None,
    ) -> None:
        """Take the region of `rule`. live: [rows] bool, rows whose text goes on.

        threshold: [rows] float32 and limit: [rows] int32, the most skips, by row; None: the rule's.
        """
        device = skips.device
        self._layers, self._active, self._live, self._skips = rule.layers, active, live, skips
        self._batch_rule = rule.batch_rule
        self._left = torch.zeros(skips.shape[1], dtype=torch.int32, device=device)
        if threshold is None:
            threshold = torch.tensor([rule.threshold], dtype=torch.float32, device=device)
        if limit is None:
            limit = torch.tensor([limit_of(rule)], dtype=torch.int32, device=device)
        self._threshold, self._limit = threshold, limit

    def start(self) -> None:
        """Watch the rows past their warm-up; the others neither skip nor arm."""
        torch.sub(self._active.view(torch.int8), 1, out=self._left)

    def before(self, layer: int, h: Tensor) -> Tensor:
        """What the layer before has found."""
        return self._skips[layer]

    def after(self, layer: int, h: Tensor, f: Tensor | None, sums: Tensor | None) -> None:
        """Arm, count down, and say who skips the next layer; after the region nobody asks."""
        assert sums is not None
        follows = layer + 1 if layer + 1 in self._layers else -1
        arm(
            sums,
            self._left,
            self._skips[layer],
            self._skips[follows],
            live=self._live,
            threshold=self._threshold,
            limit=self._limit,
            batch_rule=self._batch_rule,
        )

    def over(self, rows: int) -> Self:
        """The same over the first rows, each of which has a threshold and a limit."""
        found = copy(self)
        for name in ("_active", "_live", "_left", "_threshold", "_limit"):
            setattr(found, name, getattr(self, name)[:rows])
        found._skips = self._skips[:, :rows]
        return found


def limit_of(rule: CosineRule) -> int:
    """`max_skips` as the op takes it."""
    return UNLIMITED if rule.max_skips is None else rule.max_skips
