"""Fit the gate of an FFN block: a linear probe of the stream for the log damage of its surrogate."""

from __future__ import annotations

import torch
from torch import Tensor

from skipcal.core.surrogates import direction
from skipcal.fit.moments import Linear, Moments, ridge

PENALTY = 1e-3
# Exponent of the sensitivity. At 1 the skips crowd on few tokens, whose damages then no longer just add up.
# SmolLM2, excess on C4 against none: 0.5 saves half of it at a ratio of 0.05 and a quarter at 0.14, but costs
# 6 % at 0.25 and more beyond; 0.25 saves a quarter at 0.15 and costs nothing at 0.4.
SENSITIVITY = 0.25
_TINY = torch.finfo(torch.float32).tiny


def gate_inputs(h: Tensor) -> Tensor:
    """[u, log ||h||], [tokens, hidden + 1], of streams h [tokens, hidden]."""
    norm = torch.linalg.vector_norm(h.float(), dim=-1, keepdim=True).clamp_min(_TINY)
    return torch.cat([direction(h), norm.log()], dim=-1)


def fit_gate(moments: Moments, penalty: float = PENALTY) -> Linear:
    """The probe from moments of `gate_inputs` and log damages [tokens, 1], made to predict mean damage.

    The regression predicts the mean of the log. Its residual, taken as normal with variance v,
    puts the mean damage at exp(prediction + v / 2).
    """
    found = ridge(moments, penalty)
    return Linear(found.coefficients, found.intercept + 0.5 * residual_variance(moments, found))


def sharpened(gate: Linear, sensitivity: Linear | None) -> Linear:
    """The gate's score with the log sensitivity of the token added, at a quarter of its weight."""
    if sensitivity is None:
        return gate
    return Linear(
        gate.coefficients + SENSITIVITY * sensitivity.coefficients,
        gate.intercept + SENSITIVITY * sensitivity.intercept,
    )


def residual_variance(moments: Moments, found: Linear) -> Tensor:
    """Weighted mean square of y - prediction, [targets]."""
    covariance, cross = moments.covariances()
    b = found.coefficients
    explained = 2 * (b * cross).sum(0) - (b * (covariance @ b)).sum(0)
    return (moments.variance() - explained).clamp_min(0)
