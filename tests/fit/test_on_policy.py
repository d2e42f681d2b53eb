"""The sweep: layers run one by one, skips applied, and a session that skips the same tokens."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import attentive, lively
from safetensors.torch import load_file
from swept import FIRST, ROWS, WARM_UP
from torch import Tensor

from skipcal.arch.locate import Architecture, Block, locate, observe
from skipcal.core.gate import NEVER, GatePolicy, GateRule, Gates
from skipcal.core.surrogates import RoutedLowRank, Surrogates, direction
from skipcal.fit.damage import FisherDamage, fisher_damage
from skipcal.fit.gate import fit_gate, gate_inputs, sharpened
from skipcal.fit.layer_sweep import LayerRunner, StreamStore
from skipcal.fit.moments import Moments
from skipcal.fit.on_policy import RUN_WEIGHT, Fitted, ScoreHistogram, Sweep
from skipcal.fit.surrogate import fit_low_rank
from skipcal.runtime.session import skipping

LAYERS = (1, 2, 3, 4)
FAMILIES = {
    "llama": {},
    "gpt2": {},
    "opt": {},
    "granitemoeshared": {},
    "gpt_neox": {},
    "falcon": {},
    "mixtral": {},
    "minimax": {},
    "granite": {},
    "olmo2": {},
    "gemma2": {"sliding_window": 4},
    "gemma3_text": {"sliding_window": 4},
    "mistral": {"sliding_window": 4},
}


def sweep(model: Any, damage: FisherDamage, batch_size: int = 4, maps: int = 1) -> Sweep:
    return Sweep(
        locate(model),
        ROWS,
        layers=LAYERS,
        damage=damage,
        rank=3,
        maps=maps,
        first=FIRST,
        batch_size=batch_size,
    )


# Layers one by one


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_layers_one_by_one_are_the_whole_stack(family: str) -> None:
    model: Any = attentive(lively(family, **FAMILIES[family]))
    architecture = locate(model)
    runner = LayerRunner(architecture)
    parts: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(layer: int, h: Tensor, f: Tensor) -> None:
        parts[layer] = (h.clone(), f.clone())

    for ids in (torch.tensor(ROWS[:3]), torch.tensor(ROWS[3:6]), torch.tensor(ROWS[6:7])):
        with observe(architecture.blocks, keep):
            last = last_streams(architecture, model, ids)
        stream = runner.embed(ids)
        for block in architecture.blocks:
            h, f, stream = runner.run(block, stream)
            for mine, theirs in zip((h, f), parts[block.index], strict=True):
                torch.testing.assert_close(mine, theirs.reshape(mine.shape), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(stream, last, atol=1e-5, rtol=1e-5)


def test_a_window_attention_is_not_blind_to_the_window() -> None:
    """The families above with a window: their layers differ from those of a model without one."""
    ids = torch.tensor(ROWS[:1])
    models = [attentive(lively("gemma2", sliding_window=w)) for w in (4, 64)]
    assert not torch.allclose(models[0](ids).logits, models[1](ids).logits, atol=1e-2)


def test_the_runner_leaves_nothing_on_the_model(model: Any) -> None:
    def state() -> list[Any]:
        return [
            (sorted(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()
        ]

    before = state()
    runner = LayerRunner(locate(model))
    for _ in range(2):  # the second time only the embedding runs
        runner.run(locate(model).blocks[0], runner.embed(torch.tensor(ROWS[:2])))
    with pytest.raises(IndexError):
        runner.embed(torch.tensor([[10_000] * 7]))
    assert state() == before


# The sweep against a session


class Watched:
    """What a sweep did: skips by layer, and the streams it wrote last."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.skips: dict[int, int] = {}
        self.streams: dict[int, Tensor] = {}
        apply, write = Sweep._apply, StreamStore.write

        def applied(sweep: Any, block: Block, *args: Any) -> int:
            self.skips[block.index] = apply(sweep, block, *args)
            return self.skips[block.index]

        def written(store: Any, number: int, **tensors: Tensor) -> None:
            if "stream" in tensors:
                self.streams[number] = tensors["stream"].clone()
            write(store, number, **tensors)

        monkeypatch.setattr(Sweep, "_apply", applied)
        monkeypatch.setattr(StreamStore, "write", written)

    def last(self) -> Tensor:
        return torch.cat([self.streams[n] for n in sorted(self.streams)])


