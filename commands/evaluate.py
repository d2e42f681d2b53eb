"""`skipcal evaluate`. Importing it imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from skipcal.commands import evaluate_options as own
from skipcal.commands import options as opt
from skipcal.commands.console import Console, command, given, listed
from skipcal.commands.sweep import as_rows, sweep_into
from skipcal.errors import ConfigError

if TYPE_CHECKING:
    pass


@opt.takes(opt.loading, own.scoring)
def evaluate(
    ctx: typer.Context,
    profile: opt.ProfileOption,
    task: own.Task = None,
    method: own.Method = None,
    target_skip_ratio: own.MethodRatio = None,
    lm_eval_tasks: own.LmEvalTasks = None,
    limit: own.Limit = None,
    output: opt.Folder = None,
    overwrite: opt.Overwrite = False,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
    **shared: Any,
) -> None:
    """Measure what a method costs in quality, against the full model.

    Both run on the same items. For several ratios at once: skipcal sweep.

    Example: skipcal evaluate --profile smollm2-135m-instruct --task perplexity
    """
    with command(as_json, debug) as console:
        options = given(
            ctx, "task", "method", "target_skip_ratio", "lm_eval_tasks", "limit", "output", "overwrite"
        )
        options.update(task=task, methods=method)
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

        sweep_into(console, load_sweep(None, options), output, overwrite)


def _lm_eval(
    console: Console,
    options: dict[str, Any],
    names: str,
    limit: int | None,
    output: Path | None,
    overwrite: bool,
) -> None:
    from skipcal.configs.run import ModelSettings, given_options

    options = given_options(options)
    taken = ("profile", "methods", "ratios", "warm_up_tokens", "batch_size", "chat_template", "seed")
    stray = next((name for name in options if name not in {*taken, *ModelSettings.model_fields}), None)
    if stray is not None:
        raise ConfigError(f"--{stray.replace('_', '-')} has no effect on --lm-eval-tasks; leave it out")
    console.importing()
    from skipcal.files.writing import write_atomic
    from skipcal.profiles.methods import Ask, make_policy, recommended_ratio
    from skipcal.profiles.schema import SkipProfile

    if overwrite and output is None:
        raise ConfigError("--overwrite has no effect without --output; leave it out")
    held = console.output(output / "results.csv", overwrite=overwrite) if output else None
    found = SkipProfile.load(options["profile"])
    ratio = options["ratios"][0] if options.get("ratios") else recommended_ratio(found)

    from skipcal.evaluation.arms import Arm
    from skipcal.evaluation.harness.lm_eval import LONGEST_ANSWER, SEED, run_lm_eval
    from skipcal.profiles.fits import warn_of_other_opening

    ask = Ask(
        target_skip_ratio=ratio,
        new_tokens=LONGEST_ANSWER,
        warm_up_tokens=options.get("warm_up_tokens"),
        seed=options.get("seed", 0),
    )
    methods = [m for m in options.get("methods", ["ffn-skip"]) if m != "full"]
    policies = [(Arm("full", None), make_policy("full", found, ask))]
    policies += [(Arm(method, ratio), make_policy(method, found, ask)) for method in methods]
    loaded = console.load(console.with_own_model(found, options))
    found.check_fits(loaded.model)
    warn_of_other_opening(found, loaded.tokenizer)
    frame = run_lm_eval(
        loaded,
        policies,
        listed("--lm-eval-tasks", names) or [],
        limit=limit,
        batch_size=options.get("batch_size", 8),
        chat_template=options.get("chat_template", True),
        cache=output / "lm-eval" if output else None,
        seed=options.get("seed", SEED),
    )
    shown = frame.drop(columns=["ci_low", "ci_high", "skip_ratio_all", "threshold", "seed"], errors="ignore")
    console.result(as_rows(frame), shown.to_string(index=False, float_format="{:.4g}".format))
    if held:
        target = held.write(
            lambda path: write_atomic(path, lambda file: frame.to_csv(file, index=False), overwrite=overwrite)
        )
        console.say(f"wrote {target}")
