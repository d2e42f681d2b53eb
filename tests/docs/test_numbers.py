"""Numbers that the pages state by hand are those of the committed results."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pandas as pd
import pytest
from pages import ROOT, text_of

RESULTS = ROOT / "benchmarks" / "results"
ARMS_OF_PEERS = (
    "generate()", "compiled", "skipcal, full", "skipcal, gate", "skipcal, static", "vLLM", "vLLM, gate",
)  # fmt: skip


def rows_of(page: str, first: str) -> Iterator[list[str]]:
    """Cells of the table whose head begins with `first`."""
    table = text_of(page).split(f"\n| {first}", 1)[1].split("\n\n", 1)[0]
    for line in table.splitlines()[2:]:
        yield [cell.strip() for cell in line.strip("|").split("|")]


def made(page: str, mark: str) -> list[list[str]]:
    """Cells of the table that a script has put behind `<!-- mark -->`, below its head."""
    table = text_of(page).split(f"<!-- {mark} -->")[1].split("<!--")[0].strip()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def rounds_to(said: str, value: float) -> bool:
    """Whether a number as it is written is `value`, to the last digit that is written."""
    digits = said.replace(",", "")
    whole, _, decimals = digits.partition(".")
    place = 10.0 ** -len(decimals) if decimals else 10.0 ** (len(whole) - len(whole.rstrip("0")))
    return abs(float(digits) - value) <= 0.5 * place * (1 + 1e-9)


def numbers(text: str) -> list[str]:
    return re.findall(r"-?[\d,]*\d(?:\.\d+)?", text)


def assert_told(said: str, found: dict[str, float], where: object) -> None:
    """A median and, in brackets, its range."""
    expected = [found[name] for name in ("median", "min", "max")]
    assert all(rounds_to(s, e) for s, e in zip(numbers(said), expected, strict=True)), where


@pytest.fixture(scope="module")
def gate() -> pd.DataFrame:
    """The shipped gate's results, and those of other methods; `gate, one map` is what was shipped before."""
    new, old = (pd.read_csv(RESULTS / name / "results.csv") for name in ("smollm2_gate_maps", "smollm2_gate"))
    before = old.method.replace({"gate": "gate, one map"})
    table = pd.concat([new, old.assign(method=before)[before != "static+surrogates"]])
    return table[table.subset == "all"]


def test_the_rounding_is_checked_to_the_last_digit() -> None:
    assert rounds_to("2,310", 2305.2) and not rounds_to("2,310", 2304.9)
    assert rounds_to("0.153", 0.15273) and not rounds_to("0.153", 0.1524)
    assert rounds_to("97.1", 97.0518) and not rounds_to("97.1", 97.16)


def check_loss(cells: list[str], method: str, target: float, gate: pd.DataFrame) -> None:
    """Cells: realised ratio, perplexity, excess loss with its interval."""
    mine: dict[Any, dict[Any, Any]] = (
        gate[(gate.method == method) & (gate.target_skip_ratio == target)]
        .set_index("metric")
        .to_dict("index")
    )
    loss, perplexity = mine["excess_nll"], mine["perplexity"]
    assert rounds_to(cells[0], loss["realised_skip_ratio"]), (method, target)
    assert rounds_to(cells[1], perplexity["value"]), (method, target)
    said = numbers(cells[2])
    expected = [loss["value"], loss["ci_low"], loss["ci_high"]]
    assert all(rounds_to(s, e) for s, e in zip(said, expected, strict=True)), (method, target)


def test_the_readme_tells_what_was_measured_of_quality(gate: pd.DataFrame) -> None:
    rows = list(rows_of("README.md", "method | skips | realised"))
    assert len(rows) == 5
    for first, _skips, *cells in rows:
        check_loss(cells, first.split("`")[1], 0.25, gate)


def test_the_gates_page_tells_what_was_measured(gate: pd.DataFrame) -> None:
    rows = list(rows_of("docs/gate.md", "method | asked for | realised | perplexity (full model: 32.3)"))
    assert len(rows) == 18
    for method, target, *cells in rows:
        check_loss(cells, method.replace("`", ""), float(target), gate)


def test_the_gates_page_tells_what_was_measured_on_qwen() -> None:
    table = pd.read_csv(RESULTS / "qwen_gate" / "results.csv")
    rows = list(rows_of("docs/gate.md", "method | asked for | realised | perplexity (full model: 46.0)"))
    assert len(rows) == 18
    for method, target, *cells in rows:
        check_loss(cells, method.strip("`"), float(target), table[table.subset == "all"])


