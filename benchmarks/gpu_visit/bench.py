"""`skipcal bench` as a step: the whole result, and how prepared steps passed their proof."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from gpu_visit.steps import Visit, write_json

from skipcal.configs.bench import BenchConfig
from skipcal.runtime.engines.step_proof import Deviation
from skipcal.speed.bench import check_shape, load_subject, run_bench
from skipcal.speed.files import BENCH_FORMAT
from skipcal.speed.table import to_text


def bench(
    visit: Visit, *, settings: dict[str, Any], limit_s: float | None = None, save: str | None = None
) -> Iterator[dict[str, Any]]:
    """Run it. save: name of a file of its own for the result; else it stands in the step's values."""
    config = BenchConfig(**{"device": visit.device, "dtype": visit.dtype, "shape": visit.shape, **settings})
    proofs = _Proofs()
    logger = logging.getLogger("skipcal.runtime.engines.step_engine")
    logger.setLevel(logging.DEBUG)
    logger.addHandler(proofs)
    logging.basicConfig()  # all of it into the log too
    check_shape(config)
    start = time.perf_counter()
    subject = load_subject(config)
    yield {"load_s": time.perf_counter() - start, "proofs": proofs.found, "said": "the model is there"}
    try:
        result = run_bench(config, subject, time_limit_s=limit_s)
    except Exception:
        yield {"proofs": proofs.found}
        raise
    assert result["format"] == BENCH_FORMAT
    print(to_text(result))
    if save is not None:
        write_json(
            visit.output / f"{save}.json", {"command": "python benchmarks/gpu_visit measure", **result}
        )
    (case,) = result["cases"]
    yield {
        "result": result if save is None else None,
        "proofs": proofs.found,
        "rounds": case["rounds"],
        "worst_deviations": proofs.worst(),
        "said": _said(case),
    }
    wanted = {"graph"} if visit.on_gpu else {"graph", "recorded"}
    for arm in case["arms"]:
        if arm["arm"] not in ("plain", "hf-static-compiled") and arm["engine"] not in wanted:
            raise AssertionError(f"{arm['arm']} ran by {arm['engine']}: {arm['engine_reason']}")


class _Proofs(logging.Handler):
    """Keeps the deviations that proofs of prepared steps found."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.found: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        for given in record.args if isinstance(record.args, tuple) else ():
            if isinstance(given, Deviation):
                self.found.append(asdict(given))

    def worst(self) -> dict[str, float]:
        """The largest error of what was compared, layers as one."""
        found: dict[str, float] = {}
        for deviation in self.found:
            name = "a layer" if deviation["of"].startswith("layer") else deviation["of"]
            found[name] = max(found.get(name, 0.0), deviation["error"])
        return found


def _said(case: dict[str, Any]) -> str:
    arms = [arm for arm in case["arms"] if arm["arm"] != "plain"]
    each = [
        f"{arm['skip_ratio']:g} {arm['speed_up_over_full']['median']:.3f}x"
        for arm in arms
        if arm["arm"] == "skipping"
    ]
    full = next(arm for arm in arms if arm["arm"] == "full")
    watching = next(arm for arm in arms if arm["arm"] == "watching")
    eager = sum(arm["eager_passes"] for arm in arms)
    over_plain = full["speed_up_over_plain"]["median"]
    return (
        f"{full['engine']}: full {full['step_ms']['median']:.2f} ms ({over_plain:.2f}x plain), "
        f"watching {watching['step_ms']['median']:.2f}, {', '.join(each)}; {case['rounds']} rounds, "
        f"{eager} eager passes, set-up {watching['setup_s']:.1f} s"
    )
