"""The FFN block of a layer as one operator that compilers do not look into: `skipcal::ffn`.

Which tokens skip is decided on the host, in Python. A compiler that traced the decision would freeze it. So
what it sees is an operator that is given x, h and the layer's name, and writes f into a tensor that the code
before it has made. Who decides is looked up at run time, where vLLM looks for its own attention layers: in
the context of the pass, which belongs to one engine. A compiled artefact thus holds names alone. It does not
depend on a policy, and another process may load it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

FFN: TypeAlias = Callable[[Tensor, Tensor], Tensor]  # (x, h) -> f, each [tokens, hidden]
OPERATOR = "skipcal::ffn"


def operator_name(layer: int) -> str:
    """What the FFN of a layer is called in the context of a pass."""
    return f"skipcal.ffn.{layer}"


def through_operator(layer: int) -> FFN:
    """The FFN block of a layer, as compilers may trace it."""
    _define()
    name = operator_name(layer)

    def ffn(x: Tensor, h: Tensor) -> Tensor:
        f = torch.empty_like(x)  # of its own: later norms add in place
        torch.ops.skipcal.ffn(x, h, f, name)
        return f

    return ffn


@functools.cache
def _define() -> torch.library.Library:  # the operator lives as long as this
    library = torch.library.Library("skipcal", "FRAGMENT")
    library.define("ffn(Tensor x, Tensor h, Tensor(a!) f, str layer) -> ()")
    library.impl("ffn", _ffn, "CompositeExplicitAutograd")
    torch.library.register_fake(OPERATOR, _nothing, lib=library)
    return library


def _ffn(x: Tensor, h: Tensor, f: Tensor, layer: str) -> None:
    ffn: FFN = _layers()[layer]
    f.copy_(ffn(x, h))


def _nothing(x: Tensor, h: Tensor, f: Tensor, layer: str) -> None:
    """What a compiler is told of the shapes: they are those of what it hands over."""


def _layers() -> Mapping[str, Any]:
    """The layers of the engine whose pass is running, by name."""
    from vllm.forward_context import get_forward_context

    layers: Mapping[str, Any] = get_forward_context().no_compile_layers
    return layers
