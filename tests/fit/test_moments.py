"""Weighted moments and ridge regression against NumPy on all samples at once."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from skipcal.fit.moments import Moments, penalised, ridge


def assert_close(mine: Any, theirs: Any) -> None:
    """Sums in float64 over 90 samples of up to 1e3, in another order."""
    np.testing.assert_allclose(mine, theirs, atol=1e-10, rtol=1e-10)


def samples(n: int = 90, p: int = 5, q: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs of unlike scales and means, targets that follow them, weights from 0.05 to 1."""
    random = np.random.default_rng(0)
    x = random.normal(size=(n, p)) * [0.1, 1.0, 3.0, 10.0, 1.0][:p] + [5.0, 0.0, -2.0, 1.0, 0.5][:p]
    y = x @ random.normal(size=(p, q)) + random.normal(size=(n, q)) + 7.0
    return x, y, random.choice([0.05, 1.0], size=n)


def moments_of(x: np.ndarray, y: np.ndarray, w: np.ndarray | None) -> Moments:
    found = Moments.empty(x.shape[1], y.shape[1])
    found.add(torch.tensor(x), torch.tensor(y), None if w is None else torch.tensor(w))
    return found


def test_sums_are_those_of_a_loop_over_samples() -> None:
    x, y, w = samples()
    found = moments_of(x, y, w)
    assert_close(found.weight, sum(w))
    assert_close(found.x, sum(c * a for c, a in zip(w, x, strict=True)))
    assert_close(found.y, sum(c * b for c, b in zip(w, y, strict=True)))
    assert_close(found.xx, sum(c * np.outer(a, a) for c, a in zip(w, x, strict=True)))
    outer = sum(c * np.outer(a, b) for c, a, b in zip(w, x, y, strict=True))
    assert_close(found.xy, outer)
    assert_close(found.yy, sum(c * b**2 for c, b in zip(w, y, strict=True)))


def test_without_weights_every_sample_counts_once() -> None:
    x, y, _ = samples()
    for mine, ones in zip(
        vars(moments_of(x, y, None)).values(), vars(moments_of(x, y, np.ones(90))).values(), strict=True
    ):
        assert_close(mine, ones)


def test_a_weight_of_two_is_the_sample_twice() -> None:
    x, y, w = samples()
    twice = np.concatenate([x, x[:30]]), np.concatenate([y, y[:30]]), np.concatenate([w, w[:30]])
    doubled = w * np.where(np.arange(90) < 30, 2.0, 1.0)
    for mine, theirs in zip(
        vars(moments_of(x, y, doubled)).values(), vars(moments_of(*twice)).values(), strict=True
    ):
        assert_close(mine, theirs)


def test_parts_add_up_to_the_whole_in_any_order() -> None:
    x, y, w = samples()
    whole = vars(moments_of(x, y, w))
    parts = [moments_of(x[place], y[place], w[place]) for place in np.split(np.arange(90), [7, 50])]
    for first, second, third in itertools.permutations(parts):
        for name, value in vars(first + second + third).items():
            assert_close(value, whole[name])


def test_adding_leaves_both_parts_as_they_were() -> None:
    x, y, w = samples()
    a, b = moments_of(x[:40], y[:40], w[:40]), moments_of(x[40:], y[40:], w[40:])
    before = a.xx.clone(), b.xx.clone()
    _ = a + b
    assert torch.equal(a.xx, before[0]) and torch.equal(b.xx, before[1])


def test_samples_of_half_precision_are_summed_in_double() -> None:
    x, y, _ = samples()
    rough = torch.tensor(x).bfloat16(), torch.tensor(y).bfloat16()
    found = Moments.empty(5, 3)
    found.add(*rough)
    expected = rough[0].double().numpy().T @ rough[1].double().numpy()
    assert_close(found.xy, expected)


def test_covariances_and_variance_are_numpys() -> None:
    x, y, w = samples()
    xx, xy = moments_of(x, y, w).covariances()
    expected = np.cov(x.T, y.T, aweights=w, ddof=0)
    assert_close(xx, expected[:5, :5])
    assert_close(xy, expected[:5, 5:])
    assert_close(moments_of(x, y, w).variance(), np.diag(expected)[5:])


