"""Ask the hub again when it was busy or the line was down: a few times, ever more patiently."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from skipcal.errors import first_words

logger = logging.getLogger(__name__)
T = TypeVar("T")

DELAYS_S = (2.0, 8.0, 30.0)  # before the second, third and fourth attempt
_TOO_MANY_REQUESTS, _SERVER_ERROR = 429, 500
# By name, for they come from several libraries (builtins, httpx, requests, aiohttp), not all installed.
_BROKEN_LINES = {"ConnectionError", "TimeoutError", "TransportError", "ClientConnectionError"}


def retried(read: Callable[[], T], what: str) -> T:
    """`read()`, again after failures that may pass; any other failure, and the last one, is raised."""
    for delay in DELAYS_S:
        try:
            return read()
        except Exception as error:
            if not may_pass(error):
                raise
            logger.warning("%s: %s; asking again in %g s", what, first_words(error), delay)
            time.sleep(delay)
    return read()


def may_pass(error: BaseException) -> bool:
    """Whether an error, or what caused it, is a busy server or a broken line: 429, 5xx, no connection."""
    chain = list(_causes(error))
    names = {kind.__name__ for cause in chain for kind in type(cause).__mro__}
    if "OfflineModeIsEnabled" in names:  # which is a ConnectionError, too
        return False
    statuses = [status for status in map(_status, chain) if status is not None]
    if statuses:
        return statuses[0] == _TOO_MANY_REQUESTS or statuses[0] >= _SERVER_ERROR
    return bool(names & _BROKEN_LINES)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", error), "status_code", None)
    return status if isinstance(status, int) else None
