"""What a sweep leaves in its folder: the tidy table, the paper's tables, figures, and its settings."""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers

from skipcal.arch.loading import LoadedModel
from skipcal.arch.locate import input_device
from skipcal.configs.sweep import SweepConfig
from skipcal.errors import OutputExists
from skipcal.evaluation.sweep import SweepResult
from skipcal.files.markdown import table
from skipcal.files.writing import check_output, dump_json, remove_output, write_atomic, write_text_atomic
from skipcal.plots.sweep import FIGURES, main_metrics, save_sweep_figures
from skipcal.profiles.schema import SkipProfile
from skipcal.text.corpora import file_sha256
from skipcal.text.opening import opening_names
from skipcal.version import __version__

SWEEP_FORMAT = "skipcal.sweep/1"
SETTINGS = "sweep.json"
TABLES = ("results.csv", "results.parquet", "tables.md")


def sweep_settings(config: SweepConfig, profile: SkipProfile) -> dict[str, Any]:
    """What decides a sweep's results: its settings, and the contents of the files they name."""
    files = [entry for task in config.tasks.model_dump().values() if task for entry in _files(task)]
    return {
        "format": SWEEP_FORMAT,
        "config": config.recorded(),
        "profile_sha256": hashlib.sha256(profile.to_json().encode()).hexdigest(),
        "data_sha256": {Path(file).name: file_sha256(Path(file)) for file in files},
    }


def _files(task: dict[str, Any]) -> Iterator[str]:
    for name in ("data_file", "reference_file"):
        if task.get(name):
            yield task[name]
    for entry in task.get("data_files", []):
        yield entry if Path(entry).exists() else entry.partition("=")[2] or entry


def check_folder(folder: Path, settings: dict[str, Any], *, overwrite: bool) -> bool:
    """Whether a sweep of these settings was begun in the folder. Raises OutputExists for one of others."""
    path = folder / SETTINGS
    check_output(path, overwrite=True)
    if overwrite or not path.exists():
        return False
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = {}
    if not isinstance(found, dict) or any(found.get(key) != value for key, value in settings.items()):
        raise OutputExists(
            f"{folder} holds results of other settings; pass --overwrite to replace them (records are "
            "kept), or name another folder"
        )
    return True


def begin_folder(folder: Path, settings: dict[str, Any], *, overwrite: bool) -> None:
    """Write sweep.json before anything runs: from then on the folder belongs to these settings.

    The same settings go on from what is there: records are never made twice, tables are drawn again.
    Raises as `check_folder` does.
    """
    if check_folder(folder, settings, overwrite=overwrite):
        return
    for name in (*TABLES, *FIGURES):
        remove_output(folder / name)
    write_text_atomic(folder / SETTINGS, dump_json(settings), overwrite=True)


def write_results(
    result: SweepResult, loaded: LoadedModel, settings: dict[str, Any], *, command: str
) -> list[Path]:
    """Write results.csv and .parquet, tables.md, sweep.json and the figures; returns the files."""
    folder, frame = result.folder, result.frame
    document = {**settings, "command": command, "environment": environment(loaded)}
    written = [folder / name for name in (*TABLES, SETTINGS)]
    write_atomic(written[0], lambda path: frame.to_csv(path, index=False), overwrite=True)
    write_atomic(written[1], lambda path: frame.to_parquet(path, index=False), overwrite=True)
    write_text_atomic(written[2], tables(frame), overwrite=True)
    write_text_atomic(written[3], dump_json(document), overwrite=True)
    return written + save_sweep_figures(frame, folder, overwrite=True)


