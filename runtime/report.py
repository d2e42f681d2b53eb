"""What a skipping session did."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class SkipReport:
    """Counts over all forward passes of a session, and how they were made.

    decode_steps:               tokens decoded, summed over rows (n - 1 of n new tokens; a row
                                counts until its end-of-sequence token).
    decode_steps_after_warm_up: those to which the rule applied.
    skipped_per_layer:          skipped FFN blocks by layer, L entries.
    weight_bytes_saved:         bytes of FFN weights that were not read: a block's weights count
                                once for each forward pass in which every row skipped it.
    """

    decode_steps: int
    decode_steps_after_warm_up: int
    skipped_per_layer: tuple[int, ...]
    weight_bytes_saved: int
    engine: str
    engine_reason: str

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

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; a ratio over no token is None."""
        ratios = {"skip_ratio": self.skip_ratio, "skip_ratio_all": self.skip_ratio_all}
        return {
            **asdict(self),
            "skipped_per_layer": list(self.skipped_per_layer),
            "skipped_blocks": self.skipped_blocks,
            **{name: None if math.isnan(value) else value for name, value in ratios.items()},
        }

    def _ratio(self, steps: int) -> float:
        return self.skipped_blocks / (len(self.skipped_per_layer) * steps) if steps else math.nan
