"""Attention of a captured step: skipcal.ops.decode_attention in place of torch's, while a step runs.

torch's attention reads every place of the cache it is given, and with one query a row leaves most
of a GPU idle. The op reads the places in use, whose number lies on the device. It stands where
transformers looks for attention functions, under a name of its own and for as long as a step runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from skipcal.arch.patch import InstancePatches
from skipcal.ops.decode_attention import decode_attention

_NAME = "skipcal_decode"
_NOT_OURS = ("position_bias", "softcap", "s_aux")  # what else a model may want of its attention


@dataclass
class Sight:
    """What attention may see of the cache, told anew for each step.

    length: 0-d int64, places in use with the current token's. valid: [batch, places] bool, False where there
    is padding; None: there is none.
    """

    length: Tensor
    valid: Tensor | None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
        """q: [batch, heads, head_dim]; k, v: a layer's cache -> [batch, heads, head_dim]."""
        return decode_attention(q, k, v, self.length, valid=self.valid, scale=scale)


@contextmanager
def step_attention(config: Any, sight: Sight) -> Iterator[None]:
    """Inside, models of `config` attend by the op; it is that of the stack, and of its attention modules."""
    torch_attention: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
    ) -> tuple[Tensor, None]:
        """query: [batch, heads, 1, head_dim] -> [batch, 1, heads, head_dim]."""
        scale = options.get("scaling")
        if any(options.get(name) is not None for name in _NOT_OURS) or key.shape != value.shape:
            out, _ = torch_attention(module, query, key, value, attention_mask, **options)
            return out, None
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return sight.attend(query[:, :, 0], key, value, scale=scale)[:, None], None

    patches = InstancePatches()
    ALL_ATTENTION_FUNCTIONS[_NAME] = attend
    patches.set(config, "_attn_implementation_internal", _NAME)
    try:
        yield
    finally:
        patches.restore()
        del ALL_ATTENTION_FUNCTIONS[_NAME]