def environment(loaded: LoadedModel) -> dict[str, Any]:
    """Model, the special tokens its texts began with, hardware and versions."""
    model = loaded.described()
    device = input_device(loaded.model)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "model": model.pop("name"),
        **model,
        "opening": opening_names(loaded.tokenizer),
        "device": f"{device.type} ({name})",
        "python": platform.python_version(),
        "skipcal": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def tables(frame: pd.DataFrame) -> str:
    """The results as Markdown, in the forms of the paper's tables 2 and 3, apart for each warm-up."""
    parts = [
        "Value, with its 95 % bootstrap interval over items in brackets. Ratios are of all blocks per token: "
        "FFNs after the warm-up; for shortgpt and skipdecode, which have no warm-up, layers over all steps.",
    ]
    lengths = [sorted(rows["warm_up_tokens"].unique()) for _, rows in frame.groupby("task")]
    ablation = sorted({w for each in lengths if len(each) > 1 for w in each})
    if not ablation:
        return "\n\n".join([*parts, *_tables(frame, "")]) + "\n"
    for warm_up in ablation:
        at = frame[frame["warm_up_tokens"] == warm_up]
        parts += _tables(at, f", warm-up of {warm_up} tokens")
    return "\n\n".join(parts) + "\n"


def _tables(frame: pd.DataFrame, suffix: str) -> Iterator[str]:
    ratios = sorted(frame["target_skip_ratio"].dropna().unique())
    if not ratios:
        yield f"## The full model{suffix}\n\n{at_ratio(frame, math.nan)}"
    for ratio in ratios:
        title = f"## Methods at {ratio:g}{suffix} (the form of the paper's table 2)"
        yield f"{title}\n\n{at_ratio(frame, ratio)}"
    for task, metric in main_metrics(frame) if len(ratios) > 1 else []:
        title = f"## {_title(task, metric)} by skip ratio{suffix} (the form of the paper's table 3)"
        yield f"{title}\n\n{by_ratio(frame, task, metric)}"


def at_ratio(frame: pd.DataFrame, ratio: float) -> str:
    """Methods by main metrics, at one target ratio."""
    rows = frame[(frame["target_skip_ratio"] == ratio) | (frame["method"] == "full")]
    metrics = main_metrics(frame)
    head = ["method", "realised", "of bytes", *(_title(task, metric) for task, metric in metrics)]
    lines = []
    for method in dict.fromkeys(rows["method"]):
        mine = rows[(rows["method"] == method) & (rows["subset"] == "all")]
        cells = [_one(mine, task, metric) for task, metric in metrics]
        lines.append([method, _span(mine["realised_skip_ratio"]), _span(mine["skip_ratio_bytes"]), *cells])
    return table(head, lines)


def by_ratio(frame: pd.DataFrame, task: str, metric: str) -> str:
    """Target ratios by methods, of one metric of one task."""
    rows = frame[(frame["task"] == task) & (frame["metric"] == metric) & (frame["subset"] == "all")]
    methods = [m for m in dict.fromkeys(rows["method"]) if m != "full"]
    head, lines = ["skip ratio", "full", *methods], []
    full = _one(rows[rows["method"] == "full"], task, metric)
    for ratio in sorted(rows["target_skip_ratio"].dropna().unique()):
        at = rows[rows["target_skip_ratio"] == ratio]
        lines.append([f"{ratio:g}", full, *(_one(at[at["method"] == m], task, metric) for m in methods)])
    return table(head, lines)


def _title(task: str, metric: str) -> str:
    return metric if task == metric else f"{task}: {metric}"


def _one(rows: pd.DataFrame, task: str, metric: str) -> str:
    found = rows[(rows["task"] == task) & (rows["metric"] == metric)]
    if found.empty:
        return "-"
    row = found.iloc[0]
    if pd.isna(row["ci_low"]):
        return f"{row['value']:.3g}"
    return f"{row['value']:.3g} [{row['ci_low']:.3g}, {row['ci_high']:.3g}]"


def _span(values: pd.Series) -> str:
    low, high = values.min(), values.max()
    if math.isnan(low):
        return "-"  # no token came after the warm-up
    return f"{low:.3f}" if high - low < 5e-4 else f"{low:.3f} to {high:.3f}"
