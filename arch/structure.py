"""Where the FFN blocks of a model may be that no table lists: proposals, for the proof to judge.

The modules of each layer are watched in one forward pass. Proposed is every way to write a block
down that the table knows by names, and every run of modules called one after the other that are
given nothing but hidden states (attention is given more): as what follows attention, and as what
stands beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from skipcal.arch.blocks import first_input, first_output
from skipcal.arch.families import FAMILIES, Family
from skipcal.arch.proof import evaluating, proof_ids


@dataclass(frozen=True)
class Call:
    """One call of a layer's child. alone: it is given hidden states and nothing else."""

    name: str
    alone: bool
    from_stream: bool  # what it is given has the stream's size
    to_stream: bool  # so has what it returns
    weights: int  # numbers in its parameters
    passes_on: bool  # in evaluation mode it returns what it is given


def layer_lists(model: PreTrainedModel) -> list[str]:
    """Paths of the lists of modules that have as many as the configuration says there are layers."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]


def proposals(model: PreTrainedModel, path: str) -> list[list[Family]]:
    """For each layer of the list at `path`, the families that may describe its block, likely ones first."""
    found: Any = model.get_submodule(path)
    layers = list(found)
    calls = _watched(model, layers)
    return [
        _in_order(replace(family, layers=path) for family in (*_known(layer), *_runs(layer, seen)))
        for layer, seen in zip(layers, calls, strict=True)
    ]


def missing(layer: nn.Module, family: Family) -> list[str]:
    """Names of the family that the layer lacks; some layers carry a None in a module's place."""
    lacking = []
    for name in (*family.modules, *family.values):
        try:
            found = attrgetter(name)(layer)
        except AttributeError:
            found = None
        if found is None or (name in family.modules and not isinstance(found, nn.Module)):
            lacking.append(name)
    return lacking


def _in_order(families: Iterable[Family]) -> list[Family]:
    """Each once, parallel ones last.

    Of a sequential block h = x + a holds too, so a parallel reading of it would be proven as well.
    """
    return sorted(dict.fromkeys(families), key=lambda family: family.attention is not None)


def _known(layer: nn.Module) -> Iterator[Family]:
    known = [family for variants in FAMILIES.values() for family in variants if not missing(layer, family)]
    yield from sorted(known, key=lambda family: (family.into or "", not family.whole))


def _runs(layer: nn.Module, calls: list[Call]) -> Iterator[Family]:
    """Runs of calls between the first call of a layer and its end, long ones first.

    What is called first is given the layer's own input, which is no stream after attention. And the
    FFN has most of the weights that attention has not: some layers end with a small branch of another kind.
    """
    counts = [call.name for call in calls]
    single = [call for call in calls if counts.count(call.name) == 1]
    scales = [None, *_known_scales(layer)]
    for start in range(1, len(single)):
        for end in range(len(single) - 1, start - 1, -1):
            run = single[start : end + 1]
            if not all(call.alone for call in run) or not run[0].from_stream or not run[-1].to_stream:
                continue
            ends = (run[0], run[-1])
            if any(call.passes_on for call in ends) or 2 * _weights(run) <= _weights(single):
                continue
            chain = tuple(call.name for call in run if call.weights or call in ends)
            before = [call.name for call in single[:start] if not call.alone and call.to_stream]
            for scale in scales:
                yield Family("", chain, scale)
                yield from (Family("", chain, scale, attention) for attention in before)


def _weights(calls: list[Call]) -> int:
    return sum(call.weights for call in calls if call.alone)


def _known_scales(layer: nn.Module) -> list[str]:
    names = {family.scale for variants in FAMILIES.values() for family in variants if family.scale}
    return sorted(name for name in names if isinstance(getattr(layer, name, None), float))


@torch.no_grad()
def _watched(model: PreTrainedModel, layers: list[nn.Module]) -> list[list[Call]]:
    """The calls of each layer's children in one forward pass."""
    ids = proof_ids(model)
    calls: list[list[Call]] = [[] for _ in layers]

    def watch(place: int, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given, returned = first_input(args, kwargs), first_output(output)
            calls[place].append(
                Call(
                    name=name,
                    alone=len(args) + len(kwargs) == 1,
                    from_stream=_is_stream(given, ids),
                    to_stream=_is_stream(returned, ids),
                    weights=sum(parameter.numel() for parameter in module.parameters()),
                    passes_on=isinstance(module, nn.Dropout | nn.Identity),
                )
            )

        return hook

    handles = [
        child.register_forward_hook(watch(place, name), with_kwargs=True)
        for place, layer in enumerate(layers)
        for name, child in layer.named_children()
    ]
    try:
        with evaluating(model):
            model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _is_stream(x: Any, ids: Tensor) -> bool:
    """Whether x is one vector a token: [batch, seq, width] or [batch * seq, width]."""
    return isinstance(x, Tensor) and x.is_floating_point() and x.shape[:-1].numel() == ids.numel()
