"""Engines of vLLM in a process of their own: it changes threads, warnings and defaults where it runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # engine and worker in the process that asks
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # bound to a core that others use, threads wait for each other
    "OMP_NUM_THREADS": "1",
}


def in_vllm(job: dict[str, Any], folder: Path, **variables: str) -> Any:
    """What `main` answers to a job: {"refused": [...]}, {"engines": [...]} or {"stock": [...]}, each in turn.

    variables: of the environment.
    """
    asked, answered = folder / "job.json", folder / "answer.json"
    asked.write_text(json.dumps(job))
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | SETTINGS | variables
    done = subprocess.run(
        [sys.executable, __file__, str(asked), str(answered)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return json.loads(answered.read_text())


def main(asked: str, answered: str) -> None:
    job = json.loads(Path(asked).read_text())
    [(kind, each)] = job.items()
    answer = {"refused": _refusals, "engines": _engines, "stock": _stock}[kind](each)
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
    """For each engine, for each of its runs: tokens, report, preemptions."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    answers = []
    for engine in engines:
        llm = LLM(
            engine["model"], dtype="float32", enforce_eager=True, enable_prefix_caching=False,
            skip_tokenizer_init=True, disable_log_stats=False,
            additional_config={"skipcal": engine["runs"][0]["skipcal"]}, **engine["options"],
        )  # fmt: skip
        answers.append([_run(llm, run, first=n == 0) for n, run in enumerate(engine["runs"])])
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
    return answers


def _run(llm: Any, run: dict[str, Any], *, first: bool) -> dict[str, Any]:
    from vllm import SamplingParams

    from skipcal.serving.counts import skip_report
    from skipcal.serving.plugin import start_skipping

    worker = llm.llm_engine.model_executor.driver_worker.worker
    if not first:  # other settings for a model that is loaded
        worker.skipcal.detach()
        worker.vllm_config.additional_config = {"skipcal": run["skipcal"]}
        start_skipping(worker)
    before = _preemptions(llm)
    outs = llm.generate(
        [{"prompt_token_ids": ids} for ids in run["prompts"]],
        [
            SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False, extra_args=extra)
            for new, extra in zip(run["new"], run["extra"], strict=True)
        ],
        use_tqdm=False,
    )
    refused = []
    for ask in (_asking_wrongly, _searching_by_beams) if run.get("refused") else ():
        try:
            ask(llm, run["prompts"][0])
        except Exception as error:
            refused.append(f"{type(error).__name__}: {error}")
    return {
        "refused": refused,
        "tokens": [list(out.outputs[0].token_ids) for out in outs],
        "report": skip_report(llm),
        "preemptions": _preemptions(llm) - before,
    }


def _asking_wrongly(llm: Any, prompt: list[int]) -> None:
    from vllm import SamplingParams

    llm.generate(
        [{"prompt_token_ids": prompt}], SamplingParams(extra_args={"skipcal": "off"}), use_tqdm=False
    )


def _searching_by_beams(llm: Any, prompt: list[int]) -> None:
    from vllm.sampling_params import BeamSearchParams

    llm.beam_search([{"prompt_token_ids": prompt}], BeamSearchParams(beam_width=2, max_tokens=3))


def _preemptions(llm: Any) -> int:
    return int(sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions"))


if __name__ == "__main__":
    main(*sys.argv[1:])
