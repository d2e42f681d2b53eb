"""vLLM's model runners, as far as they tell which tokens of which requests a pass is over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from skipcal.arch.patch import InstancePatches
from skipcal.core.policy import Policy
from skipcal.errors import SessionError
from skipcal.serving.blocks import blocks_of
from skipcal.serving.clock import BatchTokens, Clock
from skipcal.serving.host import ServingHost
from skipcal.serving.requests import target_asked

_WARM_UP = ("_warmup_", "_v2_mixed_warmup")  # what the names of runner V2's own requests begin with


class WatchedRunner:
    """Hands the passes over requests to `host`: those of runner V1.

    `_model_forward` is what the runner offers to be overridden, and calls for nothing else: passes that warm
    up or measure call the model itself.
    """

    def __init__(self, runner: Any, host: ServingHost) -> None:
        """runner: a GPUModelRunner of vllm/v1/worker/gpu_model_runner.py, or a subclass of it."""
        self._runner = runner
        self.host = host
        self._clock = Clock()
        self._patches = InstancePatches()

    def attach(self) -> None:
        """Stand between the runner and its model."""
        self._watch()
        compilation = self._runner.vllm_config.compilation_config
        self.host.attach(compilation.static_forward_context if compilation.mode else None)

    def detach(self) -> None:
        """Leave runner and model as they were."""
        self._patches.restore()
        self.host.detach()

    def _watch(self) -> None:
        runner, own = self._runner, self._runner._model_forward

        def model_forward(input_ids: Any = None, *args: Any, **kwargs: Any) -> Any:
            batch = runner.input_batch
            count = batch.num_reqs
            names = batch.req_ids[:count]
            tokens = self._clock.tokens(
                names,
                computed=batch.num_computed_tokens_cpu[:count],
                prompt=batch.num_prompt_tokens[:count],
                starts=runner.query_start_loc.np[: count + 1],
                targets=[target_asked(runner.requests[name].sampling_params) for name in names],
                alive=runner.requests,
            )
            return self._pass(tokens, input_ids, lambda: own(input_ids, *args, **kwargs))

        self._patches.set(runner, "_model_forward", model_forward)

    def _pass(self, tokens: BatchTokens, ids: Any, forward: Callable[[], Any]) -> Any:
        if not self.host.proven:
            _run_eagerly()
        return self.host.run(tokens, ids, forward)


class WatchedRunnerV2(WatchedRunner):
    """The passes of runner V2, which has not been run here: it needs Triton, so a GPU.

    The state of the model is told of each pass right before it. Requests that nobody has asked for, by which
    the runner warms up and measures, get the full model.
    """

    def __init__(self, runner: Any, host: ServingHost) -> None:
        """runner: a GPUModelRunner of vllm/v1/worker/gpu/model_runner.py, or a subclass of it."""
        super().__init__(runner, host)
        self._targets: dict[str, float | None] = {}  # by request that has not finished, preempted ones too
        self._next: BatchTokens | None = None  # tokens of the pass to come

    def _watch(self) -> None:
        runner, state = self._runner, self._runner.model_state
        add, finish, prepare = runner.add_requests, runner.finish_requests, state.prepare_inputs
        own = runner.model.forward

        def add_requests(scheduled: Any) -> Any:
            for new in scheduled.scheduled_new_reqs:
                if not new.req_id.startswith(_WARM_UP):
                    self._targets[new.req_id] = target_asked(new.sampling_params)
            return add(scheduled)

        def finish_requests(scheduled: Any) -> Any:
            for name in scheduled.finished_req_ids:
                self._targets.pop(name, None)
            return finish(scheduled)

        def prepare_inputs(batch: Any, states: Any) -> Any:
            if self._next is not None:
                raise SessionError(
                    "a pass over requests has not called the model, but replayed a graph of it"
                )
            self._next = self._tokens(batch, states)
            return prepare(batch, states)

        def forward(*args: Any, **kwargs: Any) -> Any:
            tokens, self._next = self._next, None
            if tokens is None:
                return own(*args, **kwargs)
            return self._pass(tokens, kwargs.get("input_ids"), lambda: own(*args, **kwargs))

        self._patches.set(runner, "add_requests", add_requests)
        self._patches.set(runner, "finish_requests", finish_requests)
        self._patches.set(state, "prepare_inputs", prepare_inputs)
        self._patches.set(runner.model, "forward", forward)

    def _tokens(self, batch: Any, states: Any) -> BatchTokens | None:
        names, count = batch.req_ids, batch.num_reqs
        if any(name not in self._targets for name in names):
            return None
        return self._clock.tokens(
            names,
            computed=batch.num_computed_tokens_np[:count],
            prompt=states.prompt_len.np[batch.idx_mapping_np[:count]],
            starts=batch.query_start_loc_np[: count + 1],
            targets=[self._targets[name] for name in names],
            alive=self._targets,
        )


def watch(worker: Any, policy: Policy, **how: Any) -> WatchedRunner:
    """Have the model of a worker skip by `policy` until `detach`; how: as `ServingHost` takes it.

    Raises UnsupportedModel for another model than those that can be served, ProfileMismatch for a policy of
    another model.
    """
    runner = worker.model_runner
    blocks = blocks_of(runner.get_model(), worker.model_config.hf_text_config.model_type)
    watched = watched_runner(runner, ServingHost(blocks, policy, **how))
    watched.attach()
    return watched


def watched_runner(runner: Any, host: ServingHost) -> WatchedRunner:
    """What watches the passes of a runner, V1 or V2; nothing is set on it."""
    return (WatchedRunnerV2 if hasattr(runner, "req_states") else WatchedRunner)(runner, host)


def _run_eagerly() -> None:
    """Have the pass whose context is set run the model's own code, compiled or not."""
    from vllm.forward_context import get_forward_context

    get_forward_context().skip_compiled = True
