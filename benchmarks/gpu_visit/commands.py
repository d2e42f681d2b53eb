"""skipcal's commands over a made-up model of 8 layers, in the dtype of the visit: that they run, and how."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import chdir
from typing import Any

import torch
from gpu_visit.steps import Visit
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from skipcal.cli import app

_WORDS = 97
_RATIO = 0.25


def model_folder(visit: Visit) -> Iterator[dict[str, Any]]:
    """A folder with random weights, a tokenizer of words and a text of them; what comes after needs it."""
    heads, head_dim = (8, 128) if visit.on_gpu else (4, 8)
    hidden = heads * head_dim
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=11 * hidden // 4, num_hidden_layers=8,
        num_attention_heads=heads, num_key_value_heads=heads, vocab_size=_WORDS, max_position_embeddings=512,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():  # blocks add about as much as is there: cosines differ by token
            if parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
        model.get_input_embeddings().weight.normal_(std=0.3)
    model.to(getattr(torch, visit.dtype)).save_pretrained(visit.work / "model")
    words = Tokenizer(WordLevel({f"w{n}": n for n in range(_WORDS)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0").save_pretrained(visit.work / "model")
    ids = torch.randint(3, _WORDS, (20_000,)).tolist()
    (visit.work / "words.txt").write_text(" ".join(f"w{n}" for n in ids), encoding="utf-8")
    count = sum(p.numel() for p in model.parameters())
    yield {"parameters": count, "said": f"{count / 1e6:.1f} M parameters"}


def profile(visit: Visit) -> Iterator[dict[str, Any]]:
    """`skipcal profile --verify`, in decoding."""
    prompts, new_tokens = ("16", "64") if visit.on_gpu else ("4", "9")
    document = _skipcal(
        visit, "profile", *_model(visit), "--data-files", "words.txt", "--prompts", prompts,
        "--prompt-tokens", "16", "--new-tokens", new_tokens, "--warm-up-tokens", "2", "--cold-s", "1",
        "--cold-e", "7", "--target-skip-ratio", str(_RATIO), "--closed-loop", "decode", "--verify",
        "-o", "p.json", "--overwrite",
    )  # fmt: skip
    points = document["operating_points"]
    found = next(point for point in points if math.isclose(point["target_skip_ratio"], _RATIO))
    verified = found["verified_skip_ratio"]
    yield {"operating_points": points, "said": f"asked {_RATIO}, verified {verified:.3f} in decoding"}


def generate(visit: Visit) -> Iterator[dict[str, Any]]:
    """`skipcal generate`, by the engine that is chosen."""
    engine = ("--engine", "auto" if visit.on_gpu else "recorded")
    new_tokens = "128" if visit.on_gpu else "9"
    given = ("--profile", "p.json", "--prompt", "w3 w4 w5 w6", "--new-tokens", new_tokens, *engine)
    document = _skipcal(visit, "generate", *_model(visit), *given)
    report = document["report"]
    speed = f"{document['tok_per_s']:.0f} tokens/s, prefill {document['prefill_s']:.2f} s"
    skipped = f"skip ratio {report['skip_ratio']:.3f}, set-up {report['setup_s']:.1f} s"
    yield {"generated": document, "said": f"{report['engine']}, {speed}, {skipped}"}
    wanted = "graph" if visit.on_gpu else "recorded"
    if report["engine"] != wanted:
        raise AssertionError(f"ran by {report['engine']}: {report['engine_reason']}")


def fit(visit: Visit) -> Iterator[dict[str, Any]]:
    """`skipcal fit`: a gate with surrogates."""
    prompts, rank = ("64", "16") if visit.on_gpu else ("20", "3")
    document = _skipcal(
        visit, "fit", *_model(visit), "--profile", "p.json", "--data-files", "words.txt", "--prompts",
        prompts, "--prompt-tokens", "24", "--rank", rank, "--damage-prompts", "4",
        "--closed-loop-prompts", "10", "-o", "gated.json", "--overwrite",
    )  # fmt: skip
    fitted = document["gate"]["fit"]
    yield {"fit": fitted, "said": f"rank {fitted['rank']}, {len(fitted['sweeps'])} sweeps"}


def evaluate(visit: Visit) -> Iterator[dict[str, Any]]:
    """`skipcal evaluate --task perplexity` under the fitted gate."""
    items = "16" if visit.on_gpu else "3"
    rows = _skipcal(
        visit, "evaluate", *_model(visit), "--profile", "gated.json", "--method", "gate", "--task",
        "perplexity", "--data-files", "words.txt", "--items", items, "--window-tokens", "60",
        "--target-skip-ratio", str(_RATIO), "-o", "evaluated",
    )  # fmt: skip
    found = {row["method"]: row["value"] for row in rows if row["metric"] == "perplexity"}
    yield {"rows": rows, "said": ", ".join(f"{name} {value:.1f}" for name, value in found.items())}
    if not all(map(math.isfinite, found.values())) or "full" not in found or len(found) < 2:
        raise AssertionError(f"perplexities {found}")


def _model(visit: Visit) -> tuple[str, ...]:
    return ("--model", "model", "--device", visit.device, "--dtype", visit.dtype)


def _skipcal(visit: Visit, *args: str) -> Any:
    """What a command prints with --json; what it says besides goes to the log."""
    print("skipcal", *args, flush=True)
    with chdir(visit.work):
        done = CliRunner().invoke(app, [*args, "--json"])
    print(done.stderr, flush=True)
    if done.exit_code:
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        raise RuntimeError(f"skipcal {args[0]} ended with {done.exit_code}: {errors or done.exception!r}")
    return json.loads(done.stdout)
