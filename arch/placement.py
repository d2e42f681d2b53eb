"""On which devices a model goes: what `--device`, `--device-map`, `--max-memory` may say."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch

from skipcal.errors import ConfigError, suggestion

SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")  # ways of transformers to use several devices
_LIMIT = re.compile(r"(cpu|mps|\d+)=(\d+(?:\.\d+)?(?:[KMG]i?B))")


def pick_device(device: str | None) -> torch.device:
    """The device of that name; None: the accelerator, or the CPU. Raises ConfigError for one not there."""
    if device is None:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {device!r} cannot be used here ({reason}); try --device cpu") from error
    return target


def place(
    device: str | None,
    device_map: str | Mapping[str, str | int] | None,
    max_memory: Mapping[str | int, str | int] | None,
    offload_folder: str | None,
) -> dict[str, object]:
    """What transformers is told of devices. Raises ConfigError for what cannot be, or has no effect."""
    if device and device_map:
        raise ConfigError(f"device {device!r} and device_map {device_map!r} were both given; give one")
    if device_map is None:
        for name, value in (("max_memory", max_memory), ("offload_folder", offload_folder)):
            if value is not None:
                raise ConfigError(f"{name} has no effect without a device_map; add --device-map auto")
        return {"device_map": {"": str(pick_device(device))}}
    if max_memory is not None and device_map not in SPREADS:
        raise ConfigError(
            f"max_memory has no effect with device_map {device_map!r}; it bounds {', '.join(SPREADS)}"
        )
    if isinstance(device_map, str) and device_map not in SPREADS:
        _check_device_map(device_map)
    return {
        "device_map": device_map if isinstance(device_map, str) else dict(device_map),
        "max_memory": None if max_memory is None else dict(max_memory),
        "offload_folder": offload_folder,
    }


def memory_limits(entries: Sequence[str] | None) -> dict[str | int, str | int] | None:
    """`["0=20GiB", "cpu=48GiB"]` as transformers takes it. Raises ConfigError for anything else."""
    limits: dict[str | int, str | int] = {}
    for entry in entries or ():
        found = _LIMIT.fullmatch(entry)
        if found is None:
            raise ConfigError(
                f"max_memory {entry!r} cannot be used: expected DEVICE=SIZE with the number of a GPU or cpu, "
                "and kB, MB, GB, KiB, MiB or GiB, as 0=20GiB or cpu=48GiB"
            )
        device = int(found[1]) if found[1].isdigit() else found[1]
        if device in limits:
            raise ConfigError(f"max_memory {entry!r}: {found[1]} has a limit already; give it one")
        limits[device] = found[2]
    return limits or None


def _check_device_map(name: str) -> None:
    """Raise ConfigError unless it names a device that is there."""
    try:
        torch.device(name)
    except RuntimeError:
        hint = suggestion(name, SPREADS)
        raise ConfigError(
            f"device_map {name!r} cannot be used: it is neither a device nor a way to spread a model; {hint}"
        ) from None
    pick_device(name)
