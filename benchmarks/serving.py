"""SmolLM2 in vLLM against the eager engine in transformers, and what batches leave of the gain.

    .venv-vllm/bin/python benchmarks/serving.py              about 10 minutes on one core, after make vllm
    .venv-vllm/bin/python benchmarks/serving.py --compiled   the comparison once more, of a compiled model

Greedy and in float32. First every prompt alone in transformers, then all of them at once in vLLM, of which
four run together: tokens and skips by layer are compared. Then the same prompts in groups of 1, 2, 4 and 8:
which share of the FFN weights a pass leaves unread. Nothing here is a timing.
"""

from __future__ import annotations

import os

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}

import argparse
from importlib import metadata
from typing import Any

import torch
from common import save
from prompts import PROMPTS
from transformers import AutoTokenizer

from skipcal.arch.embedded import embedded_model_folder
from skipcal.arch.loading import load_model
from skipcal.profiles.schema import SkipProfile
from skipcal.runtime.session import skipping
from skipcal.serving.counts import skip_report
from skipcal.serving.plugin import start_skipping
from skipcal.serving.settings import ServingSettings, policy_of

PROFILE = "smollm2-135m-instruct"
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "ffn-skip": {"target_skip_ratio": 0.25},
    "gate": {"target_skip_ratio": 0.25},
    "static": {"target_skip_ratio": 0.25},
    "static+surrogates": {"target_skip_ratio": 0.25},
}
WARM_UP = 8  # the profile's 25 would leave little of texts as short as these
NEW = (40, 30, 48, 52, 34, 40, 36, 28, 44, 32, 50, 38)
GROUPS = (1, 2, 4, 8)

Texts = list[list[int]]


def settings(method: str) -> dict[str, Any]:
    return {"profile": PROFILE, "method": method, "warm_up_tokens": WARM_UP, **METHODS[method]}


def alone(rows: Texts) -> dict[str, tuple[Texts, list[int]]]:
    """By method, the tokens of each prompt and all skips by layer, one prompt at a time in transformers."""
    loaded = load_model(device="cpu", dtype="float32")
    model: Any = loaded.model
    model.generation_config.eos_token_id = None  # as vLLM's ignore_eos
    found = {}
    for method in METHODS:
        policy = policy_of(ServingSettings(**settings(method)), SkipProfile.load(PROFILE))
        texts, skipped = [], [0] * model.config.num_hidden_layers
        for row, new in zip(rows, NEW, strict=True):
            with skipping(model, policy=policy, engine="eager") as run:
                out = model.generate(torch.tensor([row]), max_new_tokens=new, do_sample=False, pad_token_id=2)
            texts.append(out[0, len(row) :].tolist())
            skipped = [a + b for a, b in zip(skipped, run.report.skipped_per_layer, strict=True)]
        found[method] = texts, skipped
        print(method, sum(skipped), flush=True)
    return found


def served(llm: Any, method: str, rows: Texts, group: int) -> tuple[Texts, dict[str, Any]]:
    """Tokens and counts; so many prompts are handed over at once."""
    from vllm import SamplingParams

    worker = llm.llm_engine.model_executor.driver_worker.worker
    worker.skipcal.detach()
    worker.vllm_config.additional_config = {"skipcal": settings(method)}
    start_skipping(worker)
    texts: Texts = []
    for at in range(0, len(rows), group):
        outs = llm.generate(
            [{"prompt_token_ids": row} for row in rows[at : at + group]],
            [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in NEW[at : at + group]],
            use_tqdm=False,
        )
        texts += [list(out.outputs[0].token_ids) for out in outs]
    return texts, skip_report(llm)


def engine(running: int, *, compiled: bool = False) -> Any:
    from vllm import LLM

    return LLM(
        str(embedded_model_folder()), dtype="float32", enforce_eager=not compiled, max_model_len=256,
        max_num_seqs=running, enable_prefix_caching=False, additional_config={"skipcal": settings("full")},
    )  # fmt: skip


def compare(llm: Any, rows: Texts, expected: dict[str, tuple[Texts, list[int]]]) -> dict[str, Any]:
    """By method: whether tokens and skips are those of each prompt alone."""
    compared = {}
    for method, (texts, skipped) in expected.items():
        got, report = served(llm, method, rows, len(rows))
        compared[method] = {
            "texts": len(rows),
            "texts_equal": sum(a == b for a, b in zip(got, texts, strict=True)),
            "first_differences": [
                next((n for n, (a, b) in enumerate(zip(*pair, strict=True)) if a != b), None)
                for pair in zip(got, texts, strict=True)
            ],
            "skips": sum(report["skipped_per_layer"]),
            "skips_alone": sum(skipped),
            "largest_difference_of_a_layer": max(
                abs(a - b) for a, b in zip(report["skipped_per_layer"], skipped, strict=True)
            ),
        }
        print(method, compared[method], flush=True)
    return compared


def unread(llm: Any, rows: Texts) -> list[dict[str, Any]]:
    """By method and requests at a time: what was skipped, and left unread."""
    batches = []
    for method in ("gate", "static+surrogates"):
        for group in GROUPS:
            _, report = served(llm, method, rows, group)
            ratios = {
                name: report[name] for name in ("skip_ratio", "skip_ratio_all", "unread_ratio", "passes")
            }
            batches.append({"method": method, "requests": group, **ratios})
            print(batches[-1], flush=True)
    return batches


def main(*, compiled: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_folder())
    rows = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    expected = alone(rows)  # first: vLLM changes settings of torch in its process
    llm = engine(4, compiled=compiled)
    compared = compare(llm, rows, expected)
    result: dict[str, Any] = {"vllm": metadata.version("vllm-cpu"), "compared": compared}
    if compiled:
        found = llm.llm_engine.vllm_config.compilation_config
        result["compilation"] = {"mode": found.mode.name, "backend": found.backend}
        save("serving_compiled", "python benchmarks/serving.py --compiled", result)
        return
    llm.llm_engine.engine_core.shutdown()
    save("serving", "python benchmarks/serving.py", {**result, "batches": unread(engine(8), rows)})


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--compiled", action="store_true", help="the comparison with a compiled model")
    main(compiled=parser.parse_args().compiled)
