"""Whole passes in a graph: what is decided in them, and counted, is what the host decides outside.

The graph is a stand-in: a pass over the stack as the list of its torch calls, recorded once and repeated. As
a real one it refuses what reads a value or makes a shape of one, and runs no Python but these calls again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from gated import random_gates
from interpreted import Reads, small_blocks
from stacked import (
    FFN,
    HIDDEN,
    LAYERS,
    POLICIES,
    STATIC,
    GatedFFN,
    Stack,
    assert_equal_but_for_rounding,
    batch,
    hosted,
    surrogates,
)
from torch import Tensor, nn

from skipcal.core.chosen_ffns import ChosenFFNs
from skipcal.core.gate import GatePolicy
from skipcal.core.policy import Policy, SkipPolicy
from skipcal.core.substituted import Substituted
from skipcal.errors import SessionError
from skipcal.ops.ffn import MAX_ROWS
from skipcal.runtime.engines.recording import NotRecordable, record
from skipcal.serving import captured, host
from skipcal.serving.clock import BatchTokens
from skipcal.serving.host import ServingHost

GATES, MAPS, SEVERAL = random_gates((1, 2, 4)), surrogates(), surrogates(maps=4)
OWN: dict[str, Policy] = {
    **{name: policy for name, policy in POLICIES.items() if name != "cosine, tolerances"},
    "gate": GatePolicy(gates=GATES, surrogates=MAPS, threshold=0.5, warm_up_tokens=2),
    "gate of several maps": GatePolicy(gates=GATES, surrogates=SEVERAL, threshold=0.5, warm_up_tokens=2),
    "static+surrogates": Substituted(STATIC, MAPS),
    "full": SkipPolicy(cold_s=1, cold_e=1, threshold=2.0),
}
KERNELS = (
    "cosine, two at most",
    "gate",
    "gate of several maps",
    "static+surrogates",
)  # one for each kind of rule, interpreted


def static(layers: Sequence[int], warm_up: int) -> ChosenFFNs:
    return ChosenFFNs(method="static", layers=tuple(layers), probability=1.0, warm_up_tokens=warm_up)


# What requests with a target get, in graphs that hold the engine's own gates and maps.
TARGETS: dict[str, dict[float, Policy]] = {
    "cosine": {
        0.2: SkipPolicy(cold_s=0, cold_e=6, threshold=0.95, warm_up_tokens=2),
        0.5: SkipPolicy(cold_s=0, cold_e=6, threshold=0.8, warm_up_tokens=1, max_skips=2),
    },
    "cosine, two at most": {
        0.2: SkipPolicy(cold_s=1, cold_e=6, threshold=0.95, warm_up_tokens=2),
        0.5: SkipPolicy(cold_s=1, cold_e=6, threshold=0.6, warm_up_tokens=4, max_skips=3),
    },
    "gate": {
        target: GatePolicy(gates=GATES, surrogates=MAPS, threshold=at, warm_up_tokens=warm_up)
        for target, at, warm_up in ((0.2, 0.0, 2), (0.5, 1.5, 4))
    },
    "gate of several maps": {
        target: GatePolicy(gates=GATES, surrogates=SEVERAL, threshold=at, warm_up_tokens=warm_up)
        for target, at, warm_up in ((0.2, 0.0, 2), (0.5, 1.5, 4))
    },
    "static": {0.2: static((4,), 2), 0.5: static((0, 1, 3, 4, 5), 4)},
    "static+surrogates": {
        0.2: Substituted(static((4,), 2), MAPS), 0.5: Substituted(static((0, 1, 3, 4, 5), 4), MAPS)
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch)


@pytest.fixture
def stack() -> Stack:
    return Stack(GatedFFN)


@contextmanager
def capturing() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "capturing", lambda x: True)
        yield


class Graph:
    """A pass over so many rows, as a CUDA graph would hold it."""

    def __init__(self, stack: Stack, rows: int) -> None:
        self.rows, self._stream_static = rows, torch.randn(rows, HIDDEN)
        with capturing():
            self._recording = record(stack, self._stream_static)

    def replay(self, stream: Tensor) -> Tensor:
        """Rows beyond the stream are what another pass has left there."""
        self._stream_static.fill_(torch.nan)
        self._stream_static[: len(stream)] = stream
        out: Tensor = self._recording.repeat(self._stream_static)
        return out.clone()


class Launches:
    """The same without a graph, by Triton's interpreter: what kernels would do in one."""

    def __init__(self, stack: Stack, rows: int) -> None:
        self.rows, self._stack = rows, stack
        with capturing():
            stack(torch.zeros(rows, HIDDEN))

    def replay(self, stream: Tensor) -> Tensor:
        padded = torch.full((self.rows, HIDDEN), torch.nan)
        padded[: len(stream)] = stream
        with capturing():
            out: Tensor = self._stack(padded)
        return out


