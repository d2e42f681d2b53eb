"""The file of tensors beside a profile: what it keeps, where it goes, how it is told."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gated import random_gates, random_map, with_gate
from safetensors.torch import load
from tensor_files import FILE, SHIPPED

from skipcal.core.gate import NEVER, GatePolicy
from skipcal.core.surrogates import LowRank, RoutedLowRank, Surrogates
from skipcal.errors import (
    ConfigError,
    OutputError,
    OutputExists,
    TargetOutOfReach,
    Unavailable,
)
from skipcal.profiles.parts import GateSettings, tensors_file
from skipcal.profiles.schema import SkipProfile
from skipcal.profiles.set_tensors import SetTensors
from skipcal.profiles.sources import PROFILE_FILE, shipped_profiles
from skipcal.profiles.summary import summarize
from skipcal.profiles.tensors import GateTensors

# What is kept


def test_gates_come_back_exactly_and_maps_in_bfloat16() -> None:
    gates = random_gates((1, 4), 8)
    maps = {n: LowRank(torch.randn(3, 8), torch.randn(8, 3), torch.randn(8)) for n in (1, 4)}
    packed = GateTensors.pack(gates, Surrogates(maps), "f" * 64)
    again = GateTensors.unpack(packed.raw, "here")
    assert again.fingerprint == "f" * 64
    assert again.gates.layers == (1, 4) == tuple(again.surrogates.maps)
    for name in ("weight", "log_norm_weight", "bias"):
        assert torch.equal(getattr(again.gates, name), getattr(gates, name))
    for layer, map_ in maps.items():
        found = again.surrogates.maps[layer]
        assert torch.equal(found.down, map_.down.bfloat16().float())
        assert torch.equal(found.up, map_.up.bfloat16().float())
        assert torch.equal(found.bias, map_.bias)
    # What a fit measures its ratios with is what a reader of the file will have.
    assert torch.equal(packed.surrogates.maps[4].up, again.surrogates.maps[4].up)
    assert packed.sha256 == hashlib.sha256(packed.raw).hexdigest()


@pytest.mark.parametrize("kind", ["gate", "sets"])
def test_of_several_maps_each_number_comes_back_within_half_a_step(kind: str) -> None:
    random = torch.Generator().manual_seed(3)
    maps = {n: random_map(8, 3, 5, random) for n in (1, 4)}
    if kind == "gate":
        packed = GateTensors.pack(random_gates((1, 4), 8), Surrogates(maps), "f" * 64)
        found = GateTensors.unpack(packed.raw, "here").surrogates
    else:
        sets = SetTensors.pack([{1: maps[1]}, maps], "f" * 64)
        smaller, found = SetTensors.unpack(sets.raw, "here").sets
        assert list(smaller.maps) == [1] and torch.equal(smaller.maps[1].up, found.maps[1].up)
    for layer, given in maps.items():
        again = found.maps[layer]
        assert isinstance(given, RoutedLowRank) and isinstance(again, RoutedLowRank)
        assert torch.equal(again.down, given.down.bfloat16().float())
        assert torch.equal(again.bias, given.bias) and torch.equal(again.route_bias, given.route_bias)
        step = given.up.abs().amax(-1, keepdim=True) / 127
        assert ((again.up - given.up).abs() <= 0.501 * step).all()
        assert len((again.up / step).unique()) > 40  # not all the same number


def test_equal_tensors_make_equal_files() -> None:
    """safetensors alone writes the strings of its header in one order or the other."""
    gates = random_gates((0,), 8)
    maps = Surrogates({0: LowRank(torch.ones(1, 8), torch.ones(8, 1), torch.ones(8))})
    assert len({GateTensors.pack(gates, maps, "f" * 64).sha256 for _ in range(12)}) == 1
    assert load(GateTensors.pack(gates, maps, "f" * 64).raw)["gate.bias"].tolist() == gates.bias.tolist()


def test_a_profile_round_trips_with_its_tensors(gated: SkipProfile, saved: Path) -> None:
    assert {p.name for p in saved.parent.iterdir()} == {FILE, "made.json"}
    document = json.loads(saved.read_text())
    digest = hashlib.sha256((saved.parent / FILE).read_bytes()).hexdigest()
    assert document["policy"] == {
        "rule": "gate", "threshold": -1.0, "warm_up_tokens": 3, "tensors": FILE, "sha256": digest,
    }  # fmt: skip
    assert document["gate"]["sha256"] == digest
    again = SkipProfile.load(saved)
    assert again == gated and again.to_json() == saved.read_text()
    policy = again.policy_for()
    assert isinstance(policy, GatePolicy)
    assert policy.to_dict() == gated.gate_policy().to_dict()
    assert (policy.threshold, policy.warm_up_tokens) == (-1.0, 3)


def test_the_papers_rule_stays_beside_the_gate(gated: SkipProfile, saved: Path) -> None:
    again = SkipProfile.load(saved)
    assert again.cosine_policy == SHIPPED.policy
    assert again.cosine_policy_for(0.1) == SHIPPED.policy_for(0.1)
    assert again.operating_points == SHIPPED.operating_points


def test_ratios_between_two_points_get_a_threshold_between(gated: SkipProfile) -> None:
    assert gated.gate_policy(0.2).threshold == -1.0
    assert gated.gate_policy(0.3).threshold == pytest.approx(-0.25)
    assert gated.gate_policy(0.0).threshold == NEVER
    for ratio in (0.05, 0.45):
        with pytest.raises(TargetOutOfReach, match=r"operating points from 0\.1 to 0\.4"):
            gated.policy_for(ratio)
    with pytest.raises(ConfigError, match="not a percentage"):
        gated.policy_for(25)


@pytest.mark.parametrize("name", shipped_profiles())
def test_a_profile_without_a_gate_is_written_as_before(name: str, tmp_path: Path) -> None:
    SkipProfile.load(name).save(tmp_path / "copy.json")
    shipped = Path(__file__).resolve().parents[2] / "profiles" / f"{name}.json"
    if "gate" not in json.loads(shipped.read_text()):
        assert (tmp_path / "copy.json").read_bytes() == shipped.read_bytes()
        assert [p.name for p in tmp_path.iterdir()] == ["copy.json"]


def test_without_a_gate_asking_for_one_says_how_to_get_it() -> None:
    for ask in (SHIPPED.gate_policy, SHIPPED.tensors):
        with pytest.raises(ConfigError, match="no gate; fit one with: skipcal fit"):
            ask()


# Where it goes


def test_saving_elsewhere_takes_the_tensors_along(saved: Path, tmp_path: Path) -> None:
    SkipProfile.load(saved).save(tmp_path / "other" / "renamed.json")
    assert sorted(p.name for p in (tmp_path / "other").iterdir()) == [FILE, "renamed.json"]
    saved.unlink()
    (tmp_path / FILE).unlink()
    assert SkipProfile.load(tmp_path / "other" / "renamed.json").gate_policy().threshold == -1.0


def test_a_model_folder_keeps_profile_and_tensors(gated: SkipProfile, tmp_path: Path) -> None:
    gated.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [FILE, PROFILE_FILE]
    again = SkipProfile.from_pretrained(tmp_path)
    assert again == gated
    assert again.gate_policy().to_dict() == gated.gate_policy().to_dict()
    (tmp_path / FILE).unlink()
    with pytest.raises(Unavailable, match=rf"no {FILE}, which the profile names"):
        SkipProfile.from_pretrained(tmp_path)


def test_the_same_tensors_may_be_there_and_others_may_not(gated: SkipProfile, saved: Path) -> None:
    gated.save(saved.with_name("second.json"))  # beside the same tensors
    beside = saved.parent / FILE
    beside.write_bytes(b"mine")
    with pytest.raises(OutputExists, match=r"surrogates\.safetensors exists already; pass --overwrite"):
        gated.save(saved.with_name("third.json"))
    assert beside.read_bytes() == b"mine"
    assert not saved.with_name("third.json").exists()
    with pytest.raises(OutputExists, match=r"made\.json exists already"):
        gated.save(saved)
    gated.save(saved, overwrite=True)
    assert SkipProfile.load(saved).tensors().raw == gated.tensors().raw


@pytest.mark.parametrize("mine", [None, b"mine"])
def test_a_write_that_fails_leaves_both_files_as_they_were(
    gated: SkipProfile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mine: bytes | None
) -> None:
    """The disk is full, or Ctrl-C comes, after the tensors are written and before the profile is."""
    if mine is not None:
        (tmp_path / FILE).write_bytes(mine)
        (tmp_path / "made.json").write_bytes(mine)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for error, raised in (
        (OSError(28, "No space left"), OutputError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ):
        calls: list[int] = []

        def fsync(descriptor: int, error: BaseException = error, calls: list[int] = calls) -> None:
            calls.append(descriptor)
            if len(calls) == 2:
                raise error

        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", fsync)
            with pytest.raises(raised):
                gated.save(tmp_path / "made.json", overwrite=True)
        assert len(calls) == 2
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("profile", "tensors"),
    [
        ("runs/gated.json", "gated"),
        ("a.b.json", "a.b"),
        ("plain", "plain"),
        ("my gate (2).json", "my-gate-2-"),
        ("größe.json", "gr-e"),
        (".hidden.json", "hidden"),
        ("..json", "gate"),
        ("x" * 240 + ".json", "x" * 150),
    ],
)
def test_every_name_of_a_profile_gives_a_name_that_a_profile_may_hold(profile: str, tensors: str) -> None:
    name = tensors_file(Path(profile))
    assert name == f"{tensors}.surrogates.safetensors"
    SkipProfile.model_validate_json(with_gate(SHIPPED, name=name.split(".surr")[0]).to_json())


# In words


def test_the_summary_tells_the_gate_within_80_columns(gated: SkipProfile) -> None:
    text = summarize(gated, by_layer=True)
    assert max(map(len, text.splitlines())) <= 80
    for line in (
        "gate          the policy's rule, in 2 layers: 1 to 2",
        "sweeps        2, skipping 0.000, 0.200",
        "surrogates    rank 2, 3.1 % of their FFN's bytes",
        "error         0.40 to 0.62 of the variance of f is left",
        "damage        by Fisher metric; R2 of the gates 0.50 to 0.75",
        "0.20            -1.000      0.210     0.200     0.200  <- policy",
        "0.40             0.500      0.410     0.400     0.400",
    ):
        assert line in text.splitlines()
    assert text.count("<- policy") == 1, "the paper's rule is not the policy any more"
    assert summarize(SHIPPED).count("<- policy") == 1


def test_a_gate_that_is_not_the_policy_needs_a_ratio(gated: SkipProfile) -> None:
    aside = gated.model_copy(update={"policy": gated.cosine_policy})
    aside._tensors = gated.tensors()
    assert aside.gate_policy(0.1).threshold == gated.gate_policy(0.1).threshold
    with pytest.raises(ConfigError, match="give a target skip ratio"):
        aside.gate_policy()


def test_a_gate_keeps_the_warm_up_that_a_search_chose(gated: SkipProfile) -> None:
    """The gate was fitted with a warm-up of 3; what a search measured and chose had another."""
    assert isinstance(gated.policy, GateSettings)
    chosen = gated.model_copy(update={"policy": replace(gated.policy, warm_up_tokens=7)})
    chosen._tensors = gated.tensors()
    assert chosen.policy_for().warm_up_tokens == chosen.policy_for(0.2).warm_up_tokens == 7
    assert gated.policy_for().warm_up_tokens == 3


def test_tensors_are_found_from_another_folder(
    tmp_path: Path, gated: SkipProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative path means what it meant when the profile was loaded."""
    gated.save(tmp_path / "p.json")
    monkeypatch.chdir(tmp_path)
    found = SkipProfile.load("p.json")
    monkeypatch.chdir(tmp_path.parent)
    assert found.tensors().sha256 == gated.tensors().sha256
