"""The `skipcal` command: thin, one function a command.

Importing it imports no torch; each command imports what it needs.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from skipcal import __version__
from skipcal.configs import options as opt
from skipcal.errors import ConfigError, SkipcalError, Unavailable

if TYPE_CHECKING:
    from skipcal.arch.loading import LoadedModel
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


@app.command()
def profile(
    ctx: typer.Context,
    model: opt.Model = None,
    revision: opt.Revision = None,
    dtype: opt.Dtype = None,
    device: opt.Device = None,
    device_map: opt.DeviceMap = None,
    attn_implementation: opt.AttnImplementation = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    corpus: opt.Corpus = None,
    data_files: opt.DataFiles = None,
    text_column: opt.TextColumn = None,
    mode: opt.Mode = None,
    prompts: opt.Prompts = None,
    prompt_tokens: opt.PromptTokens = None,
    new_tokens: opt.NewTokens = None,
    batch_size: opt.BatchSize = None,
    seed: opt.Seed = None,
    target_skip_ratio: opt.TargetSkipRatio = None,
    warm_up_tokens: opt.WarmUpTokens = None,
    max_skips: opt.MaxSkips = None,
    cold_s: opt.ColdS = None,
    cold_e: opt.ColdE = None,
    closed_loop: opt.ClosedLoop = None,
    verify: opt.Verify = False,
    output: opt.Output = None,
    trace: opt.Trace = None,
    overwrite: opt.Overwrite = False,
    config: opt.ConfigFile = None,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Measure a model's FFN saturation and recommend what to skip.

    Example: skipcal profile --model meta-llama/Llama-2-13b-chat-hf --verify
    """
    with _command(as_json, debug) as console:
        from skipcal.configs.run import load_config
        from skipcal.profiles.files import check_output

        chosen = {k: v for k, v in ctx.params.items() if k not in ("config", "as_json", "debug")}
        settings = load_config(config, {k: v for k, v in chosen.items() if v is not False})
        target = Path(settings.output or f"profiles/{_slug(settings.model)}.json")
        traced = Path(settings.trace) if settings.trace else None
        for path in (target, *([traced] if traced else [])):
            check_output(path, overwrite=settings.overwrite)

        from skipcal.calibrate.pipeline import calibrate_model
        from skipcal.calibrate.saturation import write_trace
        from skipcal.profiles.summary import summarize

        result = calibrate_model(_load(settings.model_dump()), settings)
        result.profile.save(target, overwrite=settings.overwrite)
        if traced:
            write_trace(result.traces, traced, overwrite=settings.overwrite)
        console.document(result.profile.to_json(), summarize(result.profile))
        console.say(f"\nwrote {target}; next: skipcal plot {target} -o curve.png")


@app.command()
def show(source: opt.ProfileArgument, as_json: opt.Json = False, debug: opt.Debug = False) -> None:
    """Print what a profile recommends, and why.

    Example: skipcal show smollm2-135m-instruct
    """
    with _command(as_json, debug) as console:
        from skipcal.profiles.schema import SkipProfile
        from skipcal.profiles.summary import summarize

        found = SkipProfile.load(source)
        console.document(found.to_json(), summarize(found, by_layer=True))


