"""Load a model and its tokenizer, and say which weights they are."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from skipcal.arch.embedded import EMBEDDED_MODEL, embedded_model_folder
from skipcal.errors import ConfigError, Unavailable, first_words

DTYPES = ("auto", "bfloat16", "float16", "float32")
_VALUES_PER_TENSOR = 16


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode with its tokenizer and where both came from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    revision: str | None


def load_model(
    name: str | None = None,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    device_map: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a causal language model by hub id or local folder; `None` is the embedded one.

    device: "cpu", "cuda", "cuda:1", ...; by default the accelerator torch finds, else the CPU.
    device_map: passed to transformers, instead of a device.
    Raises Unavailable when the model cannot be had, ConfigError for options that do not fit.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if device and device_map:
        raise ConfigError(f"device {device!r} and device_map {device_map!r} were both given; give one")
    source = str(embedded_model_folder()) if name is None else name
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if name is None and revision:
        raise ConfigError(f"revision {revision!r} was given without a model; add --model")
    target = None if device_map else pick_device(device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        result: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            device_map=device_map,
            attn_implementation=attn_implementation,
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # from a missing file to a truncated one: there are dozens of classes
        for option, value in (("attn_implementation", attn_implementation), ("device_map", device_map)):
            if value and (option in str(error) or value in str(error)):
                raise ConfigError(f"{option} {value!r} cannot be used: {first_words(error)}") from error
        raise Unavailable(_unavailable(source, error)) from error
    model, found = result
    lacking = sorted({*found["missing_keys"], *(str(key) for key in found["mismatched_keys"])})
    if lacking:  # transformers would go on with random numbers in their place
        raise Unavailable(
            f"model {source!r} lacks weights for {len(lacking)} parameters of {type(model).__name__} "
            f"({', '.join(lacking[:3])}, ...); give a checkpoint of a causal language model"
        )
    if target is not None:
        model = model.to(target)
    return LoadedModel(
        model=model.eval(),
        tokenizer=tokenizer,
        name=EMBEDDED_MODEL if name is None else name,
        revision=getattr(model.config, "_commit_hash", None),
    )


def fingerprint(model: PreTrainedModel) -> str:
    """Sha256 over every parameter's name, shape and a few values, in bfloat16.

    It tells a fine-tune from its base; it is no proof that two files are equal. Comparable between
    models of one dtype, none of them offloaded.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        if parameter.device.type == "meta" or not parameter.is_floating_point():
            continue
        # A sharded tensor is put together for a moment, in all processes of tensor parallelism at once.
        whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        flat = whole.detach().reshape(-1)
        picked = flat[:: max(1, flat.numel() // _VALUES_PER_TENSOR)][:_VALUES_PER_TENSOR]
        digest.update(picked.to("cpu", torch.bfloat16).float().numpy().tobytes())
    return digest.hexdigest()


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


def _unavailable(source: str, error: Exception) -> str:
    hint = (
        "a local folder needs config.json, weights and tokenizer files"
        if Path(source).exists()
        else "give a folder or a hub id, and check the network, HF_HUB_OFFLINE and your access token"
    )
    return f"model {source!r} could not be loaded ({type(error).__name__}: {first_words(error)}); {hint}"
