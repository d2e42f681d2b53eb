"""Tables of what skipping costs, from the results.csv of a sweep."""

from __future__ import annotations

import pandas as pd

from skipcal.profiles.markdown import table

# What the table of the methods compares: its name there, task, subset, metric and decimals.
_COMPARED = (
    ("perplexity", "perplexity", "all", "perplexity", 1),
    ("KL, nats/token", "perplexity", "all", "kl", 2),
    ("FreebaseQA, contains an alias", "freebaseqa", "all", "contains_answer", 3),
    ("ROUGE-L, small", "summarization", "small", "rougeL", 3),
    ("ROUGE-L, medium", "summarization", "medium", "rougeL", 3),
    ("ROUGE-L, large", "summarization", "large", "rougeL", 3),
    ("collapsed summaries", "summarization", "all", "collapse_rate", 2),
)
_METHODS = ("full", "ffn-skip", "random", "no-input-adaptive", "static", "shortgpt", "skipdecode")
_BEST_FIRST = ("gate", "static+surrogates", "static", "random", "ffn-skip")


def comparison_table(frame: pd.DataFrame) -> str:
    """Every method by metric and by the skip ratio asked for."""
    rows = []
    for label, task, subset, metric, decimals in _COMPARED:
        of = frame[(frame["task"] == task) & (frame["subset"] == subset) & (frame["metric"] == metric)]
        values = of.fillna({"target_skip_ratio": 0.0}).set_index(["method", "target_skip_ratio"])["value"]
        for ratio in sorted(of["target_skip_ratio"].dropna().unique()):
            cells = [values["full", 0.0], *(values[method, ratio] for method in _METHODS[1:])]
            rows.append([label, f"{ratio:.2f}", *(_number(value, decimals) for value in cells)])
    return table(["metric", "asked for", *_METHODS], rows)


def excess_table(frame: pd.DataFrame) -> str:
    """Loss over the full model's past the warm-up: over all text, and by corpus at its own ratio."""
    rows = []
    for ratio in sorted(frame["target_skip_ratio"].dropna().unique()):
        for method in _BEST_FIRST:
            at = frame[(frame["method"] == method) & (frame["target_skip_ratio"] == ratio)]
            cells = at.set_index(["subset", "metric"])
            excess = cells.loc[("all", "excess_nll")]
            decimals = 3 if excess["value"] < 0.2 else 2
            low, high = (_number(excess[name], decimals) for name in ("ci_low", "ci_high"))
            rows.append(
                [
                    f"`{method}`",
                    f"{ratio:.2f}",
                    f"{excess['realised_skip_ratio']:.3f}",
                    _three_digits(cells.loc[("all", "perplexity"), "value"]),
                    f"{_number(excess['value'], decimals)} ({low} to {high})",
                    *(_at(cells.loc[(corpus, "excess_nll")]) for corpus in ("wikitext", "c4")),
                ]
            )
    full = frame[(frame["method"] == "full") & (frame["subset"] == "all") & (frame["metric"] == "perplexity")]
    perplexity = f"perplexity (full model: {full['value'].item():.1f})"
    head = ["method", "asked for", "realised", perplexity, "excess loss, nats/token", "WikiText-2", "C4"]
    return table(head, rows)


def _at(row: pd.Series) -> str:
    return f"{_number(row['value'], 3 if row['value'] < 0.2 else 2)} at {row['realised_skip_ratio']:.3f}"


def _number(value: float, decimals: int) -> str:
    """With these decimals, but none from 100 on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.{decimals}f}"


def _three_digits(value: float) -> str:
    return _number(float(f"{value:.3g}"), 1)
