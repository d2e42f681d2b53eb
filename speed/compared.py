"""Arms set against each other: time, bytes and speed-up of each, and by which engine it really ran."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from skipcal.core.report import SkipReport
from skipcal.errors import SkipcalError
from skipcal.runtime.engines.choice import fastest
from skipcal.speed.arms import FULL, PLAIN, WATCHING, Run, skip_arm
from skipcal.speed.cost import ForcedRatio, StepBytes, break_even
from skipcal.speed.timing import Spread, spread


def wanted_engine(asked: str, device: str, runs: Mapping[str, Sequence[Run]]) -> str:
    """The engine by which all arms have to run: the one asked for.

    "auto" is the fastest, or the eager one if not a single pass was prepared: arms are alike then too.
    """
    if asked != "auto":
        return asked
    reports = [run.report for arm in runs.values() for run in arm if run.report is not None]
    return fastest(device) if any(report.prepared_passes for report in reports) else "eager"


def break_even_of(rows: Sequence[dict[str, Any]]) -> tuple[float | None, str]:
    """Skip ratio from which skipping pays, by the rows that can be compared; see `break_even`."""
    for row in rows:
        if row["arm"] in (FULL, WATCHING) and not row["comparable"]:
            return None, f"{row['arm']} ran by {row['engine']}"
    points = [
        (row["skip_ratio"], row["speed_up_over_full"]["median"])
        for row in rows
        if row["arm"] in (WATCHING, "skipping") and row["comparable"]
    ]
    if len(points) == 1:
        return None, "no skipping arm ran by the engine of the full model alone"
    return break_even(points)


@dataclass(frozen=True)
class Compared:
    """Runs of every arm by round, and what they are set against.

    wanted: the engine by which all passes have to run, or a row cannot be compared.
    """

    runs: dict[str, list[Run]]
    read: StepBytes
    bandwidth: Spread
    batch_size: int
    wanted: str

    def skipping_row(self, forced: ForcedRatio) -> dict[str, Any]:
        """The arms on either side of a forced ratio, as one."""
        mix = tuple((skip_arm(count), share) for count, share in forced.counts)
        row = self.row("skipping", mix)
        for ratio in self._counted(mix, lambda report: report.skip_ratio):
            if abs(ratio - forced.ratio) > 1e-9:
                raise SkipcalError(
                    f"a skip ratio of {forced.ratio:g} was to be forced, {ratio:g} was counted; "
                    "this engine does not follow the rule"
                )
        row["skips"] = {str(count): share for count, share in forced.counts}
        return row

    def row(self, arm: str, mix: _Mix) -> dict[str, Any]:
        """Time, bytes and speed-up of a mean of arms."""
        steps = len(self.runs[FULL][0].timing.step_s)
        saved = statistics.fmean(self._counted(mix, lambda report: report.weight_bytes_saved / steps))
        ratio = statistics.fmean(self._counted(mix, lambda report: report.skip_ratio))
        step = self._spread(mix, _steps)
        total = self.read.total - saved
        ideal = self.read.ideal_speed_up(saved)
        over_full, over_plain = self._speed_up(FULL, mix), self._speed_up(PLAIN, mix)
        return {
            "arm": arm,
            "skip_ratio": ratio,
            **self._how_it_ran(mix),
            "prefill_s": self._spread(mix, lambda run: (run.timing.prefill_s,)).to_dict(),
            "step_ms": _scaled(step, 1e3).to_dict(),
            "tok_per_s": self.batch_size / step.median,
            "bytes_per_step": total,
            "share_of_copy_bandwidth": total / step.median / 1e9 / self.bandwidth.median,
            "ideal_speed_up": ideal,
            "speed_up_over_full": over_full.to_dict(),
            "speed_up_over_plain": over_plain.to_dict(),
            "realised_over_ideal": over_full.median / ideal,
            "realised_over_ideal_from_plain": over_plain.median / ideal,
        }

    def _counted(self, mix: _Mix, value: Callable[[SkipReport], float]) -> list[float]:
        """A value of each round's reports, of a mean of arms; 0 outside a session."""
        columns = [
            [0.0 if run.report is None else share * value(run.report) for run in self.runs[name]]
            for name, share in mix
        ]
        return [sum(column) for column in zip(*columns, strict=True)]

    def _how_it_ran(self, mix: _Mix) -> dict[str, Any]:
        """Engines and passes of all rounds: an engine may give up in the middle of one."""
        runs = [run for name, _ in mix for run in self.runs[name]]
        reports = [run.report for run in runs if run.report is not None]
        names = list(dict.fromkeys(name for report in reports for name in self._engines(report)))
        return {
            "engine": " and ".join(names) or None,
            "engine_reason": "; or: ".join(dict.fromkeys(report.engine_reason for report in reports)) or None,
            "comparable": names in ([], [self.wanted]),
            "prepared_passes": sum(report.prepared_passes for report in reports),
            "eager_passes": sum(report.eager_passes for report in reports),
            "setup_s": statistics.median(run.setup_s for run in runs),
        }

    def _engines(self, report: SkipReport) -> list[str]:
        """Those that ran decode passes; a prepared one that gave up is no longer called by its name."""
        prepared = report.engine if report.engine != "eager" else self.wanted
        ran = {prepared: report.prepared_passes, "eager": report.eager_passes}
        return [name for name, passes in ran.items() if passes] or [report.engine]

    def _speed_up(self, base: str, mix: _Mix) -> Spread:
        """Ratios of the medians of each round, whose arms met the same machine: their median and range."""
        above, below = self._medians(((base, 1.0),), _steps), self._medians(mix, _steps)
        each = [a / b for a, b in zip(above, below, strict=True)]
        return Spread(statistics.median(each), min(each), max(each), len(each))

    def _spread(self, mix: _Mix, values: _Values) -> Spread:
        medians = self._medians(mix, values)
        parts = [(spread([values(run) for run in self.runs[name]]).median, share) for name, share in mix]
        whole = sum(median * share for median, share in parts)
        return Spread(whole, min(medians), max(medians), len(medians))

    def _medians(self, mix: _Mix, values: _Values) -> list[float]:
        """Median of each round, of a mean of arms."""
        columns = [[share * statistics.median(values(run)) for run in self.runs[name]] for name, share in mix]
        return [sum(column) for column in zip(*columns, strict=True)]


_Mix = tuple[tuple[str, float], ...]  # arms, with the share of each
_Values = Callable[[Run], tuple[float, ...]]


def _steps(run: Run) -> tuple[float, ...]:
    return run.timing.step_s


def _scaled(values: Spread, factor: float) -> Spread:
    return Spread(values.median * factor, values.min * factor, values.max * factor, values.rounds)
