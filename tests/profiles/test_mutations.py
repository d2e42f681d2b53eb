"""Damaged profiles: each is a valid profile or one clear refusal, 10,000 times."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from random import Random
from typing import Any

import pytest
from documents import document, gate_document, tuned_document
from mutations import Mutator

from skipcal.errors import ProfileError, SkipcalError
from skipcal.profiles.data import PROFILE_FORMAT
from skipcal.profiles.schema import SkipProfile
from skipcal.profiles.summary import summarize

SHIPPED = Path(__file__).resolve().parents[2] / "profiles" / "smollm2-135m-instruct.json"
SMALL = {
    "cosine": document(layers=2),
    "gate": gate_document(layers=4),
    "static": tuned_document(layers=3),
    "all": {**gate_document(layers=3), "tuning": tuned_document(layers=3)["tuning"]},
}
SMALL["all"]["gate"]["layers"] = SMALL["gate"]["gate"]["layers"] = [1]
LONGEST = 800  # characters of a refusal, the file's name included


def outcome(raw: bytes, file: Path, told: str) -> str:
    """`valid` or what was refused; anything else fails."""
    file.write_bytes(raw)
    try:
        profile = SkipProfile.load(file)
    except ProfileError as error:
        message = str(error)
        assert message.startswith(str(file)), f"{told}: {message}"
        assert "\n" not in message and message.isprintable() and len(message) < LONGEST, (
            f"{told}: {message!r}"
        )
        return message.removeprefix(str(file))
    usable(profile, told)
    return "valid"


def usable(profile: SkipProfile, told: str) -> None:
    """A profile that loads can be written, read again, shown and asked."""
    text = profile.checked_json("again.json")
    assert SkipProfile.model_validate_json(text).to_json() == text, told
    assert all(c.isprintable() or c == "\n" for c in summarize(profile, by_layer=True)), told
    profile.cosine_policy_for()
    for target in (None, 0.1):
        try:
            profile.policy_for(target)
        except SkipcalError as error:  # out of reach, or tensors that are not there
            assert "\n" not in str(error), told


@pytest.fixture
def file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Path:
    caplog.set_level(logging.ERROR)  # warnings of unknown keys are no matter here
    return tmp_path / "profile.json"


@pytest.mark.parametrize("name", SMALL)
def test_the_undamaged_documents_are_valid(file: Path, name: str) -> None:
    assert outcome(json.dumps(SMALL[name]).encode(), file, name) == "valid"


@pytest.mark.parametrize("chunk", range(4))
@pytest.mark.parametrize("name", SMALL)
def test_structural_damage_is_valid_or_refused(file: Path, name: str, chunk: int) -> None:
    """16 times 450 = 7,200 documents."""
    mutator, outcomes = Mutator(SMALL[name]), {"valid": 0, "refused": 0}
    for n in range(450):
        told, damaged = mutator.structural(Random(f"{name} {chunk} {n}"))
        found = outcome(json.dumps(damaged).encode(), file, f"{name} {chunk} {n}: {told}")
        outcomes["valid" if found == "valid" else "refused"] += 1
        if found != "valid" and "; " not in told:
            assert_named(found, told, damaged)
    assert min(outcomes.values()) > 20, outcomes  # else it tests nothing


def assert_named(message: str, told: str, damaged: dict[str, Any]) -> None:
    """The refusal of a single change names the field, or one that it contradicts."""
    if "no valid JSON" in message or damaged.get("format") != PROFILE_FORMAT:
        return
    top = told.split(" ", 1)[1].split(".")[0]
    fields = {top, *({"policy", "paper_policy", "gate", "regions", "layers"} if top in CROSSED else {top})}
    assert any(field in message for field in fields), f"{told}: {message}"


CROSSED = {"model", "policy", "gate", "paper_policy", "regions"}  # what others are compared with


@pytest.mark.parametrize("name", SMALL)
def test_damaged_bytes_are_valid_or_refused(file: Path, name: str) -> None:
    """4 times 650 = 2,600 files."""
    mutator = Mutator(SMALL[name])
    kinds: set[str] = set()
    for n in range(650):
        kind, raw = mutator.textual(Random(f"bytes {name} {n}"))
        found = outcome(raw, file, f"{name} {n}: {kind}")
        kinds.add(kind)
        if kind == "twice":
            assert "is there twice" in found
        if kind in ("cut", "glue"):
            assert "no valid JSON" in found or (kind == "glue" and found == "valid")
    assert len(kinds) == 7


def test_damage_to_the_shipped_profile_is_valid_or_refused(file: Path) -> None:
    """60 structures and 180 texts: these files are twenty times as long."""
    mutator = Mutator(json.loads(SHIPPED.read_text()))
    for n in range(60):
        told, damaged = mutator.structural(Random(f"shipped {n}"))
        outcome(json.dumps(damaged).encode(), file, f"shipped {n}: {told}")
    for n in range(180):
        kind, raw = mutator.textual(Random(f"shipped bytes {n}"))
        outcome(raw, file, f"shipped {n}: {kind}")
