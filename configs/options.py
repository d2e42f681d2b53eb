"""The command line's options: each is written once and means the same in every command."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from skipcal.runtime.engines.choice import ENGINES

PROFILE_FORMS = "file, folder, shipped name or hub id org/name[@revision]"


def _option(*names: str, help: str, **settings: Any) -> Any:
    return typer.Option(*names, help=help, **settings)


Model = Annotated[
    str | None,
    _option(
        "--model",
        help="Hub id, folder, FILE.gguf or HUB-ID:FILE.gguf. Default: the embedded SmolLM2-135M-Instruct.",
    ),
]
Revision = Annotated[str | None, _option("--revision", help="Branch, tag or commit of the model on the hub.")]
Adapter = Annotated[
    str | None, _option("--adapter", help="Hub id or folder of a LoRA adapter, put on the model by peft.")
]
Dtype = Annotated[str | None, _option("--dtype", help="auto, bfloat16, float16 or float32. Default: auto.")]
Quantization = Annotated[
    str | None,
    _option(
        "--quantization",
        help="Quantize while loading: bitsandbytes:int8, bitsandbytes:nf4 or torchao:int8.",
    ),
]
Device = Annotated[
    str | None, _option("--device", help="cpu, cuda, cuda:1, ... Default: the accelerator, or cpu.")
]
DeviceMap = Annotated[
    str | None,
    _option("--device-map", help="auto: spread the model over GPUs, CPU and disk, as transformers does."),
]
MaxMemory = Annotated[
    list[str] | None,
    _option("--max-memory", help="With --device-map auto: 0=20GiB, cpu=48GiB; the rest goes on; repeatable."),
]
OffloadFolder = Annotated[
    str | None,
    _option(
        "--offload-folder", help="For weights on disk that the checkpoint has in another form (MoE, .bin)."
    ),
]
AttnImplementation = Annotated[
    str | None, _option("--attn-implementation", help="eager, sdpa, flash_attention_2, ...")
]
TrustRemoteCode = Annotated[bool, _option("--trust-remote-code", help="Run code that comes with the model.")]
Corpus = Annotated[
    list[str] | None,
    _option("--corpus", help="wikitext, c4, gsm8k, gsm8k:single, ..., or a hub id; repeatable."),
]
DataFiles = Annotated[
    list[str] | None,
    _option("--data-files", help=".txt, .jsonl or .parquet, as [NAME=]PATH; repeatable."),
]
TextColumn = Annotated[
    str | None, _option("--text-column", help="Column that holds the text. Default: text.")
]
Mode = Annotated[
    str | None,
    _option("--mode", help="generate (default): measure generated tokens. prefill: the text."),
]
ChatPrompts = Annotated[
    bool, _option("--chat-template", help="Prompts are messages in the model's chat template.")
]
Prompts = Annotated[int | None, _option("--prompts", help="Prompts per corpus. Default: 32.")]
PromptTokens = Annotated[int | None, _option("--prompt-tokens", help="Tokens of a prompt. Default: 64.")]
NewTokens = Annotated[
    int | None, _option("--new-tokens", help="Tokens generated after each prompt. Default: 128.")
]
BatchSize = Annotated[int | None, _option("--batch-size", help="Prompts run together. Default: 16.")]
Seed = Annotated[int | None, _option("--seed", help="Draws prompts, samples and bootstraps. Default: 0.")]
TargetSkipRatio = Annotated[
    float | None,
    _option("--target-skip-ratio", help="Fraction of all FFN blocks to skip; 0: the full model."),
]
WarmUpTokens = Annotated[
    int | None,
    _option("--warm-up-tokens", help="First tokens decoded by the full model. Default: 25."),
]
MaxSkips = Annotated[
    int | None, _option("--max-skips", help="At most so many FFNs skipped per token. Default: all.")
]
ColdS = Annotated[int | None, _option("--cold-s", help="First skippable layer, instead of the fitted one.")]
ColdE = Annotated[int | None, _option("--cold-e", help="Layer after the last skippable one.")]
ClosedLoop = Annotated[
    str | None,
    _option(
        "--closed-loop",
        help="Tune thresholds on calibration text (teacher-forced, default) or by decoding (decode).",
    ),
]
Verify = Annotated[
    bool, _option("--verify", help="Decode held-out prompts with skipping, record their ratio.")
]
Output = Annotated[str | None, _option("--output", "-o", help="Default: profiles/<model>.json.")]
Figure = Annotated[Path, _option("--output", "-o", help="Figure to write: .png, .svg or .pdf.")]
Trace = Annotated[str | None, _option("--trace", help="Parquet file for all cosines, token by token.")]
Overwrite = Annotated[bool, _option("--overwrite", help="Replace an output that exists.")]
ConfigFile = Annotated[Path | None, _option("--config", help="YAML file; options given here win over it.")]
ProfileOption = Annotated[str, _option("--profile", metavar="PROFILE", help=f"Profile: {PROFILE_FORMS}.")]
PlotArgument = Annotated[
    str,
    typer.Argument(metavar="PROFILE", help=f"Profile: {PROFILE_FORMS}; or a result of skipcal bench."),
]
ProfileArgument = Annotated[
    str,
    typer.Argument(metavar="PROFILE", help=f"Profile: {PROFILE_FORMS}."),
]
Task = Annotated[
    list[str] | None,
    _option("--task", help="perplexity, continuation, freebaseqa, summarization or mtbench; repeatable."),
]
Tasks = Annotated[str | None, _option("--tasks", help="Tasks, separated by commas.")]
Method = Annotated[
    list[str] | None,
    _option(
        "--method",
        help="ffn-skip (default), random, no-input-adaptive, static, shortgpt, skipdecode, full; repeatable.",
    ),
]
Methods = Annotated[str | None, _option("--methods", help="Methods, separated by commas.")]
Ratios = Annotated[str | None, _option("--ratios", help="Target skip ratios, separated by commas.")]
TaskFiles = Annotated[
    list[str] | None,
    _option("--data-files", help="TASK=PATH for a task's items, [NAME=]PATH for text; repeatable."),
]
Items = Annotated[
    int | None, _option("--items", help="Items per task (per corpus or bucket, where there are some).")
]
WindowTokens = Annotated[
    int | None, _option("--window-tokens", help="Tokens of a window of perplexity. Default: 512.")
]
MatchItems = Annotated[
    int | None,
    _option(
        "--match-items",
        help="Tune thresholds (ffn-skip, gate) on so many items until they realise the target. Default: 0.",
    ),
]
JudgeModel = Annotated[str | None, _option("--judge-model", help="Model that rates answers.")]
JudgeUrl = Annotated[
    str | None, _option("--judge-base-url", help="OpenAI-compatible endpoint, e.g. http://localhost:8000/v1.")
]
JudgePrompts = Annotated[
    str | None, _option("--judge-prompts", help="FastChat's judge_prompts.jsonl. Default: skipcal's own.")
]
LmEvalTasks = Annotated[str | None, _option("--lm-eval-tasks", help="Tasks of lm-eval, separated by commas.")]
Limit = Annotated[int | None, _option("--limit", help="Samples of each lm-eval task.")]
Folder = Annotated[Path | None, _option("--output", "-o", help="Folder for records, tables and figures.")]
RequiredFolder = Annotated[Path, _option("--output", "-o", help="Folder for records, tables and figures.")]
GateProfile = Annotated[
    str | None,
    _option(
        "--profile",
        metavar="PROFILE",
        help="Time this profile's gate and surrogates. Default: the rule cosine.",
    ),
]
TimedRule = Annotated[
    str | None,
    _option("--rule", help="cosine, or gate: a profile's, or random ones of a shape. Default: cosine."),
]
OptionalProfile = Annotated[
    str | None, _option("--profile", metavar="PROFILE", help=f"Profile: {PROFILE_FORMS}.")
]
Profiles = Annotated[
    list[str], typer.Argument(metavar="PROFILE...", help=f"Profiles of one model: {PROFILE_FORMS}.")
]
TextTokens = Annotated[
    int | None, _option("--text-tokens", help="Tokens of a text a profile is tried on. Default: 256.")
]
Shape = Annotated[
    str | None,
    _option("--shape", help="Random weights in the shape of llama-2-7b, llama-2-13b, mistral-7b, tiny, ..."),
]
ForcedRatios = Annotated[
    str | None,
    _option("--ratios", help="Skip ratios to force, separated by commas. Default: 0.05,0.1,0.25,0.5."),
]
BatchSizes = Annotated[
    list[int] | None, _option("--batch-size", help="Rows decoded together; repeatable. Default: 1.")
]
ContextTokens = Annotated[
    list[int] | None,
    _option("--context-tokens", help="Tokens in the cache at the start; repeatable. Default: 128."),
]
TimedTokens = Annotated[
    int | None, _option("--new-tokens", help="Tokens decoded in each round. Default: 32.")
]
Rounds = Annotated[int | None, _option("--rounds", help="Counted rounds of every arm. Default: 5.")]
Peers = Annotated[
    bool, _option("--peers", help="Also the full model with a static cache, compiled (on a GPU).")
]
ResultFile = Annotated[Path | None, _option("--output", "-o", help="JSON file for the result.")]
Prompt = Annotated[str | None, _option("--prompt", help="Text to answer or go on from.")]
PromptFile = Annotated[Path | None, _option("--prompt-file", help="UTF-8 file with the prompt.")]
ChatTemplate = Annotated[
    bool,
    _option(
        "--chat-template/--no-chat-template",
        help="Wrap the prompt as the chat model expects, where the tokenizer has a template.",
    ),
]
DoSample = Annotated[
    bool, _option("--do-sample", help="Sample with the model's settings; else greedy decoding.")
]
Engine = Annotated[
    str | None,
    _option("--engine", help=f"How blocks are skipped: {', '.join(ENGINES)} (CUDA graphs). Default: auto."),
]
Check = Annotated[bool, _option("--check", help="Build a tiny model of each family and prove its blocks.")]
Json = Annotated[bool, _option("--json", help="Print one JSON document on stdout, all else on stderr.")]
Debug = Annotated[bool, _option("--debug", help="Show the traceback of an error.")]
Version = Annotated[bool, _option("--version", help="Print the version and exit.", is_eager=True)]

FitWindows = Annotated[
    int | None, _option("--prompts", help="Windows of text per corpus. Default: 28; 12 of the embedded text.")
]
FitTokens = Annotated[int | None, _option("--prompt-tokens", help="Tokens of a window. Default: 512.")]
FitBatch = Annotated[int | None, _option("--batch-size", help="Windows run together. Default: 4.")]
SurrogateBudget = Annotated[
    float | None,
    _option("--surrogate-budget", help="A surrogate's bytes as a share of its FFN's. Default: 0.05."),
]
Rank = Annotated[int | None, _option("--rank", help="Rank of the surrogates, instead of a budget.")]
Sweeps = Annotated[
    int | None, _option("--sweeps", help="Sweeps with skipping on, after one without. Default: 1.")
]
DamageKind = Annotated[
    str | None,
    _option("--damage", help="fisher (default; one backward pass) or relative-error (none)."),
]
DamageWindows = Annotated[
    int | None, _option("--damage-prompts", help="Windows per corpus to measure damage on. Default: 8.")
]
LoopWindows = Annotated[
    int | None,
    _option("--closed-loop-prompts", help="Windows per corpus to measure skip ratios on. Default: 10."),
]

MaxKl = Annotated[
    float | None, _option("--max-kl", help="Budget: KL to the full model, nats per decoded token.")
]
MaxPerplexityIncrease = Annotated[
    float | None,
    _option("--max-perplexity-increase", help="Budget: perplexity over the full model's, less 1."),
]
MinSpeedup = Annotated[
    float | None, _option("--min-speedup", help="Least speed-up, if time were bytes read at batch 1.")
]
Rules = Annotated[
    str | None,
    _option("--rules", help="Of gate, cosine, static, static+surrogates, by commas. Default: all there are."),
]
MaxSkipsTried = Annotated[
    list[int] | None,
    _option("--max-skips", help="Bounds of the rule cosine, besides its own; repeatable. Default: 3."),
]
WarmUpsTried = Annotated[
    list[int] | None,
    _option("--warm-up-tokens", help="Warm-ups to try; repeatable. Default: the profile's."),
]
TuneWindows = Annotated[int | None, _option("--prompts", help="Windows of text per corpus. Default: 6.")]
TuneBatch = Annotated[int | None, _option("--batch-size", help="Windows run together. Default: 2.")]
TuneSeed = Annotated[
    int | None, _option("--seed", help="Draws windows, random skips and bootstraps. Default: 1.")
]
TunedOutput = Annotated[str | None, _option("--output", "-o", help="Default: profiles/<model>-tuned.json.")]
TuneFigure = Annotated[
    str | None, _option("--figure", help="Draw divergence against skip ratio there (.png, .svg, .pdf).")
]


def loading(
    model: Model = None,
    revision: Revision = None,
    adapter: Adapter = None,
    dtype: Dtype = None,
    quantization: Quantization = None,
    device: Device = None,
    device_map: DeviceMap = None,
    max_memory: MaxMemory = None,
    offload_folder: OffloadFolder = None,
    attn_implementation: AttnImplementation = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Which model, and how it is loaded."""


def scoring(
    corpus: Corpus = None,
    data_files: TaskFiles = None,
    text_column: TextColumn = None,
    items: Items = None,
    window_tokens: WindowTokens = None,
    new_tokens: NewTokens = None,
    warm_up_tokens: WarmUpTokens = None,
    match_items: MatchItems = None,
    batch_size: BatchSize = None,
    chat_template: ChatTemplate = True,
    seed: Seed = None,
    judge_model: JudgeModel = None,
    judge_base_url: JudgeUrl = None,
    judge_prompts: JudgePrompts = None,
) -> None:
    """What a method is measured on, and how."""


def takes(*groups: Callable[..., None]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of `groups` for its `**shared`; their values are in its context."""
    shared = [p for group in groups for p in inspect.signature(group, eval_str=True).parameters.values()]

    def with_shared(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True)
        kept = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        command.__signature__ = own.replace(parameters=kept + shared)  # type: ignore[attr-defined]
        return command

    return with_shared
