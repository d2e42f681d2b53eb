"""Engines for methods that leave out whole layers, attention included.

`RemovedLayers` takes layers out of the model for a while, for all tokens. `SkippedLayers` decides
layer by layer and step by step. Neither writes keys and values for what it leaves out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from skipcal.arch.blocks import first_output
from skipcal.arch.locate import Architecture, Block
from skipcal.arch.patch import InstancePatches
from skipcal.core.host import FULL_PASS, PassTokens
from skipcal.core.rule import Rule, RuleState
from skipcal.errors import SessionError
from skipcal.runtime.engines.base import bypassed


class RemovedLayers:
    """The model without some of its layers, as if it had been made with fewer.

    The kept layers are numbered anew, so that the cache has no empty places: a cache made inside
    does not fit the whole model, nor the other way round.
    """

    name = "eager"
    row_decisions = (0, 0)
    prepared_passes = 0
    setup_s = 0.0
    reason = "the layers are taken out of the model"

    def __init__(self, architecture: Architecture, removed: tuple[int, ...]) -> None:
        """Prepare to remove the layers with these indices."""
        self._architecture = architecture
        self._removed = frozenset(removed)
        self._patches = InstancePatches(architecture.stack)
        self.skipped_per_layer = [0] * architecture.num_layers
        self.weight_bytes_saved = 0

    def attach(self) -> None:
        """Shorten the list of layers and everything in the configuration that is one entry a layer."""
        architecture = self._architecture
        kept = [block for block in architecture.blocks if block.index not in self._removed]
        stack: Any = architecture.stack
        name = architecture.family.layers.rpartition(".")[2]
        self._patches.set(stack, name, nn.ModuleList(block.layer for block in kept))
        for place, block in enumerate(kept):
            for module in block.layer.modules():
                if isinstance(getattr(module, "layer_idx", None), int):
                    self._patches.set(module, "layer_idx", place)
        config = stack.config
        count = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
        for key, value in list(vars(config).items()):
            if isinstance(value, list | tuple) and len(value) == architecture.num_layers:
                self._patches.set(config, key, type(value)(value[block.index] for block in kept))
        self._patches.set(config, count, len(kept))
        self._patches.set(stack, "__reduce_ex__", self.refuse_copies)

    def detach(self) -> None:
        """Put the layers back. A second call does nothing."""
        self._patches.restore()

    def begin(self, tokens: PassTokens) -> None:
        """Count the removed layers for the tokens of a decode step."""
        if tokens.active is None:
            return
        counted = tokens.active if tokens.counted is None else tokens.active & tokens.counted
        for index in self._removed:
            self.skipped_per_layer[index] += int(counted.sum())
            tokens.tell(index, counted)
            self.weight_bytes_saved += self._architecture.blocks[index].layer_bytes

    def end(self) -> None:
        """Nothing is asked during a pass."""

    def refuse_copies(self, *_args: Any, **_kwargs: Any) -> Any:
        """Stand in for what copies or saves the model."""
        raise SessionError(
            f"{len(self._removed)} layers are out of the model inside skipping(...), and a copy or a file of "
            "it would lack them; copy or save it before the session or after it"
        )


class SkippedLayers:
    """Leaves out the layers that `rule` names, for decode steps that all rows of a batch share.

    A decode step does not call a skipped layer, so its keys and values are never made. In a
    teacher-forced pass the layer runs, and the stream of the tokens that skip it passes by. Both agree
    as long as no later token reads what a skipped one would have written, which is what a rule for
    this engine has to see to.
    """

    name = "eager"
    row_decisions = (0, 0)
    prepared_passes = 0
    setup_s = 0.0
    reason = "layers are skipped whole"

    def __init__(self, architecture: Architecture, rule: Rule) -> None:
        """Prepare for the layers in which `rule` has a say."""
        _refuse_late_masks(architecture, rule)
        self._blocks = tuple(b for b in architecture.blocks if b.index in rule.layers)
        self._rule = rule
        self._patches = InstancePatches(architecture.stack)
        self._tuples: dict[int, int] = {}  # by layer, outputs besides the stream
        self._state: RuleState | None = None
        self.begin(FULL_PASS)
        self.skipped_per_layer = [0] * architecture.num_layers
        self.weight_bytes_saved = 0

    def attach(self) -> None:
        """Set `forward` on the layers."""
        for block in self._blocks:
            self._patches.set(block.layer, "forward", self._wrapped(block, block.layer.forward))

    def detach(self) -> None:
        """Put back what `attach` found. A second call does nothing."""
        self._patches.restore()
        self.begin(FULL_PASS)  # whoever still holds a forward of ours gets the layer's own

    def begin(self, tokens: PassTokens) -> None:
        """Announce a forward pass."""
        self._tokens = tokens
        self._state = None
        self._asked: list[int] = []

    def end(self) -> None:
        """The pass is over. Raises SessionError where a layer was not called by what is set on it."""
        lost = next((b.index for b in self._blocks if b.index not in self._asked), None)
        if self._tokens.active is not None and lost is not None:
            raise bypassed(lost)
        self.begin(FULL_PASS)

    def _wrapped(self, block: Block, inner: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            stream: Tensor = args[0] if args else kwargs["hidden_states"]
            skip = self._skip(block, stream)
            if skip is None:
                output = inner(*args, **kwargs)
                self._tuples[block.index] = len(output) - 1 if isinstance(output, list | tuple) else 0
                return output
            if not isinstance(self._tokens.step, Tensor):  # every row is at the same step
                if block.index not in self._tuples:
                    raise SessionError("the first pass inside skipping(...) has to be a prefill")
                extras = self._tuples[block.index]
                self.weight_bytes_saved += block.layer_bytes
                return (stream, *[None] * extras) if extras else stream
            output = inner(*args, **kwargs)
            first = first_output(output)
            passed = torch.where(skip.reshape(*stream.shape[:-1], 1), stream, first)
            return (passed, *output[1:]) if isinstance(output, list | tuple) else passed

        return forward

    def _skip(self, block: Block, stream: Tensor) -> Tensor | None:
        """Mask [tokens] of those that skip the layer, counted; None if nobody does."""
        tokens = self._tokens
        if tokens.active is None:
            return None
        self._asked.append(block.index)
        if self._state is None:
            self._state = self._rule.start(tokens, stream.device)
        asked, self._state = self._rule.before(
            block.index, self._state.to(stream.device), stream.reshape(-1, stream.shape[-1])
        )
        skip = asked & tokens.active.to(stream.device)
        if not bool(skip.any()):
            return None
        counted = skip if tokens.counted is None else skip & tokens.counted.to(stream.device)
        self.skipped_per_layer[block.index] += int(counted.sum())
        tokens.tell(block.index, counted)
        return skip


def _refuse_late_masks(architecture: Architecture, rule: Rule) -> None:
    """The mask of each kind of attention is sized by the cache of its first layer: that one must run."""
    kinds = getattr(architecture.stack.config, "layer_types", None) or []
    late = [kind for kind in dict.fromkeys(kinds) if kinds.index(kind) in rule.layers]
    if late:
        raise SessionError(
            f"the first layer with {late[0]} lies where layers are skipped, and masks are sized by its "
            "cache; this method runs on models with one kind of attention"
        )
