"""Engines of vLLM in a process of their own: it changes threads, warnings and defaults where it runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

from vllm_for_gpus import cut, second_runner, whole

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # engine and worker in the process that asks
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # bound to a core that others use, threads wait for each other
    "OMP_NUM_THREADS": "1",
}


def environment() -> dict[str, str]:
    """Of a process that runs vLLM."""
    return {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | SETTINGS


def in_vllm(job: dict[str, Any], folder: Path, **variables: str) -> Any:
    """What `main` answers to a job: one list, under its kind. variables: of the environment."""
    asked, answered = folder / "job.json", folder / "answer.json"
    asked.write_text(json.dumps(job))
    done = subprocess.run(
        [sys.executable, __file__, str(asked), str(answered)],
        env=environment() | variables, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return json.loads(answered.read_text())


def main(asked: str, answered: str) -> None:
    job = json.loads(Path(asked).read_text())
    jobs: dict[str, Callable[[Any], Any]] = {
        "refused": _refusals, "engines": _engines, "second_runner": second_runner, "cut": cut,
        "stock": _stock, "whole": whole,
    }  # fmt: skip
    [(kind, each)] = job.items()
    answer = jobs[kind](each)
    Path(answered).write_text(json.dumps(answer))


def _refusals(asked: list[dict[str, Any]]) -> list[list[str]]:
    return [_refusal(each) for each in asked]


def _stock(engines: list[dict[str, Any]]) -> list[Any]:
    """For each engine without skipping: whether the plug-in is there, the model's class, and its tokens."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.engine.arg_utils import EngineArgs

    answers = []
    for engine in engines:
        llm = LLM(
            engine["model"], dtype="float32", enforce_eager=not engine["compiled"], skip_tokenizer_init=True,
            max_model_len=64, max_num_seqs=4,
        )  # fmt: skip
        worker: Any = llm.llm_engine.model_executor.driver_worker.worker
        outs = llm.generate(
            [{"prompt_token_ids": ids} for ids in engine["prompts"]],
            [
                SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
                for new in engine["new"]
            ],
            use_tqdm=False,
        )
        answers.append(
            {
                "plugged": hasattr(EngineArgs, "skipcal"),
                "kind": type(worker.model_runner.get_model()).__name__,
                "mode": int(llm.llm_engine.vllm_config.compilation_config.mode),
                "tokens": [list(out.outputs[0].token_ids) for out in outs],
            }
        )
        llm.llm_engine.engine_core.shutdown()
        del llm, worker
        cleanup_dist_env_and_memory()
    return answers


def _refusal(each: dict[str, Any]) -> list[str]:
    """Class and text of the error with which an engine does not start; ["", ""]: it would.

    version: what vLLM says of itself; load: start it, not only make its configuration.
    """
    import vllm.version
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs

    before, now = vllm.version.__version__, each.get("version")
    try:
        vllm.version.__version__ = now or before
        if each.get("load"):
            LLM(**each["options"])
        else:
            EngineArgs(**each["options"]).create_engine_config()
    except Exception as error:
        return [type(error).__name__, str(error)]
    finally:
        vllm.version.__version__ = before
    return ["", ""]