def test_the_comparison_is_what_was_measured() -> None:
    table = pd.read_csv(RESULTS / "smollm2_comparison" / "results.csv")
    kinds = {
        "perplexity": ("perplexity", "all", "perplexity"),
        "KL, nats/token": ("perplexity", "all", "kl"),
        "FreebaseQA, contains an alias": ("freebaseqa", "all", "contains_answer"),
        "collapsed summaries": ("summarization", "all", "collapse_rate"),
        **{f"ROUGE-L, {size}": ("summarization", size, "rougeL") for size in ("small", "medium", "large")},
    }
    methods = ["full", "ffn-skip", "random", "no-input-adaptive", "static", "shortgpt", "skipdecode"]
    checked = 0
    for kind, target, *cells in rows_of("docs/evaluation.md", "metric | asked for | full"):
        for method, said in zip(methods, cells, strict=True):
            of_kind = (table[["task", "subset", "metric"]] == list(kinds[kind])).all(axis=1)
            found = table[of_kind & (table.method == method)]
            if method != "full":
                found = found[found.target_skip_ratio == float(target)]
            assert len(found) == 1
            assert rounds_to(said, found.value.item()), (kind, target, method)
            checked += 1
    assert checked == 28 * 7


def test_the_readme_tells_what_was_measured_of_speed() -> None:
    words = " ".join(text_of("README.md").split())
    for name, pattern in (
        (
            "cpu_decode_smollm2",
            r"decodes at ([\d.]+)x .*?rounds from ([\d.]+)x to ([\d.]+)x; bytes allow ([\d.]+)x\) "
            r"and ([\d.]+)x plain",
        ),
        (
            "cpu_decode_llama-1b",
            r"billion parameters at ([\d.]+)x \(([\d.]+)x to ([\d.]+)x; bytes allow ([\d.]+)x\) "
            r"and ([\d.]+)x plain",
        ),
    ):
        result = json.loads((RESULTS / f"{name}.json").read_text())
        arm = next(a for a in result["cases"][0]["arms"] if a.get("skip_ratio") == 0.25)
        spread = arm["speed_up_over_full"]
        said = re.search(pattern, words)
        assert said
        plain = arm["speed_up_over_plain"]["median"]
        expected = (spread["median"], spread["min"], spread["max"], arm["ideal_speed_up"], plain)
        assert all(rounds_to(s, e) for s, e in zip(said.groups(), expected, strict=True)), name


def test_the_readme_tells_what_a_gpu_gave() -> None:
    words = " ".join(text_of("README.md").split())
    said = re.search(
        r"Llama-2 7B: ([\d.]+) ms a token with nothing skipped \(([\d.]+) % of .*? FFNs skipped "
        r"([\d.]+)x that speed \(bytes allow ([\d.]+)x\), with a half ([\d.]+)x \(([\d.]+)x\)\. "
        r"The 13B shape: ([\d.]+) ms \(([\d.]+) %\), ([\d.]+)x and ([\d.]+)x",
        words,
    )
    assert said
    expected: list[float] = []
    for shape in ("llama-2-7b", "llama-2-13b"):
        case = json.loads((RESULTS / f"gpu_decode_{shape}.json").read_text())["cases"][0]
        full = next(arm for arm in case["arms"] if arm["arm"] == "full")
        expected += [full["step_ms"]["median"], 100 * full["share_of_copy_bandwidth"]]
        for ratio in (0.25, 0.5):
            arm = next(a for a in case["arms"] if a["arm"] == "skipping" and a["skip_ratio"] == ratio)
            expected.append(arm["speed_up_over_full"]["median"])
            if shape == "llama-2-7b":
                expected.append(arm["ideal_speed_up"])
    assert all(rounds_to(s, e) for s, e in zip(said.groups(), expected, strict=True)), expected


def test_the_three_ratios_are_those_of_the_shipped_profile() -> None:
    profile = json.loads((ROOT / "profiles" / "smollm2-135m-instruct.json").read_text())
    points = {point["target_skip_ratio"]: point for point in profile["operating_points"]}
    rows = list(rows_of("docs/operating-point.md", "target | predicted | realised"))
    assert len(rows) == 5
    for target, *cells in rows:
        point = points[float(target)]
        for said, kind in zip(cells, ("predicted", "realised", "verified"), strict=False):
            assert rounds_to(said, point[f"{kind}_skip_ratio"]), (target, kind)


