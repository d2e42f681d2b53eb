"""A function of tensors as the list of torch calls that it makes, recorded once and then repeated.

On a CPU a decode step of a small model spends much of its time between the matrix products: in modules that
call modules, in keyword arguments, masks and caches that end in the same calls every time. `record`
keeps the calls. What may differ from one time to the next, and what depends on values, must be a
`leaf`: a function that is called anew, whatever it does.

Where leaves are a residual branch, x = h, f = leaves(x), h + f, one function of h can stand for all of it.

A recording is refused rather than wrong: where Python reads a value, where the size of a result
depends on values, where a tensor is made that no recorded call has made. What cannot be seen is a number
that Python carries from elsewhere, such as a length; so the first results are compared (see
runtime.engines.step_engine).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function
from torch.utils._python_dispatch import TorchDispatchMode

_READS = (
    "item", "tolist", "numpy", "__array__", "__dlpack__", "__bool__", "__int__", "__float__", "__index__",
)  # fmt: skip
_ADDITIONS = (torch.add, torch.Tensor.add, torch.Tensor.__add__)
_LEAF = "_skipcal_leaf"


class NotRecordable(RuntimeError):
    """The function does something that a list of calls cannot hold."""


@dataclass(frozen=True)
class Recording:
    """A function of tensors: `repeat` makes its torch calls, so many, on other inputs of the same shapes."""

    repeat: Callable[..., Any]
    calls: int


@dataclass(frozen=True)
class Branch:
    """`leaves`, each called with the result of the one before it and with nothing else, on a stream h.

    whole: what h + f becomes, as a function of h, where the next call adds f to h.
    """

    leaves: Sequence[Callable[..., Any]]
    whole: Callable[[Tensor], Tensor]


def record(function: Callable[..., Any], *inputs: Tensor, branches: Iterable[Branch] = ()) -> Recording:
    """Run `function` on `inputs` and keep the torch calls between these and what it returns.

    branches: residual branches to be called as one where they are found to be such; else their leaves
    are called. Every other tensor, such as a weight, stays the one that it is now. Raises NotRecordable.
    """
    guard = _Guard()
    recorder = _Recorder(guard, inputs)
    with guard, recorder:
        output = function(*inputs)
    return recorder.finish(output, branches)


def leaf(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, kept in a recording as one call: it may read values, and do otherwise the next time.

    Its tensors must be among its arguments and results themselves, or in lists, tuples or dicts of these.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        relevant = (*args, *kwargs.values())
        if has_torch_function(relevant):
            return handle_torch_function(call, relevant, *args, **kwargs)
        return function(*args, **kwargs)

    setattr(call, _LEAF, function)
    return call


class _Guard(TorchDispatchMode):
    """Sees every operation that is really run, to find those that a list of calls would get wrong."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = 0
        self._inside_leaf = 0
        self._made: dict[int, Tensor] = {}  # kept, so that no other tensor takes its id

    def made(self, tensor: Tensor) -> bool:
        """Whether an operation outside leaves has made this tensor."""
        return id(tensor) in self._made

    @contextmanager
    def looking_away(self) -> Iterator[None]:
        """A leaf may do what it likes."""
        self._inside_leaf += 1
        try:
            yield
        finally:
            self._inside_leaf -= 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._inside_leaf:
            return func(*args, **(kwargs or {}))
        tags = func.tags
        if torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags:
            raise NotRecordable(f"{func} depends on the values of tensors")
        if torch.Tag.nondeterministic_seeded in tags:
            raise NotRecordable(f"{func} draws random numbers")
        self.operations += 1
        output = func(*args, **(kwargs or {}))
        self._made.update((id(t), t) for t in _tensors_in(output))
        return output


@dataclass(frozen=True)
class _Call:
    """`result` = function(`given`), as Python writes it; uses: the tensors in `given`, in their order."""

    result: str
    function: Any
    given: str
    uses: tuple[str, ...]


