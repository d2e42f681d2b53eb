"""What every fit begins with: the checks, the text, the damage, and what is recorded of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from tqdm.auto import tqdm

from skipcal.arch.limits import check_angles, check_ids, check_length
from skipcal.arch.loading import LoadedModel
from skipcal.arch.locate import Architecture, input_device, locate
from skipcal.calibrate.provenance import sample_info
from skipcal.configs.fit import FitConfig
from skipcal.core.surrogates import Surrogates, rank_for
from skipcal.errors import ConfigError, TargetOutOfReach
from skipcal.fit.damage import Damage, fisher_damage
from skipcal.fit.layer_damage import relative_damage
from skipcal.profiles.fits import warn_of_other_opening
from skipcal.profiles.schema import SkipProfile
from skipcal.speed.hardware import peak_memory
from skipcal.text.corpora import CorpusSample, resolve_corpora, sample_corpus
from skipcal.text.opening import prefill_tokens

logger = logging.getLogger(__name__)

TARGETS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
TOKENS_PER_INPUT = 10  # fewer calibration tokens than this a hidden dimension: worth a warning


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A model, text to fit on and to measure on, and the configuration of a fit.

    layers: candidates for skipping.
    rank, maps: of each surrogate.
    given:  tokens that the tokenizer begins a text with: the prefill.
    first:  positions of a window below it run the full model and count nowhere: the given and the warm-up.
    """

    loaded: LoadedModel
    profile: SkipProfile
    config: FitConfig
    architecture: Architecture
    samples: list[CorpusSample]
    layers: range
    rank: int
    maps: int
    given: int
    first: int

    @classmethod
    def of(cls, loaded: LoadedModel, profile: SkipProfile, config: FitConfig) -> Self:
        """Refuse what can be refused before any text is read, then read it.

        Raises ProfileMismatch for a profile of another model or of other weights, ConfigError and
        TargetOutOfReach for settings that do not fit the model, Unavailable when text is missing or short.
        """
        architecture = locate(loaded.model)
        profile.check_fits(loaded.model, same_weights=True)
        warn_of_other_opening(profile, loaded.tokenizer)
        # The first FFN makes the stream what it is, the last has nobody to make up for it.
        layers = range(1, architecture.num_layers - 1)
        given = prefill_tokens(loaded.tokenizer)
        first = given + profile.policy.warm_up_tokens
        _check_settings(loaded, profile, config, architecture, given)
        found = cls(
            loaded=loaded,
            profile=profile,
            config=config,
            architecture=architecture,
            samples=_samples(loaded, config),
            layers=layers,
            rank=_rank(config, architecture, layers, torch.finfo(loaded.model.dtype).bits // 8),
            maps=config.maps_each(),
            given=given,
            first=first,
        )
        check_ids(loaded.model, (row for s in found.samples for row in (*s.prompts, *s.held_out)))
        if found.tokens < TOKENS_PER_INPUT * architecture.hidden_size:
            logger.warning(
                "%d tokens to fit on are few for a hidden size of %d; raise --prompts",
                found.tokens,
                architecture.hidden_size,
            )
        return found

    @property
    def rows(self) -> list[list[int]]:
        """The windows to fit on."""
        return [row for sample in self.samples for row in sample.prompts]

    @property
    def tokens(self) -> int:
        """Those of the windows that are fitted on."""
        return len(self.rows) * (self.config.prompt_tokens - self.first)

    def damage(self) -> Damage:
        """What a wrong contribution of an FFN costs, measured on some of the windows."""
        model: Any = self.loaded.model
        device = input_device(model)
        rows = [row for sample in self.samples for row in sample.prompts[: self.config.damage_prompts]]
        bar = tqdm(rows, desc="damage", unit="window", leave=False, disable=None)
        ids = (torch.tensor([row], device=device) for row in bar)
        if self.config.damage == "relative-error":
            return relative_damage(model, self.architecture, ids, first=self.first)
        return fisher_damage(model, self.architecture, ids, first=self.first, seed=self.config.seed)

    def record(self, surrogates: Sequence[Surrogates], seconds: float) -> dict[str, Any]:
        """What a profile keeps of every fit, by field: text, settings, size of surrogates, time, memory."""
        config = self.config
        each = config.prompt_tokens - self.first
        return {
            "corpora": [sample_info(sample, len(sample.prompts) * each) for sample in self.samples],
            "windows": len(self.rows),
            "window_tokens": config.prompt_tokens,
            "tokens": self.tokens,
            "seed": config.seed,
            "damage": config.damage,
            "rank": self.rank,
            "maps": self.maps,
            "surrogate_share": self._surrogate_share(surrogates),
            "seconds": round(seconds, 1),
            "peak_memory_bytes": peak_memory(input_device(self.loaded.model))["bytes"],
            "config": config.recorded(),
        }

    def _surrogate_share(self, surrogates: Sequence[Surrogates]) -> float:
        """Bytes of a surrogate over those of its FFN, the mean over all of them."""
        blocks = self.architecture.blocks
        shares = [
            placed.weight_bytes(layer) / blocks[layer].weight_bytes
            for placed in (each.for_blocks(blocks) for each in surrogates)
            for layer in placed.maps
        ]
        return sum(shares) / len(shares)


def _check_settings(
    loaded: LoadedModel, profile: SkipProfile, config: FitConfig, architecture: Architecture, given: int
) -> None:
    count = architecture.num_layers
    if count < 3:
        raise ConfigError(f"the model has {count} layers; the first and the last always run, so 3 are needed")
    if config.target_skip_ratio > (count - 2) / count:
        raise TargetOutOfReach(
            f"target skip ratio {config.target_skip_ratio:g} is out of reach: the first and the last of "
            f"{count} FFNs always run; lower --target-skip-ratio"
        )
    warm_up = profile.policy.warm_up_tokens
    if config.prompt_tokens <= given + warm_up:
        raise ConfigError(
            f"no token of a window of {config.prompt_tokens} lies past the warm-up of "
            f"{warm_up}; raise --prompt-tokens"
        )
    what = f"windows of {config.prompt_tokens} tokens do"
    check_length(loaded.model, config.prompt_tokens, what, lower="--prompt-tokens")
    check_angles(loaded.model, config.prompt_tokens, given, lower="--prompt-tokens")


def _rank(config: FitConfig, architecture: Architecture, layers: range, element_bytes: int) -> int:
    hidden = architecture.hidden_size
    if config.rank is None:
        smallest = min(architecture.blocks[layer].weight_bytes for layer in layers)
        return rank_for(config.surrogate_budget, hidden, smallest, element_bytes, maps=config.maps_each())
    if config.rank > hidden:
        raise ConfigError(f"--rank {config.rank} is above the hidden size of {hidden}")
    return config.rank


def _samples(loaded: LoadedModel, config: FitConfig) -> list[CorpusSample]:
    return [
        sample_corpus(
            corpus,
            loaded.tokenizer,
            prompts=config.windows(),
            prompt_tokens=config.prompt_tokens,
            seed=config.seed,
            held_out=config.loop_windows(),
        )
        for corpus in resolve_corpora(config.corpora(), config.data_files, text_column=config.text_column)
    ]
