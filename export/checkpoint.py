"""A model without the FFNs of a fixed set, as a checkpoint that engines load without skipcal."""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import AutoConfig
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from skipcal.arch.gguf import convert_gguf
from skipcal.arch.loading import fingerprint_of, weight_mark
from skipcal.arch.source import Source, check_source, find_source, unavailable
from skipcal.core.chosen_ffns import ChosenFFNs
from skipcal.errors import Unavailable
from skipcal.export.card import readme
from skipcal.export.layout import Layout, ffn_names, kept_names, layout_of, stock_config, zero_shapes
from skipcal.export.record import EXPORT_FILE, EXPORT_FORMAT
from skipcal.export.shards import Shard, copied_file, copy_of, shards_of
from skipcal.files.folder import write_folder_atomic
from skipcal.files.writing import dump_json
from skipcal.profiles.fits import check_shape, check_weights
from skipcal.profiles.schema import SkipProfile
from skipcal.quiet import bars_on_a_terminal, remarks_off
from skipcal.version import __version__

logger = logging.getLogger(__name__)

_BESIDES = (  # what a model is used with; weights and configuration are written anew
    GENERATION_CONFIG_NAME, "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json",
    "special_tokens_map.json", "added_tokens.json", "merges.txt", "vocab.txt", "chat_template.jinja",
    "chat_template.json", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "USE_POLICY.md",
)  # fmt: skip


@dataclass(frozen=True)
class Export:
    """What was written.

    record: what skipcal_export.json says. bytes_left_out: of the FFNs' weights; bytes_instead: of the zeros
    in their place. linked: files that are the model's own, by a second name.
    """

    folder: Path
    record: dict[str, Any]
    bytes_left_out: int
    bytes_instead: int
    linked: tuple[str, ...]


