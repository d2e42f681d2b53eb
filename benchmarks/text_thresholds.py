"""One threshold for all texts, or one for each: what a gate loses when both skip as much in the mean.

    python benchmarks/text_thresholds.py NAME --profile PROFILE [--model MODEL] --wikitext FILE --c4 FILE

results/text_thresholds_NAME.json. A gate of one threshold skips more of one text than of another; thresholds
of their own make it skip as much of each. Both are tuned on the windows on which the losses are measured,
looking at ratios only.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

import torch
from common import save

from skipcal.arch.loading import load_model
from skipcal.arch.locate import locate
from skipcal.calibrate.passes import summed_loss, teacher_forced_ratio
from skipcal.commands.console import without_place
from skipcal.core.chosen_ffns import ChosenFFNs
from skipcal.core.policy import Policy
from skipcal.evaluation.matching import match_threshold, threshold_scale, with_threshold
from skipcal.profiles.schema import SkipProfile
from skipcal.runtime.session import skipping
from skipcal.text.batching import batches
from skipcal.text.corpora import resolve_corpora, sample_corpus
from skipcal.text.opening import prefill_tokens

RATIOS = (0.10, 0.25, 0.40)
WINDOWS, WINDOW, BATCH = 12, 512, 4


@dataclass(frozen=True)
class Lab:
    """A model, and windows of each text; given: the tokens that a text begins with."""

    model: Any
    architecture: Any
    windows: Mapping[str, list[list[int]]]
    given: int
    warm_up: int

    @torch.no_grad()
    def loss(self, policy: Policy, text: str) -> float:
        """Nats a token past the warm-up."""
        options: dict[str, Any] = {"teacher_forced": True, "prompt_tokens": self.given}
        with skipping(self.model, policy=policy, architecture=self.architecture, **options):
            each = [
                summed_loss(self.model, rows, self.given + self.warm_up)
                for rows in batches(self.windows[text], BATCH)
            ]
        return sum(total for total, _ in each) / sum(count for _, count in each)

    def ratio(self, policy: Policy, text: str) -> float:
        """The skip ratio that is realised."""
        return teacher_forced_ratio(
            self.model,
            self.architecture,
            policy,
            self.windows[text],
            batch_size=BATCH,
            prompt_tokens=self.given,
        )


def compared(lab: Lab, profile: SkipProfile, target: float, full: Mapping[str, float]) -> dict[str, Any]:
    """By way: threshold, realised ratio and excess loss of each text, and the means of ratio and loss."""
    policy = profile.policy_for(target)
    scale = threshold_scale(policy, profile)

    def over(texts: list[str], threshold: float) -> float:
        return fmean(lab.ratio(with_threshold(policy, threshold), text) for text in texts)

    one = match_threshold(scale, target, partial(over, list(lab.windows))).threshold
    ways = {
        "one threshold": dict.fromkeys(lab.windows, one),
        "one for each": {
            text: match_threshold(scale, target, partial(over, [text])).threshold for text in lab.windows
        },
    }
    found: dict[str, Any] = {"target_skip_ratio": target}
    for way, thresholds in ways.items():
        rows = {}
        for text, threshold in thresholds.items():
            tried = with_threshold(policy, threshold)
            rows[text] = {
                "threshold": threshold,
                "skip_ratio": lab.ratio(tried, text),
                "excess_nll": lab.loss(tried, text) - full[text],
            }
        means = {name: fmean(row[name] for row in rows.values()) for name in ("skip_ratio", "excess_nll")}
        found[way] = {**rows, "mean": means}
    return found


def main() -> None:
    """Measure a profile's gate."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("--profile", required=True)
    parser.add_argument("--model")
    parser.add_argument("--wikitext", required=True)
    parser.add_argument("--c4", required=True)
    given = parser.parse_args()
    loaded = load_model(given.model, dtype="bfloat16", device="cpu")
    profile = SkipProfile.load(given.profile)
    texts = [f"wikitext={given.wikitext}", f"c4={given.c4}"]
    lab = Lab(
        loaded.model,
        locate(loaded.model),
        {
            corpus.name: sample_corpus(
                corpus, loaded.tokenizer, prompts=WINDOWS, prompt_tokens=WINDOW, seed=0
            ).prompts
            for corpus in resolve_corpora([], texts)
        },
        prefill_tokens(loaded.tokenizer),
        profile.policy.warm_up_tokens,
    )
    nothing = ChosenFFNs(method="static", layers=(), probability=1.0, warm_up_tokens=lab.warm_up)
    full = {text: lab.loss(nothing, text) for text in lab.windows}
    model = f"--model {without_place(given.model)} " if given.model else ""
    save(
        f"text_thresholds_{given.name}",
        f"python benchmarks/text_thresholds.py {given.name} --profile {without_place(given.profile)} {model}"
        f"--wikitext {without_place(given.wikitext)} --c4 {without_place(given.c4)}",
        {
            "model": {"name": loaded.name, "dtype": "bfloat16"},
            "windows_of_each_text": WINDOWS,
            "window_tokens": WINDOW,
            "full_nll": full,
            "ratios": [compared(lab, profile, target, full) for target in RATIOS],
        },
    )


if __name__ == "__main__":
    main()
