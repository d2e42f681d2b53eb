"""Fixed sets: surrogates fitted on the stream that the set leaves, layers that lose least, their profile."""

from __future__ import annotations

import math
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import attentive, fit_config, lively
from swept import FIRST, ROWS
from torch import Tensor

from skipcal.arch.loading import LoadedModel
from skipcal.arch.locate import locate, observe
from skipcal.configs.fit import FitConfig
from skipcal.core.chosen_ffns import ChosenFFNs
from skipcal.core.substituted import Substituted
from skipcal.core.surrogates import Surrogates, direction
from skipcal.errors import ConfigError, TargetOutOfReach
from skipcal.fit.damage import FisherDamage, RelativeDamage
from skipcal.fit.fixed_sets import TRIED, fit_fixed_sets
from skipcal.fit.held_out import HeldOutLoss
from skipcal.fit.layer_sweep import RowSweep
from skipcal.fit.moments import Moments
from skipcal.fit.prepared import Prepared
from skipcal.fit.set_sweep import SetFit, SetSweep
from skipcal.fit.surrogate import fit_low_rank
from skipcal.profiles.methods import Ask, make_policy
from skipcal.profiles.schema import SkipProfile
from skipcal.runtime.session import skipping

FAMILIES = {"llama": {}, "gpt2": {}, "gemma2": {"sliding_window": 4}, "olmo2": {}, "granite": {}}


# A map that comes closest by a metric


def random_moments(rank: int) -> tuple[Moments, Tensor, Tensor]:
    x = torch.randn(400, 6, dtype=torch.float64)
    y = x @ torch.randn(6, rank, dtype=torch.float64) @ torch.randn(rank, 5, dtype=torch.float64)
    y = y + 0.3 * torch.randn(400, 5, dtype=torch.float64)
    moments = Moments.empty(6, 5)
    moments.add(x, y)
    return moments, x, y


def test_by_a_metric_no_map_of_the_rank_comes_closer() -> None:
    """Against descent from many beginnings on the same loss, ridge included."""
    moments, x, y = random_moments(4)
    half = torch.randn(5, 5, dtype=torch.float64)
    metric = half @ half.T + 0.1 * torch.eye(5, dtype=torch.float64)
    penalty = 1e-3
    found = fit_low_rank(moments, 2, metric=metric, penalty=penalty)

    def loss(down: Tensor, up: Tensor, bias: Tensor) -> Tensor:
        off = y - x @ down.T @ up.T - bias
        shrink = penalty * x.var(0, correction=0)
        whole = (up @ down).T  # [6, 5]
        return ((off @ metric) * off).sum(-1).mean() + (shrink[:, None] * (whole @ metric) * whole).sum()

    mine = loss(found.down.double(), found.up.double(), found.bias.double())
    best = math.inf
    with torch.enable_grad():
        for seed in range(6):
            generator = torch.Generator().manual_seed(seed)
            parts = [
                torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
                for shape in ((2, 6), (5, 2), (5,))
            ]
            optimizer = torch.optim.LBFGS(parts, max_iter=400, line_search_fn="strong_wolfe")

            def closure() -> Tensor:
                optimizer.zero_grad()  # noqa: B023
                value = loss(*parts)  # noqa: B023
                value.backward()
                return value

            optimizer.step(closure)
            best = min(best, float(loss(*parts).detach()))
    assert float(mine) == pytest.approx(best, rel=1e-5)
    plain = fit_low_rank(moments, 2, penalty=penalty)
    assert float(loss(plain.down.double(), plain.up.double(), plain.bias.double())) > 1.05 * best


def test_without_a_cut_the_metric_changes_nothing() -> None:
    moments, _, _ = random_moments(4)
    metric = torch.diag(torch.tensor([1.0, 9.0, 2.0, 5.0, 3.0]))
    one, other = fit_low_rank(moments, 5), fit_low_rank(moments, 5, metric=metric)
    torch.testing.assert_close(one.up @ one.down, other.up @ other.down, atol=1e-5, rtol=1e-5)


