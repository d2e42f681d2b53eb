"""One call at a time: other threads, calls from inside a call, and blocks that are left too early."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from sessions import SOME, prompt, state_of
from transformers import DynamicCache, LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from skipcal.arch.locate import locate as own_locate
from skipcal.core.policy import SkipPolicy
from skipcal.errors import SessionError
from skipcal.runtime.session import skipping

OPTIONS: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
LATE = SkipPolicy(cold_s=0, cold_e=4, threshold=-1.0, warm_up_tokens=3)
WAIT_S = 60.0  # for what takes milliseconds


class Streamer(BaseStreamer):
    """Keeps tokens; calls `then` at the third put, the second token."""

    def __init__(self, then: Callable[[], Any] = lambda: None) -> None:
        self.tokens: list[int] = []
        self.ended = threading.Event()
        self._puts, self._then = 0, then

    def put(self, value: torch.Tensor) -> None:
        self._puts += 1
        self.tokens += value.flatten().tolist()
        if self._puts == 3:
            self._then()

    def end(self) -> None:
        self.ended.set()


class Worker(threading.Thread):
    """Runs `function`, and keeps what it returns or raises."""

    def __init__(self, function: Callable[[], Any]) -> None:
        super().__init__()
        self._function = function
        self.result: Any = None
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            with torch.no_grad():  # gradients are switched off for each thread
                self.result = self._function()
        except BaseException as error:
            self.error = error

    def join(self, timeout: float | None = WAIT_S) -> None:
        super().join(timeout)
        assert not self.is_alive()


def announce(event: threading.Event, *, then: threading.Event) -> None:
    """Say that this thread is here, and wait."""
    event.set()
    assert then.wait(WAIT_S)


def alone(model: Any) -> tuple[torch.Tensor, Any]:
    with skipping(model, policy=SOME) as run:
        return model.generate(**prompt(), **OPTIONS), run.report


SECOND_CALLS: dict[str, Callable[[Any], Any]] = {
    "generate": lambda model: model.generate(**prompt(), **OPTIONS),
    "model": lambda model: model(prompt()["input_ids"]),
    "stack": lambda model: model.model(prompt()["input_ids"]),
    "step": lambda model: model(torch.tensor([[4]]), past_key_values=DynamicCache(config=model.config)),
}


@pytest.mark.parametrize("second", SECOND_CALLS)
def test_a_second_call_is_refused_while_another_thread_decodes(tiny: Any, second: str) -> None:
    expected, report = alone(tiny)
    inside, go = threading.Event(), threading.Event()
    streamer = Streamer(lambda: announce(inside, then=go))
    with skipping(tiny, policy=SOME) as run:
        first = Worker(lambda: tiny.generate(**prompt(), **OPTIONS, streamer=streamer))
        assert inside.wait(WAIT_S)
        with pytest.raises(SessionError, match=r"running already.*deepcopy"):
            SECOND_CALLS[second](tiny)
        go.set()
        first.join()
        assert run.report == report
        assert torch.equal(first.result, expected)
        assert torch.equal(tiny.generate(**prompt(), **OPTIONS), expected)


def test_the_reader_of_a_refused_call_does_not_wait_for_ever(tiny: Any) -> None:
    refused = Streamer()

    def second() -> None:
        with pytest.raises(SessionError, match="running already"):
            tiny.generate(**prompt(), **OPTIONS, streamer=refused)

    with skipping(tiny, policy=SOME):
        tiny.generate(**prompt(), **OPTIONS, streamer=Streamer(second))
    assert refused.ended.is_set()
    assert refused.tokens == []


def _by_streamer(call: Callable[[], Any]) -> dict[str, Any]:
    return {"streamer": Streamer(call)}


def _by_criterion(call: Callable[[], Any]) -> dict[str, Any]:
    class Calls(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            if input_ids.shape[1] == 9:
                call()
            return torch.zeros(len(input_ids), dtype=torch.bool)

    return {"stopping_criteria": [Calls()]}


def _by_processor(call: Callable[[], Any]) -> dict[str, Any]:
    class Calls(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if input_ids.shape[1] == 9:
                call()
            return scores

    return {"logits_processor": [Calls()]}


@pytest.mark.parametrize("engine", ["eager", "recorded"])
@pytest.mark.parametrize("by", [_by_streamer, _by_criterion, _by_processor])
@pytest.mark.parametrize("second", ["generate", "model", "step"])
def test_a_call_from_inside_a_call_is_refused(tiny: Any, engine: str, by: Any, second: str) -> None:
    before = state_of(tiny)
    with skipping(tiny, policy=SOME, engine=engine):
        with pytest.raises(SessionError, match=r"running already|called twice"):
            tiny.generate(**prompt(), **OPTIONS, **by(lambda: SECOND_CALLS[second](tiny)))
        again = tiny.generate(**prompt(), **OPTIONS)
    assert state_of(tiny) == before
    assert torch.equal(again, alone(tiny)[0])


def test_loops_written_by_hand_may_take_turns(tiny: Any) -> None:
    """Each counts its steps from its own prefill, in whatever order they go."""

    def step(token: int, cache: Any) -> None:
        tiny(torch.tensor([[token]]), past_key_values=cache, use_cache=True)

    lengths = (9, 5)
    reports = []
    for length in lengths:
        with skipping(tiny, policy=LATE) as run:
            cache = tiny(torch.arange(3, 3 + length)[None], use_cache=True).past_key_values
            for token in range(6):
                step(token, cache)
        reports.append(run.report)
    with skipping(tiny, policy=LATE) as run:
        caches = [tiny(torch.arange(3, 3 + n)[None], use_cache=True).past_key_values for n in lengths]
        for token in range(6):
            for cache in caches:
                step(token, cache)
    assert run.report.decode_steps_after_warm_up == 2 * 3
    assert run.report.skipped_per_layer == tuple(
        sum(layer) for layer in zip(*(r.skipped_per_layer for r in reports), strict=True)
    )


def test_a_copied_cache_goes_on_with_the_steps_of_its_text(tiny: Any) -> None:
    with skipping(tiny, policy=LATE) as run:
        cache = tiny(prompt()["input_ids"], use_cache=True).past_key_values
        for token in range(5):
            cache = copy.deepcopy(cache)
            tiny(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
    assert run.report.decode_steps_after_warm_up == 2


def test_passes_of_two_threads_do_not_overlap(tiny: Any) -> None:
    inside, go = threading.Event(), threading.Event()
    ids = prompt()["input_ids"]
    logits = tiny(ids).logits

    def hold(*_args: Any) -> None:
        handle.remove()
        announce(inside, then=go)

    with skipping(tiny, policy=SOME):
        handle = tiny.model.layers[1].register_forward_hook(hold)
        first = Worker(lambda: tiny(ids).logits)
        assert inside.wait(WAIT_S)
        with pytest.raises(SessionError, match="running already"):
            tiny(ids)
        go.set()
        first.join()
        assert torch.equal(first.result, logits)
        assert torch.equal(tiny(ids).logits, logits)


def test_an_interrupted_pass_does_not_lock_the_session(tiny: Any) -> None:
    def interrupt(*_args: Any) -> None:
        handle.remove()
        raise KeyboardInterrupt

    with skipping(tiny, policy=SOME):
        handle = tiny.model.layers[1].register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            tiny(prompt()["input_ids"])
        inside = tiny.generate(**prompt(), **OPTIONS)
    assert torch.equal(inside, alone(tiny)[0])


def test_of_two_sessions_entered_at_once_one_is_refused(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def locate(model: Any) -> Any:
        with pytest.raises(SessionError, match="already inside"):
            skipping(tiny, policy=SOME).__enter__()
        return own_locate(model)

    monkeypatch.setattr("skipcal.runtime.session.locate", locate)
    expected, _ = alone(tiny)
    assert torch.equal(alone(tiny)[0], expected)


# Left too early


@pytest.fixture
def leaving() -> Iterator[threading.Event]:
    """Set when a block is being left, and what runs in another thread is waited for."""
    event = threading.Event()

    class Heard(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            assert "waiting until it has stopped" in record.getMessage()
            event.set()

    logger, handler = logging.getLogger("skipcal.runtime.turn"), Heard()
    logger.addHandler(handler)
    yield event
    logger.removeHandler(handler)


@pytest.mark.parametrize("fails", [False, True])
def test_leaving_stops_what_still_decodes(tiny: Any, leaving: threading.Event, fails: bool) -> None:
    """It never goes on as the full model, and nobody waits for more of it."""
    said = alone(tiny)[0][0].tolist()
    before, full = state_of(tiny), tiny.generate(**prompt(), **OPTIONS)
    inside = threading.Event()
    streamer = Streamer(lambda: announce(inside, then=leaving))
    try:
        with skipping(tiny, policy=SOME) as run:
            first = Worker(lambda: tiny.generate(**prompt(), **OPTIONS, streamer=streamer))
            assert inside.wait(WAIT_S)
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert streamer.ended.is_set()
    assert state_of(tiny) == before
    first.join()
    assert isinstance(first.error, SessionError)
    assert "block was left" in str(first.error)
    assert "join()" in str(first.error)
    assert streamer.tokens == said[: 6 + 2]
    assert run.report.decode_steps == 1
    assert torch.equal(tiny.generate(**prompt(), **OPTIONS), full)


def test_leaving_waits_for_a_pass_of_another_thread(tiny: Any, leaving: threading.Event) -> None:
    inside = threading.Event()

    def hold(*_args: Any) -> None:
        handle.remove()
        announce(inside, then=leaving)
        assert "generate" in tiny.__dict__

    ids = prompt()["input_ids"]
    with skipping(tiny, policy=SOME):
        handle = tiny.model.layers[1].register_forward_hook(hold)
        first = Worker(lambda: tiny(ids).logits)
        assert inside.wait(WAIT_S)
    assert "generate" not in tiny.__dict__
    first.join()
    assert first.error is None
    assert torch.equal(first.result, tiny(ids).logits)


def test_leaving_from_inside_a_call_does_not_wait_for_it(tiny: Any) -> None:
    before = state_of(tiny)
    session = skipping(tiny, policy=SOME)
    session.__enter__()
    with pytest.raises(SessionError, match="block was left"):
        tiny.generate(**prompt(), **OPTIONS, streamer=Streamer(lambda: session.__exit__(None, None, None)))
    assert state_of(tiny) == before


def test_leaving_twice_does_not_let_go_of_the_next_session(tiny: Any) -> None:
    with skipping(tiny, policy=SOME) as first:
        pass
    with skipping(tiny, policy=SOME):
        first.__exit__(None, None, None)
        with pytest.raises(SessionError, match="already inside"):
            skipping(tiny, policy=SOME).__enter__()


def test_a_call_that_begins_too_late_is_not_the_full_models(tiny: Any) -> None:
    with skipping(tiny, policy=SOME):
        taken = tiny.generate  # as a thread takes it, which is started and has not run yet
    late = Streamer()
    with pytest.raises(SessionError, match="block was left"):
        taken(**prompt(), **OPTIONS, streamer=late)
    assert late.ended.is_set()
    assert len(tiny.generate(**prompt(), **OPTIONS)[0]) == 6 + 12
