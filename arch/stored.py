"""Where weights really are: behind quantized tensors, on disk, on a device.

A parameter may be a plain tensor, a wrapper around several (torchao, quanto), packed bytes with their
scales beside them (bitsandbytes), or an empty tensor on `meta` whose values accelerate reads from disk
for each pass. Nothing of skipcal computes with weights; what it does ask of them, it asks here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_COMPUTES_BITS = 16  # no layer computes in less; floating point of 8 bits only stores


def stored(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that hold a parameter or buffer, always in the same order.

    One that tensor parallelism has divided over processes counts as the whole that it stands for.
    """
    if is_wrapper(tensor) and not _is_sharded(tensor):
        names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        for name in names:
            yield from stored(getattr(tensor, name))
        return
    yield tensor
    state: Any = getattr(tensor, "quant_state", None)  # bitsandbytes keeps the scales of 4 bits here
    if state is not None:
        yield from (value for value in state.as_dict().values() if isinstance(value, Tensor))


def is_wrapper(tensor: Tensor) -> bool:
    """Whether the tensor only poses as one of its dtype, and others hold its values."""
    return hasattr(tensor, "__tensor_flatten__")


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def stored_bytes(tensor: Tensor) -> int:
    """Bytes that reading a parameter or buffer takes, its scales included."""
    held = sum(part.numel() * part.element_size() for part in stored(tensor))
    if type(tensor).__name__ == "Int8Params":  # bitsandbytes: a float32 a row, kept by the module
        held += 4 * tensor.shape[0]
    return held


def named_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Every weight by its name, in alphabetical order; tied ones once, offloaded ones with their values.

    Of quantized models the saved buffers too: some formats keep weights there. Offloaded weights are
    read one module at a time, and are gone again when the next is asked for.
    """
    names = [name for name, _ in model.named_parameters()]
    tied = model.all_tied_weights_keys  # two empty tensors, where they are offloaded
    names = [name for name in names if tied.get(name) not in names]
    if getattr(model.config, "quantization_config", None) is not None:
        saved = model.state_dict().keys()
        names += [name for name, _ in model.named_buffers() if name in saved]
    for name in sorted(names):
        place, _, own = name.rpartition(".")
        module = model.get_submodule(place)
        with align_module_device(module):
            weight = getattr(module, own)
            # A sharded one is put together for a moment, in all processes of tensor parallelism at once.
            yield name, weight.full_tensor() if _is_sharded(weight) else weight


def compute_place(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where and in which precision a module computes, wherever its weights are kept in between."""
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            if not parameter.is_floating_point() or parameter.dtype.itemsize * 8 < _COMPUTES_BITS:
                continue
            if not parameter.is_meta:
                return parameter.device, parameter.dtype
            hook: Any = getattr(part, "_hf_hook", None)
            return torch.device(getattr(hook, "execution_device", None) or "cpu"), parameter.dtype
    return torch.device("cpu"), torch.float32
