"""Steps that a session keeps: made once for so many rows, right each time again, gone with the session."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import attentive, left_padded
from engines import ROWS, SOME, counts
from gated import random_map
from gpu_stand_in import StandIn
from sessions import Heard

from skipcal.core.chosen_ffns import ChosenFFNs
from skipcal.core.gate import GatePolicy, Gates
from skipcal.core.policy import Policy, SkipPolicy
from skipcal.core.surrogates import Surrogates
from skipcal.runtime.engines import graph_step, step_engine
from skipcal.runtime.engines.step_cache import Memory, StepCache, StepLayer
from skipcal.runtime.session import SkipSession, skipping

pytestmark = pytest.mark.usefixtures("references", "small_caches")
FOUR = [*ROWS, [9, 8, 7]]
# Rows and new tokens: 4, 1, 4, 1 rows of other texts, of which the last are longer.
BY_TURNS = [(FOUR, 8), (ROWS[:1], 9), (FOUR[::-1], 12), ([ROWS[2]], 20)]


def called(session: SkipSession, calls: Any, **options: Any) -> tuple[list[Any], Any]:
    """What generate() gave for each of `calls` in one session, and what the session counted."""
    settings: dict[str, Any] = {"do_sample": False, **options}
    torch.manual_seed(3)
    with session as run:
        model: Any = session._model
        outputs = [model.generate(**left_padded(rows), max_new_tokens=n, **settings) for rows, n in calls]
    return outputs, run.report


def assert_as_eager(
    model: Any, calls: Any, policy: Policy = SOME, engine: str = "graph", **options: Any
) -> Any:
    expected, eager = called(skipping(model, policy=policy, engine="eager"), calls, **options)
    outputs, report = called(skipping(model, policy=policy, engine=engine), calls, **options)
    assert [o.tolist() for o in outputs] == [o.tolist() for o in expected]
    assert counts(report) == counts(eager)
    assert (report.engine, report.eager_passes) == (engine, 0), report.engine_reason
    return report


@pytest.fixture
def proofs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each step that was proven."""
    found: list[int] = []
    prove = step_engine.StepEngine._prove

    def noted(self: Any, step: Any, given: Any) -> bool:
        found.append(step.batch)
        return prove(self, step, given)

    monkeypatch.setattr(step_engine.StepEngine, "_prove", noted)
    return found


# Made once


def test_each_number_of_rows_is_captured_and_proven_once(tiny: Any, gpu: StandIn, proofs: list[int]) -> None:
    assert_as_eager(attentive(tiny), BY_TURNS)
    assert gpu.captures == 2
    assert proofs == [4, 4, 1, 1]


def test_a_longer_prompt_finds_the_step(tiny: Any, gpu: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_step, "FIRST_SLOTS", 64)
    calls = [([list(range(3, 3 + prompt))], 5) for prompt in (5, 9, 17, 30, 50)]
    assert_as_eager(attentive(tiny), calls)
    assert gpu.captures == 1


def test_more_room_is_another_step_which_shorter_texts_use_too(
    tiny: Any, gpu: StandIn, proofs: list[int]
) -> None:
    calls = [(ROWS[:1], n) for n in (9, 40, 9, 50)]
    assert_as_eager(attentive(tiny), calls)
    assert gpu.captures == 3  # of 32 slots, and of 64 before and after the text has outgrown 32
    assert proofs == [1] * 4


def test_where_the_memory_moves_a_step_is_captured_anew_and_not_proven(
    tiny: Any, gpu: StandIn, proofs: list[int]
) -> None:
    """Of one row first: the cache of four wants more memory."""
    calls = [(ROWS[:1], 8), (FOUR, 8)] * 3
    assert_as_eager(attentive(tiny), calls)
    assert gpu.captures == 3
    assert proofs == [1, 1, 4, 4]


def test_recordings_are_kept_too(tiny: Any, proofs: list[int]) -> None:
    assert_as_eager(attentive(tiny), BY_TURNS * 2, engine="recorded")
    assert proofs == [4, 4, 1, 1]


def test_the_first_token_is_heard_before_a_step_is_made(tiny: Any, gpu: StandIn) -> None:
    at_put: list[tuple[int, float]] = []
    with skipping(tiny, policy=SOME, engine="graph") as run:

        class Noting(Heard):
            def put(self, value: torch.Tensor) -> None:
                at_put.append((gpu.captures, run.report.prepared_passes))
                super().put(value)

        tiny.generate(**left_padded(ROWS[:1]), max_new_tokens=5, do_sample=False, streamer=Noting())
    assert at_put[:2] == [(0, 0), (0, 0)]  # the prompt, and the first token
    assert at_put[-1] == (1, 4)