# The sweep


def set_sweep(model: Any, damage: Any, batch_size: int = 4, rank: int = 3, maps: int = 1) -> SetSweep:
    rows = RowSweep(locate(model), ROWS, first=FIRST, batch_size=batch_size)
    return SetSweep(rows, damage=damage, rank=rank, maps=maps)


def fixed(surrogates: Surrogates, warm_up: int = FIRST - 1) -> Substituted:
    layers = tuple(sorted(surrogates.maps))
    return Substituted(
        ChosenFFNs(method="static", layers=layers, probability=1.0, warm_up_tokens=warm_up), surrogates
    )


def stream_at(model: Any, layer: int, policy: Any = None) -> tuple[Tensor, Tensor]:
    """h and f of a layer that runs, [tokens, hidden], of all counted tokens; the whole model's."""
    seen: list[Tensor] = []

    def keep(_layer: int, h: Tensor, f: Tensor) -> None:
        seen.extend(t.reshape(len(ROWS), len(ROWS[0]), -1)[:, FIRST:].flatten(0, 1).clone() for t in (h, f))

    run = nullcontext() if policy is None else skipping(model, policy=policy, teacher_forced=True)
    with run, observe((locate(model).blocks[layer],), keep):
        model(torch.tensor(ROWS))
    h, f = seen
    return h, f


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_each_surrogate_is_fitted_on_the_stream_that_those_before_it_leave(family: str) -> None:
    """One layer more at a time, by a session with the surrogates so far; they aim at the full stream."""
    model: Any = attentive(lively(family, **FAMILIES[family]))
    plain = RelativeDamage({})
    found = set_sweep(model, plain).fit([1, 2])
    h, f = stream_at(model, 2, fixed(Surrogates({1: found.surrogates[1]})))
    clean_h, clean_f = stream_at(model, 2)
    target = clean_h + clean_f - h
    moments = Moments.empty(32, 32)
    moments.add(direction(h), target)
    expected = fit_low_rank(moments, 3)
    mine = found.surrogates[2]
    torch.testing.assert_close(mine.up @ mine.down, expected.up @ expected.down, atol=2e-4, rtol=2e-4)
    assert not torch.allclose(clean_h, h, atol=1e-3), "the first skip changes what the second sees"
    with_it, without = (
        (target - added).square().sum(-1) / h.square().sum(-1) for added in (expected(direction(h)), f)
    )
    assert found.damage[2] == pytest.approx(float((with_it - without).mean()), rel=2e-3, abs=1e-6)
    assert float(without.mean()) > 0


def test_candidates_run_and_change_nothing(model: Any, damage: FisherDamage) -> None:
    alone = set_sweep(model, damage).fit([2, 4])
    beside = set_sweep(model, damage).fit([2, 4], [1, 3])
    for layer in (2, 4):
        assert torch.equal(alone.surrogates[layer].up, beside.surrogates[layer].up)
        assert alone.damage[layer] == beside.damage[layer]
    assert sorted(beside.surrogates) == [1, 2, 3, 4] and sorted(alone.surrogates) == [2, 4]


@pytest.mark.parametrize("added", [1, 2, 4])
def test_what_lies_before_the_last_change_is_taken_over(model: Any, damage: FisherDamage, added: int) -> None:
    sweep = set_sweep(model, damage)
    smaller = sweep.fit([3], [1, 2, 4])
    skipped, others = sorted([3, added]), [layer for layer in (1, 2, 4) if layer != added]
    anew, grown = sweep.fit(skipped, others), sweep.fit(skipped, others, before=smaller, changed=added)
    assert grown.damage == anew.damage
    for layer, expected in anew.surrogates.items():
        assert torch.equal(grown.surrogates[layer].up, expected.up)
        assert torch.equal(grown.surrogates[layer].bias, expected.bias)


