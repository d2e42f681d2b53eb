"""`skipcal fit` and `skipcal tune`, which cli.py registers. Importing it imports no torch."""

from __future__ import annotations

from pathlib import Path

import typer

from skipcal.configs import options as opt
from skipcal.console import command, listed, load


def fit(
    ctx: typer.Context,
    profile: opt.OptionalProfile = None,
    model: opt.Model = None,
    revision: opt.Revision = None,
    adapter: opt.Adapter = None,
    dtype: opt.Dtype = None,
    quantization: opt.Quantization = None,
    device: opt.Device = None,
    device_map: opt.DeviceMap = None,
    max_memory: opt.MaxMemory = None,
    offload_folder: opt.OffloadFolder = None,
    attn_implementation: opt.AttnImplementation = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    corpus: opt.Corpus = None,
    data_files: opt.DataFiles = None,
    text_column: opt.TextColumn = None,
    prompts: opt.FitWindows = None,
    prompt_tokens: opt.FitTokens = None,
    batch_size: opt.FitBatch = None,
    seed: opt.Seed = None,
    target_skip_ratio: opt.TargetSkipRatio = None,
    surrogate_budget: opt.SurrogateBudget = None,
    rank: opt.Rank = None,
    sweeps: opt.Sweeps = None,
    damage: opt.DamageKind = None,
    damage_prompts: opt.DamageWindows = None,
    closed_loop_prompts: opt.LoopWindows = None,
    output: opt.Output = None,
    overwrite: opt.Overwrite = False,
    config: opt.ConfigFile = None,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Fit a gate that decides before each FFN, and surrogates for what it skips.

    The result is the profile with the gate as its policy, and a file of tensors beside it. A profile of the
    same model comes first: skipcal profile.

    Example: skipcal fit --profile profiles/llama-2-7b-hf.json --model meta-llama/Llama-2-7b-hf -o gated.json
    """
    with command(as_json, debug) as console:
        from skipcal.configs.fit import load_fit
        from skipcal.profiles.files import check_output
        from skipcal.profiles.schema import SkipProfile, model_slug

        given = {k: v for k, v in ctx.params.items() if k not in ("config", "as_json", "debug")}
        settings = load_fit(config, {k: v for k, v in given.items() if v is not False})
        found = SkipProfile.load(settings.profile or _own_profile(settings.model))
        target = Path(settings.output or f"profiles/{model_slug(settings.model)}-gate.json")
        for path in (target, beside(target)):
            check_output(path, overwrite=settings.overwrite)

        from skipcal.calibrate.fit import fit_gate_profile
        from skipcal.profiles.summary import summarize

        fitted = fit_gate_profile(
            load(settings.model_dump()), found, settings.model_copy(update={"output": str(target)})
        )
        fitted.save(target, overwrite=settings.overwrite)
        console.document(fitted.to_json(), summarize(fitted))
        console.say(
            f"\nwrote {target} and {beside(target)}; "
            f"next: skipcal evaluate --profile {target} --method gate --task perplexity"
        )


def tune(
    ctx: typer.Context,
    profile: opt.OptionalProfile = None,
    max_kl: opt.MaxKl = None,
    max_perplexity_increase: opt.MaxPerplexityIncrease = None,
    min_speedup: opt.MinSpeedup = None,
    rules: opt.Rules = None,
    max_skips: opt.MaxSkipsTried = None,
    warm_up_tokens: opt.WarmUpsTried = None,
    model: opt.Model = None,
    revision: opt.Revision = None,
    adapter: opt.Adapter = None,
    dtype: opt.Dtype = None,
    quantization: opt.Quantization = None,
    device: opt.Device = None,
    device_map: opt.DeviceMap = None,
    max_memory: opt.MaxMemory = None,
    offload_folder: opt.OffloadFolder = None,
    attn_implementation: opt.AttnImplementation = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    corpus: opt.Corpus = None,
    data_files: opt.DataFiles = None,
    text_column: opt.TextColumn = None,
    prompts: opt.TuneWindows = None,
    prompt_tokens: opt.FitTokens = None,
    batch_size: opt.TuneBatch = None,
    seed: opt.TuneSeed = None,
    output: opt.TunedOutput = None,
    figure: opt.TuneFigure = None,
    overwrite: opt.Overwrite = False,
    config: opt.ConfigFile = None,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Find the policy that skips most within a quality budget, over rules, thresholds and warm-ups.

    Example: skipcal tune --profile smollm2-135m-instruct --max-kl 0.05 -o tuned.json
    """
    with command(as_json, debug) as console:
        from skipcal.configs.tune import load_tune
        from skipcal.profiles.files import check_output
        from skipcal.profiles.schema import SkipProfile, model_slug

        given = {k: v for k, v in ctx.params.items() if k not in ("config", "as_json", "debug", "rules")}
        options = {**{k: v for k, v in given.items() if v is not False}, "rules": listed("--rules", rules)}
        settings = load_tune(config, options)
        found = SkipProfile.load(settings.profile or _own_profile(settings.model))
        target = Path(settings.output or f"profiles/{model_slug(settings.model)}-tuned.json")
        figures = [Path(settings.figure)] if settings.figure else []
        check_output(target, overwrite=settings.overwrite)

        from skipcal.calibrate.tune import tune_profile
        from skipcal.plots.pareto import save_pareto
        from skipcal.plots.style import check_figure
        from skipcal.profiles.summary import tuning_table

        for path in figures:
            check_figure(path, overwrite=settings.overwrite)
        tuned = tune_profile(load(settings.model_dump()), found, settings)
        tuned.save(target, overwrite=settings.overwrite)
        for path in figures:
            save_pareto(tuned, path, overwrite=settings.overwrite)
        console.document(tuned.to_json(), tuning_table(tuned))
        written = " and ".join(str(path) for path in (target, *figures))
        console.say(f"\nwrote {written}; next: skipcal generate --profile {target} --prompt TEXT")


def _own_profile(model: str | None) -> str | Path:
    """Where `skipcal profile` puts a model's profile, or its name among the shipped ones."""
    from skipcal.profiles.schema import model_slug

    own = Path(f"profiles/{model_slug(model)}.json")
    return own if own.is_file() else model_slug(model)


def beside(target: Path) -> Path:
    """Where the tensors of a profile at `target` go."""
    from skipcal.profiles.parts import tensors_file

    return target.with_name(tensors_file(target))
