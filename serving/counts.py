"""What was skipped since an engine started, in all and by each request."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from skipcal.errors import ConfigError
from skipcal.files.reading import shown
from skipcal.serving.settings import KEY

KEPT = 1024  # requests that have finished, whose counts are kept: 0.3 MB for a model of 32 layers


@dataclass(kw_only=True)
class SkipCounts:
    """Counts over decode steps. What is computed again is counted once.

    decode_steps:               tokens decoded.
    decode_steps_after_warm_up: those to which the rule applied.
    skipped_per_layer:          FFNs that these skipped by layer, L entries.
    """

    decode_steps: int = 0
    decode_steps_after_warm_up: int = 0
    skipped_per_layer: list[int]

    @property
    def skip_ratio(self) -> float:
        """Skipped FFNs / (L x decode steps after the warm-up); NaN when there was no such step."""
        return _share(self.skipped_per_layer, self.decode_steps_after_warm_up)

    @property
    def skip_ratio_all(self) -> float:
        """Skipped FFNs / (L x all decode steps); NaN when there was no step."""
        return _share(self.skipped_per_layer, self.decode_steps)

    def ratios(self) -> dict[str, float]:
        """By name."""
        return {"skip_ratio": self.skip_ratio, "skip_ratio_all": self.skip_ratio_all}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; a ratio over nothing is None."""
        ratios = {name: None if math.isnan(ratio) else ratio for name, ratio in self.ratios().items()}
        values = asdict(self)
        first = {
            name: values[name] for name in type(self).__annotations__
        }  # what it is of, before the counts
        return {**first, **values, **ratios}


@dataclass(kw_only=True)
class ServingReport(SkipCounts):
    """Counts over all passes since the engine started, of requests that want skipping.

    method:           what a request gets that says nothing.
    opted_out_steps:  tokens decoded for requests that do not want it, which are counted nowhere else.
    passes:           forward passes with a token to which a rule applied.
    unread_per_layer: those of them in which no token needed the FFN's weights, L entries.
    """

    method: str
    opted_out_steps: int = 0
    passes: int = 0
    unread_per_layer: list[int]

    @property
    def unread_ratio(self) -> float:
        """FFNs whose weights a pass left unread / (L x passes): what skipping can gain. NaN without a pass.

        It is the skip ratio where requests come one at a time, and less where tokens share a pass: one token
        that needs the FFN is enough to read it.
        """
        return _share(self.unread_per_layer, self.passes)

    def ratios(self) -> dict[str, float]:
        """By name."""
        return {**super().ratios(), "unread_ratio": self.unread_ratio}

    def line(self) -> str:
        """The counts in one line of a log."""
        return (
            f"{self.method}: skip ratio {_shown(self.skip_ratio)} after the warm-up, "
            f"{_shown(self.skip_ratio_all)} over all {self.decode_steps:,} decode steps; FFN weights unread "
            f"{_shown(self.unread_ratio)} of {self.passes:,} passes; opted out {self.opted_out_steps:,} steps"
        )


@dataclass(kw_only=True)
class RequestReport(SkipCounts):
    """Counts of one request, or of one of the `n` answers that it asked for.

    request_id:        as vLLM calls it inside: `0_` and so on before the id where n is more than 1, and eight
                       characters after it, for clients may use an id twice.
    method:            what it was judged by; `full` where it does not want skipping.
    target_skip_ratio: what it asks for; 0: the full model; None: what the engine was started with.
    """

    request_id: str
    method: str
    target_skip_ratio: float | None


def skip_report(llm: Any) -> dict[str, Any]:
    """The counts of a vLLM engine since it started, as `ServingReport.to_dict` has them.

    llm: a vllm.LLM. Raises ConfigError where nothing is skipped in it.
    """
    found: dict[str, Any] | None = llm.collective_rpc("skipcal_report")[0]
    if found is None:
        raise ConfigError(NOT_SKIPPING)
    return found


def request_reports(llm: Any, request_id: str | None = None) -> list[dict[str, Any]]:
    """The counts of a request, one entry for each of its answers, as `RequestReport.to_dict` has them.

    llm: a vllm.LLM; request_id: that of the RequestOutput, None: all that are kept, which are those that run
    and the last KEPT that have finished. Raises ConfigError where nothing is skipped, and for another id.
    """
    found: list[dict[str, Any]] | None = llm.collective_rpc("skipcal_requests", args=(request_id,))[0]
    if found is None:
        raise ConfigError(NOT_SKIPPING)
    if not found and request_id is not None:
        raise ConfigError(unknown_request(request_id))
    return found


NOT_SKIPPING = f'this engine was started without skipping; give additional_config={{"{KEY}": {{...}}}}'


def unknown_request(request_id: str) -> str:
    """What to say of an id that is not known."""
    return (
        f"there are no counts of a request {shown(request_id)}: kept are those of requests that run, and of "
        f"the last {KEPT:,} that have ended"
    )


def _share(by_layer: list[int], times: int) -> float:
    return sum(by_layer) / (len(by_layer) * times) if times else math.nan


def _shown(ratio: float) -> str:
    return "-" if math.isnan(ratio) else f"{ratio:.3f}"
