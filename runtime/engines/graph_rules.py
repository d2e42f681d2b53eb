"""Who skips, decided on the device: a rule between the layers of one captured decode step."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from skipcal.core.cosine import CosineRule
from skipcal.core.gate import GateRule
from skipcal.core.host import PassTokens
from skipcal.core.rule import Rule
from skipcal.ops.arm import SPENT, UNLIMITED, WATCHING, arm
from skipcal.ops.count import count
from skipcal.ops.gate import gate


class StepInputs:
    """What the host says of a step, in tensors that stay in place.

    ids_static, positions_static: [batch, 1] int64, the tokens and their positions in their rows.
    place_static:  [1] int64, where the tokens go in the cache.
    valid_static:  [batch, slots] bool, places that hold no padding.
    active_static: [batch] bool, rows past their warm-up. counted_static: [batch] bool, rows whose
                   text goes on. step_static: [batch] int64, the decode step.
    """

    def __init__(self, batch: int, slots: int, device: torch.device) -> None:
        """Tensors for `batch` rows and a cache of `slots`."""
        self.ids_static = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.positions_static = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.place_static = torch.zeros(1, dtype=torch.long, device=device)
        self.valid_static = torch.ones(batch, slots, dtype=torch.bool, device=device)
        self.active_static = torch.zeros(batch, dtype=torch.bool, device=device)
        self.counted_static = torch.ones(batch, dtype=torch.bool, device=device)
        self.step_static = torch.zeros(batch, dtype=torch.long, device=device)

    def set_no_sync(self, *, ids: Tensor, positions: Tensor | None, place: int, tokens: PassTokens) -> None:
        """Write one step's values; positions None: those of a row without padding."""
        assert isinstance(tokens.step, int)
        self.ids_static.copy_(ids)
        if positions is None:
            self.positions_static.fill_(place)
        else:
            self.positions_static.copy_(positions.expand_as(self.positions_static))
        self.place_static.fill_(place)
        self.active_static.fill_(tokens.active is not None)
        self.step_static.fill_(tokens.step)
        if tokens.counted is None:
            self.counted_static.fill_(True)
        else:
            self.counted_static.copy_(tokens.counted)


class StepRule(Protocol):
    """A rule in a captured step; `skips` are the rows of one tensor, [layers + 1, batch] bool."""

    @property
    def wants_f(self) -> bool:
        """Whether `after` needs f itself."""

    def start(self) -> None:
        """A new token of each row. `skips` of layers that a rule is not asked of are False, and stay so."""

    def before(self, layer: int, h: Tensor) -> Tensor:
        """Rows [batch] bool that skip FFN `layer`, also kept in `skips`. h: [batch, hidden]."""

    def after(self, layer: int, h: Tensor, f: Tensor | None, sums: Tensor | None) -> None:
        """FFN `layer` ran for the other rows; f: [batch, hidden], sums: as skipcal.ops.ffn makes them."""


class Unasked:
    """No rule: the FFN runs for every row."""

    wants_f = False

    def __init__(self, skips: Tensor) -> None:
        """Show rows of `skips`, which nobody writes."""
        self._skips = skips

    def start(self) -> None:
        """Nothing begins."""

    def before(self, layer: int, h: Tensor) -> Tensor:
        """Nobody skips."""
        return self._skips[layer]

    def after(self, layer: int, h: Tensor, f: Tensor | None, sums: Tensor | None) -> None:
        """Nobody learns."""


class AnyRule:
    """A rule as pure functions of tensors: they are captured as they are.

    Tensors that the rule holds must stay where they are, and on the model's device.
    """

    def __init__(self, rule: Rule, inputs: StepInputs, skips: Tensor) -> None:
        """Ask `rule`; write into `skips`."""
        self._rule, self._inputs, self._skips = rule, inputs, skips
        self._state: Any = None

    @property
    def wants_f(self) -> bool:
        """Where it learns."""
        return self._rule.learns

    def start(self) -> None:
        """Fresh state of each row."""
        inputs = self._inputs
        tokens = PassTokens(
            active=inputs.active_static,
            counted=inputs.counted_static,
            step=inputs.step_static,
            ids=inputs.ids_static.view(-1),
            on_device=True,
        )
        self._state = self._rule.start(tokens, inputs.ids_static.device)

    def before(self, layer: int, h: Tensor) -> Tensor:
        """Ask the rule; rows within their warm-up run."""
        skip, self._state = self._rule.before(layer, self._state, h)
        return torch.logical_and(torch.as_tensor(skip), self._inputs.active_static, out=self._skips[layer])

    def after(self, layer: int, h: Tensor, f: Tensor | None, sums: Tensor | None) -> None:
        """Tell the rule, if it wants to know."""
        if self._rule.learns:
            assert f is not None
            self._state = self._rule.after(layer, self._state, h, f, ~self._skips[layer])