def test_batches_of_any_size_fit_the_same(model: Any, damage: FisherDamage) -> None:
    one, all_at_once = (set_sweep(model, damage, batch_size=size).fit([1, 3]) for size in (1, 10))
    for layer in (1, 3):
        mine, theirs = (found.surrogates[layer] for found in (one, all_at_once))
        torch.testing.assert_close(mine.up @ mine.down, theirs.up @ theirs.down, atol=1e-4, rtol=1e-4)
        assert one.damage[layer] == pytest.approx(all_at_once.damage[layer], rel=1e-3)


# Loss on text that was not fitted on


@pytest.fixture(scope="module")
def prepared(worded: LoadedModel, worded_profile: SkipProfile, worded_text: Path) -> Prepared:
    return Prepared.of(worded, worded_profile, fit_config(worded_text, method="static"))


def naive_loss(prepared: Prepared, policy: Any, windows: int | None) -> float:
    """One row at a time, one token at a time."""
    model: Any = prepared.loaded.model
    (sample,) = prepared.samples
    found = []
    for row in sample.held_out[:windows]:
        if policy is None:
            logits = model(torch.tensor([row])).logits[0]
        else:
            with skipping(model, policy=policy, teacher_forced=True):
                logits = model(torch.tensor([row])).logits[0]
        for place in range(prepared.first, len(row) - 1):
            found.append(-float(logits[place].log_softmax(-1)[row[place + 1]]))
    return float(np.mean(found))


@pytest.mark.parametrize("windows", [3, None])
def test_excess_loss_is_that_of_a_session_token_by_token(prepared: Prepared, windows: int | None) -> None:
    policy = ChosenFFNs(method="static", layers=(2, 5), probability=1.0, warm_up_tokens=2)
    (found,) = HeldOutLoss(prepared, windows)(policy).values()
    expected = naive_loss(prepared, policy, windows) - naive_loss(prepared, None, windows)
    assert found == pytest.approx(expected, abs=1e-5)
    assert abs(expected) > 1e-3


# The sets


@pytest.fixture(scope="module")
def fitted(worded: LoadedModel, worded_profile: SkipProfile, worded_text: Path) -> SkipProfile:
    config = fit_config(worded_text, method="static", target_skip_ratio=0.4)
    with torch.no_grad():
        return fit_fixed_sets(worded, worded_profile, config)


def test_sets_grow_one_by_one_to_the_target(fitted: SkipProfile) -> None:
    """Of 8 layers: 0.05 and 0.1 are one FFN, 0.15 and 0.2 one or two; equal sets are kept once."""
    assert fitted.fixed_sets is not None
    sets = fitted.fixed_sets.sets
    assert [(each.target_skip_ratio, len(each.layers)) for each in sets] == [(0.15, 1), (0.3, 2), (0.4, 3)]
    for smaller, larger in pairwise(sets):
        assert set(smaller.layers) < set(larger.layers)
    assert all(set(each.layers) <= set(range(1, 7)) for each in sets)


def test_the_layer_that_loses_least_of_those_tried_joins(
    fitted: SkipProfile, prepared: Prepared, worded: LoadedModel
) -> None:
    """The first step again, each layer's surrogate tried token by token."""
    assert fitted.fixed_sets is not None
    rows = RowSweep(locate(worded.model), prepared.rows, first=prepared.first, batch_size=4)
    found: SetFit = SetSweep(rows, damage=prepared.damage(), rank=3, maps=1).fit((), prepared.layers)
    tried = sorted(prepared.layers, key=found.damage.__getitem__)[:TRIED]
    losses = {
        layer: naive_loss(prepared, fixed(Surrogates({layer: found.surrogates[layer]}), 2), 4)
        for layer in tried
    }
    assert fitted.fixed_sets.sets[0].layers == [min(losses, key=losses.__getitem__)]


