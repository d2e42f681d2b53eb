"""Whoever decodes the answers of a task: transformers, or vLLM.

A task has prompts and asks for what is written after them under a policy, with the counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from skipcal.arch.loading import LoadedModel, has_adapter
from skipcal.arch.locate import Architecture, input_device
from skipcal.arch.quantization import quantization_name
from skipcal.configs.names import VLLM_ENGINE
from skipcal.core.host import PlacedBlock
from skipcal.core.policy import Policy
from skipcal.core.report import SkipReport
from skipcal.core.surrogates import Surrogate, Surrogates
from skipcal.errors import ConfigError
from skipcal.runtime.greedy import final_ids, greedy_decoding, until_stop
from skipcal.runtime.session import idle_report, skipping
from skipcal.serving.blocks import check_family
from skipcal.serving.counts import ServingReport
from skipcal.serving.offline import OfflineEngine, installed_version
from skipcal.text.batching import padded

Decode = Callable[[list[list[int]], int], tuple[list[list[int]], SkipReport]]


class Host(Protocol):
    """It decodes greedily, whatever a checkpoint's own settings say.

    takes_all: the prompts of a subset are handed over together, and it sees to batches itself.
    header:    what records say of it beside model and policy; nothing for the one that makes them alike.
    """

    @property
    def takes_all(self) -> bool:
        """See above."""

    @property
    def header(self) -> dict[str, Any]:
        """See above."""

    def reserve(self, tokens: int) -> None:
        """A prompt and its answer will take so many tokens."""

    def decoding(self, policy: Policy, batch_size: int) -> AbstractContextManager[Decode]:
        """A context with a `Decode`: rows of token ids and a number of new tokens make answers and counts.

        Answers are new tokens, up to and with the end of sequence; the counts are of this call.
        """

    def close(self) -> None:
        """Let go of what was started."""


class InTransformers:
    """By plain generate() on the loaded model, with an engine of `skipping`."""

    takes_all = False

    def __init__(self, loaded: LoadedModel, architecture: Architecture, engine: str) -> None:
        """Nothing is run yet."""
        self._model: Any = loaded.model
        self._architecture = architecture
        self._engine = engine
        self.header: dict[str, Any] = {}

    def reserve(self, tokens: int) -> None:
        """Caches grow."""

    @contextmanager
    def decoding(self, policy: Policy, batch_size: int) -> Iterator[Decode]:
        """One session for all rows: the model is not to be used for anything else inside."""
        with skipping(
            self._model, policy=policy, architecture=self._architecture, engine=self._engine
        ) as run:
            before = run.report

            def decode(rows: list[list[int]], new_tokens: int) -> tuple[list[list[int]], SkipReport]:
                nonlocal before
                written = self._generate(rows, new_tokens)
                report = run.report
                since, before = report.since(before), report
                return written, since

            yield decode

    def _generate(self, rows: list[list[int]], new_tokens: int) -> list[list[int]]:
        ids, mask = padded(rows, input_device(self._model), side="left")
        with torch.no_grad(), greedy_decoding(self._model) as stops:
            output = self._model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens)
        return [until_stop(row, stops) for row in output[:, ids.shape[1] :].tolist()]

    def close(self) -> None:
        """Nothing was started."""


class InVllm:
    """By vLLM, which loads the same checkpoint once more."""

    takes_all = True

    def __init__(self, loaded: LoadedModel, architecture: Architecture) -> None:
        """Nothing is started yet. Raises UnsupportedModel or ConfigError for what vLLM cannot run so."""
        model: Any = loaded.model
        self.header: dict[str, Any] = {"engine": f"vllm {installed_version()}"}
        check_family(model.config.model_type, list(model.config.architectures or []))
        _check_plain(loaded)
        self._model = model
        self._architecture = architecture
        self._engine = OfflineEngine(
            model.name_or_path,
            revision=loaded.revision,
            dtype=str(model.dtype).removeprefix("torch."),
            trust_remote_code=loaded.trust_remote_code,
        )

    def reserve(self, tokens: int) -> None:
        """The engine is started for the longest."""
        self._engine.reserve(tokens)

    @contextmanager
    def decoding(self, policy: Policy, batch_size: int) -> Iterator[Decode]:
        """Requests run `batch_size` at a time, each joining as another ends."""
        idle = idle_report(self._architecture, policy)
        stops = final_ids(self._model.generation_config)
        read: Counter[int] = Counter()
        if (surrogates := getattr(policy, "surrogates", None)) is not None:
            policy = replace(policy, surrogates=CountedSurrogates(surrogates.maps, read))  # type: ignore[type-var]
        with self._engine.skipping(policy, together=batch_size) as host:
            before = self._report(idle, host.report, read)

            def decode(rows: list[list[int]], new_tokens: int) -> tuple[list[list[int]], SkipReport]:
                nonlocal before
                written = self._engine.generate(rows, new_tokens=new_tokens, stops=stops)
                report = self._report(idle, host.report, read)
                since, before = report.since(before), report
                return written, since

            yield decode

    def _report(self, idle: SkipReport, counts: ServingReport, read: Counter[int]) -> SkipReport:
        """read: bytes of surrogates that passes have read, by layer."""
        blocks = zip(counts.unread_per_layer, self._architecture.blocks, strict=True)
        return replace(
            idle,
            decode_steps=counts.decode_steps,
            decode_steps_after_warm_up=counts.decode_steps_after_warm_up,
            skipped_per_layer=tuple(counts.skipped_per_layer),
            weight_bytes_saved=sum(passes * block.weight_bytes for passes, block in blocks) - read.total(),
            engine=VLLM_ENGINE,
            engine_reason="asked for",
        )

    def close(self) -> None:
        """Stop the engine."""
        self._engine.close()


class CountedSurrogates(Surrogates):
    """Surrogates that count the bytes which are read of them: a map's once for each pass that asks it."""

    def __init__(self, maps: Mapping[int, Surrogate], read: Counter[int]) -> None:
        """read: by layer; it is added to."""
        super().__init__(maps)
        object.__setattr__(self, "_read", read)

    def __call__(self, layer: int, h: Tensor) -> Tensor | None:
        """As any surrogates."""
        self._read[layer] += self.weight_bytes(layer)  # type: ignore[attr-defined]
        return super().__call__(layer, h)

    def for_blocks(self, blocks: Iterable[PlacedBlock]) -> CountedSurrogates:
        """As any surrogates."""
        placed = super().for_blocks(blocks)
        return CountedSurrogates(placed.maps, self._read)  # type: ignore[attr-defined]


def host_for(loaded: LoadedModel, architecture: Architecture, engine: str) -> Host:
    """The host that the name of an engine means. Raises as that host does."""
    if engine == VLLM_ENGINE:
        return InVllm(loaded, architecture)
    return InTransformers(loaded, architecture, engine)


def check_policy(policy: Policy, engine: str) -> None:
    """Raise ConfigError for a policy that the engine cannot run."""
    if engine == VLLM_ENGINE and policy.unit != "ffn":
        raise ConfigError(
            f"method {policy.method!r} skips whole layers, which engine 'vllm' does not; leave it out, or "
            "take another engine"
        )


def _check_plain(loaded: LoadedModel) -> None:
    """Raise ConfigError unless vLLM loads the very weights that transformers has loaded."""
    quantization = quantization_name(loaded.model)
    other = (
        f"quantization {quantization}" if quantization
        else "an adapter" if has_adapter(loaded.model)
        else "weights from a GGUF file" if loaded.name.endswith(".gguf")
        else None
    )  # fmt: skip
    if other is not None:
        raise ConfigError(
            f"engine 'vllm' runs checkpoints as they are, and the model has {other}; save it as a "
            "checkpoint of plain weights and name that with --model, or take another engine"
        )
