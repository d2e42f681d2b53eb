"""Find the FFN blocks of a decoder language model, and prove that they are what they seem."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any, Literal

from torch import Tensor, nn
from transformers import PreTrainedModel

from skipcal.arch.blocks import Architecture as Architecture
from skipcal.arch.blocks import Block as Block
from skipcal.arch.blocks import BlockObserver as BlockObserver
from skipcal.arch.blocks import input_device as input_device
from skipcal.arch.blocks import observe as observe
from skipcal.arch.experts import bytes_read, is_mixture
from skipcal.arch.families import FAMILIES, UNSUPPORTED, Family
from skipcal.arch.proof import prove
from skipcal.arch.structure import layer_lists, missing, proposals
from skipcal.errors import UnsupportedModel


def unwrap(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside adapters' wrappers, or refuse what is none."""
    adapters = getattr(model, "peft_config", None) or {}
    if any(getattr(adapter, "is_prompt_learning", False) for adapter in adapters.values()):
        raise UnsupportedModel(
            "an adapter that learns a prompt puts tokens of its own before a text, so that positions are not "
            "those of the text; adapters inside the layers, such as LoRA, work"
        )
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    if not isinstance(inner, PreTrainedModel):
        raise UnsupportedModel(
            f"{type(model).__name__} is no transformers model; pass what "
            "AutoModelForCausalLM.from_pretrained returned (not a compiled wrapper of it)"
        )
    return inner


def locate(model: nn.Module) -> Architecture:
    """Locate the FFN blocks of `model` and prove them on a few tokens.

    The table's way to write the family down is tried first, then what the structure of the layers
    proposes. Raises UnsupportedModel, with what was found and how to register a family, when no
    chain of modules satisfies `h_i + f_i == sum` in every layer.
    """
    inner = unwrap(model)
    model_type = inner.config.get_text_config().model_type
    variants = FAMILIES.get(model_type, ())
    if not variants and model_type in UNSUPPORTED:
        raise UnsupportedModel(
            f"model type {model_type!r} has no FFN blocks to skip: {UNSUPPORTED[model_type]}; "
            "skipcal models lists the families that have"
        )
    tried: list[str] = []
    for first in range(len(variants)):
        blocks = _listed(inner, variants[first:])
        if isinstance(blocks, str):
            tried.append(blocks)
            continue
        errors = prove(inner, blocks)
        wrong = next(((i, e) for i, e in enumerate(errors) if isinstance(e, str)), None)
        if wrong is None:
            return _architecture(inner, "table", blocks, errors)
        tried.append(f"{' -> '.join(blocks[wrong[0]].family.chain)}: layer {wrong[0]}: {wrong[1]}")
    for path in layer_lists(inner):
        chosen = _by_structure(inner, path)
        if isinstance(chosen, str):
            tried.append(chosen)
            continue
        blocks, errors = chosen
        return _architecture(inner, "structure", blocks, errors)
    raise UnsupportedModel(_refusal(inner, model_type, tried))


def _architecture(
    model: PreTrainedModel,
    found: Literal["table", "structure"],
    blocks: Sequence[Block],
    errors: Sequence[float | str],
) -> Architecture:
    config = model.config.get_text_config()
    return Architecture(
        model_type=config.model_type,
        found=found,
        stack=model.get_submodule(blocks[0].family.layers.rpartition(".")[0]),
        blocks=tuple(_counted(block, config) for block in blocks),
        hidden_size=config.hidden_size,
        intermediate_size=_ffn_width(config),
        proof_error=max(error for error in errors if isinstance(error, float)),
    )


def _listed(model: PreTrainedModel, variants: Sequence[Family]) -> list[Block] | str:
    """The blocks by the first variant whose names each layer has; a string says what is missing."""
    path = variants[0].layers
    try:
        layers: Any = model.get_submodule(path)
    except AttributeError:
        return f"{path}: no such list of layers"
    blocks = []
    for index, layer in enumerate(layers):
        family = next((family for family in variants if not missing(layer, family)), None)
        if family is None:
            lacking = ", ".join(missing(layer, variants[0]))
            return f"{path}[{index}] ({type(layer).__name__}) has no {lacking}"
        blocks.append(_block(index, layer, family))
    return blocks


def _by_structure(model: PreTrainedModel, path: str) -> tuple[list[Block], list[float | str]] | str:
    """Blocks and errors of the likeliest proven family, the same for all layers where there is one."""
    found_layers: Any = model.get_submodule(path)
    layers = list(found_layers)  # children() would name a layer that stands there twice only once
    proposed = [
        _block(index, layers[index], family)
        for index, families in enumerate(proposals(model, path))
        for family in families
    ]
    proven: list[dict[Family, tuple[Block, float]]] = [{} for _ in layers]
    for block, error in zip(proposed, prove(model, proposed), strict=True):
        if isinstance(error, float):
            proven[block.index][block.family] = (block, error)
    if empty := [index for index, found in enumerate(proven) if not found]:
        return f"{path}: in layer {empty[0]} no run of modules has h + f == sum"
    common = next((family for family in proven[0] if all(family in found for found in proven)), None)
    chosen = [found[common] if common else next(iter(found.values())) for found in proven]
    return [block for block, _ in chosen], [error for _, error in chosen]


def _block(index: int, layer: nn.Module, family: Family) -> Block:
    """Turn the family's names into a layer's modules and numbers; what it weighs is left open."""

    def module(name: str | None) -> nn.Module | None:
        return attrgetter(name)(layer) if name else None

    def number(name: str | None) -> float | Tensor:
        value = attrgetter(name)(layer) if name else 1.0
        return value if isinstance(value, Tensor) else float(value)

    chain = tuple(attrgetter(name)(layer) for name in family.chain)
    return Block(
        index=index,
        layer=layer,
        chain=chain,
        scale=float(number(family.scale)),
        stream_scale=number(family.stream_scale),
        output_scale=number(family.output_scale),
        attention=module(family.attention),
        into=module(family.into),
        family=family,
    )


def _counted(block: Block, config: Any) -> Block:
    """The block with its bytes. After the proof: some formats pack their weights in a first pass."""
    return replace(
        block,
        weight_bytes=bytes_read(block.chain, config, block.index),
        layer_bytes=bytes_read((block.layer,), config, block.index),
        mixture=is_mixture(block.chain, config),
    )


def _ffn_width(config: Any) -> int | None:
    width = next(
        (w for name in ("intermediate_size", "ffn_dim", "n_inner") if (w := getattr(config, name, None))),
        None,
    )
    if width is None and hasattr(config, "n_inner"):  # GPT-2 leaves 4 * hidden unsaid
        width = 4 * config.hidden_size
    return width if isinstance(width, int) else None


def _refusal(model: PreTrainedModel, model_type: str, tried: list[str]) -> str:
    lists = [
        f"{path} ({len(module)} x {type(module[0]).__name__}: "
        f"{', '.join(name for name, _ in module[0].named_children())})"
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    ]
    close = difflib.get_close_matches(model_type, FAMILIES, n=2)
    parts = [
        f"no FFN block that satisfies h + f == layer output was found in model type {model_type!r}",
        f"layer lists: {'; '.join(lists) or 'none'}",
        f"tried: {'; '.join(tried) or 'nothing, no list has an entry for each layer'}",
        f"listed families: {', '.join(sorted(FAMILIES))}",
        *([f"did you mean {' or '.join(close)}?"] if close and model_type not in close else []),
        f'register one with skipcal.register_family("{model_type}", layers="model.layers", '
        'chain=("post_attention_layernorm", "mlp")), with attention="self_attn" where it is parallel',
    ]
    return "; ".join(parts)
