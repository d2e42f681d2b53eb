"""Decode steps are told by the tokens' positions, and each is counted once."""

from __future__ import annotations

import numpy as np

from skipcal.serving.clock import BatchTokens, Clock, decode_steps


def passed(clock: Clock, requests: dict[str, tuple[int, int, int]], *, alive: str = "abcd") -> BatchTokens:
    """A pass over requests by name: tokens computed before, tokens of the prompt, tokens of this pass."""
    computed, prompt, lengths = (np.array(each) for each in zip(*requests.values(), strict=True))
    return clock.tokens(
        list(requests),
        computed=computed,
        prompt=prompt,
        starts=np.concatenate([[0], lengths.cumsum()]),
        targets=[0.0 if name == "d" else None for name in requests],
        alive=set(alive),
    )


def test_a_step_is_the_position_past_the_prompt() -> None:
    computed, prompt = np.array([0, 4, 9, 0]), np.array([3, 8, 6, 2])
    starts = np.array([0, 3, 5, 6, 11])  # a prompt, a chunk of one, a decode step, one that is computed again
    steps = decode_steps(computed, prompt, starts)
    assert steps.tolist() == [-3, -2, -1, -4, -3, 3, -2, -1, 0, 1, 2]


def test_a_prompt_in_chunks_ends_where_it_would_in_one() -> None:
    clock = Clock()
    found = [
        passed(clock, {"a": (at, 5, length)}).steps.tolist()
        for at, length in ((0, 2), (2, 2), (4, 1), (5, 1))
    ]
    assert found == [[-5, -4], [-3, -2], [-1], [0]]


def test_what_a_preempted_request_computes_again_is_not_counted_again() -> None:
    clock = Clock()
    first = [passed(clock, {"a": (at, 2, length)}) for at, length in ((0, 2), (2, 1), (3, 1), (4, 1))]
    again = passed(clock, {"a": (0, 2, 6)})  # its three steps, and the next
    assert [int(t.counted.sum()) for t in first] == [0, 1, 1, 1]
    assert again.steps.tolist() == [-2, -1, 0, 1, 2, 3]
    assert again.counted.tolist() == [False, False, False, False, False, True]


def test_requests_of_one_pass_are_told_apart() -> None:
    clock = Clock()
    passed(clock, {"a": (2, 2, 1), "d": (3, 3, 1)})
    found = passed(clock, {"d": (3, 3, 2), "a": (3, 2, 1), "b": (0, 2, 2)})
    assert found.steps.tolist() == [0, 1, 1, -2, -1]
    assert found.counted.tolist() == [False, True, True, False, False]
    assert found.owner.tolist() == [0, 0, 1, 2, 2]
    assert found.targets == (0.0, None, None)
    assert found.skips.tolist() == [False, False, True, True, True]


def test_a_name_that_is_used_again_is_another_request() -> None:
    clock = Clock()
    passed(clock, {"a": (2, 2, 1)})
    passed(clock, {"b": (0, 2, 2)}, alive="b")
    assert passed(clock, {"a": (2, 2, 1)}).counted.tolist() == [True]


def test_the_next_pass_tells_which_requests_have_ended() -> None:
    clock = Clock()
    assert passed(clock, {"a": (0, 2, 2), "b": (0, 2, 2), "c": (0, 1, 1)}).ended == ()
    found = passed(clock, {"d": (0, 2, 2)}, alive="bd")  # b waits
    assert (found.requests, sorted(found.ended)) == (("d",), ["a", "c"])
    assert passed(clock, {"b": (2, 2, 1)}, alive="bd").ended == ()
