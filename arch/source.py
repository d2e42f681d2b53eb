"""Where a model is loaded from: the embedded one, a folder, a hub id, or a GGUF file in either."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import find_adapter_config_file

from skipcal.arch.embedded import EMBEDDED_MODEL, embedded_model_folder
from skipcal.errors import ConfigError, Unavailable, first_words


@dataclass(frozen=True)
class Source:
    """What `from_pretrained` is given.

    name:      as the user says it. place: folder or hub id. gguf_file: its file there, if it is one.
    """

    name: str
    place: str
    revision: str | None
    gguf_file: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `from_pretrained` beside the place."""
        return {"revision": self.revision, **({"gguf_file": self.gguf_file} if self.gguf_file else {})}

    @property
    def local(self) -> bool:
        """Whether it lies on this computer."""
        return Path(self.place).exists()


def find_source(name: str | None, revision: str | None) -> Source:
    """The source that `name` means: `None`, a folder, `FILE.gguf`, a hub id, or `HUB-ID:FILE.gguf`.

    Raises ConfigError for a revision of nothing, Unavailable where a GGUF file cannot be read.
    """
    if name is None:
        if revision:
            raise ConfigError(f"revision {revision!r} was given without a model; add --model")
        return Source(EMBEDDED_MODEL, str(embedded_model_folder()), None)
    if not name.endswith(".gguf"):
        return Source(name, name, revision)
    if importlib.util.find_spec("gguf") is None:
        raise Unavailable(f"model {name!r} needs the package gguf; run: pip install 'skipcal[gguf]'")
    path, (repository, _, file) = Path(name), name.partition(":")
    if path.is_file():
        return Source(name, str(path.parent), revision, path.name)
    if not file:
        raise Unavailable(
            f"model {name!r}: there is no such file; check the path, or name one on the hub as "
            "HUB-ID:FILE.gguf"
        )
    return Source(name, repository, revision, file)


def check_source(source: Source, *, trust_remote_code: bool, quantization: str | None) -> None:
    """Refuse from the configuration alone what cannot be loaded this way, before any weights are read.

    Raises Unavailable without a configuration, ConfigError for an adapter in a model's place, code
    that was not allowed to run, and weights that are quantized already.
    """
    if source.gguf_file is not None:
        if quantization is not None:
            raise ConfigError(
                f"quantization {quantization!r} has no effect on a GGUF file; leave it out, or give the "
                "model's original folder or hub id"
            )
        return
    try:
        config, _ = PreTrainedConfig.get_config_dict(source.place, revision=source.revision)
    except Exception as error:  # from a missing file to a damaged one: there are dozens of classes
        refuse_adapter(source)
        raise unavailable(source, error) from error
    if not config:
        refuse_adapter(source)
    if not trust_remote_code and _needs_own_code(config):
        raise _untrusted(source)
    if quantization is not None and config.get("quantization_config"):
        method = dict(config["quantization_config"]).get("quant_method", "some format")
        raise ConfigError(
            f"model {source.name!r} is quantized already ({method}), so quantization {quantization!r} has no "
            "effect; leave it out"
        )


def refuse_adapter(source: Source) -> None:
    """Raise ConfigError where the source is an adapter, and no model."""
    try:
        file = find_adapter_config_file(source.place, revision=source.revision)
        settings = json.loads(Path(file).read_text("utf-8")) if file else None
    except (OSError, ValueError):
        return
    if isinstance(settings, dict):
        base = settings.get("base_model_name_or_path") or "BASE"
        raise ConfigError(
            f"{source.name!r} is an adapter, no model; give both: --model {base} --adapter {source.name}"
        )


def refuse_tokenizer_code(source: Source) -> None:
    """Raise ConfigError where the tokenizer brings code that was not allowed to run."""
    try:
        own = get_tokenizer_config(source.place, revision=source.revision).get("auto_map")
    except (OSError, ValueError):
        return
    if own and (not isinstance(own, dict) or "AutoTokenizer" in own):
        raise _untrusted(source)


def unavailable(source: Source, error: Exception, *, may_lack_folder: bool = False) -> Unavailable:
    """Whatever a library raised, in one line. may_lack_folder: weights may go to disk, to no folder."""
    if isinstance(error, ImportError):
        hint = "install what it names"
    elif may_lack_folder and isinstance(error, ValueError):
        hint = "if weights have to be stored anew on disk, name a folder for them with --offload-folder"
    elif source.local:
        hint = "a local folder needs config.json, weights and tokenizer files"
    else:
        hint = "give a folder or a hub id, and check the network, HF_HUB_OFFLINE and your access token"
    reason = f"{type(error).__name__}: {first_words(error)}"
    return Unavailable(f"model {source.name!r} could not be loaded ({reason}); {hint}")


def _needs_own_code(config: dict[str, Any]) -> bool:
    """Whether transformers has no code of its own for a configuration that brings some."""
    own, kind = config.get("auto_map") or {}, config.get("model_type")
    return ("AutoConfig" in own and kind not in CONFIG_MAPPING) or (
        "AutoModelForCausalLM" in own and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    )


def _untrusted(source: Source) -> ConfigError:
    where = f"in {source.place}" if source.local else f"at https://hf.co/{source.place}"
    return ConfigError(
        f"model {source.name!r} needs code of its own, which is not run unasked; read it {where}, then add "
        "--trust-remote-code"
    )
