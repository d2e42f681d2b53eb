"""Find the FFN blocks of a decoder language model, and prove that they are what they seem."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from skipcal.arch.families import FAMILIES, Family
from skipcal.arch.stored import stored_bytes
from skipcal.errors import UnsupportedModel

PROOF_TOKENS = 8
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
# h + f is formed here in float64 and rounded by the layer in its own dtype, after a possible
# scaling: two roundings of half an eps, and the same again for the order of operations.
PROOF_TOLERANCE_EPS = 2.0


@dataclass(frozen=True)
class Block:
    """The FFN block of one decoder layer: `chain[0]` is given `h`, `chain[-1]` returns `f/scale`.

    weight_bytes: bytes that one token does not read when the block is skipped; of a mixture's
                  experts those that one token is routed to.
    layer_bytes:  the same for the whole layer, attention included.
    """

    index: int
    layer: nn.Module
    chain: tuple[nn.Module, ...]
    scale: float
    weight_bytes: int
    layer_bytes: int


@dataclass(frozen=True)
class Architecture:
    """The located blocks of one model.

    stack: the module that holds the decoder layers; its forward runs without the LM head.
    proof_error: the largest `|h + f - layer output|` relative to the layer's scale.
    """

    model_type: str
    found: Literal["table", "structure"]
    family: Family
    stack: nn.Module
    blocks: tuple[Block, ...]
    hidden_size: int
    intermediate_size: int | None
    proof_error: float

    @property
    def num_layers(self) -> int:
        """Number of decoder layers, L."""
        return len(self.blocks)


BlockObserver = Callable[[int, Tensor, Tensor], None]


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

    Raises UnsupportedModel, with what was found and how to register a family, when no chain of
    modules satisfies `h_i + f_i == layer output` in every layer.
    """
    inner = unwrap(model)
    model_type = inner.config.get_text_config().model_type
    listed = FAMILIES.get(model_type)
    tried: list[str] = []
    # A listed text model may sit deeper, in a multimodal one: then its structure tells.
    for family in (*([listed] if listed else []), *_guesses(inner)):
        found: Literal["table", "structure"] = "table" if family is listed else "structure"
        candidate = _resolve(inner, model_type, family, found)
        if isinstance(candidate, str):
            tried.append(candidate)
            continue
        error, where = _prove(inner, candidate)
        if where is None:
            settled = _resolve(inner, model_type, family, found)  # some formats pack weights in a first pass
            return Architecture(**{**settled.__dict__, "proof_error": error})
        tried.append(f"{' -> '.join(family.chain)}: {where}")
    raise UnsupportedModel(_refusal(inner, model_type, tried))


