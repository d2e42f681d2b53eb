"""FFNs that skipcal's op can run in place of vLLM's module: gate and up side by side, a SiLU, down."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from skipcal.ops.ffn import FFNWeights, ffn
from skipcal.serving.blocks import ServedBlock

_PROOF_ROWS = 4
_ROUNDINGS = 8  # eps of f's root mean square: gate, up, a and f are each rounded once more or less


def plain_weights(block: ServedBlock) -> FFNWeights | str:
    """The weights of a block's FFN for skipcal.ops.ffn, or why it cannot run there.

    Names are only a guess: on a few random rows the op has to give what the module gives.
    """
    kind = type(block.chain[0]).__name__
    if block.scale != 1:
        return f"what {kind} makes is scaled as it is added"
    if len(block.chain) > 1:
        return f"{kind} is followed by a norm"
    linears: list[Any] = [getattr(block.chain[0], name, None) for name in ("gate_up_proj", "down_proj")]
    if not all(isinstance(getattr(linear, "weight", None), Tensor) for linear in linears):
        return f"{kind} has no gate_up_proj and down_proj"
    if any(getattr(linear, "bias", None) is not None for linear in linears):
        return f"the linears of {kind} have biases"
    both, down = (linear.weight for linear in linears)
    hidden, width = both.shape[-1], down.shape[-1]
    if list(both.shape) != [2 * width, hidden] or list(down.shape) != [hidden, width]:
        return f"the weights of {kind} are packed"
    if any(t.dtype != block.place[1] or not t.is_contiguous() for t in (both, down)):
        return f"the weights of {kind} are not of the model's precision, or not contiguous"
    weights = FFNWeights(None, 0.0, both[:width], both[width:], down)
    return weights if _agrees(block, weights) else f"{kind} computes something else than skipcal's op"


@torch.no_grad()
def _agrees(block: ServedBlock, weights: FFNWeights) -> bool:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_PROOF_ROWS, weights.gate.shape[1], generator=generator).to(*block.place)
    f = block.own_ffn()(x).float()
    runs = torch.zeros(_PROOF_ROWS, dtype=torch.int8, device=x.device)
    mine, _ = ffn(x, runs, weights, x=x)
    error = (mine.float() - f).square().mean().sqrt()
    return bool(error <= _ROUNDINGS * torch.finfo(x.dtype).eps * f.square().mean().sqrt())