@pytest.mark.parametrize(("model", "layers", "rank"), [("smollm2", 12, 114), ("qwen", 10, 364)])
def test_the_page_of_fixed_sets_tells_what_was_measured(model: str, layers: int, rank: int) -> None:
    table = pd.read_csv(RESULTS / f"{model}_fixed_sets" / "results.csv")
    losses = table[table.metric == "excess_nll"].to_dict("records")
    of = {
        (row["method"], row["warm_up_tokens"], row["target_skip_ratio"], row["subset"]): row for row in losses
    }
    told = 0
    for method, warm_up, *cells in made("docs/fixed-sets.md", f"sets: {model}_fixed_sets"):
        for target, cell in zip((0.1, 0.25, 0.4), cells, strict=True):
            arm = (method.strip("`"), int(warm_up), target)
            row = of[*arm, "all"]
            expected = [row["value"], row["ci_low"], row["ci_high"]]
            expected += [of[*arm, corpus]["value"] for corpus in ("wikitext", "c4")]
            expected += [row["realised_skip_ratio"]]
            assert all(rounds_to(a, b) for a, b in zip(numbers(cell), expected, strict=True)), arm
            told += 1
    assert told == sum(row["subset"] == "all" and row["method"] != "full" for row in losses)
    fitted = json.loads((RESULTS / f"{model}_fixed_sets" / "fit.json").read_text())["fixed_sets"]
    assert len(fitted["sets"][-1]["layers"]) == layers
    assert (fitted["fit"]["tokens"], fitted["fit"]["rank"]) == (27_216, rank)


def test_the_gate_page_tells_what_was_tried() -> None:
    told = " ".join(text_of("docs/gate.md").split())
    found = json.loads((RESULTS / "gate_inputs.json").read_text())["inputs"]
    alone, all_of_them = found["none"], found["all"]
    assert f"explain {all_of_them['explained']:.3f} of the variance" in told
    assert f"the stream alone explains {alone['explained']:.3f}" in told
    damages = [each["damage_of_its_choice"] for each in (all_of_them, alone)]
    assert f"of {damages[0]:.5f} nats instead of {damages[1]:.5f}" in told
    by_ratio = {
        each["target_skip_ratio"]: each
        for each in json.loads((RESULTS / "text_thresholds_smollm2.json").read_text())["ratios"]
    }
    one, each = (by_ratio[0.4][way] for way in ("one threshold", "one for each"))
    assert f"loses {each['mean']['excess_nll']:.3f} nats a token, and {one['mean']['excess_nll']:.3f}" in told
    assert f"({one['wikitext']['skip_ratio']:.3f} and {one['c4']['skip_ratio']:.3f})" in told
    quarter = [by_ratio[0.25][way]["mean"] for way in ("one for each", "one threshold")]
    losses, ratios = ([f"{row[name]:.3f}" for row in quarter] for name in ("excess_nll", "skip_ratio"))
    assert f"at 0.25 it is {' and '.join(losses)}, at ratios of {' and '.join(ratios)}" in told


def test_the_mutation_scores_that_are_told_are_those_measured() -> None:
    groups = json.loads((ROOT / "tests" / "mutation.json").read_text())["groups"]
    told = (ROOT / "CONTRIBUTING.md").read_text()
    assert set(groups) == {"skip rule", "threshold inversion", "region fit", "statistics merge"}
    for name, found in groups.items():
        assert f"| {name} | {found['mutants']} | {found['killed']} | {found['score']:.3f} |" in told
        assert found["score"] == round(found["killed"] / found["mutants"], 3) >= 0.85


def test_the_serving_page_tells_what_was_counted() -> None:
    result = json.loads((RESULTS / "serving.json").read_text())
    shares = {(each["method"], each["requests"]): each for each in result["batches"]}
    rows = list(rows_of("docs/serving.md", "method | skips"))
    assert len(rows) == len({method for method, _ in shares})
    for method, skips, *cells in rows:
        name = method.strip("`")
        assert all(rounds_to(skips, shares[name, n]["skip_ratio"]) for n in (1, 2, 4, 8)), name
        for requests, said in zip((1, 2, 4, 8), cells, strict=True):
            assert rounds_to(said, shares[name, requests]["unread_ratio"]), (name, requests)
    rows = list(rows_of("docs/serving.md", "method | texts equal"))
    assert {row[0].strip("`") for row in rows} == set(result["compared"])
    for method, texts, skips, off in rows:
        found = result["compared"][method.strip("`")]
        assert texts == f"{found['texts_equal']} of {found['texts']}"
        assert skips == f"{found['skips']:,} / {found['skips_alone']:,}"
        assert off == str(found["largest_difference_of_a_layer"])