class _Recorder(TorchFunctionMode):
    """Writes down each call of torch."""

    def __init__(self, guard: _Guard, inputs: tuple[Tensor, ...]) -> None:
        super().__init__()
        self._guard = guard
        self._calls: list[_Call] = []
        self._uses: list[str] = []  # of the call that is being written
        self._names: dict[int, str] = {}  # of tensors, by id
        self._kept: list[Any] = []  # so that ids stay theirs
        self._globals: dict[str, Any] = {}
        self._constants: dict[int, str] = {}
        self._inputs = [self._name(t) for t in inputs]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inner = getattr(func, _LEAF, None)
        if inner is not None:
            with self._guard.looking_away():
                output = inner(*args, **kwargs)
            self._write(inner, args, kwargs, output)
            return output
        if getattr(func, "__name__", "") in _READS:
            raise NotRecordable(f"{func.__name__} reads the values of a tensor")
        before = self._guard.operations
        output = func(*args, **kwargs)
        known = all(id(t) in self._names for t in _tensors_in(output))
        if self._guard.operations > before or not known:  # else it asked for a shape, or changed nothing
            self._write(func, args, kwargs, output)
        return output

    def finish(self, output: Any, branches: Iterable[Branch]) -> Recording:
        """What has been written, as a function of the inputs."""
        calls = self._calls
        for branch in branches:
            calls = _as_one(calls, branch)
        lines = [f"{call.result} = {self._constant(call.function)}({call.given})" for call in calls]
        lines.append(f"return {self._value(output)}")
        # Compiled from names of its own and from literals as repr writes them; all else is handed in.
        source = f"def recorded({', '.join(self._inputs)}):\n" + "".join(f"    {line}\n" for line in lines)
        exec(compile(source, "<recorded>", "exec"), self._globals)
        return Recording(self._globals["recorded"], len(calls))

    def _write(self, func: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if not all(name.isidentifier() for name in kwargs):
            raise NotRecordable(f"{func} is given arguments {sorted(kwargs)}, which are no names")
        self._uses = []
        given = [self._value(a) for a in args] + [f"{k}={self._value(v)}" for k, v in kwargs.items()]
        self._calls.append(_Call(self._target(output), func, ", ".join(given), tuple(self._uses)))

    def _target(self, output: Any) -> str:
        """What a call's result is assigned to."""
        if isinstance(output, Tensor):
            return self._name(output)
        if isinstance(output, (tuple, list)) and any(True for _ in _tensors_in(output)):
            return "(" + "".join(self._target(o) + "," for o in output) + ")"
        return "_"

    def _value(self, given: Any) -> str:
        """An argument as Python writes it."""
        kind = type(given)
        if isinstance(given, Tensor):
            return self._tensor(given)
        if given is None or kind in (int, bool, str) or (kind is float and math.isfinite(given)):
            return repr(given)
        if kind in (tuple, torch.Size):
            return "(" + "".join(self._value(v) + "," for v in given) + ")"
        if kind is list:
            return "[" + ", ".join(map(self._value, given)) + "]"
        if kind is dict:
            return "{" + ", ".join(f"{self._value(k)}: {self._value(v)}" for k, v in given.items()) + "}"
        if kind is slice:
            return f"slice({', '.join(map(self._value, (given.start, given.stop, given.step)))})"
        return self._constant(given)

    def _tensor(self, given: Tensor) -> str:
        name = self._names.get(id(given))
        if name is None:
            if self._guard.made(given):
                raise NotRecordable("a tensor is made where no call of torch is seen")
            name = self._constant(given)
        self._uses.append(name)
        return name

    def _name(self, tensor: Tensor) -> str:
        name = self._names.get(id(tensor))
        if name is None:
            name = self._names[id(tensor)] = f"t{len(self._names)}"
            self._kept.append(tensor)
        return name

    def _constant(self, value: Any) -> str:
        name = self._constants.get(id(value))
        if name is None:
            name = self._constants[id(value)] = f"c{len(self._constants)}"
            self._kept.append(value)
            self._globals[name] = value
        return name


def _as_one(calls: list[_Call], branch: Branch) -> list[_Call]:
    """The calls with `branch` as one of them, or as they are where it is not what it should be."""
    size = len(branch.leaves)
    first = next((i for i, call in enumerate(calls) if call.function is branch.leaves[0]), None)
    found = [] if first is None else calls[first : first + size + 1]
    if first is None or len(found) <= size or found[0].given != found[0].uses[0]:
        return calls
    stream, handed = found[0].given, found[0].given
    for call, function in zip(found, branch.leaves, strict=False):
        if call.function is not function or call.given != handed:
            return calls
        handed = call.result
    total, rest = found[size], calls[first + size + 1 :]
    adds = total.function in _ADDITIONS and total.given in (f"{stream}, {handed}", f"{handed}, {stream}")
    # Nor may anything else use h: `whole` may return h itself, and what follows may change that in place.
    inside = {stream, *(call.result for call in found[:size])}
    if not adds or any(inside & set(call.uses) for call in rest):
        return calls
    return [*calls[:first], _Call(total.result, branch.whole, stream, (stream,)), *rest]


def _tensors_in(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _tensors_in(one)
    elif isinstance(value, dict):
        for one in value.values():
            yield from _tensors_in(one)