def last_streams(architecture: Architecture, model: Any, ids: Tensor) -> Tensor:
    """What the last layer returns."""
    found: list[Tensor] = []
    handle = architecture.blocks[-1].layer.register_forward_hook(
        lambda m, a, y: found.append(y[0] if isinstance(y, tuple) else y)
    )
    model(ids, use_cache=False)
    handle.remove()
    return found[-1]


def test_a_clean_sweep_skips_nothing(
    model: Any, damage: FisherDamage, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(monkeypatch)
    found = sweep(model, damage).fit()
    assert found.skip_ratio == 0.0
    assert set(watched.skips.values()) == {0}
    plain = last_streams(locate(model), model, torch.tensor(ROWS))
    torch.testing.assert_close(watched.last(), plain, atol=1e-5, rtol=1e-5)
    assert int(found.scores.counts.sum()) == len(ROWS) * (20 - FIRST) * len(LAYERS)


@pytest.mark.parametrize("family", ["llama", "granite", "olmo2", "opt"])
def test_a_sweep_skips_what_a_session_with_its_gates_skips(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Teacher-forced, with the gates and surrogates that the sweep returned: same tokens, same streams."""
    model: Any = attentive(lively(family, num_hidden_layers=6))
    architecture = locate(model)
    metric = fisher_damage(model, architecture, [torch.tensor(ROWS[:4])], first=FIRST, seed=0)
    clean = sweep(model, metric).fit()
    threshold = clean.scores.threshold(0.4)
    watched = Watched(monkeypatch)
    found = sweep(model, metric).fit(clean.gates, threshold)
    policy = GatePolicy(
        gates=found.gates, surrogates=found.surrogates, threshold=threshold, warm_up_tokens=WARM_UP
    )
    with skipping(model, policy=policy, teacher_forced=True) as run:
        streams = last_streams(architecture, model, torch.tensor(ROWS))
    tokens = len(ROWS) * (20 - FIRST)
    assert run.report.decode_steps_after_warm_up == tokens
    assert run.report.skipped_per_layer == (0, *(watched.skips[layer] for layer in LAYERS), 0)
    assert found.skip_ratio == run.report.skip_ratio
    assert 0.1 < found.skip_ratio < 0.5
    partly = [n for n in watched.skips.values() if 0.03 * tokens < n < 0.97 * tokens]
    assert len(partly) >= 2, f"all or nothing would test no mask: {watched.skips}"
    limit = 1e-4 * float(streams.abs().max())  # gates and maps fitted in float64 are used in float32
    torch.testing.assert_close(watched.last(), streams, atol=limit, rtol=0.0)


def test_the_first_candidate_is_fitted_as_written_down_naively(model: Any, damage: FisherDamage) -> None:
    """No skip has perturbed its stream. Weight 1 for tokens that the earlier gates would skip."""
    prior = sweep(model, damage).fit()
    threshold = prior.scores.threshold(0.4)
    found = sweep(model, damage).fit(prior.gates, threshold)
    h, f = stream_and_output(model, 1)
    below = torch.as_tensor(GateRule(prior.gates, threshold).scores(1, h)) < threshold
    weighted = Moments.empty(32, 32)
    w = torch.where(below, 1.0, RUN_WEIGHT)
    weighted.add(direction(h), f, w)
    surrogate = fit_low_rank(weighted, 3, metric=damage.metric(1))
    probed = Moments.empty(33, 1)
    log_damage = damage(1, f - surrogate(direction(h)), h).log()
    probed.add(gate_inputs(h), log_damage[:, None])
    gate = fit_gate(probed)
    u = direction(h)
    # The streams of batches of 4 and of 10 rows differ by 1e-6, and the inverse covariances magnify it.
    torch.testing.assert_close(found.surrogates.maps[1](u), surrogate(u), atol=1e-3, rtol=1e-3)
    mine = torch.as_tensor(GateRule(found.gates, 0.0).scores(1, h))
    sharp = sharpened(gate, damage.sensitivity(1))
    torch.testing.assert_close(mine, sharp(gate_inputs(h))[:, 0].float(), atol=1e-3, rtol=1e-3)
    theirs = gate(gate_inputs(h))[:, 0].float()
    missed = log_damage - (theirs - (theirs - log_damage).mean())
    assert found.r_squared[0] == pytest.approx(1 - float(missed.var() / log_damage.var()), abs=1e-3)
    left = float(w @ (f - surrogate(direction(h))).square().sum(-1))
    total = float(w @ (f - w @ f / w.sum()).square().sum(-1))
    assert found.surrogate_error[0] == pytest.approx(left / total, abs=1e-3)


def test_a_later_surrogate_aims_half_way_to_the_full_stream(model: Any, damage: FisherDamage) -> None:
    """On the stream that the first candidate's skips leave, by a session with that gate alone."""
    prior = sweep(model, damage).fit()
    clean_h, clean_f = stream_and_output(model, 1)
    threshold = float(torch.as_tensor(GateRule(prior.gates, NEVER).scores(1, clean_h)).median())
    found = sweep(model, damage).fit(prior.gates, threshold)
    first = Gates((1,), found.gates.weight[:1], found.gates.log_norm_weight[:1], found.gates.bias[:1])
    policy = GatePolicy(
        gates=first,
        surrogates=Surrogates({1: found.surrogates.maps[1]}),
        threshold=threshold,
        warm_up_tokens=WARM_UP,
    )
    clean_h, clean_f = stream_and_output(model, 2)
    with skipping(model, policy=policy, teacher_forced=True) as run:
        h, f = stream_and_output(model, 2)
    assert run.report.skipped_blocks > 0 and not torch.allclose(h, clean_h, atol=1e-3)
    wanted = 0.5 * f + 0.5 * (clean_h + clean_f - h)
    below = torch.as_tensor(GateRule(prior.gates, threshold).scores(2, h)) < threshold
    moments = Moments.empty(32, 32)
    moments.add(direction(h), wanted, torch.where(below, 1.0, RUN_WEIGHT))
    expected = fit_low_rank(moments, 3, metric=damage.metric(2))
    u = direction(h)
    torch.testing.assert_close(found.surrogates.maps[2](u), expected(u), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("batch_size", [1, 10])
def test_of_several_maps_each_is_fitted_to_its_own_tokens(
    model: Any, damage: FisherDamage, batch_size: int
) -> None:
    found = sweep(model, damage, batch_size, maps=3).fit()
    h, f = stream_and_output(model, 1)
    u, maps = direction(h), found.surrogates.maps[1]
    assert isinstance(maps, RoutedLowRank)
    one = sweep(model, damage).fit().surrogates.maps[1]
    torch.testing.assert_close(maps.down[:3], one.down, atol=1e-3, rtol=1e-3)
    centers = maps.down[3:]
    chosen = torch.cdist(u, centers).argmin(-1)
    assert len(chosen.unique()) == 3
    for k in range(3):
        missed = (f - maps(u))[chosen == k]
        alike = (f - one(u))[chosen == k]
        assert float(missed.square().sum()) < float(alike.square().sum())
    left = float((f - maps(u)).square().sum() / (f - f.mean(0)).square().sum())
    assert found.surrogate_error[0] == pytest.approx(left, abs=1e-3)


def stream_and_output(model: Any, layer: int) -> tuple[Tensor, Tensor]:
    """h and f of all tokens past the warm-up, [tokens, hidden]."""
    parts: dict[int, tuple[Tensor, Tensor]] = {}
    with observe(locate(model).blocks, lambda i, h, f: parts.update({i: (h, f)})):
        model(torch.tensor(ROWS), use_cache=False)
    h, f = (part[:, FIRST:].reshape(-1, part.shape[-1]) for part in parts[layer])
    return h, f


@pytest.fixture(scope="module")
def by_batches(model: Any, damage: FisherDamage) -> list[Fitted]:
    with torch.no_grad():
        found = []
        for size in (1, 3, 10):
            clean = sweep(model, damage, size).fit()
            found.append(sweep(model, damage, size).fit(clean.gates, clean.scores.threshold(0.4)))
        return found


def test_the_result_does_not_depend_on_the_batch_size(by_batches: list[Fitted]) -> None:
    """Matrices of another height round otherwise, by 1e-6; the inverse covariances magnify it."""
    one, *others = by_batches
    u = direction(torch.randn(50, 32))
    for other in others:
        assert other.skip_ratio == one.skip_ratio
        assert other.r_squared == pytest.approx(one.r_squared, rel=1e-3)
        assert other.surrogate_error == pytest.approx(one.surrogate_error, rel=1e-3)
        for layer in LAYERS:
            mine, theirs = (fit.surrogates.maps[layer](u) for fit in (other, one))
            torch.testing.assert_close(mine, theirs, atol=1e-3, rtol=1e-3)


def test_only_candidates_are_fitted(by_batches: list[Fitted]) -> None:
    found = by_batches[0]
    assert found.gates.layers == LAYERS == tuple(found.surrogates.maps)
    assert found.gates.weight.shape == (4, 32)
    assert found.gates.weight.dtype == found.gates.bias.dtype == torch.float32
    assert all(0 < r < 1 for r in (*found.r_squared, *found.surrogate_error))


def test_no_more_than_two_batches_are_in_memory(
    model: Any, damage: FisherDamage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that was read, and the next."""
    seen: list[tuple[int, weakref.ref[Tensor]]] = []
    loads = most = 0

    def counted(path: Path) -> dict[str, Tensor]:
        nonlocal loads, most
        loads += 1
        found = load_file(path)
        seen.extend((loads, weakref.ref(t)) for t in found.values())
        most = max(most, len({n for n, ref in seen if ref() is not None}))
        return found

    monkeypatch.setattr("skipcal.fit.layer_sweep.load_file", counted)
    sweep(model, damage, 1).fit()
    assert loads > 10 * 6
    assert most <= 2


def test_the_folder_of_streams_goes_even_after_an_exception(
    model: Any, damage: FisherDamage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    sweep(model, damage).fit()
    assert list(tmp_path.iterdir()) == []

    def stop(*args: Any) -> Any:
        assert list(tmp_path.iterdir()), "the streams wait there"
        raise KeyboardInterrupt

    monkeypatch.setattr("skipcal.fit.on_policy.fit_gate", stop)
    with pytest.raises(KeyboardInterrupt):
        sweep(model, damage).fit()
    assert list(tmp_path.iterdir()) == []
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# Scores


def histogram() -> tuple[np.ndarray, ScoreHistogram]:
    scores = np.random.default_rng(0).normal(-4, 2, (3, 700))
    found = ScoreHistogram()
    for part in scores:
        found.add(torch.tensor(part).reshape(7, 100))
    return scores.ravel(), found


@pytest.mark.parametrize("share", [0.001, 0.1, 0.25, 0.5, 0.9, 1.0])
def test_thresholds_are_quantiles_to_the_width_of_a_bin(share: float) -> None:
    scores, found = histogram()
    threshold = found.threshold(share)
    assert threshold == pytest.approx(np.quantile(scores, share, method="inverted_cdf"), abs=0.0101)
    assert (scores < threshold).mean() >= share
    assert found.share_below(threshold) == pytest.approx((scores < threshold).mean(), abs=1e-12)


@pytest.mark.parametrize("threshold", [-200.0, -9.0, -4.003, 0.0, 1e9])
def test_the_share_below_a_threshold_is_counted(threshold: float) -> None:
    scores, found = histogram()
    near = ((scores > threshold - 0.01) & (scores < threshold + 0.01)).mean()
    assert found.share_below(threshold) == pytest.approx((scores < threshold).mean(), abs=near + 1e-12)


def test_scores_beyond_the_histogram_count_at_its_ends() -> None:
    found = ScoreHistogram()
    found.add(torch.tensor([-1e4, -69.0, 0.0, 1e4]))
    assert int(found.counts.sum()) == 4
    assert found.share_below(-59.0) == 0.5
    assert found.share_below(1.0) == 0.75