def test_the_serving_page_tells_how_fast_it_was() -> None:
    result = json.loads((RESULTS / "serving_speed.json").read_text())
    rows = list(rows_of("docs/serving.md", "decoded by"))
    assert {row[0].strip("`") for row in rows} == set(result["requests"]["1"]) - {"vllm"}
    for arm, *cells in rows:
        for requests, said in zip("128", cells, strict=True):
            found = result["requests"][requests][arm.strip("`")]["over_vllm"]
            assert found["rounds"] == 9
            assert_told(said, found, (arm, requests))
    told, one = " ".join(text_of("docs/serving.md").split()), result["requests"]["1"]
    assert f"of a step that takes {1000 / one['vllm']['tokens_per_s']:.0f} ms" in told
    assert f"{100 * (1 - one['gate, never']['over_vllm']['median']):.1f} % at one request" in told
    assert f"leaves {result['requests']['8']['gate']['unread']:.3f} of the weights unread" in told


@pytest.mark.parametrize(
    ("page", "of_what", "method", "column", "model"),
    [
        ("three-models", "gate_generation", "gate", 1, "smollm2"),
        ("three-models", "gate_generation", "gate", 2, "qwen"),
        ("three-models", "gate_generation", "gate", 3, "gemma"),
        ("fixed-sets", "fixed_sets_generation", "static+fitted", 1, "smollm2"),
        ("fixed-sets", "fixed_sets_generation", "static+fitted", 2, "qwen"),
    ],
)
def test_pages_tell_what_answers_lose(page: str, of_what: str, method: str, column: int, model: str) -> None:
    table = pd.read_csv(RESULTS / f"{model}_{of_what}" / "results.csv")
    rows = made(f"docs/{page}.md", f"answers: {of_what}")
    names = {
        "equal tokens": "token_agreement", "collapsed": "collapse_rate",
        "contains an alias": "contains_answer", "ROUGE-L": "rougeL",
    }  # fmt: skip
    tasks = iter(("continuation", "freebaseqa", "summarization"))
    task = ""
    for label, *cells in rows:
        cell = cells[column - 1]
        if label.startswith("**"):
            task = next(tasks)
        if cell == "-":
            assert (model, task) in {("gemma", "freebaseqa"), ("gemma", "summarization")}
            continue
        found = table[(table.task == task) & (table.subset == "all")].to_dict("records")
        of: dict[tuple[str, str], dict[Any, Any]] = {(row["method"], row["metric"]): row for row in found}
        said = numbers(cell)
        if label.startswith("**"):
            row = of[method, "collapse_rate"]
            expected = [row["realised_skip_ratio"], row["n"]]
        elif label == "equal tokens":
            row = of[method, names[label]]
            expected = [row["value"], row["ci_low"], row["ci_high"]]
        else:
            full, row = (of[each, names[label]] for each in ("full", method))
            ends = ("difference", "difference_ci_low", "difference_ci_high")
            expected = [full["value"], row["value"], *(row[end] for end in ends)]
        assert all(rounds_to(a, b) for a, b in zip(said, expected, strict=True)), (label, said, expected)


def test_the_speed_page_tells_what_else_decodes_one_request() -> None:
    rows = list(rows_of("docs/speed.md", "decoded by"))
    for place, dtype in ((1, "float32"), (4, "bfloat16")):
        result = json.loads((RESULTS / f"cpu_peers_{dtype}.json").read_text())
        for row, arm in zip(rows, ARMS_OF_PEERS, strict=True):
            found, (skipped, speed, over) = result["arms"][arm], row[place : place + 3]
            assert skipped == "-" if found["skip_ratio"] is None else rounds_to(skipped, found["skip_ratio"])
            assert rounds_to(speed, found["tokens_per_s"])
            assert_told(over, found["over_generate"], arm)
        assert {*ARMS_OF_PEERS} == result["arms"].keys()
        assert f"ranges of {found['over_generate']['rounds']} rounds" in text_of("docs/speed.md")


