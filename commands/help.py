"""Help in plain text that fits 80 columns: options in sections, commands in the order of work."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from typing import Any, cast

import typer
from typer.core import TyperCommand, TyperGroup

from skipcal.configs.paths import at_home

MODEL, TEXT, JUDGE, LM_EVAL, OUTPUT, GENERAL = "Model", "Text", "Judge", "lm-eval", "Output", "General"
_SECTIONS = ("Arguments", "Options", MODEL, TEXT, JUDGE, LM_EVAL, OUTPUT, GENERAL)


class Command(TyperCommand):
    """A command whose options are told section by section, and whose paths may begin with `~`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the words that were typed. An empty one is what a shell makes of a variable without value."""
        typed, _, order = self.make_parser(ctx).parse_args(list(args))
        for parameter in order:
            words = typed.get(str(parameter.name))
            empty = "" in (words if isinstance(words, list | tuple) else [words])
            if empty and parameter.param_type_name == "option":  # an argument's reader says what it wants
                raise typer.BadParameter("it is empty; give a value", ctx, cast(Any, parameter))
        rest: list[str] = super().parse_args(ctx, args)
        ctx.params = at_home("", ctx.params)
        return rest

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write each section that the command has an option of."""
        sections: dict[str, list[tuple[str, str]]] = {name: [] for name in _SECTIONS}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                sections[_section(parameter)].append((record[0].partition(" <")[0], record[1]))
        for name, records in sections.items():
            if records:
                with formatter.section(name):
                    formatter.write_dl(records)


def _section(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return "Arguments"
    own: str | None = getattr(parameter, "rich_help_panel", None)
    return own or (GENERAL if parameter.name == "help" else "Options")


class Group(TyperGroup):
    """Commands as they were registered, under the heading of their step; a usage error is one line."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command and exit with its code."""
        try:
            code = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except Exception as error:
            if not standalone_mode or not hasattr(error, "format_message"):  # which a usage error has
                raise
            _tell(error)
            sys.exit(2)
        if not standalone_mode:
            return code
        sys.exit(code if isinstance(code, int) else 0)

    def format_commands(self, ctx: typer.Context, formatter: Any) -> None:  # type: ignore[override]
        """Write the commands of each step."""
        steps: dict[str, list[tuple[str, str]]] = {}
        width = max(map(len, self.commands))
        for name, command in self.commands.items():
            step = getattr(command, "rich_help_panel", None) or "Commands"
            short = command.get_short_help_str(formatter.width - 4 - width)
            steps.setdefault(step, []).append((name.ljust(width), short))
        for step, records in steps.items():
            with formatter.section(step):
                formatter.write_dl(records)


def _tell(error: Any) -> None:
    """One line of what is wrong with the words that were typed, and where the right ones stand."""
    if type(error).__name__ == "NoArgsIsHelpError":  # its message is the help
        error.show()
        return
    said = " ".join(error.format_message().split()).replace("Input should be", "expected")
    said = said.partition(", unable to parse")[0].partition(" (Possible options")[0]
    known = getattr(error, "possibilities", None) or []
    close = difflib.get_close_matches(said.split()[-1], known, n=1, cutoff=0.0)
    said += f"; did you mean {close[0]}?" if close else ""
    if said[-1] not in ".?!":
        said += "."
    where = "" if error.ctx is None else f" See: {error.ctx.command_path} --help"
    typer.echo(f"error: {said[0].lower()}{said[1:]}{where}", err=True)