def export_checkpoint(
    profile: SkipProfile,
    policy: ChosenFFNs,
    model: str | None,
    folder: Path,
    *,
    revision: str | None = None,
    target_skip_ratio: float | None = None,
    overwrite: bool = False,
) -> Export:
    """Write `model` into `folder` without the FFNs of `policy`, whatever its warm-up: for every token.

    model: as `load_model` takes it; a GGUF file is read as float32.
    Raises UnsupportedModel for a model that stock engines cannot have so, ProfileMismatch for another model
    than the profile's, Unavailable where it cannot be had, OutputExists and OutputError.
    """
    source = find_source(model, revision)
    check_source(source, trust_remote_code=False, quantization=None)
    config = _config(source)
    layout_of(config)
    check_shape(profile, config)
    policy.check_layers(config.num_hidden_layers)
    with _plain(source) as plain:
        weights = _Weights.of(plain, policy.layers)
        weights.check(profile)
        record = {
            "format": EXPORT_FORMAT,
            "method": policy.method,
            "target_skip_ratio": target_skip_ratio,
            "layers": list(policy.layers),
            "num_layers": config.num_hidden_layers,
            "model": {
                "name": Path(source.name).name if Path(source.name).exists() else source.name,
                "revision": getattr(config, "_commit_hash", None) or revision,
            },
            "profile_sha256": hashlib.sha256(profile.to_json().encode()).hexdigest(),
            "environment": {
                "skipcal": __version__,
                "transformers": transformers.__version__,
                "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            },
        }
        linked: list[str] = []

        def fill(place: Path) -> None:
            linked.extend(weights.write(place))
            for name in _BESIDES:
                copied_file(plain, name, place)
            (place / EXPORT_FILE).write_text(dump_json(record))
            (place / "README.md").write_text(readme(record, weights.layout), encoding="utf-8")

        write_folder_atomic(folder, fill, overwrite=overwrite, marker=EXPORT_FILE)
        instead = sum(zero.nbytes for zero in weights.zeros.values())
        return Export(folder, record, weights.bytes_of(ffn_names(policy.layers)), instead, tuple(linked))


@dataclass(frozen=True)
class _Weights:
    """A checkpoint, and which of its weights go where. names: those that are kept."""

    source: Source
    config: Any
    layout: Layout
    layers: tuple[int, ...]
    shards: list[Shard]
    names: set[str]

    @classmethod
    def of(cls, source: Source, layers: tuple[int, ...]) -> _Weights:
        """Raises Unavailable for a checkpoint in which a weight is missing."""
        config = _config(source)
        layout, shards = layout_of(config), shards_of(source)
        names = kept_names(config, layout, layers)
        lacking = sorted(names.difference(*(shard.tensors for shard in shards)))
        if lacking:
            raise Unavailable(
                f"model {source.name!r} lacks {len(lacking)} of its weights ({', '.join(lacking[:3])}, ...); "
                "give a checkpoint of a causal language model"
            )
        return cls(source, config, layout, layers, shards, names)

    def check(self, profile: SkipProfile) -> None:
        """Warn where these are not the weights that the profile was made on."""
        dtype = str(self.dtype).removeprefix("torch.")
        if dtype != profile.model.dtype:
            logger.warning(
                "the profile was made in %s, the weights are held in %s", profile.model.dtype, dtype
            )
            return
        tied = {"lm_head.weight"} if self.config.tie_word_embeddings else set()
        marks = {
            name: weight_mark(name, weight)
            for name, weight in self._read()
            if name.endswith((".weight", ".bias")) and name not in tied
        }
        check_weights(profile, fingerprint_of(marks), same_weights=False)

    @cached_property
    def dtype(self) -> torch.dtype:
        """That of the embeddings."""
        return next(weight.dtype for name, weight in self._read() if name == "model.embed_tokens.weight")

    @cached_property
    def zeros(self) -> dict[str, Tensor]:
        """What stands in the FFNs' place."""
        shapes = zero_shapes(self.config, self.layout, self.layers)
        return {name: torch.zeros(shape, dtype=self.dtype) for name, shape in shapes.items()}

    def write(self, place: Path) -> list[str]:
        """Write weights and configuration; returns the names of files that are links."""
        used = [shard for shard in self.shards if self.names.intersection(shard.tensors)]
        files = [f"model-{n:05}-of-{len(used) + 1:05}.safetensors" for n in range(1, len(used) + 2)]
        weight_map: dict[str, str] = {}
        linked = []
        for shard, file in zip(used, files, strict=False):
            if copy_of(shard, place / file, self.names):
                linked.append(file)
            weight_map |= dict.fromkeys(self.names.intersection(shard.tensors), file)
        (place / files[-1]).write_bytes(save(self.zeros, metadata={"format": "pt"}))
        weight_map |= dict.fromkeys(self.zeros, files[-1])
        size = self.bytes_of(self.names) + sum(zero.nbytes for zero in self.zeros.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (place / SAFE_WEIGHTS_INDEX_NAME).write_text(dump_json(index))
        config = stock_config(self.config, self.layout, self.layers, dtype=self.dtype)
        (place / CONFIG_NAME).write_text(dump_json(config))
        return linked

    def bytes_of(self, names: Collection[str]) -> int:
        """Of some of the checkpoint's weights."""
        return sum(weight.nbytes for name, weight in self._read() if name in names)

    def _read(self) -> Iterable[tuple[str, Tensor]]:
        """All weights; what is not looked at is not read from the disk."""
        for shard in self.shards:
            with safe_open(shard.path, framework="pt") as file:
                for name in shard.tensors:
                    yield name, file.get_tensor(name)


def _config(source: Source) -> Any:
    try:
        return AutoConfig.from_pretrained(source.place, **source.options)
    except Exception as error:  # from a missing file to a damaged one: there are dozens of classes
        raise unavailable(source, error) from error


@contextmanager
def _plain(source: Source) -> Iterator[Source]:
    """The same model in safetensors, which a GGUF file is made into for the time being."""
    if source.gguf_file is None:
        yield source
        return
    with tempfile.TemporaryDirectory(prefix="skipcal-") as folder:
        try:
            with remarks_off(), bars_on_a_terminal():
                convert_gguf(
                    source.place, source.gguf_file, Path(folder), name=source.name, revision=source.revision
                )
        except Exception as error:
            raise unavailable(source, error) from error
        yield Source(source.name, folder, None)