@contextmanager
def observe(blocks: tuple[Block, ...], observer: BlockObserver) -> Iterator[None]:
    """Call `observer(layer, h, f)` whenever a block ran; the hooks are gone afterwards.

    h and f come as the layer passes them: [batch, seq, hidden], or flattened to
    [batch * seq, hidden] in families that flatten.
    """
    entered: dict[int, Tensor] = {}

    def before(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entered[index] = args[0] if args else next(iter(kwargs.values()))

        return hook

    def after(block: Block) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            h = entered.pop(block.index, None)
            f = output[0] if isinstance(output, tuple) else output
            if h is not None:  # else the chain is not called in this order, and the proof says so
                observer(block.index, h, f * block.scale if block.scale != 1.0 else f)

        return hook

    handles = []
    try:
        for block in blocks:
            handles.append(block.chain[0].register_forward_pre_hook(before(block.index), with_kwargs=True))
            handles.append(block.chain[-1].register_forward_hook(after(block)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def input_device(module: nn.Module) -> torch.device:
    """Device for input ids: that of the first parameter that is not offloaded."""
    return next((p.device for p in module.parameters() if p.device.type != "meta"), torch.device("cpu"))


def _guesses(model: PreTrainedModel) -> Iterator[Family]:
    """Families for an unlisted model: each list of L modules with each chain that the table knows."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    chains = dict.fromkeys((family.chain, family.scale) for family in FAMILIES.values())
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) != count:
            continue
        guesses = [Family(layers=path, chain=chain, scale=scale) for chain, scale in chains]
        yield from (family for family in guesses if not _missing(module[0], family))


def _missing(layer: nn.Module, family: Family) -> list[str]:
    """Names of the family that the layer lacks; some layers carry a None in a module's place."""
    missing = []
    for name in (*family.chain, *([family.scale] if family.scale else [])):
        try:
            found = attrgetter(name)(layer)
        except AttributeError:
            found = None
        if found is None or (name in family.chain and not isinstance(found, nn.Module)):
            missing.append(name)
    return missing


def _resolve(
    model: PreTrainedModel, model_type: str, family: Family, found: Literal["table", "structure"]
) -> Architecture | str:
    """Turn paths into modules; a string says what is missing."""
    try:
        layers = model.get_submodule(family.layers)
    except AttributeError:
        return f"{family.layers}: no such list of layers"
    config = model.config.get_text_config()
    blocks = []
    for index, layer in enumerate(layers.children()):
        if missing := _missing(layer, family):
            return f"{family.layers}[{index}] ({type(layer).__name__}) has no {', '.join(missing)}"
        chain = tuple(attrgetter(name)(layer) for name in family.chain)
        scale = float(attrgetter(family.scale)(layer)) if family.scale else 1.0
        blocks.append(
            Block(
                index=index,
                layer=layer,
                chain=chain,
                scale=scale,
                weight_bytes=_bytes_read(chain, config),
                layer_bytes=_bytes_read((layer,), config),
            )
        )
    return Architecture(
        model_type=model_type,
        found=found,
        family=family,
        stack=model.get_submodule(family.layers.rpartition(".")[0]),
        blocks=tuple(blocks),
        hidden_size=config.hidden_size,
        intermediate_size=_ffn_width(config),
        proof_error=math.nan,
    )


def _bytes_read(chain: tuple[nn.Module, ...], config: Any) -> int:
    """Bytes of parameters and buffers (quantized weights are buffers in some formats) per token."""
    experts = next((n for key in _EXPERTS if (n := getattr(config, key, None))), None)
    routed = getattr(config, "num_experts_per_tok", None)
    share = routed / experts if experts and routed else 1.0
    seen: dict[int, float] = {}
    for module in chain:
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            part = share if name.startswith("experts.") or ".experts." in name else 1.0
            seen[id(tensor)] = part * stored_bytes(tensor)
    return round(sum(seen.values()))


def _ffn_width(config: Any) -> int | None:
    width = next(
        (w for name in ("intermediate_size", "ffn_dim", "n_inner") if (w := getattr(config, name, None))),
        None,
    )
    if width is None and hasattr(config, "n_inner"):  # GPT-2 leaves 4 * hidden unsaid
        width = 4 * config.hidden_size
    return width if isinstance(width, int) else None


@torch.no_grad()
def _prove(model: PreTrainedModel, arch: Architecture) -> tuple[float, str | None]:
    """Largest relative error of `h_i + f_i == output_i`, and the first layer that fails, in words."""
    parts: dict[int, tuple[Tensor, Tensor]] = {}
    outputs: dict[int, Tensor] = {}

    def keep_output(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            outputs[index] = output[0] if isinstance(output, tuple) else output

        return hook

    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(1, PROOF_TOKENS + 1, device=input_device(model))[None] % vocabulary
    handles = [b.layer.register_forward_hook(keep_output(b.index)) for b in arch.blocks]
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()  # dropout sits between the FFN and the sum in some families
        with observe(arch.blocks, lambda index, h, f: parts.update({index: (h, f)})):
            model(input_ids=ids, use_cache=False)
    finally:
        for module, training in modes:
            module.training = training
        for handle in handles:
            handle.remove()

    worst = 0.0
    for block in arch.blocks:
        if block.index not in parts or block.index not in outputs:
            return math.nan, f"layer {block.index}: the modules were not called in that order"
        h, f = (part.cpu().double().reshape(-1, part.shape[-1]) for part in parts[block.index])
        output = outputs[block.index].reshape(h.shape)
        # Token by token: one token with a huge activation must not hide the others' errors.
        scale = torch.maximum(h.abs().amax(-1), f.abs().amax(-1)).clamp_min(torch.finfo(torch.float32).tiny)
        error = float((((h + f) - output.cpu().double()).abs().amax(-1) / scale).max())
        limit = PROOF_TOLERANCE_EPS * torch.finfo(output.dtype).eps
        if not error <= limit:
            return (
                error,
                f"layer {block.index}: |h + f - output| is {error:.1e} of its scale, over {limit:.1e}",
            )
        worst = max(worst, error)
    return worst, None


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
        f"tried: {'; '.join(tried) or 'nothing, no known chain of modules fits'}",
        "attention and FFN in parallel cannot be skipped apart",
        f"listed families: {', '.join(sorted(FAMILIES))}",
        *([f"did you mean {' or '.join(close)}?"] if close and model_type not in close else []),
        f'register one with skipcal.register_family("{model_type}", layers="model.layers", '
        'chain=("post_attention_layernorm", "mlp"))',
    ]
    return "; ".join(parts)
