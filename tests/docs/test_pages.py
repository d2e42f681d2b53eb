"""What the README and the documentation say can be typed, does what it should when it is typed."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import small_world as world
from command_line import run
from pages import NOT_RUN, PAGES, ROOT, RUN, Snippet, snippets, text_of
from test_cli_help import GROUP

COMMANDS = GROUP.commands
TYPED = [page for page in PAGES if any(s.language in RUN for s in snippets(page))]

# What is added to a command so that it takes a second: the first expression that matches, the words, and why.
# The rest of the command stands as it is; of an option that is given twice the last one counts.
SMALL = "--prompts 3 --prompt-tokens 8 --new-tokens 10 --warm-up-tokens 2 --cold-s 1 --cold-e 7"
SHORTER = (
    (r"profile .*--closed-loop|profile .*--config llama-2-7b", f"{SMALL} --closed-loop teacher-forced",
     "decoding in the closed loop takes a minute"),
    (r"profile", SMALL, "32 prompts of 128 tokens; the region of a random model is too narrow for a quarter"),
    (r"fit", "--prompts 12 --prompt-tokens 24 --damage-prompts 4 --closed-loop-prompts 6 --rank 3",
     "56 windows of 512 tokens"),
    (r"tune", "--prompts 2 --prompt-tokens 32", "windows of 512 tokens, for a dozen policies"),
    (r"sweep .*table-2", "--items 1 --new-tokens 4 --warm-up-tokens 1 --match-items 1", "hours on a GPU"),
    (r"sweep .*(table-3|figure-)",
     "--items 1 --new-tokens 4 --warm-up-tokens 1 --match-items 1 --ratios 0.25", "hours on a GPU"),
    (r"sweep .*comparison",
     "--items 1 --window-tokens 24 --new-tokens 4 --warm-up-tokens 1 --match-items 1 --ratios 0.25 "
     "--methods ffn-skip,shortgpt", "two hours"),
    (r"sweep .*fixed-sets", "--items 1 --window-tokens 40", "windows of 512 tokens, a quarter of an hour"),
    (r"sweep .*gate-generation .*static", "--items 1 --new-tokens 4 --warm-up-tokens 1", "10 minutes"),
    (r"sweep .*gate-generation", "--items 1 --new-tokens 4 --warm-up-tokens 1 --match-items 1", "20 minutes"),
    (r"sweep .*embedded-sweep",
     "--items 1 --window-tokens 24 --new-tokens 4 --warm-up-tokens 1 --ratios 0.25", "minutes"),
    (r"sweep", "--items 1 --window-tokens 24 --warm-up-tokens 2", "windows of 512 tokens, half an hour"),
    (r"evaluate .*--lm-eval-tasks", "--limit 2", "2,376 questions"),
    (r"evaluate .*perplexity", "--items 1 --window-tokens 40 --warm-up-tokens 2", "windows of 512 tokens"),
    (r"evaluate", "--items 1 --new-tokens 4 --warm-up-tokens 1", "hundreds of items"),
    (r"generate", "--new-tokens 30", "a sentence is enough"),
    (r"compare .*--(data-files|corpus)", "--prompts 2 --prompt-tokens 8 --text-tokens 40",
     "texts of 256 tokens"),
    (r"bench", "--new-tokens 3 --rounds 1 --ratios 0.25", "rounds of 32 tokens for each ratio"),
)  # fmt: skip
# Commands that cannot run here, and why. That their options exist is checked all the same.
UNDERSTOOD_ONLY = {
    r"--max-memory 0=": "names GPU 0",
    r"qwen": "needs a model of half a gigabyte",
    r"\.gguf": "needs a GGUF file of megabytes; tests/arch/test_loading.py writes a small one",
    r"--config warm-up": "decodes 40 tokens for each warm-up; tests/evaluation/test_sweep.py has an ablation",
    r"--adapter": "needs peft; tests/runtime/test_adapters.py",
}


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    world.build(folder)
    return folder


@pytest.fixture(scope="session")
def judge() -> Iterator[str]:
    with world.judging() as address:
        yield address


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch.compile's own imports
@pytest.mark.parametrize("page", TYPED)
def test_what_a_page_says_can_be_typed(
    page: str, built: Path, judge: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All blocks of a page in its order, in one folder and one Python."""
    world.enter(monkeypatch, built, tmp_path, page)
    monkeypatch.setenv("OPENAI_BASE_URL", judge)
    names: dict[str, Any] = {}
    for snippet in snippets(page):
        if snippet.language == "python":
            code = compile("\n" * (snippet.line - 1) + snippet.text, page, "exec")
            exec(code, names)
        elif snippet.language == "console":
            for command in snippet.commands:
                _type(command, f"{page}:{snippet.line}")


