"""Profiles in model folders and hub repositories: what is written there, and what is not touched."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
from command_line import refused, run
from documents import document, write
from fake_hub import FakeHub
from gated import with_gate

from skipcal.arch.check import tiny_model
from skipcal.errors import ConfigError, OutputError, OutputExists, ProfileError, Unavailable
from skipcal.profiles.hub import BEGIN, CARD_FILE, END, with_section
from skipcal.profiles.schema import SkipProfile
from skipcal.profiles.sources import PROFILE_FILE

TENSORS = "made.surrogates.safetensors"
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def profile(tmp_path: Path) -> SkipProfile:
    return SkipProfile.load(write(tmp_path / "valid.json", document()))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    return FakeHub(monkeypatch, tmp_path)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures cost a second each; one test draws them."""
    monkeypatch.setattr("skipcal.profiles.hub.figure_bytes", lambda profile: b"a figure")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# The section of a model card


CARDS = [
    "",
    "# Mine\n",
    "---\nlicense: mit\ntags: [a,   b]\n---\n# Mine\n\ntext without an end of line",
    "# Mine\r\n\r\nwith the ends of lines of another system\r\n",
    "\ufeff# Mine\n\n\n",
]


@pytest.mark.parametrize("card", CARDS)
def test_a_section_is_added_and_replaced_and_the_rest_stays(card: str) -> None:
    first = with_section(card, "## One\n\nold\n")
    assert first.startswith(card)
    assert with_section(first, "## One\n\nold\n") == first
    more = first + "what somebody wrote below"
    second = with_section(more, "## Two\n\nnew\n\nlonger\n")
    start, stop = more.index(BEGIN), more.index(END)
    assert second.startswith(more[:start]) and second.endswith(more[stop:])
    inside = second[start : second.index(END)].replace("\r\n", "\n")
    assert inside == f"{BEGIN}\n## Two\n\nnew\n\nlonger\n"
    newline = "\r\n" if "\r\n" in card else "\n"
    assert len(re.findall(r"(?<!\r)\n", second)) == (0 if newline == "\r\n" else second.count("\n"))
    assert with_section(second, "## One\n\nold\n") == more


@pytest.mark.parametrize(
    "card",
    [BEGIN, END, f"{END}\n{BEGIN}", f"{BEGIN}\n{BEGIN}\n{END}", f"{BEGIN}\n{END}\n{BEGIN}\n{END}"],
)
def test_marks_that_are_no_pair_are_refused(card: str) -> None:
    with pytest.raises(ConfigError, match="expected one of each"):
        with_section(f"# Mine\n{card}\ntext\n", "## New\n")


# Folders


@pytest.mark.parametrize("gated", [False, True])
def test_a_model_folder_gets_the_profile_and_nothing_else_changes(
    tmp_path: Path, profile: SkipProfile, gated: bool
) -> None:
    profile = with_gate(profile) if gated else profile
    folder = tmp_path / "m"
    tiny_model("llama").save_pretrained(folder)
    (folder / CARD_FILE).write_bytes(b"# Mine\r\n")
    before = contents(folder)
    profile.save_pretrained(folder)
    after = contents(folder)
    assert set(after) - set(before) == {PROFILE_FILE, *([TENSORS] if gated else [])}
    assert {name: after[name] for name in before} == before  # config.json among them
    assert SkipProfile.from_pretrained(folder) == profile
    profile.save_pretrained(folder)  # as save_pretrained elsewhere it replaces its own file
    assert contents(folder) == after
    with pytest.raises(OutputExists):
        profile.save_pretrained(folder, overwrite=False)


@pytest.mark.usefixtures("drawn")
def test_a_model_card_is_written_where_it_is_asked_for(tmp_path: Path, profile: SkipProfile) -> None:
    folder = tmp_path / "m"
    profile.save_pretrained(folder, model_card=True)
    assert set(contents(folder)) == {PROFILE_FILE, CARD_FILE, "skip_profile.png"}
    card = (folder / CARD_FILE).read_text()
    assert card.startswith("---\nbase_model: org/tiny\nlibrary_name: skipcal\n")
    assert profile.model_card().rstrip() in card

    mine = "---\nlicense: mit\n---\n# Mine\n"
    (folder / CARD_FILE).write_text(mine)
    profile.save_pretrained(folder, model_card=True)
    assert (folder / CARD_FILE).read_text() == with_section(mine, profile.model_card())


@pytest.mark.usefixtures("drawn")
def test_a_section_that_would_be_stale_is_told(
    tmp_path: Path, profile: SkipProfile, caplog: pytest.LogCaptureFixture
) -> None:
    """Numbers of another profile beside this one would be believed."""
    folder = tmp_path / "m"
    profile.save_pretrained(folder, model_card=True)
    (folder / CARD_FILE).write_text(with_section("# Mine\n", profile.model_card("me/elsewhere")))
    profile.save_pretrained(folder)
    assert caplog.text == ""
    other = SkipProfile.load(write(tmp_path / "o.json", {**document(), "operating_points": []}))
    with caplog.at_level(logging.WARNING):
        other.save_pretrained(folder)
    assert "tells of another profile; write its section anew with model_card=True" in caplog.text


