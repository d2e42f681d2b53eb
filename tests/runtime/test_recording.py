"""Recordings against the functions they were made of, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from skipcal.runtime.engines.recording import Branch, NotRecordable, leaf, record

WEIGHT = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))


def norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6).to(x.dtype)


def with_views(x: Tensor) -> Tensor:
    a, b = x.view(2, 2, 4).transpose(0, 1).chunk(2, dim=-1)
    return torch.cat((-b[..., 1:], a, b[..., :1]), dim=-1).reshape(4, -1)


def in_place(x: Tensor) -> Tensor:
    y = x.clone()
    y[1:, ::2] = 7.0
    y += 1
    y.mul_(WEIGHT).clamp_(max=5.0)
    return y


def with_containers(x: Tensor) -> Tensor:
    total = torch.stack([*x.unbind(), *torch.max(x, dim=0)[:1]])
    return torch.einsum("ij,kj->ik", total, WEIGHT)


def with_a_mask(x: Tensor) -> Tensor:
    seen = torch.arange(4)[:, None] >= torch.arange(4)
    return F.scaled_dot_product_attention(x[None], x[None], F.linear(x, WEIGHT)[None], attn_mask=seen)[0]


def with_infinity(x: Tensor) -> Tensor:
    return x.masked_fill(x > 0, float("-inf")).softmax(-1)


FUNCTIONS = [norm, with_views, in_place, with_containers, with_a_mask, with_infinity]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_recording_does_what_the_function_does(
    function: Callable[[Tensor], Tensor], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "WEIGHT", WEIGHT.to(dtype))
    draws = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(1)).to(dtype)
    recording = record(function, draws[0].clone())
    for x in draws:
        assert torch.equal(recording.repeat(x.clone()), function(x.clone()))
    assert recording.calls > 0


def test_a_weight_that_changes_in_place_is_the_changed_one() -> None:
    weight = torch.ones(3)
    recording = record(lambda x: x * weight, torch.ones(3))
    weight.fill_(5)
    assert recording.repeat(torch.ones(3)).tolist() == [5.0, 5.0, 5.0]


def test_several_results_come_back_as_they_were() -> None:
    recording = record(lambda x: (x + 1, [x * 2, None]), torch.ones(2))
    first, (second, third) = recording.repeat(torch.full((2,), 3.0))
    assert (first.tolist(), second.tolist(), third) == ([4.0, 4.0], [6.0, 6.0], None)


def test_calls_that_change_nothing_are_left_out() -> None:
    recording = record(lambda x: (x.to(torch.float32).contiguous() + x.shape[0]).float(), torch.ones(2))
    assert recording.calls == 1


def test_a_leaf_is_called_anew() -> None:
    calls = []

    @leaf
    def decide(x: Tensor, *, scale: float) -> Tensor:
        calls.append(x.item())  # which reads a value
        return x * scale if calls[-1] > 0 else torch.zeros_like(x)

    def around(x: Tensor) -> Tensor:
        decided: Tensor = decide(x + 1, scale=2.0)
        return decided - 1

    recording = record(around, torch.tensor(1.0))
    assert [float(recording.repeat(torch.tensor(v))) for v in (3.0, -4.0)] == [7.0, -1.0]
    assert calls == [2.0, 4.0, -3.0]
    assert float(decide(torch.tensor(4.0), scale=0.5)) == 2.0  # outside a recording it is itself


def first_leaf(x: Tensor) -> Tensor:
    return x.abs()


def second_leaf(x: Tensor, power: int = 2) -> Tensor:
    return x.pow(power)


FIRST, SECOND = leaf(first_leaf), leaf(second_leaf)


@pytest.mark.parametrize(
    ("function", "calls"),
    [
        (lambda x: SECOND(FIRST(x * 2)) + x * 2, None),  # another tensor than the one that went in
        (lambda h: h + SECOND(FIRST(h)), 1),
        (lambda h: SECOND(FIRST(h)) + h, 1),
        (lambda h: torch.add(h, SECOND(FIRST(h))) * 3, 2),
        (lambda h: torch.add(h, SECOND(FIRST(h)), alpha=2), None),
        (lambda h: h - SECOND(FIRST(h)), None),
        (lambda h: h + SECOND(FIRST(h) * 1), None),
        (lambda h: h + SECOND(FIRST(h), 3), None),
        (lambda h: h + SECOND(FIRST(h)).neg(), None),
        (lambda h: h + FIRST(SECOND(h)), None),
        (lambda h: h + FIRST(h), None),
    ],
)
def test_a_residual_branch_is_one_call_where_it_is_one(function: Any, calls: int | None) -> None:
    streams = []

    def whole(h: Tensor) -> Tensor:
        streams.append(h)
        return h + h.abs().pow(2)

    branch = Branch([first_leaf, second_leaf], whole)
    recording = record(function, torch.tensor([1.0, -3.0]), branches=[branch])
    h = torch.tensor([0.5, -2.0])
    assert torch.equal(recording.repeat(h), function(h))
    assert (streams == [h]) == (calls is not None)
    if calls is not None:
        assert recording.calls == calls


def test_what_is_used_again_is_not_hidden_in_a_branch() -> None:
    def f_again(h: Tensor) -> tuple[Tensor, Tensor]:
        f = SECOND(FIRST(h))
        return h + f, f * 2

    def h_again(h: Tensor) -> tuple[Tensor, Tensor]:
        total = h + SECOND(FIRST(h))
        total += 1
        return total, h * 2

    for function, expected in ((f_again, ([12.0], [18.0])), (h_again, ([13.0], [6.0]))):
        branch = Branch([first_leaf, second_leaf], lambda h: h)
        first, second = record(function, torch.ones(1), branches=[branch]).repeat(torch.tensor([3.0]))
        assert (first.tolist(), second.tolist()) == expected


def reads_a_value(x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x


def asks_for_a_list(x: Tensor) -> Tensor:
    return x * float(x.tolist()[0][0])


def hides_a_number(x: Tensor) -> Tensor:
    return x * float(x.numpy()[0, 0])


def counts_values(x: Tensor) -> Tensor:
    return torch.zeros(len(x.nonzero()))


def picks_by_a_mask(x: Tensor) -> Tensor:
    return x[x > 0]


def draws(x: Tensor) -> Tensor:
    return x + torch.randn(4, 4)


def makes_one_unseen(x: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():
        hidden = x * 2
    return hidden + 1


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (reads_a_value, "reads the values"),
        (asks_for_a_list, "reads the values"),
        (hides_a_number, "reads the values"),
        (counts_values, "depends on the values"),
        (picks_by_a_mask, "depends on the values"),
        (draws, "random"),
        (makes_one_unseen, "no call of torch is seen"),
    ],
)
def test_what_a_list_of_calls_would_get_wrong_is_refused(function: Any, reason: str) -> None:
    with pytest.raises(NotRecordable, match=reason):
        record(function, torch.ones(4, 4))
    assert torch.ones(1).item() == 1.0  # nothing listens any more
