"""What requests that run together leave unread, against every choice of windows one by one."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gated import gates_for, random_map, surrogates_for

from skipcal.arch.loading import LoadedModel
from skipcal.arch.locate import locate
from skipcal.configs.sweep import PerplexitySettings
from skipcal.core.gate import GatePolicy
from skipcal.core.surrogates import RoutedLowRank, Surrogates
from skipcal.evaluation.tasks.answers import Subject
from skipcal.evaluation.tasks.perplexity import load_perplexity
from skipcal.evaluation.together import SkipsByPosition, unread_bytes

WINDOWS, WIDTH, FIRST, HIDDEN = 6, 9, 2, 8
BYTES = (4_000, 5_000, 6_000)


def blocks() -> Any:
    place = (torch.device("cpu"), torch.bfloat16)
    return [SimpleNamespace(index=n, weight_bytes=size, place=place) for n, size in enumerate(BYTES)]


def surrogates() -> Surrogates:
    """None of the first layer, one map of the second, four of the third."""
    random = torch.Generator().manual_seed(1)
    return Surrogates({1: random_map(HIDDEN, 2, 1, random), 2: random_map(HIDDEN, 2, 4, random)})


def read_by(found: Any, rows: int) -> int:
    """Bytes of a surrogate that so many rows read at most, by its tensors."""
    if found is None or rows == 0:
        return 0
    shared, own = [found.down], [found.up, found.bias]
    if not isinstance(found, RoutedLowRank):
        return 2 * sum(t.numel() for t in (*shared, *own))
    maps = min(rows, len(found.up))
    return 2 * sum(t.numel() for t in (*shared, found.route_bias)) + 2 * maps * sum(t[0].numel() for t in own)


@pytest.mark.parametrize("requests", range(1, WINDOWS + 1))
@pytest.mark.parametrize("batch", [1, 4])
def test_bytes_are_the_mean_over_every_choice_of_windows(requests: int, batch: int) -> None:
    generator = torch.Generator().manual_seed(2)
    masks = (
        torch.rand(len(BYTES), WINDOWS, WIDTH, generator=generator)
        < torch.tensor([0.9, 0.5, 0.7])[:, None, None]
    )
    seen = SkipsByPosition(len(BYTES), width=WIDTH, first=FIRST)
    for start in range(0, WINDOWS, batch):
        for layer in range(len(BYTES)):
            seen.see(layer, masks[layer, start : start + batch].reshape(-1))
    maps = surrogates()
    every = []
    for rows in combinations(range(WINDOWS), requests):
        for position in range(FIRST, WIDTH):
            saved = 0
            for layer, size in enumerate(BYTES):
                skips = sum(bool(masks[layer, row, position]) for row in rows)
                saved += size * (skips == requests) - read_by(maps.maps.get(layer), skips)
            every.append(saved)
    found = unread_bytes(seen.skips, WINDOWS, requests, blocks(), maps)
    assert found == pytest.approx(np.mean(every), rel=1e-12)


@pytest.mark.parametrize("maps", [1, 4])
def test_of_one_request_it_is_what_the_report_says(worded: LoadedModel, worded_text: Path, maps: int) -> None:
    model: Any = worded.model
    architecture = locate(model)
    settings = PerplexitySettings(
        data_files=[str(worded_text)], windows=5, window_tokens=20, prompt_tokens=1, warm_up_tokens=3
    )
    subject = Subject(worded, architecture, chat_template=False)
    seen = SkipsByPosition(architecture.num_layers, width=20, first=1 + 3)
    task = replace(load_perplexity(settings, subject, 0), watcher=seen.see)
    policy = GatePolicy(
        gates=gates_for(model), surrogates=surrogates_for(model, maps=maps), threshold=0.0, warm_up_tokens=3
    )
    reports = [report for _, report in task.run(subject, policy, task.ids, 2)]
    tokens = sum(report.decode_steps_after_warm_up for report in reports)
    assert seen.skips.sum() == sum(report.skipped_blocks for report in reports) > 0
    assert tokens == len(task.ids) * seen.skips.shape[1]
    all_bytes = sum(block.layer_bytes for block in architecture.blocks)
    expected = sum(r.skip_ratio_bytes * r.decode_steps_after_warm_up for r in reports) / tokens * all_bytes
    found = unread_bytes(seen.skips, len(task.ids), 1, architecture.blocks, policy.surrogates)
    assert found == pytest.approx(expected, rel=1e-9)