def test_what_a_set_loses_is_measured_as_its_reader_runs_it(fitted: SkipProfile, prepared: Prepared) -> None:
    assert fitted.fixed_sets is not None
    full = naive_loss(prepared, None, None)
    for each in fitted.fixed_sets.sets:
        policy = fitted.fitted_policy(each.target_skip_ratio, 2)
        assert each.excess_nll == pytest.approx(naive_loss(prepared, policy, None) - full, abs=1e-4)
        assert each.by_corpus == {"words": each.excess_nll}


def test_the_largest_set_is_the_policy_and_decodes_as_saved(
    fitted: SkipProfile, worded: LoadedModel, tmp_path: Path
) -> None:
    fitted.save(tmp_path / "sets.json")
    assert {p.name for p in tmp_path.iterdir()} == {"sets.json", "tiny.sets.safetensors"}
    again = SkipProfile.load(tmp_path / "sets.json")
    assert again == fitted and again.to_json() == fitted.to_json()
    policy: Any = again.policy_for()
    assert policy.method == "static+fitted"
    assert list(policy.policy.layers) == fitted.fixed_sets.sets[-1].layers  # type: ignore[union-attr]
    assert policy.to_dict() == fitted.policy_for(0.4).to_dict() != fitted.policy_for(0.3).to_dict()
    model: Any = worded.model
    ids = torch.tensor([[5, 17, 31, 8]])
    outputs = []
    for profile in (fitted, again):
        with skipping(model, profile) as run:
            outputs.append(model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12))
    assert torch.equal(*outputs)
    assert run.report.skip_ratio == pytest.approx(3 / 8)


def test_a_method_takes_the_set_of_its_ratio(fitted: SkipProfile) -> None:
    for target in (0.3, 0.25, 0.2):  # a whole number of FFNs, the closest
        policy: Any = make_policy("static+fitted", fitted, Ask(target_skip_ratio=target, new_tokens=8))
        assert list(policy.policy.layers) == fitted.fixed_sets.sets[1].layers  # type: ignore[union-attr]
    own: Any = make_policy(
        "static+fitted", fitted, Ask(target_skip_ratio=None, new_tokens=8, warm_up_tokens=7)
    )
    assert len(own.policy.layers) == 3 and own.warm_up_tokens == 7
    with pytest.raises(
        TargetOutOfReach, match=r"sets fitted for 0\.15, 0\.3, 0\.4; give one of these, or fit"
    ):
        make_policy("static+fitted", fitted, Ask(target_skip_ratio=0.5, new_tokens=8))


def test_a_profile_without_sets_says_how_to_fit_them(worded_profile: SkipProfile) -> None:
    with pytest.raises(ConfigError, match="no fitted sets; fit some with: skipcal fit --method static"):
        make_policy("static+fitted", worded_profile, Ask(target_skip_ratio=0.25, new_tokens=8))


def test_a_gate_and_sets_stand_beside_each_other(
    fitted: SkipProfile, gated: SkipProfile, worded: LoadedModel, worded_text: Path, tmp_path: Path
) -> None:
    both = gated.with_fixed_sets(fitted.fixed_sets, fitted.policy, fitted.set_tensors())  # type: ignore[arg-type]
    both.save(tmp_path / "both.json")
    assert len(list(tmp_path.iterdir())) == 3
    again = SkipProfile.load(tmp_path / "both.json")
    assert again.gate_policy(0.25).to_dict() == gated.gate_policy(0.25).to_dict()
    assert again.policy_for().to_dict() == fitted.policy_for().to_dict()
    assert again.cosine_policy == gated.cosine_policy


def test_a_set_larger_than_what_may_be_skipped_is_refused_before_the_work(
    worded: LoadedModel, worded_profile: SkipProfile, worded_text: Path
) -> None:
    with pytest.raises(TargetOutOfReach, match=r"target skip ratio 0\.9 is out of reach"):
        fit_fixed_sets(
            worded, worded_profile, fit_config(worded_text, method="static", target_skip_ratio=0.9)
        )


def test_sweeps_are_of_a_gate_alone() -> None:
    with pytest.raises(ValueError, match="sweeps is of a gate"):
        FitConfig(method="static", sweeps=2)