class RealGraph:
    """One of CUDA."""

    def __init__(self, stack: Stack, rows: int) -> None:
        self.rows, self._stream_static = rows, torch.zeros(rows, HIDDEN, device="cuda")
        stack(self._stream_static)  # libraries are set up lazily
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._out_static = stack(self._stream_static)

    def replay(self, stream: Tensor) -> Tensor:
        self._stream_static.fill_(torch.nan)
        self._stream_static[: len(stream)] = stream
        self._graph.replay()
        out: Tensor = self._out_static.clone()
        return out


def on_device(stack: Stack, policy: Policy, *, sizes: Sequence[int] = (1, 4), **more: Any) -> ServingHost:
    found = ServingHost(stack.blocks, policy, **more)
    assert found.prepare_graphs(sizes) is None
    found.attach()
    stream = torch.randn(2, HIDDEN, device=stack.last.weight.device)
    found.run(batch([-2, -1]), None, lambda: stack(stream))  # on which all is proven
    return found


def replayed(
    found: ServingHost, graph: Graph | Launches | RealGraph, tokens: BatchTokens, stream: Tensor
) -> Tensor:
    out: Tensor = found.replay(tokens, graph.rows, partial(graph.replay, stream))
    return out[: len(stream)]


def assert_same(got: ServingHost, expected: ServingHost) -> None:
    assert got.report == expected.report
    mine, others = ([r for r in each.tally.requests() if r.request_id[0] == "r"] for each in (got, expected))
    assert mine == others


def passes(rows: int, targets: bool) -> list[tuple[BatchTokens, Tensor]]:
    """Of the same requests: a warm-up that ends, one who opts out, steps that were computed before."""
    names = [f"request {n}" for n in range(rows)]
    asked = [None, 0.0, 0.5, 0.2, None, 0.5][:rows] if targets else [None, 0.0, *[None] * 4][:rows]
    return [
        (
            batch([n + step for step in (2, 0, -1, 3, 1, 1)[:rows]], again=again, targets=asked, names=names),
            torch.randn(rows, HIDDEN),
        )
        for n, again in enumerate(([], [0, 3], [2], [], []))
    ]


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize(("rows", "of_graph"), [(1, 1), (1, 4), (6, 6), (6, 16)])
@pytest.mark.usefixtures("references")
def test_replays_decide_and_count_as_passes_outside_do(
    name: str, rows: int, of_graph: int, stack: Stack
) -> None:
    targets = name in TARGETS
    more: dict[str, Any] = {"policy_at": TARGETS[name].__getitem__} if targets else {}
    given = passes(rows, targets)
    outside = hosted(stack, OWN[name], **more)
    expected = [outside.run(tokens, None, partial(stack, stream)) for tokens, stream in given]
    outside.detach()
    inside = on_device(stack, OWN[name], **more)
    graph = Graph(stack, of_graph)
    for (tokens, stream), rows_expected in zip(given, expected, strict=True):
        got = replayed(inside, graph, tokens, stream)
        assert_equal_but_for_rounding(got, rows_expected)
    assert_same(inside, outside)
    assert (sum(outside.report.skipped_per_layer) > 0) == (name != "full")


