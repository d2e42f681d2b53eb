"""Training-free rules from the same cosines: what they lose at equal ratio, and which part of a rule counts.

    python benchmarks/cosine_rules.py NAME [--model MODEL] --wikitext FILE --c4 FILE

Windows of each text are divided: cosines, losses of single FFNs and first thresholds come from some, all that
is reported from the others. A threshold is moved at most twice, towards the ratio asked for; what is
realised stands beside each loss.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from common import save, typed

from skipcal.arch.loading import load_model
from skipcal.arch.locate import locate
from skipcal.calibrate.capture import capture
from skipcal.calibrate.damage_rule import damage_policy, losses_of_one
from skipcal.calibrate.recommend import LastCosinePrediction, arming_layers, in_memory
from skipcal.calibrate.regions import find_regions
from skipcal.commands.console import without_place
from skipcal.core.chosen_ffns import ChosenFFNs
from skipcal.core.policy import Policy, SkipPolicy
from skipcal.profiles.methods import largest
from skipcal.profiles.policies import whole_number
from skipcal.runtime.session import skipping
from skipcal.text.corpora import resolve_corpora, sample_corpus
from skipcal.text.opening import prefill_tokens

CALIBRATION, SELECTION, WINDOW, WARM_UP = 4, 3, 384, 25  # windows of each text; tokens
RATIOS = (0.10, 0.25, 0.35)
NEAR = 0.01


class Lab:
    """A model, its windows, and the full model's loss on those that are reported."""

    def __init__(self, name: str | None, texts: list[str]) -> None:
        """Load the model in bfloat16 and cut the windows."""
        self.loaded = load_model(name, dtype="bfloat16", device="cpu")
        self.model: Any = self.loaded.model
        self.architecture = locate(self.model)
        self.layers = self.architecture.num_layers
        self.prompt = prefill_tokens(self.loaded.tokenizer)
        self.calibration: list[list[int]] = []
        self.selection: list[list[int]] = []
        for corpus in resolve_corpora([], texts):
            count = CALIBRATION + SELECTION
            rows = sample_corpus(
                corpus, self.loaded.tokenizer, prompts=count, prompt_tokens=WINDOW, seed=11
            ).prompts
            self.calibration += rows[:CALIBRATION]
            self.selection += rows[CALIBRATION:]
        self.full, _ = self.losses(
            ChosenFFNs(method="static", layers=(), probability=1.0, warm_up_tokens=WARM_UP)
        )

    @torch.no_grad()
    def losses(self, policy: Policy) -> tuple[list[float], float]:
        """Mean loss past the warm-up of each window, and the skip ratio."""
        found = []
        first = self.prompt + WARM_UP
        options: dict[str, Any] = {"teacher_forced": True, "prompt_tokens": self.prompt}
        with skipping(self.model, policy=policy, architecture=self.architecture, **options) as run:
            for row in self.selection:
                ids = torch.tensor(row)
                logits = self.model(input_ids=ids[None], use_cache=False).logits[0, first:-1].float()
                found.append(float(torch.nn.functional.cross_entropy(logits, ids[first + 1 :])))
        return found, run.report.skip_ratio

    def excess(self, policy: Policy) -> dict[str, Any]:
        """What a policy loses over the full model: nats a token, its standard error over windows, ratio."""
        losses, ratio = self.losses(policy)
        each = [mine - full for mine, full in zip(losses, self.full, strict=True)]
        error = statistics.stdev(each) / len(each) ** 0.5
        return {"excess_nll": statistics.fmean(each), "standard_error": error, "skip_ratio": ratio}

    @torch.no_grad()
    def cosines(self) -> np.ndarray:
        """Of the clean calibration windows past the warm-up, [tokens, layers]."""
        parts = []
        for row in self.calibration:
            with capture(self.model, architecture=self.architecture) as recorder:
                self.architecture.stack(input_ids=torch.tensor([row]), use_cache=False)
            parts.append(np.asarray(recorder.take()[0])[self.prompt + WARM_UP :])
        return np.concatenate(parts)

    def at(self, policy: SkipPolicy, prediction: Any, target: float) -> dict[str, Any]:
        """`policy` with a threshold near the one that realises `target`."""
        aim, tried = target, []
        most = policy.most_skips() / self.layers
        for _ in range(3):
            threshold = prediction.threshold(min(aim, most))
            tried.append({**self.excess(replace(policy, threshold=threshold)), "threshold": threshold})
            realised = tried[-1]["skip_ratio"]
            if abs(realised - target) <= NEAR or realised == 0:
                break
            aim *= target / realised
        return min(tried, key=lambda each: abs(each["skip_ratio"] - target))


