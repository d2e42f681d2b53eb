"""Where a profile may be: a file, a folder, a shipped name, a repository on the hub."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from command_line import refused, run
from documents import document, write
from fake_hub import COMMIT, FakeHub
from gated import with_gate

from skipcal.errors import ConfigError, Unavailable
from skipcal.profiles.schema import SkipProfile
from skipcal.profiles.sources import PROFILE_FILE, HubId, commit_of, locate, model_slug, shipped_profiles

OTHER = "beef" + "0" * 36


@pytest.fixture
def profile(tmp_path: Path) -> SkipProfile:
    return SkipProfile.load(write(tmp_path / "valid.json", document()))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """A hub, and a cache that is this test's own."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return FakeHub(monkeypatch, tmp_path)


def test_a_file_comes_before_a_folder_a_shipped_name_and_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = shipped_profiles()[0]
    shipped = locate(name)
    assert isinstance(shipped, Path) and shipped.parent.name == "profiles"
    (tmp_path / name).mkdir()
    write(tmp_path / name / PROFILE_FILE, document())
    assert locate(name) == Path(name) / PROFILE_FILE
    shutil.rmtree(name)
    write(tmp_path / name, document())
    assert locate(name) == Path(name)

    assert locate("me/tiny") == HubId("me/tiny")
    assert locate("me/tiny@v1.0") == HubId("me/tiny", "v1.0")
    assert locate("me/tiny@refs/pr/3") == HubId("me/tiny", "refs/pr/3")
    write(tmp_path / "tiny@v1", document())
    assert locate("tiny@v1") == Path("tiny@v1")


@pytest.mark.parametrize(
    "source",
    ["", "no-such-profile", "runs/mistyped.json", "a/b/c", "../up", "/no/where", "x" * 5000, "a\0b", "@v1",
     "me/tiny@", Path("me/tiny"), Path("smollm2-135m-instruct")],
)  # fmt: skip
def test_what_is_nowhere_lists_all_that_was_tried(source: str | Path) -> None:
    with pytest.raises(Unavailable) as refusal:
        SkipProfile.load(source)
    message = str(refusal.value)
    for tried in ("no file", "no shipped profile", "no folder with skip_profile.json", "no hub id"):
        assert tried in message
    assert message.endswith("make one with: skipcal profile")


def test_a_mistyped_shipped_name_is_suggested() -> None:
    with pytest.raises(Unavailable, match="did you mean 'smollm2-135m-instruct'"):
        SkipProfile.load("smolm2-135m-instruct")


def test_a_folder_without_a_profile_says_so(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=rf"folder '{tmp_path}' has no skip_profile\.json"):
        SkipProfile.load(tmp_path)
    with pytest.raises(Unavailable, match=r"no skip_profile\.json could be had"):
        SkipProfile.from_pretrained(tmp_path)


def test_a_hub_id_that_is_not_to_be_had_lists_what_else_was_tried(hub: FakeHub) -> None:
    with pytest.raises(Unavailable) as refusal:
        SkipProfile.load("nobody/nothing@v2")
    assert str(refusal.value).startswith("'nobody/nothing@v2' is no file, no folder and no shipped profile (")
    assert "no skip_profile.json could be had from 'nobody/nothing' at revision 'v2'" in str(refusal.value)


def test_a_folder_and_a_hub_repository_give_the_same_profile(
    tmp_path: Path, profile: SkipProfile, hub: FakeHub
) -> None:
    gated = with_gate(profile)
    gated.save_pretrained(tmp_path / "folder")
    gated.push_to_hub("me/tiny", model_card=False)
    snapshot = hub.into_cache("me/tiny", tmp_path / "cache")
    assert (snapshot / PROFILE_FILE).is_symlink()  # as all is in the hub's cache
    for found in (
        SkipProfile.load(tmp_path / "folder"),
        SkipProfile.load(str(tmp_path / "folder" / PROFILE_FILE)),
        SkipProfile.from_pretrained(tmp_path / "folder"),
        SkipProfile.load("me/tiny"),
        SkipProfile.load("me/tiny@main"),
        SkipProfile.load(f"me/tiny@{COMMIT}"),
        SkipProfile.from_pretrained("me/tiny"),
        SkipProfile.from_pretrained("me/tiny", revision=COMMIT),
    ):
        assert found == gated
        assert found.policy_for(0.2).to_dict() == gated.policy_for(0.2).to_dict()