def test_a_rule_that_only_the_host_knows_is_not_put_into_graphs(stack: Stack) -> None:
    host = hosted(stack, POLICIES["cosine, tolerances"])
    assert host.prepare_graphs((1, 4)) == "ffn-skip+damage is not decided on the device"


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("rows", "of_graph"), [(1, 1), (6, 8)])
def test_so_do_the_kernels(name: str, rows: int, of_graph: int, stack: Stack) -> None:
    given = passes(rows, targets=True)
    outside = hosted(stack, OWN[name], policy_at=TARGETS[name].__getitem__)
    expected = [outside.run(tokens, None, partial(stack, stream)) for tokens, stream in given]
    outside.detach()
    inside = on_device(stack, OWN[name], policy_at=TARGETS[name].__getitem__)
    launches = Launches(stack, of_graph)
    for (tokens, stream), rows_expected in zip(given, expected, strict=True):
        got = replayed(inside, launches, tokens, stream)
        assert_equal_but_for_rounding(got, rows_expected)
    assert_same(inside, outside)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize(("rows", "of_graph"), [(1, 1), (6, 16)])
def test_so_do_graphs_of_a_gpu(name: str, rows: int, of_graph: int, stack: Stack) -> None:
    stack.cuda()
    given = [(tokens, stream.cuda()) for tokens, stream in passes(rows, targets=True)]
    outside = hosted(stack, OWN[name], policy_at=TARGETS[name].__getitem__)
    expected = [outside.run(tokens, None, partial(stack, stream)) for tokens, stream in given]
    outside.detach()
    inside = on_device(stack, OWN[name], sizes=[of_graph], policy_at=TARGETS[name].__getitem__)
    graph = RealGraph(stack, of_graph)
    for (tokens, stream), rows_expected in zip(given, expected, strict=True):
        assert_equal_but_for_rounding(replayed(inside, graph, tokens, stream), rows_expected)
    assert_same(inside, outside)


@pytest.mark.parametrize("rows", [1, 3])
def test_padding_makes_no_weight_be_read(rows: int, stack: Stack, reads: Reads) -> None:
    found = on_device(stack, OWN["static+surrogates"])
    launches = Launches(stack, 4)
    before = {n: reads.of(stack.ffns[n].down_proj.weight).sum() for n in range(LAYERS)}
    maps = {n: reads.of(MAPS.maps[n].up).sum() for n in (1, 4)}
    replayed(found, launches, batch([9] * rows), torch.randn(rows, HIDDEN))
    read = {n for n in range(LAYERS) if reads.of(stack.ffns[n].down_proj.weight).sum() > before[n]}
    assert not read & {*STATIC.layers}
    replayed(found, launches, batch([0] * rows), torch.randn(rows, HIDDEN))
    assert all(reads.of(stack.ffns[n].down_proj.weight).sum() > before[n] for n in STATIC.layers)
    in_warm_up = {n: reads.of(MAPS.maps[n].up).sum() for n in (1, 4)}
    replayed(found, launches, batch([1] * rows), torch.randn(rows, HIDDEN))
    assert {n: reads.of(MAPS.maps[n].up).sum() for n in (1, 4)} == in_warm_up != maps


@pytest.mark.usefixtures("references")
def test_what_decides_on_the_host_cannot_be_captured(stack: Stack) -> None:
    """So the stand-in tells."""
    found = hosted(stack, OWN["gate"])
    with pytest.raises(NotRecordable):
        found.run(batch([5, 6]), None, lambda: record(stack, torch.randn(2, HIDDEN)))


@pytest.mark.usefixtures("references")
def test_passes_in_pieces_lie_between_and_sums_are_fetched_when_slots_run_out(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captured, "SLOTS", 5)
    outside = hosted(stack, OWN["gate"])
    outside.detach()
    inside = on_device(stack, OWN["gate"])
    graph = Graph(stack, 4)
    inside.detach()
    for n in range(9):
        names = [f"r{n // 2 + row}" for row in range(3)]
        tokens, stream = batch([n + 2] * 3, names=names), torch.randn(3, HIDDEN)
        ended = (f"r{n // 2 - 1}",) if n % 2 == 0 else ()
        tokens = replace(tokens, ended=ended)
        outside.attach()
        outside.run(tokens, None, partial(stack, stream))
        outside.detach()
        inside.attach()
        if n in (3, 6):
            inside.run(tokens, None, partial(stack, stream))
        else:
            replayed(inside, graph, tokens, stream)
        inside.detach()
    assert_same(inside, outside)
    assert sum(inside.report.skipped_per_layer) > 0


