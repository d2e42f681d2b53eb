"""The plug-in of vLLM: what is set on its classes, in each of its processes.

Settings are read and checked where the engine's configuration is made, so that a mistake ends the start and
not a worker. The worker attaches the host once the weights are there. Without settings nothing changes.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from skipcal.errors import ConfigError, SkipcalError
from skipcal.serving.graphs import cut_at_ffns, whole_passes
from skipcal.serving.plan import check_request, check_same_weights, plan_for
from skipcal.serving.refusals import OTHER_WEIGHTS, STREAMED_INPUT, check_version
from skipcal.serving.requests import check_body, check_no_beams
from skipcal.serving.settings import settings_of


def register() -> None:
    """Prepare vLLM's classes; the entry point, which vLLM may call more than once."""
    from vllm.engine.arg_utils import EngineArgs

    if hasattr(EngineArgs, "skipcal"):
        return
    EngineArgs.skipcal = True
    _wrap(EngineArgs, "create_engine_config", _checking)
    if not _known_version():
        return  # the check refuses, where skipping is asked for
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.worker.gpu_worker import Worker  # those of other platforms inherit from it

    _wrap(Worker, "load_model", _attaching)
    _wrap(Worker, "shutdown", _telling)
    _wrap(InputProcessor, "__init__", _planning)
    _wrap(Worker, "reload_weights", _keeping_weights)
    _wrap(Worker, "sleep", _keeping_weights_asleep)
    _wrap(InputProcessor, "process_inputs", _refusing_streams)
    _wrap(InputProcessor, "_validate_params", _validating)
    _wrap(InputProcessor, "resolve_watermarking", _refusing_beams)
    Worker.skipcal_report = _report
    Worker.skipcal_requests = _requests


def start_skipping(worker: Any) -> None:
    """Have a worker that has loaded its model skip what its configuration asks for, if it asks for anything.

    Raises as `plan_for` and `check_same_weights` do.
    """
    plan = plan_for(worker.vllm_config)
    if plan is None:
        return
    check_same_weights(plan, worker)
    from skipcal.serving.ranks import first_decides
    from skipcal.serving.runner import watch

    config = worker.vllm_config
    graphs = whole_passes(config)
    worker.skipcal = watch(
        worker,
        plan.policy,
        graphs=graphs,
        policy_at=plan.policy_at,
        gathers=config.lora_config is None,  # adapters are chosen by a token's place in the batch
        agreed=first_decides if config.parallel_config.tensor_parallel_size > 1 else None,
    )
    if graphs is not None:
        _logger().info("skipcal: %s", graphs.outcome)
    if worker.device.type != "cpu" or config.use_v2_model_runner:
        _logger().warning(
            "skipcal has served on CPUs with model runner V1 only so far; nothing is known of %s, runner %s",
            worker.device.type,
            "V2" if config.use_v2_model_runner else "V1",
        )


def _wrap(kind: type, name: str, wrapper: Callable[[Any], Callable[..., Any]]) -> None:
    own = getattr(kind, name)
    setattr(kind, name, functools.wraps(own)(wrapper(own)))


def _known_version() -> bool:
    from vllm.version import __version__

    try:
        check_version(__version__)
    except ConfigError:
        return False
    return True


def _checking(own: Callable[..., Any]) -> Callable[..., Any]:
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm.version import __version__

        with _told_in_a_line():
            if settings_of(self.additional_config) is not None:
                check_version(__version__)
            config = own(self, *args, **kwargs)
            if plan_for(config) is not None and (changed := cut_at_ffns(config)) is not None:
                _logger().info("skipcal: %s", changed)
        return config

    return create_engine_config


@contextmanager
def _told_in_a_line() -> Iterator[None]:
    """A user of vLLM's own commands reads one line; a program that uses vLLM gets the error."""
    try:
        yield
    except SkipcalError as error:
        program = getattr(sys.modules["__main__"], "__spec__", None)
        if (program is None or not program.name.startswith("vllm.")) and Path(sys.argv[0]).name != "vllm":
            raise
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


