"""`skipcal fit`, and what the other commands make of its profile."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import refused, run
from conftest import lively

from skipcal.arch.loading import LoadedModel
from skipcal.profiles.schema import SkipProfile


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory,
    worded: LoadedModel,
    worded_text: Path,
    worded_profile: SkipProfile,
    gated: SkipProfile,
) -> Path:
    """The model on disk, its text, its profile without and with a gate."""
    folder = tmp_path_factory.mktemp("fit")
    worded.model.save_pretrained(folder / "tiny")
    worded.tokenizer.save_pretrained(folder / "tiny")
    shutil.copy(worded_text, folder / "words.txt")
    worded_profile.save(folder / "p.json")
    gated.save(folder / "gated.json")
    return folder


@pytest.fixture
def here(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for path in place.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


MODEL = ("--model", "tiny", "--device", "cpu")
QUICK = (
    "fit", *MODEL, "--profile", "p.json", "--data-files", "words.txt", "--prompts", "20", "--prompt-tokens",
    "24", "--rank", "3", "--damage-prompts", "4", "--closed-loop-prompts", "10",
)  # fmt: skip
GATED = (*MODEL, "--profile", "gated.json")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# What works


def test_fit_writes_a_profile_and_its_tensors(here: Path, gated: SkipProfile) -> None:
    before = names(here)
    done = run(*QUICK, "-o", "new.json")
    assert names(here) - before == {"new.json", "new.surrogates.safetensors"}
    found = SkipProfile.load("new.json")
    assert found.tensors().sha256 == gated.tensors().sha256, "the library and the command fit alike"
    assert found.gate is not None and gated.gate is not None
    assert found.gate.operating_points == gated.gate.operating_points
    assert found.gate.fit.config["model"] == "tiny"
    assert "gate          the policy's rule, in 6 layers: 1 to 6" in done.stdout
    assert "wrote new.json and new.surrogates.safetensors; next: skipcal evaluate" in done.stdout
    assert done.stderr == ""


def test_json_is_the_profile_and_nothing_else(here: Path) -> None:
    done = run(*QUICK, "--sweeps", "0", "--json")
    path = here / "profiles" / "tiny-gate.json"  # the default place
    assert done.stdout == path.read_text()
    assert json.loads(done.stdout)["policy"]["tensors"] == "tiny-gate.surrogates.safetensors"
    assert names(path.parent) == {"tiny-gate.json", "tiny-gate.surrogates.safetensors"}


def test_options_and_a_configuration_file_reach_the_fit(here: Path) -> None:
    (here / "fit.yaml").write_text("sweeps: 0\nseed: 5\noutput: from file.json\n")
    args = [a for a in QUICK if a not in ("--rank", "3")]
    run(
        *args, "--config", "fit.yaml", "--seed", "8", "--surrogate-budget", "0.1", "--damage",
        "relative-error", "--target-skip-ratio", "0.33", "--batch-size", "3", "--dtype", "float32",
        "--maps", "2",
    )  # fmt: skip
    found = SkipProfile.load("from file.json")
    assert found.gate is not None
    fit = found.gate.fit
    assert (fit.seed, fit.damage, len(fit.sweeps)) == (8, "relative-error", 1)
    assert (fit.rank, fit.maps) == (5, 2)  # (0.1 * 4640 - 32 - 2 * 33) // 64
    assert fit.surrogate_share <= 0.1
    assert getattr(found.policy, "threshold", None) == found.gate_policy(0.33).threshold
    assert {k: fit.config[k] for k in ("batch_size", "dtype", "profile")} == {
        "batch_size": 3, "dtype": "float32", "profile": "p.json",
    }  # fmt: skip
    assert (here / "from-file.surrogates.safetensors").is_file()


def test_show_and_plot_know_the_gate(here: Path) -> None:
    out = run("show", "gated.json").stdout
    assert max(map(len, out.splitlines())) <= 80
    assert out.count("<- policy") == 1
    assert "sweeps        3, skipping 0.000, " in out
    assert json.loads(run("show", "gated.json", "--json").stdout)["policy"]["rule"] == "gate"
    run("plot", "gated.json", "-o", "g.svg")
    assert (here / "g.svg").stat().st_size > 1000


def test_generate_skips_by_the_gate(here: Path) -> None:
    ask = ("generate", *GATED, "--prompt", "w3 w4 w5", "--new-tokens", "14", "--json")
    report = json.loads(run(*ask, "--target-skip-ratio", "0.4").stdout)["report"]
    assert report["method"] == "gate"
    assert report["decode_steps_after_warm_up"] == 11
    assert 0.1 < report["skip_ratio"] < 0.75
    assert report["skipped_per_layer"][0] == report["skipped_per_layer"][7] == 0
    full = json.loads(run(*ask, "--target-skip-ratio", "0").stdout)["report"]
    assert (full["method"], full["skipped_blocks"]) == ("full", 0)


def test_fixed_sets_are_fitted_shown_run_and_searched(here: Path) -> None:
    """One fit of sets, and what the other commands make of its profile."""
    before = names(here)
    done = run(*QUICK, "--method", "static", "--target-skip-ratio", "0.4", "-o", "sets.json")
    assert names(here) - before == {"sets.json", "sets.sets.safetensors"}
    assert (
        "wrote sets.json and sets.sets.safetensors; next: skipcal evaluate --profile sets.json" in done.stdout
    )
    assert done.stderr == ""
    found = SkipProfile.load("sets.json").fixed_sets
    assert found is not None and found.fit.config["method"] == "static"
    shown = run("show", "sets.json").stdout
    assert max(map(len, shown.splitlines())) <= 80
    for each in found.sets:
        assert f"{each.target_skip_ratio:<12.2f}{len(each.layers) / 8:>9.3f}{each.excess_nll:>+8.3f}" in shown
    assert "surrogates that were fitted to the set stand in for them" in " ".join(shown.split())

    rows = json.loads(
        run(
            "evaluate", *MODEL, "--profile", "sets.json", "--method", "static+fitted", "--method", "static",
            "--task", "perplexity", "--data-files", "words.txt", "--items", "8", "--window-tokens", "48",
            "--target-skip-ratio", "0.3", "--json", "-o", "out",
        ).stdout
    )  # fmt: skip
    rows = rows["results"] if isinstance(rows, dict) else rows
    perplexity = {row["method"]: row for row in rows if row["metric"] == "perplexity"}
    assert {row["realised_skip_ratio"] for row in perplexity.values()} == {0.0, 0.25}
    assert len({row["value"] for row in perplexity.values()}) == 3
    ask = (
        "generate",
        *MODEL,
        "--profile",
        "sets.json",
        "--prompt",
        "w3 w4 w5",
        "--new-tokens",
        "14",
        "--json",
    )
    report = json.loads(run(*ask).stdout)["report"]
    assert report["method"] == "static+fitted" and report["skip_ratio"] == 3 / 8
    assert "sets fitted for 0.15, 0.3, 0.4; give one" in refused(*ask, "--target-skip-ratio", "0.6", code=2)

    search = [
        "tune", *MODEL, "--profile", "sets.json", "--data-files", "words.txt", "--prompts", "4",
        "--prompt-tokens", "24", "--rules", "static+fitted", "--max-kl", "50", "-o", "tuned.json",
    ]  # fmt: skip
    run(*search)
    tuned = SkipProfile.load("tuned.json")
    assert tuned.tuning is not None and tuned.tuning.points[tuned.tuning.chosen].rule == "static+fitted"
    assert tuned.policy_for().to_dict() == SkipProfile.load("sets.json").policy_for().to_dict()
    run("report", "sets.json", "-o", "sets.html")
    page = (here / "sets.html").read_text()
    assert "<h2>Fitted sets</h2>" in page and found.sha256 in page
    search[search.index("sets.json")] = "p.json"
    lacking = (
        "rule static+fitted needs fitted sets, which this profile lacks; run: skipcal fit --method static"
    )
    assert lacking in refused(*search, "--overwrite", code=2)


METHODS = (
    "gate", "static+surrogates", "random+surrogates", "ffn-skip+surrogates", "no-input-adaptive+surrogates",
    "static",
)  # fmt: skip


def test_evaluate_compares_the_gate_with_what_surrogates_do_for_others(here: Path) -> None:
    methods = [part for method in METHODS for part in ("--method", method)]
    done = run(
        "evaluate", *GATED, *methods, "--task", "perplexity", "--data-files", "words.txt", "--items", "8",
        "--window-tokens", "48", "--target-skip-ratio", "0.25", "--match-items", "8", "--json", "-o", "out",
    )  # fmt: skip
    rows = json.loads(done.stdout)
    rows = rows["results"] if isinstance(rows, dict) else rows
    found = {row["method"]: row for row in rows if row["metric"] == "perplexity"}
    assert set(found) == {"full", *METHODS}
    for method in ("gate", "ffn-skip+surrogates"):  # tuned on these very items
        assert found[method]["realised_skip_ratio"] == pytest.approx(0.25, abs=0.02)
        assert found[method]["threshold"] is not None
    for method in METHODS:
        assert found[method]["value"] != found["full"]["value"]
    static = found["static"], found["static+surrogates"]
    assert static[0]["realised_skip_ratio"] == static[1]["realised_skip_ratio"] == 0.25
    assert static[0]["value"] != static[1]["value"]
    assert static[1]["skip_ratio_bytes"] < static[0]["skip_ratio_bytes"]


# What does not


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--rank", "33"], 2, "--rank 33 is above the hidden size of 32"),
        (["--rank", "0"], 2, "--rank 0 cannot be used"),
        (["--surrogate-budget", "5"], 2, "--surrogate-budget 5.0 cannot be used"),
        (["--target-skip-ratio", "0"], 2, "--target-skip-ratio 0.0 cannot be used"),
        (["--target-skip-ratio", "0.8"], 2, "target skip ratio 0.8 is out of reach"),
        (["--target-skip-ratio", "25"], 2, "--target-skip-ratio 25.0 cannot be used"),
        (["--prompt-tokens", "300"], 2, "do not fit the model's context of 256"),
        (["--prompt-tokens", "7"], 2, "--prompt-tokens 7 cannot be used"),
        (["--prompts", "3"], 2, "damage_prompts 4 are more than the 3 windows"),
        (["--sweeps", "-1"], 2, "--sweeps -1 cannot be used"),
        (["--damage", "guess"], 2, "--damage 'guess' cannot be used"),
        (["--method", "fixed"], 2, "--method 'fixed' cannot be used"),
        (["--method", "static", "--sweeps", "1"], 2, "sweeps is of a gate"),
        (["--prompts", "500"], 4, "is too short"),
        (["--profile", "none.json"], 4, "is no file and no shipped profile"),
        (["--data-files", "none.txt"], 4, "none.txt"),
        (["--profile", "words.txt"], 3, "is not a profile"),
        (["--config", "none.yaml"], 2, "none.yaml cannot be read"),
        (["-o", "p.json"], 2, "--overwrite"),
        (["-o", "tiny.json"], 2, "tiny.surrogates.safetensors exists already"),
        (["-o", "words.txt/new.json"], 1, "cannot be written"),
        (["--nonsense"], 2, "--nonsense"),
    ],
)
def test_faulty_options_leave_one_line_and_nothing_else(
    here: Path, args: list[str], code: int, message: str
) -> None:
    before = names(here)
    given = [*QUICK, *([] if "-o" in args else ["-o", "new.json"]), *args]
    if "--nonsense" in args:
        assert message in run(*given, code=code).stderr
    else:
        assert message in refused(*given, code=code)
    assert names(here) == before


def test_tensors_that_are_there_are_not_overwritten_unasked(here: Path) -> None:
    (here / "new.surrogates.safetensors").write_text("mine")
    assert "new.surrogates.safetensors exists already" in refused(*QUICK, "-o", "new.json", code=2)
    assert (here / "new.surrogates.safetensors").read_text() == "mine"
    run(*QUICK, "--sweeps", "0", "-o", "new.json", "--overwrite")
    assert SkipProfile.load("new.json").policy_for().method == "gate"


def test_other_weights_exit_with_3(here: Path, worded: LoadedModel) -> None:
    torch.manual_seed(9)
    other = lively("llama", num_hidden_layers=8)
    other.save_pretrained(here / "other")
    worded.tokenizer.save_pretrained(here / "other")
    args = ["other" if a == "tiny" else a for a in QUICK]
    line = refused(*args, "-o", "new.json", code=3)
    assert "made on other weights of tiny" in line and "skipcal profile" in line
    line = refused(
        "generate", "--model", "other", "--device", "cpu", "--profile", "gated.json", "--prompt", "w3", code=3
    )
    assert "a gate holds for the weights it was fitted to" in line


def test_missing_or_foreign_tensors_exit_with_4_and_3(here: Path) -> None:
    shutil.copy(here / "gated.json", here / "lonely.json")
    name = json.loads((here / "lonely.json").read_text())["gate"]["tensors"]
    (here / name).unlink()
    ask = ("generate", *MODEL, "--profile", "lonely.json", "--prompt", "w3 w4")
    assert "keep it beside the profile" in refused(*ask, code=4)
    assert "gate" in run("show", "lonely.json").stdout
    (here / name).write_bytes(b"something else")
    assert "is not the file the profile was made with" in refused(*ask, code=3)


@pytest.mark.parametrize("method", ["gate", "static+surrogates"])
def test_methods_of_a_gate_say_what_a_profile_lacks(here: Path, method: str) -> None:
    line = refused(
        "evaluate", *MODEL, "--profile", "p.json", "--method", method, "--task", "perplexity",
        "--data-files", "words.txt", "--target-skip-ratio", "0.25", code=2,
    )  # fmt: skip
    assert "this profile has no gate; fit one with: skipcal fit --profile FILE" in line


@pytest.mark.parametrize(
    "where",
    [
        "skipcal.fit.pipeline._sweeps",
        "skipcal.fit.on_policy.fit_gate",
        "os.fsync",
        "os.fsync 2",
    ],
)
def test_an_interrupt_leaves_no_file(here: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Ctrl-C before, during and after the sweeps, and while each of the two files is written."""
    (here / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(here / "tmp"))
    before, calls = names(here), 0
    name, _, wanted = where.partition(" ")

    def interrupt(*args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == int(wanted or 1):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(name, interrupt)
        done = run(*QUICK, "-o", "new.json", code=130)
    assert done.stdout == ""
    assert done.stderr.strip().splitlines()[-1] == "interrupted: no output was written or changed"
    assert names(here) == before
    assert not names(here / "tmp")
