"""`skipcal profile`, which cli.py registers. Importing it imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from skipcal.calibrate.processes import Processes, with_own_device
from skipcal.commands import calibrate_options as own
from skipcal.commands import options as opt
from skipcal.commands.console import Console, command, given

if TYPE_CHECKING:
    from skipcal.calibrate.pipeline import Calibration
    from skipcal.configs.run import ProfileConfig
    from skipcal.files.output import Output

UNFINISHED = ".unfinished"  # after the output's name: the folder beside it that keeps finished batches


@opt.takes(opt.loading)
def profile(
    ctx: typer.Context,
    model: own.Model = None,
    corpus: opt.Corpus = None,
    data_files: opt.DataFiles = None,
    text_column: opt.TextColumn = None,
    mode: own.Mode = None,
    chat_template: own.ChatPrompts = False,
    prompts: opt.Prompts = None,
    prompt_tokens: opt.PromptTokens = None,
    new_tokens: opt.NewTokens = None,
    batch_size: opt.BatchSize = None,
    seed: opt.Seed = None,
    target_skip_ratio: opt.TargetSkipRatio = None,
    warm_up_tokens: opt.WarmUpTokens = None,
    max_skips: own.MaxSkips = None,
    cold_s: own.ColdS = None,
    cold_e: own.ColdE = None,
    closed_loop: own.ClosedLoop = None,
    by_damage: own.ByDamage = False,
    verify: own.Verify = False,
    output: opt.Output = None,
    trace: own.Trace = None,
    overwrite: opt.Overwrite = False,
    config: opt.ConfigFile = None,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
    **shared: Any,
) -> None:
    """Measure a model's FFN saturation and recommend what to skip.

    Under torchrun the prompts are divided over the processes. A run that was interrupted goes on where it
    stopped when the same command is given again.

    Example: skipcal profile --model meta-llama/Llama-2-13b-chat-hf --verify
    """
    with command(as_json, debug, together=True) as console:
        from skipcal.configs.run import load_config

        settings = load_config(config, given(ctx))
        with console.processes.connected():
            _calibrate(console, settings)


def _calibrate(console: Console, settings: ProfileConfig) -> None:
    from skipcal.files.writing import is_stream
    from skipcal.profiles.sources import model_slug

    processes = console.processes
    target = Path(settings.output or f"profiles/{model_slug(settings.model)}.json")
    traced = Path(settings.trace) if settings.trace else None
    held: list[Output] = []  # in process 0, which writes

    def hold_outputs() -> None:
        for path in (target, *([traced] if traced else [])):
            held.append(console.output(path, overwrite=settings.overwrite))

    processes.share(hold_outputs)

    console.importing()
    from skipcal.calibrate.pipeline import calibrate_together
    from skipcal.calibrate.saturation import write_trace
    from skipcal.profiles.summary import summarize

    options = processes.agree(lambda: with_own_device(settings.model_dump(), processes))
    loaded = processes.in_turn(lambda: console.load(options))
    # Nothing can be put beside a device or a pipe.
    unfinished = None if is_stream(target) else target.with_name(target.name + UNFINISHED)
    try:
        result = calibrate_together(loaded, settings, processes, unfinished)
        if result is None:  # not process 0
            return
        for output in held[1:]:
            output.write(lambda path: write_trace(result.traces, path, overwrite=settings.overwrite))
        target = held[0].write(lambda path: result.profile.save(path, overwrite=settings.overwrite))
    except BaseException:
        if unfinished is not None and unfinished.exists():
            console.on_interrupt = f"what is finished is kept in {unfinished}; give the same command again"
        raise
    if result.checkpoint:
        result.checkpoint.remove()
    console.document(result.profile.to_json(), summarize(result.profile))
    console.say(f"\n{_work(result, processes)}\nwrote {target}; next: skipcal plot {target} -o curve.png")


def _work(result: Calibration, processes: Processes) -> str:
    """What was done in which time."""
    tokens = sum(corpus.tokens for corpus in result.profile.calibration.corpora)
    seconds = result.profile.environment.seconds
    took = "in this run and earlier ones" if seconds is None else f"in {seconds:.0f} s"
    by = "" if processes.size == 1 else f" by {processes.size} processes"
    return f"{tokens:,} tokens captured and thresholds measured {took}{by}"
