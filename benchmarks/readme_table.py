"""Tables of docs/, made from results/.

python benchmarks/readme_table.py            write them
python benchmarks/readme_table.py --check    only say whether they are up to date

A table stands between <!-- KIND: NAME --> and <!-- end KIND -->; see `updated` for the kinds.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from common import RESULTS

from skipcal.speed.files import load_result
from skipcal.speed.table import to_markdown

ROOT = Path(__file__).parents[1]
NAMES = ("speed", "gate", "gpu", "three-models", "fixed-sets", "large-runs")
PAGES = [ROOT / "docs" / f"{name}.md" for name in NAMES]
BLOCK = re.compile(r"(<!-- (?P<kind>[a-z]+): (?P<name>[\w.-]+) -->\n).*?(<!-- end (?P=kind) -->)", re.S)
# Others are called as their results up to the last underscore.
SCRIPTS = {
    "equal_ratios": "three_models.py",
    "calibration_time": "calibration_time.py",
    "fit_cost": "fit_cost.py",
    "ops_sm90": "ops_sm90.py",
    "gpu_decode": "gpu_visit measure",
}

MODELS = {"smollm2": "SmolLM2", "qwen": "Qwen2.5-Coder", "gemma": "Gemma 3"}
# Measures of answers by task, as a page names them.
ANSWERS = {
    "continuation": ("continuation", {"token_agreement": "equal tokens", "collapse_rate": "collapsed"}),
    "freebaseqa": ("FreebaseQA", {"token_agreement": "equal tokens", "contains_answer": "contains an alias"}),
    "summarization": ("CNN/DailyMail", {"rougeL": "ROUGE-L"}),
}


def updated(text: str, results: Path) -> str:
    """The text with every block made anew. A result that is not there yet is said to be missing."""

    def table(block: re.Match[str]) -> str:
        kind, name = block["kind"], block["name"]
        path = results / (f"{name}/results.csv" if kind in OF_SWEEPS else f"{name}.json")
        if kind == "answers":
            of_models = {model: _rows(results / f"{key}_{name}") for key, model in MODELS.items()}
            body = answer_table({model: rows for model, rows in of_models.items() if rows})
        elif not path.exists():
            stem = name.rpartition("_")[0]
            script = SCRIPTS.get(name) or SCRIPTS.get(stem) or f"{stem}.py"
            body = f"Not measured yet: `python benchmarks/{script}`."
        elif kind == "speed":
            body = to_markdown(load_result(path))
        elif kind in OF_SWEEPS:
            body = OF_SWEEPS[kind](_rows(path.parent))
        else:
            body = OF_RESULTS[kind](json.loads(path.read_text(encoding="utf-8")))
        return f"{block[1]}\n{body}\n\n{block[4]}"

    return BLOCK.sub(table, text)


def fit_table(result: dict[str, Any]) -> str:
    """Memory by windows, and the arithmetic of a fit, in words and a table."""
    memory, rates, fitted = result["memory"], result["rates"], result["fit_of_smollm2"]
    text, env = result["calibration"], result["environment"]
    peaks = ", ".join(f"{row['peak_bytes'] / 1e6:,.0f} MB with {row['tokens']:,} tokens" for row in memory)
    lines = [
        f"Measured ({env['cpu']}): a fit of SmolLM2 to {fitted['tokens']:,} tokens ({fitted['how']}) took "
        f"{fitted['seconds']:,.0f} s and {fitted['peak_memory_bytes'] / 1e9:.1f} GB at its peak. "
        f"Damage and two sweeps of a small model: {peaks}.",
        "",
        f"Computed, for {text['windows']} windows of {text['window_tokens']} tokens, batches of 4 and the "
        "defaults otherwise:",
        "",
        "| shape | rank | memory | of it weights | for the damage | operations, float32 | float64 "
        "| time at this machine's rates | disk | surrogates |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for cost in result["computed"]:
        held = cost["bytes"]
        lines.append(
            f"| {cost['shape']} | {cost['rank']} | {cost['bytes_total'] / 1e9:.1f} GB | "
            f"{held['weights'] / 1e9:.1f} GB | {held['damage'] / 1e9:.1f} GB | "
            f"{cost['float32_flop']:.1e} | {cost['float64_flop']:.1e} | "
            f"{_duration(cost['seconds_on_this_machine'])} | {cost['disk_bytes'] / 1e9:.1f} GB | "
            f"{cost['surrogate_bytes'] / 1e9:.2f} GB |"
        )
    return "\n".join(
        [
            *lines,
            "",
            f"The rates: {rates['float32_flop_per_s'] / 1e9:,.0f} GFLOP/s in float32, "
            f"{rates['float64_flop_per_s'] / 1e9:,.0f} in float64, an eigendecomposition of 1024 x 1024 in "
            f"{rates['eigh_1024_s']:.2f} s. Reading and writing disk, and all that is no matrix product, "
            "comes on top.",
        ]
    )


def kernel_table(result: dict[str, Any]) -> str:
    """Launches at the shape of Llama-2 7B."""
    lines = [
        f"Compiled by Triton {result['environment']['triton']} for {result['target']}, in bfloat16, at the "
        "shape of Llama-2 7B:",
        "",
        "| launch | kernel | programs | registers | spilt bytes | shared KiB | 16-byte loads | blocks an SM "
        "| waves | KiB on the way to an SM |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for launch in result["launches"]:
        if launch["case"].startswith("7B, "):
            lines.append(
                f"| {launch['case'].removeprefix('7B, ')} | `{launch['kernel']}` | {launch['programs']:,} | "
                f"{launch['registers']} | {launch['spill_bytes']} | {launch['shared_bytes'] / 1024:.0f} | "
                f"{launch['wide_loads']} | {launch['resident']} | {launch['waves']:.2f} | "
                f"{launch['in_flight_bytes'] / 1024:.0f} |"
            )
    return "\n".join(lines)


def calibration_table(result: dict[str, Any]) -> str:
    """Seconds of a profile and a fit, beside those before, and what comes out at a ratio of 0.25."""
    lines = [
        "| | seconds | of the time before | region | threshold for 0.25 | realised |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for command in ("profile", "fit"):
        found = result[command]
        for arm in sorted(found["seconds"], key=lambda name: (name != "before", name)):
            seconds = found["seconds"][arm]
            ratio, said = found["of_before"][arm], found["recommended"][arm]
            point = next(p for p in said["points"] if p["target_skip_ratio"] == 0.25)
            realised = point["realised_skip_ratio"]  # None without a closed loop
            region = said.get("region")
            cells = [
                f"`{command}`, {arm}",
                f"{statistics.median(seconds):.0f}",
                f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})",
                f"[{region[0]}, {region[1]})" if region else "",
                f"{point['threshold']:.5f}",
                "" if realised is None else f"{realised:.3f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def ratio_table(rows: list[dict[str, str]], *, apart: bool = False) -> str:
    """What each method loses at each ratio asked for, with the interval and the ratio that was realised.

    apart: by warm-up, and with the loss on each corpus.
    """
    losses = {
        (row["method"], row["warm_up_tokens"], float(row["target_skip_ratio"]), row["subset"]): row
        for row in rows
        if row["metric"] == "excess_nll" and row["method"] != "full"
    }
    targets = sorted({target for _, _, target, _ in losses})
    heads = ["method", *(["warm-up"] if apart else []), *(f"{target:.2f}" for target in targets)]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for arm in dict.fromkeys(key[:2] for key in losses):
        cells = [f"`{arm[0]}`", *(arm[1:] if apart else ())]
        for target in targets:
            row = losses[*arm, target, "all"]
            value, low, high = (float(row[name]) for name in ("value", "ci_low", "ci_high"))
            each = [float(losses[*arm, target, corpus]["value"]) for corpus in ("wikitext", "c4") if apart]
            by_corpus = f", {' / '.join(f'{loss:.3f}' for loss in each)}" if apart else ""
            realised = float(row["realised_skip_ratio"])
            cells.append(f"{value:.3f} ({low:.3f} to {high:.3f}){by_corpus} at {realised:.3f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def answer_table(results: dict[str, list[dict[str, str]]]) -> str:
    """What answers of a method lose by model: the full model's value, the method's, and their difference."""
    lines = [f"| | {' | '.join(results)} |", f"| --- |{' --- |' * len(results)}"]
    of = {
        (model, row["method"] == "full", row["task"], row["metric"]): row
        for model, rows in results.items()
        for row in rows
        if row["subset"] == "all"
    }
    for task, (title, measures) in ANSWERS.items():
        first = next(iter(measures))
        found = [of.get((model, False, task, first)) for model in results]
        cells = [f"{float(row['realised_skip_ratio']):.3f} ({row['n']})" if row else "-" for row in found]
        lines.append(f"| **{title}**: realised (items) | {' | '.join(cells)} |")
        for metric, measure in measures.items():
            cells = []
            for model in results:
                row = of.get((model, False, task, metric))
                cells.append(_beside(of[model, True, task, metric], row) if row else "-")
            lines.append(f"| {measure} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _beside(full: dict[str, str], skipping: dict[str, str]) -> str:
    if skipping["metric"] == "token_agreement":  # the full model's is 1
        low, high = float(skipping["ci_low"]), float(skipping["ci_high"])
        return f"{float(skipping['value']):.2f} ({low:.2f} to {high:.2f})"
    difference, low, high = (float(skipping[f"difference{end}"]) for end in ("", "_ci_low", "_ci_high"))
    values = f"{float(full['value']):.3f}, {float(skipping['value']):.3f}"
    return f"{values}: {difference:+.3f} ({low:+.3f} to {high:+.3f})"


def _rows(folder: Path) -> list[dict[str, str]]:
    """The table of a sweep; empty where it was not run."""
    path = folder / "results.csv"
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


OF_RESULTS = {"fit": fit_table, "kernels": kernel_table, "calibration": calibration_table}
OF_SWEEPS: dict[str, Callable[[list[dict[str, str]]], str]] = {
    "ratios": ratio_table,
    "sets": partial(ratio_table, apart=True),
}


def _duration(seconds: float) -> str:
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if something is old")
    parser.add_argument("--page", type=Path, action="append", help="default: all in docs/ that have tables")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    for page in options.page or PAGES:
        old = page.read_text(encoding="utf-8")
        new = updated(old, options.results)
        if options.check and new != old:
            sys.exit(f"{page.name} is not up to date; run python benchmarks/readme_table.py")
        if new != old:
            page.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
