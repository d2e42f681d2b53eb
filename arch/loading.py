"""Load a model and its tokenizer, and say which weights they are."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from skipcal.arch.limits import check_tokenizer, fitted_tokenizer
from skipcal.arch.locate import unwrap
from skipcal.arch.placement import SPREADS, place
from skipcal.arch.quantization import check_quantization, quantization_config, quantization_name
from skipcal.arch.source import Source, check_source, find_source, refuse_tokenizer_code, unavailable
from skipcal.arch.stored import named_weights, stored
from skipcal.configs.names import DTYPES
from skipcal.errors import ConfigError, SkipcalError, Unavailable, first_words, suggestion
from skipcal.quiet import bars_on_a_terminal

_VALUES_PER_TENSOR = 16


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode with its tokenizer and where both came from.

    model:             of a PeftModel the transformers model inside, which carries the adapter.
    tokenizer:         makes no inputs that the model does not take, as token_type_ids; if need be, a copy.
    adapter:           hub id or folder of the adapter that was put on the model.
    trust_remote_code: code that comes with the model was allowed to run.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    revision: str | None
    adapter: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        """Take the model out of its wrapper. Raises UnsupportedModel for what is none of transformers."""
        object.__setattr__(self, "model", unwrap(self.model))
        object.__setattr__(self, "tokenizer", fitted_tokenizer(self.model, self.tokenizer))

    def described(self) -> dict[str, Any]:
        """What results record of it; a folder or file gives its name, not its place."""
        model = self.model
        adapter = self.adapter or ", ".join(getattr(model, "peft_config", None) or {}) or None
        return {
            "name": _own_name(self.name),
            "revision": self.revision,
            "adapter": None if adapter is None else _own_name(adapter),
            "dtype": str(model.dtype).removeprefix("torch."),
            "quantization": quantization_name(model),
            "trust_remote_code": self.trust_remote_code,
        }


@bars_on_a_terminal()
def load_model(
    name: str | None = None,
    *,
    revision: str | None = None,
    adapter: str | None = None,
    dtype: str = "auto",
    quantization: str | None = None,
    device: str | None = None,
    device_map: str | Mapping[str, str | int] | None = None,
    max_memory: Mapping[str | int, str | int] | None = None,
    offload_folder: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a causal language model by hub id, local folder or GGUF file; `None` is the embedded one.

    name:           a GGUF file on the hub is `HUB-ID:FILE.gguf`.
    adapter:        hub id or folder of a LoRA adapter, or another that peft can inject; it is not merged.
    quantization:   quantize while loading; see QUANTIZATIONS. What is quantized already loads as it is.
    device:         "cpu", "cuda", "cuda:1", ...; by default the accelerator torch finds, else the CPU.
    device_map:     instead of a device, as transformers takes it: "auto" spreads the model over GPUs,
                    CPU and disk. max_memory bounds each of them; offload_folder is for weights that
                    cannot be read again from the checkpoint.
    Raises Unavailable when the model cannot be had, or its tokenizer is another's, ConfigError for options
    that do not fit.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    placement = place(device, device_map, max_memory, offload_folder)
    _check_attention(attn_implementation)
    check_quantization(quantization)
    if adapter is not None and importlib.util.find_spec("peft") is None:
        raise Unavailable(f"adapter {adapter!r} needs the package peft; run: pip install 'skipcal[peft]'")
    source = find_source(name, revision)
    quantized = None if source.gguf_file else quantization_config(quantization, dtype)
    check_source(source, trust_remote_code=trust_remote_code, quantization=quantization)
    _check_attention_of(source, attn_implementation, trust_remote_code)
    tokenizer = _tokenizer(source, trust_remote_code)
    model = _model(
        source,
        dtype=dtype if dtype == "auto" else getattr(torch, dtype),
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        **placement,
        **({"quantization_config": quantized} if quantized is not None else {}),
    )
    check_tokenizer(model, tokenizer, source.name)
    if adapter is not None:
        _put_on(model, adapter, source)
    elif has_adapter(model):  # it lay in the model's own folder, and transformers took it along
        adapter = source.name
    return LoadedModel(
        model=model.eval(),
        tokenizer=tokenizer,
        name=source.name,
        revision=getattr(model.config, "_commit_hash", None),
        adapter=adapter,
        trust_remote_code=trust_remote_code,
    )


def fingerprint(model: nn.Module) -> str:
    """Sha256 over every weight's name, shape and a few values, in bfloat16.

    It tells a fine-tune or an adapted model from its base; it is no proof that two files are equal.
    Comparable between models of one dtype and quantization, wherever their weights are.
    """
    return fingerprint_of({name: weight_mark(name, weight) for name, weight in named_weights(unwrap(model))})


def fingerprint_of(marks: Mapping[str, bytes]) -> str:
    """The fingerprint of a model whose weights have these marks, by name."""
    return hashlib.sha256(b"".join(marks[name] for name in sorted(marks))).hexdigest()


def weight_mark(name: str, weight: Tensor) -> bytes:
    """What the fingerprint holds of one weight."""
    shape = getattr(getattr(weight, "quant_state", None), "shape", weight.shape)
    mark = f"{name}{tuple(shape)}".encode()
    if getattr(weight, "quant_state", None) is not None and weight.device.type == "cpu":
        return mark  # bitsandbytes packs 4 bits in another order on their first pass through a CPU
    for part in stored(weight):
        if part.is_meta:
            continue
        flat = part.detach().reshape(-1)
        picked = flat[:: max(1, flat.numel() // _VALUES_PER_TENSOR)][:_VALUES_PER_TENSOR].cpu()
        if picked.is_floating_point():
            picked = picked.to(torch.bfloat16).float()
        mark += picked.contiguous().numpy().tobytes()
    return mark


def has_adapter(model: PreTrainedModel) -> bool:
    """Whether an adapter of peft is on the model, merged ones aside."""
    return bool(getattr(model, "peft_config", None))


def _own_name(name: str) -> str:
    return Path(name).name if Path(name).exists() else name


def _check_attention(name: str | None) -> None:
    """Raise ConfigError for a name that is neither transformers' nor a kernel's on the hub."""
    known = ["eager", *(k for k in ALL_ATTENTION_FUNCTIONS.valid_keys() if "|" not in k)]
    if name is not None and name not in known and "/" not in name:
        raise ConfigError(
            f"attn_implementation {name!r} cannot be used: it is no hub id of a kernel, and transformers has "
            f"none of that name; {suggestion(name, known)}"
        )


def _check_attention_of(source: Source, name: str | None, trust_remote_code: bool) -> None:
    """Raise ConfigError where the model, or this computer, has no such attention."""
    if name is None:
        return
    options = {"trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(source.place, **options, **source.options)
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(config, **options)
    except Exception:  # no fault of the option's; loading will say what it is
        return
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(config, attn_implementation=name, **options)
    except Exception as error:
        raise ConfigError(
            f"attn_implementation {name!r} cannot be used with {source.name!r} ({first_words(error)}); "
            "try --attn-implementation sdpa"
        ) from error


def _tokenizer(source: Source, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source.place, trust_remote_code=trust_remote_code, **source.options
        )
    except Exception as error:
        if not trust_remote_code:
            refuse_tokenizer_code(source)
        raise unavailable(source, error) from error
    return found


def _model(source: Source, **options: Any) -> PreTrainedModel:
    """The model with all its weights, or Unavailable."""
    try:
        result: Any = AutoModelForCausalLM.from_pretrained(
            source.place, output_loading_info=True, **source.options, **options
        )
    except torch.OutOfMemoryError as error:
        raise SkipcalError(
            f"model {source.name!r} does not fit into memory ({first_words(error)}); spread it with "
            "--device-map auto, or give a smaller --dtype or a --quantization"
        ) from error
    except Exception as error:
        spread = options["device_map"] in SPREADS and options["offload_folder"] is None
        raise unavailable(source, error, may_lack_folder=spread) from error
    model, found = result
    lacking = sorted({*found["missing_keys"], *(str(key) for key in found["mismatched_keys"])})
    if lacking:  # transformers would go on with random numbers in their place
        raise Unavailable(
            f"model {source.name!r} lacks weights for {len(lacking)} parameters of {type(model).__name__} "
            f"({', '.join(lacking[:3])}, ...); give a checkpoint of a causal language model"
        )
    loaded: PreTrainedModel = model
    return loaded


def _put_on(model: PreTrainedModel, adapter: str, source: Source) -> None:
    """Inject an adapter's modules, with its weights. Raises Unavailable unless all of them are there."""
    if any(parameter.is_meta for parameter in model.parameters()):
        # Seen with transformers 5.23: the adapter's weights go to disk too, and are never read from there.
        raise ConfigError(
            f"adapter {adapter!r} does not go with weights that are offloaded; give more --max-memory, a "
            "smaller --dtype, or merge the adapter into the model first"
        )
    try:
        found: Any = model.load_adapter(adapter)
    except Exception as error:
        raise Unavailable(
            f"adapter {adapter!r} could not be put on {source.name!r} ({type(error).__name__}: "
            f"{first_words(error)}); give the folder or hub id of a LoRA adapter that was made for this model"
        ) from error
    stray = sorted({*found.missing_keys, *found.unexpected_keys, *(str(k) for k in found.mismatched_keys)})
    if stray:
        raise Unavailable(
            f"adapter {adapter!r} does not fit {source.name!r}: {len(stray)} of its weights have no place or "
            f"are missing ({', '.join(stray[:3])}, ...); give the model it was made for"
        )
