"""The gate and surrogates of a profile: the tensors beside its JSON."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from skipcal.core.gate import Gates
from skipcal.core.surrogates import LowRank, Surrogates
from skipcal.errors import ProfileError, ProfileMismatch
from skipcal.files.reading import shown
from skipcal.profiles.tensor_file import (
    MAX_HEADER_BYTES,
    STORED,
    Header,
    ascending_layers,
    check_shapes,
    packed,
    read_named,
    shape_of,
    unpacked,
)

TENSORS_FORMAT = "skipcal.surrogates/1"


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
        maps = [surrogates.maps[layer] for layer in gates.layers]
        raw = packed(
            {
                "gate.layers": torch.tensor(gates.layers, dtype=torch.int64),
                "gate.weight": gates.weight.float(),
                "gate.log_norm_weight": gates.log_norm_weight.float(),
                "gate.bias": gates.bias.float(),
                "surrogate.down": torch.stack([m.down for m in maps]).to(STORED),
                "surrogate.up": torch.stack([m.up for m in maps]).to(STORED),
                "surrogate.bias": torch.stack([m.bias for m in maps]).float(),
            },
            kind=TENSORS_FORMAT,
            fingerprint=fingerprint,
        )
        return cls.unpack(raw, "packed tensors")

    @classmethod
    def unpack(cls, raw: bytes, where: str) -> Self:
        """Read the file's bytes. Raises ProfileError for anything that is no such file."""
        tensors, fingerprint = unpacked(raw, where, kind=TENSORS_FORMAT, check=_check_header)
        layers = ascending_layers(tensors, "gate.layers", where)
        down, up, bias = (tensors[f"surrogate.{name}"].float() for name in ("down", "up", "bias"))
        return cls(
            gates=Gates(
                layers=layers,
                weight=tensors["gate.weight"].float(),
                log_norm_weight=tensors["gate.log_norm_weight"].float(),
                bias=tensors["gate.bias"].float(),
            ),
            surrogates=Surrogates(
                {layer: LowRank(down[n], up[n], bias[n]) for n, layer in enumerate(layers)}
            ),
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
        if hidden != hidden_size or self.fingerprint != fingerprint:
            raise ProfileMismatch(
                f"the surrogates were fitted to another model (hidden size {hidden}, the profile's "
                f"{hidden_size}; weights {self.fingerprint[:12]}, the profile's {fingerprint[:12]}); make "
                "both again with: skipcal fit"
            )


def most_bytes(layers: int, rank: int, hidden: int) -> int:
    """The size that a file with so many gates and surrogates cannot exceed."""
    elements = layers * (2 * rank * hidden + 2 * hidden + 3)
    return 8 + MAX_HEADER_BYTES + 8 * elements


def _check_header(header: Header, where: str) -> None:
    """Every tensor is there, and their shapes and types go together."""
    down = shape_of(header, "surrogate.down", where) if "surrogate.down" in header else [0, 0, 0]
    if len(down) != 3:
        raise ProfileError(f"{where}: surrogate.down has shape {shown(down)}, expected three axes")
    count, rank, hidden = down
    shapes = {
        "gate.layers": [count],
        "gate.weight": [count, hidden],
        "gate.log_norm_weight": [count],
        "gate.bias": [count],
        "surrogate.down": down,
        "surrogate.up": [count, hidden, rank],
        "surrogate.bias": [count, hidden],
    }
    check_shapes(header, shapes, where)
