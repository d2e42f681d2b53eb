"""Other libraries that set, wrap and delete what a session has set, in any order."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import same_examples  # noqa: F401
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from conftest import lively
from hypothesis import given, settings
from hypothesis import strategies as st
from sessions import ALWAYS, ROWS, SOME, prompt, state_of
from transformers import GenerationConfig

from skipcal.arch.locate import locate
from skipcal.core.whole_layers import SkipDecode
from skipcal.errors import SessionError
from skipcal.runtime.session import SkipSession, skipping

OPTIONS: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}


def decoded(model: Any) -> torch.Tensor:
    output: torch.Tensor = model.generate(**prompt(ROWS), **OPTIONS)
    return output


def skipped(model: Any, **options: Any) -> torch.Tensor:
    with skipping(model, policy=SOME, **options):
        return decoded(model)


def accelerated(module: Any, name: str) -> Callable[[], None]:
    """Wrap as accelerate does, which keeps what it found on the instance; return what takes it off."""
    assert name == "forward"
    add_hook_to_module(module, ModelHook())
    return lambda: remove_hook_from_module(module)


def closed_over(module: Any, name: str) -> Callable[[], None]:
    """Wrap by a closure that nobody can see into, and put back what it found."""
    found = getattr(module, name)
    setattr(module, name, lambda *args, **kwargs: found(*args, **kwargs))
    return lambda: setattr(module, name, found)


def shadowing(module: Any, name: str) -> Callable[[], None]:
    """Wrap by a closure, and delete it in the belief that the class has the original."""
    found = getattr(module, name)
    setattr(module, name, lambda *args, **kwargs: found(*args, **kwargs))
    return lambda: module.__dict__.pop(name, None)


@pytest.fixture(scope="module")
def untouched() -> dict[str, torch.Tensor]:
    """What `tiny` writes that nobody has wrapped yet: plainly, with skips, and by recorded steps."""
    torch.manual_seed(0)
    with torch.no_grad():
        model = lively("llama")
        return {
            "plain": decoded(model),
            "skipping": skipped(model),
            "recorded": skipped(model, engine="recorded"),
        }


WRAPPERS = (accelerated, closed_over, shadowing)
EVENTS = ("enter", "wrap", "unwrap", "exit")
ORDERS = [
    order
    for order in itertools.permutations(EVENTS)
    if order.index("enter") < order.index("exit") and order.index("wrap") < order.index("unwrap")
]
MLP, NORM = "model.layers.2.mlp", "model.layers.2.post_attention_layernorm"


def follow(order: tuple[str, ...], model: Any, wrap: Callable[[], Callable[[], None]]) -> None:
    session, unwrap = skipping(model, policy=SOME), None
    for event in order:
        if event == "enter":
            session.__enter__()
        elif event == "exit":
            session.__exit__(None, None, None)
        elif event == "wrap":
            unwrap = wrap()
        else:
            assert unwrap is not None
            unwrap()


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("place", [MLP, NORM])
def test_in_any_order_the_model_is_whole_again(
    tiny: Any,
    order: tuple[str, ...],
    wrapper: Any,
    place: str,
    untouched: dict[str, torch.Tensor],
    caplog: pytest.LogCaptureFixture,
) -> None:
    module = tiny.get_submodule(place)
    with caplog.at_level(logging.WARNING):
        follow(order, tiny, lambda: wrapper(module, "forward"))
    between = order.index("enter") < order.index("wrap") and order.index("unwrap") < order.index("exit")
    meddled = {"enter", "exit"} & set(order[order.index("wrap") : order.index("unwrap")])
    if between and wrapper is not shadowing:
        assert "somebody else" not in caplog.text
    elif len(meddled) == 1:
        assert f"changed {place.removeprefix('model.')}.forward" in caplog.text
    assert torch.equal(decoded(tiny), untouched["plain"])
    assert torch.equal(skipped(tiny), untouched["skipping"])
    if wrapper is accelerated:
        forward = module.__dict__.get("forward")
        assert forward is None or forward.__func__ is type(module).forward
    assert not any("__getstate__" in m.__dict__ or m._forward_pre_hooks for m in tiny.modules())


@pytest.mark.parametrize("name", ["generate", "forward", "_get_stopping_criteria", "generate_batch"])
@pytest.mark.parametrize("order", ORDERS, ids="-".join)
@pytest.mark.parametrize("wrapper", [closed_over, shadowing])
def test_methods_of_the_model_may_be_wrapped_too(
    tiny: Any, name: str, order: tuple[str, ...], wrapper: Any, untouched: dict[str, torch.Tensor]
) -> None:
    follow(order, tiny, lambda: wrapper(tiny, name))
    assert torch.equal(decoded(tiny), untouched["plain"])
    assert torch.equal(skipped(tiny, engine="recorded"), untouched["recorded"])


def deriving(model: Any, name: str) -> None:
    """Override a method in a class of one's own, as code that comes with a model does."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(super(model.__class__, self), name)(*args, **kwargs)

    model.__class__ = type("Derived", (type(model),), {name: method})


