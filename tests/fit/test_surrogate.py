"""Reduced-rank ridge regression: against the singular values, and against other maps of its rank."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from skipcal.core.surrogates import LowRank, RoutedLowRank, rank_for
from skipcal.errors import ConfigError
from skipcal.fit.moments import Moments, ridge
from skipcal.fit.surrogate import PENALTY as RIDGE
from skipcal.fit.surrogate import PULL, fit_low_rank, fit_routed, fit_surrogate, k_means

HIDDEN = 12
PENALTY = 0.05
# Maps are stored in float32: 1e-7 of values of about 10.
FLOAT32 = 1e-5


@pytest.fixture
def sample() -> tuple[Tensor, Tensor, Tensor]:
    """Inputs u, targets f and weights: f follows u by falling singular values, with noise and a mean."""
    random = torch.Generator().manual_seed(0)
    u = torch.randn(400, HIDDEN, generator=random, dtype=torch.float64) @ torch.diag(
        torch.linspace(0.2, 3, HIDDEN, dtype=torch.float64)
    )
    way = torch.randn(HIDDEN, HIDDEN, generator=random, dtype=torch.float64) @ torch.diag(
        0.6 ** torch.arange(HIDDEN, dtype=torch.float64)
    )
    noise = torch.randn(400, HIDDEN, generator=random, dtype=torch.float64)
    w = torch.where(torch.rand(400, generator=random) < 0.3, 1.0, 0.05).double()
    return u + 0.5, u @ way.T + noise + 2.0, w


@pytest.fixture
def moments(sample: tuple[Tensor, Tensor, Tensor]) -> Moments:
    found = Moments.empty(HIDDEN, HIDDEN)
    found.add(*sample)
    return found


def penalised_loss(sample: tuple[Tensor, Tensor, Tensor], b: Tensor) -> float:
    """Weighted squares of f - b u about their means, and the penalty: what ridge minimises. b: [f, u]."""
    u, f, w = sample
    share = w / w.sum()
    u, f = u - share @ u, f - share @ f
    missed = share @ (f - u @ b.T).square().sum(-1)
    return float(missed + PENALTY * ((share @ u.square()) * b.square().sum(0)).sum())


def as_matrix(found: LowRank) -> Tensor:
    return found.up.double() @ found.down.double()


def test_at_full_rank_it_is_ridge(sample: tuple[Tensor, Tensor, Tensor], moments: Moments) -> None:
    found = fit_low_rank(moments, HIDDEN, penalty=PENALTY)
    expected = ridge(moments, PENALTY)(sample[0])
    torch.testing.assert_close(found(sample[0].float()).double(), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_it_is_the_projection_on_leading_singular_vectors_of_what_ridge_predicts(
    sample: tuple[Tensor, Tensor, Tensor], moments: Moments, rank: int
) -> None:
    """The penalty enters as rows of its own, as in an augmented least squares."""
    u, _, w = sample
    share = (w / w.sum()).numpy()
    centred = u.numpy() - share @ u.numpy()
    scale = np.sqrt(share @ centred**2)
    rows = np.concatenate([np.sqrt(share)[:, None] * centred, np.sqrt(PENALTY) * np.diag(scale)])
    b = ridge(moments, PENALTY).coefficients.numpy()
    leading = np.linalg.svd(rows @ b)[2][:rank]
    found = fit_low_rank(moments, rank, penalty=PENALTY)
    np.testing.assert_allclose(as_matrix(found), (b @ leading.T @ leading).T, atol=FLOAT32)
    assert np.linalg.matrix_rank(as_matrix(found).numpy(), tol=1e-4) == rank
    assert found.down.shape == (rank, HIDDEN) and found.up.shape == (HIDDEN, rank)


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_no_other_map_of_its_rank_has_a_lower_loss(
    sample: tuple[Tensor, Tensor, Tensor], moments: Moments, rank: int
) -> None:
    best = as_matrix(fit_low_rank(moments, rank, penalty=PENALTY))
    loss = penalised_loss(sample, best)
    full = ridge(moments, PENALTY).coefficients.T
    random = torch.Generator().manual_seed(1)
    for size in (1e-3, 1e-1, 10.0):
        for _ in range(20):
            around = torch.randn(HIDDEN, HIDDEN, generator=random, dtype=torch.float64)
            left = torch.linalg.svd(best + size * around)[0][:, :rank]
            assert penalised_loss(sample, left @ left.T @ full) >= loss - FLOAT32
            assert penalised_loss(sample, left @ (left.T @ best)) >= loss - FLOAT32


def test_a_higher_rank_never_loses(sample: tuple[Tensor, Tensor, Tensor], moments: Moments) -> None:
    fits = [fit_low_rank(moments, rank, penalty=PENALTY) for rank in range(1, HIDDEN + 1)]
    losses = [penalised_loss(sample, as_matrix(fit)) for fit in fits]
    assert all(a > b for a, b in itertools.pairwise(losses))


@pytest.mark.parametrize("rank", [1, 5, HIDDEN])
def test_the_bias_leaves_no_mean_error(
    sample: tuple[Tensor, Tensor, Tensor], moments: Moments, rank: int
) -> None:
    u, f, w = sample
    missed = f - fit_low_rank(moments, rank)(u.float()).double()
    assert float((w @ missed / w.sum()).abs().max()) < FLOAT32


def test_a_planted_map_is_found_without_noise() -> None:
    random = torch.Generator().manual_seed(2)
    down, up = torch.randn(3, HIDDEN, generator=random), torch.randn(HIDDEN, 3, generator=random)
    planted = LowRank(down, up, torch.randn(HIDDEN, generator=random))
    u = torch.randn(200, HIDDEN, generator=random)
    moments = Moments.empty(HIDDEN, HIDDEN)
    moments.add(u, planted(u))
    found = fit_low_rank(moments, 3, penalty=0.0)
    torch.testing.assert_close(found(u), planted(u), atol=1e-4, rtol=1e-4)


# Several maps


def in_batches(*parts: Tensor, size: int = 7) -> Any:
    return lambda: zip(*(part.split(size) for part in parts), strict=True)


def test_each_of_several_maps_is_a_ridge_regression_on_its_own_tokens(
    sample: tuple[Tensor, Tensor, Tensor],
) -> None:
    """By the normal equations of the weighted loss, with what draws it to the map of all tokens."""
    u, f, w = (part.float() for part in sample)
    found = fit_surrogate(
        in_batches(u, f, w), HIDDEN, rank=4, maps=3, metric=None, device=torch.device("cpu")
    )
    assert isinstance(found, RoutedLowRank)
    moments = Moments.empty(HIDDEN, HIDDEN)
    moments.add(u, f, w)
    one = fit_low_rank(moments, 4)
    assert torch.equal(found.down[:4], one.down)
    centers = found.down[4:]
    chosen = torch.cdist(u, centers).argmin(-1)
    assert sorted(chosen.unique().tolist()) == [0, 1, 2]
    for k in range(3):
        own = chosen == k
        z, y, weight = (
            (u[own] @ one.down.T).double(),
            f[own].double(),
            w[own].double() / w[own].double().sum(),
        )
        mean_z, mean_y = weight @ z, weight @ y
        z, y = z - mean_z, y - mean_y
        spread = weight @ z.square()
        # |y - z B|^2 + PULL |B - T|^2 + RIDGE |B|^2, the last two by each input's variance
        rows = [weight.sqrt()[:, None] * z, (PULL * spread).sqrt().diag()]
        wanted = [weight.sqrt()[:, None] * y, (PULL * spread).sqrt()[:, None] * one.up.T.double()]
        rows.append((RIDGE * (1 + PULL) * spread).sqrt().diag())
        wanted.append(torch.zeros(4, HIDDEN, dtype=torch.float64))
        best = torch.linalg.lstsq(torch.cat(rows), torch.cat(wanted)).solution
        torch.testing.assert_close(found.up[k].double(), best.T, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found.bias[k].double(), mean_y - mean_z @ best, atol=1e-4, rtol=1e-4)


def test_planted_maps_are_found_where_one_map_cannot_follow() -> None:
    random = torch.Generator().manual_seed(2)
    centers = 8 * torch.randn(3, HIDDEN, generator=random)
    kind = torch.arange(600) % 3
    u = centers[kind] + torch.randn(600, HIDDEN, generator=random)
    down, up = torch.randn(3, HIDDEN, generator=random), torch.randn(3, HIDDEN, 3, generator=random)
    f = (up[kind] @ (u @ down.T)[:, :, None])[:, :, 0]
    ones, device = torch.ones(600), torch.device("cpu")
    one, several = (
        fit_surrogate(in_batches(u, f, ones), HIDDEN, rank=9, maps=maps, metric=None, device=device)
        for maps in (1, 3)
    )
    left = [float((f - each(u)).square().sum() / f.square().sum()) for each in (one, several)]
    assert left[1] < 0.2 * left[0]


def test_a_region_without_tokens_gets_the_map_of_all(sample: tuple[Tensor, Tensor, Tensor]) -> None:
    u, f, w = (part.float() for part in sample)
    moments = Moments.empty(HIDDEN, HIDDEN)
    moments.add(u, f, w)
    one = fit_low_rank(moments, 4)
    z = u @ one.down.T
    full, none = Moments.empty(4, HIDDEN), Moments.empty(4, HIDDEN)
    full.add(z, f, w)
    found = fit_routed(one, torch.stack([u.mean(0), 1e3 * torch.ones(HIDDEN)]), [full, none])
    assert torch.equal(found.up[1], one.up) and torch.equal(found.bias[1], one.bias)


def test_a_region_of_one_token_gets_about_the_map_of_all_through_that_token(
    sample: tuple[Tensor, Tensor, Tensor],
) -> None:
    u, f, w = (part.float() for part in sample)
    moments, own = Moments.empty(HIDDEN, HIDDEN), Moments.empty(4, HIDDEN)
    moments.add(u, f, w)
    one = fit_low_rank(moments, 4)
    own.add(u[:1] @ one.down.T, f[:1], torch.ones(1))
    found = fit_routed(one, u[:1], [own])
    torch.testing.assert_close(found.up[0], one.up, atol=1e-2, rtol=2 * RIDGE)
    torch.testing.assert_close(found(u[:1]), f[:1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [3, 50])
def test_centers_are_those_of_lloyds_iteration(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the same tokens, by distances and means one by one; 0 weighs nothing."""
    random = torch.Generator().manual_seed(3)
    u, w = torch.randn(60, HIDDEN, generator=random), torch.rand(60, generator=random)
    w[::4] = 0.0
    samples = in_batches(u, u, w, size=size)
    monkeypatch.setattr("skipcal.fit.surrogate.ROUNDS", 0)
    centers = k_means(samples, 4, tokens=60).double()
    assert all(float((u.bfloat16().double()[w > 0] - c).norm(dim=-1).min()) == 0 for c in centers)
    monkeypatch.setattr("skipcal.fit.surrogate.ROUNDS", 1)
    first = k_means(samples, 4, tokens=60)
    drawn = [int((u.bfloat16().double() - c).norm(dim=-1).argmin()) for c in centers]
    distances = [[float((token - u[place]).norm()) for place in drawn] for token in u]
    nearest_of = [each.index(min(each)) for each in distances]
    for k in range(4):
        own = [n for n in range(60) if nearest_of[n] == k]
        mean = sum(float(w[n]) * u[n].double() for n in own) / sum(float(w[n]) for n in own)
        torch.testing.assert_close(first[k].double(), mean, atol=1e-2, rtol=1e-2)  # kept in bfloat16