def test_the_speed_page_tells_what_bfloat16_gains() -> None:
    models = json.loads((RESULTS / "cpu_dtypes.json").read_text())["models"]
    arms = ("plain", "full, eager", "gate, eager", "full, recorded", "gate, recorded")
    places = [(model, arm) for model in ("smollm2", "llama-1b") for arm in arms]
    for (_, _, *times, over), (model, arm) in zip(rows_of("docs/speed.md", "model | "), places, strict=True):
        found = models[model]
        for said, dtype in zip(times, ("float32", "bfloat16"), strict=True):
            assert rounds_to(said, found[dtype]["arms"][arm]["step_ms"])
        assert_told(over, found["bfloat16"]["arms"][arm]["over_float32"], (model, arm))
    gates = [models[model]["bfloat16"]["arms"]["gate, recorded"] for model in ("smollm2", "llama-1b")]
    gains = [gate["over_full"]["median"] for gate in gates]
    told = re.search(r"FFNs gain ([\d.]+)x and ([\d.]+)x over", " ".join(text_of("docs/speed.md").split()))
    assert told and all(rounds_to(s, e) for s, e in zip(told.groups(), gains, strict=True))


def test_the_serving_page_tells_what_an_exported_model_writes_and_loses() -> None:
    found = json.loads((RESULTS / "exported.json").read_text())
    told = " ".join(text_of("docs/serving.md").split())
    both = [found["vllm_without_the_plug_in"], found["transformers"]]
    assert all(each["texts_equal"] == each["texts"] == 12 for each in both)
    assert f"writes 12 of 12 texts of {found['new_tokens']} tokens alike" in told
    assert f"the full model writes {found['oracle_and_full_model']['texts_equal']} of 12" in told
    loss = found["loss"]
    assert (loss["windows"], loss["window_tokens"]) == (8, 256)
    assert f"{loss['oracle']:.3f}" == f"{loss['exported, transformers']:.3f}"
    assert f"{loss['oracle']:.3f} with zeros in transformers and exported" in told
    assert f"{loss['skipcal, teacher-forced, prompt_tokens 1']:.3f} teacher-forced in skipcal" in told
    assert f"{loss['full']:.3f} the full model" in told
    assert f"FFNs of {len(found['layers_left_out'])} of 30 layers" in told
    assert ", ".join(map(str, found["layers_left_out"])) in told
    left_out, instead = (f"{found[name] / 1e6:.1f} MB" for name in ("bytes_left_out", "bytes_instead"))
    assert f"{left_out} less; zeros in their place: {instead}" in told


def test_the_serving_page_tells_how_evaluations_compare() -> None:
    found = json.loads((RESULTS / "evaluate_engines.json").read_text())["compared"]
    gate, full = found["gate"], found["full"]
    assert gate["largest_difference_of_a_layer"] == 0 and gate["skips"]["eager"] == gate["skips"]["vllm"]
    told = " ".join(text_of("docs/serving.md").split())
    assert f"{gate['records']} questions of FreebaseQA" in told
    texts = [f"{each['texts_equal']} of {each['records']}" for each in (gate, full)]
    assert f"{texts[0]} texts are equal with the gate and {texts[1]} with the full model" in told
    assert f"the skips in every layer, {gate['skips']['vllm']:,} in all" in told


def test_the_serving_page_tells_of_the_served_run() -> None:
    result = json.loads((RESULTS / "served_run.json").read_text())
    found = {each["asked"]: each for each in result["compared"]["by_target"]}
    rows = list(rows_of("docs/serving.md", "asked for"))
    for (asked, *cells), (target, each) in zip(rows, found.items(), strict=True):
        assert asked.split(":")[0] == ("nothing" if target is None else f"{target:g}")
        assert cells[:3] == [str(each[name]) for name in ("answers", "texts_equal", "counts_equal")]
        assert cells[3] == "-" if each["skip_ratio"] is None else rounds_to(cells[3], each["skip_ratio"])
    every, second = result["compared"]["all"], result["compared"]["second_turns"]
    assert (every["answers"], every["near_ties"], every["wrong"]) == (200, 0, 0)
    assert second["answers"] == second["texts_equal"] == second["counts_equal"] == 40
    lost, told = result["lost_when_killed"], " ".join(text_of("docs/serving.md").split())
    assert f"(SIGKILL) with {lost} requests running" in told and lost > 0
    assert result["counts_from_zero_after_restart"]
    assert all(life["requests_add_up"] and life["metrics_agree"] for life in result["lives"])
