"""The page in a browser shows the profile's numbers, and harms nobody."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from documents import corpus, document, gate_document, statistics, tuned_document
from token_maps import PIECES, made_map

from skipcal.errors import ConfigError, OutputExists, ProfileMismatch
from skipcal.evaluation.token_map import TokenMap
from skipcal.profiles.schema import SkipProfile
from skipcal.profiles.summary import summarize
from skipcal.report.page import report_html, script_json, write_report

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>%{x}<b>&lt;</b>"


@pytest.fixture(scope="module")
def shipped() -> SkipProfile:
    return SkipProfile.load("smollm2-135m-instruct")


@pytest.fixture(scope="module")
def tokens(shipped: SkipProfile) -> TokenMap:
    return made_map((*PIECES, *[" word"] * 60), layers=shipped.model.num_layers)


@pytest.fixture(scope="module")
def whole(shipped: SkipProfile, tokens: TokenMap, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(shipped, path, token_map=tokens)
    return path


def profile(found: dict[str, Any]) -> SkipProfile:
    return SkipProfile.model_validate_json(json.dumps(found))


def written(path: Path, found: dict[str, Any], token_map: TokenMap | None = None) -> Path:
    write_report(profile(found), path, token_map=token_map)
    return path


def traces(page: Any, chart: str) -> list[dict[str, Any]]:
    """What plotly was given."""
    found: list[dict[str, Any]] = page.evaluate(
        f"""document.getElementById("{chart}").data.map(({{type, name, x, y, z, visible, meta}}) =>
            ({{type, name, x, y, z, visible, meta}}))"""
    )
    return found


def cells(page: Any, table: str) -> list[list[str]]:
    found: list[list[str]] = page.evaluate(
        f"""[...document.querySelectorAll("#table-{table} tbody tr")].map((row) =>
            [...row.cells].map((cell) => cell.textContent))"""
    )
    return found


def point_at(page: Any, chart: str, x: float, y: float) -> str:
    """Move the mouse to a place of a chart's axes; what the chart then says."""
    box = page.evaluate(
        f"""(() => {{
            const chart = document.getElementById("{chart}");
            chart.scrollIntoView({{block: "center", behavior: "instant"}});
            const {{left, top}} = chart.getBoundingClientRect();
            const {{xaxis, yaxis}} = chart._fullLayout;
            return [left + xaxis._offset + xaxis.l2p({x}), top + yaxis._offset + yaxis.l2p({y})];
        }})()"""
    )
    page.mouse.move(box[0] - 3, box[1] - 3)
    page.mouse.move(*box)
    label = page.locator(f"#{chart} .hoverlayer .hovertext")
    label.first.wait_for()
    return " ".join(label.first.text_content().split())


def test_each_corpus_has_its_curve_and_a_box_hides_it(shipped: SkipProfile, page: Any) -> None:
    curves = {t["name"]: t for t in traces(page, "saturation") if t["meta"]}
    assert set(curves) == set(shipped.layers) == {"wikitext", "c4", "pooled"}
    for name, curve in curves.items():
        assert curve["y"] == shipped.layers[name].mean
        assert curve["visible"] is (name != "pooled")
    drawn = page.locator("#saturation .scatterlayer .trace .point")
    layers = shipped.model.num_layers
    assert drawn.count() == 2 * layers
    page.locator("#corpora").get_by_label("c4").uncheck()
    assert drawn.count() == layers
    assert [t["name"] for t in traces(page, "saturation") if t["meta"] and t["visible"]] == ["wikitext"]
    page.locator("#corpora").get_by_label("pooled").press("Space")  # by the keyboard alone
    assert drawn.count() == 2 * layers
    page.locator("#corpora").get_by_label("pooled").uncheck()
    page.locator("#corpora").get_by_label("c4").check()
    assert drawn.count() == 2 * layers


def test_pointing_at_the_curve_tells_the_profiles_numbers(shipped: SkipProfile, page: Any) -> None:
    page.locator("#corpora").get_by_label("c4").uncheck()
    page.get_by_role("button", name="zoom to the region").first.click()
    found = shipped.layers["wikitext"]
    told = point_at(page, "saturation", 7, found.mean[7])
    assert told.startswith("wikitext, layer 7")
    for name, value in (("mean", found.mean), ("q05", found.q05), ("median", found.q50), ("q95", found.q95)):
        assert f"{name} {value[7]:.4f}" in told
    page.get_by_role("button", name="zoom to the region").first.click()
    page.locator("#corpora").get_by_label("c4").check()


