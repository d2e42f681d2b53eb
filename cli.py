"""The `skipcal` command: thin, one function a command.

Importing it imports no torch; each command imports what it needs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from skipcal import __version__
from skipcal.calibrate.commands import fit, tune
from skipcal.calibrate.profile_command import profile
from skipcal.configs import options as opt
from skipcal.console import Console, command, command_line, listed, load, numbers
from skipcal.errors import ConfigError, Unavailable
from skipcal.profiles.commands import push
from skipcal.report.command import report
from skipcal.runtime.engines.choice import check_engine
from skipcal.speed.command import bench

if TYPE_CHECKING:
    from skipcal.configs.sweep import SweepConfig
    from skipcal.runtime.generation import Generation

app = typer.Typer(
    name="skipcal",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def main(version: opt.Version = False) -> None:
    """Find the FFN blocks a token does not need, and decode without them."""
    if version:
        typer.echo(f"skipcal {__version__}")
        raise typer.Exit


app.command()(profile)
app.command()(fit)
app.command()(tune)


@app.command()
def show(source: opt.ProfileArgument, as_json: opt.Json = False, debug: opt.Debug = False) -> None:
    """Print what a profile recommends, and why.

    Example: skipcal show smollm2-135m-instruct
    """
    with command(as_json, debug) as console:
        from skipcal.profiles.schema import SkipProfile
        from skipcal.profiles.summary import summarize

        found = SkipProfile.load(source)
        console.document(found.to_json(), summarize(found, by_layer=True))


@app.command()
def plot(
    source: opt.PlotArgument,
    output: opt.Figure,
    overwrite: opt.Overwrite = False,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Draw a profile's saturation curve, or the speed-up that `skipcal bench` measured.

    Example: skipcal plot smollm2-135m-instruct -o curve.png
    """
    with command(as_json, debug) as console:
        from skipcal.speed.files import is_result, load_result

        if is_result(Path(source)):
            from skipcal.plots.speed import save_speed_figure

            save_speed_figure(load_result(Path(source)), output, overwrite=overwrite)
        else:
            from skipcal.plots.saturation import save_figure
            from skipcal.profiles.schema import SkipProfile

            save_figure(SkipProfile.load(source), output, overwrite=overwrite)
        console.result({"output": str(output)}, f"wrote {output}")


