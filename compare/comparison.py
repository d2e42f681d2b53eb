"""Profiles side by side: how much curve, regions and thresholds depend on the calibration data.

The calibration study: after "Is C4 Dataset Optimal for Pruning?" (Bandari et al., EMNLP 2024,
arXiv 2410.07461), asked of skip profiles. Profiles of one model are compared as they are; with text
given, each profile is also used on each text (see `transfer`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from skipcal.arch.loading import LoadedModel
from skipcal.compare.side_by_side import compare_profiles, curve_distances
from skipcal.configs.run import without_folder
from skipcal.errors import ConfigError, TargetOutOfReach
from skipcal.evaluation.transfer import held_out_texts, policy_of, transfer, transfer_matrix
from skipcal.files.writing import check_output, dump_json, remove_output, write_atomic, write_text_atomic
from skipcal.profiles.fits import warn_of_other_opening
from skipcal.profiles.schema import SkipProfile
from skipcal.text.corpora import CorpusSample, resolve_corpora
from skipcal.version import __version__

__all__ = [
    "CompareConfig",
    "CompareResult",
    "compare_profiles",
    "curve_distances",
    "load_profiles",
    "run_compare",
]

COMPARE_FORMAT = "skipcal.compare/1"
FILES = ("compare.json", "compare.csv", "distances.csv", "curves.png")
TRANSFER_FILES = ("transfer.csv", "transfer_ratio.png", "transfer_perplexity.png")


@dataclass(frozen=True)
class CompareConfig:
    """What decides the result of `skipcal compare`, besides the profiles.

    prompts, text_tokens: rows per text, and tokens of each; the first `prompt_tokens` are prefill.
    Raises ConfigError for values out of range.
    """

    corpus: Sequence[str] = ()
    data_files: Sequence[str] = ()
    text_column: str = "text"
    target_skip_ratio: float = 0.25
    prompts: int = 8
    prompt_tokens: int = 64
    text_tokens: int = 256
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing, by the name of their option."""
        for name, least in (
            ("prompts", 1),
            ("prompt_tokens", 1),
            ("text_tokens", 2),
            ("batch_size", 1),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if value < least:
                raise ConfigError(
                    f"--{name.replace('_', '-')} {value} cannot be used: expected {least} or more"
                )
        if not 0 <= self.target_skip_ratio <= 1:
            raise ConfigError(
                f"--target-skip-ratio {self.target_skip_ratio} cannot be used: expected a fraction in [0, 1]"
            )


@dataclass(frozen=True)
class CompareResult:
    """What was found, and what it was found with.

    summary:   one row per profile, see `compare_profiles`.
    distances: one row per pair of profiles, see `curve_distances`.
    transfer:  one row per profile and text, see `transfer`; None without texts.
    """

    profiles: dict[str, SkipProfile]
    config: CompareConfig
    summary: pd.DataFrame
    distances: pd.DataFrame
    transfer: pd.DataFrame | None
    texts: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; what could not be measured is None."""
        return {
            "format": COMPARE_FORMAT,
            "model": next(iter(self.profiles.values())).model.model_dump(mode="json"),
            "skipcal": __version__,
            "config": {
                **asdict(self.config),
                "corpus": list(self.config.corpus),
                "data_files": [without_folder(entry) for entry in self.config.data_files],
            },
            "profiles": _records(self.summary),
            "distances": _records(self.distances),
            "texts": self.texts,
            "transfer": None if self.transfer is None else _records(self.transfer),
        }

    def to_text(self) -> str:
        """Tables for people."""
        model = next(iter(self.profiles.values())).model
        parts = [
            f"{model.name}, {model.num_layers} layers, target skip ratio {self.config.target_skip_ratio:g}",
            _summary_text(self.summary),
        ]
        if len(self.distances):
            parts.append(_distances_text(self.distances))
        if self.transfer is not None:
            parts.append(_transfer_text(self.transfer))
            absent = [name for name in self.profiles if name not in set(self.transfer["profile"])]
            if absent:
                parts.append(f"Without an operating point for the target: {', '.join(absent)}.")
        return "\n\n".join(parts)

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files that `save` writes."""
        return FILES if self.transfer is None else FILES + TRANSFER_FILES

    def save(self, folder: Path, *, overwrite: bool) -> list[Path]:
        """Write tables, figures and the whole as JSON into `folder`; returns the files.

        Nothing is written when one of them exists and `overwrite` is not given.
        """
        from skipcal.plots.compare import save_curves, save_transfer

        def frame(table: pd.DataFrame) -> Callable[[Path], None]:
            return lambda path: write_atomic(
                path, lambda partial: table.to_csv(partial, index=False), overwrite=overwrite
            )

        writers: dict[str, Callable[[Path], None]] = {
            "compare.json": lambda path: write_text_atomic(
                path, dump_json(self.to_dict()), overwrite=overwrite
            ),
            "compare.csv": frame(self.summary),
            "distances.csv": frame(self.distances),
            "curves.png": lambda path: save_curves(self.profiles, path, overwrite=overwrite),
        }
        if self.transfer is not None:
            table = self.transfer
            writers["transfer.csv"] = frame(table)
            for value, name in (("realised_skip_ratio", "ratio"), ("perplexity", "perplexity")):
                writers[f"transfer_{name}.png"] = lambda path, value=value: save_transfer(  # type: ignore[misc]
                    table, path, value=value, overwrite=overwrite
                )
        check_folder(folder, with_text=self.transfer is not None, overwrite=overwrite)
        if self.transfer is None:  # what an earlier comparison with text left must not stand beside this one
            for name in TRANSFER_FILES:
                remove_output(folder / name)
        for name in self.files:
            writers[name](folder / name)
        return [folder / name for name in self.files]


def check_folder(folder: Path, *, with_text: bool, overwrite: bool) -> Path:
    """Raise early, before long work, when a comparison could not be saved in `folder`; returns its JSON file.

    Raises as `check_output` does.
    """
    for name in FILES + TRANSFER_FILES if with_text else FILES:
        check_output(folder / name, overwrite=overwrite)
    return folder / FILES[0]


def run_compare(
    profile_sources: Sequence[str],
    settings: CompareConfig,
    loaded_model_factory: Callable[[], LoadedModel],
) -> CompareResult:
    """Compare profiles, named as for `SkipProfile.load`; with text in `settings`, use each on each text.

    loaded_model_factory: called only when there is text, after all that can be refused without it.
    Profiles that do not reach the target are left out of the transfer, with a warning.
    Raises ProfileMismatch for profiles of different models, TargetOutOfReach when there is text and
    no profile reaches the target, Unavailable for text that cannot be had.
    """
    profiles = load_profiles(profile_sources)
    corpora = resolve_corpora(settings.corpus, settings.data_files, text_column=settings.text_column)
    if len(profiles) < 2 and not corpora:
        raise ConfigError(
            f"{len(profiles)} profile and no text leave nothing to compare; give two profiles or more, or "
            "text with --corpus or --data-files"
        )
    summary = compare_profiles(profiles, settings.target_skip_ratio)
    distances = curve_distances(profiles)
    matrix, samples = None, {}
    if corpora:
        able = _able(profiles, settings)
        loaded = loaded_model_factory()
        for profile in profiles.values():
            profile.check_fits(loaded.model)
            warn_of_other_opening(profile, loaded.tokenizer)
        samples = held_out_texts(
            corpora,
            list(profiles.values()),
            loaded.tokenizer,
            rows=settings.prompts,
            tokens=settings.text_tokens,
            seed=settings.seed,
        )
        matrix = transfer(
            loaded,
            able,
            {name: sample.prompts for name, sample in samples.items()},
            target_skip_ratio=settings.target_skip_ratio,
            prompt_tokens=settings.prompt_tokens,
            batch_size=settings.batch_size,
        )
    texts = [_provenance(sample) for sample in samples.values()]
    return CompareResult(profiles, settings, summary, distances, matrix, texts)


def load_profiles(sources: Sequence[str]) -> dict[str, SkipProfile]:
    """Profiles by name: a file's stem or a folder's name, with what it is in where these repeat, or as given.

    Raises ConfigError when that does not tell them apart.
    """
    stems = [_stem(source) for source in sources]
    names = [
        f"{Path(source).resolve().parent.name}/{stem}" if stems.count(stem) > 1 else stem
        for source, stem in zip(sources, stems, strict=True)
    ]
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise ConfigError(f"two profiles would be called {repeated[0]!r}; give files of different names")
    return {name: SkipProfile.load(source) for name, source in zip(names, sources, strict=True)}


def _stem(source: str) -> str:
    if os.path.isfile(source):
        return Path(source).stem
    return Path(source).resolve().name if os.path.isdir(source) else source


def _able(profiles: Mapping[str, SkipProfile], settings: CompareConfig) -> dict[str, SkipProfile]:
    """The profiles that reach the target; refuses before the model is loaded what must fail after."""
    able, refusals = {}, []
    for name, profile in profiles.items():
        try:
            warm_up = policy_of(name, profile, settings.target_skip_ratio).warm_up_tokens
        except TargetOutOfReach as error:
            refusals.append(error)
            continue
        able[name] = profile
        least = settings.prompt_tokens + warm_up + 2
        if settings.text_tokens < least:
            raise ConfigError(
                f"--text-tokens {settings.text_tokens} leaves no token past the prompt of "
                f"{settings.prompt_tokens} and the warm-up of {warm_up}; expected {least} or more"
            )
    if not able:
        raise refusals[0]
    return able


def _provenance(sample: CorpusSample) -> dict[str, Any]:
    corpus = sample.corpus
    return {
        "name": corpus.name,
        "source": corpus.source,
        "config": corpus.config,
        "split": None if corpus.local or corpus.source == "embedded" else corpus.split,
        "revision": corpus.revision,
        "sha256": sample.sha256,
        "format": corpus.format,
        "opening": sample.opening,
        "joined_by": sample.joined_by,
        "rows": len(sample.prompts),
        "tokens": sum(map(len, sample.prompts)),
    }


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    plain = frame.astype(object).where(frame.notna(), None)
    return [{str(k): v for k, v in row.items()} for row in plain.to_dict(orient="records")]


def _summary_text(frame: pd.DataFrame) -> str:
    width = max(12, *frame["profile"].str.len() + 2)
    lines = [
        f"{'profile':<{width}}{'cold_s':<13}{'cold_e':<13}{'threshold':>9}{'realised':>10}{'R2':>8}{'rho':>7}"
    ]
    for row in frame.to_dict(orient="records"):
        spans = [_span(row["cold_s"], row["cold_s_low"], row["cold_s_high"])]
        spans.append(_span(row["cold_e"], row["cold_e_low"], row["cold_e_high"]))
        lines.append(
            f"{row['profile']:<{width}}{spans[0]:<13}{spans[1]:<13}{_shown(row['threshold'], '.5f'):>9}"
            f"{_shown(row['realised_skip_ratio'], '.3f'):>10}{_shown(row['fit_r2'], '.4f'):>8}"
            f"{_shown(row['monotonicity'], '.2f'):>7}"
        )
    lines.append("[..]: 95 % bootstrap interval over prompts; realised: on the profile's own text")
    return "\n".join(lines)


def _distances_text(frame: pd.DataFrame) -> str:
    lines = ["curves, pair by pair: largest difference of means, Spearman's rho"]
    for row in frame.to_dict(orient="records"):
        lines.append(
            f"  {row['first']} - {row['second']}: {row['max_difference']:.4f} at layer {row['at_layer']}, "
            f"rho {_shown(row['spearman'], '.3f')}"
        )
    return "\n".join(lines)


def _transfer_text(frame: pd.DataFrame) -> str:
    """Both matrices, profiles down and texts across."""
    ratios = transfer_matrix(frame, "realised_skip_ratio")
    perplexities = transfer_matrix(frame, "perplexity")
    return "\n\n".join(
        [
            "skip ratio realised, profile by text:\n" + ratios.to_string(float_format="{:.3f}".format),
            "perplexity, profile by text:\n" + perplexities.to_string(float_format="{:.4g}".format),
            "Texts share nothing with the profiles' prompts. Scored: tokens past the warm-up.",
        ]
    )


def _span(value: int, low: float, high: float) -> str:
    return str(value) if math.isnan(low) else f"{value} [{low:.0f}, {high:.0f}]"


def _shown(value: float, spec: str) -> str:
    return "-" if math.isnan(value) else format(value, spec)
