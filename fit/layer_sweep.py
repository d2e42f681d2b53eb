"""One sweep over the calibration text, layer by layer, with a policy's earlier skips already applied.

The residual streams of all rows wait on disk between layers, so memory does not grow with the text:
one batch, one layer's moments and one layer's weights are in use at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from skipcal.arch.blocks import ending_before, first_input, first_output
from skipcal.arch.locate import Architecture, Block, input_device, observe
from skipcal.errors import UnsupportedModel
from skipcal.text.batching import batches

Given = tuple[tuple[Any, ...], dict[str, Any]]  # what a layer is called with, less the stream


class LayerRunner:
    """Runs single decoder layers of a model on the streams of whole rows.

    What a layer is given besides the stream (masks, rotary angles) depends on the shape of a batch
    only, for all rows are of one length and nothing is padded. So it is caught once for each shape.
    Models where it depends on the text too are refused.
    """

    def __init__(self, architecture: Architecture) -> None:
        """Nothing is caught yet."""
        self._architecture = architecture
        self._caught: dict[torch.Size, dict[int, Given]] = {}

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """The stream that enters the first layer, [batch, seq, hidden], of ids [batch, seq].

        Raises UnsupportedModel where the layers are given more that depends on the text.
        """
        if ids.shape not in self._caught:
            _, given = self._entering(ids, whole=True)
            other = (ids + 1) % self._architecture.stack.config.get_text_config().vocab_size  # type: ignore[operator, union-attr]
            _refuse_other_text(given, self._entering(other, whole=True)[1])
            self._caught[ids.shape] = given
        return self._entering(ids, whole=False)[0]

    def _entering(self, ids: Tensor, *, whole: bool) -> tuple[Tensor, dict[int, Given]]:
        """The stream that enters the first layer, and what layers are given besides; whole: all of them."""
        streams: list[Tensor] = []
        caught: dict[int, Given] = {}

        def catch(index: int) -> Any:
            def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
                caught[index] = (args[1:], rest)
                if index == 0:
                    streams.append(first_input(args, kwargs).clone())

            return hook

        handles = [
            block.layer.register_forward_pre_hook(catch(block.index), with_kwargs=True)
            for block in self._architecture.blocks
        ]
        stack: Any = self._architecture.stack
        try:
            with nullcontext() if whole else ending_before(self._architecture.blocks[0]):
                stack(input_ids=ids, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return streams[0], caught

    @torch.no_grad()
    def run(self, block: Block, stream: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """h, f and the layer's output, each [batch, seq, hidden], of the stream that enters the layer.

        added: what the FFN block adds instead of its own f.
        """
        seen: list[tuple[Tensor, Tensor]] = []
        args, kwargs = self._caught[stream.shape[:2]][block.index]
        with (
            nullcontext() if added is None else _adding(block, added),
            observe((block,), lambda _index, h, f: seen.append((h.clone(), f.clone()))),
        ):
            output = block.layer(stream, *args, **kwargs)
        h, f = seen[0]
        return h.reshape(stream.shape), f.reshape(stream.shape), first_output(output)


@contextmanager
def _adding(block: Block, added: Tensor) -> Iterator[None]:
    """The layer with `added` [batch, seq, hidden] in place of f."""

    def replace(module: nn.Module, _args: Any, output: Any) -> Any:
        y = first_output(output)
        last = module is block.chain[-1]
        mine = (added / block.scale).to(y.dtype).reshape(y.shape) if last else torch.zeros_like(y)
        return (mine, *output[1:]) if isinstance(output, tuple) else mine

    handles = [module.register_forward_hook(replace) for module in block.outputs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _refuse_other_text(given: dict[int, Given], other: dict[int, Given]) -> None:
    """Raise UnsupportedModel where a layer is given other things for another text of the same shape."""
    for index, (args, kwargs) in given.items():
        mine = {**{f"argument {place + 1}": value for place, value in enumerate(args)}, **kwargs}
        theirs = [*other[index][0], *other[index][1].values()]
        for (name, value), another in zip(mine.items(), theirs, strict=True):
            if not _alike(value, another):
                raise UnsupportedModel(
                    f"layer {index} is given {name} besides the stream, which depends on the text, so its "
                    "blocks cannot be fitted one after the other; use the rule cosine (skipcal profile)"
                )


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_alike, one, other))
    return isinstance(one, Tensor) == isinstance(other, Tensor)


class StreamStore:
    """Tensors of numbered batches in a folder, one file each."""

    def __init__(self, folder: Path) -> None:
        """Use `folder`, which is the caller's to remove."""
        self._folder = folder
        self._count = 0

    def __len__(self) -> int:
        """Number of batches."""
        return self._count

    def write(self, number: int, **tensors: Tensor) -> None:
        """Keep the tensors of a batch, in place of what it held before."""
        save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, self._file(number))
        self._count = max(self._count, number + 1)

    def read(self, device: torch.device) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """All batches in order."""
        for number in range(self._count):
            found = load_file(self._file(number))
            yield number, {name: t.to(device) for name, t in found.items()}

    def copied(self, folder: Path) -> StreamStore:
        """The same batches in another folder, which has to be empty."""
        shutil.copytree(self._folder, folder, dirs_exist_ok=True)
        other = StreamStore(folder)
        other._count = self._count
        return other

    def _file(self, number: int) -> Path:
        return self._folder / f"{number}.safetensors"