def _attaching(own: Callable[..., Any]) -> Callable[..., Any]:
    def load_model(self: Any, **kwargs: Any) -> None:
        own(self, **kwargs)
        try:
            start_skipping(self)
        except SkipcalError as error:
            _logger().error("%s", error)  # else it is the last line of a traceback of another process
            raise

    return load_model


def _telling(own: Callable[..., Any]) -> Callable[..., Any]:
    def shutdown(self: Any) -> None:
        watched = self.__dict__.pop("skipcal", None)
        if watched is not None:
            _logger().info("skipcal, %s", watched.host.report.line())
            watched.detach()
        own(self)

    return shutdown


def _planning(own: Callable[..., Any]) -> Callable[..., Any]:
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        own(self, *args, **kwargs)
        self.skipcal = plan_for(self.vllm_config)  # requests are judged by what is there as the engine starts
        _read_bodies()

    return init


@functools.cache
def _read_bodies() -> None:
    """Where requests come in, and nowhere else: other processes of vLLM do not import these."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    for kind in (ChatCompletionRequest, CompletionRequest, ResponsesRequest):
        _wrap(kind, "to_sampling_params", _reading)


def _reading(own: Callable[..., Any]) -> Callable[..., Any]:
    def to_sampling_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _answered("body"):
            check_body(self.model_extra or ())
        return own(self, *args, **kwargs)

    return to_sampling_params


def _keeping_weights(own: Callable[..., Any]) -> Callable[..., Any]:
    def reload_weights(self: Any, *args: Any, **kwargs: Any) -> Any:
        if hasattr(self, "skipcal"):
            raise ConfigError(OTHER_WEIGHTS)
        return own(self, *args, **kwargs)

    return reload_weights


def _keeping_weights_asleep(own: Callable[..., Any]) -> Callable[..., Any]:
    def sleep(self: Any, level: int = 1) -> Any:
        if hasattr(self, "skipcal") and level > 1:  # 1 keeps the weights elsewhere
            raise ConfigError(OTHER_WEIGHTS)
        return own(self, level)

    return sleep


def _refusing_streams(own: Callable[..., Any]) -> Callable[..., Any]:
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm.exceptions import VLLMValidationError

        if kwargs.get("resumable") and self.skipcal is not None:
            raise VLLMValidationError(STREAMED_INPUT)
        return own(self, *args, **kwargs)

    return process_inputs


def _validating(own: Callable[..., Any]) -> Callable[..., Any]:
    def validate_params(self: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        with _answered("extra_args"):
            check_request(self.skipcal, params)
        return own(self, params, *args, **kwargs)

    return validate_params


def _refusing_beams(own: Callable[..., Any]) -> Callable[..., Any]:
    def resolve_watermarking(self: Any, params: Any) -> Any:  # what both of vLLM's beam searches ask first
        if self.skipcal is not None:
            check_no_beams(params)
        return own(self, params)

    return resolve_watermarking


@contextmanager
def _answered(parameter: str) -> Iterator[None]:
    """Errors inside are of the kind that a server answers as the client's mistake."""
    from vllm.exceptions import VLLMValidationError

    try:
        yield
    except ConfigError as error:
        raise VLLMValidationError(str(error), parameter=parameter) from error


def _report(worker: Any) -> dict[str, Any] | None:
    watched = getattr(worker, "skipcal", None)
    return None if watched is None else watched.host.report.to_dict()


def _requests(worker: Any, request_id: str | None = None) -> list[dict[str, Any]] | None:
    watched = getattr(worker, "skipcal", None)
    return None if watched is None else [r.to_dict() for r in watched.host.tally.requests(request_id)]


def _logger() -> Any:
    from vllm.logger import init_logger

    return init_logger("vllm.skipcal")  # a name of vLLM's, so that its lines are shown as vLLM's are