def test_every_so_many_tokens_are_looked_at_wherever_batches_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skipcal.fit.surrogate.SAMPLE", 10)
    u, w = torch.randn(60, HIDDEN), torch.rand(60)
    by_size = [k_means(in_batches(u, u, w, size=size), 3, tokens=60) for size in (1, 7, 60)]
    direct = k_means(in_batches(u[::6], u[::6], w[::6]), 3, tokens=10)
    assert all(torch.equal(each, direct) for each in by_size)


@pytest.mark.parametrize("budget", [0.02, 0.05, 0.2])
@pytest.mark.parametrize("element_bytes", [2, 4])
def test_the_rank_is_the_largest_within_the_budget(budget: float, element_bytes: int) -> None:
    hidden, ffn_bytes = 64, 3 * 64 * 160 * element_bytes

    def share(rank: int) -> float:
        return (2 * rank * hidden + hidden) * element_bytes / ffn_bytes

    rank = rank_for(budget, hidden, ffn_bytes, element_bytes)
    assert share(rank) <= budget < share(rank + 1)


def test_the_rank_stays_within_one_and_the_hidden_size() -> None:
    assert rank_for(1e-6, 64, 100_000, 4) == 1
    assert rank_for(0.99, 8, 10**9, 4) == 8


@pytest.mark.parametrize("budget", [0.0, 1.0, -0.1, 5.0, float("nan")])
def test_a_budget_that_is_no_share_is_refused(budget: float) -> None:
    with pytest.raises(ConfigError, match=r"not within \(0, 1\)"):
        rank_for(budget, 64, 100_000, 4)
