"""Options of `skipcal evaluate` and `skipcal sweep` alone."""

from __future__ import annotations

from typing import Annotated

from skipcal.commands import completion
from skipcal.commands import options as opt
from skipcal.commands.help import JUDGE, LM_EVAL, MODEL, TEXT
from skipcal.commands.options import option
from skipcal.configs.names import ENGINES, METHODS, VLLM_ENGINE

Task = Annotated[
    list[str] | None,
    option(
        "--task",
        metavar="TASK",
        help="perplexity, continuation, freebaseqa, summarization or mtbench; repeatable.",
        complete=completion.tasks,
    ),
]
Tasks = Annotated[
    str | None,
    option(
        "--tasks",
        metavar="TASK,...",
        help="Tasks, separated by commas.",
        complete=completion.listed(completion.tasks),
    ),
]
Method = Annotated[
    list[str] | None,
    option(
        "--method",
        metavar="METHOD",
        help="ffn-skip (default), gate, random, no-input-adaptive, static, shortgpt, skipdecode, full; "
        "also ffn-skip+surrogates, random+surrogates, ...; repeatable.",
        complete=completion.one_of(*METHODS),
    ),
]
Methods = Annotated[
    str | None,
    option(
        "--methods",
        metavar="METHOD,...",
        help="Methods, separated by commas; see evaluate. Default: ffn-skip.",
        complete=completion.listed(completion.one_of(*METHODS)),
    ),
]
MethodRatio = Annotated[
    float | None,
    option(
        "--target-skip-ratio",
        metavar="R",
        help="Fraction of all FFN blocks to skip. Default: what the profile recommends.",
    ),
]
Ratios = Annotated[
    str | None,
    option(
        "--ratios",
        metavar="R,...",
        help="Target skip ratios, separated by commas. Default: what the profile recommends.",
    ),
]
TaskFiles = Annotated[
    list[str] | None,
    option(
        "--data-files",
        metavar="[NAME=]FILE",
        section=TEXT,
        help="TASK=FILE for a task's items, [NAME=]FILE for text; repeatable.",
    ),
]
Items = Annotated[
    int | None,
    option(
        "--items",
        metavar="N",
        section=TEXT,
        help="Items per task (per corpus or bucket, where there are some).",
    ),
]
WindowTokens = Annotated[
    int | None,
    option(
        "--window-tokens", metavar="N", section=TEXT, help="Tokens of a window of perplexity. Default: 512."
    ),
]
AnswerTokens = Annotated[
    int | None,
    option(
        "--new-tokens",
        metavar="N",
        section=TEXT,
        help="Tokens generated after each prompt. Default: 128; freebaseqa 32, mtbench 512.",
    ),
]
TaskWarmUp = Annotated[
    int | None,
    option(
        "--warm-up-tokens",
        metavar="N",
        help="First tokens decoded by the full model. Default: the profile's; freebaseqa 2.",
    ),
]
MatchItems = Annotated[
    int | None,
    option(
        "--match-items",
        metavar="N",
        help="Tune thresholds (ffn-skip, gate) on so many items until they realise the target. Default: 0.",
    ),
]
Host = Annotated[
    str | None,
    option(
        "--engine",
        metavar="NAME",
        section=MODEL,
        help=f"How answers are decoded: {', '.join(ENGINES)}, or vllm, many at a time. Default: auto.",
        complete=completion.one_of(*ENGINES, VLLM_ENGINE),
    ),
]
JudgeModel = Annotated[
    str | None, option("--judge-model", metavar="NAME", section=JUDGE, help="Model that rates answers.")
]
JudgeUrl = Annotated[
    str | None,
    option(
        "--judge-base-url",
        metavar="URL",
        section=JUDGE,
        help="OpenAI-compatible endpoint, e.g. http://localhost:8000/v1.",
    ),
]
JudgePrompts = Annotated[
    str | None,
    option(
        "--judge-prompts",
        metavar="FILE",
        section=JUDGE,
        help="FastChat's judge_prompts.jsonl. Default: skipcal's own.",
    ),
]
LmEvalTasks = Annotated[
    str | None,
    option(
        "--lm-eval-tasks", metavar="NAME,...", section=LM_EVAL, help="Tasks of lm-eval, separated by commas."
    ),
]
Limit = Annotated[
    int | None, option("--limit", metavar="N", section=LM_EVAL, help="Samples of each lm-eval task.")
]


def scoring(
    corpus: opt.Corpus = None,
    data_files: TaskFiles = None,
    text_column: opt.TextColumn = None,
    items: Items = None,
    window_tokens: WindowTokens = None,
    new_tokens: AnswerTokens = None,
    warm_up_tokens: TaskWarmUp = None,
    match_items: MatchItems = None,
    batch_size: opt.BatchSize = None,
    chat_template: opt.ChatTemplate = True,
    engine: Host = None,
    seed: opt.Seed = None,
    judge_model: JudgeModel = None,
    judge_base_url: JudgeUrl = None,
    judge_prompts: JudgePrompts = None,
) -> None:
    """What a method is measured on, and how."""
