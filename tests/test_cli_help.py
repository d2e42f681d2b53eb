"""Help and completion: what a user reads before the first command runs."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from typing import Any

import pytest
import typer
from command_line import run

from skipcal.cli import app
from skipcal.compare.comparison import CompareConfig
from skipcal.configs.bench import BenchConfig
from skipcal.configs.fit import FitConfig
from skipcal.configs.run import ProfileConfig, shipped_configs
from skipcal.configs.tune import TuneConfig

GROUP: Any = typer.main.get_command(app)
FIT = FitConfig()
COMMANDS = sorted(GROUP.commands)
IN_ORDER = ("profile", "show", "plot", "generate", "fit", "tune", "evaluate", "sweep", "compare", "bench")


def help_of(monkeypatch: pytest.MonkeyPatch, columns: int, *args: str) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    return str(run(*args, "--help").stdout)


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("command", [*COMMANDS, ""])
def test_help_fits_the_terminal_and_cuts_no_word(
    command: str, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = help_of(monkeypatch, columns, *([command] if command else []))
    assert max(map(len, told.splitlines())) <= columns
    assert not re.search(r"\w\.\.\.$", told, re.M), "a sentence that was cut"
    assert "\x1b" not in told
    assert not re.search(r"<\w+(\[\w+\])?>", told.replace("<model>", "")), "a type instead of a name"


def test_commands_stand_in_the_order_of_work(monkeypatch: pytest.MonkeyPatch) -> None:
    told = help_of(monkeypatch, 80)
    listed = re.findall(r"^  (\w+)  +[A-Z]", told, re.M)
    assert tuple(name for name in listed if name in IN_ORDER) == IN_ORDER
    assert sorted(listed) == COMMANDS
    assert "Type first: skipcal profile" in told


@pytest.mark.parametrize("command", COMMANDS)
def test_the_example_is_on_one_line_and_can_be_typed(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    example = re.search(r"^  Example: (skipcal .+)\n\n", help_of(monkeypatch, 80, command), re.M)
    assert example, "an example that is broken over two lines cannot be pasted"
    name, *args = shlex.split(example[1])[1:]
    assert name == command
    GROUP.commands[name].make_context(name, args)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_told_and_in_a_known_section(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told = help_of(monkeypatch, 120, command)
    for parameter in GROUP.commands[command].params:
        assert parameter.param_type_name == "argument" or f"{parameter.opts[-1]}" in told
    assert told.index("--json") < told.index("--debug") < told.index("--help")


@pytest.mark.parametrize(
    ("command", "config"),
    [
        ("profile", ProfileConfig()),
        ("fit", FIT),
        ("tune", TuneConfig(max_kl=1.0)),
        ("bench", BenchConfig()),
        ("compare", CompareConfig()),
    ],
)
def test_the_defaults_that_help_tells_are_those_of_the_configuration(command: str, config: Any) -> None:
    checked = 0
    for parameter in GROUP.commands[command].params:
        told = re.search(r"Default: ([\d.,]+)[.;]", getattr(parameter, "help", None) or "")
        if told is None:
            continue
        value = getattr(config, parameter.name)
        if value is None:  # it depends on the text
            value = {"prompts": FIT.windows(), "closed_loop_prompts": FIT.loop_windows()}[parameter.name]
            told = re.search(r"(\d+) of the embedded text", parameter.help)
            assert told is not None
        expected = ",".join(f"{v:g}" for v in value) if isinstance(value, list) else f"{value:g}"
        assert told[1] == expected, f"{command} --{parameter.name}"
        checked += 1
    assert checked >= 4


def test_an_option_means_the_same_in_every_command() -> None:
    """Options that load a model have one text; a count may say what it counts in its command."""
    own = {"prompts", "prompt_tokens", "new_tokens", "batch_size", "seed", "output", "profile", "max_skips",
           "warm_up_tokens", "target_skip_ratio", "data_files", "chat_template", "ratios",
           "method", "engine"}  # fmt: skip
    texts: dict[str, set[str]] = {}
    for command in set(COMMANDS) - {"push"}:  # its --revision is a branch to push to
        for parameter in GROUP.commands[command].params:
            texts.setdefault(parameter.name, set()).add(getattr(parameter, "help", None) or "")
    texts.pop("source", None)
    assert len(texts.pop("model")) == 2  # in `report` the default is the model that the profile names
    assert {name for name, told in texts.items() if len(told) > 1} <= own


def completed(line: str) -> list[str]:
    """What bash offers at the end of `line`, asked in a process of its own that must not import torch."""
    words = line.split()
    code = (
        "import sys; sys.argv = ['skipcal']; from skipcal.cli import app\n"
        "try:\n    app()\n"
        "finally:\n    assert not {'torch', 'numpy', 'transformers', 'pandas'} & set(sys.modules)"
    )
    env = {
        **os.environ,
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - (not line.endswith(" "))),
        "_SKIPCAL_COMPLETE": "complete_bash",
    }
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert "AssertionError" not in done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("skipcal ge", ["generate"]),
        ("skipcal fit --surr", ["--surrogate-budget"]),
        ("skipcal show smol", ["smollm2-135m-instruct"]),
        ("skipcal evaluate --method ran", ["random", "random+surrogates"]),
        ("skipcal sweep --tasks perplexity,fr", ["perplexity,freebaseqa"]),
        ("skipcal sweep --config table", ["table-2", "table-3"]),
    ],
)
def test_bash_completes_without_torch(line: str, offered: list[str]) -> None:
    assert completed(line) == offered


def test_options_offer_the_names_that_are_known() -> None:
    """In this process; that completing needs no torch is asserted above."""
    from skipcal.commands import completion
    from skipcal.configs.shapes import shapes

    assert completion.shapes("llama") == sorted(name for name in shapes() if name.startswith("llama"))
    assert completion.configs("") == shipped_configs()
    assert completion.rules("stat") == ["static", "static+surrogates", "static+fitted"]
    assert "gsm8k" in completion.corpora("g")
    assert completion.listed(completion.one_of("a1", "a2", "b"))("b,a") == ["b,a1", "b,a2"]
