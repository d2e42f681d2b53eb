"""Between a command and its user: options as values, stdout, stderr and exit codes in one place."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from skipcal.calibrate.processes import Processes
from skipcal.errors import ConfigError, ProcessFailed, SkipcalError, Unavailable, first_words
from skipcal.quiet import TALKATIVE

if TYPE_CHECKING:
    from pydantic import BaseModel

    from skipcal.arch.loading import LoadedModel
    from skipcal.files.output import Output
    from skipcal.profiles.schema import SkipProfile

Settings = TypeVar("Settings", bound="BaseModel")
logger = logging.getLogger(__name__)
_WORTH_TELLING_S = 2.0  # what takes longer says so at its end


class Console:
    """Where a command's result goes: text on stdout, or one JSON document with --json.

    processes: those that torchrun started together, of which only the first one prints.
    """

    def __init__(self, as_json: bool, processes: Processes) -> None:
        """Take stdout as it is now; libraries may find it redirected."""
        self._as_json = as_json
        self._stdout = sys.stdout
        self.processes = processes
        self.on_interrupt = "no output was written or changed"
        self._outputs = contextlib.ExitStack()
        self._named_by_profile = False

    def document(self, text: str, readable: str) -> None:
        """The command's result as JSON text, or for people."""
        if self.processes.leads:
            self._stdout.write(_ascii(text) if self._as_json else readable + "\n")
            self._stdout.flush()

    def result(self, document: Any, readable: str) -> None:
        """The command's result as values for JSON, or for people."""
        self.document(json.dumps(document, sort_keys=True, indent=2) + "\n", readable)

    def say(self, text: str) -> None:
        """A remark that is no part of the result."""
        if self.processes.leads:
            print(text, file=sys.stderr if self._as_json else sys.stdout, flush=True)

    def output(self, path: Path, *, overwrite: bool, alone: bool = True) -> Output:
        """An output that is held until the command ends; see `Output`."""
        from skipcal.files.output import Output

        held = Output(path, overwrite=overwrite, alone=alone)
        self._outputs.callback(held.release)
        return held

    def release_outputs(self) -> None:
        """Let other runs have the names."""
        self._outputs.close()

    def doing(self, what: str) -> None:
        """Say what takes a while, to somebody who watches: a line on stderr, where that is a terminal."""
        logger.info("%s ...", what)

    def with_own_model(self, profile: SkipProfile, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options with the profile's own model where they name none, as every command has it.

        It is loaded as it was for the profile, in what the options do not say otherwise.
        """
        from skipcal.profiles.own_model import own_model

        asked = {name: value for name, value in options.items() if value is not None}
        own = {} if "model" in asked else own_model(profile)
        self._named_by_profile = bool(own)
        return {**own, **asked}

    def settled(self, profile: SkipProfile, settings: Settings) -> Settings:
        """The same for settings."""
        asked = {name: getattr(settings, name) for name in settings.model_fields_set}
        return settings.model_copy(update=self.with_own_model(profile, asked))

    def load(self, options: Mapping[str, Any]) -> LoadedModel:
        """The model that options or settings name, without bars unless stderr is a terminal.

        What they do not say is as ModelSettings has it. A model that a profile named is told of on stderr.
        Raises ConfigError for a value that cannot be used.
        """
        from skipcal.arch.embedded import EMBEDDED_MODEL
        from skipcal.configs.run import ModelSettings, load_settings

        asked = {name: options[name] for name in ModelSettings.model_fields if name in options}
        settings = load_settings(ModelSettings, None, asked).model_dump()
        self.importing()

        from skipcal.arch.loading import load_model
        from skipcal.arch.placement import memory_limits
        from skipcal.files.reading import printable

        name, limits = settings.pop("model"), memory_limits(settings.pop("max_memory"))
        self.doing(f"loading {name or EMBEDDED_MODEL}")
        if not self._named_by_profile:
            return load_model(name, max_memory=limits, **settings)
        at = f" at revision {settings['revision']}" if settings["revision"] else ""
        self.complain(f"the model is the profile's, {printable(name + at)}; --model names another")
        try:
            return load_model(name, max_memory=limits, **settings)
        except Unavailable as error:
            raise Unavailable(f"{error}; the profile names this model, --model names a copy of it") from error

    def importing(self) -> None:
        """Say that torch and transformers are imported next, unless they are there."""
        if "torch" not in sys.modules:
            self.doing("importing torch and transformers")

    def complain(self, text: str, *, own: bool = False) -> None:
        """A line on stderr. own: it happened in this process alone, so that it has to speak itself."""
        if own or self.processes.leads:
            print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def command(as_json: bool, debug: bool, *, together: bool = False) -> Iterator[Console]:
    """Turn errors into one line and an exit code; keep stdout for the result alone.

    together: the command can be run by several processes; others refuse to do the same work N times.
    """
    _replace_what_cannot_be_shown()
    processes = _processes(together)
    _quieten(processes)
    console = Console(as_json, processes)
    # With --json nothing that a library prints may reach stdout.
    redirect = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
    begin = time.monotonic()
    try:
        with redirect:
            yield console
        seconds = time.monotonic() - begin
        if seconds > _WORTH_TELLING_S:
            logger.info("took %s", duration(seconds))
    except (typer.Exit, typer.Abort):
        raise
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # no second complaint at exit
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.complain(f"interrupted: {console.on_interrupt}")
        raise typer.Exit(130) from None
    except Exception as error:
        if debug:
            traceback.print_exc()
        if isinstance(error, SkipcalError):
            console.complain(f"error: {' '.join(str(error).split())}", own=isinstance(error, ProcessFailed))
            raise typer.Exit(error.exit_code) from None
        hint = f"({type(error).__name__}; run again with --debug for the traceback)"
        console.complain(f"error: {first_words(error)} {hint}", own=True)
        raise typer.Exit(1) from None
    finally:
        console.release_outputs()


def _processes(together: bool) -> Processes:
    """The processes that were started together; ends the command where they cannot run it."""
    try:
        found = Processes.started()
        if found.size > 1 and not together:
            raise ConfigError(
                f"this command runs in one process, and {found.size} were started; start it without torchrun "
                "(only skipcal profile divides its work)"
            )
    except ConfigError as error:
        if os.environ.get("RANK", "0") == "0":
            typer.echo(f"error: {error}", err=True)
        raise typer.Exit(error.exit_code) from None
    return found


def given(ctx: typer.Context, *apart: str) -> dict[str, Any]:
    """The options of a command that were given and are settings, by name.

    A switch that nobody touched is not among them, so that it leaves the setting of a file as it is.

    apart: options that are no settings, besides those of every command.
    """
    others = {"config", "as_json", "debug", *apart}
    return {k: v for k, v in ctx.params.items() if k not in others and _was_given(ctx, k)}


def _was_given(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def duration(seconds: float) -> str:
    """A time as people say it: 42 s, 3 min 20 s, 1 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def check_typed(option: str, text: str) -> None:
    """Raise ConfigError for text whose bytes are not what the terminal's encoding says."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ConfigError(
            f"{option} '{_ascii(text)[:80]}' is no {sys.getfilesystemencoding()} text, as LANG and LC_ALL "
            "have it; set them to UTF-8, or give the text in a file where there is an option for one"
        )


def _replace_what_cannot_be_shown() -> None:
    """Print a question mark for a character that the terminal has not, rather than end in the middle.

    (Which is why nothing here is printed by `typer.echo`: to a terminal of ASCII it writes UTF-8.)
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _ascii(text: str) -> str:
    """JSON text that any terminal can show: in JSON, other characters stand inside strings alone."""
    return re.sub(r"[^\x00-\x7f]", lambda found: json.dumps(found[0])[1:-1], text)


class _Line(logging.Formatter):
    """A warning is called one; what is being done stands as it is."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno < logging.WARNING else f"warning: {text}"


def _quieten(processes: Processes) -> None:
    """One line a warning on stderr, and no bar of any library unless stderr is a terminal."""
    watched = sys.stderr.isatty() and processes.leads
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Line())
    log = logging.getLogger("skipcal")
    log.handlers, log.propagate = [handler] if processes.leads else [logging.NullHandler()], False
    log.setLevel(logging.INFO if watched else logging.WARNING)
    for library in TALKATIVE:
        logging.getLogger(library).setLevel(logging.ERROR)
    os.environ["MPLBACKEND"] = "Agg"  # commands draw into files, never into a window
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its retries are summed up in one line
    if processes.size > 1:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # that a connection is gone is said once
    if not watched:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")


def listed(option: str, text: str | None) -> list[str] | None:
    """The parts of an option's text between commas. Raises ConfigError for an empty part."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise ConfigError(f"{option} {text!r}: expected names or numbers separated by commas")
    return parts


def numbers(option: str, text: str | None) -> list[float] | None:
    """The same as numbers."""
    try:
        return None if text is None else [float(part) for part in listed(option, text) or []]
    except ValueError:
        raise ConfigError(f"{option} {text!r}: expected numbers separated by commas, as 0.1,0.25") from None


def command_line() -> str:
    """The command that was given, with the names of files but not their places."""
    return " ".join(["skipcal", *map(without_place, sys.argv[1:])])


def without_place(word: str) -> str:
    """A word of a command; of a file, or of LABEL=FILE, the name is left and not where it lies here."""
    label, separator, path = word.rpartition("=")
    return f"{label}{separator}{Path(path).name if '/' in path and Path(path).exists() else path}"
