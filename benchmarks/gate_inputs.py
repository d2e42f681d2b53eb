"""Would a gate predict better if it saw more of a token than its stream?

    python benchmarks/gate_inputs.py --wikitext FILE --c4 FILE      results/gate_inputs.json, about 10 minutes

On SmolLM2, in the last sweep of a fit, with skipping on: the regression of log damages that makes a gate,
beside the same with more inputs: what attention made of the stream in this layer, how many FFNs the token has
skipped, and which. Regressions see every second batch. The others tell how much of the variance they explain,
and what a quarter of all FFNs loses that is chosen by them: mean predicted damage in nats, beside a choice by
the damages themselves.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import save, typed
from torch import Tensor

from skipcal.arch.loading import load_model
from skipcal.arch.locate import Block
from skipcal.configs.fit import FitConfig
from skipcal.core.surrogates import direction
from skipcal.fit.gate import fit_gate, gate_inputs
from skipcal.fit.layer_sweep import RowSweep, StreamStore
from skipcal.fit.moments import Moments
from skipcal.fit.on_policy import LayerFit, ScoreHistogram, Sweep
from skipcal.fit.prepared import Prepared
from skipcal.profiles.schema import SkipProfile

PROFILE = "smollm2-135m-instruct"
SHARE = 0.25  # of all FFNs


class KeepsEntering(RowSweep):
    """Keeps the stream that enters an opened layer as well."""

    def open(self, block: Block, store: StreamStore) -> None:
        entering = {number: kept["stream"] for number, kept in store.read(self.device)}
        super().open(block, store)
        for number, kept in store.read(self.device):
            store.write(number, **{**kept, "stream": entering[number]})


def extras(h: Tensor, entering: Tensor, skipped: Tensor) -> dict[str, Tensor]:
    """Inputs besides a gate's own, [tokens, n] each: h and entering [tokens, hidden], skipped [tokens, L]."""
    h, entering = h.float(), entering.float()
    turned = torch.cosine_similarity(h, entering, dim=-1)[:, None]
    added = (torch.linalg.vector_norm(h - entering, dim=-1) + 1e-6).log()[:, None]
    return {
        "none": h[:, :0],
        "attention": torch.cat([turned, added], dim=-1),
        "number skipped": skipped.sum(-1, keepdim=True).float(),
        "which skipped": skipped.float(),
        "all": torch.cat([turned, added, skipped.float()], dim=-1),
    }


class Watched(Sweep):
    """A sweep that also predicts damages from more inputs; what it keeps is of unseen batches."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        known = self._sweep
        self._sweep = KeepsEntering(
            known.architecture, known.rows, first=known.first, batch_size=options["batch_size"]
        )
        self._skipped: dict[int, Tensor] = {}  # by batch, [tokens, L]
        self.damages: list[Tensor] = []
        self.predicted: dict[str, list[Tensor]] = defaultdict(list)
        self.explained: dict[str, list[float]] = defaultdict(list)

    def _fit_layer(self, block: Block, read: Callable[[], Any]) -> LayerFit:
        fitted = super()._fit_layer(block, read)
        assert isinstance(read, partial)
        store: StreamStore = read.args[1]
        batches = []
        for (number, kept), (h, wanted, _) in zip(store.read(self._sweep.device), read(), strict=True):
            damage = self._damage(block.index, wanted - fitted.surrogate(direction(h)), h)
            layers = len(self._sweep.architecture.blocks)
            skipped = self._skipped.setdefault(number, torch.zeros(len(h), layers, dtype=torch.bool))
            batches.append((h, damage, extras(h, self._sweep.counted(kept["stream"]), skipped)))
        unseen = batches[1::2]
        self.damages.append(torch.cat([damage for _, damage, _ in unseen]))
        for name in batches[0][2]:
            seen = [(torch.cat([gate_inputs(h), more[name]], dim=-1), d) for h, d, more in batches]
            probe = fit_gate(summed(seen[::2]))
            found = torch.cat([probe(x)[:, 0] for x, _ in seen[1::2]])
            logs = self.damages[-1].log().double()
            # A probe predicts the mean damage; of the log it is off by a constant.
            left = (logs - found - (logs - found).mean()).square().mean()
            self.explained[name].append(float(1 - left / logs.var(unbiased=False)))
            self.predicted[name].append(found)
        return fitted

    def _apply(
        self, block: Block, fitted: LayerFit, store: StreamStore, threshold: float, scores: ScoreHistogram
    ) -> int:
        for number, kept in store.read(self._sweep.device):
            score = fitted.gate(gate_inputs(self._sweep.counted(kept["h"])))[:, 0]
            self._skipped[number][:, block.index] = score < threshold
        return super()._apply(block, fitted, store, threshold, scores)


def summed(batches: list[tuple[Tensor, Tensor]]) -> Moments:
    """Moments of inputs and log damages."""
    moments = Moments.empty(batches[0][0].shape[1], 1)
    for x, damage in batches:
        moments.add(x, damage.log()[:, None])
    return moments


def chosen_damage(scores: Tensor, damages: Tensor, share: float) -> float:
    """Mean damage, in nats, of the share of FFNs with the lowest scores."""
    order = scores.argsort()[: round(share * len(scores))]
    return float(damages[order].double().mean())


def results(sweep: Watched, share: float) -> Mapping[str, Any]:
    """By inputs: the variance of log damages explained, a mean over layers, and what a choice by it loses."""
    damages = torch.cat(sweep.damages)
    best = chosen_damage(damages, damages, share)
    return {
        "pairs": len(damages),
        "damage_of_the_best_choice": best,
        "inputs": {
            name: {
                "explained": sum(each) / len(each),
                "damage_of_its_choice": chosen_damage(torch.cat(sweep.predicted[name]), damages, share),
            }
            for name, each in sweep.explained.items()
        },
    }


@torch.no_grad()
def main() -> None:
    """Fit as `skipcal fit` does, and look at the last sweep."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--wikitext", required=True, type=Path)
    parser.add_argument("--c4", required=True, type=Path)
    parser.add_argument("--prompts", type=int, default=28, help="windows of each text")
    given = parser.parse_args()
    config = FitConfig(
        profile=PROFILE,
        dtype="bfloat16",
        device="cpu",
        prompts=given.prompts,
        data_files=[f"wikitext={given.wikitext}", f"c4={given.c4}"],
    )
    loaded = load_model(dtype=config.dtype, device=config.device)
    prepared = Prepared.of(loaded, SkipProfile.load(PROFILE), config)
    damage = prepared.damage()
    share = SHARE * prepared.architecture.num_layers / len(prepared.layers)
    clean = Sweep.of(prepared, prepared.rows[::2], damage).fit()
    sweep = Watched.of(prepared, prepared.rows, damage)
    fitted = sweep.fit(clean.gates, clean.scores.threshold(share))
    save(
        "gate_inputs",
        typed(),
        {
            "model": loaded.name,
            "config": config.recorded(),
            "skip_ratio": fitted.skip_ratio,
            "share": SHARE,
            **results(sweep, share),
        },
    )


if __name__ == "__main__":
    main()
