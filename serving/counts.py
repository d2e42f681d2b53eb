"""What was skipped since an engine started."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from skipcal.errors import ConfigError
from skipcal.serving.settings import KEY


@dataclass
class ServingReport:
    """Counts over all passes since the engine started. What is computed again is counted once.

    method:                     what was run.
    decode_steps:               tokens decoded for requests that want skipping.
    decode_steps_after_warm_up: those to which the rule applied.
    opted_out_steps:            tokens decoded for requests that do not want it.
    skipped_per_layer:          FFNs that these tokens skipped by layer, L entries.
    passes:                     forward passes with a token to which the rule applied.
    unread_per_layer:           those of them in which no token needed the FFN's weights, L entries.
    """

    method: str
    decode_steps: int
    decode_steps_after_warm_up: int
    opted_out_steps: int
    skipped_per_layer: list[int]
    passes: int
    unread_per_layer: list[int]

    @classmethod
    def empty(cls, method: str, layers: int) -> ServingReport:
        """Nothing has run."""
        return cls(method, 0, 0, 0, [0] * layers, 0, [0] * layers)

    @property
    def skip_ratio(self) -> float:
        """Skipped FFNs / (L x decode steps after the warm-up); NaN when there was no such step."""
        return _share(
            sum(self.skipped_per_layer), len(self.skipped_per_layer), self.decode_steps_after_warm_up
        )

    @property
    def skip_ratio_all(self) -> float:
        """Skipped FFNs / (L x all decode steps); NaN when there was no step."""
        return _share(sum(self.skipped_per_layer), len(self.skipped_per_layer), self.decode_steps)

    @property
    def unread_ratio(self) -> float:
        """FFNs whose weights a pass left unread / (L x passes): what skipping can gain. NaN without a pass.

        It is the skip ratio where requests come one at a time, and less where tokens share a pass: one token
        that needs the FFN is enough to read it.
        """
        return _share(sum(self.unread_per_layer), len(self.unread_per_layer), self.passes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; a ratio over nothing is None."""
        ratios = {
            "skip_ratio": self.skip_ratio,
            "skip_ratio_all": self.skip_ratio_all,
            "unread_ratio": self.unread_ratio,
        }
        return {**asdict(self), **{k: None if math.isnan(v) else v for k, v in ratios.items()}}

    def line(self) -> str:
        """The counts in one line of a log."""
        return (
            f"{self.method}: skip ratio {_shown(self.skip_ratio)} after the warm-up, "
            f"{_shown(self.skip_ratio_all)} over all {self.decode_steps:,} decode steps; FFN weights unread "
            f"{_shown(self.unread_ratio)} of {self.passes:,} passes; opted out {self.opted_out_steps:,} steps"
        )


def skip_report(llm: Any) -> dict[str, Any]:
    """The counts of a vLLM engine since it started, as `ServingReport.to_dict` has them.

    llm: a vllm.LLM. Raises ConfigError where nothing is skipped in it.
    """
    found: dict[str, Any] | None = llm.collective_rpc("skipcal_report")[0]
    if found is None:
        raise ConfigError(
            f'this engine was started without skipping; give additional_config={{"{KEY}": {{...}}}}'
        )
    return found


def _share(part: int, layers: int, times: int) -> float:
    return part / (layers * times) if times else math.nan


def _shown(ratio: float) -> str:
    return "-" if math.isnan(ratio) else f"{ratio:.3f}"
