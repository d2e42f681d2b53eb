"""A safetensors file beside a profile: read without trust, written the same each time.

Such a file is data: plain tensors under fixed names, and a header of strings. The profile names it and
its sha256; the header names the model's fingerprint. So a file that belongs to something else is
refused. A path inside a profile is never followed: the name is that of a file in the same folder. (That file
may be a link, as all are in the hub's cache: what counts is its sha256.) How large it can be follows from
the profile, and its header is checked before a tensor is made.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from skipcal.core.surrogates import LowRank, RoutedLowRank, Surrogate, Surrogates
from skipcal.errors import ProfileError, ProfileMismatch, Unavailable
from skipcal.files.reading import one_line, shown

MAX_HEADER_BYTES = 2**16  # of a header: some tensors and two strings take 1 kB
STORED = torch.bfloat16  # of the maps: rounding errors of 2^-9 are far below what a surrogate misses

Header: TypeAlias = dict[str, Any]


def packed(tensors: Mapping[str, Tensor], *, kind: str, fingerprint: str) -> bytes:
    """The bytes of a file; kind: its format."""
    header = {"format": kind, "model_fingerprint": fingerprint}
    raw = save({name: t.cpu().contiguous() for name, t in tensors.items()}, header)
    # Its header is sorted: safetensors writes its strings in random order.
    end = 8 + int.from_bytes(raw[:8], "little")
    text = json.dumps(json.loads(raw[8:end]), sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text + raw[end:]


def unpacked(
    raw: bytes, where: str, *, kinds: Sequence[str], check: Callable[[Header, str], None]
) -> tuple[dict[str, Tensor], str]:
    """The tensors of a file by name, and the fingerprint in its header.

    kinds: formats it may have. check: raises ProfileError for a header whose tensors do not go together,
    before one is made. Raises ProfileError for anything that is no such file, and for values that are not
    finite.
    """
    try:
        header = _header(raw)
        strings = header.pop("__metadata__", {})
        found = strings.get("format")
        if found not in kinds:
            raise ProfileError(
                f"{where} is no file of surrogates: format is {shown(found)}, expected "
                f"{' or '.join(map(repr, kinds))}"
            )
        check(header, where)
        tensors = load(raw)  # refuses offsets that do not fit the shapes, or the file
    except (SafetensorError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        if isinstance(error, ProfileError):
            raise
        raise ProfileError(f"{where} is no file of surrogates: {one_line(str(error))}") from error
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise ProfileError(f"{where}: {name} holds values that are not finite")
    return tensors, str(strings.get("model_fingerprint", ""))


def read_named(path: Path, sha256: str, *, max_bytes: int, what: str) -> bytes:
    """The bytes of the file that a profile names, which has at most `max_bytes`; what: it holds.

    Raises Unavailable when it is missing, ProfileError when it is not the file that was named.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would never end
            raise ProfileError(f"{path} is no file of surrogates: it is not a regular file")
        with path.open("rb") as file:
            raw = file.read(max_bytes + 1)
    except OSError as error:
        raise Unavailable(
            f"{path}, the {what} of the profile, cannot be read ({error.strerror}); keep "
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
    return raw


def packed_maps(prefix: str, maps: Sequence[Surrogate]) -> dict[str, Tensor]:
    """Tensors of surrogates of one kind and rank, by the names they have in a file.

    Where each has several maps, these are most of the file; they are int8 with a scale for each output.
    """
    tensors = {
        "down": torch.stack([m.down for m in maps]).to(STORED),
        "up": torch.stack([m.up for m in maps]),
        "bias": torch.stack([m.bias for m in maps]).float(),
    }
    routes = [m.route_bias for m in maps if isinstance(m, RoutedLowRank)]
    if routes:
        tensors["route_bias"] = torch.stack(routes).float()
        tensors["up"], tensors["up_scale"] = _as_int8(tensors["up"].float())
    else:
        tensors["up"] = tensors["up"].to(STORED)
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def _as_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., n] as int8, and what each row of n is multiplied by, [...] float32."""
    scale = (x.abs().amax(-1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return (x / scale[..., None]).round().to(torch.int8), scale


def unpacked_maps(tensors: Mapping[str, Tensor], prefix: str, layers: Sequence[int]) -> Surrogates:
    """The surrogates of `layers`, in float32."""
    own = {
        name: tensors[f"{prefix}.{name}"].float()
        for name in ("down", "up", "bias", "route_bias", "up_scale")
        if f"{prefix}.{name}" in tensors
    }
    down, up, bias = own["down"], own["up"], own["bias"]
    if "route_bias" not in own:
        return Surrogates({layer: LowRank(down[n], up[n], bias[n]) for n, layer in enumerate(layers)})
    up, route_bias = up * own["up_scale"][..., None], own["route_bias"]
    return Surrogates(
        {layer: RoutedLowRank(down[n], up[n], bias[n], route_bias[n]) for n, layer in enumerate(layers)}
    )


def shapes_of_maps(header: Header, prefix: str, where: str) -> dict[str, list[int]]:
    """Shapes that tensors of surrogates have to have together, by name.

    Raises ProfileError where `down` is missing or is none.
    """
    name = f"{prefix}.down"
    down = shape_of(header, name, where) if name in header else [0, 0, 0]
    if len(down) != 3:
        raise ProfileError(f"{where}: {name} has shape {shown(down)}, expected three axes")
    count, rows, hidden = down
    if f"{prefix}.route_bias" not in header:
        return {
            name: down,
            f"{prefix}.up": [count, hidden, rows],
            f"{prefix}.bias": [count, hidden],
        }
    routes = shape_of(header, f"{prefix}.route_bias", where)
    if len(routes) != 2 or not 0 < routes[1] < rows:
        raise ProfileError(
            f"{where}: {prefix}.route_bias has shape {shown(routes)}, expected [{count}, maps] with fewer "
            f"maps than the {rows} rows of {name}"
        )
    maps = routes[1]
    return {
        name: down,
        f"{prefix}.up": [count, maps, hidden, rows - maps],
        f"{prefix}.up_scale": [count, maps, hidden],
        f"{prefix}.bias": [count, maps, hidden],
        f"{prefix}.route_bias": [count, maps],
    }


def most_elements(count: int, rank: int, hidden: int, maps: int) -> int:
    """Numbers in the tensors of so many surrogates, scales and all, that none of a kind exceeds."""
    return count * ((rank + maps) * hidden + maps * (hidden * rank + 2 * hidden + 1))


def check_model(mine: tuple[int, str], profiles: tuple[int, str], *, again: str) -> None:
    """Raise ProfileMismatch unless hidden size and fingerprint are the profile's; again: makes both anew."""
    if mine != profiles:
        (hidden, weights), (its_hidden, its_weights) = mine, profiles
        raise ProfileMismatch(
            f"the surrogates were fitted to another model (hidden size {hidden}, the profile's "
            f"{its_hidden}; weights {weights[:12]}, the profile's {its_weights[:12]}); make "
            f"both again with: {again}"
        )