def test_a_revision_is_the_one_asked_for(tmp_path: Path, profile: SkipProfile, hub: FakeHub) -> None:
    """And the tensors are of the commit that the profile is of."""
    first, second = with_gate(profile), with_gate(profile, layers=(1, 3))
    first.push_to_hub("me/tiny", model_card=False)
    hub.into_cache("me/tiny", tmp_path / "cache", revision="old", commit=OTHER)
    second.push_to_hub("me/tiny", model_card=False)
    hub.into_cache("me/tiny", tmp_path / "cache")
    assert SkipProfile.load("me/tiny@old").tensors().gates.layers == (1, 2)
    assert SkipProfile.load("me/tiny").tensors().gates.layers == (1, 3)
    assert SkipProfile.from_pretrained("me/tiny", revision="old") == first
    with pytest.raises(Unavailable, match="at revision 'nowhere'"):
        SkipProfile.load("me/tiny@nowhere")


def test_a_revision_of_a_folder_is_refused(
    tmp_path: Path, profile: SkipProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would leave it out and say nothing."""
    monkeypatch.chdir(tmp_path)
    profile.save_pretrained("me/tiny")
    assert SkipProfile.load("me/tiny") == profile
    refusal = "revision 'v1' has no effect: 'me/tiny' is a folder here"
    with pytest.raises(ConfigError, match=refusal):
        SkipProfile.load("me/tiny@v1")
    with pytest.raises(ConfigError, match=refusal):
        SkipProfile.from_pretrained("me/tiny", revision="v1")
    with pytest.raises(TypeError, match="revison"):
        SkipProfile.from_pretrained("me/tiny", revison="v1")  # type: ignore[call-arg]


def test_tensors_that_a_repository_lacks_are_named(
    tmp_path: Path, profile: SkipProfile, hub: FakeHub
) -> None:
    with_gate(profile).push_to_hub("me/tiny", model_card=False)
    del hub.repositories["me/tiny"]["made.surrogates.safetensors"]
    hub.into_cache("me/tiny", tmp_path / "cache")
    with pytest.raises(Unavailable, match=r"no made\.surrogates\.safetensors, which the profile names,"):
        SkipProfile.load("me/tiny")


def test_a_commit_is_told_from_a_folder_that_looks_like_one() -> None:
    assert commit_of(Path(f"/c/models--me--tiny/snapshots/{COMMIT}/skip_profile.json")) == COMMIT
    assert commit_of(Path("/data/snapshots/mine/skip_profile.json")) is None


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "--profile", "SOURCE", "--prompt", "w1"),
        ("evaluate", "--profile", "SOURCE", "--task", "perplexity"),
        ("sweep", "--profile", "SOURCE", "--tasks", "perplexity", "-o", "runs"),
        ("fit", "--profile", "SOURCE", "-o", "f.json"),
        ("tune", "--profile", "SOURCE", "--max-kl", "0.1", "-o", "t.json"),
        ("compare", "SOURCE", "p.json", "--corpus", "embedded", "--text-tokens", "100",
         "--target-skip-ratio", "0.1"),
        ("report", "SOURCE", "-o", "r.html"),
        ("show", "SOURCE"),
    ],
    ids=lambda command: command[0],
)  # fmt: skip
def test_every_command_takes_every_form(
    tmp_path: Path,
    profile: SkipProfile,
    hub: FakeHub,
    command: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def reached(console: object, options: object) -> None:
        raise Unavailable("the profile was found, and the model is next")

    monkeypatch.setattr("skipcal.commands.console.Console.load", reached)
    monkeypatch.chdir(tmp_path)
    profile.save("p.json")
    profile.save_pretrained("folder")
    profile.push_to_hub("me/tiny", model_card=False)
    hub.into_cache("me/tiny", tmp_path / "cache")
    for source in ("valid.json", "folder/", "me/tiny@main", shipped_profiles()[0]):
        words = [source if word == "SOURCE" else word for word in command]
        if command[0] == "show":
            assert "skip ratio   threshold" in run(*words).stdout
        elif source != shipped_profiles()[0] or command[0] != "compare":  # which is of another model
            assert "the model is next" in refused(*words, code=4)
    words = ["no-such" if word == "SOURCE" else word for word in command]
    assert "no hub id (org/name" in refused(*words, code=4)


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("meta-llama/Llama-2-13b-chat-hf", "llama-2-13b-chat-hf"),
        ("/data/models/My Model/", "my-model"),
        (None, "smollm2-135m-instruct"),
        ("..", "model"),
    ],
)
def test_slugs(name: str | None, slug: str) -> None:
    assert model_slug(name) == slug