def test_a_card_that_is_no_text_is_left_alone(tmp_path: Path, profile: SkipProfile) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / CARD_FILE).write_bytes(b"\xff\xfe# Mine")
    with pytest.raises(Unavailable, match=r"README\.md is not UTF-8 text \(byte 0\)"):
        profile.save_pretrained(tmp_path / "m", model_card=True)
    assert (tmp_path / "m" / CARD_FILE).read_bytes() == b"\xff\xfe# Mine"


def test_options_of_pushing_need_pushing(tmp_path: Path, profile: SkipProfile) -> None:
    with pytest.raises(ConfigError, match=r"private, repo_id without push_to_hub=True"):
        profile.save_pretrained(tmp_path / "m", repo_id="me/tiny", private=True)
    assert not (tmp_path / "m").exists()


# Repositories


def test_a_push_uploads_profile_card_and_figure(profile: SkipProfile, hub: FakeHub) -> None:
    url = profile.push_to_hub("tiny", private=True)
    assert url == "https://hub/me/tiny/commit/1"
    assert hub.created == [{"name": "me/tiny", "private": True}]
    (commit,) = hub.commits
    assert commit == {
        "repo_id": "me/tiny",
        "files": [CARD_FILE, PROFILE_FILE, "skip_profile.png"],
        "commit_message": "Skip profile of org/tiny",
        "commit_description": None,
        "revision": None,
        "create_pr": False,
    }
    files = hub.repositories["me/tiny"]
    assert files[PROFILE_FILE].decode() == profile.to_json()
    assert files["skip_profile.png"].startswith(PNG)
    card = files[CARD_FILE].decode()
    assert "$ skipcal show me/tiny\n" in card and '.load("me/tiny")' in card
    assert "![Saturation curve: mean cosine by layer](skip_profile.png)" in card
    assert not hub.branches


def test_a_public_repository_is_not_taken_for_a_private_one(profile: SkipProfile, hub: FakeHub) -> None:
    """The hub leaves the option out for a repository that is there."""
    profile.push_to_hub("me/tiny", model_card=False)
    with pytest.raises(ConfigError, match="me/tiny is there already and is public, not private"):
        profile.push_to_hub("me/tiny", model_card=False, private=True)
    assert len(hub.commits) == 1


@pytest.mark.usefixtures("drawn")
def test_a_push_takes_the_tensors_along(profile: SkipProfile, hub: FakeHub) -> None:
    gated = with_gate(profile)
    gated.push_to_hub("me/tiny")
    files = hub.repositories["me/tiny"]
    assert set(files) == {CARD_FILE, PROFILE_FILE, "skip_profile.png", TENSORS}
    assert files[TENSORS] == gated.tensors().raw


@pytest.mark.usefixtures("drawn")
def test_a_push_keeps_the_card_that_is_there(profile: SkipProfile, hub: FakeHub) -> None:
    mine = "---\nlicense: mit\n---\r\n# Mine\r\n"
    hub.repositories["me/tiny"] = {CARD_FILE: mine.encode(), "config.json": b"{}", "model.safetensors": b"x"}
    profile.push_to_hub("me/tiny")
    (commit,) = hub.commits
    assert commit["files"] == [CARD_FILE, PROFILE_FILE, "skip_profile.png"]
    assert hub.repositories["me/tiny"][CARD_FILE].decode().startswith(mine)
    profile.push_to_hub("me/tiny")
    assert hub.repositories["me/tiny"][CARD_FILE].decode().count(BEGIN) == 1


@pytest.mark.usefixtures("drawn")
def test_a_branch_is_made_and_named_in_the_card(profile: SkipProfile, hub: FakeHub) -> None:
    profile.push_to_hub("me/tiny", revision="v2", commit_message="Again", commit_description="why")
    (commit,) = hub.commits
    assert (commit["revision"], commit["commit_message"]) == ("v2", "Again")
    assert commit["commit_description"] == "why"
    assert hub.branches == ["v2"]
    assert "$ skipcal show me/tiny@v2\n" in hub.repositories["me/tiny"][CARD_FILE].decode()
    profile.push_to_hub("me/tiny", revision="v2", create_pr=True)
    assert hub.branches == ["v2"] and hub.commits[-1]["create_pr"] is True


def test_a_push_without_a_card_uploads_the_profile_alone(profile: SkipProfile, hub: FakeHub) -> None:
    profile.push_to_hub("me/tiny", model_card=False)
    assert hub.commits[0]["files"] == [PROFILE_FILE]


def test_saving_and_pushing_in_one_go(tmp_path: Path, profile: SkipProfile, hub: FakeHub) -> None:
    profile.save_pretrained(tmp_path / "tiny", push_to_hub=True, model_card=False)
    assert hub.repositories["me/tiny"][PROFILE_FILE] == (tmp_path / "tiny" / PROFILE_FILE).read_bytes()