def check_shapes(header: Header, shapes: Mapping[str, list[int]], where: str) -> None:
    """Raise ProfileError unless the header tells of these tensors.

    Those of `layers` are int64, those that have a scale int8.
    """
    if set(header) != set(shapes):
        raise ProfileError(f"{where}: expected tensors {sorted(shapes)}, got {shown(sorted(header))}")
    for name, expected in shapes.items():
        found = shape_of(header, name, where)
        if found != expected:
            raise ProfileError(f"{where}: {name} has shape {shown(found)}, expected {expected}")
        types = (
            ("I64",) if name.endswith("layers")
            else ("I8",) if f"{name}_scale" in shapes
            else ("F32", "BF16", "F16")
        )  # fmt: skip
        dtype = header[name].get("dtype")
        if dtype not in types:
            raise ProfileError(f"{where}: {name} is of type {shown(dtype)}, expected {' or '.join(types)}")


def shape_of(header: Header, name: str, where: str) -> list[int]:
    """The shape of a tensor by the header. Raises ProfileError where it says none."""
    entry = header[name]
    shape = entry.get("shape") if isinstance(entry, dict) else None
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**31 for n in shape):
        raise ProfileError(f"{where}: {name} has shape {shown(shape)}, expected a list of sizes")
    return shape


def ascending_layers(tensors: Mapping[str, Tensor], name: str, where: str) -> tuple[int, ...]:
    """The layers in a tensor. Raises ProfileError unless they ascend, each once."""
    layers = tensors[name].tolist()
    if layers != sorted(set(layers)) or (layers and layers[0] < 0):
        raise ProfileError(f"{where}: {name} holds {shown(layers)}, expected ascending layers, each once")
    return tuple(layers)


def _header(raw: bytes) -> Header:
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
