"""The rule `cosine` as what it is, functions of tensors, against the loop of the design, token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from token_streams import HIDDEN, LAYERS, TOKENS, cosine, streams

from skipcal.core.batch_rule import judged_together
from skipcal.core.cosine import CosineRule, CosineState
from skipcal.core.host import PassTokens
from skipcal.core.policy import SkipPolicy

CPU = torch.device("cpu")


def naive(policy: SkipPolicy, token: int) -> list[int]:
    """The layers that a token skips."""
    h, f = streams()
    armed = False
    skipped: list[int] = []
    for layer in range(LAYERS):
        inside = policy.cold_s <= layer < policy.cold_e
        if inside and armed and (policy.max_skips is None or len(skipped) < policy.max_skips):
            skipped.append(layer)
        elif inside and not armed and cosine(h[layer, token], f[layer, token]) >= policy.threshold:
            armed = True
    return skipped


def walked(policy: SkipPolicy, tokens: list[int], **announced: Any) -> tuple[list[list[int]], CosineState]:
    """The layers that each of the tokens skips when they go through together, and the last state."""
    h, f = streams()
    rule: Any = policy.make_rule()
    state = rule.start(PassTokens(active=torch.ones(len(tokens), dtype=torch.bool), **announced), CPU)
    skipped: list[list[int]] = [[] for _ in tokens]
    for layer in rule.layers:
        skip, state = rule.before(layer, state, h[layer, tokens])
        masks = skip.tolist() if isinstance(skip, torch.Tensor) else [skip]
        for place, skips in enumerate(masks):
            skipped[place] += [layer] * skips
        if not all(masks):
            ran = ~skip if isinstance(skip, torch.Tensor) else True
            state = rule.after(layer, state, h[layer, tokens], f[layer, tokens], ran)
    return skipped, state


GRID = [
    SkipPolicy(cold_s=s, cold_e=e, threshold=threshold, max_skips=k)
    for s, e in [(0, 7), (2, 6), (3, 3)]
    for threshold in (-1.0, 0.3, 0.8, 2.0)
    for k in (None, 0, 1, 2)
]


@pytest.mark.parametrize("policy", GRID)
def test_many_tokens_skip_what_each_skips_by_the_loop(policy: SkipPolicy) -> None:
    expected = [naive(policy, token) for token in range(TOKENS)]
    assert walked(policy, list(range(TOKENS)))[0] == expected


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("policy", GRID[::3])
def test_a_single_token_skips_what_it_skips_by_the_loop(policy: SkipPolicy, on_device: bool) -> None:
    for token in range(12):
        skipped, state = walked(policy, [token], on_device=on_device)
        assert skipped == [naive(policy, token)]
        if policy.max_skips is not None:
            assert int(state.skipped) == len(skipped[0])
        # A number where the host may look, a tensor where a captured pass must not.
        assert isinstance(state.armed, torch.Tensor) is on_device
        assert isinstance(state.skipped, torch.Tensor) is on_device


def test_the_grid_has_tokens_that_skip_some_and_not_all() -> None:
    some = next(policy for policy in GRID if policy.threshold == 0.8 and policy.max_skips is None)
    assert {len(naive(some, token)) for token in range(TOKENS)} == {0, 1, 2, 3, 4, 5, 6}


def test_a_token_that_did_not_run_is_not_armed_by_what_stands_in_its_place() -> None:
    rule = CosineRule(range(4), threshold=0.5)
    state = rule.start(PassTokens(active=torch.ones(2, dtype=torch.bool)), CPU)
    h = torch.ones(2, HIDDEN)
    state = rule.after(0, state, h, torch.zeros_like(h), torch.tensor([True, False]))
    assert torch.equal(torch.as_tensor(state.armed), torch.tensor([True, False]))


def test_rows_whose_text_has_ended_have_no_say_in_a_common_decision() -> None:
    live = torch.tensor([True, False, True])
    for batch_rule, armed in (("rows", [True, False, False]), ("mean", [True] * 3), ("all", [False] * 3)):
        rule = CosineRule(range(4), threshold=0.85, batch_rule=batch_rule)
        tokens = PassTokens(active=torch.ones(3, dtype=torch.bool), counted=live)
        h = torch.tensor([[1.0, 0.0]]).expand(3, 2)
        # cosines of 1, -1 and 0.8: among the live ones the mean is 0.9 and the smallest 0.8
        f = torch.tensor([[0.0, 0.0], [-2.0, 0.0], [0.0, 0.75]])
        state = rule.after(0, rule.start(tokens, CPU), h, f, torch.ones(3, dtype=torch.bool))
        assert torch.equal(torch.as_tensor(state.armed), torch.tensor(armed))


@pytest.mark.parametrize("live", [None, torch.tensor([True, True, False])])
def test_what_judges_rows_together_is_the_smallest_or_the_mean_of_the_live(live: torch.Tensor | None) -> None:
    values = torch.tensor([0.9, 0.5, 0.1])
    seen = values.tolist() if live is None else values[live].tolist()
    assert judged_together(values, live, "rows").tolist() == values.tolist()
    assert judged_together(values, live, "all").tolist() == [pytest.approx(min(seen))] * 3
    assert judged_together(values, live, "mean").tolist() == [pytest.approx(sum(seen) / len(seen))] * 3


def test_the_smallest_of_ended_rows_alone_is_no_obstacle() -> None:
    """A pass of rows that are all over: nothing is divided by, and nothing kept from arming."""
    over = torch.zeros(2, dtype=torch.bool)
    assert judged_together(torch.tensor([0.2, 0.3]), over, "all").tolist() == [1.0, 1.0]


def test_a_state_moves_as_a_whole_or_stays_itself() -> None:
    meta = torch.device("meta")
    armed, skipped = torch.zeros(2, dtype=torch.bool), torch.zeros(2, dtype=torch.int32)
    state = CosineState(armed, skipped)
    assert state.to(CPU) is state
    assert CosineState(True, 3).to(meta) == (True, 3, None)
    moved = CosineState(armed, skipped, armed).to(meta)
    assert [part.device for part in moved if isinstance(part, torch.Tensor)] == [meta] * 3
    assert state.to(meta).live is None


def test_a_fresh_state_knows_where_it_is_and_who_counts() -> None:
    rule = CosineRule(range(1, 5), threshold=0.5)
    live = torch.tensor([True, False])
    state = rule.start(PassTokens(active=torch.ones(2, dtype=torch.bool), counted=live), torch.device("meta"))
    for part, dtype in ((state.armed, torch.bool), (state.skipped, torch.int32)):
        assert isinstance(part, torch.Tensor)
        assert (part.dtype, part.shape, part.device) == (dtype, (2,), torch.device("meta"))
    assert state.live is live
    assert rule.layers == range(1, 5)
    assert rule.batch_rule == "rows"


@pytest.mark.parametrize("tokens", [1, 2])
def test_a_cosine_that_equals_the_threshold_arms(tokens: int) -> None:
    rule = CosineRule(range(4), threshold=1.0)
    state = rule.start(PassTokens(active=torch.ones(tokens, dtype=torch.bool)), CPU)
    h = torch.tensor([[1.0, 0.0]]).expand(tokens, 2)
    state = rule.after(0, state, h, torch.zeros_like(h), torch.ones(tokens, dtype=torch.bool))
    assert torch.as_tensor(state.armed).reshape(-1).tolist() == [True] * tokens
