"""The host, on modules laid out as vLLM's: a token in a batch gets what it gets alone; counts are right."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from gated import random_gates
from stacked import (
    HIDDEN,
    LAYERS,
    POLICIES,
    STATIC,
    STEPS,
    TOLERANCES,
    Stack,
    alone,
    assert_equal_but_for_rounding,
    batch,
    hosted,
    surrogates,
)
from torch import Tensor

from skipcal.core.chosen_ffns import ChosenFFNs
from skipcal.core.gate import GatePolicy
from skipcal.core.policy import Policy, SkipPolicy
from skipcal.core.substituted import Substituted
from skipcal.errors import ProfileMismatch, SessionError, UnsupportedModel
from skipcal.serving import operator
from skipcal.serving.host import ServingHost


@pytest.fixture
def stack() -> Stack:
    return Stack()


@pytest.mark.parametrize("name", POLICIES)
def test_a_token_in_a_batch_gets_what_it_gets_alone(name: str, stack: Stack) -> None:
    policy, stream = POLICIES[name], torch.randn(len(STEPS), HIDDEN)
    expected, skipped = alone(stack, policy, stream, STEPS)
    host = hosted(stack, policy)
    got = host.run(batch(STEPS), None, lambda: stack(stream))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert host.report.skipped_per_layer == skipped
    assert 0 < sum(skipped) < 7 * LAYERS
    assert host.report.decode_steps == 9 and host.report.decode_steps_after_warm_up == 7
    gathered = [len(STEPS) - n for n in skipped]
    assert [ffn.calls for ffn in stack.ffns] == [[n] for n in gathered]


# By method, the policies of two targets: in fixed sets other layers skip, and each has a warm-up of its own.
TARGETS: dict[str, dict[float, Policy]] = {
    "cosine": {
        0.2: SkipPolicy(cold_s=0, cold_e=6, threshold=0.95, warm_up_tokens=2),
        0.5: SkipPolicy(cold_s=0, cold_e=6, threshold=0.8, warm_up_tokens=1),
    },
    "cosine, two at most": {
        0.2: SkipPolicy(cold_s=1, cold_e=6, threshold=0.95, warm_up_tokens=2, max_skips=2),
        0.5: SkipPolicy(cold_s=1, cold_e=6, threshold=0.6, warm_up_tokens=2, max_skips=3),
    },
    "cosine, tolerances": {
        0.2: SkipPolicy(cold_s=1, cold_e=6, threshold=0.95, warm_up_tokens=2, tolerances=TOLERANCES),
        0.5: SkipPolicy(cold_s=0, cold_e=6, threshold=0.6, warm_up_tokens=1, tolerances=TOLERANCES),
    },
    **{
        name: {
            target: GatePolicy(
                gates=random_gates((1, 2, 4)),
                surrogates=surrogates(maps=maps),
                threshold=at,
                warm_up_tokens=2,
            )
            for target, at in ((0.2, 0.0), (0.5, 1.5))
        }
        for name, maps in (("gate", 1), ("gate of several maps", 4))
    },
    "static": {
        0.2: ChosenFFNs(method="static", layers=(4,), probability=1.0, warm_up_tokens=2),
        0.5: ChosenFFNs(method="static", layers=(0, 1, 3, 4, 5), probability=1.0, warm_up_tokens=2),
    },
}
TARGETS["static+surrogates"] = {
    target: Substituted(policy, surrogates()) for target, policy in TARGETS["static"].items()
}
TARGETS["static+fitted"] = {  # each set has surrogates of its own
    target: Substituted(policy, surrogates((0, 1, 4), seed), "fitted")
    for seed, (target, policy) in enumerate(TARGETS["static"].items())
}


@pytest.mark.parametrize("name", POLICIES)
def test_requests_with_targets_of_their_own_get_what_an_engine_with_that_target_gives(
    name: str, stack: Stack
) -> None:
    stream = torch.randn(len(STEPS), HIDDEN)
    asked = [None, 0.2, 0.5, None, 0.2, 0.5, 0.5, 0.2, 0.0, 0.5]
    expected, skipped = torch.zeros_like(stream), np.zeros(LAYERS, dtype=int)
    ruled = 0
    for target in (None, 0.2, 0.5, 0.0):
        own = [n for n, each in enumerate(asked) if each == target]
        policy = TARGETS[name].get(target, POLICIES[name]) if target else POLICIES[name]
        steps = [-1 if target == 0 else STEPS[n] for n in own]
        ruled += sum(step >= policy.warm_up_tokens for step in steps)
        expected[own], counts = alone(stack, policy, stream[own], steps)
        skipped += counts
    host = hosted(stack, POLICIES[name], policy_at=TARGETS[name].__getitem__)
    got = host.run(batch(STEPS, targets=asked), None, lambda: stack(stream))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert host.report.skipped_per_layer == skipped.tolist()
    assert host.report.decode_steps_after_warm_up == ruled
    assert host.report.opted_out_steps == 1
    single = host.run(batch([9], targets=[0.5]), None, lambda: stack(stream[:1]))
    host.detach()
    torch.testing.assert_close(single, alone(stack, TARGETS[name][0.5], stream[:1], [9])[0])


@pytest.mark.parametrize("name", POLICIES)
def test_each_request_has_the_counts_that_it_has_alone(name: str, stack: Stack) -> None:
    names, asked = "abcde", (None, 0.2, 0.5, 0.0, None)
    passes = [torch.randn(len(names), HIDDEN) for _ in range(4)]
    steps = [[n + at for at in (-1, 0, 1, 2, 4)] for n in range(4)]
    together = hosted(stack, POLICIES[name], policy_at=TARGETS[name].__getitem__)
    for each, stream in zip(steps, passes, strict=True):
        together.run(batch(each, targets=asked, names=names), None, partial(stack, stream))
    together.detach()
    found = {report.request_id: report for report in together.tally.requests()}
    for place, (request, target) in enumerate(zip(names, asked, strict=True)):
        lone = hosted(stack, POLICIES[name], policy_at=TARGETS[name].__getitem__)
        for each, stream in zip(steps, passes, strict=True):
            one = batch(each[place : place + 1], targets=[target], names=[request])
            lone.run(one, None, partial(stack, stream[place : place + 1]))
        lone.detach()
        [expected] = lone.tally.requests(request)
        assert found[request] == expected
        assert expected.target_skip_ratio == target
        assert (expected.method == "full") == (target == 0)
    skipping = [found[request] for request, target in zip(names, asked, strict=True) if target != 0]
    assert together.report.decode_steps == sum(report.decode_steps for report in skipping)
    assert together.report.opted_out_steps == found["d"].decode_steps == 4
    sums = zip(*(report.skipped_per_layer for report in skipping), strict=True)
    assert together.report.skipped_per_layer == [sum(layer) for layer in sums]
    assert sum(found["c"].skipped_per_layer) > 0


def test_a_target_where_none_is_served_is_an_error(stack: Stack) -> None:
    host = hosted(stack, STATIC)
    with pytest.raises(SessionError, match=r"target skip ratio of 0\.5, where none is served"):
        host.run(batch([5], targets=[0.5]), None, lambda: stack(torch.randn(1, HIDDEN)))


@pytest.mark.parametrize("name", POLICIES)
def test_tokens_that_are_not_gathered_get_the_same(name: str, stack: Stack) -> None:
    policy, stream = POLICIES[name], torch.randn(len(STEPS), HIDDEN)
    expected, skipped = alone(stack, policy, stream, STEPS)
    host = hosted(stack, policy, gathers=False)
    got = host.run(batch(STEPS), None, lambda: stack(stream))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert host.report.skipped_per_layer == skipped
    assert {len(ffn.calls) for ffn in stack.ffns} == {1}
    assert {calls for ffn in stack.ffns for calls in ffn.calls} == {len(STEPS)}
    host.run(batch([4, 5]), None, lambda: stack(stream[:2]))
    assert [len(ffn.calls) for ffn in stack.ffns] == [2 - n for n in host.report.unread_per_layer]


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("tokens", [1, 4])
def test_what_processes_agree_on_is_done_whatever_one_would_do(name: str, tokens: int, stack: Stack) -> None:
    asked: list[Tensor] = []

    def nobody_skips(skip: Tensor | bool) -> Tensor:
        asked.append(torch.as_tensor(skip).reshape(-1))
        return torch.zeros(tokens, dtype=torch.bool)

    stream = torch.randn(tokens, HIDDEN) * 3
    full = stack(stream)
    host = hosted(stack, POLICIES[name], agreed=nobody_skips)
    got = host.run(batch([5] * tokens), None, lambda: stack(stream))
    assert torch.equal(got, full)
    assert sum(host.report.skipped_per_layer) == 0 and torch.cat(asked).any()
    assert {len(skip) for skip in asked} == {tokens}


@pytest.mark.parametrize("name", POLICIES)
def test_tokens_before_the_warm_up_get_the_full_model(name: str, stack: Stack) -> None:
    stream = torch.randn(4, HIDDEN)
    full = stack(stream)
    host = hosted(stack, POLICIES[name])
    assert torch.equal(host.run(batch([-1, 0, 1, 1]), None, lambda: stack(stream)), full)
    mixed = host.run(batch([1, 7, -3, 7], out=[3]), None, lambda: stack(stream))
    torch.testing.assert_close(mixed[[0, 2, 3]], full[[0, 2, 3]], rtol=1e-5, atol=1e-5)
    assert host.report.opted_out_steps == 1
    assert host.report.passes == 1


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("steps", [[5], STEPS])
def test_rows_that_pad_a_pass_change_nothing(name: str, steps: list[int], stack: Stack) -> None:
    stream = torch.randn(len(steps), HIDDEN)
    host = hosted(stack, POLICIES[name])
    got = host.run(batch(steps), None, lambda: stack(stream))
    counts = [host.report.skipped_per_layer, host.report.unread_per_layer]
    host.detach()
    padded = torch.cat([stream, torch.full((3, HIDDEN), torch.nan)])
    host = hosted(stack, POLICIES[name])
    assert torch.equal(host.run(batch(steps), None, lambda: stack(padded))[: len(steps)], got)
    assert [host.report.skipped_per_layer, host.report.unread_per_layer] == counts


def test_rows_that_pad_a_pass_prove_nothing(stack: Stack) -> None:
    padded = torch.cat([torch.randn(2, HIDDEN), torch.full((3, HIDDEN), torch.nan)])
    host = ServingHost(stack.blocks, STATIC)
    host.attach()
    host.run(batch([-2, -1]), None, lambda: stack(padded))
    assert host.proven


def test_weights_are_unread_where_no_token_of_a_pass_needs_them(stack: Stack) -> None:
    host = hosted(stack, STATIC)
    for steps in ([4, 5, 6], [4, 1, 6], [9], [4, -1]):
        host.run(batch(steps), None, partial(stack, torch.randn(len(steps), HIDDEN)))
    report = host.report
    assert report.unread_per_layer == [0, 2, 0, 2, 2, 0]
    assert report.skipped_per_layer == [0, 7, 0, 7, 7, 0]
    assert report.passes == 4
    assert report.unread_ratio == 6 / (LAYERS * 4)
    assert report.skip_ratio == 21 / (LAYERS * 7)
    assert report.skip_ratio_all == 21 / (LAYERS * 8)
    assert [len(ffn.calls) for ffn in stack.ffns] == [4, 2, 4, 2, 2, 4]


@pytest.mark.parametrize("name", POLICIES)
def test_tokens_that_are_computed_again_skip_and_are_not_counted(name: str, stack: Stack) -> None:
    stream = torch.randn(4, HIDDEN)
    host = hosted(stack, POLICIES[name])
    once = host.run(batch([3, 4, 5, 6]), None, lambda: stack(stream))
    counts = host.report.skipped_per_layer.copy()
    again = host.run(batch([3, 4, 5, 6], again=range(4)), None, lambda: stack(stream))
    single = host.run(batch([6], again=[0]), None, lambda: stack(stream[3:]))
    assert torch.equal(once, again)
    torch.testing.assert_close(single, once[3:], rtol=1e-5, atol=1e-5)
    assert host.report.skipped_per_layer == counts
    assert host.report.decode_steps == host.report.decode_steps_after_warm_up == 4


def test_the_model_outside_of_passes_is_the_full_one_and_nothing_stays(stack: Stack) -> None:
    stream = torch.randn(3, HIDDEN)
    full = stack(stream)
    host = hosted(stack, STATIC)
    assert torch.equal(stack(stream), full)
    with pytest.raises(RuntimeError, match="broken"):
        host.run(batch([5, 6, 7]), None, _broken)
    assert torch.equal(stack(stream), full)
    host.detach()
    assert torch.equal(host.run(batch([-1, -1, -1]), None, lambda: stack(stream)), full)
    assert all("forward" not in module.__dict__ for module in stack.modules())


def _broken() -> Any:
    raise RuntimeError("broken")


def test_an_ffn_that_is_not_asked_is_an_error(stack: Stack) -> None:
    host = hosted(stack, STATIC)
    stack.ffns[3].forward = lambda pair: pair[0]
    with pytest.raises(SessionError, match="5 of 6 FFNs asked whether to skip"):
        host.run(batch([5]), None, lambda: stack(torch.randn(1, HIDDEN)))


def test_a_policy_for_more_layers_is_refused(stack: Stack) -> None:
    with pytest.raises(ProfileMismatch, match="layer 7 lies beyond the model's 6 layers"):
        ServingHost(stack.blocks, ChosenFFNs(method="static", layers=(7,), probability=1, warm_up_tokens=0))


@pytest.mark.parametrize("layer", [0, 3, LAYERS - 1])
def test_a_stream_that_is_not_h_and_f_is_refused_on_the_first_pass(layer: int, stack: Stack) -> None:
    after = stack.blocks[layer].after
    own = after.forward
    after.forward = lambda x, residual: own(x * 1.01, residual)
    host = ServingHost(stack.blocks, STATIC)
    host.attach()
    with pytest.raises(UnsupportedModel, match=rf"layer {layer}: h \+ f is not the stream"):
        host.run(batch([-2, -1]), None, lambda: stack(torch.randn(2, HIDDEN)))


def test_layers_that_are_not_called_are_refused_on_the_first_pass(stack: Stack) -> None:
    host = ServingHost(stack.blocks, STATIC)
    host.attach()
    with pytest.raises(UnsupportedModel, match="layer 0: norm, FFN and next norm were not called in turn"):
        host.run(batch([-1]), None, lambda: None)


def test_no_token_skips_before_anything_is_proven(stack: Stack) -> None:
    host = ServingHost(stack.blocks, STATIC)
    host.attach()
    with pytest.raises(SessionError, match="nothing is proven yet"):
        host.run(batch([5]), None, lambda: stack(torch.randn(1, HIDDEN)))


# Compiled passes: the operator asks whoever the running pass belongs to


@pytest.fixture
def context(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What vLLM keeps with a pass, of the engine that runs; vLLM is not here."""
    layers: dict[str, Any] = {}
    monkeypatch.setattr(operator, "_layers", lambda: layers)
    return layers


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def compiled(stack: Stack, policy: Any, layers: dict[str, Any]) -> tuple[ServingHost, Any]:
    """A host, and the stack compiled whole under it; all is proven by an eager pass."""
    host = ServingHost(stack.blocks, policy)
    host.attach(layers)
    host.run(batch([-2, -1]), None, lambda: stack(torch.randn(2, HIDDEN)))
    return host, torch.compile(stack, fullgraph=True, backend="aot_eager", dynamic=True)


