"""Bytes, ratios and break-even points against counts by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import lively

from skipcal.arch.locate import locate
from skipcal.errors import TargetOutOfReach
from skipcal.speed.cost import StepBytes, break_even, forced_ratio, step_bytes
from skipcal.speed.forced import ForcedCosine
from skipcal.speed.shapes import random_model

CPU = torch.device("cpu")


def bytes_of(model: Any, tokens: float = 10.0, batch: int = 1) -> StepBytes:
    return step_bytes(model, locate(model), batch_size=batch, tokens=tokens)


def test_weights_are_counted_once_and_an_untied_embedding_not_at_all() -> None:
    model: Any = random_model("tiny", device=CPU, dtype=torch.float32, seed=0)
    attention = 32 * 32 + 2 * 16 * 32 + 32 * 32  # query, key and value, output
    layer = attention + 3 * 32 * 48 + 2 * 32
    head = 97 * 32
    assert bytes_of(model).weights == 4 * (8 * layer + 32 + head)
    assert bytes_of(model.to(torch.bfloat16)).weights == 2 * (8 * layer + 32 + head)


def test_a_tied_embedding_is_read_as_the_head() -> None:
    tied = lively("llama", tie_word_embeddings=True)
    assert bytes_of(tied).weights == sum(p.numel() * 4 for p in tied.parameters())


def test_keys_and_values_of_all_rows_and_layers_are_read() -> None:
    model = random_model("tiny", device=CPU, dtype=torch.float32, seed=0)
    assert bytes_of(model, tokens=10, batch=3).kv_cache == 3 * 10 * 8 * 2 * (2 * 8) * 4


def test_a_sliding_window_bounds_what_its_layers_read() -> None:
    model: Any = lively("gemma2", sliding_window=4)  # two of four layers
    full = [kind == "full_attention" for kind in model.config.layer_types]
    assert full.count(True) == 2
    assert bytes_of(model, tokens=10).kv_cache == (2 * 4 + 2 * 10) * 2 * (2 * 8) * 4


def test_the_ideal_is_bytes_over_the_bytes_that_are_left() -> None:
    read = StepBytes(weights=900, kv_cache=100)
    assert read.ideal_speed_up(0) == 1.0
    assert read.ideal_speed_up(200) == pytest.approx(1000 / 800)


@pytest.mark.parametrize(
    ("ratio", "layers", "counts"),
    [
        (0.5, 30, ((15, 1.0),)),
        (0.25, 30, ((7, 0.5), (8, 0.5))),
        (0.05, 30, ((1, 0.5), (2, 0.5))),
        (0.05, 16, ((0, 0.2), (1, 0.8))),
        (0.1, 30, ((3, 1.0),)),  # 0.1 * 30 is 3.0000000000000004
        (0.9, 30, ((27, 1.0),)),
    ],
)
def test_a_ratio_is_a_mean_of_whole_numbers(ratio: float, layers: int, counts: Any) -> None:
    forced = forced_ratio(ratio, layers, most=layers - 3, limit="")
    assert [count for count, _ in forced.counts] == [count for count, _ in counts]
    assert [share for _, share in forced.counts] == pytest.approx([share for _, share in counts])
    assert forced.skips == pytest.approx(ratio * layers)


@pytest.mark.parametrize(("ratio", "layers"), [(0.91, 30), (0.5, 4), (0.01, 3), (0.5, 1)])
def test_a_ratio_that_leaves_no_ffn_to_arm_is_out_of_reach(ratio: float, layers: int) -> None:
    rule = ForcedCosine(layers)
    with pytest.raises(TargetOutOfReach, match=f"skip ratio {ratio:g} is out of reach: of {layers} layers"):
        forced_ratio(ratio, layers, most=rule.most, limit=rule.limit)


def test_the_break_even_point_is_interpolated() -> None:
    ratio, reason = break_even([(0.5, 1.4), (0.0, 0.9), (0.25, 1.1)])
    assert ratio == pytest.approx(0.125)
    assert reason == "interpolated between 0 and 0.25"


def test_of_several_crossings_the_last_counts() -> None:
    ratio, _ = break_even([(0.0, 0.9), (0.1, 1.1), (0.2, 0.8), (0.4, 1.2)])
    assert ratio == pytest.approx(0.3)


def test_without_a_crossing_there_is_a_reason() -> None:
    assert break_even([(0.0, 1.0), (0.5, 1.2)]) == (
        None, "never slower than the full model, even where nothing is skipped",
    )  # fmt: skip
    assert break_even([(0.0, 0.8), (0.5, 0.9)])[1] == "slower than the full model at every ratio up to 0.5"
    assert break_even([(0.0, 0.8), (0.2, 1.1), (0.5, 0.9)])[1].startswith("slower than the full model at 0.5")
