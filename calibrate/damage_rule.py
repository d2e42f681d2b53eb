"""The rule `cosine` with tolerances: how saturated a token must be for a layer, by what skipping it loses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from skipcal.arch.locate import Architecture
from skipcal.calibrate.passes import summed_loss
from skipcal.core.chosen_ffns import ChosenFFNs
from skipcal.core.policy import FULL_MODEL_THRESHOLD, Policy, SkipPolicy
from skipcal.runtime.session import skipping

# Skips in a row; benchmarks/cosine_rules.py has 1 and 2.
MAX_SKIPS = 2
_LEAST_SHARE = 0.1  # of the median loss: a smaller one, or a gain, is noise
_LEAST_LOSS = 1e-6  # nats, where even the median is a gain


def damage_policy(cosine: Sequence[float], excess: Sequence[float], warm_up_tokens: int) -> SkipPolicy:
    """The rule for a model of mean cosines `cosine` whose FFNs lose `excess`, by layer; no threshold yet.

    A token whose last FFN turned the stream by x times its layer's mean is expected to lose x times what
    FFN j loses in the mean. So tolerances[j] is mean(1 - cos) of the layer before j over the loss of j, with
    1 as the smallest. The first and the last FFN always run.
    """
    layers = len(cosine)
    inner = np.array(excess[2 : layers - 1])
    least = max(_LEAST_SHARE * float(np.median(inner)), _LEAST_LOSS) if len(inner) else _LEAST_LOSS
    turned = 1 - np.array(cosine[1 : layers - 2])
    shares = turned / np.maximum(inner, least)
    tolerances = np.ones(layers)
    tolerances[2 : layers - 1] = shares / shares.min() if len(shares) else []
    return SkipPolicy(
        cold_s=1,
        cold_e=max(layers - 1, 1),
        threshold=FULL_MODEL_THRESHOLD,
        warm_up_tokens=warm_up_tokens,
        max_skips=MAX_SKIPS,
        tolerances=tuple(float(each) for each in tolerances),
    )


def losses_of_one(
    model: Any,
    architecture: Architecture,
    rows: Sequence[Sequence[int]],
    *,
    prompt_tokens: int,
    warm_up_tokens: int,
) -> tuple[list[float], int]:
    """By layer the excess loss of skipping its FFN alone, nats per token, and over how many tokens.

    Teacher-forced, one pass over the rows for each layer. Scored are tokens that a decode step past the
    warm-up predicts.
    """

    first = prompt_tokens + warm_up_tokens

    def loss(policy: Policy) -> tuple[float, int]:
        with skipping(
            model, policy=policy, teacher_forced=True, prompt_tokens=prompt_tokens, architecture=architecture
        ):
            each = [summed_loss(model, [row], first) for row in rows if len(row) > first + 1]
        return sum(total for total, _ in each), sum(count for _, count in each)

    nothing = SkipPolicy(cold_s=0, cold_e=0, threshold=FULL_MODEL_THRESHOLD, warm_up_tokens=warm_up_tokens)
    full, tokens = loss(nothing)
    found = []
    for layer in range(architecture.num_layers):
        alone = ChosenFFNs(method="static", layers=(layer,), probability=1.0, warm_up_tokens=warm_up_tokens)
        found.append((loss(alone)[0] - full) / tokens)
    return found, tokens
