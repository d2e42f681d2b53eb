"""What is written for GPUs, on vLLM's own structures where these need none, and on stand-ins beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_EXTRA: dict[str, Any] = {"a": None, "b": {"skipcal": 0.25}}  # of the requests of `whole`


def cut(modes: list[str]) -> list[Any]:
    """By mode of CUDA graphs: where vLLM cuts a model for them, and where with skipping; what is refused.

    Then the modes: of the engine, of a worker whose host cannot decide within graphs, of an engine with two
    processes, of one with adapters; and what is said of each.
    """
    from types import SimpleNamespace

    from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode

    from skipcal.serving.graphs import cut_at_ffns, whole_passes
    from skipcal.serving.refusals import against_compilation

    answers = []
    for mode in modes:
        graphs: list[str] = []
        said: list[str | None] = []
        for processes, adapters in ((1, None), (2, None), (1, object())):
            compilation = CompilationConfig(
                mode=CompilationMode.VLLM_COMPILE,
                cudagraph_mode=CUDAGraphMode[mode],
                cudagraph_capture_sizes=[1, 2],
            )
            compilation.set_splitting_ops_for_v1("", 1)
            own = list(compilation.splitting_ops or [])
            gpu: Any = SimpleNamespace(
                compilation_config=compilation, device_config=SimpleNamespace(device_type="cuda"),
                parallel_config=SimpleNamespace(tensor_parallel_size=processes), lora_config=adapters,
            )  # fmt: skip
            refused = list(against_compilation(gpu))
            said.append(cut_at_ffns(gpu))
            cut = list(compilation.splitting_ops or [])
            graphs.append(compilation.cudagraph_mode.name)
            if processes == 1 and adapters is None:
                in_worker = whole_passes(gpu)
                if in_worker is not None:
                    in_worker.prepare(SimpleNamespace(prepare_graphs=lambda sizes: f"graphs over {sizes}"))  # type: ignore[arg-type]
                graphs.append(compilation.cudagraph_mode.name)
                said.append(in_worker.outcome if in_worker else None)
        answers.append([own, cut, refused, graphs, said])
    return answers


def whole(runner: str) -> list[Any]:
    """What becomes of passes over two requests that only decode, by what the host says of them: see the test.

    runner: "first" or "second"; graphs and their choice are vLLM's own, replays are noted.
    """
    from types import SimpleNamespace

    from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode

    noted: list[Any] = []
    allowed: list[bool] = []

    def replays(targets: Any, rows: int) -> bool:
        noted.append(["asked", list(targets), rows])
        return allowed[-1]

    def replay(tokens: Any, rows: int, own: Callable[[], Any]) -> Any:
        noted.append(["replay", tokens and tokens.steps.tolist(), rows])
        return own()

    def run(tokens: Any, ids: Any, forward: Callable[[], Any]) -> Any:
        noted.append(["run", tokens.steps.tolist()])
        return forward()

    host: Any = SimpleNamespace(
        captures=True, proven=True, replays=replays, replay=replay, run=run,
        attach=lambda registry: None, detach=lambda: None,
    )  # fmt: skip
    compilation = CompilationConfig(
        mode=CompilationMode.VLLM_COMPILE, cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE,
        cudagraph_capture_sizes=[1, 4], max_cudagraph_capture_size=4,
    )  # fmt: skip
    compilation.set_splitting_ops_for_v1("", 1)
    config = SimpleNamespace(
        compilation_config=compilation, num_speculative_tokens=0, lora_config=None, speculative_config=None,
        scheduler_config=SimpleNamespace(max_num_seqs=4),
        cache_config=SimpleNamespace(use_kda_recoverssm=False),
    )  # fmt: skip
    passes = {"first": _passes_of_first, "second": _passes_of_second}[runner](config, host)
    answers = []
    for allow in (True, False):
        allowed.append(allow)
        noted.clear()
        mode = passes(real=True)
        answers.append([mode, *noted])
    noted.clear()
    answers.append([passes(real=False), *noted])
    return answers


def _passes_of_first(config: Any, host: Any) -> Callable[..., str]:
    from types import SimpleNamespace

    import numpy as np
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import override_forward_context
    from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher

    from skipcal.serving.runner import watched_runner

    dispatcher = CudagraphDispatcher(config)
    dispatcher.initialize_cudagraph_keys(CUDAGraphMode.FULL_AND_PIECEWISE, 1)
    params = {n: SimpleNamespace(extra_args=extra) for n, extra in _EXTRA.items()}
    runner: Any = SimpleNamespace(
        cudagraph_dispatcher=dispatcher, vllm_config=config, _prepare_inputs=lambda *given: None,
        _model_forward=lambda *given: "out", query_start_loc=SimpleNamespace(np=np.array([0, 1, 2])),
        requests={n: SimpleNamespace(sampling_params=each) for n, each in params.items()},
        input_batch=SimpleNamespace(
            num_reqs=2, req_ids=["a", "b"], num_computed_tokens_cpu=np.array([7, 9]),
            num_prompt_tokens=np.array([3, 3]),
        ),
    )  # fmt: skip
    watched_runner(runner, host).attach()

    def one(*, real: bool) -> str:
        if real:
            runner._prepare_inputs("scheduled")
        mode, batch = dispatcher.dispatch(
            num_tokens=2,
            has_lora=False,
            uniform_decode=True,
            num_active_loras=0,
            valid_modes=None,
            invalid_modes=None,
        )
        if real:
            with override_forward_context(
                SimpleNamespace(cudagraph_runtime_mode=mode, batch_descriptor=batch)
            ):
                assert runner._model_forward("ids") == "out"
        return str(mode)

    return one


def _passes_of_second(config: Any, host: Any) -> Callable[..., str]:
    from types import SimpleNamespace

    import numpy as np
    from vllm.config import CUDAGraphMode
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

    from skipcal.serving.runner import watched_runner

    manager: Any = CudaGraphManager.__new__(CudaGraphManager)
    vars(manager).update(
        vllm_config=config, compilation_config=config.compilation_config, max_num_reqs=4, decode_query_len=1,
        cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE, varlen_decode=False, ubatch_runner=None,
        lora_capture_cases=[0], _lora_dispatch_map={}, _max_lora_case=0, _graphs_captured=True,
        _candidates={}, _capture_descs={}, graphs={},
    )  # fmt: skip
    manager._init_candidates()
    for desc in manager._capture_descs[CUDAGraphMode.FULL]:
        manager.graphs[desc] = SimpleNamespace(replay=lambda: None)
    runner: Any = SimpleNamespace(
        req_states=SimpleNamespace(), model=SimpleNamespace(forward=lambda **given: "out"),
        model_state=SimpleNamespace(prepare_inputs=lambda batch, states: {}), cudagraph_manager=manager,
        add_requests=lambda scheduled: None, finish_requests=lambda scheduled: None, vllm_config=config,
    )  # fmt: skip
    watched_runner(runner, host).attach()
    new = [
        SimpleNamespace(req_id=n, sampling_params=SimpleNamespace(extra_args=extra))
        for n, extra in _EXTRA.items()
    ]
    states = SimpleNamespace(prompt_len=SimpleNamespace(np=np.array([3, 3])))

    def one(*, real: bool) -> str:
        names = ["a", "b"] if real else ["_warmup_0_", "_warmup_1_"]
        batch = SimpleNamespace(
            req_ids=names, num_reqs=2, num_computed_tokens_np=np.array([7, 9]),
            idx_mapping_np=np.array([0, 1]), query_start_loc_np=np.array([0, 1, 2]),
        )  # fmt: skip
        runner.add_requests(
            SimpleNamespace(scheduled_new_reqs=new, num_scheduled_tokens=dict.fromkeys(names, 1))
        )
        new.clear()
        desc = manager.dispatch(2, 2, 1, 0, max_query_len=1)
        runner.model_state.prepare_inputs(batch, states)
        if desc.cg_mode == CUDAGraphMode.FULL:
            manager.run_fullgraph(desc)
        else:
            assert runner.model.forward(input_ids="ids") == "out"
        return str(desc.cg_mode)

    return one


def second_runner(events: list[dict[str, Any]]) -> list[Any]:
    """What the host is told of passes of runner V2, by vLLM's own InputBatch; None: of none.

    events: {"add": {name: extra_args}}, {"finish": [names]}, or {"pass": {name: [slot, computed, prompt,
    tokens]}}; a pass over no names is a dummy one.
    """
    from types import SimpleNamespace

    import numpy as np
    from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers

    from skipcal.serving.runner import watched_runner

    told: list[Any] = []

    def run(tokens: Any, ids: Any, forward: Any) -> Any:
        told.append([tokens.steps.tolist(), tokens.skips.tolist(), tokens.counted.tolist(), ids])
        return forward()

    states = SimpleNamespace(prompt_len=SimpleNamespace(np=np.zeros(8, dtype=np.int32)))
    runner = SimpleNamespace(
        req_states=states, model=SimpleNamespace(forward=lambda **given: given["input_ids"]),
        model_state=SimpleNamespace(prepare_inputs=lambda batch, states: {}),
        add_requests=lambda scheduled: None, finish_requests=lambda scheduled: None,
        vllm_config=SimpleNamespace(compilation_config=SimpleNamespace(mode=0)),
    )  # fmt: skip
    host: Any = SimpleNamespace(
        proven=True, captures=False, run=run, attach=lambda registry: None, detach=lambda: None
    )
    parts = (runner, runner.model, runner.model_state)
    before_all = [dict(vars(part)) for part in parts]
    watched = watched_runner(runner, host)
    watched.attach()
    answers = []
    for event in events:
        if "add" in event:
            params = {name: SimpleNamespace(extra_args=extra) for name, extra in event["add"].items()}
            new = [SimpleNamespace(req_id=name, sampling_params=params[name]) for name in params]
            runner.add_requests(SimpleNamespace(scheduled_new_reqs=new))
        elif "finish" in event:
            runner.finish_requests(SimpleNamespace(finished_req_ids=event["finish"]))
        else:
            rows = event["pass"]
            batch = InputBatch.make_dummy(max(len(rows), 1), 16, InputBuffers(8, 16, "cpu"))
            if rows:
                slots, computed, prompt, tokens = (
                    np.array(each) for each in zip(*rows.values(), strict=True)
                )
                batch.req_ids, batch.idx_mapping_np, batch.num_computed_tokens_np = (
                    list(rows),
                    slots,
                    computed,
                )
                batch.query_start_loc_np = np.concatenate([[0], tokens.cumsum()])
                states.prompt_len.np[slots] = prompt
            runner.model_state.prepare_inputs(batch, states)
            before = len(told)
            assert runner.model.forward(input_ids="ids") == "ids"
            answers.append(told[-1] if len(told) > before else None)
    runner.model_state.prepare_inputs(batch, states)
    watched.detach()
    return [*answers, [vars(part) for part in parts] == before_all]