def main() -> None:
    """Measure one model and write results/cosine_rules_NAME.json."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("--model")
    parser.add_argument("--wikitext", required=True)
    parser.add_argument("--c4", required=True)
    given = parser.parse_args()
    lab = Lab(given.model, [f"wikitext={given.wikitext}", f"c4={given.c4}"])
    cosine = lab.cosines()
    mean = cosine.mean(axis=0, dtype=np.float64)
    regions = find_regions(mean, mean[None], np.ones((1, lab.layers)), seed=0)
    alone, tokens = losses_of_one(
        lab.model, lab.architecture, lab.calibration, prompt_tokens=lab.prompt, warm_up_tokens=WARM_UP
    )
    by_damage = damage_policy(mean.tolist(), alone, WARM_UP)
    paper = SkipPolicy(cold_s=regions.cold_s, cold_e=regions.cold_e, threshold=2.0, warm_up_tokens=WARM_UP)
    anew = replace(by_damage, tolerances=(1.0,) * lab.layers)
    weighed = {
        "every FFN decides anew, 1 skip in a row": replace(anew, max_skips=1),
        "every FFN decides anew, 2 skips in a row": anew,
        "the same weighed by damage, 1 skip in a row": replace(by_damage, max_skips=1),
        "ffn-skip+damage": by_damage,
    }
    rows: dict[str, dict[str, Any]] = {}
    for target in RATIOS:
        region, count = tuple(range(paper.cold_s, paper.cold_e)), whole_number(target, lab.layers)
        found = rows[f"{target:.2f}"] = {
            "random": lab.excess(_drawn(tuple(range(lab.layers)), target)),
            "no-input-adaptive": lab.excess(_drawn(region, target * lab.layers / len(region))),
            "static": lab.excess(_drawn(largest(mean, count), 1.0)),
            "static, least lost alone": lab.excess(_drawn(largest(-np.array(alone), count), 1.0)),
        }
        if target <= paper.most_skips() / lab.layers:
            found["ffn-skip"] = lab.at(paper, in_memory(cosine, paper), target)
        for name, policy in weighed.items():
            if target <= policy.most_skips() / lab.layers:
                found[name] = lab.at(policy, _prediction(cosine, policy), target)
        print(target, {name: round(row["excess_nll"], 3) for name, row in found.items()}, flush=True)
    save(
        f"cosine_rules_{given.name}",
        typed(),
        {
            "model": without_place(lab.loaded.name),
            "dtype": "bfloat16",
            "windows": {
                "calibration": len(lab.calibration),
                "reported": len(lab.selection),
                "tokens": WINDOW,
            },
            "warm_up_tokens": WARM_UP,
            "full_nll": statistics.fmean(lab.full),
            "region": [paper.cold_s, paper.cold_e],
            "monotonicity": regions.monotonicity,
            "mean_cosine": mean.tolist(),
            "excess_nll_of_one": {"by_layer": alone, "tokens": tokens},
            "tolerances": by_damage.tolerances,
            "by_ratio": rows,
        },
    )


def _prediction(cosine: np.ndarray, policy: SkipPolicy) -> LastCosinePrediction:
    return LastCosinePrediction(lambda: [cosine[:, arming_layers(policy)].T], policy, cosine.shape[1])


def _drawn(layers: tuple[int, ...], probability: float) -> ChosenFFNs:
    return ChosenFFNs(
        method="static" if probability == 1 else "random",
        layers=layers,
        probability=min(probability, 1.0),
        warm_up_tokens=WARM_UP,
    )


if __name__ == "__main__":
    main()