def _engines(engines: list[dict[str, Any]]) -> list[Any]:
    """For each engine, for each of its runs: tokens, report, preemptions, whether it was compiled."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    answers = []
    for engine in engines:
        settings = {
            "dtype": "float32", "enforce_eager": True, "enable_prefix_caching": False,
            "skip_tokenizer_init": True, "disable_log_stats": False,
            "additional_config": {"skipcal": engine["runs"][0]["skipcal"]},
        }  # fmt: skip
        llm = LLM(engine["model"], **settings | engine["options"])
        answers.append([_run(llm, run, first=n == 0) for n, run in enumerate(engine["runs"])])
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
    return answers


def _run(llm: Any, run: dict[str, Any], *, first: bool) -> dict[str, Any]:
    import torch
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    from skipcal.serving.counts import request_reports, skip_report
    from skipcal.serving.plan import plan_for
    from skipcal.serving.plugin import start_skipping

    driver = getattr(llm.llm_engine.model_executor, "driver_worker", None)  # None: in processes of their own
    worker: Any = driver and driver.worker
    if not first:  # other settings for a model that is loaded
        worker.skipcal.detach()
        worker.vllm_config.additional_config = {"skipcal": run["skipcal"]}
        start_skipping(worker)
        llm.llm_engine.input_processor.skipcal = plan_for(worker.vllm_config)
    until = ExitStack()
    replays, graphs = _decide_on_device(worker, until) if run.get("on_device") else ([], "")
    before, adapters = _preemptions(llm), run.get("adapters", [None] * len(run["prompts"]))
    prompts: list[Any] = [{"prompt_token_ids": ids} for ids in run["prompts"]]
    if run.get("embedded"):
        table = worker.model_runner.get_model().model.embed_tokens
        prompts = [{"prompt_embeds": table(torch.tensor(ids)).detach()} for ids in run["prompts"]]
    outs = llm.generate(
        prompts,
        [
            SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False, extra_args=extra)
            for new, extra in zip(run["new"], run["extra"], strict=True)
        ],
        lora_request=[
            None if folder is None else LoRARequest(folder, 1 + adapters.index(folder), folder)
            for folder in adapters
        ],
        use_tqdm=False,
    )
    until.close()
    refused = [_error(_generating(extra), llm, run["prompts"][0]) for extra in run.get("refused", ())]
    if refused:
        refused += [_error(ask, llm, run["prompts"][0]) for ask in _ASKED_WRONGLY]
    return {
        "refused": refused,
        "tokens": [list(out.outputs[0].token_ids) for out in outs],
        "report": skip_report(llm),
        "requests": [request_reports(llm, out.request_id) for out in outs],
        "preemptions": _preemptions(llm) - before,
        "compiled": _compiled(worker.model_runner.get_model()) if worker else None,
        "replays": replays,
        "graphs": graphs,
    }


def _decide_on_device(worker: Any, until: ExitStack) -> tuple[list[int], str]:
    """Have passes that only decode run as graphs of whole ones hold them, without graphs; rows of each.

    And what is said of graphs, where FFNs cannot be in them. until: undoes it.
    """
    from types import SimpleNamespace

    import torch
    from vllm.config import CUDAGraphMode

    from skipcal.serving.graphs import WholePasses
    from skipcal.serving.requests import target_asked

    modules: list[Any] = [import_module(f"skipcal.serving.{name}") for name in ("plugin", "runner", "host")]
    plugin, runner_module, host_module = modules
    worker.skipcal.detach()
    rows: list[int] = []
    runner, inside = worker.model_runner, [False]
    layers = runner.get_model().model.layers
    for linear in [
        getattr(layer.mlp, name, None) for layer in layers for name in ("gate_up_proj", "down_proj")
    ]:
        if linear is not None and not linear.weight.numel():  # on CPUs vLLM packs it away
            eye = torch.eye(linear.input_size, dtype=torch.float32)
            linear.weight = torch.nn.Parameter(linear(eye)[0].T.contiguous(), requires_grad=False)
    graphs = WholePasses(
        SimpleNamespace(cudagraph_capture_sizes=[1, 2, 4], cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE)
    )

    def rows_of_graph() -> int | None:
        batch = runner.input_batch
        count, tokens = batch.num_reqs, int(runner.query_start_loc.np[batch.num_reqs])
        targets = [target_asked(runner.requests[name].sampling_params) for name in batch.req_ids[:count]]
        return count if tokens == count and host.replays(targets, count) else None

    def replay(*given: Any) -> Any:
        rows.append(given[1])
        inside[0] = True
        try:
            return own(*given)
        finally:
            inside[0] = False

    for module, name, value in (
        (plugin, "whole_passes", lambda config: graphs),
        (host_module, "capturing", lambda x: inside[0]),
        (runner_module, "_rows_of_graph", rows_of_graph),
    ):
        until.enter_context(patch.object(module, name, value))
    plugin.start_skipping(worker)
    host = worker.skipcal.host
    if host.captures:
        host._captured._captured = {n: set(range(len(layers))) for n in range(1, 5)}
        own, host.replay = host.replay, replay
    return rows, graphs.outcome


def _error(ask: Callable[[Any, list[int]], None], llm: Any, prompt: list[int]) -> str:
    """The error that a call ends with; none where it ends well."""
    try:
        ask(llm, prompt)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _compiled(model: Any) -> bool:
    return any(getattr(part, "compiled", False) for part in (model, model.model))


def _generating(extra: dict[str, Any]) -> Callable[[Any, list[int]], None]:
    def ask(llm: Any, prompt: list[int]) -> None:
        from vllm import SamplingParams

        llm.generate([{"prompt_token_ids": prompt}], SamplingParams(extra_args=extra), use_tqdm=False)

    return ask


def _searching_by_beams(llm: Any, prompt: list[int]) -> None:
    from vllm.sampling_params import BeamSearchParams

    llm.beam_search([{"prompt_token_ids": prompt}], BeamSearchParams(beam_width=2, max_tokens=3))


def _streaming(llm: Any, prompt: list[int]) -> None:
    from vllm import SamplingParams

    engine = llm.llm_engine
    engine.input_processor.process_inputs(
        "streamed", {"prompt_token_ids": prompt}, SamplingParams(), ("generate",), resumable=True
    )


def _reloading(llm: Any, prompt: list[int]) -> None:
    llm.collective_rpc("reload_weights")


def _losing_weights(llm: Any, prompt: list[int]) -> None:
    from vllm.v1.worker.gpu_worker import Worker  # that of CPUs ignores it

    Worker.sleep(llm.llm_engine.model_executor.driver_worker.worker, 2)


def _scoring(llm: Any, prompt: list[int]) -> None:
    from vllm import SamplingParams

    llm.generate([{"prompt_token_ids": prompt}], SamplingParams(prompt_logprobs=0), use_tqdm=False)


_ASKED_WRONGLY = (_searching_by_beams, _streaming, _scoring, _reloading, _losing_weights)


def _preemptions(llm: Any) -> int:
    return int(sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions"))


if __name__ == "__main__":
    main(*sys.argv[1:])
