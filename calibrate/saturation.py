"""The trace of a calibration and its statistics by layer: the saturation curve."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from skipcal.profiles.files import write_atomic
from skipcal.profiles.parts import HISTOGRAM_BINS, QUANTILES, LayerStatistics


@dataclass(frozen=True)
class Trace:
    """Cosines and norm ratios of all counted tokens of one corpus.

    prompt:      [tokens] int32, which prompt the token belongs to.
    position:    [tokens] int32, place in its row, the prompt included.
    cosine:      [tokens, layers] float32, `cos_i`.
    norm_ratio:  [tokens, layers] float32, `‖f_i‖/‖h_i‖`.
    prompt_tokens: positions below it are the prefill; position p is decode step p - prompt_tokens.
    layer_cosine_sum: [layers] float64, over the same tokens the sum of the cosine between each
                 layer's input and output; None if that was not measured.
    """

    corpus: str
    prompt: np.ndarray
    position: np.ndarray
    cosine: np.ndarray
    norm_ratio: np.ndarray
    prompt_tokens: int
    layer_cosine_sum: np.ndarray | None = None

    def after_warm_up(self, warm_up_tokens: int) -> np.ndarray:
        """Cosines [tokens, layers] of the decode steps past the warm-up."""
        return self.cosine[self.position - self.prompt_tokens >= warm_up_tokens]

    def prompt_sums(self) -> tuple[np.ndarray, np.ndarray]:
        """Sums [prompts, layers] and counts [prompts] of the cosines by prompt, in float64."""
        prompts, index = np.unique(self.prompt, return_inverse=True)
        sums = np.zeros((len(prompts), self.cosine.shape[1]))
        np.add.at(sums, index, self.cosine.astype(np.float64))
        return sums, np.bincount(index).astype(np.float64)

    def statistics(self) -> LayerStatistics:
        """Statistics over all tokens of the trace."""
        return layer_statistics(self.cosine, self.norm_ratio, self.layer_cosine_sum)

    @staticmethod
    def merge(parts: list[Trace]) -> Trace:
        """One trace of the same corpus from parts, whichever process made them, in order of prompts.

        All statistics are taken from the merged trace, so they do not depend on the parts.
        """
        prompt = np.concatenate([part.prompt for part in parts])
        position = np.concatenate([part.position for part in parts])
        order = np.lexsort((position, prompt))
        return Trace(
            corpus=parts[0].corpus,
            prompt=prompt[order],
            position=position[order],
            cosine=np.concatenate([part.cosine for part in parts])[order],
            norm_ratio=np.concatenate([part.norm_ratio for part in parts])[order],
            prompt_tokens=parts[0].prompt_tokens,
            layer_cosine_sum=_summed(parts),
        )


def _summed(parts: list[Trace]) -> np.ndarray | None:
    sums = [part.layer_cosine_sum for part in parts if part.layer_cosine_sum is not None]
    return np.sum(sums, axis=0) if len(sums) == len(parts) else None


def layer_statistics(
    cosine: np.ndarray, norm_ratio: np.ndarray, layer_cosine_sum: np.ndarray | None = None
) -> LayerStatistics:
    """Statistics by layer of [tokens, layers] values; sums in float64, `std` of the population.

    layer_cosine_sum: [layers], see Trace; it gives Block Influence.
    """
    tokens, layers = cosine.shape
    quantiles = np.quantile(cosine.astype(np.float64), list(QUANTILES.values()), axis=0)
    edges = np.linspace(-1.0, 1.0, HISTOGRAM_BINS + 1)
    return LayerStatistics(
        count=[tokens] * layers,
        mean=cosine.mean(axis=0, dtype=np.float64).clip(-1, 1).tolist(),
        std=cosine.std(axis=0, dtype=np.float64).tolist(),
        min=cosine.min(axis=0).astype(np.float64).tolist(),
        norm_ratio_mean=norm_ratio.mean(axis=0, dtype=np.float64).tolist(),
        block_influence=None if layer_cosine_sum is None else (1 - layer_cosine_sum / tokens).tolist(),
        histogram=[np.histogram(cosine[:, layer], edges)[0].tolist() for layer in range(layers)],
        **dict(zip(QUANTILES, quantiles.tolist(), strict=True)),
    )


def pooled_statistics(traces: list[Trace]) -> LayerStatistics:
    """Statistics over the tokens of all corpora together."""
    return layer_statistics(
        np.concatenate([trace.cosine for trace in traces]),
        np.concatenate([trace.norm_ratio for trace in traces]),
        _summed(traces),
    )


def write_trace(traces: list[Trace], path: Path, *, overwrite: bool) -> None:
    """Write all traces as one Parquet file: corpus, prompt, position, layer, cosine, norm_ratio."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def table(trace: Trace) -> pa.Table:
        tokens, layers = trace.cosine.shape
        names = pa.DictionaryArray.from_arrays(np.zeros(tokens * layers, np.int8), [trace.corpus])
        return pa.table(
            {
                "corpus": names.cast(pa.string()),
                "prompt": np.repeat(trace.prompt, layers),
                "position": np.repeat(trace.position, layers),
                "layer": np.tile(np.arange(layers, dtype=np.int32), tokens),
                "cosine": trace.cosine.ravel(),
                "norm_ratio": trace.norm_ratio.ravel(),
            }
        )

    def write(partial: Path) -> None:
        pq.write_table(pa.concat_tables([table(trace) for trace in traces]), partial)

    write_atomic(path, write, overwrite=overwrite)
