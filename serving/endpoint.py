"""What vLLM's server answers of the counts: GET /skipcal, and its lines in /metrics.

The entry point of `vllm.endpoint_plugins`, which vLLM loads only where VLLM_PLUGINS names it. The counts are
kept by the worker, which is another process; it answers between two steps of the engine, by `collective_rpc`.
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any

from skipcal.serving.counts import NOT_SKIPPING, unknown_request
from skipcal.serving.metrics import SkipMetrics
from skipcal.serving.settings import settings_of

logger = logging.getLogger("vllm.skipcal")
ANSWER_S = 2.0  # how long /metrics waits for an engine that is in the midst of a step


class SkipEndpoint:
    """The routes, and what keeps the metrics as they are when they are asked for."""

    name = "skipcal"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        """There is no engine yet."""
        self._engine: Any = None
        self._metrics: SkipMetrics | None = None

    def attach_router(self, app: Any) -> None:
        """Add the routes to vLLM's app."""
        for path, answer in (
            ("/skipcal", self._report),
            ("/skipcal/requests", self._requests),
            ("/skipcal/requests/{request_id}", self._request),
        ):
            app.add_api_route(path, answer, methods=["GET"])
        app.add_middleware(Refreshing, refresh=self._refresh)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Take the engine, and register the metrics, where something is skipped."""
        if settings_of(state.vllm_config.additional_config) is None:
            return
        self._engine = engine_client
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            logger.warning(
                "skipcal: several API servers share /metrics, which lacks its lines; GET /skipcal has them"
            )
            return
        from prometheus_client import REGISTRY

        self._metrics = SkipMetrics(engine_client.model_config.served_model_name)
        REGISTRY.register(self._metrics)

    async def _report(self) -> Any:
        return await self._ask("skipcal_report")

    async def _requests(self) -> Any:
        return await self._ask("skipcal_requests")

    async def _request(self, request_id: str) -> Any:
        found = await self._ask("skipcal_requests", request_id)
        if not found:
            raise _missing(unknown_request(request_id))
        return found

    async def _ask(self, method: str, *args: Any) -> Any:
        if self._engine is None:
            raise _missing(NOT_SKIPPING)
        return (await self._engine.collective_rpc(method, args=args))[0]

    async def _refresh(self) -> None:
        if self._metrics is None:
            return
        try:
            self._metrics.report = await asyncio.wait_for(self._ask("skipcal_report"), ANSWER_S)
        except Exception as error:  # /metrics is for an engine in trouble, too
            logger.warning("skipcal: the engine did not tell its counts, /metrics has older ones: %r", error)


class Refreshing:
    """ASGI middleware that has the counts fetched before /metrics is answered."""

    def __init__(self, app: Any, refresh: Any) -> None:
        """app: what answers; refresh: what fetches."""
        self._app, self._refresh = app, refresh

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""
        if scope["type"] == "http" and scope["path"].rstrip("/").endswith("/metrics"):
            await self._refresh()
        await self._app(scope, receive, send)


def _missing(message: str) -> Exception:
    from fastapi import HTTPException

    found: Exception = HTTPException(404, message)
    return found