def test_zoom_and_band_follow_the_controls(shipped: SkipProfile, page: Any) -> None:
    policy = shipped.cosine_policy
    axis = "document.getElementById('saturation')._fullLayout"
    button = page.get_by_role("button", name="zoom to the region").first
    button.click()
    assert button.get_attribute("aria-pressed") == "true"
    assert page.evaluate(f"{axis}.xaxis.range") == [policy.cold_s - 0.5, policy.cold_e - 0.5]
    low, high = page.evaluate(f"{axis}.yaxis.range")
    assert 0.9 < low < policy.threshold < high
    page.get_by_label("band").select_option("q05,q95")
    bands = [t["y"] for t in traces(page, "saturation") if not t["meta"]]
    assert bands[:2] == [shipped.layers["wikitext"].q05, shipped.layers["wikitext"].q95]
    assert page.evaluate(f"{axis}.yaxis.range")[0] < low
    page.get_by_label("band").select_option("")
    assert all(t["meta"] for t in traces(page, "saturation"))
    button.click()
    assert page.evaluate(f"{axis}.xaxis.range") == [-0.5, shipped.model.num_layers - 0.5]


def test_the_regions_and_the_threshold_are_the_policys(shipped: SkipProfile, page: Any) -> None:
    shapes = page.evaluate("document.getElementById('saturation').layout.shapes.map(s => [s.x0, s.x1, s.y0])")
    policy = shipped.cosine_policy
    assert shapes == [
        [-0.5, policy.cold_s - 0.5, 0],
        [policy.cold_s - 0.5, policy.cold_e - 0.5, 0],
        [policy.cold_e - 0.5, shipped.model.num_layers - 0.5, 0],
        [0, 1, policy.threshold],
    ]


def test_distributions_are_shares_of_the_histograms(shipped: SkipProfile, page: Any) -> None:
    page.get_by_label("corpus").last.select_option(label="c4")
    (heat,) = traces(page, "histogram")
    counts = np.asarray(shipped.layers["c4"].histogram)
    first = int(np.flatnonzero(counts.sum(axis=0))[0])
    expected = counts.T[first : first + len(heat["y"])] / counts.sum(axis=1)
    np.testing.assert_allclose(heat["z"], expected)
    np.testing.assert_allclose(heat["y"][0], -1 + (first + 0.5) / 100)
    assert expected.sum() == pytest.approx(shipped.model.num_layers)
    place = int(expected[:, 9].argmax())
    told = point_at(page, "histogram", 9, heat["y"][place])
    assert f"share {expected[place, 9]:.4f}, {counts[9, first + place]} tokens" in told


def test_tables_and_points_are_the_profiles(shipped: SkipProfile, page: Any) -> None:
    assert cells(page, "points") == [
        [
            f"{p.target_skip_ratio:g}", f"{p.threshold:.6f}", f"{p.predicted_skip_ratio:.3f}",
            f"{p.realised_skip_ratio:.3f}",
            "-" if p.verified_skip_ratio is None else f"{p.verified_skip_ratio:.3f}",
        ]
        for p in shipped.operating_points
    ]  # fmt: skip
    assert shipped.gate is not None
    rows = cells(page, "gate-points")
    assert [row[0] for row in rows] == [f"{p.target_skip_ratio:g}" for p in shipped.gate.operating_points]
    for row, point in zip(rows, shipped.gate.operating_points, strict=True):
        assert row[3:] == [f"{v:.3f}" for v in (point.realised_skip_ratio, *point.by_corpus.values())]
    marked = page.evaluate("[...document.querySelectorAll('tr.policy')].map(r => r.cells[1].textContent)")
    assert marked == [f"{shipped.policy.threshold:.3f}"]  # type: ignore[union-attr]
    lines = {t["name"]: t for t in traces(page, "points")}
    assert lines["held-out"]["y"] == [p.verified_skip_ratio for p in shipped.operating_points]
    assert lines["realised"]["y"] == [p.realised_skip_ratio for p in shipped.operating_points]
    assert lines["realised"]["x"] == [p.target_skip_ratio for p in shipped.operating_points]
    layers = cells(page, "layers")
    pooled = shipped.layers["pooled"]
    assert [float(row[1]) for row in layers] == pytest.approx(pooled.mean, abs=5e-5)
    assert [float(row[10]) for row in layers] == pytest.approx(pooled.block_influence, abs=5e-5)
    norm, influence = traces(page, "contribution")
    assert (norm["y"], influence["y"]) == (pooled.norm_ratio_mean, pooled.block_influence)
    r2, error = traces(page, "gate")
    assert (r2["x"], r2["y"]) == (shipped.gate.layers, shipped.gate.fit.gate_r_squared)
    assert error["y"] == shipped.gate.fit.surrogate_error