@pytest.mark.parametrize("page", PAGES)
def test_no_block_is_of_an_unknown_kind(page: str) -> None:
    for snippet in snippets(page):
        assert snippet.language in (*RUN, *NOT_RUN) or snippet.language.startswith("{"), snippet
        assert snippet.language != "console" or snippet.commands, f"{page}:{snippet.line} has no command"


def test_every_exception_is_one_of_a_command() -> None:
    """What is no longer needed does not stay in the tables above."""
    typed = [
        shlex.join(words[1:])
        for page in PAGES
        for snippet in snippets(page)
        if snippet.language == "console"
        for words in snippet.commands
        if words[0] == "skipcal"
    ]
    matched = [next((rule for rule in SHORTER if re.search("^" + rule[0], line)), None) for line in typed]
    assert {rule[0] for rule in SHORTER} == {rule[0] for rule in matched if rule}
    for expression in UNDERSTOOD_ONLY:
        assert any(re.search(expression, line) for line in typed), expression


def _type(words: list[str], where: str) -> None:
    program, *args = words
    if program == "skipcal":
        line = shlex.join(args)
        understood(args, where)
        if not any(re.search(expression, line) for expression in UNDERSTOOD_ONLY):
            shorter = next((more for rule, more, _why in SHORTER if re.search("^" + rule, line)), "")
            run(*args, *shorter.split())
    elif program == "make":
        assert re.search(rf"^{args[0]}:", (ROOT / "Makefile").read_text(), re.M), where
    elif program == "torchrun":
        understood(args[args.index("skipcal.cli") + 1 :], where)
    elif program == "pip":
        _extras_exist(args[-1], where)
    elif program == "python":
        script = ROOT / args[0]
        source = script.read_text(encoding="utf-8")
        for option in (word for word in args[1:] if word.startswith("--")):
            assert f'"{option}"' in source, f"{where}: {args[0]} has no {option}"
    else:
        raise AssertionError(f"{where}: nothing checks {program!r}")


def understood(args: list[str], where: str) -> None:
    """Fail for a command or an option that does not exist."""
    assert args[0] in COMMANDS, where
    COMMANDS[args[0]].make_context(args[0], list(args[1:]))


def _extras_exist(requirement: str, where: str) -> None:
    extras = re.fullmatch(r"skipcal\[([\w,]+)\]|-e \.", requirement)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert extras, f"{where}: {requirement}"
    assert set((extras[1] or "").split(",")) <= set(project["optional-dependencies"]), where


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_links_to_exists(page: str) -> None:
    """Also where the page is read as it is, without Sphinx: hence headings' names as GitHub makes them."""
    here = ROOT / page
    for link, heading in re.findall(r"\]\((?!https?:)([\w./-]*)(?:#([\w-]+))?\)", text_of(page)):
        target = here.parent / link if link else here
        assert target.exists(), f"{page}: {link}"
        assert not heading or heading in _headings(target), f"{page}: {link}#{heading}"
    for path in re.findall(r"`((?:benchmarks|configs|docs|notebooks|tests)/[\w./-]+)`", text_of(page)):
        assert (ROOT / path).exists(), f"{page}: {path}"


def _headings(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_shipped_profile_prints_what_the_pages_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block after `show smollm2-135m-instruct` is its output; dots stand for lines left out."""
    monkeypatch.chdir(tmp_path)
    printed = run("show", "smollm2-135m-instruct").stdout
    shown = 0
    for page in PAGES:
        for said in _after_command(page, ["skipcal", "show", "smollm2-135m-instruct"]):
            shown += 1
            for part in re.split(r"^\.\.\.\n", said.text, flags=re.M):
                assert part in printed, f"{page}:{said.line}: {part}"
    assert shown > 0


def _after_command(page: str, command: list[str]) -> Iterator[Snippet]:
    blocks = list(snippets(page))
    for block, following in pairwise(blocks):
        if block.language == "console" and command in block.commands and following.language == "":
            yield following
