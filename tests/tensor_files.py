"""Files of tensors that are not what a profile expects."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from skipcal.profiles.schema import SkipProfile
from skipcal.profiles.tensors import FORMATS

LOADED = SkipProfile.load("smollm2-135m-instruct")
SHIPPED = LOADED.model_copy(update={"gate": None, "paper_policy": None, "policy": LOADED.cosine_policy})
FILE = "made.surrogates.safetensors"
Change = Callable[[dict[str, torch.Tensor], dict[str, str]], Any]


def damaged(gated: SkipProfile, change: Change) -> bytes:
    raw = gated.tensors().raw
    tensors, header = load(raw), {"format": FORMATS[0], "model_fingerprint": SHIPPED.model.fingerprint}
    change(tensors, header)
    return save(tensors, header)


def put(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def change(tensors: dict[str, torch.Tensor], _header: dict[str, str]) -> None:
        tensors[name] = value(tensors[name]).contiguous()

    return change


def first_nan(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.clone().flatten()
    flat[0] = torch.nan
    return flat.reshape(tensor.shape)


def header_of(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


def renamed(saved: Path, raw: bytes, **gate: Any) -> SkipProfile:
    """The profile, made to name these tensors."""
    (saved.parent / FILE).write_bytes(raw)
    document = json.loads(saved.read_text())
    document["gate"].update(gate, sha256=hashlib.sha256(raw).hexdigest())
    document["policy"]["sha256"] = document["gate"]["sha256"]
    saved.write_text(json.dumps(document))
    return SkipProfile.load(saved)
