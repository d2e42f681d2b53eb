"""Statistics of a trace against plain numpy, and merging of parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from skipcal.calibrate import saturation
from skipcal.calibrate.saturation import Trace, pooled_statistics, write_trace
from skipcal.calibrate.trace_store import ALL, Held, store
from skipcal.errors import OutputExists

LENGTH = 9  # counted tokens of a prompt


def trace(
    seed: int = 0, prompts: int = 5, layers: int = 4, corpus: str = "a", folder: Path | None = None
) -> Trace:
    """Random values in parts of 1 and 2 prompts; in files, if a folder is given."""
    rng = np.random.default_rng(seed)
    parts = []
    for first in range(0, prompts, 2):
        count = min(2, prompts - first)
        part = Held(
            {
                "prompt": np.repeat(np.arange(first, first + count, dtype=np.int32), LENGTH),
                "position": np.tile(np.arange(3, 3 + LENGTH, dtype=np.int32), count),
                "cosine": rng.uniform(-1, 1, (layers, count * LENGTH)).astype(np.float32),
                "norm_ratio": rng.random((layers, count * LENGTH)).astype(np.float32),
                "layer_cosine_sum": rng.random(layers) * count * LENGTH,
            }
        )
        parts.append(store(part, folder / f"{first}.safetensors") if folder else part)
    return Trace(corpus, 3, parts)


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
    values = np.full((1, 200_001), 0.1, np.float32)
    part = Held({"prompt": np.zeros(200_001, np.int32), "cosine": values, "norm_ratio": values})
    found = Trace("a", 0, [part]).statistics()
    assert abs(found.mean[0] - float(np.float32(0.1))) < 1e-13
    assert abs(found.norm_ratio_mean[0] - float(np.float32(0.1))) < 1e-13
    assert found.std[0] < 1e-13


def test_quantiles_are_numpys() -> None:
    for prompts in (1, 2, 5):
        whole = trace(prompts=prompts)
        statistics = whole.statistics()
        for name, share in {"q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95}.items():
            expected = np.quantile(whole.cosine.astype(float), share, axis=0)
            np.testing.assert_allclose(getattr(statistics, name), expected, rtol=0, atol=1e-15)


def test_block_influence_is_of_all_parts_or_of_none() -> None:
    whole = trace()
    sums = np.sum([part.read("layer_cosine_sum") for part in whole.parts], axis=0)
    assert whole.statistics().block_influence == pytest.approx(1 - sums / 45, rel=1e-12)
    lacking = Held({k: v for k, v in trace(1).parts[0].arrays.items() if k != "layer_cosine_sum"})  # type: ignore[attr-defined]
    assert pooled_statistics([whole, Trace("b", 3, [lacking])]).block_influence is None


def test_a_trace_in_files_gives_what_one_in_memory_gives(tmp_path: Path) -> None:
    held, stored = trace(), trace(folder=tmp_path)
    assert stored.statistics() == held.statistics()
    np.testing.assert_array_equal(stored.cosine, held.cosine)
    for one, other in zip(
        held.after_warm_up(4, slice(1, 3)), stored.after_warm_up(4, slice(1, 3)), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_sums_by_prompt_are_those_of_its_tokens() -> None:
    whole = trace()
    sums, counts = whole.prompt_sums()
    for prompt in range(5):
        expected = whole.cosine[whole.prompt == prompt].astype(float).sum(axis=0)
        np.testing.assert_allclose(sums[prompt], expected, rtol=1e-14)
    assert counts.tolist() == [LENGTH] * 5


def test_pooled_counts_every_token_once() -> None:
    first, second = trace(0), trace(1, prompts=2, corpus="b")
    pooled = pooled_statistics([first, second])
    assert pooled.count == [63] * 4
    assert pooled.mean[2] == pytest.approx(np.concatenate([first.cosine, second.cosine])[:, 2].mean())


def test_tokens_after_the_warm_up_are_counted_from_the_prompt() -> None:
    def ruled(warm_up: int) -> np.ndarray:
        return np.concatenate(list(trace().after_warm_up(warm_up, slice(1, 4))), axis=1)

    assert ruled(0).shape == (3, 45)
    assert ruled(4).shape == (3, 25)
    np.testing.assert_array_equal(ruled(8), trace().cosine[8::9, 1:4].T)


def test_a_layer_is_read_without_the_others() -> None:
    """What memory holds of a trace is a column of it."""
    whole = trace()
    asked: list[slice] = []

    class Watched(Held):
        def read(self, name: str, index: slice = ALL) -> np.ndarray:
            asked.append(index)
            return super().read(name, index)

    watched = Trace("a", 3, [Watched(part.arrays) for part in whole.parts if isinstance(part, Held)])
    np.testing.assert_array_equal(watched.column("cosine", 1), whole.cosine[:, 1])
    assert asked == [slice(1, 2)] * 3


@pytest.mark.parametrize(("row_group", "rows"), [(71, [72, 72, 36]), (108, [72, 108]), (107, [72, 72, 36])])
def test_row_groups_are_filled_up_to_their_size(
    tmp_path: Path, row_group: int, rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of 72, 72 and 36 rows; a part is never divided."""
    monkeypatch.setattr(saturation, "ROW_GROUP", row_group)
    path = tmp_path / "trace.parquet"
    path.write_bytes(b"an older one")
    write_trace([trace()], path, overwrite=True)
    file = pq.ParquetFile(path)
    assert [file.metadata.row_group(n).num_rows for n in range(file.metadata.num_row_groups)] == rows
    kinds = {field.name: str(field.type) for field in file.schema_arrow}
    assert kinds == {
        "corpus": "string", "prompt": "int32", "position": "int32", "layer": "int32", "cosine": "float",
        "norm_ratio": "float",
    }  # fmt: skip


@pytest.mark.parametrize("row_group", [1, 80, 1 << 18])
def test_a_trace_file_holds_every_value(
    tmp_path: Path, row_group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saturation, "ROW_GROUP", row_group)
    first, second = trace(0), trace(1, prompts=2, corpus="b")
    path = tmp_path / "trace.parquet"
    write_trace([first, second], path, overwrite=False)
    frame = pd.read_parquet(path)
    assert list(frame.columns) == ["corpus", "prompt", "position", "layer", "cosine", "norm_ratio"]
    assert len(frame) == (45 + 18) * 4
    row = frame[(frame.corpus == "b") & (frame.prompt == 1) & (frame.position == 5) & (frame.layer == 3)]
    assert row.cosine.item() == second.cosine[9 + 2, 3]
    for name in ("cosine", "norm_ratio"):
        np.testing.assert_array_equal(
            frame[name], np.concatenate([getattr(t, name).ravel() for t in (first, second)])
        )
    assert frame.layer.tolist() == list(range(4)) * 63
    assert frame.prompt[frame.corpus == "a"].tolist() == np.repeat(first.prompt, 4).tolist()
    with pytest.raises(OutputExists):
        write_trace([first], path, overwrite=False)
