"""`~` at the beginning of a path, as a shell has it: in YAML, and in `--output=~/x`, where none looks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

# Options, arguments and keys of files that may name a file or a folder. (`prompts` is a judge's file.)
PATHS = frozenset(
    {
        "adapter", "config", "data_file", "data_files", "figure", "judge_prompts", "model", "offload_folder",
        "output", "profile", "prompt_file", "prompts", "reference_file", "source", "sources", "trace",
    }
)  # fmt: skip


def at_home(name: str, value: Any) -> Any:
    """The value of a setting with `~` in its paths expanded; of nested settings, in those of them all."""
    if isinstance(value, dict):
        return {key: at_home(key, inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(at_home(name, inner) for inner in value)
    if name not in PATHS or not isinstance(value, str | Path):
        return value
    label, separator, path = str(value).partition("=~")  # NAME=PATH of data files
    if name == "data_files" and separator and not os.path.exists(value):
        return f"{label}={_expanded('~' + path)}"
    return type(value)(_expanded(str(value)))


def _expanded(path: str) -> str:
    return path if os.path.lexists(path) else os.path.expanduser(path)