def test_what_is_compiled_once_serves_every_policy_and_none(context: dict[str, Any]) -> None:
    stack, stream = Stack(), torch.randn(len(STEPS), HIDDEN)
    full = stack(stream)
    host, passes = compiled(stack, STATIC, context)
    for name, policy in POLICIES.items():
        host.detach()
        expected, skipped = alone(stack, policy, stream, STEPS)
        host = ServingHost(stack.blocks, policy)
        host.attach(context)
        host.run(batch([-1]), None, lambda: stack(torch.randn(1, HIDDEN)))
        got = host.run(batch(STEPS), None, lambda: passes(stream))
        assert_equal_but_for_rounding(got, expected)
        assert host.report.skipped_per_layer == skipped and sum(skipped) > 0, name
    host.detach()
    assert_equal_but_for_rounding(passes(stream), full)
    assert all("forward" not in module.__dict__ for module in stack.modules())


def test_two_engines_in_one_process_do_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    engines: list[Any] = []
    for policy in (STATIC, POLICIES["gate"]):
        stack, layers, stream = Stack(), dict[str, Any](), torch.randn(len(STEPS), HIDDEN)
        monkeypatch.setattr(operator, "_layers", partial(dict, layers))
        expected, skipped = alone(stack, policy, stream, STEPS)
        host, passes = compiled(stack, policy, layers)
        engines.append((host, partial(passes, stream), layers, expected, skipped))
    for host, run, layers, expected, skipped in (*engines, engines[0]):
        before = host.report.skipped_per_layer.copy()
        monkeypatch.setattr(operator, "_layers", partial(dict, layers))
        assert_equal_but_for_rounding(host.run(batch(STEPS), None, run), expected)
        assert [b - a for a, b in zip(before, host.report.skipped_per_layer, strict=True)] == skipped
