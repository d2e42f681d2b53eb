"""The eager engine: the host asks the rule before each FFN and calls the FFN or leaves it out.

It works on any device and for any FFN, because the model's own modules are called. It exists to
be obvious: the other engines are tested against it. Its price is one host sync per layer of the
region, which a CPU does not feel.

Skipping needs more than hooks, for a hook cannot keep a module from running. So `forward` of the
modules in each chain is set on the instance, and taken off again by `detach`. A token's way
through a chain: its first module gathers the tokens that run, its last scatters what they return
into zeros. Modules in between, and the layer's own code, see fewer tokens and need not know.

A single token, the usual decode step, has a shorter way: it runs or it skips, so there is nothing
to gather or to scatter, and on a CPU each small tensor operation left out counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from skipcal.arch.locate import Architecture, Block
from skipcal.runtime.engines.base import FULL_PASS, PassTokens
from skipcal.runtime.patch import InstancePatches
from skipcal.runtime.rules import Rule, RuleState
from skipcal.runtime.surrogates import Surrogates

_ALL = slice(None)


class EagerEngine:
    """Runs each forward pass under `rule`, for the tokens that `begin` announces."""

    name = "eager"
    row_decisions = (0, 0)

    def __init__(
        self,
        architecture: Architecture,
        rule: Rule,
        *,
        surrogates: Surrogates | None = None,
        reason: str = "asked for",
    ) -> None:
        """Prepare for the blocks in which `rule` has a say.

        surrogates: what is added in place of a skipped FFN; None: nothing.
        """
        self.reason = reason
        self._surrogates = surrogates or Surrogates({})
        self._blocks = tuple(b for b in architecture.blocks if b.index in rule.layers)
        self._rule = rule
        self._patches = InstancePatches()
        self._extras: dict[int, int] = {}  # by block, outputs besides f: router scores of some MoEs
        self.skipped_per_layer = [0] * architecture.num_layers
        self.weight_bytes_saved = 0
        self.begin(FULL_PASS)

    def attach(self) -> None:
        """Set `forward` on the modules of every chain."""
        for block in self._blocks:
            for place, module in enumerate(block.chain):
                first, last = place == 0, place == len(block.chain) - 1
                wrapped = self._wrapped(block, module.forward, first=first, last=last)
                self._patches.set(module, "forward", wrapped)

    def detach(self) -> None:
        """Put back what `attach` found. A second call does nothing."""
        self._patches.restore()

    def extras(self, layer: int) -> int:
        """How many outputs besides f the FFN module of a layer was seen to have."""
        return self._extras.get(layer, 0)

    def begin(self, tokens: PassTokens) -> None:
        """Announce a forward pass."""
        self._tokens = tokens
        self._active = tokens.active
        self._single = tokens.active is not None and len(tokens.active) == 1
        self._state: RuleState | None = None

    def _wrapped(
        self, block: Block, inner: Callable[..., Any], *, first: bool, last: bool
    ) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._active is None:
                y = inner(*args, **kwargs)
                if last and isinstance(y, tuple):
                    self._extras[block.index] = len(y) - 1
                return y
            name = None if args else next(iter(kwargs))  # of the hidden states, if passed by name
            x = args[0] if name is None else kwargs[name]
            if first:
                x = self._enter_single(block, x) if self._single else self._enter(block, x)
            if self._rows is None:
                return self._all_skipped(block) if last else x
            if self._rows is _ALL:
                y = inner(*args, **kwargs)
            elif name is None:
                y = inner(x, *args[1:], **kwargs)
            else:
                y = inner(**{**kwargs, name: x})
            if not last or (self._rows is _ALL and not self._rule.learns):
                return y
            return self._leave(block, y)

        return forward

    def _enter_single(self, block: Block, x: Tensor) -> Tensor:
        """Decide whether the only token skips."""
        self._shape = x.shape
        self._h = x.reshape(1, -1)
        self._ran: Tensor | bool = True
        self._rows: Tensor | slice | None = _ALL
        skip, self._state = self._rule.before(block.index, self._state_on(x.device), self._h)
        if skip:  # a rule may answer with a tensor; it is read here
            self._count(block, skip, 1)
            self._rows = None
        return x

    def _enter(self, block: Block, x: Tensor) -> Tensor:
        """Decide who skips; return the input of those who run (of all, if nobody does)."""
        self._shape = x.shape  # [batch, seq, hidden], or [batch * seq, hidden]
        self._h = x.reshape(-1, x.shape[-1])
        skip, self._state = self._rule.before(block.index, self._state_on(x.device), self._h)
        assert self._active is not None and isinstance(skip, Tensor)
        self._active = self._active.to(x.device)
        skip = skip & self._active
        self._ran = ~skip
        self._rows = _ALL
        skipping = int(skip.sum())
        if skipping == 0:
            return x
        self._count(block, skip, skipping)
        if skipping == len(self._h):
            self._rows = None
            return x
        self._rows = self._ran.nonzero().squeeze(-1)
        running = self._h[self._rows]
        return running if x.dim() == 2 else running[None]  # FFNs with a router want three axes

    def _state_on(self, device: torch.device) -> RuleState:
        """The rule's state, made at the first layer of a pass."""
        if self._state is None:
            self._state = self._rule.start(self._tokens, device)
        return self._state.to(device)

    def _all_skipped(self, block: Block) -> Any:
        """Return what the layer adds when the FFN did not run at all."""
        self.weight_bytes_saved += block.weight_bytes
        stand_in = self._stand_in(block).reshape(self._shape)
        extras = self.extras(block.index)
        return (stand_in, *[None] * extras) if extras else stand_in

    def _leave(self, block: Block, y: Any) -> Any:
        """Return what the layer adds: the FFN's output for tokens that ran, its stand-in for the rest."""
        output, rest = (y[0], y[1:]) if isinstance(y, tuple) else (y, None)
        f = output.reshape(-1, output.shape[-1])
        if isinstance(self._rows, Tensor):
            f = self._stand_in(block).index_copy_(0, self._rows, f)
            output = f.reshape(self._shape)
        assert self._state is not None
        scaled = f if block.scale == 1.0 else f * block.scale
        self._state = self._rule.after(block.index, self._state, self._h, scaled, self._ran)
        return output if rest is None else (output, *rest)

    def _stand_in(self, block: Block) -> Tensor:
        """What tokens that skip add, for all tokens [tokens, hidden]; the layer will multiply by `scale`."""
        s = self._surrogates(block.index, self._h)
        if s is None:
            return torch.zeros_like(self._h)
        return s if block.scale == 1.0 else s / block.scale

    def _count(self, block: Block, skip: Tensor | bool, skipping: int) -> None:
        if self._tokens.counted is not None:
            skipping = int((self._tokens.counted.to(self._h.device) & skip).sum())
        self.skipped_per_layer[block.index] += skipping
        self.weight_bytes_saved -= self._surrogates.weight_bytes(block.index)