@pytest.mark.parametrize("wrapper", [closed_over, deriving])
def test_a_wrapper_that_names_no_arguments_may_be_called_by_place(tiny: Any, wrapper: Any) -> None:
    inputs = (prompt(ROWS)["input_ids"], GenerationConfig(**OPTIONS))
    with skipping(tiny, policy=SOME):
        expected = tiny.generate(*inputs)
    wrapper(tiny, "generate")
    with skipping(tiny, policy=SOME):
        assert torch.equal(tiny.generate(*inputs), expected)
        with pytest.raises(SessionError, match="assistant_model"):
            tiny.generate(*inputs, assistant_model=tiny)


def test_a_stack_that_names_no_arguments_may_be_called_by_place(tiny: Any) -> None:
    ids, mask = prompt(ROWS).values()
    with skipping(tiny, policy=ALWAYS, teacher_forced=True) as named:
        tiny.model(ids, mask)
    closed_over(tiny.model, "forward")
    with skipping(tiny, policy=ALWAYS, teacher_forced=True) as run:
        tiny.model(ids, mask)
    assert run.report.decode_steps == named.report.decode_steps
    assert run.report.skipped_per_layer == named.report.skipped_per_layer


def test_what_wraps_ours_is_called_and_skips_as_ours_does(tiny: Any) -> None:
    expected = skipped(tiny)
    calls = []

    class Counts(ModelHook):  # type: ignore[misc]
        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(module)
            return args, kwargs

    with skipping(tiny, policy=SOME):
        add_hook_to_module(tiny.get_submodule(MLP), Counts())
        assert torch.equal(decoded(tiny), expected)
        remove_hook_from_module(tiny.get_submodule(MLP))
        assert torch.equal(decoded(tiny), expected)
    assert len(calls) == 6


@pytest.mark.parametrize("engine", ["eager", "recorded"])
@pytest.mark.parametrize("layer", [1, 3])
@pytest.mark.parametrize(
    "parts", [("mlp",), ("post_attention_layernorm",), ("mlp", "post_attention_layernorm")]
)
def test_a_block_that_is_asked_no_more_is_no_number(
    tiny: Any, engine: str, layer: int, parts: tuple[str, ...]
) -> None:
    """Without the forward that was set, half a block would be skipped: f of a stream without its norm."""
    plain = decoded(tiny)
    with skipping(tiny, policy=ALWAYS, engine=engine):
        for part in parts:
            del tiny.model.layers[layer].get_submodule(part).forward
        with pytest.raises(SessionError, match=f"layer {layer} was not asked"):
            decoded(tiny)
    assert torch.equal(decoded(tiny), plain)


def test_a_layer_that_is_asked_no_more_is_no_number(tiny: Any) -> None:
    plain = decoded(tiny)
    policy = SkipDecode(num_layers=4, max_layers=3, min_layers=2, steps=4)
    with skipping(tiny, policy=policy):
        del tiny.model.layers[2].forward
        with pytest.raises(SessionError, match="layer 2 was not asked"):
            decoded(tiny)
    assert torch.equal(decoded(tiny), plain)


def test_hooks_that_are_cleared_are_missed(tiny: Any) -> None:
    plain = decoded(tiny)
    with skipping(tiny, policy=SOME), pytest.raises(SessionError, match="did not see"):
        tiny.model._forward_pre_hooks.clear()
        decoded(tiny)
    assert torch.equal(decoded(tiny), plain)


def test_a_recorded_step_does_not_pass_by_a_wrapper(tiny: Any) -> None:
    """One that was set after the engine has looked at the modules is called for every token all the same."""
    calls = []
    with skipping(tiny, policy=SOME, engine="recorded") as run:
        decoded(tiny)
        assert run.report.engine == "recorded"
        module = tiny.model.layers[0].mlp
        found = module.forward

        def counting(x: torch.Tensor) -> torch.Tensor:
            calls.append(0)
            output: torch.Tensor = found(x)
            return output

        module.forward = counting
        decoded(tiny)
    assert len(calls) == 6
    assert "another forward" in run.report.engine_reason
    del module.forward


