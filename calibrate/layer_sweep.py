"""One sweep over the calibration text, layer by layer, with a policy's earlier skips already applied.

The residual streams of all rows wait on disk between layers, so memory does not grow with the text:
one batch, one layer's moments and one layer's weights are in use at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from skipcal.arch.locate import Architecture, Block, observe


class LayerRunner:
    """Runs single decoder layers of a model on the streams of whole rows.

    What a layer is given besides the stream (masks, rotary angles) depends on the shape of a batch
    only, for all rows are of one length and nothing is padded. So it is caught once for each shape.
    """

    def __init__(self, architecture: Architecture) -> None:
        """Nothing is caught yet."""
        self._architecture = architecture
        self._caught: dict[torch.Size, dict[int, tuple[tuple[Any, ...], dict[str, Any]]]] = {}

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """The stream that enters the first layer, [batch, seq, hidden], of ids [batch, seq]."""
        entering: list[Tensor] = []
        caught: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

        def catch(index: int) -> Any:
            def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
                caught[index] = (args[1:], rest)
                if index == 0:
                    entering.append(args[0] if args else kwargs["hidden_states"])
                    if ids.shape in self._caught:
                        raise _Enough

            return hook

        handles = [
            block.layer.register_forward_pre_hook(catch(block.index), with_kwargs=True)
            for block in self._architecture.blocks
        ]
        stack: Any = self._architecture.stack
        try:
            stack(input_ids=ids, use_cache=False)
            self._caught[ids.shape] = caught
        except _Enough:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return entering[0]

    @torch.no_grad()
    def run(self, block: Block, stream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """h, f and the layer's output, each [batch, seq, hidden], of the stream that enters the layer."""
        seen: list[tuple[Tensor, Tensor]] = []
        args, kwargs = self._caught[stream.shape[:2]][block.index]
        with observe((block,), lambda _index, h, f: seen.append((h, f))):
            output = block.layer(stream, *args, **kwargs)
        h, f = seen[0]
        first = output[0] if isinstance(output, tuple) else output
        return h.reshape(stream.shape), f.reshape(stream.shape), first


class _Enough(Exception):
    """The embedding is all that was wanted of a forward pass."""


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

    def _file(self, number: int) -> Path:
        return self._folder / f"{number}.safetensors"