# Right each time again


def gate(model: Any) -> GatePolicy:
    hidden, generator = model.config.hidden_size, torch.Generator().manual_seed(5)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    gates = Gates((1, 2), values(2, hidden), values(2), values(2))
    stand_ins = Surrogates({layer: random_map(hidden, 3, 1, generator) for layer in (1, 2)})
    return GatePolicy(gates=gates, surrogates=stand_ins, threshold=float(gates.bias.mean()), warm_up_tokens=2)


POLICIES: dict[str, Callable[[Any], Policy]] = {
    "cosine": lambda _: SkipPolicy(cold_s=0, cold_e=4, threshold=0.6, max_skips=2, warm_up_tokens=3),
    "gate": gate,
    "random": lambda _: ChosenFFNs(
        method="random", layers=(0, 2, 3), probability=0.5, warm_up_tokens=1, seed=4
    ),
}
MIXED = [  # with padding and without; some texts outgrow 32 slots
    (ROWS, 8), (ROWS[:1], 30), ([ROWS[2]] * 3, 7), (ROWS[1:], 6), (ROWS[::-1], 36), (ROWS[1:2], 5), (ROWS, 8),
    (ROWS[:1], 8), (ROWS[1:], 6),
]  # fmt: skip


@pytest.mark.parametrize(
    ("engine", "attention"), [("graph", "sdpa"), ("graph", "eager"), ("recorded", "sdpa")]
)
@pytest.mark.parametrize("policy", POLICIES)
def test_calls_of_other_rows_and_lengths_leave_nothing_behind(
    tiny: Any, policy: str, engine: str, attention: str, request: pytest.FixtureRequest
) -> None:
    if engine == "graph":
        request.getfixturevalue("gpu")
    attentive(tiny).set_attn_implementation(attention)
    report = assert_as_eager(tiny, MIXED, POLICIES[policy](tiny), engine)
    assert report.skipped_blocks > 0


@pytest.mark.parametrize("options", [{"do_sample": True, "top_k": 8}, {"eos_token_id": 44}])
def test_sampling_and_rows_that_end_are_the_same(tiny: Any, gpu: StandIn, options: dict[str, Any]) -> None:
    assert_as_eager(attentive(tiny), BY_TURNS * 2, **options)


