"""What a captured step is told, and counts; and any rule in it, for those that skipcal.ops.rules has not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from skipcal.core.host import PassTokens
from skipcal.core.rule import Rule
from skipcal.ops.count import count


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