def test_between_passes_a_module_is_the_models_own(tiny: Any) -> None:
    x = torch.rand(1, 1, 32)
    expected = tiny.model.layers[2].mlp(x)
    with skipping(tiny, policy=ALWAYS) as run:
        decoded(tiny)
        report = run.report
        assert torch.equal(tiny.model.layers[2].mlp(x), expected)
        assert run.report == report


def test_a_failing_pass_is_followed_by_right_ones(tiny: Any) -> None:
    expected = skipped(tiny)

    def fail(*_args: Any) -> None:
        if len(calls := [*seen, 0]) == 9:
            raise ZeroDivisionError
        seen[:] = calls

    seen: list[int] = []
    with skipping(tiny, policy=SOME):
        handle = tiny.model.layers[2].mlp.act_fn.register_forward_hook(fail)
        with pytest.raises(ZeroDivisionError):
            for _ in range(9):
                decoded(tiny)
        handle.remove()
        assert torch.equal(decoded(tiny), expected)


# Any interleaving


class World:
    """A model, a session, wrappers by place: what is to be true of them at any time."""

    def __init__(self, base: Any) -> None:
        self.model = copy.deepcopy(base)
        self.architecture = locate(self.model)
        self.plain = decoded(self.model)
        self.session: SkipSession | None = None
        self.skipping_ones = skipped(self.model, architecture=self.architecture)
        self.wrapped: dict[tuple[str, str], tuple[Callable[[], None], Any]] = {}
        self.asked = True  # nobody has taken off what the session has set

    def enter(self) -> None:
        if self.session is None:
            self.session = skipping(self.model, policy=SOME, architecture=self.architecture)
            self.session.__enter__()
            self.asked = True

    def exit(self, error: BaseException | None = None) -> None:
        if self.session is not None:
            self.session.__exit__(type(error) if error else None, error, None)
            self.session = None

    def wrap(self, place: str, name: str, wrapper: Any) -> None:
        if (place, name) not in self.wrapped:
            if name != "forward" and wrapper is accelerated:
                wrapper = closed_over
            unwrap = wrapper(self.model.get_submodule(place), name)
            self.wrapped[place, name] = unwrap, (self.session, wrapper)

    def unwrap(self, place: str, name: str) -> None:
        if (place, name) in self.wrapped:
            unwrap, (session, wrapper) = self.wrapped.pop((place, name))
            unwrap()
            if place and self.session and (session is not self.session or wrapper is shadowing):
                self.asked = False

    def generate(self) -> None:
        if self.session is None:
            assert torch.equal(decoded(self.model), self.plain)
        elif self.asked:
            assert torch.equal(decoded(self.model), self.skipping_ones)
        else:
            with pytest.raises(SessionError, match="was not asked"):
                decoded(self.model)


PLACES = [(MLP, "forward"), (NORM, "forward"), ("", "forward"), ("", "generate")]
STEPS = st.one_of(
    st.sampled_from([("enter",), ("generate",), ("exit",), ("fail",)]),
    st.tuples(st.just("wrap"), st.sampled_from(PLACES), st.sampled_from(WRAPPERS)),
    st.tuples(st.just("unwrap"), st.sampled_from(PLACES)),
)


@pytest.fixture(scope="module")
def base() -> Any:
    with torch.no_grad():
        return lively("llama")


@settings(max_examples=40)
@given(steps=st.lists(STEPS, min_size=3, max_size=14))
def test_no_interleaving_spoils_or_locks_the_model(base: Any, steps: list[Any]) -> None:
    with torch.no_grad():
        world = World(base)
        for step in steps:
            if step[0] == "wrap":
                (place, name), wrapper = step[1:]
                world.wrap(place, name, wrapper)
            elif step[0] == "unwrap":
                world.unwrap(*step[1])
            elif step[0] == "fail":
                world.exit(ZeroDivisionError())
            else:
                getattr(world, step[0])()
        world.exit()
        for place in list(world.wrapped):
            world.unwrap(*place)
        world.generate()
        world.enter()
        world.generate()
        world.exit()
        model = world.model
        assert [row[2:] for row in state_of(model)] == [row[2:] for row in state_of(base)]
        ours = {"_get_stopping_criteria", "_prepare_cache_for_generation", "generate_batch", "__getstate__"}
        assert not any(ours & set(module.__dict__) for module in model.modules())