def naive_ridge(x: np.ndarray, y: np.ndarray, w: np.ndarray, penalty: float) -> tuple[np.ndarray, np.ndarray]:
    """Least squares on standardised inputs, with a row sqrt(penalty) e_j for each: B and the intercept."""
    share = w / w.sum()
    mean, center = share @ x, share @ y
    scale = np.sqrt(share @ (x - mean) ** 2)
    rows = np.sqrt(share)[:, None] * (x - mean) / scale
    goals = np.sqrt(share)[:, None] * (y - center)
    rows = np.concatenate([rows, np.sqrt(penalty) * np.eye(len(scale))])
    goals = np.concatenate([goals, np.zeros((len(scale), y.shape[1]))])
    b = np.linalg.lstsq(rows, goals, rcond=None)[0] / scale[:, None]
    return b, center - mean @ b


@pytest.mark.parametrize("penalty", [0.0, 1e-3, 0.3, 10.0])
def test_ridge_is_least_squares_with_a_row_for_each_penalty(penalty: float) -> None:
    x, y, w = samples()
    found = ridge(moments_of(x, y, w), penalty)
    b, intercept = naive_ridge(x, y, w, penalty)
    # The floor of 1e-12 of the largest variance (90 here, the smallest is 0.01) shifts the fit by 1e-8.
    np.testing.assert_allclose(found.coefficients, b, atol=1e-6)
    np.testing.assert_allclose(found.intercept, intercept, atol=1e-5)
    np.testing.assert_allclose(found(torch.tensor(x)), x @ b + intercept, atol=1e-5)


def test_without_a_penalty_it_is_lstsq_with_a_column_of_ones() -> None:
    x, y, w = samples()
    rows = np.concatenate([x, np.ones((90, 1))], axis=1) * np.sqrt(w)[:, None]
    b = np.linalg.lstsq(rows, y * np.sqrt(w)[:, None], rcond=None)[0]
    found = ridge(moments_of(x, y, w), 0.0)
    np.testing.assert_allclose(found.coefficients, b[:-1], atol=1e-6)
    np.testing.assert_allclose(found.intercept, b[-1], atol=1e-5)


def test_inputs_that_never_change_leave_a_system_that_has_a_solution() -> None:
    """The floor raises the diagonal; a diagonal below zero would turn the fit around."""
    raised = penalised(torch.zeros(3, 3, dtype=torch.float64), 0.0)
    assert (raised.diagonal() > 0).all()
    cov = torch.diag(torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64))
    assert_close(penalised(cov, 0.5).diagonal(), [6 + 4e-12, 1.5 + 4e-12, 4e-12])


def test_predictions_are_for_inputs_of_any_precision() -> None:
    x, y, w = samples()
    found = ridge(moments_of(x, y, w), 0.3)
    rough = torch.tensor(x, dtype=torch.float32)
    assert_close(found(rough), found(rough.double()))


def test_the_intercept_is_not_penalised() -> None:
    """However large the penalty, predictions keep the weighted mean of the targets."""
    x, y, w = samples()
    found = ridge(moments_of(x, y, w), 1e9)
    assert float(found.coefficients.abs().max()) < 1e-6
    np.testing.assert_allclose(found.intercept, np.average(y, axis=0, weights=w), atol=1e-6)


def test_the_penalty_knows_no_units() -> None:
    """An input in millimetres instead of metres predicts the same."""
    x, y, w = samples()
    there = np.array([10.0, 10.0, 1.0, 0.1, 1.0])
    plain, scaled = ridge(moments_of(x, y, w), 0.3), ridge(moments_of(x * there, y, w), 0.3)
    # The floor, 1e-12 of the largest variance, is not on each input's own scale.
    np.testing.assert_allclose(scaled(torch.tensor(x * there)), plain(torch.tensor(x)), atol=1e-6)


def test_an_input_that_never_changes_takes_no_part() -> None:
    x, y, w = samples()
    dead = np.concatenate([x, np.full((90, 1), 4.0)], axis=1)
    found = ridge(moments_of(dead, y, w), 0.3)
    # Its variance is a rounding error, 1e-15, over a floor of 1e-10.
    np.testing.assert_allclose(found.coefficients[-1], 0.0, atol=1e-3)
    np.testing.assert_allclose(
        found(torch.tensor(dead)), ridge(moments_of(x, y, w), 0.3)(torch.tensor(x)), atol=1e-6
    )
