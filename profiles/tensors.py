"""The gate and surrogates of a profile: the safetensors file beside its JSON.

The file is data: plain tensors under fixed names, and a header of strings. The profile names it and
its sha256; the header names the model's fingerprint. So a file that belongs to something else is
refused. A path inside a profile is never followed: the name is that of a file in the same folder. (That file
may be a link, as all are in the hub's cache: what counts is its sha256.) How large it can be follows from
the profile, and its header is checked before a tensor is made.
"""

from __future__ import annotations

import hashlib
import json
import math
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from skipcal.core.gate import Gates
from skipcal.core.surrogates import LowRank, Surrogates
from skipcal.errors import ProfileError, ProfileMismatch, Unavailable
from skipcal.files.reading import one_line, shown

TENSORS_FORMAT = "skipcal.surrogates/1"
MAX_HEADER_BYTES = 2**16  # of a header: seven tensors and two strings take 1 kB
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
            header = _header(raw)
            strings = header.pop("__metadata__", {})
            _check_format(strings.get("format"), where)
            _check_header(header, where)
            tensors = load(raw)  # refuses offsets that do not fit the shapes, or the file
        except (SafetensorError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            if isinstance(error, ProfileError):
                raise
            raise ProfileError(f"{where} is no file of surrogates: {one_line(str(error))}") from error
        _check_values(tensors, where)
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
            fingerprint=str(strings.get("model_fingerprint", "")),
            raw=raw,
        )

    @classmethod
    def read(cls, path: Path, sha256: str, *, max_bytes: int) -> Self:
        """Read the file that a profile names, which has at most `max_bytes`.

        Raises Unavailable when it is missing, ProfileError when it is not the file that was named.
        """
        try:
            if not stat.S_ISREG(path.stat().st_mode):  # a pipe would never end
                raise ProfileError(f"{path} is no file of surrogates: it is not a regular file")
            with path.open("rb") as file:
                raw = file.read(max_bytes + 1)
        except OSError as error:
            raise Unavailable(
                f"{path}, the gate and surrogates of the profile, cannot be read ({error.strerror}); keep "
                "it beside the profile, or make both again with: skipcal fit"
            ) from error
        if len(raw) > max_bytes:
            raise ProfileError(
                f"{path} is not the file the profile was made with: it has more than the {max_bytes:,} bytes "
                "that the profile's layers, rank and hidden size allow"
            )
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


def most_bytes(layers: int, rank: int, hidden: int) -> int:
    """The size that a file with so many gates and surrogates cannot exceed."""
    elements = layers * (2 * rank * hidden + 2 * hidden + 3)
    return 8 + MAX_HEADER_BYTES + 8 * elements


def _header(raw: bytes) -> dict[str, Any]:
    """A safetensors header: 8 bytes of length, then a JSON object of that length."""
    length = int.from_bytes(raw[:8], "little")
    if not 2 <= length <= min(MAX_HEADER_BYTES, len(raw) - 8):
        raise ValueError(
            f"its header of {length:,} bytes is not within the file of {len(raw):,}, or is longer than "
            f"{MAX_HEADER_BYTES:,}"
        )
    found: Any = json.loads(raw[8 : 8 + length])
    if not isinstance(found, dict):
        raise ValueError(f"its header is no object but {type(found).__name__}")
    return found


def _in_order(raw: bytes) -> bytes:
    """The same file with a sorted header: safetensors writes its strings in random order."""
    end = 8 + int.from_bytes(raw[:8], "little")
    text = json.dumps(json.loads(raw[8:end]), sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text + raw[end:]


def _check_format(found: Any, where: str) -> None:
    if found != TENSORS_FORMAT:
        raise ProfileError(
            f"{where} is no file of surrogates: format is {shown(found)}, expected {TENSORS_FORMAT!r}"
        )


def _check_header(header: dict[str, Any], where: str) -> None:
    """Every tensor is there, and their shapes and types go together."""
    expected = ("layers", "weight", "log_norm_weight", "bias")
    names = {f"gate.{n}" for n in expected} | {f"surrogate.{n}" for n in ("down", "up", "bias")}
    if set(header) != names:
        raise ProfileError(f"{where}: expected tensors {sorted(names)}, got {shown(sorted(header))}")
    down = _shape(header, "surrogate.down", where)
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
    for name, shape in shapes.items():
        found = _shape(header, name, where)
        if found != shape:
            raise ProfileError(f"{where}: {name} has shape {shown(found)}, expected {shape}")
        types = ("I64",) if name == "gate.layers" else ("F32", "BF16", "F16")
        dtype = header[name].get("dtype")
        if dtype not in types:
            raise ProfileError(f"{where}: {name} is of type {shown(dtype)}, expected {' or '.join(types)}")


def _shape(header: dict[str, Any], name: str, where: str) -> list[int]:
    entry = header[name]
    shape = entry.get("shape") if isinstance(entry, dict) else None
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**31 for n in shape):
        raise ProfileError(f"{where}: {name} has shape {shown(shape)}, expected a list of sizes")
    return shape


def _check_values(tensors: dict[str, Tensor], where: str) -> None:
    layers = tensors["gate.layers"].tolist()
    if layers != sorted(set(layers)) or (layers and layers[0] < 0):
        raise ProfileError(
            f"{where}: gate.layers holds {shown(layers)}, expected ascending layers, each once"
        )
    for name, tensor in tensors.items():
        if not math.isfinite(float(tensor.double().abs().sum())):
            raise ProfileError(f"{where}: {name} holds values that are not finite")
