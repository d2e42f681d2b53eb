"""The processes of one calibration, as torchrun starts them: each takes its share, the first one speaks.

Only numbers of the host travel between them, by gloo: token ids, policies and counts. What is captured
goes through files (see `checkpoint`). Importing this module imports no torch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from skipcal.errors import ConfigError, ProcessFailed, ProcessLost, SkipcalError, first_words

T = TypeVar("T")
Order = TypeVar("Order")
Counts = tuple[int, ...]
_Outcome = tuple[tuple[T] | None, Exception | None]

PATIENCE = timedelta(hours=1)  # a dead process closes its connections; this is for a network that went
LOST = (
    "another process of this run is gone, or the run was told to stop (an error of the other process stands "
    "above; without one it was killed); no output was written; give the same command again to go on"
)


class _Stopped(BaseException):
    """SIGTERM arrived. No Exception, so that nothing on the way takes it for its own failure."""


@dataclass(frozen=True)
class Processes:
    """This process among those that were started together. The default is one process alone.

    rank:       from 0 to size - 1; process 0 leads: it reads text, decides, writes and prints.
    local_rank: the same among those of this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def started(cls, environment: Mapping[str, str] = os.environ) -> Processes:
        """What torchrun says by environment variables. Raises ConfigError where they make no sense."""
        size = _number(environment, "WORLD_SIZE", 1)
        if size <= 1:
            return cls()
        missing = [n for n in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if n not in environment]
        if missing:
            raise ConfigError(
                f"WORLD_SIZE is {size}, but {', '.join(missing)} is not set; start several processes with "
                "torchrun, or unset WORLD_SIZE"
            )
        return cls(_number(environment, "RANK", 0), size, _number(environment, "LOCAL_RANK", 0))

    @property
    def leads(self) -> bool:
        """Whether this is process 0."""
        return self.rank == 0

    def mine(self, items: Sequence[T]) -> list[T]:
        """This process's share of `items`: each item is in one process's share."""
        return list(items[self.rank :: self.size])

    # Meeting points: every process has to come to each of them, in the same order.

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Inside, the processes can meet. SIGTERM, which torchrun sends when one has died, is an error.

        Raises ProcessLost when another process goes away, SkipcalError when they do not find each other.
        """
        if self.size == 1:
            yield
            return
        import torch.distributed as dist

        try:
            dist.init_process_group("gloo", timeout=PATIENCE, rank=self.rank, world_size=self.size)
        except (RuntimeError, ValueError) as error:
            raise SkipcalError(
                f"process {self.rank} of {self.size} found no connection to the others "
                f"({first_words(error)}); check MASTER_ADDR and MASTER_PORT, or start with torchrun"
            ) from error
        try:
            with _stop_on_sigterm():
                yield
        except _Stopped:
            raise ProcessLost(LOST) from None
        finally:
            _disconnect()

    def agree(self, step: Callable[[], T]) -> T:
        """Run `step` in every process. If it fails in some, the first one's error is raised in all."""
        result, error = _attempt(step)
        first = next((found for found in self._gathered(error) if found is not None), None)
        if first is not None:
            raise error or first
        assert result is not None
        return result[0]

    def share(self, step: Callable[[], T]) -> T:
        """Run `step` in process 0 alone and hand its result, or its error, to all."""
        outcome: _Outcome[T] = self._broadcast(_attempt(step) if self.leads else None)
        result, error = outcome
        if error is not None:
            raise error
        assert result is not None
        return result[0]

    def in_turn(self, step: Callable[[], T]) -> T:
        """`agree`, but the first process of a machine goes ahead: what it downloads serves the others."""
        if self.size == 1:
            return step()
        first = self.local_rank == 0
        ahead = self.agree(lambda: step() if first else None)
        rest = self.agree(lambda: None if first else step())
        found = ahead if first else rest
        assert found is not None
        return found

    def working(self, step: Callable[[], T]) -> T:
        """Run this process's own work: its failure ends the run at once, without waiting for the others."""
        try:
            return step()
        except ProcessLost:
            raise
        except Exception as error:
            if self.leads:
                raise
            raise ProcessFailed(
                f"process {self.rank} of {self.size}: {type(error).__name__}: {first_words(error)}"
            ) from error

    def directed(
        self, decide: Callable[[Callable[[Order], Counts]], T], work: Callable[[Order], Counts]
    ) -> T | None:
        """Process 0 decides what to measure, all measure their share of it.

        decide: runs in process 0; what it is given, `ask(order)`, has every process run `work(order)` and
                returns the sums of their counts.
        Returns what `decide` returns, None in the other processes; its error is raised in all.
        """
        if self.size == 1:
            return decide(work)
        if not self.leads:
            while True:
                what, value = self._broadcast(None)
                if what == "done":
                    return None
                if what == "error":
                    raise value
                self._summed(self.working(lambda order=value: work(order)))  # type: ignore[misc]

        broken: list[BaseException] = []  # inside `ask`, where the others wait for counts, not for orders

        def ask(order: Order) -> Counts:
            self._broadcast(("order", order))
            try:
                return self._summed(work(order))
            except BaseException as error:
                broken.append(error)
                raise

        result, error = _attempt(lambda: decide(ask))
        if broken:
            raise broken[0]
        self._broadcast(("done", None) if error is None else ("error", error))
        if error is not None:
            raise error
        assert result is not None
        return result[0]

    def _broadcast(self, value: Any) -> Any:
        if self.size == 1:
            return value
        import torch.distributed as dist

        box = [value]
        with _meeting():
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def _gathered(self, value: T) -> list[T]:
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        with _meeting():
            dist.all_gather_object(found, value)
        return found

    def _summed(self, counts: Counts) -> Counts:
        import torch
        import torch.distributed as dist

        total = torch.tensor(counts, dtype=torch.int64)
        with _meeting():
            dist.all_reduce(total)
        return tuple(total.tolist())


