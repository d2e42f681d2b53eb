"""Reduced-rank ridge regression: against the singular values, and against other maps of its rank."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from skipcal.core.surrogates import LowRank, rank_for
from skipcal.errors import ConfigError
from skipcal.fit.moments import Moments, ridge
from skipcal.fit.surrogate import fit_low_rank, unexplained

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


@pytest.mark.parametrize("rank", [1, 5, HIDDEN])
def test_unexplained_is_the_share_of_variance_left(
    sample: tuple[Tensor, Tensor, Tensor], moments: Moments, rank: int
) -> None:
    u, f, w = sample
    found = fit_low_rank(moments, rank)
    missed = f - found(u.float()).double()
    left = np.average(missed.square().sum(-1), weights=w)
    total = np.average((f - w @ f / w.sum()).square().sum(-1), weights=w)
    assert unexplained(moments, found) == pytest.approx(left / total, abs=FLOAT32)
    assert 0 < unexplained(moments, found) < 1


def test_a_constant_leaves_all_of_the_variance(moments: Moments) -> None:
    constant = LowRank(torch.zeros(1, HIDDEN), torch.zeros(HIDDEN, 1), moments.means()[1].float())
    assert unexplained(moments, constant) == pytest.approx(1.0)


def test_a_planted_map_is_found_without_noise() -> None:
    random = torch.Generator().manual_seed(2)
    down, up = torch.randn(3, HIDDEN, generator=random), torch.randn(HIDDEN, 3, generator=random)
    planted = LowRank(down, up, torch.randn(HIDDEN, generator=random))
    u = torch.randn(200, HIDDEN, generator=random)
    moments = Moments.empty(HIDDEN, HIDDEN)
    moments.add(u, planted(u))
    found = fit_low_rank(moments, 3, penalty=0.0)
    torch.testing.assert_close(found(u), planted(u), atol=1e-4, rtol=1e-4)
    assert unexplained(moments, found) < 1e-9


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
