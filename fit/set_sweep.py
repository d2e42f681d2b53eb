"""One sweep in which a fixed set of FFNs is skipped: its surrogates, and what each other FFN would cost.

A surrogate is fitted to bring the stream back to where the full model has it: what it is to add is the full
model's stream after the layer, less the stream that enters the FFN. So it makes up for a part of what the
skips before it have left out, which a map that imitates its own FFN does not.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from skipcal.arch.locate import Block
from skipcal.core.surrogates import Surrogate, direction
from skipcal.fit.damage import Damage
from skipcal.fit.layer_sweep import RowSweep, StreamStore, made
from skipcal.fit.surrogate import fit_surrogate


@dataclass(frozen=True)
class SetFit:
    """What a sweep found on the stream that its set leaves.

    surrogates: by layer, of the set and of the candidates.
    damage:     by the same layers, a mean over tokens past the warm-up: that of the stream after the layer,
                with the surrogate, less that with the FFN.
    """

    surrogates: Mapping[int, Surrogate]
    damage: Mapping[int, float]


NOTHING = SetFit({}, {})


class SetSweep:
    """Fits surrogates on rows of text, of which every token past the warm-up skips the same FFNs."""

    def __init__(self, rows: RowSweep, *, damage: Damage, rank: int, maps: int) -> None:
        """Nothing runs before `fit`."""
        self._rows = rows
        self._damage = damage
        self._rank, self._maps = rank, maps

    @torch.no_grad()
    def fit(
        self,
        skipped: Collection[int],
        candidates: Collection[int] = (),
        *,
        before: SetFit = NOTHING,
        changed: int = 0,
    ) -> SetFit:
        """Surrogates of the layers `skipped`, each fitted on the stream that those before it leave.

        candidates: layers that run, whose surrogates and damages are found as well. before: what was found
        for a set that is the same below the layer `changed`; it is taken over up to there.
        """
        surrogates = {layer: found for layer, found in before.surrogates.items() if layer < changed}
        damage = {layer: found for layer, found in before.damage.items() if layer < changed}
        with tempfile.TemporaryDirectory(prefix="skipcal-") as folder:
            store = self._rows.embedded(made(folder, "skipping"))
            full: StreamStore | None = None  # the full model's streams, once they are others
            for block in tqdm(
                self._rows.architecture.blocks, desc="fixed set", unit="layer", leave=False, disable=None
            ):
                skip = block.index in skipped
                if skip and full is None:
                    full = store.copied(made(folder, "full"))
                if full is not None:
                    self._rows.run(block, full)
                known = block.index < changed
                if not skip and (known or block.index not in candidates):
                    self._rows.run(block, store)
                elif known:
                    self._skip(block, store, surrogates[block.index])
                else:
                    found = surrogates[block.index] = self._surrogate(block, store, full)
                    damage[block.index] = self._apply(block, store, full, found, skip=skip)
        return SetFit(surrogates, damage)

    def _skip(self, block: Block, store: StreamStore, surrogate: Surrogate) -> None:
        """Let the layer's streams go on with the surrogate."""
        self._rows.open(block, store)
        for number, kept in store.read(self._rows.device):
            s = surrogate(direction(kept["h"]))
            self._rows.close(block, store, number, kept, self._past_the_warm_up(s, kept["f"]))

    def _past_the_warm_up(self, s: Tensor, f: Tensor) -> Tensor:
        """s where tokens count, f before, [batch, seq, hidden]."""
        first = self._rows.first
        return torch.cat([f[:, :first], s[:, first:].to(f.dtype)], dim=1)

    def _surrogate(self, block: Block, store: StreamStore, full: StreamStore | None) -> Surrogate:
        hidden, counted, device = self._rows.architecture.hidden_size, self._rows.counted, self._rows.device
        self._rows.open(block, store)

        def samples() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
            for (_, kept), wanted in zip(store.read(device), self._rows.streams(store, full), strict=True):
                h, f = kept["h"], kept["f"]
                target = counted(f if wanted is None else wanted.float() - h.float())
                yield direction(counted(h)), target, torch.ones(len(target), device=device)

        metric = self._damage.metric(block.index)
        return fit_surrogate(samples, hidden, rank=self._rank, maps=self._maps, metric=metric, device=device)

    def _apply(
        self, block: Block, store: StreamStore, full: StreamStore | None, surrogate: Surrogate, *, skip: bool
    ) -> float:
        """Let the layer's streams go on, with the surrogate where it is skipped; its mean damage."""
        total, counted = 0.0, self._rows.counted
        for (number, kept), wanted in zip(
            store.read(self._rows.device), self._rows.streams(store, full), strict=True
        ):
            h, f = kept["h"], kept["f"]
            s = surrogate(direction(h))
            target = f.float() if wanted is None else wanted.float() - h.float()
            for added, sign in ((s, 1), (f, -1)):
                off = counted(target) - counted(added).float()
                total += sign * float(self._damage(block.index, off, counted(h)).sum())
            self._rows.close(block, store, number, kept, self._past_the_warm_up(s, f) if skip else f)
        return total / self._rows.tokens
