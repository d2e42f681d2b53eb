"""Quantized weights: what can be asked for while loading, and what a loaded model has.

Checkpoints that are quantized already load as they are, in every format of transformers whose library
is installed. A format never concerns the skipping: the model's own modules are called.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel, TorchAoConfig

from skipcal.configs.names import QUANTIZATIONS as QUANTIZATIONS
from skipcal.errors import ConfigError, Unavailable, suggestion


def check_quantization(name: str | None) -> None:
    """Raise ConfigError for a name that is not among QUANTIZATIONS."""
    if name is not None and name not in QUANTIZATIONS:
        raise ConfigError(f"quantization {name!r} is not known; {suggestion(name, QUANTIZATIONS)}")


def quantization_config(name: str | None, dtype: str) -> Any:
    """What transformers calls the quantization of that name: linear layers, all but the LM head.

    dtype: the model's, in which layers of 4 bits compute; "auto": in that of their input.
    Raises ConfigError for an unknown name, Unavailable where its library is not installed.
    """
    if name is None:
        return None
    check_quantization(name)
    library = name.partition(":")[0]
    if importlib.util.find_spec(library) is None:
        raise Unavailable(f"quantization {name!r} needs the package {library}; run: pip install {library}")
    if name == "torchao:int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    if name == "bitsandbytes:int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    computes = {} if dtype == "auto" else {"bnb_4bit_compute_dtype": getattr(torch, dtype)}
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **computes)


def quantization_name(model: PreTrainedModel) -> str | None:
    """How a model's weights are quantized, or were before a reader unpacked them: `bitsandbytes:nf4`."""
    found = getattr(model.config, "quantization_config", None)
    if found is None:
        return None
    settings: dict[str, Any] = found if isinstance(found, dict) else vars(found)
    method = settings.get("quant_method") or settings.get("_quant_method") or type(found).__name__
    method = str(getattr(method, "value", method))
    if method == "bitsandbytes":
        four = settings.get("load_in_4bit") or settings.get("_load_in_4bit")
        return f"{method}:{settings['bnb_4bit_quant_type'] if four else 'int8'}"
    if method == "torchao":
        return f"{method}:{type(settings['quant_type']).__name__}"
    bits = settings.get("bits")
    return method if bits is None else f"{method}:{bits}bit"
