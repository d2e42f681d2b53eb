"""Weighted second moments of inputs and targets: all that a linear regression needs of its data.

They are sums in float64, so their size does not grow with the data, and those of parts (batches,
processes) add up to those of the whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

_TINY = 1e-30


@dataclass(frozen=True)
class Moments:
    """Sums over samples with weights w of inputs x [p] and targets y [q], float64.

    weight: sum of w.  x: sum of w x, [p].  y: sum of w y, [q].
    xx:     sum of w x xT, [p, p].  xy: sum of w x yT, [p, q].  yy: sum of w y^2, [q].
    """

    weight: Tensor
    x: Tensor
    y: Tensor
    xx: Tensor
    xy: Tensor
    yy: Tensor

    @classmethod
    def empty(cls, inputs: int, targets: int, device: torch.device | None = None) -> Self:
        """Sums over nothing."""
        return cls(
            *(
                torch.zeros(shape, dtype=torch.float64, device=device)
                for shape in ((), (inputs,), (targets,), (inputs, inputs), (inputs, targets), (targets,))
            )
        )

    def add(self, x: Tensor, y: Tensor, w: Tensor | None = None) -> None:
        """Add samples in place: x [n, p], y [n, q], and weights w [n] (None: 1 each)."""
        x, y = x.double(), y.double()
        weighted = x if w is None else x * w.double()[:, None]
        self.weight.add_(len(x) if w is None else w.double().sum())
        self.x.add_(weighted.sum(0))
        self.y.add_(y.sum(0) if w is None else w.double() @ y)
        self.xx.addmm_(weighted.T, x)
        self.xy.addmm_(weighted.T, y)
        self.yy.add_(y.square().sum(0) if w is None else w.double() @ y.square())

    def __add__(self, other: Moments) -> Moments:
        """The moments of both parts together."""
        return Moments(
            *(
                getattr(self, name) + getattr(other, name).to(self.xx.device)
                for name in self.__dataclass_fields__
            )
        )

    def means(self) -> tuple[Tensor, Tensor]:
        """Weighted means of x and y."""
        return self.x / self.weight, self.y / self.weight

    def covariances(self) -> tuple[Tensor, Tensor]:
        """Weighted covariances of x with x [p, p], and of x with y [p, q]."""
        x, y = self.means()
        return self.xx / self.weight - torch.outer(x, x), self.xy / self.weight - torch.outer(x, y)

    def variance(self) -> Tensor:
        """Weighted variance of each target, [q]."""
        return self.yy / self.weight - self.means()[1].square()


@dataclass(frozen=True)
class Linear:
    """y ~ x @ coefficients + intercept; float64, [p, q] and [q]."""

    coefficients: Tensor
    intercept: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Predictions [n, q] for x [n, p]."""
        return x.to(self.coefficients.dtype) @ self.coefficients + self.intercept


def ridge(moments: Moments, penalty: float, *, towards: Linear | None = None, pull: float = 0.0) -> Linear:
    """Weighted ridge regression of y on x with an intercept that is not penalised.

    Minimises  sum w |y - b - B x|^2 / sum w  +  penalty * sum_j var(x_j) |B_j|^2: each input is
    penalised on the scale of its own variance, so outlying dimensions do not set everyone's.
    towards: coefficients T that are known already; adds  pull * sum_j var(x_j) |B_j - T_j|^2. Of no
    samples the result is `towards`, of one about its coefficients.
    """
    if towards is not None and not moments.weight > 0:
        return towards
    cov, cross = moments.covariances()
    x, y = moments.means()
    if towards is not None:
        drawn = (pull * cov.diagonal()).clamp_min(_TINY)  # all alike, the samples say nothing
        cov, cross = cov + torch.diag(drawn), cross + drawn[:, None] * towards.coefficients
    coefficients = torch.linalg.solve(penalised(cov, penalty), cross)
    return Linear(coefficients, y - x @ coefficients)


def penalised(covariance: Tensor, penalty: float) -> Tensor:
    """The covariance with its diagonal raised by `penalty`, relative, and kept above zero."""
    variance = covariance.diagonal().clamp_min(0)
    floor = 1e-12 * variance.max().clamp_min(torch.finfo(torch.float64).tiny)
    return covariance + torch.diag(penalty * variance + floor)
