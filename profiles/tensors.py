"""The gate and surrogates of a profile: the safetensors file beside its JSON.

The file is data: plain tensors under fixed names, and a header of strings. The profile names it and
its sha256; the header names the model's fingerprint. So a file that belongs to something else is
refused. A path inside a profile is never followed: the name is that of a file in the same folder.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from skipcal.errors import ProfileError, ProfileMismatch, Unavailable, first_words
from skipcal.runtime.gate import Gates
from skipcal.runtime.surrogates import LowRank, Surrogates

TENSORS_FORMAT = "skipcal.surrogates/1"
MAX_TENSOR_BYTES = 16 * 2**30
STORED = torch.bfloat16  # of the maps: rounding errors of 2^-9 are far below what a surrogate misses


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
        tensors: dict[str, Tensor] = {
            "gate.layers": torch.tensor(gates.layers, dtype=torch.int64),
            "gate.weight": gates.weight.float().cpu(),
            "gate.log_norm_weight": gates.log_norm_weight.float().cpu(),
            "gate.bias": gates.bias.float().cpu(),
            "surrogate.down": torch.stack([m.down for m in maps]).to("cpu", STORED),
            "surrogate.up": torch.stack([m.up for m in maps]).to("cpu", STORED),
            "surrogate.bias": torch.stack([m.bias for m in maps]).float().cpu(),
        }
        header = {"format": TENSORS_FORMAT, "model_fingerprint": fingerprint}
        raw = save({k: t.contiguous() for k, t in tensors.items()}, header)
        return cls.unpack(_in_order(raw), "packed tensors")

    @classmethod
    def unpack(cls, raw: bytes, where: str) -> Self:
        """Read the file's bytes. Raises ProfileError for anything that is no such file."""
        try:
            tensors = load(raw)  # refuses a header that is none
            header = _header(raw)
        except (SafetensorError, ValueError, KeyError) as error:
            raise ProfileError(f"{where} is no file of surrogates: {first_words(error)}") from error
        if header.get("format") != TENSORS_FORMAT:
            raise ProfileError(
                f"{where} is no file of surrogates: format is {header.get('format')!r}, expected "
                f"{TENSORS_FORMAT!r}"
            )
        _check_shapes(tensors, where)
        layers = tuple(int(layer) for layer in tensors["gate.layers"])
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
            fingerprint=header.get("model_fingerprint", ""),
            raw=raw,
        )

    @classmethod
    def read(cls, path: Path, sha256: str) -> Self:
        """Read the file that a profile names.

        Raises Unavailable when it is missing, ProfileError when it is not the file that was named.
        """
        try:
            if path.stat().st_size > MAX_TENSOR_BYTES:
                raise ProfileError(f"{path} is larger than {MAX_TENSOR_BYTES >> 30} GiB; no surrogates are")
            raw = path.read_bytes()
        except OSError as error:
            raise Unavailable(
                f"{path}, the gate and surrogates of the profile, cannot be read ({error.strerror}); keep "
                "it beside the profile, or make both again with: skipcal fit"
            ) from error
        found = hashlib.sha256(raw).hexdigest()
        if found != sha256:
            raise ProfileError(
                f"{path} is not the file the profile was made with (sha256 {found[:12]}..., expected "
                f"{sha256[:12]}...); make both again with: skipcal fit"
            )
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


def _header(raw: bytes) -> dict[str, str]:
    """The strings in a safetensors header: 8 bytes of length, then JSON."""
    length = int.from_bytes(raw[:8], "little")
    found: Any = json.loads(raw[8 : 8 + length]).get("__metadata__", {})
    return found if isinstance(found, dict) else {}


def _in_order(raw: bytes) -> bytes:
    """The same file with a sorted header: safetensors writes its strings in random order."""
    end = 8 + int.from_bytes(raw[:8], "little")
    text = json.dumps(json.loads(raw[8:end]), sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text + raw[end:]


def _check_shapes(tensors: dict[str, Tensor], where: str) -> None:
    """Every tensor is there, and their shapes and values go together."""
    expected = ("layers", "weight", "log_norm_weight", "bias")
    names = {f"gate.{n}" for n in expected} | {f"surrogate.{n}" for n in ("down", "up", "bias")}
    if set(tensors) != names:
        raise ProfileError(f"{where}: expected tensors {sorted(names)}, got {sorted(tensors)}")
    down = tensors["surrogate.down"]
    if down.dim() != 3:
        raise ProfileError(f"{where}: surrogate.down has shape {list(down.shape)}, expected three axes")
    count, rank, hidden = down.shape
    shapes = {
        "gate.layers": (count,),
        "gate.weight": (count, hidden),
        "gate.log_norm_weight": (count,),
        "gate.bias": (count,),
        "surrogate.up": (count, hidden, rank),
        "surrogate.bias": (count, hidden),
    }
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise ProfileError(
                f"{where}: {name} has shape {list(tensors[name].shape)}, expected {list(shape)}"
            )
        if not math.isfinite(float(tensors[name].double().abs().sum())):
            raise ProfileError(f"{where}: {name} holds values that are not finite")
