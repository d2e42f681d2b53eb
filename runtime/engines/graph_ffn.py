"""One FFN block of a captured decode step, whose weights are not read when every row skips it.

`FusedFFN` is skipcal.ops.ffn, for blocks that are an RMSNorm and three plain linears with a SiLU.
`ModuleFFN` is any other: the model's own modules in the body of an IF node of the CUDA graph.
Either stands on the modules of the block's chain as their `forward` while a step runs, as the eager
engine does, so that the layer's own code goes on around it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skipcal.arch.locate import Block
from skipcal.arch.patch import InstancePatches
from skipcal.arch.stored import is_wrapper
from skipcal.core.surrogates import Surrogates
from skipcal.ops.ffn import MAX_ROWS, FFNWeights, ffn, reference
from skipcal.ops.rules import StepRule
from skipcal.ops.stand_in import add_surrogate
from skipcal.runtime.engines.if_node import IfNode

_PROOF_ROWS = 4
# What gate, up and down are called; two in one matrix stand in it one below the other.
_LINEARS = (("gate_proj", "up_proj", "down_proj"), ("gate_up_proj", "down_proj"), ("w1", "w3", "w2"))


class StepFFN(Protocol):
    """An FFN block in a captured step."""

    def set_on(self, patches: InstancePatches) -> None:
        """Set `forward` on the modules of the chain."""

    def abandon(self) -> None:
        """The step was broken off, perhaps in the middle of this block."""


class FusedFFN:
    """norm, gate, up, SiLU, down in predicated kernels, with the sums that make the cosine."""

    def __init__(self, block: Block, weights: FFNWeights, rule: StepRule, surrogates: Surrogates) -> None:
        """Run `block` by its `weights`."""
        self._block, self._weights, self._rule, self._surrogates = block, weights, rule, surrogates

    def set_on(self, patches: InstancePatches) -> None:
        """The norm passes h on; the FFN's module returns f."""
        norm, module = self._block.chain
        patches.set(norm, "forward", lambda h: h)
        patches.set(module, "forward", self._forward)

    def abandon(self) -> None:
        """Nothing is open."""

    def _forward(self, stream: Tensor) -> Tensor:
        h = stream.view(-1, stream.shape[-1])
        index = self._block.index
        skip = self._rule.before(index, h)
        f, sums = ffn(h, skip, self._weights)
        self._rule.after(index, h, f, sums)
        add_surrogate(self._surrogates, index, h, skip)
        return f.view_as(stream)


class ModuleFFN:
    """The model's own modules, run if any row does not skip."""

    def __init__(
        self, block: Block, rule: StepRule, surrogates: Surrogates, extras: Callable[[int], int]
    ) -> None:
        """Run `block`. extras: how many outputs besides f the last module of a layer has."""
        self._block, self._rule, self._surrogates, self._extras = block, rule, surrogates, extras
        self._f_static: Tensor | None = None  # [rows, hidden], written in the body
        self._node: IfNode | None = None  # while it is open

    def set_on(self, patches: InstancePatches) -> None:
        """The first module opens the IF node, the last closes it; what lies between is in its body."""
        chain = self._block.chain
        for place, module in enumerate(chain):
            wrapped = self._wrapped(module.forward, first=place == 0, last=place == len(chain) - 1)
            patches.set(module, "forward", wrapped)

    def abandon(self) -> None:
        """Close the node; the capture has failed already, so a second failure tells nothing."""
        if self._node is not None:
            with suppress(RuntimeError):
                self._node.end()
            self._node = None

    def _wrapped(self, inner: Callable[..., Any], *, first: bool, last: bool) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if first:
                self._enter(args[0] if args else next(iter(kwargs.values())))
            if self._node is None or not self._node.runs:
                y: Any = args[0] if args else next(iter(kwargs.values()))
            else:
                y = inner(*args, **kwargs)
            return self._leave(y) if last else y

        return forward

    def _enter(self, stream: Tensor) -> None:
        self._stream = stream  # [batch, 1, hidden], or [batch, hidden]
        self._h = stream.view(-1, stream.shape[-1])
        self._skip = self._rule.before(self._block.index, self._h)
        if self._f_static is None or self._f_static.shape != self._h.shape:
            self._f_static = torch.zeros_like(self._h)
        self._node = IfNode(~self._skip.all())
        self._node.begin()

    def _leave(self, y: Any) -> Any:
        assert self._f_static is not None and self._node is not None
        if self._node.runs:
            self._f_static.copy_((y[0] if isinstance(y, tuple) else y).reshape(self._h.shape))
        self._node.end()
        self._node = None
        index, scale = self._block.index, self._block.scale
        # where, not a product: what another step left there may be anything
        f = self._f_static.masked_fill(self._skip[:, None], 0.0)
        self._rule.after(index, self._h, f if scale == 1.0 else f * scale, None)
        add_surrogate(self._surrogates, index, self._h, self._skip)
        extras = self._extras(index)
        shaped = f.view_as(self._stream)
        return (shaped, *[None] * extras) if extras else shaped


def fused_weights(block: Block, rows: int) -> FFNWeights | str:
    """The weights for skipcal.ops.ffn, or why the block cannot run in it.

    The names are only a guess: on a few random rows the op has to give what the modules give.
    """
    if rows > MAX_ROWS:
        return f"{rows} rows are more than the {MAX_ROWS} of its kernels"
    if len(block.chain) != 2 or block.scale != 1.0:
        return "the block is more than a norm and an FFN"
    norm, module = block.chain
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if not isinstance(eps, float) or not isinstance(getattr(norm, "weight", None), Tensor):
        return f"{type(norm).__name__} is no RMSNorm"
    inside = dict(module.named_children())
    linears: list[Any] = next(([inside[n] for n in names] for names in _LINEARS if {*names} <= {*inside}), [])
    if not linears or not all(type(linear) is nn.Linear for linear in linears):
        return f"{type(module).__name__} is not three plain linears"
    if any(is_wrapper(linear.weight) for linear in linears):
        return f"the weights of {type(module).__name__} are quantized"
    if any(linear.bias is not None for linear in linears):
        return f"the linears of {type(module).__name__} have biases"
    if any(part._forward_hooks or part._forward_pre_hooks for part in module.modules() if part is not module):
        return f"{type(module).__name__} has hooks inside"
    scale: Any = norm.weight
    *first, down = (linear.weight for linear in linears)
    gate, up = first if len(first) == 2 else first[0].chunk(2)
    weights = FFNWeights(scale, eps, gate, up, down)
    tensors = (scale, weights.gate, weights.up, weights.down)
    if any(not t.is_contiguous() or t.dtype != weights.gate.dtype for t in tensors):
        return f"the weights of {type(module).__name__} are not all of one dtype and contiguous"
    return weights if _agrees(block, weights) else f"{type(module).__name__} computes something else"


@torch.no_grad()
def _agrees(block: Block, weights: FFNWeights) -> bool:
    """Whether the op's reference gives what the modules give, but for rounding."""
    hidden, dtype = weights.gate.shape[1], weights.gate.dtype
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(_PROOF_ROWS, hidden, generator=generator).to(weights.gate.device, dtype)
    x: Any = h[:, None]
    for module in block.chain:
        x = module(x)
    runs = torch.zeros(_PROOF_ROWS, dtype=torch.bool, device=h.device)
    mine, _ = reference(h, runs, weights)
    error = F.mse_loss(mine.float(), x[:, 0].float()).sqrt()
    # The norm's output, a and f are each rounded once more or less than by the modules: some eps.
    return bool(error <= 8 * torch.finfo(dtype).eps * x.float().square().mean().sqrt())
