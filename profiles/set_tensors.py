"""The surrogates of a profile's fixed sets: the tensors beside its JSON."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from skipcal.core.surrogates import Surrogate, Surrogates
from skipcal.errors import ProfileError, ProfileMismatch
from skipcal.files.reading import shown
from skipcal.profiles.tensor_file import (
    MAX_HEADER_BYTES,
    Header,
    ascending_layers,
    check_model,
    check_shapes,
    most_elements,
    packed,
    packed_maps,
    read_named,
    shapes_of_maps,
    unpacked,
    unpacked_maps,
)

FORMATS = ("skipcal.sets/1", "skipcal.sets/2")  # as those of a gate


@dataclass(frozen=True)
class SetTensors:
    """What the tensor file holds, and its bytes.

    sets: the surrogates of each set, whose layers are the set's; all maps are of one rank.
    """

    sets: tuple[Surrogates, ...]
    fingerprint: str
    raw: bytes

    @property
    def sha256(self) -> str:
        """Of the file."""
        return hashlib.sha256(self.raw).hexdigest()

    @classmethod
    def pack(cls, sets: Sequence[Mapping[int, Surrogate]], fingerprint: str) -> Self:
        """The file's bytes of maps by layer, and the tensors as a reader of the file will have them."""
        tensors: dict[str, torch.Tensor] = {}
        for number, maps in enumerate(sets):
            layers = sorted(maps)
            tensors |= {
                f"{number}.layers": torch.tensor(layers, dtype=torch.int64),
                **packed_maps(f"{number}", [maps[layer] for layer in layers]),
            }
        kind = FORMATS["0.route_bias" in tensors]
        return cls.unpack(packed(tensors, kind=kind, fingerprint=fingerprint), "packed tensors")

    @classmethod
    def unpack(cls, raw: bytes, where: str) -> Self:
        """Read the file's bytes. Raises ProfileError for anything that is no such file."""
        tensors, fingerprint = unpacked(raw, where, kinds=FORMATS, check=_check_header)
        sets = [
            unpacked_maps(tensors, f"{number}", ascending_layers(tensors, f"{number}.layers", where))
            for number in itertools.takewhile(lambda n: f"{n}.layers" in tensors, itertools.count())
        ]
        return cls(tuple(sets), fingerprint, raw)

    @classmethod
    def read(cls, path: Path, sha256: str, *, max_bytes: int) -> Self:
        """Read the file that a profile names; see `read_named`."""
        return cls.unpack(
            read_named(path, sha256, max_bytes=max_bytes, what="surrogates of the sets"), str(path)
        )

    def check_belongs(self, *, layers: list[list[int]], hidden_size: int, fingerprint: str) -> None:
        """Raise ProfileMismatch unless the tensors are for this profile's sets and model."""
        mine = [sorted(each.maps) for each in self.sets]
        if mine != layers:
            raise ProfileMismatch(
                f"the surrogates are for sets of layers {shown(mine)}, the profile's are {shown(layers)}; "
                "make both again with: skipcal fit --method static"
            )
        hidden = next(iter(self.sets[0].maps.values())).down.shape[-1]
        again = "skipcal fit --method static"
        check_model((hidden, self.fingerprint), (hidden_size, fingerprint), again=again)


def most_bytes(surrogates: int, rank: int, hidden: int, maps: int) -> int:
    """The size that a file with so many surrogates in all its sets cannot exceed."""
    return 8 + MAX_HEADER_BYTES + 8 * (surrogates + most_elements(surrogates, rank, hidden, maps))


def _check_header(header: Header, where: str) -> None:
    """Sets are numbered from 0; every tensor is there, and their shapes and types go together."""
    shapes: dict[str, list[int]] = {}
    number, first = 0, None
    while f"{number}.down" in header:
        own = shapes_of_maps(header, f"{number}", where)
        down = own[f"{number}.down"]
        if not down[0] or (first is not None and down[1:] != first):
            raise ProfileError(
                f"{where}: {number}.down has shape {shown(down)}, expected one surrogate at least, and axes "
                "after it that are those of every set"
            )
        first = down[1:]
        shapes |= {f"{number}.layers": down[:1], **own}
        number += 1
    if not shapes:
        raise ProfileError(f"{where}: expected tensors of one set at least, got {shown(sorted(header))}")
    check_shapes(header, shapes, where)
