"""Fit gates and surrogates in one sweep from the first layer to the last, with earlier skips applied.

At layer i the stream is already the one that skipping leaves behind. The surrogate of FFN i is fitted
there, mostly on the tokens that skip it; the gate is fitted to the damage of that surrogate; then the
layer's own skips are applied and the sweep goes on. So what a gate sees when it is used is what it was
fitted on, and the share it skipped is no extrapolation from a clean trace.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Self, TypeAlias

import torch
from torch import Tensor
from tqdm.auto import tqdm

from skipcal.arch.locate import Architecture, Block
from skipcal.core.gate import NEVER, GateRule, Gates
from skipcal.core.surrogates import Surrogate, Surrogates, direction
from skipcal.fit.damage import Damage
from skipcal.fit.gate import fit_gate, gate_inputs, residual_variance, sharpened
from skipcal.fit.layer_sweep import RowSweep, StreamStore, made
from skipcal.fit.moments import Linear, Moments
from skipcal.fit.prepared import Prepared
from skipcal.fit.surrogate import fit_surrogate

Tokens: TypeAlias = Callable[[], Iterator[tuple[Tensor, Tensor, Tensor]]]

# Weight of tokens that run the FFN in the fit of its surrogate; those that skip it have 1.
RUN_WEIGHT = 0.05
# How far a surrogate aims from f towards the full model's stream. Of 0 and 0.5 the latter loses less, on
# text of SmolLM2 that nothing was fitted on.
AIM = 0.5


@dataclass
class ScoreHistogram:
    """Counts of scores in bins of 0.01, so that quantiles need no list of all scores."""

    low: float = -60.0
    width: float = 0.01
    counts: Tensor = field(default_factory=lambda: torch.zeros(10_000, dtype=torch.int64))

    def add(self, scores: Tensor) -> None:
        """Count scores of any shape; what lies outside goes to the first or last bin."""
        bins = ((scores.double().cpu().flatten() - self.low) / self.width).floor().long()
        self.counts += torch.bincount(bins.clamp(0, len(self.counts) - 1), minlength=len(self.counts))

    def threshold(self, share: float) -> float:
        """The upper edge of the first bin below whose end at least `share` of all scores lie."""
        needed = share * int(self.counts.sum())
        return self.low + self.width * (1 + int(torch.searchsorted(self.counts.cumsum(0).double(), needed)))

    def share_below(self, threshold: float) -> float:
        """Share of all scores below `threshold`, to the width of a bin."""
        edge = min(max(round((threshold - self.low) / self.width), 0), len(self.counts))
        return int(self.counts[:edge].sum()) / int(self.counts.sum())


@dataclass(frozen=True)
class Fitted:
    """What one sweep found.

    skip_ratio:      realised in the sweep: skips / (L x tokens past the warm-up).
    r_squared:       variance of the log damage that each gate explains.
    surrogate_error: share of the variance of what each is to add that it leaves, over the weighted tokens.
    """

    gates: Gates
    surrogates: Surrogates
    scores: ScoreHistogram
    skip_ratio: float
    r_squared: tuple[float, ...]
    surrogate_error: tuple[float, ...]


@dataclass(frozen=True)
class LayerFit:
    """Surrogate and gate of one layer."""

    surrogate: Surrogate
    gate: Linear
    r_squared: float
    surrogate_error: float


class Sweep:
    """Runs over rows of equal length with the blocks `layers` as candidates for skipping.

    first: positions below it run the full model and count nowhere: what is given, and the warm-up.
    """

    def __init__(
        self,
        architecture: Architecture,
        rows: Sequence[Sequence[int]],
        *,
        layers: Sequence[int],
        damage: Damage,
        rank: int,
        maps: int,
        first: int,
        batch_size: int,
    ) -> None:
        """Nothing runs before `fit`."""
        self._layers = tuple(layers)
        self._damage = damage
        self._rank = rank
        self._maps = maps
        self._sweep = RowSweep(architecture, rows, first=first, batch_size=batch_size)

    @classmethod
    def of(cls, prepared: Prepared, rows: Sequence[Sequence[int]], damage: Damage) -> Self:
        """A sweep over some rows of what a fit begins with."""
        return cls(
            prepared.architecture,
            rows,
            layers=prepared.layers,
            damage=damage,
            rank=prepared.rank,
            maps=prepared.maps,
            first=prepared.first,
            batch_size=prepared.config.batch_size,
        )

    @torch.no_grad()
    def fit(self, prior: Gates | None = None, threshold: float = NEVER) -> Fitted:
        """One sweep in which tokens whose score lies below `threshold` skip.

        prior: gates of an earlier sweep, which tell the surrogates of this one which tokens will skip.
        """
        rule = None if prior is None else GateRule(prior, threshold)
        scores, skips, found = ScoreHistogram(), 0, {}
        blocks = self._sweep.architecture.blocks
        with tempfile.TemporaryDirectory(prefix="skipcal-") as folder:
            store = self._sweep.embedded(made(folder, "skipping"))
            full = None if rule is None else store.copied(made(folder, "full"))
            name = "sweep" if prior is None else "sweep on policy"
            for block in tqdm(blocks, desc=name, unit="layer", leave=False, disable=None):
                if full is not None:
                    self._sweep.run(block, full)
                if block.index not in self._layers:
                    self._sweep.run(block, store)
                    continue
                self._sweep.open(block, store)
                fitted = self._fit_layer(block, partial(self._tokens, block, store, full, rule, threshold))
                skips += self._apply(block, fitted, store, threshold, scores)
                found[block.index] = fitted
        return _collected(found, scores, skips / (self._sweep.tokens * len(blocks)))

    def _fit_layer(self, block: Block, read: Tokens) -> LayerFit:
        """read: h, what is to be added to it, and weight of all tokens, in batches, anew each time."""
        hidden, device = self._sweep.architecture.hidden_size, self._sweep.device

        def samples() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
            return ((direction(h), wanted, w) for h, wanted, w in read())

        metric = self._damage.metric(block.index)
        surrogate = fit_surrogate(
            samples, hidden, rank=self._rank, maps=self._maps, metric=metric, device=device
        )
        probed, targets = Moments.empty(hidden + 1, 1, device), Moments.empty(0, hidden, device)
        left = 0.0
        for h, wanted, w in read():
            u = direction(h)
            missed = wanted - surrogate(u)
            damage = self._damage(block.index, missed, h)
            probed.add(gate_inputs(h), damage.log()[:, None])
            targets.add(u[:, :0], wanted, w)
            left += float(w.double() @ missed.double().square().sum(-1))
        gate = fit_gate(probed)
        sharp = sharpened(gate, self._damage.sensitivity(block.index))
        explained = 1 - float(residual_variance(probed, gate)[0] / probed.variance()[0].clamp_min(1e-30))
        total = float(targets.variance().sum() * targets.weight)
        return LayerFit(surrogate, sharp, explained, left / max(total, 1e-30))

    def _tokens(
        self,
        block: Block,
        store: StreamStore,
        full: StreamStore | None,
        rule: GateRule | None,
        threshold: float,
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """h, what is to be added to it, and weight of an opened layer's tokens, in batches.

        Where tokens skip, that is half-way between f and what leads back to the full model's stream: a
        surrogate makes up for a part of what earlier skips left out. Those that will skip weigh 1.
        """
        for (_, kept), wanted in zip(
            store.read(self._sweep.device), self._sweep.streams(store, full), strict=True
        ):
            h, f = self._sweep.counted(kept["h"]), self._sweep.counted(kept["f"]).float()
            w = torch.ones(len(h), device=h.device)
            if rule is not None and block.index in rule.layers:
                below = torch.as_tensor(rule.scores(block.index, h)) < threshold
                w = torch.where(below, 1.0, RUN_WEIGHT)
            if wanted is not None:
                f = f + AIM * (self._sweep.counted(wanted).float() - h.float() - f)
            yield h, f, w

    def _apply(
        self, block: Block, fitted: LayerFit, store: StreamStore, threshold: float, scores: ScoreHistogram
    ) -> int:
        """Skip, where the gate says so; count the scores. Returns the number of skips."""
        skips, first = 0, self._sweep.first
        for number, kept in store.read(self._sweep.device):
            h, f = kept["h"], kept["f"]
            found = fitted.gate(gate_inputs(h.flatten(0, 1)))[:, 0].reshape(h.shape[:2])
            scores.add(found[:, first:])
            skip = found < threshold
            skip[:, :first] = False
            skips += int(skip.sum())
            s = fitted.surrogate(direction(h)).to(h.dtype)
            self._sweep.close(block, store, number, kept, torch.where(skip[..., None], s, f))
        return skips


def _collected(found: dict[int, LayerFit], scores: ScoreHistogram, skip_ratio: float) -> Fitted:
    layers = tuple(sorted(found))
    probes = [found[layer].gate for layer in layers]
    coefficients = torch.stack([probe.coefficients[:, 0].float().cpu() for probe in probes])
    return Fitted(
        gates=Gates(
            layers=layers,
            weight=coefficients[:, :-1].contiguous(),
            log_norm_weight=coefficients[:, -1].contiguous(),
            bias=torch.stack([probe.intercept[0].float().cpu() for probe in probes]),
        ),
        surrogates=Surrogates({layer: found[layer].surrogate for layer in layers}),
        scores=scores,
        skip_ratio=skip_ratio,
        r_squared=tuple(found[layer].r_squared for layer in layers),
        surrogate_error=tuple(found[layer].surrogate_error for layer in layers),
    )
