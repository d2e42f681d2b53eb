"""Whose turn it is: a session follows one call at a time, in whichever thread, until it is over."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from skipcal.errors import SessionError

logger = logging.getLogger(__name__)

_BUSY = (
    "the model is running already, and skipping(...) follows one call at a time; wait for it to return, put "
    "the prompts into one batch, or give each thread a model of its own (copy.deepcopy(model))"
)
_OVER = (
    "the skipping(...) block was left before this call was done, and outside it would be the full model's; "
    "stay in the block until it has returned (thread.join())"
)


class Turn:
    """Held by a generate() call, or by a single pass of a loop written by hand.

    over: the session has ended, and nobody gets a turn any more.
    """

    def __init__(self) -> None:
        """It is nobody's."""
        self.over = False
        self._lock = threading.Lock()
        self._thread: int | None = None  # that holds the lock
        self._for_a_pass = False

    @property
    def mine(self) -> bool:
        """Whether this thread has it."""
        return self._thread == threading.get_ident()

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Inside, it is this thread's. Raises SessionError where it is somebody's already, or all is over."""
        if self.mine and self._for_a_pass:  # an interrupt has broken the pass off
            self.end_pass()
        self._take()
        try:
            yield
        finally:
            self._thread = None
            self._lock.release()

    def check(self) -> None:
        """Raise SessionError where a pass of this thread may not run."""
        if self._thread is not None and not self.mine:
            raise SessionError(_BUSY)
        if self.over:
            raise SessionError(_OVER)

    def begin_pass(self) -> None:
        """Take it for a pass, unless the pass is part of a generate() call of this thread."""
        self.check()
        if not self.mine:
            self._take()
            self._for_a_pass = True

    def end_pass(self) -> None:
        """Give back what `begin_pass` took."""
        if self._for_a_pass and self.mine:
            self._for_a_pass = False
            self._thread = None
            self._lock.release()

    def close(self) -> None:
        """End the session: what runs in another thread raises at its next pass, and is waited for."""
        if self.over:
            return
        self.over = True
        if not self.mine and not self._lock.acquire(blocking=False):
            logger.warning(
                "skipping(...) is left while the model runs in another thread; waiting until it has stopped"
            )
            self._lock.acquire()

    def _take(self) -> None:
        if self.over or not self._lock.acquire(blocking=False):
            raise SessionError(_OVER if self.over else _BUSY)
        self._thread = threading.get_ident()
