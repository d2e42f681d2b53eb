"""The eager engine: the host asks the rule before each FFN and calls the FFN or leaves it out.

It works on any device and for any FFN, because the model's own modules are called. It exists to
be obvious: the other engines are tested against it. Its price is one host sync per layer of the
region, which a CPU does not feel.

Skipping needs more than hooks, for a hook cannot keep a module from running. So `forward` of the
modules in each chain is set on the instance, and taken off again by `detach`. A token's way
through a chain: its first module gathers the tokens that run, its last scatters what they return
into zeros. Modules in between, and the layer's own code, see fewer tokens and need not know. Where
attention and FFN are parallel, attention's part of the sum is the layer's own and stays.

A single token, the usual decode step, has a shorter way: it runs or it skips, so there is nothing
to gather or to scatter, and on a CPU each small tensor operation left out counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from skipcal.arch.blocks import StreamReader
from skipcal.arch.locate import Architecture, Block
from skipcal.arch.patch import InstancePatches
from skipcal.core.host import FULL_PASS, PassTokens
from skipcal.core.rule import Rule, RuleState
from skipcal.core.surrogates import Surrogates
from skipcal.errors import SessionError
from skipcal.runtime.engines.base import bypassed

_ALL = slice(None)


class EagerEngine:
    """Runs each forward pass under `rule`, for the tokens that `begin` announces."""

    name = "eager"
    row_decisions = (0, 0)
    prepared_passes = 0
    setup_s = 0.0

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
        self.blocks = tuple(b for b in architecture.blocks if b.index in rule.layers)
        self._rule = rule
        self._patches = InstancePatches(architecture.stack)
        self._streams = StreamReader(self.blocks, wanted=lambda: self._active is not None)
        self._extras: dict[nn.Module, int] = {}  # outputs besides f: router scores of some MoEs
        self.forwards: dict[nn.Module, Callable[..., Any]] = {}  # of the chains' modules, their own
        self.asking: dict[nn.Module, Callable[..., Any]] = {}  # what stands there instead
        self.instead: Mapping[nn.Module, Callable[..., Any]] = {}  # of a module's own forward, where it runs
        self._state: RuleState | None = None  # of the tokens of this pass
        self.skipped_per_layer = [0] * architecture.num_layers
        self.weight_bytes_saved = 0
        self.begin(FULL_PASS)

    def attach(self) -> None:
        """Set `forward` on the modules of every chain."""
        self._streams.attach()
        for block in self.blocks:
            for module in block.chain:
                self.forwards[module] = module.forward
                self.asking[module] = self._wrapped(block, module)
                self._patches.set(module, "forward", self.asking[module])

    def detach(self) -> None:
        """Put back what `attach` found. A second call does nothing."""
        self._patches.restore()
        self._streams.detach()
        self.begin(FULL_PASS)  # whoever still holds a forward of ours gets the module's own

    def extras(self, layer: int) -> int:
        """How many outputs besides f the FFN module of a layer was seen to have."""
        return next((self._extras.get(b.chain[-1], 0) for b in self.blocks if b.index == layer), 0)

    def has_another_forward(self, module: nn.Module) -> bool:
        """Whether somebody else has set a `forward` on the instance, which may do more than the class's."""
        forward = module.forward
        if asking := self.asking.get(module):
            if forward is not asking:
                return True
            forward = self.forwards[module]
        return getattr(forward, "__func__", None) is not type(module).forward

    def whole_block(self, block: Block, f_of: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """What a block that adds f to its input as it is makes of h [1, 1, hidden], a single token on a CPU.

        f_of: f of h. The same as by the `forward` of the chain's modules, in fewer steps of Python.
        """
        rule, index = self._rule, block.index

        def leave(h: Tensor) -> Tensor:
            if self._active is None:
                return h + f_of(h)
            token = h.view(1, -1)
            state = rule.start(self._tokens, h.device) if self._state is None else self._state
            skip, state = rule.before(index, state, token)
            if skip:
                self._state = state
                self._count(block, skip, 1)
                self.weight_bytes_saved += block.weight_bytes
                s = self._surrogates(index, token)
                return h if s is None else h + s.view(h.shape)
            f = f_of(h)
            self._state = rule.after(index, state, token, f.view(1, -1), True) if rule.learns else state
            return h + f

        return leave

    def begin(self, tokens: PassTokens) -> None:
        """Announce a forward pass."""
        self._tokens = tokens
        self._live: int | None = None  # whether the only token counts
        self._active = tokens.active
        self._single = tokens.active is not None and len(tokens.active) == 1
        self._state = None
        self._open: Block | None = None  # whose chain has been entered and not been left
        self._entered: list[int] = []

    def end(self) -> None:
        """The pass is over. Raises SessionError where a block was not called by what is set on it."""
        if self._active is not None:
            if self._open is not None:
                raise bypassed(self._open.index)
            if len(self._entered) < len(self.blocks):
                raise bypassed(next(b.index for b in self.blocks if b.index not in self._entered))
        self.begin(FULL_PASS)

    def _wrapped(self, block: Block, module: nn.Module) -> Callable[..., Any]:
        own = self.forwards[module]
        first, last, adds = module is block.chain[0], module is block.chain[-1], module in block.outputs

        def forward(*args: Any, **kwargs: Any) -> Any:
            inner = self.instead.get(module, own)
            if self._active is None:
                y = inner(*args, **kwargs)
                if adds:
                    self._extras[module] = _extras_of(y)
                return y
            name = None if args else next(iter(kwargs))  # of the hidden states, if passed by name
            x = args[0] if name is None else kwargs[name]
            if first:
                x = self._enter(block, x)
            elif self._open is not block:
                raise bypassed(block.index)
            if last:
                self._open = None
            if self._rows is None:
                if adds and module not in self._extras:  # the prefill ran before the session: look once
                    self._extras[module] = _extras_of(inner(*args, **kwargs))
                    self.weight_bytes_saved -= block.weight_bytes if module is block.chain[-1] else 0
                return self._all_skipped(block, module) if adds else x
            if self._rows is _ALL:
                y = inner(*args, **kwargs)
            else:
                # The first module has gathered; the others are given what it made of the gathered.
                y = inner(x, *args[1:], **kwargs) if name is None else inner(**{**kwargs, name: x})
            nobody_skips = self._rows is _ALL and not self._masked
            if not adds or (nobody_skips and not self._rule.learns):
                return y
            return self._leave(block, module, y)

        return forward

    def _enter(self, block: Block, x: Tensor) -> Tensor:
        """Decide who skips; return the input of those who run (of all, if nobody does)."""
        if self._open is not None:
            raise bypassed(self._open.index)
        self._open = block
        self._entered.append(block.index)
        stream = self._streams.h(block, x)
        if stream is None:
            raise SessionError(
                f"layer {block.index} called its FFN before its attention, so the stream is not known; "
                "open the session with the model in the state in which it was located"
            )
        self._shape = x.shape  # [batch, seq, hidden], or [batch * seq, hidden]
        self._h = stream.reshape(-1, x.shape[-1])
        self._rows: Tensor | slice | None = _ALL  # those that run the FFN; None: nobody does
        self._masked = False  # all run, and what some of them get is thrown away
        self._added: Tensor | None = None
        return self._enter_single(block, x) if self._single else self._enter_many(block, x)

    def _enter_single(self, block: Block, x: Tensor) -> Tensor:
        """Decide whether the only token skips."""
        self._ran: Tensor | bool = True
        skip, self._state = self._rule.before(block.index, self._state_on(x.device), self._h)
        if skip:  # a rule may answer with a tensor; it is read here
            self._count(block, skip, 1)
            self._rows = None
        return x

    def _enter_many(self, block: Block, x: Tensor) -> Tensor:
        skip, self._state = self._rule.before(block.index, self._state_on(x.device), self._h)
        assert self._active is not None and isinstance(skip, Tensor)
        self._active = self._active.to(x.device)
        skip = skip & self._active
        self._ran = ~skip
        skipping = int(skip.sum())
        if skipping == 0:
            return x
        self._count(block, skip, skipping)
        if skipping == len(self._h):
            self._rows = None
            return x
        if block.family.whole:
            self._masked = True
            return x
        self._rows = self._ran.nonzero().squeeze(-1)
        running = x.reshape(-1, x.shape[-1])[self._rows]
        return running if x.dim() == 2 else running[None]  # FFNs with a router want three axes

    def _state_on(self, device: torch.device) -> RuleState:
        """The rule's state, made at the first layer of a pass."""
        if self._state is None:
            self._state = self._rule.start(self._tokens, device)
        return self._state.to(device)

    def _all_skipped(self, block: Block, module: nn.Module) -> Any:
        """Return what one of the block's outputs adds when the FFN did not run at all."""
        if module is block.chain[-1]:
            self.weight_bytes_saved += block.weight_bytes
        stand_in = self._in_place_of(block, module).reshape(self._shape)
        extras = self._extras.get(module, 0)
        return (stand_in, *[None] * extras) if extras else stand_in

    def _leave(self, block: Block, module: nn.Module, y: Any) -> Any:
        """Return what the layer adds: the FFN's output for tokens that ran, its stand-in for the rest."""
        output, rest = (y[0], y[1:]) if isinstance(y, tuple) else (y, None)
        f = output.reshape(-1, output.shape[-1])
        if isinstance(self._rows, Tensor):
            f = self._in_place_of(block, module).to(f.dtype).index_copy_(0, self._rows, f)
            output = f.reshape(self._shape)
        elif self._masked:
            assert isinstance(self._ran, Tensor)
            f = torch.where(self._ran[:, None], f, self._in_place_of(block, module).to(f.dtype))
            output = f.reshape(self._shape)
        self._added = f if self._added is None else self._added + f
        if module is block.chain[-1] and self._rule.learns:
            assert self._state is not None
            scaled = self._added if block.scale == 1.0 else self._added * block.scale
            self._state = self._rule.after(block.index, self._state, self._h, scaled, self._ran)
        return output if rest is None else (output, *rest)

    def _in_place_of(self, block: Block, module: nn.Module) -> Tensor:
        """What one of the block's outputs adds for tokens that skip, [tokens, hidden], 0 for the others.

        The last output stands in for all. The layer will multiply by `scale`.
        """
        skip = _ALL if self._rows is None else ~torch.as_tensor(self._ran)
        s = self._surrogates(block.index, self._h[skip]) if module is block.chain[-1] else None
        found = torch.zeros_like(self._h)
        if s is not None:
            found[skip] = s if block.scale == 1.0 else s / block.scale
        return found

    def _count(self, block: Block, skip: Tensor | bool, skipping: int) -> None:
        self._tokens.tell(block.index, skip)
        counted = self._tokens.counted
        if counted is not None and self._single:  # asked once a pass: on a CPU it costs as much as a decision
            if self._live is None:
                self._live = int(counted)
            skipping = self._live
        elif counted is not None:
            skipping = int((counted.to(self._h.device) & skip).sum())
        self.skipped_per_layer[block.index] += skipping
        self.weight_bytes_saved -= self._surrogates.weight_bytes(block.index)


def _extras_of(output: Any) -> int:
    """How many outputs a module has besides f."""
    return len(output) - 1 if isinstance(output, tuple) else 0
