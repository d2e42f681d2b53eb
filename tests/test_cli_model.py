"""One rule for the model: without --model every command that takes a profile loads the one it names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import refused, run
from conftest import saved
from documents import document

from skipcal.arch.loading import LoadedModel
from skipcal.calibrate.processes import Processes
from skipcal.commands.console import Console
from skipcal.configs.fit import FitConfig
from skipcal.errors import Unavailable
from skipcal.profiles.schema import SkipProfile

SHIPPED = "smollm2-135m-instruct"
TEXT = ("--data-files", "words.txt")
COMMANDS = {
    "fit": ["--profile", "PROFILE", *TEXT, "-o", "new.json"],
    "tune": ["--profile", "PROFILE", "--max-kl", "1", *TEXT, "-o", "new.json"],
    "generate": ["--profile", "PROFILE", "--prompt", "w1"],
    "evaluate": ["--profile", "PROFILE", "--task", "perplexity", *TEXT, "-o", "folder"],
    "evaluate --lm-eval-tasks": ["--profile", "PROFILE", "--lm-eval-tasks", "arc_easy"],
    "sweep": ["--profile", "PROFILE", "--tasks", "perplexity", *TEXT, "-o", "folder"],
    "compare": ["PROFILE", *TEXT],
    "bench": ["--profile", "PROFILE"],
    "report": ["PROFILE", "-o", "page.html"],
}


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, worded: LoadedModel, worded_text: Path,
    worded_profile: SkipProfile, gated: SkipProfile,
) -> Path:  # fmt: skip
    """A model and profiles of it: of the folder `tiny`, and as if it had come from the hub."""
    folder = tmp_path_factory.mktemp("model")
    saved(worded.model, folder / "tiny")
    (folder / "words.txt").symlink_to(worded_text)
    worded_profile.save(folder / "p.json")
    made_on = gated.model.model_copy(
        update={"name": "org/tiny", "revision": "abc", "dtype": "bfloat16", "adapter": "org/lora"}
    )
    gated.model_copy(update={"model": made_on}).save(folder / "hub.json")
    return folder


@pytest.fixture
def here(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for path in place.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What commands would have loaded; nothing is."""
    seen: list[dict[str, Any]] = []

    def load(name: str | None, **options: Any) -> None:
        seen.append({"model": name, **options})
        raise Unavailable("that is enough")

    monkeypatch.setattr("skipcal.arch.loading.load_model", load)
    return seen


def stopped(command: str, profile: str, *more: str) -> list[str]:
    """The lines on stderr of a command that could not load its model."""
    if "lm-eval" in command:
        pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    own = [part.replace("PROFILE", profile) for part in COMMANDS[command]]
    lines: list[str] = run(command.split()[0], *own, *more, code=4).stderr.splitlines()
    return lines


@pytest.mark.parametrize("command", COMMANDS)
def test_without_a_model_the_profiles_own_is_loaded_and_named(
    here: Path, command: str, asked: list[dict[str, Any]]
) -> None:
    *told, error = stopped(command, "hub.json", "--device", "cpu")
    assert told == ["the model is the profile's, org/tiny at revision abc; --model names another"]
    assert "that is enough; the profile names this model, --model names a copy of it" in error
    expected = {"model": "org/tiny", "revision": "abc", "dtype": "bfloat16", "adapter": "org/lora"}
    assert [{**found, **expected} for found in asked] == asked != []
    assert asked[0]["device"] == "cpu" and not asked[0]["trust_remote_code"]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_named_model_is_taken_as_it_is_named(here: Path, command: str, asked: list[dict[str, Any]]) -> None:
    """With no revision, dtype or adapter of the profile's."""
    (error,) = stopped(command, "hub.json", "--model", "some/other")
    assert error.startswith("error: ") and "the profile names" not in error
    expected = {"model": "some/other", "revision": None, "dtype": "auto", "adapter": None}
    assert [{**found, **expected} for found in asked] == asked != []


@pytest.mark.parametrize("command", COMMANDS)
def test_of_the_embedded_model_nothing_is_said(here: Path, command: str, asked: list[dict[str, Any]]) -> None:
    (error,) = stopped(command, SHIPPED)
    assert "the profile names" not in error
    assert [found["model"] for found in asked] == [None]


def test_other_options_win_over_what_the_profile_says(here: Path, asked: list[dict[str, Any]]) -> None:
    for command in COMMANDS:
        stopped(command, "hub.json", "--dtype", "float32", "--revision", "main")
    assert [(found["model"], found["dtype"], found["revision"]) for found in asked] == [
        ("org/tiny", "float32", "main")
    ] * len(COMMANDS)