def test_what_cannot_be_sent_fails_before_anything_is_sent(tmp_path: Path, hub: FakeHub) -> None:
    saved = tmp_path / "p.json"
    with_gate(SkipProfile.load(write(tmp_path / "valid.json", document()))).save(saved)
    (tmp_path / TENSORS).unlink()
    with pytest.raises(Unavailable, match=TENSORS):
        SkipProfile.load(saved).push_to_hub("me/tiny")
    assert hub.created == []


@pytest.mark.usefixtures("drawn")
def test_a_hub_that_refuses_is_one_line(
    profile: SkipProfile, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*args: object, **kwargs: object) -> None:
        raise ConnectionError("403 Forbidden:\nno write access")

    monkeypatch.setattr("huggingface_hub.HfApi.create_commit", forbidden)
    with pytest.raises(OutputError) as refusal:
        profile.push_to_hub("me/tiny")
    assert "could not be pushed to 'me/tiny' (ConnectionError: 403 Forbidden: no write access)" in str(
        refusal.value
    )
    assert "hf auth login" in str(refusal.value) and "\n" not in str(refusal.value)


def test_offline_a_push_is_one_line(profile: SkipProfile) -> None:
    with pytest.raises(OutputError, match=r"could not be pushed to 'me/tiny' \(\w+: "):
        profile.push_to_hub("me/tiny", model_card=False)


# The command


@pytest.mark.usefixtures("drawn")
def test_the_command_pushes(tmp_path: Path, profile: SkipProfile, hub: FakeHub) -> None:
    source = tmp_path / "valid.json"
    done = run("push", source, "me/tiny", "--private", "--revision", "v2")
    assert "pushed to https://hub/me/tiny/commit/1; next: skipcal show me/tiny@v2" in done.stdout
    assert hub.created == [{"name": "me/tiny", "private": True}]
    assert hub.commits[0]["files"] == [CARD_FILE, PROFILE_FILE, "skip_profile.png"]
    assert hub.commits[0]["revision"] == "v2"
    done = run("push", source, "me/tiny", "--no-model-card", "--create-pr", "--json")
    assert json.loads(done.stdout) == {"url": "https://hub/me/tiny/commit/1"}
    assert hub.commits[1]["files"] == [PROFILE_FILE] and hub.commits[1]["create_pr"] is True


@pytest.mark.usefixtures("drawn")
def test_a_dry_run_shows_what_would_be_pushed(tmp_path: Path, profile: SkipProfile, hub: FakeHub) -> None:
    source = tmp_path / "valid.json"
    done = run("push", source, "me/tiny", "--dry-run")
    assert profile.model_card("me/tiny") in done.stdout
    assert f"{len(profile.to_json()):>12,} bytes  {PROFILE_FILE}\n" in done.stdout
    document = json.loads(run("push", source, "me/tiny", "--dry-run", "--no-model-card", "--json").stdout)
    assert document == {"files": {PROFILE_FILE: len(profile.to_json())}, "section": ""}
    assert not hub.created and not hub.commits


@pytest.mark.parametrize("repository", ["tiny", "me/tiny@v2", "a/b/c", "", "me/"])
def test_the_command_wants_a_hub_id(tmp_path: Path, profile: SkipProfile, repository: str) -> None:
    line = refused("push", tmp_path / "valid.json", repository, code=2)
    assert "expected org/name (a branch goes to --revision)" in line


def test_the_command_tells_of_a_hub_that_refuses(tmp_path: Path, profile: SkipProfile) -> None:
    line = refused("push", tmp_path / "valid.json", "me/tiny", "--no-model-card", code=1)
    assert "could not be pushed to 'me/tiny'" in line


# What is written can be read


def test_a_profile_that_could_not_be_loaded_is_not_saved(tmp_path: Path, profile: SkipProfile) -> None:
    broken = {
        "regions.cold_e: expected|regions: expected": profile.model_copy(
            update={"regions": profile.regions.model_copy(update={"cold_e": 9})}
        ),
        "would be malformed": profile.model_copy(update={"config": {"a": float("nan")}}),
        r"bad\.json would be malformed|skip_profile\.json would be malformed": profile.model_copy(
            update={
                "operating_points": [
                    profile.operating_points[0].model_copy(update={"realised_skip_ratio": float("nan")})
                ]
            }
        ),
        "model.num_layers": profile.model_copy(
            update={"model": profile.model.model_copy(update={"num_layers": 0})}
        ),
    }
    for message, bad in broken.items():
        with pytest.raises(ProfileError, match=message):
            bad.save(tmp_path / "bad.json")
        with pytest.raises(ProfileError, match=message):
            bad.save_pretrained(tmp_path / "m")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["valid.json"]
    assert json.loads((tmp_path / "valid.json").read_text()) == document()
