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
from skipcal.errors import UnsupportedModel

PROOF_TOKENS = 8
# h + f is formed here in float32 and rounded by the layer in its own dtype, after a possible
# scaling: two roundings of half an eps, and the same again for the order of operations.
PROOF_TOLERANCE_EPS = 2.0


@dataclass(frozen=True)
class Block:
    """The FFN block of one decoder layer: `chain[0]` is given `h`, `chain[-1]` returns `f/scale`."""

    index: int
    layer: nn.Module
    chain: tuple[nn.Module, ...]
    scale: float

    @property
    def weight_bytes(self) -> int:
        """Bytes of parameters that a token does not need when this block is skipped."""
        seen = {id(p): p for module in self.chain for p in module.parameters()}
        return sum(p.numel() * p.element_size() for p in seen.values())


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
    found: Literal["table", "structure"] = "table" if listed else "structure"
    tried: list[str] = []
    for family in [listed] if listed else _guesses(inner):
        candidate = _resolve(inner, model_type, family, found)
        if isinstance(candidate, str):
            tried.append(candidate)
            continue
        error, where = _prove(candidate)
        if where is None:
            return Architecture(**{**candidate.__dict__, "proof_error": error})
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
            f = output[0] if isinstance(output, tuple) else output
            observer(block.index, entered.pop(block.index), f * block.scale if block.scale != 1.0 else f)

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
        for chain, scale in chains:
            if all(_has(module[0], name) for name in (*chain, *([scale] if scale else []))):
                yield Family(layers=path, chain=chain, scale=scale)


def _has(layer: nn.Module, path: str) -> bool:
    try:
        attrgetter(path)(layer)
    except AttributeError:
        return False
    return True


def _resolve(
    model: PreTrainedModel, model_type: str, family: Family, found: Literal["table", "structure"]
) -> Architecture | str:
    """Turn paths into modules; a string says what is missing."""
    try:
        layers = model.get_submodule(family.layers)
    except AttributeError:
        return f"{family.layers}: no such list of layers"
    blocks = []
    for index, layer in enumerate(layers.children()):
        missing = [name for name in (*family.chain, family.scale) if name and not _has(layer, name)]
        if missing:
            return f"{family.layers}[{index}] ({type(layer).__name__}) has no {', '.join(missing)}"
        chain = tuple(attrgetter(name)(layer) for name in family.chain)
        scale = float(attrgetter(family.scale)(layer)) if family.scale else 1.0
        blocks.append(Block(index=index, layer=layer, chain=chain, scale=scale))
    config = model.config.get_text_config()
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


def _ffn_width(config: Any) -> int | None:
    width = next(
        (w for name in ("intermediate_size", "ffn_dim", "n_inner") if (w := getattr(config, name, None))),
        None,
    )
    if width is None and hasattr(config, "n_inner"):  # GPT-2 leaves 4 * hidden unsaid
        width = 4 * config.hidden_size
    return width if isinstance(width, int) else None


@torch.no_grad()
def _prove(arch: Architecture) -> tuple[float, str | None]:
    """Largest relative error of `h_i + f_i == output_i`, and the first layer that fails, in words."""
    parts: dict[int, tuple[Tensor, Tensor]] = {}
    outputs: dict[int, Tensor] = {}

    def keep_output(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            outputs[index] = output[0] if isinstance(output, tuple) else output

        return hook

    vocabulary = arch.stack.get_input_embeddings().num_embeddings  # type: ignore[operator]
    ids = torch.arange(1, PROOF_TOKENS + 1, device=input_device(arch.stack))[None] % vocabulary
    handles = [b.layer.register_forward_hook(keep_output(b.index)) for b in arch.blocks]
    modes = [(module, module.training) for module in arch.stack.modules()]
    try:
        arch.stack.eval()  # dropout sits between the FFN and the sum in some families
        with observe(arch.blocks, lambda index, h, f: parts.update({index: (h, f)})):
            arch.stack(input_ids=ids, use_cache=False)
    finally:
        for module, training in modes:
            module.training = training
        for handle in handles:
            handle.remove()

    worst = 0.0
    for block in arch.blocks:
        if block.index not in parts or block.index not in outputs:
            return math.nan, f"layer {block.index}: the modules were not called in that order"
        h, f = (part.float() for part in parts[block.index])
        output = outputs[block.index]
        scale = max(h.abs().max().item(), f.abs().max().item(), torch.finfo(torch.float32).tiny)
        error = ((h + f).reshape(-1) - output.float().reshape(-1)).abs().max().item() / scale
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
