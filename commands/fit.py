"""`skipcal fit`. Importing it imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from skipcal.commands import calibrate_options as own
from skipcal.commands import options as opt
from skipcal.commands.console import command, given


@opt.takes(opt.loading)
def fit(
    ctx: typer.Context,
    method: own.FitMethod = None,
    profile: opt.OptionalProfile = None,
    corpus: opt.Corpus = None,
    data_files: opt.DataFiles = None,
    text_column: opt.TextColumn = None,
    prompts: own.FitWindows = None,
    prompt_tokens: own.WindowTokens = None,
    batch_size: own.FitBatch = None,
    seed: opt.Seed = None,
    target_skip_ratio: own.FitRatio = None,
    surrogate_budget: own.SurrogateBudget = None,
    rank: own.Rank = None,
    maps: own.Maps = None,
    sweeps: own.Sweeps = None,
    damage: own.DamageKind = None,
    damage_prompts: own.DamageWindows = None,
    closed_loop_prompts: own.LoopWindows = None,
    output: own.GateOutput = None,
    overwrite: opt.Overwrite = False,
    config: opt.ConfigFile = None,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
    **shared: Any,
) -> None:
    """Fit a gate or fixed sets of FFNs, and surrogates.

    A gate decides for each token before each FFN, for few requests at a time; a set is the same for all
    tokens, for batches. Surrogates stand in for what is skipped. The result is the profile with the gate or
    the largest set as its policy, and a file of tensors beside it. A profile of the same model comes first:
    skipcal profile.

    Example: skipcal fit --profile smollm2-135m-instruct -o gated.json
    """
    with command(as_json, debug) as console:
        from skipcal.configs.fit import load_fit
        from skipcal.configs.names import FITTED
        from skipcal.profiles.schema import SkipProfile
        from skipcal.profiles.sources import model_slug

        settings = load_fit(config, given(ctx))
        found = SkipProfile.load(settings.profile or own_profile(settings.model))
        settings = console.settled(found, settings)
        target = Path(settings.output or f"profiles/{model_slug(settings.model)}-{settings.method}.json")
        output_file = console.output(target, overwrite=settings.overwrite, alone=False)
        console.output(beside(target, settings.method), overwrite=settings.overwrite)

        console.importing()
        from skipcal.fit.fixed_sets import fit_fixed_sets
        from skipcal.fit.pipeline import fit_gate_profile
        from skipcal.profiles.summary import summarize

        fit_profile = {"gate": fit_gate_profile, "static": fit_fixed_sets}[settings.method]
        fitted = fit_profile(
            console.load(settings.model_dump()), found, settings.model_copy(update={"output": str(target)})
        )
        target = output_file.write(lambda path: fitted.save(path, overwrite=settings.overwrite))
        console.document(fitted.to_json(), summarize(fitted))
        name = {"gate": "gate", "static": FITTED}[settings.method]
        console.say(
            f"\nwrote {target} and {beside(target, settings.method)}; "
            f"next: skipcal evaluate --profile {target} --method {name} --task perplexity"
        )


def own_profile(model: str | None) -> str | Path:
    """Where `skipcal profile` puts a model's profile, or its name among the shipped ones."""
    from skipcal.profiles.sources import model_slug

    own = Path(f"profiles/{model_slug(model)}.json")
    return own if own.is_file() else model_slug(model)


def beside(target: Path, method: str) -> Path:
    """Where the tensors that a fit adds to a profile at `target` go."""
    from skipcal.profiles.fixed_sets import SETS_SUFFIX
    from skipcal.profiles.parts import TENSORS_SUFFIX, tensors_file

    return target.with_name(tensors_file(target, {"gate": TENSORS_SUFFIX, "static": SETS_SUFFIX}[method]))
