"""Options of `skipcal bench` alone."""

from __future__ import annotations

from typing import Annotated

from skipcal.commands import completion
from skipcal.commands.help import MODEL
from skipcal.commands.options import option

Shape = Annotated[
    str | None,
    option(
        "--shape",
        metavar="SHAPE",
        section=MODEL,
        help="Random weights in the shape of llama-2-7b, llama-2-13b, mistral-7b, tiny, ...",
        complete=completion.shapes,
    ),
]
GateProfile = Annotated[
    str | None,
    option(
        "--profile",
        metavar="PROFILE",
        help="Time this profile's gate and surrogates. Default: the rule cosine.",
        complete=completion.profiles,
    ),
]
TimedRule = Annotated[
    str | None,
    option(
        "--rule",
        metavar="RULE",
        help="cosine, or gate: a profile's, or random ones of a shape. Default: cosine.",
        complete=completion.one_of("cosine", "gate"),
    ),
]
ForcedRatios = Annotated[
    str | None,
    option(
        "--ratios",
        metavar="R,...",
        help="Skip ratios to force, separated by commas. Default: 0.05,0.1,0.25,0.5.",
    ),
]
BatchSizes = Annotated[
    list[int] | None,
    option("--batch-size", metavar="N", help="Rows decoded together; repeatable. Default: 1."),
]
ContextTokens = Annotated[
    list[int] | None,
    option(
        "--context-tokens", metavar="N", help="Tokens in the cache at the start; repeatable. Default: 128."
    ),
]
TimedTokens = Annotated[
    int | None, option("--new-tokens", metavar="N", help="Tokens decoded in each round. Default: 32.")
]
Rounds = Annotated[
    int | None, option("--rounds", metavar="N", help="Counted rounds of every arm. Default: 5.")
]
BenchSeed = Annotated[
    int | None, option("--seed", metavar="N", help="Draws prompts and random weights. Default: 0.")
]
Peers = Annotated[
    bool, option("--peers", help="Also the full model with a static cache, compiled (on a GPU).")
]
