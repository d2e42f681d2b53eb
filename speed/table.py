"""A measurement as a frame, as text for the terminal, and as a table for the documentation."""

from __future__ import annotations

from typing import Any

import pandas as pd

from skipcal.configs.fit import SURROGATE_BUDGET

_SPREADS = ("step_ms", "prefill_s", "speed_up_over_full", "speed_up_over_plain")


def to_frame(result: dict[str, Any]) -> pd.DataFrame:
    """One row an arm and case: medians under the names of the JSON, ranges as NAME_min and NAME_max."""
    rows = []
    for case in result["cases"]:
        for arm in case["arms"]:
            row = {"comparable": True, **arm}  # results from before it was told
            row = {k: v for k, v in row.items() if k not in (*_SPREADS, "skips")}
            row |= {key: case[key] for key in ("batch_size", "context_tokens", "new_tokens")}
            for name in _SPREADS:
                row |= {
                    name: arm[name]["median"],
                    f"{name}_min": arm[name]["min"],
                    f"{name}_max": arm[name]["max"],
                }
            rows.append(row)
    return pd.DataFrame(rows)


def to_text(result: dict[str, Any]) -> str:
    """What was measured, for the terminal."""
    model, bandwidth = result["model"], result["copy_gb_per_s"]
    lines = [
        f"{model['name']}, {model['num_layers']} layers, {model['parameters'] / 1e6:,.1f} M parameters, "
        f"{model['dtype']}, {machine(result)}",
        *([result["note"]] if result["note"] else []),
        f"rule {_rule(result)}",
        f"copy bandwidth {bandwidth['median']:.1f} GB/s ({bandwidth['min']:.1f} to {bandwidth['max']:.1f})",
    ]
    for case in result["cases"]:
        lines += ["", *_case_lines(case)]
    if result["peers"]:
        lines += ["", f"peers: {result['peers']}"]
    return "\n".join(lines)


def to_markdown(result: dict[str, Any]) -> str:
    """The skipping arms of every case, with the conditions they were measured under."""
    model, env, settings = result["model"], result["environment"], result["settings"]
    weights = "random weights" if result["model"]["random_weights"] else "its own weights"
    lines = [
        f"{model['name']} ({model['parameters'] / 1e6:,.0f} M parameters, {weights}) in {model['dtype']}, "
        f"greedy, rule {_rule(result)}; {machine(result)}, torch {env['torch']}, "
        f"transformers {env['transformers']}; copy bandwidth {result['copy_gb_per_s']['median']:.1f} GB/s; "
        f"medians over {settings['new_tokens'] - 1} steps of each of {result['cases'][0]['rounds']} "
        "interleaved rounds; a speed-up is the median of the rounds' own, in brackets their range.",
        "",
        "| batch | context | FFNs skipped | ms/token | tokens/s | ideal by bytes | over its own full model "
        "| of the ideal | over plain `generate()` |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case in result["cases"]:
        place = f"| {case['batch_size']} | {case['context_tokens']} |"
        for arm in case["arms"]:
            label = f"{arm['skip_ratio']:g}" if arm["arm"] == "skipping" else f"0 ({arm['arm']})"
            label += _mark(arm)
            own, plain = arm["speed_up_over_full"], arm["speed_up_over_plain"]
            lines.append(
                f"{place} {label} | {arm['step_ms']['median']:.2f} | {arm['tok_per_s']:.1f} | "
                f"{arm['ideal_speed_up']:.3f}x | {_ranged(own)} | {arm['realised_over_ideal']:.3f} | "
                f"{_ranged(plain)} |"
            )
    even = [
        f"batch {case['batch_size']}, context {case['context_tokens']}: {break_even_said(case)}"
        for case in result["cases"]
    ]
    notes = [text for case in result["cases"] for note in _notes(case) for text in ("", rf"\{note}")]
    return "\n".join([*lines, *notes, "", f"Break-even skip ratio: {'; '.join(even)}."])


def break_even_said(case: dict[str, Any]) -> str:
    """The break-even skip ratio of a case, or why there is none."""
    ratio, reason = case["break_even"]["skip_ratio"], case["break_even"]["reason"]
    return f"none, {reason}" if ratio is None else f"{ratio:.3f} ({reason})"


def machine(result: dict[str, Any]) -> str:
    """The device and what drives it, in words."""
    env = result["environment"]
    threads = env["torch_threads"]
    return str(env["gpu"]) if "gpu" in env else f"{threads} thread{'s' * (threads > 1)} of {env['cpu']}"


def _rule(result: dict[str, Any]) -> str:
    """What decides, in words."""
    settings = result["settings"]
    if settings.get("profile") is not None:
        return f"gate with the surrogates of {settings['profile']}"
    if settings.get("rule") == "gate":
        return f"gate, random, with surrogates of {100 * SURROGATE_BUDGET:g} % of an FFN's bytes"
    return "cosine"


def _case_lines(case: dict[str, Any]) -> list[str]:
    read = case["weight_bytes_per_step"] / 1e9, case["kv_cache_bytes_per_step"] / 1e9
    prefill = next(arm for arm in case["arms"] if arm["arm"] == "full")["prefill_s"]["median"]
    lines = [
        f"batch {case['batch_size']}, context {case['context_tokens']}, {case['new_tokens']} new tokens, "
        f"{case['rounds']} rounds: the full model reads {read[0]:.3g} GB of weights and {read[1]:.3g} GB of "
        f"KV cache a step; prefill {prefill * 1e3:.1f} ms",
        f"{'arm':<21}{'ms/token':>9}{'min':>9}{'max':>9}{'tok/s':>9}{'GB':>9}{'of copy':>9}{'ideal':>8}"
        f"{'over full':>11}{'of ideal':>10}{'over plain':>12}",
    ]
    for arm in case["arms"]:
        label = _name(arm) + _mark(arm)
        step = arm["step_ms"]
        lines.append(
            f"{label:<21}{step['median']:>9.3f}{step['min']:>9.3f}{step['max']:>9.3f}{arm['tok_per_s']:>9.1f}"
            f"{arm['bytes_per_step'] / 1e9:>9.3g}{arm['share_of_copy_bandwidth']:>9.2f}"
            f"{arm['ideal_speed_up']:>8.3f}{arm['speed_up_over_full']['median']:>11.3f}"
            f"{arm['realised_over_ideal']:>10.3f}{arm['speed_up_over_plain']['median']:>12.3f}"
        )
    engine = next(arm for arm in case["arms"] if arm["arm"] == "skipping")
    return [
        *lines,
        *_notes(case),
        f"engine {engine['engine']} ({engine['engine_reason']})",
        f"break-even skip ratio: {break_even_said(case)}",
    ]


def _name(arm: dict[str, Any]) -> str:
    return f"skipping {arm['skip_ratio']:g}" if arm["arm"] == "skipping" else str(arm["arm"])


def _mark(arm: dict[str, Any]) -> str:
    return "" if arm.get("comparable", True) else " *"


def _notes(case: dict[str, Any]) -> list[str]:
    """What is wrong with the rows that are marked."""
    return [
        f"* {_name(arm)} cannot be compared: of its passes {arm['prepared_passes']} were prepared and "
        f"{arm['eager_passes']} eager ({arm['engine_reason']})"
        for arm in case["arms"]
        if _mark(arm)
    ]


def _ranged(values: dict[str, float]) -> str:
    return f"{values['median']:.3f}x ({values['min']:.2f} to {values['max']:.2f})"
