"""`skipcal fit`, `tune` and `compare`, which cli.py registers. Importing it imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from skipcal.calibrate import options as own
from skipcal.configs import options as opt
from skipcal.console import command, given, listed
from skipcal.errors import ConfigError

if TYPE_CHECKING:
    from skipcal.arch.loading import LoadedModel


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
        from skipcal.profiles.schema import SkipProfile, model_slug

        settings = load_fit(config, given(ctx))
        found = SkipProfile.load(settings.profile or _own_profile(settings.model))
        settings = console.settled(found, settings)
        target = Path(settings.output or f"profiles/{model_slug(settings.model)}-gate.json")
        output_file = console.output(target, overwrite=settings.overwrite, alone=False)
        console.output(beside(target), overwrite=settings.overwrite)

        console.importing()
        from skipcal.calibrate.fit import fit_gate_profile
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


@opt.takes(opt.loading)
def tune(
    ctx: typer.Context,
    profile: opt.OptionalProfile = None,
    max_kl: own.MaxKl = None,
    max_perplexity_increase: own.MaxPerplexityIncrease = None,
    min_speedup: own.MinSpeedup = None,
    rules: own.Rules = None,
    max_skips: own.MaxSkipsTried = None,
    warm_up_tokens: own.WarmUpsTried = None,
    corpus: opt.Corpus = None,
    data_files: opt.DataFiles = None,
    text_column: opt.TextColumn = None,
    prompts: own.TuneWindows = None,
    prompt_tokens: own.WindowTokens = None,
    batch_size: own.TuneBatch = None,
    seed: own.TuneSeed = None,
    output: own.TunedOutput = None,
    figure: own.TuneFigure = None,
    overwrite: opt.Overwrite = False,
    config: opt.ConfigFile = None,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
    **shared: Any,
) -> None:
    """Find the policy that skips most within a quality budget.

    Rules, thresholds and warm-ups are tried on text, teacher-forced.

    Example: skipcal tune --profile smollm2-135m-instruct --max-kl 0.05
    """
    with command(as_json, debug) as console:
        from skipcal.configs.tune import load_tune
        from skipcal.profiles.schema import SkipProfile, model_slug

        settings = load_tune(config, {**given(ctx, "rules"), "rules": listed("--rules", rules)})
        found = SkipProfile.load(settings.profile or _own_profile(settings.model))
        settings = console.settled(found, settings)
        target = Path(settings.output or f"profiles/{model_slug(settings.model)}-tuned.json")
        alone = found.gate is None
        profile_file = console.output(target, overwrite=settings.overwrite, alone=alone)

        console.importing()
        from skipcal.calibrate.tune import tune_profile
        from skipcal.plots.pareto import save_pareto
        from skipcal.plots.style import check_figure
        from skipcal.profiles.summary import tuning_table

        figures = []
        if settings.figure:
            check_figure(Path(settings.figure), overwrite=settings.overwrite)
            figures.append(console.output(Path(settings.figure), overwrite=settings.overwrite))
        tuned = tune_profile(console.load(settings.model_dump()), found, settings)
        target = profile_file.write(lambda path: tuned.save(path, overwrite=settings.overwrite))
        drawn = [
            figure.write(lambda path: save_pareto(tuned, path, overwrite=settings.overwrite))
            for figure in figures
        ]
        console.document(tuned.to_json(), tuning_table(tuned))
        written = " and ".join(str(path) for path in (target, *drawn))
        console.say(f"\nwrote {written}; next: skipcal generate --profile {target} --prompt TEXT")


@opt.takes(opt.loading)
def compare(
    ctx: typer.Context,
    sources: opt.Profiles,
    corpus: opt.Corpus = None,
    data_files: opt.DataFiles = None,
    text_column: opt.TextColumn = None,
    target_skip_ratio: own.CompareRatio = None,
    prompts: own.ComparePrompts = None,
    prompt_tokens: opt.PromptTokens = None,
    text_tokens: own.TextTokens = None,
    batch_size: own.CompareBatch = None,
    seed: opt.Seed = None,
    output: opt.Folder = None,
    overwrite: opt.Overwrite = False,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
    **shared: Any,
) -> None:
    """Set profiles of one model side by side, or try each on each text.

    Example: skipcal compare c4.json gsm8k.json --data-files c4.jsonl
    """
    with command(as_json, debug) as console:
        from skipcal.configs.run import ModelSettings

        asked = given(ctx, "sources", "output", "overwrite")
        without_text = {"target_skip_ratio"} | ({*asked} if corpus or data_files else set())
        stray = next((name for name in asked if name not in without_text), None)
        if stray is not None:
            raise ConfigError(
                f"--{stray.replace('_', '-')} has no effect without text; add --corpus or --data-files"
            )
        if overwrite and output is None:
            raise ConfigError("--overwrite has no effect without --output; leave it out")
        loading = {name: asked.pop(name) for name in ModelSettings.model_fields if name in asked}

        console.importing()
        from skipcal.calibrate.compare import CompareConfig, check_folder, run_compare
        from skipcal.profiles.schema import SkipProfile

        held = None
        if output:
            main = check_folder(output, with_text=bool(corpus or data_files), overwrite=overwrite)
            held = console.output(main, overwrite=overwrite)

        def loaded() -> LoadedModel:
            first = SkipProfile.load(sources[0])  # the others are of the same model
            return console.load(console.with_own_model(first, loading))

        result = run_compare(sources, CompareConfig(**asked), loaded)
        written = []
        if held:
            place = held.write(lambda path: result.save(path.parent, overwrite=overwrite))
            written = [place.with_name(name) for name in result.files]
        console.result(result.to_dict(), result.to_text())
        for path in written:
            console.say(f"wrote {path}")


def _own_profile(model: str | None) -> str | Path:
    """Where `skipcal profile` puts a model's profile, or its name among the shipped ones."""
    from skipcal.profiles.schema import model_slug

    own = Path(f"profiles/{model_slug(model)}.json")
    return own if own.is_file() else model_slug(model)


def beside(target: Path) -> Path:
    """Where the tensors of a profile at `target` go."""
    from skipcal.profiles.parts import tensors_file

    return target.with_name(tensors_file(target))
