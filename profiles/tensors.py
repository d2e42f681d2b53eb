"""The gate and surrogates of a profile: the tensors beside its JSON."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from skipcal.core.gate import Gates
from skipcal.core.surrogates import Surrogates
from skipcal.errors import ProfileMismatch
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

FORMATS = ("skipcal.surrogates/1", "skipcal.surrogates/2")  # of one map a layer, of several


@dataclass(frozen=True)
class GateTensors:
    """What the tensor file holds, and its bytes."""

    gates: Gates
    surrogates: Surrogates
    fingerprint: str
    raw: bytes

    @property
    def sha256(self) -> str:
        """Of the file."""
        return hashlib.sha256(self.raw).hexdigest()

    @classmethod
    def pack(cls, gates: Gates, surrogates: Surrogates, fingerprint: str) -> Self:
        """The file's bytes of tensors, and the tensors as a reader of the file will have them."""
        tensors = {
            "gate.layers": torch.tensor(gates.layers, dtype=torch.int64),
            "gate.weight": gates.weight.float(),
            "gate.log_norm_weight": gates.log_norm_weight.float(),
            "gate.bias": gates.bias.float(),
            **packed_maps("surrogate", [surrogates.maps[layer] for layer in gates.layers]),
        }
        kind = FORMATS["surrogate.route_bias" in tensors]
        raw = packed(tensors, kind=kind, fingerprint=fingerprint)
        return cls.unpack(raw, "packed tensors")

    @classmethod
    def unpack(cls, raw: bytes, where: str) -> Self:
        """Read the file's bytes. Raises ProfileError for anything that is no such file."""
        tensors, fingerprint = unpacked(raw, where, kinds=FORMATS, check=_check_header)
        layers = ascending_layers(tensors, "gate.layers", where)
        return cls(
            gates=Gates(
                layers=layers,
                weight=tensors["gate.weight"].float(),
                log_norm_weight=tensors["gate.log_norm_weight"].float(),
                bias=tensors["gate.bias"].float(),
            ),
            surrogates=unpacked_maps(tensors, "surrogate", layers),
            fingerprint=fingerprint,
            raw=raw,
        )

    @classmethod
    def read(cls, path: Path, sha256: str, *, max_bytes: int) -> Self:
        """Read the file that a profile names; see `read_named`."""
        raw = read_named(path, sha256, max_bytes=max_bytes, what="gate and surrogates")
        return cls.unpack(raw, str(path))

    def check_belongs(
        self, *, layers: list[int], num_layers: int, hidden_size: int, fingerprint: str
    ) -> None:
        """Raise ProfileMismatch unless the tensors are for this profile's model."""
        hidden = self.gates.weight.shape[-1]
        if list(self.gates.layers) != layers or (layers and layers[-1] >= num_layers):
            raise ProfileMismatch(
                f"the surrogates are for layers {list(self.gates.layers)}, the profile's gate for {layers} "
                f"of {num_layers}; make both again with: skipcal fit"
            )
        check_model((hidden, self.fingerprint), (hidden_size, fingerprint), again="skipcal fit")


def most_bytes(layers: int, rank: int, hidden: int, maps: int) -> int:
    """The size that a file with so many gates and surrogates cannot exceed."""
    elements = layers * (hidden + 3) + most_elements(layers, rank, hidden, maps)
    return 8 + MAX_HEADER_BYTES + 8 * elements


def _check_header(header: Header, where: str) -> None:
    """Every tensor is there, and their shapes and types go together."""
    maps = shapes_of_maps(header, "surrogate", where)
    count, _, hidden = maps["surrogate.down"]
    shapes = {
        "gate.layers": [count],
        "gate.weight": [count, hidden],
        "gate.log_norm_weight": [count],
        "gate.bias": [count],
        **maps,
    }
    check_shapes(header, shapes, where)