@app.command()
def generate(
    ctx: typer.Context,
    source: opt.ProfileOption,
    prompt: opt.Prompt = None,
    prompt_file: opt.PromptFile = None,
    target_skip_ratio: opt.TargetSkipRatio = None,
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
    new_tokens: opt.NewTokens = None,
    chat_template: opt.ChatTemplate = True,
    do_sample: opt.DoSample = False,
    seed: opt.Seed = None,
    engine: opt.Engine = None,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Generate text with FFN blocks skipped, then say what was skipped.

    Example: skipcal generate --profile smollm2-135m-instruct --prompt "Why is the sky blue?"
    """
    with command(as_json, debug) as console:
        from skipcal.profiles.schema import SkipProfile

        text = _prompt(prompt, prompt_file)
        limit = 128 if new_tokens is None else new_tokens
        if limit < 1:
            raise ConfigError(f"--new-tokens {limit} cannot be used: expected 1 or more")
        if seed is not None and seed < 0:
            raise ConfigError(f"--seed {seed} cannot be used: expected 0 or more")
        if seed is not None and not do_sample:
            raise ConfigError(f"--seed {seed} has no effect on greedy decoding; add --do-sample")
        check_engine(engine or "auto")
        found = SkipProfile.load(source)
        policy = found.policy_for(target_skip_ratio)

        from skipcal.runtime.generation import generate_text

        loaded = load(ctx.params)
        found.check_fits(loaded.model)
        done = generate_text(
            loaded,
            policy,
            text,
            new_tokens=limit,
            chat_template=chat_template,
            seed=(seed or 0) if do_sample else None,
            engine=engine or "auto",
            stream=None if as_json else sys.stdout,
        )
        console.result(done.to_dict(), _generated(done))


@app.command()
def evaluate(
    ctx: typer.Context,
    source: opt.ProfileOption,
    task: opt.Task = None,
    method: opt.Method = None,
    target_skip_ratio: opt.TargetSkipRatio = None,
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
    data_files: opt.TaskFiles = None,
    text_column: opt.TextColumn = None,
    items: opt.Items = None,
    window_tokens: opt.WindowTokens = None,
    new_tokens: opt.NewTokens = None,
    warm_up_tokens: opt.WarmUpTokens = None,
    match_items: opt.MatchItems = None,
    batch_size: opt.BatchSize = None,
    chat_template: opt.ChatTemplate = True,
    seed: opt.Seed = None,
    judge_model: opt.JudgeModel = None,
    judge_base_url: opt.JudgeUrl = None,
    judge_prompts: opt.JudgePrompts = None,
    lm_eval_tasks: opt.LmEvalTasks = None,
    limit: opt.Limit = None,
    output: opt.Folder = None,
    overwrite: opt.Overwrite = False,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Measure what a method costs in quality, against the full model on the same items.

    Example: skipcal evaluate --profile smollm2-135m-instruct --task perplexity
    """
    with command(as_json, debug) as console:
        options = _evaluation_options(ctx)
        options["methods"] = list(options.pop("method") or []) or None
        if target_skip_ratio is not None:
            if not 0 < target_skip_ratio <= 1:
                raise ConfigError(
                    f"--target-skip-ratio {target_skip_ratio:g} cannot be used: expected a fraction above 0, "
                    "up to 1; the full model runs anyway, as what the others are compared with"
                )
            options["ratios"] = [target_skip_ratio]
        if lm_eval_tasks is not None:
            _lm_eval(console, options, lm_eval_tasks, limit, output, overwrite)
            return
        if limit is not None:
            raise ConfigError(f"--limit {limit} is for --lm-eval-tasks; other tasks take --items")
        from skipcal.configs.sweep import load_sweep

        _sweep(console, load_sweep(None, options), output, overwrite)


@app.command()
def sweep(
    ctx: typer.Context,
    output: opt.RequiredFolder,
    config: opt.ConfigFile = None,
    profile: opt.OptionalProfile = None,
    methods: opt.Methods = None,
    ratios: opt.Ratios = None,
    tasks: opt.Tasks = None,
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
    data_files: opt.TaskFiles = None,
    text_column: opt.TextColumn = None,
    items: opt.Items = None,
    window_tokens: opt.WindowTokens = None,
    new_tokens: opt.NewTokens = None,
    warm_up_tokens: opt.WarmUpTokens = None,
    match_items: opt.MatchItems = None,
    batch_size: opt.BatchSize = None,
    chat_template: opt.ChatTemplate = True,
    seed: opt.Seed = None,
    judge_model: opt.JudgeModel = None,
    judge_base_url: opt.JudgeUrl = None,
    judge_prompts: opt.JudgePrompts = None,
    overwrite: opt.Overwrite = False,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Compare methods over skip ratios and tasks: tables and figures of the paper from one file.

    An interrupted sweep goes on where it stopped when the same command is given again.

    Example: skipcal sweep --config embedded-sweep -o runs/sweep
    """
    with command(as_json, debug) as console:
        from skipcal.configs.sweep import load_sweep

        options = _evaluation_options(ctx)
        options["task"] = listed("--tasks", options.pop("tasks"))
        options["methods"] = listed("--methods", methods)
        options["ratios"] = numbers("--ratios", ratios)
        _sweep(console, load_sweep(config, options), output, overwrite)


app.command()(report)
app.command()(bench)


@app.command()
def compare(
    ctx: typer.Context,
    sources: opt.Profiles,
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
    target_skip_ratio: opt.TargetSkipRatio = None,
    prompts: opt.Prompts = None,
    prompt_tokens: opt.PromptTokens = None,
    text_tokens: opt.TextTokens = None,
    batch_size: opt.BatchSize = None,
    seed: opt.Seed = None,
    output: opt.Folder = None,
    overwrite: opt.Overwrite = False,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Set profiles of one model side by side; with text, try each of them on each text.

    Example: skipcal compare c4.json gsm8k.json --data-files c4=c4.jsonl -o runs/compare
    """
    with command(as_json, debug) as console:
        from skipcal.calibrate.compare import CompareConfig, run_compare
        from skipcal.configs.run import ModelSettings, given_options

        given: dict[str, Any] = {
            "corpus": corpus,
            "data_files": data_files,
            "text_column": text_column,
            "target_skip_ratio": target_skip_ratio,
            "prompts": prompts,
            "prompt_tokens": prompt_tokens,
            "text_tokens": text_tokens,
            "batch_size": batch_size,
            "seed": seed,
        }
        given = given_options(given)
        loading = {name: ctx.params[name] for name in ModelSettings.model_fields}
        if not corpus and not data_files:
            for key in given_options({**given, **loading, "trust_remote_code": trust_remote_code or None}):
                if key != "target_skip_ratio":
                    raise ConfigError(
                        f"--{key.replace('_', '-')} has no effect without text; add --corpus or --data-files"
                    )
        if overwrite and output is None:
            raise ConfigError("--overwrite has no effect without --output; leave it out")
        result = run_compare(sources, CompareConfig(**given), lambda: load(loading))
        written = result.save(output, overwrite=overwrite) if output else []
        console.result(result.to_dict(), result.to_text())
        for path in written:
            console.say(f"wrote {path}")


@app.command()
def models(check: opt.Check = False, as_json: opt.Json = False, debug: opt.Debug = False) -> None:
    """List the model families that can be profiled, and the profiles that are shipped.

    Example: skipcal models --check
    """
    with command(as_json, debug) as console:
        from skipcal.arch.families import UNSUPPORTED, families_listed
        from skipcal.profiles.schema import shipped_profiles

        rows = families_listed()
        if check:
            from skipcal.arch.check import checked

            rows = checked(rows)
        refused = [{"family": name, "reason": reason} for name, reason in sorted(UNSUPPORTED.items())]
        console.result(
            {"families": rows, "unsupported": refused, "profiles": shipped_profiles()},
            "\n".join(
                [
                    f"{'family':<20}{'found':<11}{'kind':<25}{'proof error':<13}chain of modules to f",
                    *map(_family_line, rows),
                    "\nOther families are found by structure; every model is proven before use.",
                    "\nThese cannot be skipped:",
                    *(f"{row['family']:<19} {row['reason']}" for row in refused),
                    f"\nShipped profiles: {', '.join(shipped_profiles()) or 'none'}",
                ]
            ),
        )


app.command()(push)


def _evaluation_options(ctx: typer.Context) -> dict[str, Any]:
    """Options of evaluate and sweep that are settings; switches that are off count as not given."""
    apart = (
        "config",
        "as_json",
        "debug",
        "output",
        "overwrite",
        "lm_eval_tasks",
        "limit",
        "target_skip_ratio",
    )
    options = {k: v for k, v in ctx.params.items() if k not in apart}
    options["profile"] = options.pop("source", None) or options.get("profile")
    for switch in ("trust_remote_code", "chat_template"):  # a switch nobody touched leaves the file's setting
        source = ctx.get_parameter_source(switch)
        if source is not None and source.name == "DEFAULT":
            options[switch] = None
    return options


_FOR_LM_EVAL = (
    "profile", "methods", "ratios", "model", "revision", "adapter", "dtype", "quantization", "device",
    "device_map", "max_memory", "offload_folder", "attn_implementation", "trust_remote_code",
    "warm_up_tokens", "batch_size", "chat_template", "seed",
)  # fmt: skip


def _lm_eval(
    console: Console,
    options: dict[str, Any],
    names: str,
    limit: int | None,
    output: Path | None,
    overwrite: bool,
) -> None:
    stray = next((k for k, v in options.items() if v not in (None, [], ()) and k not in _FOR_LM_EVAL), None)
    if stray is not None:
        raise ConfigError(f"--{stray.replace('_', '-')} has no effect on --lm-eval-tasks; leave it out")
    from skipcal.baselines.methods import Ask, make_policy, recommended_ratio
    from skipcal.profiles.files import check_output, write_atomic
    from skipcal.profiles.schema import SkipProfile

    target = output / "results.csv" if output else None
    if target:
        check_output(target, overwrite=overwrite)
    found = SkipProfile.load(options["profile"])
    ratio = options["ratios"][0] if options.get("ratios") else recommended_ratio(found)

    from skipcal.evaluation.arms import Arm
    from skipcal.evaluation.lm_eval import LONGEST_ANSWER, SEED, run_lm_eval

    ask = Ask(
        target_skip_ratio=ratio,
        new_tokens=LONGEST_ANSWER,
        warm_up_tokens=options["warm_up_tokens"],
        seed=options["seed"] or 0,
    )
    methods = [m for m in options["methods"] or ["ffn-skip"] if m != "full"]
    policies = [(Arm("full", None), make_policy("full", found, ask))]
    policies += [(Arm(method, ratio), make_policy(method, found, ask)) for method in methods]
    loaded = load({**dict.fromkeys(_FOR_LM_EVAL), **options})
    found.check_fits(loaded.model)
    frame = run_lm_eval(
        loaded,
        policies,
        listed("--lm-eval-tasks", names) or [],
        limit=limit,
        batch_size=options["batch_size"] or 8,
        chat_template=options["chat_template"] is not False,
        cache=output / "lm-eval" if output else None,
        seed=SEED if options["seed"] is None else options["seed"],
    )
    shown = frame.drop(columns=["ci_low", "ci_high", "skip_ratio_all", "threshold", "seed"], errors="ignore")
    console.result(_rows(frame), shown.to_string(index=False, float_format="{:.4g}".format))
    if target:
        write_atomic(target, lambda path: frame.to_csv(path, index=False), overwrite=overwrite)
        console.say(f"wrote {target}")


def _sweep(console: Console, settings: SweepConfig, folder: Path | None, overwrite: bool) -> None:
    from skipcal.profiles.schema import SkipProfile

    found = SkipProfile.load(settings.profile)

    from skipcal.evaluation.outputs import begin_folder, sweep_settings, tables, write_results
    from skipcal.evaluation.sweep import plan, run_sweep

    plan(found, settings)
    recorded = sweep_settings(settings, found)
    place = folder or Path("runs") / f"evaluate-{_digest(recorded)}"
    loaded = load(settings.model_dump())
    found.check_fits(loaded.model)
    begin_folder(place, recorded, overwrite=overwrite)
    console.on_interrupt = f"finished items are kept in {place}; give the same command again to go on"
    result = run_sweep(loaded, found, settings, place)
    written = write_results(result, loaded, recorded, command=command_line())
    console.result(_rows(result.frame), tables(result.frame))
    for path in written:
        console.say(f"wrote {path}")


def _rows(frame: Any) -> list[dict[str, Any]]:
    """A table as JSON values; what is missing is null."""
    rows: list[dict[str, Any]] = frame.astype(object).where(frame.notna(), None).to_dict("records")
    return rows


def _digest(value: Any) -> str:
    from skipcal.evaluation.records import digest

    return digest(value)


def _prompt(prompt: str | None, file: Path | None) -> str:
    if (prompt is None) == (file is None):
        raise ConfigError("give the prompt once, with --prompt TEXT or --prompt-file FILE")
    if file is not None:
        try:
            prompt = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise Unavailable(f"prompt file {file} is not UTF-8 text (byte {error.start})") from error
        except OSError as error:
            raise Unavailable(f"prompt file {file} cannot be read ({error.strerror})") from error
    assert prompt is not None
    if not prompt.strip():
        raise ConfigError("the prompt is empty; give some text to answer or go on from")
    return prompt


def _generated(done: Generation) -> str:
    report = done.report.to_dict()
    shown = {k: "-" if report[k] is None else f"{report[k]:.3f}" for k in ("skip_ratio", "skip_ratio_all")}
    speed = "-" if done.tok_per_s is None else f"{done.tok_per_s:.1f}"
    per_layer = " ".join(str(count) for count in report["skipped_per_layer"])
    return (
        f"\n{done.new_tokens} tokens, {speed} tokens/s in decoding; engine {report['engine']} "
        f"({report['engine_reason']})\n"
        f"skip ratio {shown['skip_ratio']} after the warm-up, {shown['skip_ratio_all']} over all "
        f"{report['decode_steps']} decode steps; {report['weight_bytes_saved'] / 1e9:.2f} GB not read\n"
        f"skipped per layer: {per_layer}"
    )


def _family_line(row: dict[str, Any]) -> str:
    error = row.get("proof_error")
    words = "-" if error is None else f"{error:.1e}"
    chain = " -> ".join(row["chain"])
    return f"{row['family']:<19} {row['found'] or 'not here':<11}{row['kind']:<25}{words:<13}{chain}"


if __name__ == "__main__":
    app()
