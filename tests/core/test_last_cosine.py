"""The rule `cosine` with tolerances, as functions of tensors, against a loop over layers, token by token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from token_streams import LAYERS, TOKENS, cosine, streams

from skipcal.core.host import PassTokens
from skipcal.core.last_cosine import LastCosineState
from skipcal.core.policy import SkipPolicy

CPU = torch.device("cpu")
TOLERANCES = (1.0, 3.0, 1.0, 1.5, 2.0, 1.0, 4.0)


def naive(policy: SkipPolicy, token: int) -> list[int]:
    """The layers that a token skips."""
    h, f = streams()
    assert policy.tolerances is not None
    last, in_a_row = float("-inf"), 0
    skipped: list[int] = []
    for layer in range(policy.cold_s, policy.cold_e):
        reach = 1 - (1 - policy.threshold) * policy.tolerances[layer]
        if last >= reach and (policy.max_skips is None or in_a_row < policy.max_skips):
            skipped.append(layer)
            in_a_row += 1
        else:
            last, in_a_row = cosine(h[layer, token], f[layer, token]), 0
    return skipped


def walked(policy: SkipPolicy, tokens: list[int], **announced: Any) -> list[list[int]]:
    """The layers that each of the tokens skips when they go through together."""
    h, f = streams()
    rule = policy.make_rule()
    state: Any = rule.start(PassTokens(active=torch.ones(len(tokens), dtype=torch.bool), **announced), CPU)
    skipped: list[list[int]] = [[] for _ in tokens]
    for layer in rule.layers:
        skip, state = rule.before(layer, state, h[layer, tokens])
        masks = skip.tolist() if isinstance(skip, torch.Tensor) else [skip]
        for place, skips in enumerate(masks):
            skipped[place] += [layer] * skips
        if not all(masks):
            ran = ~skip if isinstance(skip, torch.Tensor) else True
            added = f[layer, tokens] * torch.as_tensor(ran).view(-1, 1)  # 0 for tokens that skipped
            state = rule.after(layer, state, h[layer, tokens], added, ran)
    return skipped


GRID = [
    SkipPolicy(cold_s=s, cold_e=e, threshold=threshold, max_skips=k, tolerances=tolerances)
    for s, e in [(0, 7), (2, 6), (3, 3)]
    for threshold in (-1.0, 0.3, 0.8, 2.0)
    for k in (None, 0, 1, 2)
    for tolerances in ((1.0,) * LAYERS, TOLERANCES)
]


@pytest.mark.parametrize("policy", GRID)
def test_many_tokens_skip_what_each_skips_by_the_loop(policy: SkipPolicy) -> None:
    assert walked(policy, list(range(TOKENS))) == [naive(policy, token) for token in range(TOKENS)]


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("policy", GRID[::3])
def test_a_single_token_skips_what_it_skips_by_the_loop(policy: SkipPolicy, on_device: bool) -> None:
    for token in range(12):
        assert walked(policy, [token], on_device=on_device) == [naive(policy, token)]


def test_the_grid_has_tokens_that_skip_again_after_one_that_ran() -> None:
    some = next(p for p in GRID if (p.threshold, p.max_skips, p.tolerances) == (0.8, 1, TOLERANCES))
    assert any(len(naive(some, token)) > 1 for token in range(TOKENS))
    paper = replace(some, tolerances=None)
    assert paper.make_rule().layers == some.make_rule().layers
    assert paper.to_dict() == {k: v for k, v in some.to_dict().items() if k != "tolerances"}


@pytest.mark.parametrize("k", [None, 0, 1, 2, 5])
@pytest.mark.parametrize("region", [(0, 7), (2, 6), (3, 4), (3, 3)])
def test_the_most_skips_are_those_of_a_token_that_is_always_saturated(
    region: tuple[int, int], k: int | None
) -> None:
    policy = SkipPolicy(
        cold_s=region[0], cold_e=region[1], threshold=-1.0, max_skips=k, tolerances=TOLERANCES
    )
    assert policy.most_skips() == len(naive(policy, 0))


def test_a_state_moves_as_a_whole_or_stays_itself() -> None:
    meta = torch.device("meta")
    state = LastCosineState(torch.zeros(2), torch.zeros(2, dtype=torch.int32), torch.ones(2))
    assert state.to(CPU) is state
    assert LastCosineState(0.5, 3).to(meta) == (0.5, 3, None)
    assert [part.device for part in state.to(meta) if isinstance(part, torch.Tensor)] == [meta] * 3


def test_rows_that_decide_together_have_one_cosine() -> None:
    policy = SkipPolicy(cold_s=0, cold_e=2, threshold=0.85, tolerances=(1.0, 1.0))
    h = torch.tensor([[1.0, 0.0]]).expand(3, 2)
    f = torch.tensor([[0.0, 0.0], [-2.0, 0.0], [0.0, 0.75]])  # cosines of 1, -1 and 0.8
    tokens = PassTokens(active=torch.ones(3, dtype=torch.bool), counted=torch.tensor([True, False, True]))
    for batch_rule, skips in (("rows", [True, False, False]), ("mean", [True] * 3), ("all", [False] * 3)):
        rule: Any = policy.make_rule(batch_rule=batch_rule)
        state = rule.after(0, rule.start(tokens, CPU), h, f, torch.ones(3, dtype=torch.bool))
        assert rule.before(1, state, h)[0].tolist() == skips
