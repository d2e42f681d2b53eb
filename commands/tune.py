"""`skipcal tune`. Importing it imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from skipcal.commands import calibrate_options as own
from skipcal.commands import options as opt
from skipcal.commands.console import command, given, listed
from skipcal.commands.fit import own_profile


@opt.takes(opt.loading)
def tune(
    ctx: typer.Context,
    profile: opt.OptionalProfile = None,
    max_kl: own.MaxKl = None,
    max_perplexity_increase: own.MaxPerplexityIncrease = None,
    min_speedup: own.MinSpeedup = None,
    requests: own.Requests = None,
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
        from skipcal.profiles.schema import SkipProfile
        from skipcal.profiles.sources import model_slug

        settings = load_tune(config, {**given(ctx, "rules"), "rules": listed("--rules", rules)})
        found = SkipProfile.load(settings.profile or own_profile(settings.model))
        settings = console.settled(found, settings)
        target = Path(settings.output or f"profiles/{model_slug(settings.model)}-tuned.json")
        alone = found.gate is None
        profile_file = console.output(target, overwrite=settings.overwrite, alone=alone)

        console.importing()
        from skipcal.evaluation.tune import tune_profile
        from skipcal.plots.pareto import save_pareto
        from skipcal.profiles.summary import tuning_table
        from skipcal.style import check_figure

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
