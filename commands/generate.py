"""`skipcal generate`, which cli.py registers. Importing it imports no torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from skipcal.commands import options as opt
from skipcal.commands.console import check_typed, command, given
from skipcal.configs.names import check_engine
from skipcal.errors import ConfigError
from skipcal.text.local_files import read_text

if TYPE_CHECKING:
    from skipcal.runtime.generation import Generation

Prompt = Annotated[str | None, opt.option("--prompt", metavar="TEXT", help="Text to answer or go on from.")]
PromptFile = Annotated[
    Path | None, opt.option("--prompt-file", metavar="FILE", help="UTF-8 file with the prompt.")
]
DoSample = Annotated[
    bool, opt.option("--do-sample", help="Sample with the model's settings; else greedy decoding.")
]


@opt.takes(opt.loading)
def generate(
    ctx: typer.Context,
    profile: opt.ProfileOption,
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    target_skip_ratio: opt.TargetSkipRatio = None,
    new_tokens: opt.NewTokens = None,
    chat_template: opt.ChatTemplate = True,
    do_sample: DoSample = False,
    seed: opt.Seed = None,
    engine: opt.Engine = None,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
    **shared: Any,
) -> None:
    """Generate text with FFN blocks skipped, then say what was skipped.

    Beams, penalties and the like of a checkpoint are not used; stderr names them.

    Example: skipcal generate --profile smollm2-135m-instruct --prompt "Why?"
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
        found = SkipProfile.load(profile)
        console.importing()
        found.policy_for(target_skip_ratio)  # what it refuses is refused before the model is loaded

        from skipcal.profiles.fits import warn_of_other_opening
        from skipcal.runtime.generation import generate_text
        from skipcal.runtime.session import skipping

        loaded = console.load(console.with_own_model(found, given(ctx)))
        session = skipping(loaded.model, found, target_skip_ratio=target_skip_ratio, engine=engine or "auto")
        warn_of_other_opening(found, loaded.tokenizer)
        done = generate_text(
            loaded,
            session,
            text,
            new_tokens=limit,
            chat_template=chat_template,
            seed=(seed or 0) if do_sample else None,
            stream=None if as_json else sys.stdout,
        )
        console.result(done.to_dict(), _generated(done))


def _prompt(prompt: str | None, file: Path | None) -> str:
    if (prompt is None) == (file is None):
        raise ConfigError("give the prompt once, with --prompt TEXT or --prompt-file FILE")
    if file is not None:
        prompt = read_text(file)
    assert prompt is not None
    check_typed("--prompt", prompt)
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
        f"set-up {done.setup_s:.2f} s, prefill {done.prefill_s:.2f} s, decoding {done.decode_s:.2f} s\n"
        f"skip ratio {shown['skip_ratio']} after the warm-up, {shown['skip_ratio_all']} over all "
        f"{report['decode_steps']} decode steps; {report['weight_bytes_saved'] / 1e9:.2f} GB not read\n"
        f"skipped per layer: {per_layer}"
    )
