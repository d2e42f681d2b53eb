"""One threshold for all texts, or one for each: what a gate loses when both skip as much in the mean.

    python benchmarks/text_thresholds.py NAME --profile PROFILE [--model MODEL] --wikitext FILE --c4 FILE

results/text_thresholds_NAME.json. A gate of one threshold skips more of one text than of another; thresholds
of their own make it skip as much of each. Both are tuned on the windows on which the losses are measured,
looking at ratios only.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from statistics import fmean
from typing import Any

from common import save, typed

from skipcal.arch.loading import load_model
from skipcal.arch.locate import locate
from skipcal.calibrate.passes import mean_loss, teacher_forced_ratio
from skipcal.core.policy import Policy
from skipcal.evaluation.matching import match_threshold, threshold_scale, with_threshold
from skipcal.profiles.schema import SkipProfile
from skipcal.runtime.session import skipping
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

    def loss(self, text: str, policy: Policy | None = None) -> float:
        """Nats a token past the warm-up; without a policy the full model's."""
        options: dict[str, Any] = {"teacher_forced": True, "prompt_tokens": self.given}
        inside = (
            nullcontext()
            if policy is None
            else skipping(self.model, policy=policy, architecture=self.architecture, **options)
        )
        with inside:
            return mean_loss(self.model, self.windows[text], self.given + self.warm_up, batch_size=BATCH)

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

    @cache
    def ratio(text: str, threshold: float) -> float:
        return lab.ratio(with_threshold(policy, threshold), text)

    def over(texts: list[str], threshold: float) -> float:
        return fmean(ratio(text, threshold) for text in texts)

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
            rows[text] = {
                "threshold": threshold,
                "skip_ratio": ratio(text, threshold),
                "excess_nll": lab.loss(text, with_threshold(policy, threshold)) - full[text],
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
    full = {text: lab.loss(text) for text in lab.windows}
    save(
        f"text_thresholds_{given.name}",
        typed(),
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