def test_provenance_is_whole(shipped: SkipProfile, page: Any) -> None:
    text = page.locator("#origin").text_content()
    for value in (
        shipped.model.name, shipped.model.fingerprint, shipped.environment.created_at,
        *(str(c.sha256) for c in shipped.calibration.corpora), summarize(shipped, by_layer=True),
    ):  # fmt: skip
        assert value in text
    assert json.loads(page.locator("#origin pre").first.text_content()) == shipped.config
    warnings = [text.removeprefix("warning ") for text in page.locator("p.warning").all_text_contents()]
    assert [w for w in warnings if "JavaScript" not in w] == shipped.regions.warnings


def test_the_heat_map_is_the_token_map(tokens: TokenMap, page: Any) -> None:
    heat, marks = traces(page, "tokens")
    np.testing.assert_array_equal(np.asarray(heat["z"], dtype=np.float32), tokens.cosine.T)
    assert sorted(zip(marks["x"], marks["y"], strict=True)) == [
        (int(token), int(layer)) for token, layer in np.argwhere(tokens.skipped)
    ]
    told = point_at(page, "tokens", 3, 5)
    assert told.startswith("token 3 “⏎”, decodedlayer 5, FFN skipped")
    assert told.endswith(f"full model {tokens.cosine[3, 5]:.4f}")
    spans = page.locator(".skipcal-text span").all_text_contents()
    assert spans == [piece.replace("\x00", "\ufffd") for piece in tokens.pieces]
    rows = cells(page, "tokens")
    assert [int(row[3]) for row in rows] == tokens.skipped.sum(axis=1).tolist()
    assert [row[2] for row in rows] == list(tokens.parts)
    assert rows[3][4] == f"1 to {tokens.cosine.shape[1] - 2}"


def test_the_charts_buttons_save_and_zoom_and_send_nothing(page: Any) -> None:
    titles = page.evaluate("[...document.querySelectorAll('.modebar-btn')].map(b => b.dataset.title)")
    assert set(titles) == {
        "Download plot as a PNG", "Zoom", "Pan", "Zoom in", "Zoom out", "Autoscale", "Reset axes",
    }  # fmt: skip
    page.locator("#saturation").hover()
    with page.expect_download() as download:
        page.locator("#saturation .modebar-btn").first.click()
    assert download.value.path().read_bytes().startswith(b"\x89PNG")


VARIANTS = {
    "least": document(),
    "gate": gate_document(),
    "tuned": tuned_document(),
    "full model": document(
        policy={**document()["policy"], "threshold": 2.0, "cold_s": 1, "cold_e": 1},
        regions={**document()["regions"], "cold_s": 1, "cold_e": 1, "fit_r2": None, "cold_s_interval": None},
        operating_points=[],
    ),
    "many corpora and layers": {
        **document(80),
        "layers": {name: statistics(80) for name in ("pooled", "a", "b", "c", "d", "e" * 40)},
        "model": {**document(80)["model"], "name": "organisation/" + "a-very-long-model-name" * 5},
        "calibration": {**document()["calibration"], "corpora": [corpus(n) for n in ("d", "a", "e" * 40)]},
    },
    "prefill": {
        **document(),
        "layers": {"pooled": {**statistics(), "block_influence": None}},
        "calibration": {
            **document()["calibration"], "mode": "prefill", "closed_loop": None, "corpora": [corpus()],
        },
    },
}  # fmt: skip

