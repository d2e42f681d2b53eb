"""The trace of a calibration and its statistics by layer: the saturation curve.

A trace is read one layer at a time, so that memory holds a column of it and not the whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from skipcal.calibrate.trace_store import Part
from skipcal.files.writing import write_atomic
from skipcal.profiles.parts import HISTOGRAM_BINS, QUANTILES, LayerStatistics

ROW_GROUP = 1 << 18  # rows of a Parquet file that are written together: 6 MB


@dataclass(frozen=True)
class Trace:
    """Cosines and norm ratios of all counted tokens of one corpus, in parts of a batch each.

    parts: in the order of their prompts; no prompt is in two of them.
    prompt_tokens: positions below it are the prefill; position p is decode step p - prompt_tokens.

    The properties that give arrays read the whole trace into memory.
    """

    corpus: str
    prompt_tokens: int
    parts: Sequence[Part]

    @property
    def tokens(self) -> int:
        """Number of counted tokens."""
        return sum(len(part.read("prompt")) for part in self.parts)

    @property
    def num_layers(self) -> int:
        """Number of layers, L."""
        return self.parts[0].length("cosine")

    @property
    def prompt(self) -> np.ndarray:
        """Which prompt each token belongs to, [tokens] int32."""
        return self._joined("prompt")

    @property
    def position(self) -> np.ndarray:
        """Place of each token in its row, the prompt included, [tokens] int32."""
        return self._joined("position")

    @property
    def cosine(self) -> np.ndarray:
        """`cos_i`, [tokens, layers] float32."""
        return self._joined("cosine").T

    @property
    def norm_ratio(self) -> np.ndarray:
        """`‖f_i‖/‖h_i‖`, [tokens, layers] float32."""
        return self._joined("norm_ratio").T

    def _joined(self, name: str) -> np.ndarray:
        return np.concatenate([part.read(name) for part in self.parts], axis=-1)

    def column(self, name: Literal["cosine", "norm_ratio"], layer: int) -> np.ndarray:
        """One layer's values, [tokens] float32; the array is the caller's own."""
        return np.concatenate([part.read(name, slice(layer, layer + 1))[0] for part in self.parts])

    def after_warm_up(self, warm_up_tokens: int, layers: slice) -> Iterator[np.ndarray]:
        """Cosines of the decode steps past the warm-up, part by part: [layers, tokens] float32."""
        for part in self.parts:
            ruled = part.read("position") - self.prompt_tokens >= warm_up_tokens
            yield part.read("cosine", layers)[:, ruled]

    def prompt_sums(self) -> tuple[np.ndarray, np.ndarray]:
        """Sums [prompts, layers] and counts [prompts] of the cosines by prompt, in float64."""
        sums, counts = [], []
        for part in self.parts:
            prompts, index = np.unique(part.read("prompt"), return_inverse=True)
            cosine = part.read("cosine")
            found = np.zeros((len(prompts), len(cosine)))
            np.add.at(found, index, cosine.T.astype(np.float64))
            sums.append(found)
            counts.append(np.bincount(index).astype(np.float64))
        return np.concatenate(sums), np.concatenate(counts)

    def statistics(self) -> LayerStatistics:
        """Statistics over all tokens of the trace."""
        return pooled_statistics([self])


def pooled_statistics(traces: Sequence[Trace]) -> LayerStatistics:
    """Statistics by layer over the tokens of all traces together; sums in float64, `std` the population's."""
    layers = range(traces[0].num_layers)
    columns = [
        _column_statistics(*(_over(traces, name, layer) for name in ("cosine", "norm_ratio")))
        for layer in layers
    ]
    fields: dict[str, list[Any]] = {name: [found[name] for found in columns] for name in columns[0]}
    return LayerStatistics(block_influence=_block_influence(traces, fields["count"][0]), **fields)


def _over(traces: Sequence[Trace], name: Any, layer: int) -> np.ndarray:
    return np.concatenate([trace.column(name, layer) for trace in traces])


def _column_statistics(cosine: np.ndarray, norm_ratio: np.ndarray) -> dict[str, Any]:
    """Statistics of one layer's values, each [tokens] float32. `cosine` is sorted in place."""
    cosine.sort()
    edges = np.linspace(-1.0, 1.0, HISTOGRAM_BINS + 1)
    return {
        "count": len(cosine),
        "mean": float(cosine.mean(dtype=np.float64).clip(-1, 1)),
        "std": float(cosine.std(dtype=np.float64)),
        "min": float(cosine[0]),
        "norm_ratio_mean": float(norm_ratio.mean(dtype=np.float64)),
        "histogram": np.histogram(cosine, edges)[0].tolist(),
        **{name: _quantile(cosine, share) for name, share in QUANTILES.items()},
    }


def _quantile(ascending: np.ndarray, share: float) -> float:
    """Linear between the two values around it, as numpy's default."""
    place = share * (len(ascending) - 1)
    below = int(place)
    low, high = float(ascending[below]), float(ascending[min(below + 1, len(ascending) - 1)])
    return low + (high - low) * (place - below)


def _block_influence(traces: Sequence[Trace], tokens: int) -> list[float] | None:
    parts = [part for trace in traces for part in trace.parts]
    if not all("layer_cosine_sum" in part for part in parts):
        return None
    total = np.sum([part.read("layer_cosine_sum") for part in parts], axis=0)
    return [float(value) for value in 1 - total / tokens]


def write_trace(traces: Sequence[Trace], path: Path, *, overwrite: bool) -> None:
    """Write all traces as one Parquet file: corpus, prompt, position, layer, cosine, norm_ratio.

    One row for each token and layer, in row groups, of which memory holds one at a time.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    def write(partial: Path) -> None:
        tables = (_table(trace.corpus, part) for trace in traces for part in trace.parts)
        waiting = [next(tables)]
        with partial.open("wb") as raw, pq.ParquetWriter(raw, waiting[0].schema) as file:
            for table in tables:
                if sum(len(other) for other in waiting) + len(table) > ROW_GROUP:
                    file.write_table(pa.concat_tables(waiting))
                    waiting = []
                waiting.append(table)
            file.write_table(pa.concat_tables(waiting))

    write_atomic(path, write, overwrite=overwrite)


def _table(corpus: str, part: Part) -> Any:
    """The rows of one part, token by token."""
    import pyarrow as pa

    cosine = part.read("cosine").T  # [tokens, layers]
    tokens, layers = cosine.shape
    names = pa.DictionaryArray.from_arrays(np.zeros(tokens * layers, np.int8), [corpus])
    return pa.table(
        {
            "corpus": names.cast(pa.string()),
            "prompt": np.repeat(part.read("prompt"), layers),
            "position": np.repeat(part.read("position"), layers),
            "layer": np.tile(np.arange(layers, dtype=np.int32), tokens),
            "cosine": cosine.ravel(),
            "norm_ratio": part.read("norm_ratio").T.ravel(),
        }
    )
