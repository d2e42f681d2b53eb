"""What a located FFN block is, and how `h_i` and `f_i` are read from it while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from skipcal.arch.families import Family
from skipcal.arch.patch import InstancePatches
from skipcal.arch.stored import compute_place


@dataclass(frozen=True, eq=False)
class Block:
    """The FFN block of one decoder layer: `chain[0]` is entered with `h`, `chain[-1]` returns `f/scale`.

    scale, stream_scale, output_scale: numbers, or tensors that broadcast over [..., hidden].
    attention:    parallel layers only: its output and the layer's input add up to `h`.
    summed:       the outputs of the last `summed` modules of the chain add up to `f/scale`.
    into:         the module that is given h + f; None: the layer returns it, times `output_scale`.
    weight_bytes: bytes that one token does not read when the block is skipped; of a mixture's
                  experts those that one token is routed to.
    layer_bytes:  the same for the whole layer, attention included.
    mixture:      the FFN has experts, of which a token uses some.
    """

    index: int
    layer: nn.Module
    chain: tuple[nn.Module, ...]
    scale: float
    family: Family
    stream_scale: float | Tensor = 1.0
    output_scale: float | Tensor = 1.0
    attention: nn.Module | None = None
    into: nn.Module | None = None
    weight_bytes: int = 0
    layer_bytes: int = 0
    mixture: bool = False

    @property
    def outputs(self) -> tuple[nn.Module, ...]:
        """The modules whose outputs add up to `f/scale`; the last of the chain is the last of them."""
        return self.chain[len(self.chain) - self.family.summed :]

    @property
    def place(self) -> tuple[torch.device, torch.dtype]:
        """Where and in which precision the layer computes, wherever its weights are kept in between."""
        return compute_place(self.layer)

    @property
    def adds_to_its_input(self) -> bool:
        """Whether h is the very tensor that `chain[0]` is given, and the layer adds f to it as it is."""
        return self.attention is None and is_one(self.stream_scale)

    @property
    def returns_the_sum(self) -> bool:
        """Whether the layer's output is h + f."""
        return self.into is None and is_one(self.output_scale)


@dataclass(frozen=True)
class Architecture:
    """The located blocks of one model.

    stack: the module that holds the decoder layers; its forward runs without the LM head.
    proof_error: the largest `|h + f - sum|` of an element, relative to the terms of that sum.
    """

    model_type: str
    found: Literal["table", "structure"]
    stack: nn.Module
    blocks: tuple[Block, ...]
    hidden_size: int
    intermediate_size: int | None
    proof_error: float

    @property
    def num_layers(self) -> int:
        """Number of decoder layers, L."""
        return len(self.blocks)

    @property
    def family(self) -> Family:
        """How the last layer's block is written down; layers may differ."""
        return self.blocks[-1].family

    @property
    def kind(self) -> str:
        """`sequential` or `parallel`, and `mixture` where a layer has experts."""
        order = "parallel" if any(block.attention is not None for block in self.blocks) else "sequential"
        return f"{order} mixture" if any(block.mixture for block in self.blocks) else order


def context_tokens(config: PretrainedConfig) -> int | None:
    """The longest row a model takes, in tokens, where its configuration says so."""
    longest: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return longest


def rotary_settings(config: PretrainedConfig) -> list[dict[str, Any]]:
    """Those of each rotary embedding that the configuration names; kinds of layers may have their own."""
    given: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    return [given, *(value for value in given.values() if isinstance(value, dict))]


def parallel_limit(config: PretrainedConfig, prompt_tokens: int) -> int | None:
    """The longest row, in tokens, whose rotary angles in one pass are those of decoding it; None: any.

    prompt_tokens: that are prefilled. LongRoPE takes other angles for all of a row that is longer than the
    model was first trained on, dynamic NTK others for every length.
    """
    text = config.get_text_config()
    limits = []
    for rope in rotary_settings(text):
        kind = str(rope.get("rope_type"))
        if kind == "longrope" and prompt_tokens <= rope["original_max_position_embeddings"]:
            limits.append(int(rope["original_max_position_embeddings"]))
        elif "dynamic" in kind:
            limits.append(max(prompt_tokens, int(text.max_position_embeddings)))
    return min(limits, default=None)