ALONE = Processes()


def with_own_device(options: dict[str, Any], processes: Processes) -> dict[str, Any]:
    """A model's loading options with this process's own GPU as `device`, where there are several processes.

    Raises ConfigError for options that would put them all on the same devices, and where GPUs are too few.
    """
    device, count = options["device"], processes.size
    if count == 1:
        return options
    if options["device_map"]:
        raise ConfigError(
            f"--device-map {options['device_map']} spreads a model over all devices, and {count} processes "
            "would each do so; leave it out, or start one process without torchrun"
        )
    if device and ":" in device:
        raise ConfigError(
            f"--device {device} would put {count} processes on one device; without it each takes its own"
        )
    import torch

    if device not in (None, "cuda") or not torch.cuda.is_available():
        return options
    if processes.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"process {processes.rank} is number {processes.local_rank + 1} on a machine with "
            f"{torch.cuda.device_count()} GPUs; start one for each with --nproc-per-node"
        )
    return {**options, "device": f"cuda:{processes.local_rank}"}


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, str(default))
    if not text.isdecimal():
        raise ConfigError(f"{name} is {text!r}; expected a number, as torchrun sets it")
    return int(text)


def _attempt(step: Callable[[], T]) -> _Outcome[T]:
    """The result in a tuple, for it may be None, or an error that can travel to another process."""
    try:
        return (step(),), None
    except ProcessLost:
        raise
    except SkipcalError as error:
        return None, error
    except Exception as error:
        found = SkipcalError(f"{type(error).__name__}: {first_words(error)}")
        found.__cause__ = error
        return None, found


@contextmanager
def _meeting() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo: connection closed by peer, or timed out
        raise ProcessLost(LOST) from error


def _disconnect() -> None:
    import torch.distributed as dist

    with contextlib.suppress(RuntimeError):  # the others are gone, and that has been said
        dist.destroy_process_group()


@contextmanager
def _stop_on_sigterm() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only there signals have handlers
        yield
        return

    def stop(_number: int, _frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: the error is on its way
        raise _Stopped

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except BaseException:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # so that the error is told in peace
        raise
    else:
        signal.signal(signal.SIGTERM, before)
