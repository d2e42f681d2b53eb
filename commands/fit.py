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
    """Fit a gate that decides before each FFN, and surrogates.

    Surrogates stand in for what the gate skips. The result is the profile with the gate as its policy, and
    a file of tensors beside it. A profile of the same model comes first: skipcal profile.

    Example: skipcal fit --profile smollm2-135m-instruct -o gated.json
    """
    with command(as_json, debug) as console:
        from skipcal.configs.fit import load_fit
        from skipcal.profiles.schema import SkipProfile
        from skipcal.profiles.sources import model_slug

        settings = load_fit(config, given(ctx))
        found = SkipProfile.load(settings.profile or own_profile(settings.model))
        settings = console.settled(found, settings)
        target = Path(settings.output or f"profiles/{model_slug(settings.model)}-gate.json")
        output_file = console.output(target, overwrite=settings.overwrite, alone=False)
        console.output(beside(target), overwrite=settings.overwrite)

        console.importing()
        from skipcal.fit.pipeline import fit_gate_profile
        from skipcal.profiles.summary import summarize

        fitted = fit_gate_profile(
            console.load(settings.model_dump()), found, settings.model_copy(update={"output": str(target)})
        )
        target = output_file.write(lambda path: fitted.save(path, overwrite=settings.overwrite))
        console.document(fitted.to_json(), summarize(fitted))
        console.say(
            f"\nwrote {target} and {beside(target)}; "
            f"next: skipcal evaluate --profile {target} --method gate --task perplexity"
        )


def own_profile(model: str | None) -> str | Path:
    """Where `skipcal profile` puts a model's profile, or its name among the shipped ones."""
    from skipcal.profiles.sources import model_slug

    own = Path(f"profiles/{model_slug(model)}.json")
    return own if own.is_file() else model_slug(model)


def beside(target: Path) -> Path:
    """Where the tensors of a profile at `target` go."""
    from skipcal.profiles.parts import tensors_file

    return target.with_name(tensors_file(target))
