"""vLLM's model runners, as far as they tell which tokens of which requests a pass is over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from skipcal.arch.patch import InstancePatches
from skipcal.core.policy import Policy
from skipcal.errors import SessionError
from skipcal.serving.blocks import blocks_of
from skipcal.serving.clock import BatchTokens, Clock
from skipcal.serving.graphs import WholePasses
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
        self._coming: tuple[float | None, ...] | None = None  # what requests of the pass to come ask for

    def attach(self) -> None:
        """Stand between the runner and its model."""
        self._watch()
        if self.host.captures:
            self._watch_graphs()
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
            if self.host.captures and (rows := _rows_of_graph()):
                return self.host.replay(tokens, rows, lambda: own(input_ids, *args, **kwargs))
            return self._pass(tokens, input_ids, lambda: own(input_ids, *args, **kwargs))

        self._patches.set(runner, "_model_forward", model_forward)

    def _watch_graphs(self) -> None:
        """Have passes take the graph of a whole one only where it decides for all of their requests."""
        runner, dispatcher = self._runner, self._runner.cudagraph_dispatcher
        prepare, own = runner._prepare_inputs, dispatcher.dispatch

        def prepare_inputs(*args: Any, **kwargs: Any) -> Any:
            batch = runner.input_batch
            names = batch.req_ids[: batch.num_reqs]
            self._coming = tuple(target_asked(runner.requests[name].sampling_params) for name in names)
            return prepare(*args, **kwargs)

        def dispatch(*args: Any, **kwargs: Any) -> Any:
            mode, batch = own(*args, **kwargs)
            if self._in_pieces(mode, batch.num_tokens):
                return own(*args, **{**kwargs, "invalid_modes": {mode}})
            return mode, batch

        self._patches.set(runner, "_prepare_inputs", prepare_inputs)
        self._patches.set(dispatcher, "dispatch", dispatch)

    def _in_pieces(self, mode: Any, rows: int) -> bool:
        """Whether the pass to come must not be the replay of a whole one; passes over no request may."""
        coming, self._coming = self._coming, None
        return mode.name == "FULL" and coming is not None and not self.host.replays(coming, rows)

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
        self._manager: Any = None  # of graphs: made after the model is loaded, and perhaps anew

    def _watch(self) -> None:
        runner, state = self._runner, self._runner.model_state
        add, finish, prepare = runner.add_requests, runner.finish_requests, state.prepare_inputs
        own = runner.model.forward

        def add_requests(scheduled: Any) -> Any:
            for new in scheduled.scheduled_new_reqs:
                if not new.req_id.startswith(_WARM_UP):
                    self._targets[new.req_id] = target_asked(new.sampling_params)
            self._expect(scheduled)
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

    def _watch_graphs(self) -> None:
        """Done as passes come: `_expect`."""

    def _expect(self, scheduled: Any) -> None:
        """Note what the pass to come is over, and watch the graphs that it may replay."""
        if not self.host.captures:
            return
        names = scheduled.num_scheduled_tokens
        asked = all(name in self._targets for name in names)
        self._coming = tuple(self._targets[name] for name in names) if names and asked else None
        manager = self._runner.cudagraph_manager
        if manager is self._manager or manager is None:
            return
        self._manager, own, replay = manager, manager.dispatch, manager.run_fullgraph

        def dispatch(num_reqs: int, num_tokens: int, uniform_token_count: Any, *args: Any, **kw: Any) -> Any:
            found = own(num_reqs, num_tokens, uniform_token_count, *args, **kw)
            if self._in_pieces(found.cg_mode, found.num_tokens):  # pieces serve passes of any kind
                return own(num_reqs, num_tokens, None, *args, **kw)
            return found

        def run_fullgraph(found: Any) -> Any:
            tokens, self._next = self._next, None
            return self.host.replay(tokens, found.num_tokens, lambda: replay(found))

        self._patches.set(manager, "dispatch", dispatch)
        self._patches.set(manager, "run_fullgraph", run_fullgraph)

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


def watch(worker: Any, policy: Policy, *, graphs: WholePasses | None = None, **how: Any) -> WatchedRunner:
    """Have the model of a worker skip by `policy` until `detach`; how: as `ServingHost` takes it.

    graphs: of whole passes, which hold the decisions where they can, and are not captured where not.
    Raises UnsupportedModel for another model than those that can be served, ProfileMismatch for a policy of
    another model.
    """
    runner = worker.model_runner
    blocks = blocks_of(runner.get_model(), worker.model_config.hf_text_config.model_type)
    host = ServingHost(blocks, policy, **how)
    if graphs is not None:
        graphs.prepare(host)
    watched = watched_runner(runner, host)
    watched.attach()
    return watched


def watched_runner(runner: Any, host: ServingHost) -> WatchedRunner:
    """What watches the passes of a runner, V1 or V2; nothing is set on it."""
    return (WatchedRunnerV2 if hasattr(runner, "req_states") else WatchedRunner)(runner, host)


def _rows_of_graph() -> int | None:
    """Rows of the graph of a whole pass that the pass whose context is set will replay; None: of none."""
    from vllm.forward_context import get_forward_context

    context = get_forward_context()
    return context.batch_descriptor.num_tokens if context.cudagraph_runtime_mode.name == "FULL" else None


def _run_eagerly() -> None:
    """Have the pass whose context is set run the model's own code, compiled or not."""
    from vllm.forward_context import get_forward_context

    get_forward_context().skip_compiled = True
