"""A language model as judge: ratings and pair verdicts from any OpenAI-compatible endpoint.

Verdicts are paid for, so each one is on disk as soon as it is there: a run that was killed, or
that the endpoint refused half way, goes on where it stopped and sends nothing twice.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from tqdm.auto import tqdm

from skipcal.errors import ConfigError, JudgeError
from skipcal.evaluation.judge.endpoint import Endpoint, EndpointFailed
from skipcal.evaluation.judge.settings import JudgeSettings
from skipcal.evaluation.judge.verdicts import JudgeRequest, Verdict
from skipcal.evaluation.records import RecordFile

GRACE_S = 1.0  # after a failure, for answers that are on their way


def ask(requests: Sequence[JudgeRequest], settings: JudgeSettings, records: Path) -> dict[str, Verdict]:
    """The verdict on every request, by id; those that `records` holds already are not asked for again.

    An answer without a verdict after all retries gives a Verdict of neither rating nor winner.
    Raises ConfigError for ids that repeat and for records of other prompts or another judge,
    JudgeError when the endpoint cannot be used. Finished verdicts stay on disk in every case.
    """
    url = settings.endpoint
    ids = [request.id for request in requests]
    repeated = [key for key, times in Counter(ids).items() if times > 1]
    if repeated:
        raise ConfigError(f"the judge requests hold the id {repeated[0]!r} twice; expected an id for each")
    file = RecordFile(records, _header(settings, url))
    pending = [request for request in requests if not _is_answered(request, file)]
    with tqdm(
        total=len(ids), initial=len(ids) - len(pending), desc="judge", unit="verdict", disable=None
    ) as bar:

        def keep(record: dict[str, Any]) -> None:
            file.append(record)
            bar.update()

        try:
            if pending:
                _ask_all(pending, Endpoint(settings, url), settings.concurrency, keep)
        except EndpointFailed as failure:
            finished = sum(key in file.done for key in ids)
            raise JudgeError(
                f"judge endpoint {url}: {failure.reason}; {finished} of {len(ids)} verdicts are finished "
                f"and kept in {records}; {failure.advice}, then run the same command again"
            ) from failure.__cause__
    return {key: _verdict(file.done[key]) for key in ids}


def _header(settings: JudgeSettings, url: str) -> dict[str, Any]:
    return {
        "kind": "judge",
        "judge_model": settings.model,
        "base_url": url,
        "temperature": float(settings.temperature),
        "max_tokens": settings.max_tokens,
    }


def _is_answered(request: JudgeRequest, file: RecordFile) -> bool:
    record = file.done.get(request.id)
    if record is not None and record.get("prompt_sha256") != request.prompt_sha256:
        raise ConfigError(
            f"{file.path} holds a verdict on {request.id!r} for another prompt: the answers or the judge "
            "prompts have changed; name another output, or pass --overwrite to start over"
        )
    return record is not None


def _verdict(record: dict[str, Any]) -> Verdict:
    names = ("id", "rating", "winner", "raw", "attempts")
    return Verdict(*(record[name] for name in names))


def _ask_all(
    requests: Sequence[JudgeRequest],
    endpoint: Endpoint,
    concurrency: int,
    keep: Callable[[dict[str, Any]], None],
) -> None:
    """Ask `concurrency` requests at a time; `keep` gets each answer, in this thread.

    Daemon threads rather than an executor: the interpreter waits for an executor's threads, so that
    Ctrl-C would last as long as the slowest request.
    """
    todo: SimpleQueue[JudgeRequest | None] = SimpleQueue()
    finished: SimpleQueue[dict[str, Any] | Exception] = SimpleQueue()
    for request in requests:
        todo.put(request)
    workers = []
    for _ in range(min(concurrency, len(requests))):
        todo.put(None)
        workers.append(threading.Thread(target=_work, args=(endpoint, todo, finished), daemon=True))
    try:
        for worker in workers:
            worker.start()
        for _ in requests:
            answer = finished.get()
            if isinstance(answer, Exception):
                raise answer
            keep(answer)
    except (EndpointFailed, KeyboardInterrupt):
        endpoint.stopped.set()
        deadline = time.monotonic() + GRACE_S
        for worker in workers:
            worker.join(max(0.0, deadline - time.monotonic()))
        while not finished.empty():
            if isinstance(late := finished.get(), dict):
                keep(late)
        raise
    finally:
        endpoint.close()


def _work(
    endpoint: Endpoint,
    todo: SimpleQueue[JudgeRequest | None],
    finished: SimpleQueue[dict[str, Any] | Exception],
) -> None:
    """One thread's share. Its first error is the last thing anyone sends."""
    try:
        while (request := todo.get()) is not None and not endpoint.stopped.is_set():
            finished.put(endpoint.record(request))
    except Exception as error:
        finished.put(error)  # before the others are stopped: the first error is the one to report
        endpoint.stopped.set()
