"""Options of `skipcal profile`, `fit`, `tune` and `compare` alone."""

from __future__ import annotations

from typing import Annotated

from skipcal.commands import completion
from skipcal.commands.help import MODEL, OUTPUT, TEXT
from skipcal.commands.options import EMBEDDED, MODEL_FORMS, option

# profile

Model = Annotated[
    str | None,
    option("--model", metavar="NAME", section=MODEL, help=f"{MODEL_FORMS} Default: {EMBEDDED}."),
]
Mode = Annotated[
    str | None,
    option(
        "--mode",
        metavar="MODE",
        section=TEXT,
        help="generate (default): measure generated tokens. prefill: the text.",
        complete=completion.one_of("generate", "prefill"),
    ),
]
ChatPrompts = Annotated[
    bool,
    option("--chat-template", section=TEXT, help="Prompts are messages in the model's chat template."),
]
MaxSkips = Annotated[
    int | None,
    option("--max-skips", metavar="K", help="At most so many FFNs skipped per token. Default: all."),
]
ColdS = Annotated[
    int | None,
    option("--cold-s", metavar="LAYER", help="First skippable layer, instead of the fitted one."),
]
ColdE = Annotated[int | None, option("--cold-e", metavar="LAYER", help="Layer after the last skippable one.")]
ClosedLoop = Annotated[
    str | None,
    option(
        "--closed-loop",
        metavar="HOW",
        help="Tune thresholds on calibration text (teacher-forced, default) or by decoding (decode).",
        complete=completion.one_of("teacher-forced", "decode"),
    ),
]
ByDamage = Annotated[
    bool,
    option("--by-damage", help="Also find the method ffn-skip+damage: measure what each FFN alone loses."),
]
Verify = Annotated[
    bool, option("--verify", help="Decode held-out prompts with skipping, record their ratio.")
]
Trace = Annotated[
    str | None,
    option("--trace", metavar="FILE", section=OUTPUT, help="Parquet file for all cosines, token by token."),
]

# fit

FitWindows = Annotated[
    int | None,
    option(
        "--prompts",
        metavar="N",
        section=TEXT,
        help="Windows of text per corpus. Default: 28; 12 of the embedded text.",
    ),
]
WindowTokens = Annotated[
    int | None,
    option("--prompt-tokens", metavar="N", section=TEXT, help="Tokens of a window. Default: 512."),
]
FitBatch = Annotated[
    int | None, option("--batch-size", metavar="N", section=TEXT, help="Windows run together. Default: 4.")
]
FitRatio = Annotated[
    float | None,
    option("--target-skip-ratio", metavar="R", help="Fraction of all FFN blocks to skip. Default: 0.25."),
]
SurrogateBudget = Annotated[
    float | None,
    option(
        "--surrogate-budget",
        metavar="SHARE",
        help="A surrogate's bytes as a share of its FFN's. Default: 0.05.",
    ),
]
Rank = Annotated[
    int | None, option("--rank", metavar="N", help="Rank of the surrogates, instead of a budget.")
]
Maps = Annotated[
    int | None,
    option(
        "--maps",
        metavar="N",
        help="Maps of a surrogate, of which a token reads one. Default: 8, or 1 of a set.",
    ),
]
Sweeps = Annotated[
    int | None,
    option("--sweeps", metavar="N", help="Sweeps with skipping on, after one without. Default: 2."),
]
FitMethod = Annotated[
    str | None,
    option(
        "--method",
        metavar="METHOD",
        help="gate (default; decides for each token) or static (fixed sets, all tokens skip the same).",
        complete=completion.one_of("gate", "static"),
    ),
]
DamageKind = Annotated[
    str | None,
    option(
        "--damage",
        metavar="KIND",
        help="fisher (default; one backward pass) or relative-error (none).",
        complete=completion.one_of("fisher", "relative-error"),
    ),
]
DamageWindows = Annotated[
    int | None,
    option(
        "--damage-prompts",
        metavar="N",
        section=TEXT,
        help="Windows per corpus to measure damage on. Default: 8.",
    ),
]
LoopWindows = Annotated[
    int | None,
    option(
        "--closed-loop-prompts",
        metavar="N",
        section=TEXT,
        help="Windows per corpus to measure skip ratios on. Default: 10; 4 of the embedded text.",
    ),
]
GateOutput = Annotated[
    str | None,
    option(
        "--output",
        "-o",
        metavar="FILE",
        section=OUTPUT,
        help="Default: profiles/<model>-gate.json, or -static.json.",
    ),
]

# tune

MaxKl = Annotated[
    float | None,
    option("--max-kl", metavar="NATS", help="Budget: KL to the full model, nats per decoded token."),
]
MaxPerplexityIncrease = Annotated[
    float | None,
    option(
        "--max-perplexity-increase",
        metavar="X",
        help="Budget: perplexity over the full model's, less 1.",
    ),
]
MinSpeedup = Annotated[
    float | None,
    option("--min-speedup", metavar="X", help="Least speed-up, if time were bytes read."),
]
Requests = Annotated[
    int | None,
    option(
        "--requests",
        metavar="N",
        help="Requests decoded together: weights stay unread where all skip. Default: 1.",
    ),
]
Rules = Annotated[
    str | None,
    option(
        "--rules",
        metavar="RULE,...",
        help="Of gate, cosine, static, static+surrogates, static+fitted. Default: all there are.",
        complete=completion.listed(completion.rules),
    ),
]
MaxSkipsTried = Annotated[
    list[int] | None,
    option(
        "--max-skips",
        metavar="K",
        help="Bounds of the rule cosine, besides its own; repeatable. Default: 3.",
    ),
]
WarmUpsTried = Annotated[
    list[int] | None,
    option("--warm-up-tokens", metavar="N", help="Warm-ups to try; repeatable. Default: the profile's."),
]
TuneWindows = Annotated[
    int | None,
    option("--prompts", metavar="N", section=TEXT, help="Windows of text per corpus. Default: 6."),
]
TuneBatch = Annotated[
    int | None, option("--batch-size", metavar="N", section=TEXT, help="Windows run together. Default: 2.")
]
TuneSeed = Annotated[
    int | None,
    option("--seed", metavar="N", help="Draws windows, random skips and bootstraps. Default: 1."),
]
TunedOutput = Annotated[
    str | None,
    option("--output", "-o", metavar="FILE", section=OUTPUT, help="Default: profiles/<model>-tuned.json."),
]
TuneFigure = Annotated[
    str | None,
    option(
        "--figure",
        metavar="FILE",
        section=OUTPUT,
        help="Draw divergence against skip ratio there (.png, .svg, .pdf).",
    ),
]

# compare

CompareRatio = Annotated[
    float | None,
    option(
        "--target-skip-ratio",
        metavar="R",
        help="Fraction of all FFN blocks to skip; 0: the full model. Default: 0.25.",
    ),
]
ComparePrompts = Annotated[
    int | None, option("--prompts", metavar="N", section=TEXT, help="Prompts per corpus. Default: 8.")
]
TextTokens = Annotated[
    int | None,
    option(
        "--text-tokens",
        metavar="N",
        section=TEXT,
        help="Tokens of a text a profile is tried on. Default: 256.",
    ),
]
CompareBatch = Annotated[
    int | None, option("--batch-size", metavar="N", section=TEXT, help="Prompts run together. Default: 8.")
]