@pytest.mark.usefixtures("references")
def test_passes_are_replayed_only_where_the_graph_decides_for_all_of_them(stack: Stack) -> None:
    others = {
        0.1: GatePolicy(gates=GATES, surrogates=MAPS, threshold=0.2, warm_up_tokens=2),
        0.2: GatePolicy(gates=GATES, surrogates=surrogates(seed=5), threshold=0.2, warm_up_tokens=2),
        0.3: GatePolicy(gates=random_gates((1, 2)), surrogates=MAPS, threshold=0.2, warm_up_tokens=2),
        0.4: STATIC,
    }  # fmt: skip
    unproven = ServingHost(stack.blocks, OWN["gate"])
    assert unproven.prepare_graphs([]) is None
    unproven.attach()
    Graph(stack, 2)
    assert not unproven.replays([None], 2)
    unproven.detach()
    found = on_device(stack, OWN["gate"], policy_at=others.__getitem__)
    assert not found.replays([None], 2)  # warming up has captured nothing
    Graph(stack, 2)
    Graph(stack, MAX_ROWS + 1)
    assert found.replays([None, 0.0, 0.1], 2)
    assert not any(found.replays([None, target], 2) for target in (0.2, 0.3, 0.4))
    assert not found.replays([None], 3) and not found.replays([None], MAX_ROWS + 1)
    with pytest.raises(SessionError, match="a graph over 3 rows is replayed that does not decide"):
        found.replay(batch([5]), 3, lambda: None)


@pytest.mark.usefixtures("references")
def test_a_replay_of_nobodys_or_after_the_host_is_the_full_model(stack: Stack) -> None:
    stream = torch.randn(4, HIDDEN)
    full = stack(stream)
    found = on_device(stack, OWN["static+surrogates"])
    graph = Graph(stack, 4)
    replayed(found, graph, batch([9] * 3), stream[:3])
    counts = found.report.skipped_per_layer.copy()
    got = found.replay(None, 4, partial(graph.replay, stream))
    assert_equal_but_for_rounding(got, full)
    assert found.report.skipped_per_layer == counts and sum(counts) > 0
    replayed(found, graph, batch([9] * 3), stream[:3])
    found.detach()
    assert_equal_but_for_rounding(graph.replay(stream), full)


class Other(GatedFFN):
    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x)[0].chunk(2, dim=-1)
        f: Tensor = self.down_proj(nn.functional.gelu(gate) * up)[0]
        return f


class Packed(GatedFFN):
    def __init__(self) -> None:
        super().__init__()
        self.down_proj.weight = nn.Parameter(torch.empty(0, HIDDEN))


@pytest.mark.parametrize(
    ("ffn", "reason"),
    [
        (FFN, "FFN has no gate_up_proj and down_proj"),
        (partial(GatedFFN, bias=True), "the linears of GatedFFN have biases"),
        (Other, "Other computes something else than skipcal's op"),
        (Packed, "the weights of Packed are packed"),
    ],
)
@pytest.mark.usefixtures("references")
def test_a_model_whose_ffns_are_others_is_not_captured(ffn: Callable[[], nn.Module], reason: str) -> None:
    found = ServingHost(Stack(ffn).blocks, OWN["gate"])
    assert found.prepare_graphs([1]) == f"layer 1: {reason}"
    assert not found.captures


def test_a_rule_that_draws_is_not_captured(stack: Stack) -> None:
    drawn = ChosenFFNs(method="random", layers=(1, 2), probability=0.5, warm_up_tokens=0)
    assert ServingHost(stack.blocks, drawn).prepare_graphs([1]) == "random draws at random"


def test_a_norm_after_the_ffn_is_not_captured(stack: Stack) -> None:
    blocks = [type(b)(b.index, b.norm, (*b.chain, nn.Identity()), b.after) for b in stack.blocks]
    assert ServingHost(blocks, STATIC).prepare_graphs([1]) == "layer 1: GatedFFN is followed by a norm"


def test_a_rule_with_tolerances_is_not_captured(stack: Stack) -> None:
    reason = "ffn-skip+damage is not decided on the device"
    assert ServingHost(stack.blocks, POLICIES["cosine, tolerances"]).prepare_graphs([1]) == reason