def is_one(scale: float | Tensor) -> bool:
    """Whether scaling by it changes nothing; a tensor's values are not looked at."""
    return isinstance(scale, float) and scale == 1.0


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The hidden states a module is given, whether by place or by name."""
    if args:
        return args[0]
    return kwargs["hidden_states"] if "hidden_states" in kwargs else next(iter(kwargs.values()), None)


def first_output(output: Any) -> Any:
    """The hidden states a module returns, alone or before other things."""
    return output[0] if isinstance(output, list | tuple) else output


class StreamReader:
    """Forms `h` where a block is entered; in parallel layers from what was seen before it.

    wanted: asked before anything is kept, so that passes nobody looks at cost no memory.
    """

    def __init__(self, blocks: tuple[Block, ...], wanted: Callable[[], bool] = lambda: True) -> None:
        """Nothing is hooked before `attach`."""
        self._blocks = tuple(block for block in blocks if block.attention is not None)
        self._wanted = wanted
        self._given: dict[int, Tensor] = {}
        self._attended: dict[int, Tensor] = {}
        self._patches = InstancePatches()

    def attach(self) -> None:
        """Hook the parallel layers among the blocks."""
        for block in self._blocks:
            assert block.attention is not None
            self._patches.before_forward(block.layer, self._enter(block.index))
            self._patches.after_forward(block.attention, self._attend(block.index))

    def detach(self) -> None:
        """Take the hooks off. A second call does nothing."""
        self._patches.restore()
        self._given.clear()
        self._attended.clear()

    def h(self, block: Block, entering: Tensor) -> Tensor | None:
        """The stream of a block whose first module is given `entering`, in its shape and dtype.

        None: the layer has not called its attention yet (or another module than that), so h is not known.
        """
        stream = entering
        if block.attention is not None:
            given, attended = self._given.pop(block.index, None), self._attended.pop(block.index, None)
            if given is None or attended is None or given.shape != attended.shape:
                return None
            stream = given.to(attended.device) + attended  # split models move a layer's input inside it
        return stream if is_one(block.stream_scale) else stream * block.stream_scale

    def _enter(self, index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._wanted():
                self._given[index] = first_input(args, kwargs)

        return hook

    def _attend(self, index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            if self._wanted():
                self._attended[index] = first_output(output)

        return hook


BlockObserver = Callable[[int, Tensor, Tensor], None]


@contextmanager
def observe(blocks: tuple[Block, ...], observer: BlockObserver) -> Iterator[None]:
    """Call `observer(layer, h, f)` whenever a block ran; the hooks are gone afterwards.

    h and f come as the layer passes them: [batch, seq, hidden], or flattened to
    [batch * seq, hidden] in families that flatten. Some layers go on to change these tensors in
    place: an observer that keeps one has to clone it.
    """
    reader = StreamReader(blocks)
    entered: dict[int, Tensor] = {}
    added: dict[int, Tensor] = {}

    def before(block: Block) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            h = reader.h(block, first_input(args, kwargs))
            added.pop(block.index, None)
            if h is not None:
                entered[block.index] = h

        return hook

    def after(block: Block, last: bool) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            part = first_output(output)
            f = added.pop(block.index) + part if block.index in added else part
            if not last:
                added[block.index] = f
            elif (h := entered.pop(block.index, None)) is not None:
                # else the chain is not called in this order, and the proof says so
                f = f.reshape(h.shape) if f.numel() == h.numel() else f  # some mixtures flatten f alone
                observer(block.index, h, f * block.scale if block.scale != 1.0 else f)

        return hook

    patches = InstancePatches()
    try:
        reader.attach()
        for block in blocks:
            patches.before_forward(block.chain[0], before(block))
            for module in block.outputs:
                patches.after_forward(module, after(block, module is block.chain[-1]))
        yield
    finally:
        reader.detach()
        patches.restore()


@contextmanager
def observe_sums(blocks: tuple[Block, ...], observer: Callable[[int, Tensor, Any], None]) -> Iterator[None]:
    """Call `observer(layer, sum, output)` when h + f of a block is there, as the model computed it.

    sum: what `into` is given, else what the layer returns, times `output_scale`; output: all that
    the layer returns, None where `into` comes before that.
    """

    def given(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            observer(index, first_input(args, kwargs), None)

        return hook

    def returned(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            observer(index, first_output(output), output)

        return hook

    patches = InstancePatches()
    try:
        for block in blocks:
            if block.into is None:
                patches.after_forward(block.layer, returned(block.index))
            else:
                patches.before_forward(block.into, given(block.index))
        yield
    finally:
        patches.restore()


class _Enough(Exception):
    """The layers that were wanted of a pass have run."""


@contextmanager
def ending_before(block: Block) -> Iterator[None]:
    """A pass inside ends where the layer of `block` would begin, and gives nothing back."""

    def end(_module: nn.Module, _args: Any) -> None:
        raise _Enough

    handle = block.layer.register_forward_pre_hook(end)
    try:
        yield
    except _Enough:
        pass
    finally:
        handle.remove()


def input_device(module: nn.Module) -> torch.device:
    """Device for input ids: that of the first parameter that is not offloaded."""
    return next((p.device for p in module.parameters() if p.device.type != "meta"), torch.device("cpu"))
