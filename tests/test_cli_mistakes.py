"""What a user mistypes: one line that says what was given, what was expected, what to type next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from command_line import refused, run

SHIPPED = "smollm2-135m-instruct"
EVALUATE = ("evaluate", "--profile", SHIPPED)
TUNE = ("tune", "--profile", SHIPPED, "--max-kl", "0.1")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, where no call may get as far as a model."""

    def loaded(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a mistake that was taken for an order")

    monkeypatch.setattr("skipcal.arch.loading.load_model", loaded)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("profil",), "error: no such command 'profil'. Did you mean 'profile'? See: skipcal --help"),
        (("--modle",), "error: no such option: --modle. See: skipcal --help"),
        (("show",), "error: missing argument 'PROFILE'. See: skipcal show --help"),
        (
            ("show", SHIPPED, "more"),
            "error: got unexpected extra argument(s) (more). See: skipcal show --help",
        ),
        (("plot", SHIPPED), "error: missing option '--output' / '-o'. See: skipcal plot --help"),
        (
            ("bench", "--peer"),
            "error: no such option: --peer; did you mean --peers? See: skipcal bench --help",
        ),
        (
            ("fit", "--rank", "many"),
            "error: invalid value for '--rank': expected a valid integer. See: skipcal",
        ),
    ],
)
def test_words_that_no_command_has(args: tuple[str, ...], message: str) -> None:
    done = run(*args, code=2)
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(message)


def test_no_words_at_all_are_answered_with_the_help() -> None:
    done = run(code=2)
    assert "Type first: skipcal profile" in done.stderr + done.stdout


@pytest.mark.parametrize("json", [(), ("--json",)])
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("profile", "--config", "tabel-3"), "did you mean 'table-3'?"),
        (("profile", "--mode", "prefil"), "expected 'generate' or 'prefill'; did you mean 'prefill'?"),
        (("profile", "--prompts", "0"), "--prompts 0 cannot be used: expected 1 or more"),
        (("profile", "--target-skip-ratio", "25"), "expected at most 1"),
        (("fit", "--surrogate-budget", "0"), "--surrogate-budget 0.0 cannot be used: expected more than 0"),
        (("fit", "--surrogate-budget", "1"), "--surrogate-budget 1.0 cannot be used: expected less than 1"),
        (
            ("fit", "--rank", "4", "--surrogate-budget", "0.1"),
            "rank 4 and surrogate_budget 0.1 were both given; give one",
        ),
        (
            (*TUNE, "--rules", "gaet"),
            "is not one of gate, cosine, ffn-skip+damage, static, static+surrogates, static+fitted; "
            "did you mean 'gate'?",
        ),
        ((*TUNE, "--rules", "gate,gate"), "rule 'gate' is asked for twice"),
        ((*TUNE, "--rules", "gate", "--max-skips", "3"), "max_skips has no effect without the rule cosine"),
        ((*TUNE, "--figure", "x.gif"), "figure x.gif: ending '.gif' is not one of .png, .svg, .pdf"),
        ((*EVALUATE, "--task", "perplexity", "--task", "perplexity"), "task 'perplexity' is asked for twice"),
        (
            (*EVALUATE, "--task", "perplexity", "--chat-template"),
            "--chat-template has no effect on perplexity",
        ),
        ((*EVALUATE, "--task", "perplexity", "--no-chat-template"), "--no-chat-template has no effect on"),
        ((*EVALUATE, "--task", "perplexity", "--engine", "eager"), "--engine has no effect on perplexity"),
        ((*EVALUATE, "--task", "continuation", "--engine", "eagre"), "did you mean 'eager'?"),
        (
            (*EVALUATE, "--lm-eval-tasks", "x", "--engine", "eager"),
            "--engine has no effect on --lm-eval-tasks",
        ),
        ((*EVALUATE, "--task", "perplexity", "--items", "0"), "--items 0 cannot be used: expected 1 or more"),
        ((*EVALUATE, "--lm-eval-tasks", "x", "--overwrite"), "--overwrite has no effect without --output"),
        ((*EVALUATE, "--lm-eval-tasks", "x", "--corpus", "c4"), "--corpus has no effect on --lm-eval-tasks"),
        (("bench", "--engine", "grpah"), "not one of auto, eager, graph, recorded; did you mean 'graph'?"),
        (("bench", "--rule", "gat"), "did you mean 'gate'?"),
        (
            ("generate", "--profile", SHIPPED, "--prompt", "a", "--dtype", "float31"),
            "did you mean 'float32'?",
        ),
    ],
)
def test_a_value_that_cannot_be_used(args: tuple[str, ...], json: tuple[str, ...], message: str) -> None:
    """With --json too nothing stands on stdout."""
    assert message in refused(*args, *json, code=2)
    assert not list(Path.cwd().rglob("*.json"))


def test_an_output_folder_that_is_a_file_is_told_before_the_model_is_loaded(here: Path) -> None:
    (here / "taken").write_text("mine")
    message = refused(*EVALUATE, "--task", "perplexity", "-o", "taken", code=1)
    assert "taken is a file; give the name of a folder with --output" in message
    assert (here / "taken").read_text() == "mine"


def test_a_corpus_that_resembles_a_known_one() -> None:
    from skipcal.text.known import likely

    assert likely("wikitxt") == "did you mean 'wikitext'? else "
    assert likely("my-own/set") == ""
    assert likely("gsm8k") == ""