@pytest.mark.parametrize("engine", ["graph", "recorded"])
def test_what_is_no_number_in_the_memory_does_no_harm(
    tiny: Any, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a pass that overflows would leave it."""
    if engine == "graph":
        attentive(tiny).set_attn_implementation("eager")  # which reads all places, and multiplies by 0
    take = Memory.take

    def soiled(self: Memory, like: torch.Tensor, slots: int) -> torch.Tensor:
        return take(self, like, slots).fill_(torch.nan)

    monkeypatch.setattr(Memory, "take", soiled)
    assert_as_eager(tiny, [*BY_TURNS, (ROWS[:1], 60)], engine=engine)


@pytest.mark.parametrize("engine", ["graph", "recorded"])
def test_a_call_that_breaks_off_does_not_disturb_the_next(tiny: Any, engine: str) -> None:
    class Breaking(Heard):
        def put(self, value: torch.Tensor) -> None:
            super().put(value)
            if len(self.seen) > 9:
                raise InterruptedError

    (expected,), _ = called(skipping(tiny, policy=SOME, engine="eager"), [(ROWS[:1], 9)])
    with skipping(tiny, policy=SOME, engine=engine) as run:
        for streamer in (None, Breaking(), None):
            try:
                output = tiny.generate(
                    **left_padded(ROWS[:1]), max_new_tokens=9, do_sample=False, streamer=streamer
                )
            except InterruptedError:
                continue
            assert torch.equal(output, expected)
    assert run.report.engine == engine


def test_modes_of_inference_have_steps_of_their_own(tiny: Any, gpu: StandIn) -> None:
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    with skipping(tiny, policy=SOME, engine="graph"):
        outputs = []
        for mode in (True, False, True, False):
            with torch.inference_mode(mode):
                outputs.append(tiny.generate(**left_padded(ROWS), **options).tolist())
    assert outputs == outputs[:1] * 4
    assert gpu.captures == 2


# Caches that the caller keeps


@pytest.mark.parametrize("engine", ["graph", "recorded"])
def test_a_cache_that_is_handed_out_stays_as_it_is(tiny: Any, engine: str, proofs: list[int]) -> None:
    calls = [(ROWS[:1], 8), (ROWS, 8), ([ROWS[2]], 8), (ROWS[::-1], 12)]
    options: dict[str, Any] = {"return_dict_in_generate": True}
    expected, _ = called(skipping(tiny, policy=SOME, engine="eager"), calls, **options)
    found, report = called(skipping(tiny, policy=SOME, engine=engine), calls, **options)
    assert (report.engine, report.eager_passes) == (engine, 0)
    assert proofs == [1, 1, 3, 3]
    for mine, its in zip(found, expected, strict=True):
        assert torch.equal(mine.sequences, its.sequences)
        for a, b in zip(mine.past_key_values.layers, its.past_key_values.layers, strict=True):
            torch.testing.assert_close(a.keys, b.keys)
            torch.testing.assert_close(a.values, b.values)


def test_a_step_whose_cache_is_handed_out_is_not_captured_again(tiny: Any, gpu: StandIn) -> None:
    calls = [(ROWS[:1], 8)] * 3
    called(skipping(tiny, policy=SOME, engine="graph"), calls, return_dict_in_generate=True)
    assert gpu.captures == 1


# How many, and how much memory


def test_of_too_many_steps_the_one_used_longest_ago_goes(
    tiny: Any, gpu: StandIn, proofs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_engine, "MOST_STEPS", 2)
    calls = [(FOUR[:rows], 6) for rows in (4, 2, 4, 3, 4, 2)]
    with skipping(tiny, policy=SOME, engine="graph") as run:
        engine: Any = run._engine
        for rows, n in calls:
            tiny.generate(**left_padded(rows), max_new_tokens=n, do_sample=False)
            assert len(engine._steps) <= 2
    assert proofs == [4, 4, 2, 2, 3, 3, 2, 2]


def test_all_caches_take_what_the_largest_needs(tiny: Any, gpu: StandIn) -> None:
    with skipping(tiny, policy=SOME, engine="graph") as run:
        engine: Any = run._engine
        sizes = []
        for rows in (1, 4, 2, 3, 1):
            tiny.generate(**left_padded(FOUR[:rows]), max_new_tokens=6, do_sample=False)
            sizes.append([memory._flat.numel() for pair in engine._memories for memory in pair])
            for step in engine._steps.values():  # between calls
                assert all(layer.keys is None and layer.values is None for layer in step.cache.layers)
    kv_heads, head_dim = tiny.config.num_key_value_heads, tiny.config.head_dim
    assert sizes == [[rows * 32 * kv_heads * head_dim] * 8 for rows in (1, 4, 4, 4, 4)]


@pytest.mark.parametrize("engine", ["graph", "recorded"])
def test_nothing_is_kept_after_the_session(tiny: Any, engine: str) -> None:
    with skipping(tiny, policy=SOME, engine=engine) as run:
        for rows in (ROWS, ROWS[:1]):
            tiny.generate(**left_padded(rows), max_new_tokens=6, do_sample=False)
        found: Any = run._engine
        memories = [weakref.ref(memory._flat) for pair in found._memories for memory in pair]
        steps = [weakref.ref(step) for step in found._steps.values()]
        assert len(steps) == 2
    assert [memory() for memory in memories] == [None] * 8  # at once, though a recording is a circle
    gc.collect()
    assert [step() for step in steps] == [None] * 2
    assert run.report.engine == engine


@pytest.mark.parametrize(
    ("tokens", "first", "full"),
    [
        (1, 256, 256),
        (17, 256, 256),
        (257, 512, 512),
        (1000, 1024, 1024),
        (1025, 1024, 2048),
        (2100, 1024, 3072),
    ],
)
def test_slots_are_few_numbers(tokens: int, first: int, full: int) -> None:
    cache = StepCache([(Memory(), Memory())], 1024)
    cache.begin(tokens)
    assert cache.slots == first
    token = torch.zeros(1, 1, 1, 2)
    cache.layers[0].update(token.expand(1, 1, tokens, 2), token.expand(1, 1, tokens, 2))
    assert cache.slots == full
    cache.begin(17)
    assert cache.slots == full  # what was captured before is still good


def test_memory_that_runs_out_while_a_cache_grows_costs_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = StepLayer(2, 8)
    tokens = torch.arange(4.0).view(1, 1, 2, 2)
    layer.update(tokens, -tokens)

    def out_of_memory(self: Memory, like: torch.Tensor, slots: int) -> torch.Tensor:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Memory, "take", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            layer.update(tokens, -tokens)
    assert (layer.length, layer.slots) == (2, 2)
    keys, values = layer.update(tokens, -tokens)
    assert torch.equal(keys, torch.cat([tokens, tokens], dim=2)) and torch.equal(values, -keys)