class FusedGate:
    """The rule `gate`, whose decision is one launch, warm-up and all."""

    wants_f = False

    def __init__(self, rule: GateRule, inputs: StepInputs, skips: Tensor) -> None:
        """Take probes and threshold from `rule`; write into `skips`."""
        device, gates = skips.device, rule.gates
        self._inputs, self._skips = inputs, skips
        self._place = {layer: n for n, layer in enumerate(gates.layers)}
        self._weight_static = gates.weight.to(device)
        self._log_norm_static = gates.log_norm_weight.to(device)
        self._bias_static = gates.bias.to(device)
        self._threshold_static = torch.tensor(rule.threshold, dtype=torch.float32, device=device)

    def start(self) -> None:
        """Nothing begins."""

    def before(self, layer: int, h: Tensor) -> Tensor:
        """Rows past their warm-up whose score lies below the threshold."""
        n = self._place[layer]
        return gate(
            h,
            self._weight_static[n],
            log_norm_weight=self._log_norm_static[n],
            bias=self._bias_static[n],
            threshold=self._threshold_static,
            active=self._inputs.active_static,
            skip=self._skips[layer],
        ).skip

    def after(self, layer: int, h: Tensor, f: Tensor | None, sums: Tensor | None) -> None:
        """Nothing is learnt from the FFN."""


class FusedCosine:
    """The rule `cosine` in one small kernel a layer, from sums that the FFN's kernel leaves.

    Threshold and `max_skips` are values on the device: a new one needs no new capture.
    """

    wants_f = False

    def __init__(self, rule: CosineRule, inputs: StepInputs, skips: Tensor) -> None:
        """Take region, threshold and `max_skips` from `rule`; write into `skips`."""
        device = skips.device
        self._layers, self._inputs, self._skips = rule.layers, inputs, skips
        self._batch_rule = rule.batch_rule
        self._left = torch.zeros(skips.shape[1], dtype=torch.int32, device=device)
        self._watching, self._spent = (
            torch.tensor(left, dtype=torch.int32, device=device) for left in (WATCHING, SPENT)
        )
        limit = UNLIMITED if rule.max_skips is None else rule.max_skips
        self._limit = torch.tensor([limit], dtype=torch.int32, device=device)
        self._threshold = torch.tensor([rule.threshold], dtype=torch.float32, device=device)

    def start(self) -> None:
        """Watch the rows past their warm-up; the others neither skip nor arm."""
        torch.where(self._inputs.active_static, self._watching, self._spent, out=self._left)

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
            live=self._inputs.counted_static,
            threshold=self._threshold,
            limit=self._limit,
            batch_rule=self._batch_rule,
        )


class StepCounts:
    """What steps skipped, summed up on the device and read when somebody asks."""

    def __init__(self, num_layers: int, ruled: range | tuple[int, ...], device: torch.device) -> None:
        """Nothing yet. ruled: the layers in which a rule has a say."""
        self._per_layer = torch.zeros(3, num_layers, dtype=torch.long, device=device)
        self._agreement = torch.zeros(2, dtype=torch.long, device=device)  # decisions alike, decisions
        self._ruled = torch.zeros(num_layers, dtype=torch.bool, device=device)
        self._ruled[list(ruled)] = True

    def add_no_sync(self, skips: Tensor, inputs: StepInputs) -> None:
        """One step's `skips` [layers + 1, batch]: the last row is nobody's."""
        count(
            skips[:-1],
            inputs.counted_static,
            inputs.active_static,
            ruled=self._ruled,
            per_layer=self._per_layer,
            agreement=self._agreement,
        )

    def read(self) -> tuple[list[int], list[int], list[int]]:
        """By layer: blocks skipped by live rows; passes in which every row, and any row, skipped."""
        skipped, by_all, by_some = self._per_layer.tolist()
        return skipped, by_all, by_some

    def agreement(self) -> tuple[int, int]:
        """Decisions on which all live rows of a batch agreed, and decisions."""
        alike, decisions = self._agreement.tolist()
        return alike, decisions