REALISED = "{} realised, of all FFN blocks after the warm-up"
SKIPS = {
    "least": REALISED.format("0.100"),
    "gate": REALISED.format("0.200"),
    "tuned": "0.250 in the search, of all FFN blocks after the warm-up",
    "full model": "nothing",
    "many corpora and layers": REALISED.format("0.100"),
    "prefill": REALISED.format("0.100"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_kind_of_profile_fits_a_narrow_screen(tmp_path: Path, name: str, open_page: Any) -> None:
    found = VARIANTS[name]
    many = made_map(("x", *("word" for _ in range(60))), layers=found["model"]["num_layers"])
    page = open_page(written(tmp_path / "page.html", found, many), width=400, dark=name == "gate")
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    assert page.evaluate("[...document.querySelectorAll('.chart')].every(c => c.querySelector('svg'))")
    assert page.locator("h1").text_content() == found["model"]["name"]
    assert page.locator("dd").nth(1).text_content() == SKIPS[name]


def test_a_search_is_drawn_with_its_intervals(tmp_path: Path, open_page: Any) -> None:
    found = tuned_document()
    point = found["tuning"]["points"][0]
    lost = {**point, "on_front": False}
    found["tuning"]["points"] = [
        point,
        {**lost, "line": "random", "rule": "random", "kl": 0.5, "kl_low": 0.4, "kl_high": 0.7},
        {
            **lost,
            "line": "cosine",
            "rule": "cosine",
            "kl": 0.6,
            "skip_ratio_all": 0.3,
            "loses_to_random": True,
        },
    ]
    page = open_page(written(tmp_path / "page.html", found))
    lines = {t["name"]: t for t in traces(page, "tuning")}
    assert {name: (t["x"], t["y"]) for name, t in lines.items()} == {
        "static": ([0.2], [0.125]),
        "random": ([0.2], [0.5]),
        "cosine": ([0.3], [0.6]),
        "chosen": ([0.2], [0.125]),
    }
    bars = page.evaluate(
        "document.getElementById('tuning').data[1].error_y.arrayminus.map(v => Math.round(1e6 * v) / 1e6)"
    )
    assert bars == [0.1]
    rows = cells(page, "tuning")
    assert [row[0] for row in rows] == ["static", "random", "cosine"]
    assert rows[0][4:6] == ["0.1250", "0.1000 to 0.1500"]
    assert [row[-1] for row in rows] == ["front", "", "loses to random"]
    assert "Budget: KL 0.5; over 4 windows" in page.locator("#search").text_content()


def test_text_of_a_profile_is_never_markup(tmp_path: Path, open_page: Any) -> None:
    found = gate_document(
        model={**document()["model"], "name": HOSTILE},
        config={"data_files": [HOSTILE]},
        regions={**document()["regions"], "warnings": [HOSTILE]},
        calibration={**document()["calibration"], "corpora": [corpus(HOSTILE)]},
    )
    found["layers"] = {"pooled": statistics(), HOSTILE: statistics()}
    for point in found["gate"]["operating_points"]:
        point["by_corpus"] = {HOSTILE: 0.1}
    page = open_page(written(tmp_path / "page.html", found, made_map(("x", HOSTILE, "<b>", "y", "z"), 4)))
    assert page.locator("h1").text_content() == HOSTILE
    assert page.locator("#corpora label").first.text_content() == HOSTILE
    assert page.locator("img, [onerror], h1 *").count() == 0
    assert page.locator("script").count() == 3
    assert point_at(page, "saturation", 1, 0.5).startswith(f"{HOSTILE}, layer 1")
    assert page.locator(".skipcal-text span").nth(1).text_content() == HOSTILE


def test_the_theme_follows_the_reader(whole: Path, open_page: Any) -> None:
    page = open_page(whole, width=720, dark=True)  # an A4 page without its margins
    ink = "document.getElementById('saturation').layout.font.color"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 24, 31)"
    assert page.evaluate(ink) == "#e4e8ee"
    for scheme, media, expected in (
        ("light", "screen", "#1c2430"),
        ("dark", "screen", "#e4e8ee"),
        ("dark", "print", "#1c2430"),  # paper is white
    ):
        page.emulate_media(color_scheme=scheme, media=media)
        for _ in range(200):
            if page.evaluate(ink) == expected:
                break
            page.wait_for_timeout(50)
        assert page.evaluate(ink) == expected
    assert page.locator("nav").is_hidden()
    legend = page.locator("#corpora label")
    assert [label.text_content() for label in legend.all() if label.is_visible()] == ["wikitext", "c4"]
    assert page.evaluate("document.documentElement.scrollWidth") <= 720
    page.emulate_media(media="screen")
    assert page.locator("nav").is_visible()


def test_the_same_profile_gives_the_same_file(
    tmp_path: Path, shipped: SkipProfile, tokens: TokenMap, whole: Path
) -> None:
    write_report(shipped, tmp_path / "again.html", token_map=tokens)
    assert (tmp_path / "again.html").read_bytes() == whole.read_bytes()
    with pytest.raises(OutputExists):
        write_report(shipped, tmp_path / "again.html")
    write_report(shipped, tmp_path / "again.html", overwrite=True)
    assert (
        "skipcal-tokens" not in (tmp_path / "again.html").read_text().split("</style>")[1].split("<script")[0]
    )
    assert [p.name for p in tmp_path.iterdir()] == ["again.html"]


def test_what_does_not_fit_is_refused(tmp_path: Path, shipped: SkipProfile) -> None:
    with pytest.raises(ConfigError, match=r"ending '.pdf' is not .html; try a.html"):
        write_report(shipped, tmp_path / "a.pdf")
    with pytest.raises(ProfileMismatch, match="the token map has 5 layers, the profile 30"):
        report_html(shipped, made_map(layers=5))
    assert not list(tmp_path.iterdir())


def test_json_in_a_script_cannot_end_it() -> None:
    value = {"a": "</script><!--&", "b": ["\u2028", 0.1, None]}
    text = script_json(value)
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == value
    with pytest.raises(ValueError, match="not JSON compliant"):
        script_json(float("nan"))