def made(folder: str, name: str) -> Path:
    """A folder in another, made."""
    path = Path(folder, name)
    path.mkdir()
    return path


class RowSweep:
    """What sweeps over rows of equal length do alike, layer by layer, with the streams on disk.

    first: positions below it run the full model and count nowhere: what is given, and the warm-up.
    """

    def __init__(
        self, architecture: Architecture, rows: Sequence[Sequence[int]], *, first: int, batch_size: int
    ) -> None:
        """Nothing runs yet."""
        self.architecture = architecture
        self.rows = rows
        self.first = first
        self.device = input_device(architecture.stack)
        self._batch_size = batch_size
        self._runner = LayerRunner(architecture)

    @property
    def tokens(self) -> int:
        """Those that count."""
        return len(self.rows) * (len(self.rows[0]) - self.first)

    def embedded(self, folder: Path) -> StreamStore:
        """The streams that enter the first layer, in `folder`."""
        store = StreamStore(folder)
        for number, rows in enumerate(batches(self.rows, self._batch_size)):
            store.write(number, stream=self._runner.embed(torch.tensor(rows, device=self.device)))
        return store

    def run(self, block: Block, store: StreamStore) -> None:
        """A layer as it is: the streams that enter it become those that leave it."""
        for number, kept in store.read(self.device):
            store.write(number, stream=self._runner.run(block, kept["stream"])[2])

    def open(self, block: Block, store: StreamStore) -> None:
        """Run a layer and keep h and f of every batch, [batch, seq, hidden], until `close`."""
        for number, kept in store.read(self.device):
            h, f, _ = self._runner.run(block, kept["stream"])
            again = {} if block.returns_the_sum else {"stream": kept["stream"]}
            store.write(number, h=h, f=f, **again)

    def close(
        self, block: Block, store: StreamStore, number: int, kept: dict[str, Tensor], added: Tensor
    ) -> None:
        """Let a batch of an opened layer leave it with `added` [batch, seq, hidden] in place of f."""
        if block.returns_the_sum:
            store.write(number, stream=kept["h"] + added)
        else:  # the layer goes on with the sum
            store.write(number, stream=self._runner.run(block, kept["stream"], added)[2])

    def streams(self, store: StreamStore, full: StreamStore | None) -> Iterator[Tensor | None]:
        """By batch of `store`, the stream [batch, seq, hidden] that `full` has; None where it is no other."""
        if full is None:
            yield from [None] * len(store)
            return
        for _, kept in full.read(self.device):
            yield kept["stream"]

    def counted(self, x: Tensor) -> Tensor:
        """Tokens past the warm-up: [batch, seq, hidden] -> [tokens, hidden]."""
        return x[:, self.first :].flatten(0, 1)
