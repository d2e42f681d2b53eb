"""Fixed sets of FFNs that lose little, with surrogates fitted to the stream that the set itself leaves.

The set grows by one FFN at a time. A sweep with the set so far applied refits its surrogates, fits one for
every other FFN and predicts what skipping that one as well would cost; the few of least predicted damage are
tried on text that was not fitted on, and the one that loses least joins. A prediction alone does not do:
damages of FFNs that are skipped together do not add up.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from tqdm.auto import tqdm

from skipcal.arch.loading import LoadedModel
from skipcal.configs.fit import FitConfig
from skipcal.core.chosen_ffns import ChosenFFNs
from skipcal.core.policy import Policy
from skipcal.core.substituted import Substituted
from skipcal.core.surrogates import Surrogate, Surrogates
from skipcal.errors import ConfigError
from skipcal.fit.held_out import HeldOutLoss
from skipcal.fit.layer_sweep import RowSweep
from skipcal.fit.prepared import TARGETS, Prepared
from skipcal.fit.set_sweep import NOTHING, SetSweep
from skipcal.profiles.fixed_sets import SETS_SUFFIX, FixedSet, FixedSets, FixedSetsFit
from skipcal.profiles.methods import nearest_count
from skipcal.profiles.parts import StaticSettings, tensors_file
from skipcal.profiles.schema import SkipProfile
from skipcal.profiles.set_tensors import SetTensors
from skipcal.profiles.sources import model_slug

TRIED = 5  # FFNs tried at each step
TRIED_ON = 4  # windows of each corpus they are tried on


def fit_fixed_sets(loaded: LoadedModel, profile: SkipProfile, config: FitConfig) -> SkipProfile:
    """Fit sets for TARGETS up to the configuration's ratio; the profile's policy becomes that one's.

    Progress bars go to stderr when it is a terminal. Raises as `Prepared.of` does.
    """
    started = time.perf_counter()
    prepared = Prepared.of(loaded, profile, config)
    layers = prepared.architecture.num_layers
    wanted = sorted(
        {ratio for ratio in TARGETS if ratio < config.target_skip_ratio} | {config.target_skip_ratio}
    )
    # Sets that have as many FFNs are one, named by the last of their ratios.
    counts = {nearest_count("static", ratio, layers): ratio for ratio in wanted}
    if max(counts) > len(prepared.layers):
        raise ConfigError(
            f"a set of {max(counts)} FFNs is wanted, but only {len(prepared.layers)} may be skipped; lower "
            "--target-skip-ratio"
        )
    path = _grown(prepared, max(counts))
    tensors = SetTensors.pack([path[count - 1] for count in counts], profile.model.fingerprint)
    measure = HeldOutLoss(prepared)
    sets = []
    for ratio, surrogates in zip(counts.values(), tensors.sets, strict=True):
        excess = measure(_policy(surrogates, profile.policy.warm_up_tokens))
        sets.append(
            FixedSet(
                target_skip_ratio=ratio,
                layers=sorted(surrogates.maps),
                excess_nll=fmean(excess.values()),  # of as many windows each
                by_corpus=excess,
            )
        )
    output = Path(config.output or f"{model_slug(profile.model.name)}.json")
    fixed = FixedSets(
        tensors=tensors_file(output, SETS_SUFFIX),
        sha256=tensors.sha256,
        warm_up_tokens=profile.policy.warm_up_tokens,
        sets=sets,
        fit=FixedSetsFit(**prepared.record(tensors.sets, time.perf_counter() - started), tried=TRIED),
    )
    policy = StaticSettings(
        layers=sets[-1].layers, warm_up_tokens=profile.policy.warm_up_tokens, surrogates="fitted"
    )
    return profile.with_fixed_sets(fixed, policy, tensors)


def _grown(prepared: Prepared, count: int) -> list[Mapping[int, Surrogate]]:
    """Sets of 1 to `count` FFNs, each the one before and one more: their surrogates by layer."""
    warm_up = prepared.profile.policy.warm_up_tokens
    rows = RowSweep(
        prepared.architecture, prepared.rows, first=prepared.first, batch_size=prepared.config.batch_size
    )
    sweep = SetSweep(rows, damage=prepared.damage(), rank=prepared.rank, maps=prepared.maps)
    loss = HeldOutLoss(prepared, TRIED_ON)
    chosen: list[int] = []
    path: list[Mapping[int, Surrogate]] = []
    found = NOTHING
    for _ in tqdm(range(count), desc="fixed sets", unit="FFN", leave=False, disable=None):
        others = [layer for layer in prepared.layers if layer not in chosen]
        found = sweep.fit(chosen, others, before=found, changed=chosen[-1] if chosen else 0)
        if chosen:
            path.append(_some(found.surrogates, chosen))

        def excess(layer: int, maps: Mapping[int, Surrogate] = found.surrogates) -> float:
            return fmean(loss(_policy(Surrogates(_some(maps, [*chosen, layer])), warm_up)).values())

        chosen.append(min(sorted(others, key=found.damage.__getitem__)[:TRIED], key=excess))
    return [*path, _some(sweep.fit(chosen, before=found, changed=chosen[-1]).surrogates, chosen)]


def _some(maps: Mapping[int, Surrogate], layers: Sequence[int]) -> dict[int, Surrogate]:
    return {layer: maps[layer] for layer in layers}


def _policy(surrogates: Surrogates, warm_up_tokens: int) -> Policy:
    layers = tuple(sorted(surrogates.maps))
    chosen = ChosenFFNs(method="static", layers=layers, probability=1.0, warm_up_tokens=warm_up_tokens)
    return Substituted(chosen, surrogates, "fitted")
