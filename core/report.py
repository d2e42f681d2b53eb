"""What a skipping session did."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal


@dataclass(frozen=True)
class SkipReport:
    """Counts over all forward passes of a session, and how they were made.

    Where whole layers are skipped, each counts as the FFN block it contains.

    decode_steps:               tokens decoded, summed over rows (n - 1 of n new tokens; a row
                                counts until its end-of-sequence token).
    decode_steps_after_warm_up: those to which the rule applied.
    skipped_per_layer:          skipped FFN blocks by layer, L entries.
    weight_bytes_saved:         bytes of weights that were not read: a block's weights count
                                once for each forward pass in which every row skipped it.
    row_decisions:              (step, layer) decisions taken for two live rows or more, where the
                                engine measures it; 0: it does not.
    row_decisions_alike:        those of them on which all live rows agreed.
    prepared_passes:            decode passes that a prepared step ran (engines graph and recorded);
    eager_passes:               those that the model's own modules ran, one by one. A pass decodes a token of
                                each row.
    setup_s:                    seconds in which steps were prepared: compiled, captured or recorded, and
                                compared with the model's own passes: no part of decoding.
    method, unit:               what was run, and whether its skips are FFN blocks or whole layers.
    byte_shares:                share of the decoder layers' weight bytes that one skip in each layer
                                leaves out: its FFN's, or the whole layer's.
    """

    decode_steps: int
    decode_steps_after_warm_up: int
    skipped_per_layer: tuple[int, ...]
    weight_bytes_saved: int
    engine: str
    engine_reason: str
    method: str
    unit: Literal["ffn", "layer"]
    byte_shares: tuple[float, ...]
    row_decisions: int = 0
    row_decisions_alike: int = 0
    prepared_passes: int = 0
    eager_passes: int = 0
    setup_s: float = field(default=0.0, compare=False)  # reports are equal by what was done

    @property
    def skipped_blocks(self) -> int:
        """Skipped FFN blocks, over all layers."""
        return sum(self.skipped_per_layer)

    @property
    def skip_ratio(self) -> float:
        """Skipped blocks / (L x decode steps after the warm-up); NaN when there was no such step."""
        return self._ratio(self.decode_steps_after_warm_up)

    @property
    def skip_ratio_all(self) -> float:
        """Skipped blocks / (L x all decode steps); NaN when there was no step."""
        return self._ratio(self.decode_steps)

    @property
    def skip_ratio_bytes(self) -> float:
        """Weight bytes of the decoder layers that a token did not need, after the warm-up, as a share.

        So methods that skip whole layers and methods that skip FFNs can be set side by side. It is
        the mean over tokens; unlike `weight_bytes_saved` it does not depend on the batch.
        """
        steps = self.decode_steps_after_warm_up
        saved = sum(n * share for n, share in zip(self.skipped_per_layer, self.byte_shares, strict=True))
        return saved / steps if steps else math.nan

    @property
    def row_agreement(self) -> float:
        """Share of the decisions on which all live rows of a batch agreed; NaN: none was measured.

        Weights are saved only where all rows skip, so this is what batches can hope for.
        """
        return self.row_decisions_alike / self.row_decisions if self.row_decisions else math.nan

    def counts(self) -> dict[str, Any]:
        """What was counted, as plain values; see `from_shares`."""
        return {
            "decode_steps": self.decode_steps,
            "decode_steps_after_warm_up": self.decode_steps_after_warm_up,
            "skipped_per_layer": list(self.skipped_per_layer),
            "weight_bytes_saved": self.weight_bytes_saved,
            "row_decisions": self.row_decisions,
            "row_decisions_alike": self.row_decisions_alike,
            "prepared_passes": self.prepared_passes,
            "eager_passes": self.eager_passes,
        }

    def since(self, earlier: SkipReport) -> SkipReport:
        """What the same session has done after an `earlier` report of it.

        Where no prepared step ran since, the engine was the eager one, whatever had run before.
        """
        layers = zip(self.skipped_per_layer, earlier.skipped_per_layer, strict=True)
        prepared = self.prepared_passes - earlier.prepared_passes
        eager = self.eager_passes - earlier.eager_passes
        return replace(
            self,
            engine="eager" if eager and not prepared else self.engine,
            prepared_passes=prepared,
            eager_passes=eager,
            setup_s=self.setup_s - earlier.setup_s,
            decode_steps=self.decode_steps - earlier.decode_steps,
            decode_steps_after_warm_up=self.decode_steps_after_warm_up - earlier.decode_steps_after_warm_up,
            skipped_per_layer=tuple(now - then for now, then in layers),
            weight_bytes_saved=self.weight_bytes_saved - earlier.weight_bytes_saved,
            row_decisions=self.row_decisions - earlier.row_decisions,
            row_decisions_alike=self.row_decisions_alike - earlier.row_decisions_alike,
        )

    @staticmethod
    def from_shares(like: SkipReport, shares: Sequence[tuple[dict[str, Any], int]]) -> SkipReport:
        """A report from items that were run in batches: each brings its batch's `counts`, and its size.

        An item stands for its part of the batch, so over whole batches the sums are exact.
        like: a report of the same policy on the same model.
        """

        def total(name: str, layer: int | None = None) -> int:
            values = ((counts.get(name, 0), size) for counts, size in shares)
            return round(math.fsum((v if layer is None else v[layer]) / size for v, size in values))

        return replace(
            like,
            decode_steps=total("decode_steps"),
            decode_steps_after_warm_up=total("decode_steps_after_warm_up"),
            skipped_per_layer=tuple(
                total("skipped_per_layer", layer) for layer in range(len(like.skipped_per_layer))
            ),
            weight_bytes_saved=total("weight_bytes_saved"),
            row_decisions=total("row_decisions"),
            row_decisions_alike=total("row_decisions_alike"),
            prepared_passes=total("prepared_passes"),
            eager_passes=total("eager_passes"),
        )

    @staticmethod
    def merged(reports: Sequence[SkipReport]) -> SkipReport:
        """One report over several sessions of the same policy on the same model."""
        merged = SkipReport.from_shares(reports[0], [(report.counts(), 1) for report in reports])
        return replace(merged, setup_s=math.fsum(report.setup_s for report in reports))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; a ratio over no token is None."""
        ratios = {
            "skip_ratio": self.skip_ratio,
            "skip_ratio_all": self.skip_ratio_all,
            "skip_ratio_bytes": self.skip_ratio_bytes,
            "row_agreement": self.row_agreement,
        }
        values = asdict(self)
        del values["byte_shares"]
        return {
            **values,
            "skipped_per_layer": list(self.skipped_per_layer),
            "skipped_blocks": self.skipped_blocks,
            **{name: None if math.isnan(value) else value for name, value in ratios.items()},
        }

    def _ratio(self, steps: int) -> float:
        return self.skipped_blocks / (len(self.skipped_per_layer) * steps) if steps else math.nan
