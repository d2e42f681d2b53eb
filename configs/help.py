"""Help in plain text that fits 80 columns: options in sections, commands in the order of work."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

MODEL, TEXT, JUDGE, LM_EVAL, OUTPUT, GENERAL = "Model", "Text", "Judge", "lm-eval", "Output", "General"
_SECTIONS = ("Arguments", "Options", MODEL, TEXT, JUDGE, LM_EVAL, OUTPUT, GENERAL)


class Command(TyperCommand):
    """A command whose options are told section by section."""

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
    """Commands as they were registered, under the heading of their step."""

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