@app.command()
def plot(
    source: opt.ProfileArgument,
    output: opt.Figure,
    overwrite: opt.Overwrite = False,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Draw a profile's saturation curve with its regions and threshold.

    Example: skipcal plot smollm2-135m-instruct -o curve.png
    """
    with _command(as_json, debug) as console:
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
    dtype: opt.Dtype = None,
    device: opt.Device = None,
    device_map: opt.DeviceMap = None,
    attn_implementation: opt.AttnImplementation = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    new_tokens: opt.NewTokens = None,
    chat_template: opt.ChatTemplate = True,
    do_sample: opt.DoSample = False,
    seed: opt.Seed = None,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Generate text with FFN blocks skipped, then say what was skipped.

    Example: skipcal generate --profile smollm2-135m-instruct --prompt "Why is the sky blue?"
    """
    with _command(as_json, debug) as console:
        from skipcal.profiles.schema import SkipProfile

        text = _prompt(prompt, prompt_file)
        limit = 128 if new_tokens is None else new_tokens
        if limit < 1:
            raise ConfigError(f"--new-tokens {limit} cannot be used: expected 1 or more")
        if seed is not None and seed < 0:
            raise ConfigError(f"--seed {seed} cannot be used: expected 0 or more")
        if seed is not None and not do_sample:
            raise ConfigError(f"--seed {seed} has no effect on greedy decoding; add --do-sample")
        found = SkipProfile.load(source)
        policy = found.policy_for(target_skip_ratio)

        from skipcal.runtime.generation import generate_text

        loaded = _load(ctx.params)
        found.check_fits(loaded.model)
        done = generate_text(
            loaded,
            policy,
            text,
            new_tokens=limit,
            chat_template=chat_template,
            seed=(seed or 0) if do_sample else None,
            stream=None if as_json else sys.stdout,
        )
        console.result(done.to_dict(), _generated(done))


@app.command()
def models(check: opt.Check = False, as_json: opt.Json = False, debug: opt.Debug = False) -> None:
    """List the model families that can be profiled, and the profiles that are shipped.

    Example: skipcal models --check
    """
    with _command(as_json, debug) as console:
        from skipcal.arch.families import FAMILIES
        from skipcal.profiles.schema import shipped_profiles

        rows: list[dict[str, Any]] = [
            {"family": name, "chain": list(family.chain)} for name, family in sorted(FAMILIES.items())
        ]
        if check:
            from skipcal.arch.check import proof_error

            for row in rows:
                row["proof_error"] = proof_error(row["family"])
        console.result(
            {"families": rows, "profiles": shipped_profiles()},
            "\n".join(
                [
                    f"{'family':<14}{'proof error':<13}chain of modules from h to f",
                    *map(_family_line, rows),
                    "\nOther families are tried by structure; every model is proven before use.",
                    f"Shipped profiles: {', '.join(shipped_profiles()) or 'none'}",
                ]
            ),
        )


class _Console:
    """Where a command's result goes: text on stdout, or one JSON document with --json."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._stdout = sys.stdout

    def document(self, text: str, readable: str) -> None:
        """The command's result as JSON text, or for people."""
        self._stdout.write(text if self._as_json else readable + "\n")
        self._stdout.flush()

    def result(self, document: Any, readable: str) -> None:
        """The command's result as values for JSON, or for people."""
        self.document(json.dumps(document, sort_keys=True, indent=2) + "\n", readable)

    def say(self, text: str) -> None:
        """A remark that is no part of the result."""
        typer.echo(text, err=self._as_json)


@contextlib.contextmanager
def _command(as_json: bool, debug: bool) -> Iterator[_Console]:
    """Turn errors into one line and an exit code; keep stdout for the result alone."""
    _quieten()
    console = _Console(as_json)
    # With --json nothing that a library prints may reach stdout.
    redirect = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
    try:
        with redirect:
            yield console
    except (typer.Exit, typer.Abort):
        raise
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # no second complaint at exit
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("interrupted: no output was written or changed", err=True)
        raise typer.Exit(130) from None
    except Exception as error:
        if debug:
            traceback.print_exc()
        known = isinstance(error, SkipcalError)
        reason = " ".join(str(error).split())
        hint = "" if known else f" ({type(error).__name__}; run again with --debug for the traceback)"
        typer.echo(f"error: {reason}{hint}", err=True)
        raise typer.Exit(error.exit_code if isinstance(error, SkipcalError) else 1) from None


def _quieten() -> None:
    """One line a warning on stderr, and no bar of any library unless stderr is a terminal."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("warning: %(message)s"))
    log = logging.getLogger("skipcal")
    log.handlers, log.propagate = [handler], False
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its retries are summed up in one line
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")


def _load(options: dict[str, Any]) -> LoadedModel:
    from transformers.utils.logging import disable_progress_bar

    from skipcal.arch.loading import load_model

    if not sys.stderr.isatty():
        disable_progress_bar()
    return load_model(
        options["model"],
        revision=options["revision"],
        dtype=options["dtype"] or "auto",
        device=options["device"],
        device_map=options["device_map"],
        attn_implementation=options["attn_implementation"],
        trust_remote_code=options["trust_remote_code"],
    )


def _slug(model: str | None) -> str:
    from skipcal.profiles.schema import model_slug

    return model_slug(model)


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
    error = f"{row['proof_error']:.1e}" if "proof_error" in row else "-"
    return f"{row['family']:<14}{error:<13}{' -> '.join(row['chain'])}"


if __name__ == "__main__":
    app()