def test_a_configuration_file_names_a_model_as_an_option_does(
    here: Path, asked: list[dict[str, Any]]
) -> None:
    Path("tune.yaml").write_text("profile: hub.json\nmodel: some/other\nmax_kl: 1\n")
    run("tune", "--config", "tune.yaml", *TEXT, "-o", "new.json", code=4)
    assert asked[0]["model"] == "some/other"


def test_a_command_gives_the_same_with_the_model_named_and_by_the_profile(here: Path) -> None:
    ask = ("generate", "--profile", "p.json", "--prompt", "w3 w4 w5", "--new-tokens", "12", "--device", "cpu")
    own, named = run(*ask, "--json"), run(*ask, "--model", "tiny", "--json")
    assert own.stderr == "the model is the profile's, tiny; --model names another\n" and named.stderr == ""
    one, two = json.loads(own.stdout), json.loads(named.stdout)
    for made in (one, two):
        del made["report"]["setup_s"]
    assert one["text"] == two["text"] != "" and one["report"] == two["report"]


def test_what_is_made_of_the_profiles_model_says_so(here: Path) -> None:
    """Settings that are recorded name it, and so does a file's default name."""
    quick = ("--items", "2", "--window-tokens", "40", "--target-skip-ratio", "0.25", "--device", "cpu")
    run("evaluate", "--profile", "p.json", "--task", "perplexity", *TEXT, *quick, "-o", "out")
    assert json.loads(Path("out/sweep.json").read_text())["config"]["model"] == "tiny"
    run(
        "tune", "--profile", "p.json", "--max-kl", "9", "--rules", "static", "--prompts", "4", *TEXT,
        "--prompt-tokens", "24", "--device", "cpu",
    )  # fmt: skip
    assert SkipProfile.load("profiles/tiny-tuned.json").model.name == "tiny"


def test_a_model_that_is_not_there_is_asked_for_with_its_option(here: Path) -> None:
    (here / "tiny").unlink()
    error = refused("generate", "--profile", "p.json", "--prompt", "w3", code=4)
    assert "model 'tiny' could not be loaded" in error
    assert error.endswith("the profile names this model, --model names a copy of it")


def test_text_is_chosen_as_for_a_named_model(here: Path) -> None:
    console = Console(False, Processes())
    assert console.settled(SkipProfile.load("hub.json"), FitConfig()).corpora() == ["wikitext", "c4"]
    assert console.settled(SkipProfile.load(SHIPPED), FitConfig()) == FitConfig()


def test_a_name_that_a_terminal_would_obey_is_shown_and_not_obeyed(
    capsys: pytest.CaptureFixture[str], asked: list[dict[str, Any]]
) -> None:
    made = document()
    model = {**made["model"], "name": "org/\x1b[2Jtiny"}
    found = SkipProfile.model_validate_json(json.dumps({**made, "model": model}))
    console = Console(False, Processes())
    with pytest.raises(Unavailable):
        console.load(console.with_own_model(found, {}))
    assert "org/\N{REPLACEMENT CHARACTER}[2Jtiny" in capsys.readouterr().err


def test_a_profile_names_all_that_its_model_was_loaded_with() -> None:
    def with_own_model(profile: SkipProfile, asked: dict[str, Any]) -> dict[str, Any]:
        return Console(False, Processes()).with_own_model(profile, asked)

    made = document()
    model = {**made["model"], "revision": "abc", "dtype": "bfloat16", "adapter": "org/lora"}
    found = SkipProfile.model_validate_json(json.dumps({**made, "model": model}))
    assert with_own_model(found, {}) == {
        "model": "org/tiny", "revision": "abc", "dtype": "bfloat16", "adapter": "org/lora",
    }  # fmt: skip
    assert with_own_model(found, {"dtype": "float32"})["dtype"] == "float32"
    other = {"model": "org/other"}
    assert with_own_model(found, other) == other  # another model has another revision
    quantized = {**model, "quantization": "bitsandbytes:nf4"}
    packed = {**made, "model": quantized, "config": {"quantization": "bitsandbytes:nf4"}}
    asked = with_own_model(SkipProfile.model_validate_json(json.dumps(packed)), {})
    assert asked["quantization"] == "bitsandbytes:nf4" and "dtype" not in asked
    shipped = SkipProfile.load(SHIPPED)
    assert with_own_model(shipped, {}) == {}  # the embedded one
