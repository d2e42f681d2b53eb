"""Statistics of a trace against plain numpy, and merging of parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from skipcal.calibrate.saturation import Trace, pooled_statistics, write_trace
from skipcal.errors import OutputExists


def trace(seed: int = 0, prompts: int = 5, length: int = 9, layers: int = 4, corpus: str = "a") -> Trace:
    rng = np.random.default_rng(seed)
    tokens = prompts * length
    return Trace(
        corpus=corpus,
        prompt=np.repeat(np.arange(prompts, dtype=np.int32), length),
        position=np.tile(np.arange(3, 3 + length, dtype=np.int32), prompts),
        cosine=rng.uniform(-1, 1, (tokens, layers)).astype(np.float32),
        norm_ratio=rng.random((tokens, layers)).astype(np.float32),
        prompt_tokens=3,
    )


def test_statistics_are_those_of_the_values() -> None:
    whole = trace()
    statistics = whole.statistics()
    for layer in range(4):
        values = whole.cosine[:, layer].astype(float)
        assert statistics.count[layer] == 45
        assert statistics.mean[layer] == pytest.approx(sum(values) / 45, abs=1e-12)
        assert statistics.std[layer] == pytest.approx(np.sqrt(((values - values.mean()) ** 2).mean()))
        assert statistics.min[layer] == min(values)
        assert statistics.q25[layer] == pytest.approx(np.percentile(values, 25))
        assert statistics.q95[layer] == pytest.approx(np.percentile(values, 95))
        assert statistics.norm_ratio_mean[layer] == pytest.approx(whole.norm_ratio[:, layer].mean())
        counts = statistics.histogram[layer]
        assert sum(counts) == 45
        assert counts[137] == sum(0.37 <= v < 0.38 for v in values)


def test_means_are_summed_in_float64() -> None:
    tokens = 200_001
    cosine = np.full((tokens, 1), 0.1, np.float32)
    long = Trace("a", np.zeros(tokens, np.int32), np.arange(tokens, dtype=np.int32), cosine, cosine, 0)
    assert abs(long.statistics().mean[0] - float(np.float32(0.1))) < 1e-13


def test_parts_merge_to_the_same_statistics_in_any_order() -> None:
    whole = trace(prompts=6)

    def part(prompts: list[int]) -> Trace:
        kept = np.isin(whole.prompt, prompts)
        return Trace(
            "a", whole.prompt[kept], whole.position[kept], whole.cosine[kept], whole.norm_ratio[kept], 3
        )

    merged = Trace.merge([part([4, 1]), part([0, 5]), part([2, 3])])
    np.testing.assert_array_equal(merged.cosine, whole.cosine)
    assert merged.statistics() == whole.statistics()


def test_pooled_counts_every_token_once() -> None:
    first, second = trace(0), trace(1, prompts=2, corpus="b")
    pooled = pooled_statistics([first, second])
    assert pooled.count == [63] * 4
    assert pooled.mean[2] == pytest.approx(np.concatenate([first.cosine, second.cosine])[:, 2].mean())


def test_tokens_after_the_warm_up_are_counted_from_the_prompt() -> None:
    assert len(trace().after_warm_up(0)) == 45
    assert len(trace().after_warm_up(4)) == 25
    np.testing.assert_array_equal(trace().after_warm_up(8), trace().cosine[8::9])


def test_a_trace_file_holds_every_value(tmp_path: Path) -> None:
    first, second = trace(0), trace(1, prompts=2, corpus="b")
    path = tmp_path / "trace.parquet"
    write_trace([first, second], path, overwrite=False)
    frame = pd.read_parquet(path)
    assert list(frame.columns) == ["corpus", "prompt", "position", "layer", "cosine", "norm_ratio"]
    assert len(frame) == (45 + 18) * 4
    row = frame[(frame.corpus == "b") & (frame.prompt == 1) & (frame.position == 5) & (frame.layer == 3)]
    assert row.cosine.item() == second.cosine[9 + 2, 3]
    with pytest.raises(OutputExists):
        write_trace([first], path, overwrite=False)
