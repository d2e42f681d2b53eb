"""SmolLM2 exported without some of its FFNs, in vLLM without the plug-in, against zeros in transformers.

    .venv-vllm/bin/python benchmarks/exported.py          about 3 minutes on one core; make vllm comes first

Greedy and in float32. The oracle is the model in transformers whose FFNs of the set return zeros. With it are
compared what vLLM writes, with no plug-in loaded, and what transformers writes from the exported folder. Then
the loss over known text: of the exported model, and of skipcal's own teacher-forced pass, which differs by
the FFNs of each row's first token. Nothing here is a timing.
"""

from __future__ import annotations

import os

os.environ |= {
    "VLLM_PLUGINS": "",  # none is loaded, this one neither
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}

import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from common import save
from prompts import PROMPTS

from skipcal.arch.loading import load_model
from skipcal.core.chosen_ffns import ChosenFFNs
from skipcal.export.checkpoint import export_checkpoint
from skipcal.profiles.methods import Ask, make_policy
from skipcal.profiles.schema import SkipProfile
from skipcal.runtime.session import skipping
from skipcal.text.corpora import resolve_corpora, sample_corpus

PROFILE = "smollm2-135m-instruct"
RATIO = 0.25
NEW = 48
WINDOWS, WINDOW_TOKENS = 8, 256

Texts = list[list[int]]


def written(model: Any, rows: Texts) -> Texts:
    """What generate() writes, one prompt at a time."""
    model.generation_config.eos_token_id = None  # as vLLM's ignore_eos
    outs = [
        model.generate(torch.tensor([row]), max_new_tokens=NEW, do_sample=False, pad_token_id=2)
        for row in rows
    ]
    return [out[0, len(row) :].tolist() for out, row in zip(outs, rows, strict=True)]


def served(folder: Path, rows: Texts) -> Texts:
    from vllm import LLM, SamplingParams
    from vllm.engine.arg_utils import EngineArgs

    llm = LLM(str(folder), dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=4)
    assert not hasattr(EngineArgs, "skipcal"), "the plug-in is loaded"
    outs = llm.generate(
        [{"prompt_token_ids": row} for row in rows],
        SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True),
        use_tqdm=False,
    )
    return [list(out.outputs[0].token_ids) for out in outs]


@torch.no_grad()
def loss(model: Any, windows: torch.Tensor) -> float:
    return float(model(windows, labels=windows, use_cache=False).loss)


def compared(got: Texts, expected: Texts) -> dict[str, Any]:
    return {
        "texts": len(expected),
        "texts_equal": sum(a == b for a, b in zip(got, expected, strict=True)),
        "tokens_equal_before_the_first_difference": [
            next((n for n, (a, b) in enumerate(zip(*pair, strict=True)) if a != b), NEW)
            for pair in zip(got, expected, strict=True)
        ],
    }


def main() -> None:
    profile = SkipProfile.load(PROFILE)
    policy = make_policy("static", profile, Ask(target_skip_ratio=RATIO, new_tokens=0, warm_up_tokens=0))
    assert isinstance(policy, ChosenFFNs)
    loaded = load_model(device="cpu", dtype="float32")
    model, tokenizer = loaded.model, loaded.tokenizer
    rows: Texts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    [corpus] = resolve_corpora(["embedded"], [])
    sample = sample_corpus(corpus, tokenizer, prompts=WINDOWS, prompt_tokens=WINDOW_TOKENS, seed=0)
    windows = torch.tensor(sample.prompts)
    losses = {"full": loss(model, windows)}
    with skipping(model, policy=policy, teacher_forced=True, prompt_tokens=1):
        losses["skipcal, teacher-forced, prompt_tokens 1"] = loss(model, windows)
    full = written(model, rows)
    layers: Any = model.model.layers
    for n in policy.layers:
        layers[n].mlp.forward = torch.zeros_like
    losses["oracle"] = loss(model, windows)
    oracle = written(model, rows)
    with tempfile.TemporaryDirectory() as place:
        done = export_checkpoint(profile, policy, None, Path(place, "exported"), target_skip_ratio=RATIO)
        exported = load_model(str(done.folder), device="cpu", dtype="float32").model
        losses["exported, transformers"] = loss(exported, windows)
        by_transformers = written(exported, rows)
        by_vllm = served(done.folder, rows)
    result = {
        "vllm": metadata.version("vllm-cpu"),
        "profile": PROFILE,
        "layers_left_out": list(policy.layers),
        "new_tokens": NEW,
        "bytes_left_out": done.bytes_left_out,
        "bytes_instead": done.bytes_instead,
        "oracle_and_full_model": compared(full, oracle),
        "vllm_without_the_plug_in": compared(by_vllm, oracle),
        "transformers": compared(by_transformers, oracle),
        "loss": {"text": "embedded", "windows": WINDOWS, "window_tokens": WINDOW_TOKENS, **losses},
    }
    print(result)
    save("exported", "python benchmarks/exported.py", result)


if __name__ == "__main__":
    main()
