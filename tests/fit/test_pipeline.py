"""A whole fit on a tiny model: what the profile says of it is so, and every option takes part."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fit_config, lively

from skipcal.arch.loading import LoadedModel
from skipcal.arch.locate import locate
from skipcal.core.gate import GatePolicy
from skipcal.errors import ConfigError, ProfileMismatch, TargetOutOfReach, Unavailable
from skipcal.fit.damage import fisher_damage
from skipcal.fit.pipeline import TARGETS, fit_gate_profile
from skipcal.profiles.schema import SkipProfile
from skipcal.runtime.session import skipping
from skipcal.text.corpora import resolve_corpora, sample_corpus

LAYERS, HIDDEN = 8, 32
FFN_BYTES = 4 * (3 * HIDDEN * 48 + HIDDEN)


@pytest.fixture
def text(worded_text: Path) -> Path:
    return worded_text


def held_out(loaded: LoadedModel, text: Path, seed: int = 0) -> list[list[int]]:
    (corpus,) = resolve_corpora([], [str(text)])
    sample = sample_corpus(corpus, loaded.tokenizer, prompts=20, prompt_tokens=24, seed=seed, held_out=10)
    return sample.held_out


def realised(loaded: LoadedModel, policy: Any, rows: list[list[int]]) -> float:
    """One row at a time, the whole model with its head."""
    skipped = tokens = 0
    for row in rows:
        with skipping(loaded.model, policy=policy, teacher_forced=True) as run:
            loaded.model(torch.tensor([row]))
        skipped += run.report.skipped_blocks
        tokens += run.report.decode_steps_after_warm_up
    return skipped / (LAYERS * tokens)


def fit_of(profile: SkipProfile) -> Any:
    assert profile.gate is not None
    return profile.gate.fit


# What comes out


def test_operating_points_rise_to_half_of_all_ffns(gated: SkipProfile) -> None:
    assert gated.gate is not None
    points = gated.gate.operating_points
    assert [p.target_skip_ratio for p in points] == list(TARGETS)
    assert all(a.threshold < b.threshold for a, b in pairwise(points))
    assert all(a.predicted_skip_ratio < b.predicted_skip_ratio for a, b in pairwise(points))
    assert all(a.realised_skip_ratio < b.realised_skip_ratio for a, b in pairwise(points))


def test_realised_ratios_are_those_of_a_session_on_the_held_out_windows(
    gated: SkipProfile, worded: LoadedModel, text: Path
) -> None:
    """A token whose score lies within rounding of the threshold may go either way: one of 1,680 blocks."""
    assert gated.gate is not None
    rows = held_out(worded, text)
    for point in gated.gate.operating_points:
        policy = gated.gate_policy(point.target_skip_ratio)
        assert policy.threshold == point.threshold
        assert point.realised_skip_ratio == pytest.approx(realised(worded, policy, rows), abs=1 / 1680)
        assert point.realised_skip_ratio == pytest.approx(point.target_skip_ratio, abs=0.02)


def test_predicted_ratios_are_near_the_realised_ones_where_it_was_fitted(gated: SkipProfile) -> None:
    """480 tokens of noise to fit on, 210 to measure on."""
    assert gated.gate is not None
    point = next(p for p in gated.gate.operating_points if p.target_skip_ratio == 0.25)
    assert point.predicted_skip_ratio == pytest.approx(point.realised_skip_ratio, abs=0.05)
    assert fit_of(gated).sweeps[-1] == pytest.approx(0.25, abs=0.05)


def test_the_policy_is_the_gate_at_the_target(gated: SkipProfile, worded_profile: SkipProfile) -> None:
    policy = gated.policy_for()
    assert isinstance(policy, GatePolicy)
    assert policy.to_dict() == gated.gate_policy(0.25).to_dict()
    assert gated.cosine_policy == worded_profile.policy
    assert gated.model == worded_profile.model
    assert gated.operating_points == worded_profile.operating_points


def test_the_first_and_the_last_ffn_are_no_candidates(gated: SkipProfile) -> None:
    assert gated.gate is not None
    assert gated.gate.layers == [1, 2, 3, 4, 5, 6]
    assert list(gated.tensors().gates.layers) == gated.gate.layers


def test_the_fit_says_what_it_was_made_of(gated: SkipProfile, text: Path) -> None:
    fit = fit_of(gated)
    assert (fit.windows, fit.window_tokens) == (20, 24)
    assert fit.tokens == 20 * (24 - 1 - 2)
    assert [(c.name, c.prompts, c.tokens) for c in fit.corpora] == [("words", 20, 20 * 21)]
    assert fit.sweeps[0] == 0.0 and len(fit.sweeps) == 3
    assert (fit.rank, fit.maps) == (3, 8)
    # The rows that all maps share and eight of the route, and the rest of one map.
    assert fit.surrogate_share == pytest.approx(4 * ((3 + 8) * HIDDEN + 3 * HIDDEN + HIDDEN + 8) / FFN_BYTES)
    assert len(fit.gate_r_squared) == len(fit.surrogate_error) == 6
    assert all(0 < value < 1 for value in (*fit.gate_r_squared, *fit.surrogate_error))
    assert fit.seconds > 0 and fit.peak_memory_bytes > 10**7
    assert fit.config["prompts"] == 20 and fit.config["corpus"] == []
    assert str(text.parent) not in gated.to_json(), "a place on this computer is nobody's business"


def test_the_profile_round_trips_and_decodes(gated: SkipProfile, worded: LoadedModel, tmp_path: Path) -> None:
    gated.save(tmp_path / "g.json")
    again = SkipProfile.load(tmp_path / "g.json")
    assert again == gated
    ids = torch.tensor([[5, 17, 31, 8]])
    model: Any = worded.model
    outputs = []
    for profile in (gated, again):
        with skipping(model, profile, target_skip_ratio=0.4) as run:
            outputs.append(model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12))
    assert torch.equal(*outputs)
    assert run.report.method == "gate" and run.report.skipped_blocks > 0
    assert run.report.decode_steps_after_warm_up == 11 - 2


# Options


def test_the_same_seed_gives_the_same(
    gated: SkipProfile, worded: LoadedModel, worded_profile: SkipProfile, text: Path
) -> None:
    again = fit_gate_profile(worded, worded_profile, fit_config(text))
    left_out = {"gate": {"fit": {"seconds", "peak_memory_bytes"}}}
    assert again.model_dump(exclude=left_out) == gated.model_dump(exclude=left_out)
    assert again.tensors().raw == gated.tensors().raw


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("prompts", 19),
        ("prompt_tokens", 22),
        ("seed", 1),
        ("rank", 2),
        ("maps", 3),
        ("sweeps", 0),
        ("sweeps", 1),
        ("damage", "relative-error"),
        ("damage_prompts", 3),
        ("target_skip_ratio", 0.33),
    ],
)
def test_options_reach_the_tensors(
    gated: SkipProfile,
    worded: LoadedModel,
    worded_profile: SkipProfile,
    text: Path,
    option: str,
    value: Any,
) -> None:
    few: dict[str, Any] = {"closed_loop_prompts": 3, option: value}  # which leave the tensors, see below
    found = fit_gate_profile(worded, worded_profile, fit_config(text, **few))
    assert found.tensors().raw != gated.tensors().raw
    fit = fit_of(found)
    assert fit.config[option] == value
    said = {
        "prompts": fit.windows, "prompt_tokens": fit.window_tokens, "seed": fit.seed, "rank": fit.rank,
        "maps": fit.maps, "sweeps": len(fit.sweeps) - 1, "damage": fit.damage,
    }  # fmt: skip
    assert said.get(option, value) == value
    if option == "target_skip_ratio":
        assert getattr(found.policy, "threshold", None) == found.gate_policy(0.33).threshold
        assert fit.sweeps[-1] == pytest.approx(0.33, abs=0.05)
        assert found.gate is not None
        assert 0.33 in [p.target_skip_ratio for p in found.gate.operating_points]


def test_the_seed_draws_the_labels_of_the_damage_as_well(
    worded: LoadedModel, worded_profile: SkipProfile, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []

    def noted(*args: Any, seed: int, **kwargs: Any) -> Any:
        seeds.append(seed)
        return fisher_damage(*args, seed=seed, **kwargs)

    monkeypatch.setattr("skipcal.fit.prepared.fisher_damage", noted)
    fit_gate_profile(worded, worded_profile, fit_config(text, seed=6, sweeps=0, closed_loop_prompts=1))
    assert seeds == [6]


def test_options_that_only_measure_leave_the_tensors(
    gated: SkipProfile, worded: LoadedModel, worded_profile: SkipProfile, text: Path
) -> None:
    found = fit_gate_profile(worded, worded_profile, fit_config(text, output="runs/my gate.json"))
    assert found.tensors().raw == gated.tensors().raw
    assert found.gate is not None and found.gate.tensors == "my-gate.surrogates.safetensors"
    assert gated.gate is not None and gated.gate.tensors == "tiny.surrogates.safetensors"
    fewer = fit_gate_profile(worded, worded_profile, fit_config(text, closed_loop_prompts=3))
    assert fewer.gate is not None
    assert fewer.gate.operating_points != gated.gate.operating_points
    assert fewer.tensors().raw == gated.tensors().raw


def test_the_batch_size_changes_nothing_but_rounding(
    gated: SkipProfile, worded: LoadedModel, worded_profile: SkipProfile, text: Path
) -> None:
    found = fit_gate_profile(worded, worded_profile, fit_config(text, batch_size=7))
    torch.testing.assert_close(
        found.tensors().gates.weight, gated.tensors().gates.weight, atol=1e-3, rtol=1e-2
    )
    assert fit_of(found).sweeps == pytest.approx(fit_of(gated).sweeps, abs=0.002)


@pytest.mark.parametrize("budget", [0.05, 0.15])
def test_the_rank_follows_from_the_budget(
    worded: LoadedModel, worded_profile: SkipProfile, text: Path, budget: float
) -> None:
    config = fit_config(text, rank=None, surrogate_budget=budget, maps=1, sweeps=0, closed_loop_prompts=1)
    fit = fit_of(fit_gate_profile(worded, worded_profile, config))
    assert fit.rank == int((budget * FFN_BYTES / 4 - HIDDEN) // (2 * HIDDEN))
    assert fit.surrogate_share <= budget


def test_the_warm_up_of_the_profile_is_kept(
    worded: LoadedModel, worded_profile: SkipProfile, text: Path
) -> None:
    policy = replace(worded_profile.cosine_policy, warm_up_tokens=7)
    later = worded_profile.model_copy(update={"policy": policy})
    found = fit_gate_profile(worded, later, fit_config(text, closed_loop_prompts=2))
    assert fit_of(found).tokens == 20 * (24 - 8)
    assert found.policy.warm_up_tokens == found.gate_policy().warm_up_tokens == 7
    assert found.gate is not None and found.gate.warm_up_tokens == 7


def test_a_profile_with_a_gate_can_be_fitted_again(
    gated: SkipProfile, worded: LoadedModel, text: Path
) -> None:
    again = fit_gate_profile(worded, gated, fit_config(text))
    assert again.tensors().raw == gated.tensors().raw
    assert again.cosine_policy == gated.cosine_policy


# What is refused


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"prompt_tokens": 8}, None, ""),
        ({"rank": 33}, ConfigError, "--rank 33 is above the hidden size of 32"),
        ({"target_skip_ratio": 0.8}, TargetOutOfReach, r"0\.8 is out of reach: the first and the last of 8"),
        ({"prompt_tokens": 300}, ConfigError, "do not fit the model's context of 256; lower --prompt-tokens"),
        ({"prompts": 200}, Unavailable, "is too short: it has 66 windows of 24 tokens, 210 are wanted"),
        ({"data_files": ["none.txt"]}, Unavailable, r"none\.txt"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    worded: LoadedModel,
    worded_profile: SkipProfile,
    text: Path,
    changes: dict[str, Any],
    error: type[Exception] | None,
    message: str,
) -> None:
    config = fit_config(text, **changes)
    if error is None:  # the shortest windows there are still have five tokens past the warm-up
        assert fit_of(fit_gate_profile(worded, worded_profile, config)).tokens == 20 * 5
        return
    with pytest.raises(error, match=message):
        fit_gate_profile(worded, worded_profile, config)


def test_windows_within_the_warm_up_are_refused(
    worded: LoadedModel, worded_profile: SkipProfile, text: Path
) -> None:
    policy = replace(worded_profile.cosine_policy, warm_up_tokens=23)
    late = worded_profile.model_copy(update={"policy": policy})
    with pytest.raises(ConfigError, match="no token of a window of 24 lies past the warm-up of 23"):
        fit_gate_profile(worded, late, fit_config(text))


def test_more_windows_of_damage_than_there_are_is_refused(text: Path) -> None:
    with pytest.raises(ValueError, match="damage_prompts 21 are more than the 20 windows"):
        fit_config(text, damage_prompts=21)


def test_other_weights_and_other_models_are_refused(
    worded: LoadedModel, worded_profile: SkipProfile, text: Path
) -> None:
    torch.manual_seed(9)
    other: Any = LoadedModel(lively("llama", num_hidden_layers=8), worded.tokenizer, "tiny", None)
    with pytest.raises(ProfileMismatch, match="made on other weights of tiny"):
        fit_gate_profile(other, worded_profile, fit_config(text))
    shallow: Any = LoadedModel(lively("llama"), worded.tokenizer, "tiny", None)
    with pytest.raises(ProfileMismatch, match="number of layers 8, the model's is 4"):
        fit_gate_profile(shallow, worded_profile, fit_config(text))


def test_a_gate_is_refused_on_other_weights_where_a_threshold_only_warns(
    gated: SkipProfile, worded_profile: SkipProfile
) -> None:
    torch.manual_seed(9)
    other = lively("llama", num_hidden_layers=8)
    with skipping(other, worded_profile):
        pass
    with pytest.raises(ProfileMismatch, match="a gate holds for the weights it was fitted to"):
        skipping(other, gated)


def test_the_model_is_left_as_it_was(
    worded: LoadedModel,
    worded_profile: SkipProfile,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """After Ctrl-C in a sweep; and no folder of streams stays."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model: Any = worded.model

    def state() -> list[Any]:
        return [
            (sorted(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()
        ] + [p.requires_grad for p in model.parameters()]

    before, logits = state(), model(torch.tensor([[3, 4, 5]])).logits
    fit_gate_profile(worded, worded_profile, fit_config(text, closed_loop_prompts=1))
    calls: list[int] = []

    def stop(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        raise KeyboardInterrupt

    for place in ("surrogate.fit_low_rank", "on_policy.GateRule", "pipeline.RealisedCurve.threshold"):
        with monkeypatch.context() as patch:
            patch.setattr(f"skipcal.fit.{place}", stop)
            with pytest.raises(KeyboardInterrupt):
                fit_gate_profile(worded, worded_profile, fit_config(text))
    assert len(calls) == 3
    assert state() == before
    assert torch.equal(model(torch.tensor([[3, 4, 5]])).logits, logits)
    assert list(tmp_path.iterdir()) == []
    assert locate(model).num_layers == LAYERS
