"""The counts as Prometheus reads them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

# By name: what it says, and where it is in `ServingReport.to_dict`. Lists are summed.
COUNTERS = {
    "decode_steps": ("Tokens decoded for requests that want skipping.", "decode_steps"),
    "decode_steps_after_warm_up": ("Those to which a rule applied.", "decode_steps_after_warm_up"),
    "opted_out_steps": ("Tokens decoded for requests that do not want skipping.", "opted_out_steps"),
    "ffn_skipped": ("FFN blocks that tokens skipped.", "skipped_per_layer"),
    "passes": ("Forward passes with a token to which a rule applied.", "passes"),
    "ffn_unread": ("FFN blocks whose weights such a pass left unread.", "unread_per_layer"),
}
GAUGES = {
    "skip_ratio": "Skipped FFNs / (layers x decode steps after the warm-up), since the start.",
    "skip_ratio_all": "Skipped FFNs / (layers x all decode steps), since the start.",
    "unread_ratio": "FFNs left unread / (layers x passes), since the start.",
}


class SkipMetrics:
    """A collector of prometheus_client.

    report: what `ServingReport.to_dict` said last; None: nothing yet.
    """

    def __init__(self, model_name: str) -> None:
        """model_name: what vLLM's own metrics are labelled with."""
        self.report: dict[str, Any] | None = None
        self._model_name = model_name

    def collect(self) -> Iterator[Any]:
        """The metrics of the report. A ratio over nothing is left out."""
        from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily

        if self.report is None:
            return
        labels = {"model_name": self._model_name, "method": str(self.report["method"])}
        for name, (text, field) in COUNTERS.items():
            value = self.report[field]
            counter = CounterMetricFamily(f"skipcal:{name}", text, labels=labels)
            counter.add_metric(list(labels.values()), sum(value) if isinstance(value, list) else value)
            yield counter
        for name, text in GAUGES.items():
            gauge = GaugeMetricFamily(f"skipcal:{name}", text, labels=labels)
            if self.report[name] is not None:
                gauge.add_metric(list(labels.values()), self.report[name])
            yield gauge
