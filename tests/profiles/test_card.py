"""The section of a model card: its numbers, its commands and its lines of Python are right."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from documents import corpus, document, gate_document, tuned_document, write

from skipcal.arch.loading import LoadedModel
from skipcal.cli import app
from skipcal.files.markdown import escaped
from skipcal.profiles.schema import SkipProfile
from skipcal.profiles.summary import summarize

SHIPPED = "smollm2-135m-instruct"


def card_of(tmp_path: Path, made: dict[str, Any], source: str = "me/tiny") -> str:
    return SkipProfile.load(write(tmp_path / "p.json", made)).model_card(source)


def test_the_card_of_the_shipped_profile_holds_its_numbers() -> None:
    profile = SkipProfile.load(SHIPPED)
    card = profile.model_card("me/tiny")
    for line in (
        "| model | HuggingFaceTB/SmolLM2-135M-Instruct, the copy that skipcal embeds |",
        "| shape | 30 layers of width 576, float32 |",
        "| policy | rule `gate` in layers 1 to 28, threshold -3.860; the first 25 tokens of an answer are "
        "the full model's |",
        "| skippable region | layers 1 to 16; 95 % bootstrap: from 1 to 1 on, before 17 to 26; R2 of the fit "
        "0.9989, Spearman's rho of the middle 0.71 |",
        "| c4 | c4_en_train_sample.jsonl | sha256 fca1df988ae3... | 53 | 32 | 4,096 |",
        "Prompts of 64 tokens, up to 128 generated after each; statistics are over the generated tokens. "
        "Seed 0.",
        "| 0.25 | 0.976849 | 0.409 | 0.250 | 0.245 |",
        "| 0.3 | 0.974537 | 0.432 | 0.307 | - |",
        "| 0.25 (policy) | -3.860 | 0.260 | 0.254 | 0.230 | 0.278 |",
        "| wikitext | wikitext2_raw_valid.txt | sha256 49c83f717c00... | 1 | 64 | 31,104 |",
        f"> **Warning:** {profile.regions.warnings[0]}",
        "$ skipcal generate --profile me/tiny --prompt 'Why is the sky blue?'",
        'loaded = skipcal.load_model(dtype="float32")',
    ):
        assert line in card.splitlines()
    assert card.count("(policy)") == 1
    assert "arxiv.org/abs/2404.03865" in card and "@software{skipcal" in card


def test_each_rule_is_told_as_what_it_is(tmp_path: Path) -> None:
    cosine = document()
    cosine["policy"]["max_skips"] = 2
    told = card_of(tmp_path, cosine)
    assert "| policy | rule `cosine`, threshold 0.900000, at most 2 FFNs a token; the first 25 tokens" in told
    assert "| 0.1 (policy) | 0.900000 | 0.100 | 0.100 | - |" in told
    assert "None named." in told and "rule `gate`" not in told

    static = tuned_document()
    static["calibration"].update(mode="prefill", corpora=[corpus("a|b")], closed_loop=None)
    static["operating_points"] = []
    told = card_of(tmp_path, static)
    assert "| policy | the FFNs of layers 1 are skipped, without surrogates; the first 2 tokens" in told
    assert (
        "chosen by a search (KL 0.5) over 4 windows of text: static, which skipped 0.200 of all FFN blocks, "
        "the warm-up included, at a KL of 0.1250 nats a token to the full model (95 % bootstrap 0.1000 to "
        "0.1500)."
    ) in told
    assert "Windows of 8 tokens; statistics are over the text itself. Seed 0." in told
    assert r"| a\|b | a\|b.txt | sha256 abababababab... | 1 | 2 | 20 |" in told
    assert "no FFN can be skipped within the region" in told and "(policy)" not in told

    told = card_of(tmp_path, gate_document())
    assert "| 0.2 (policy) | -1.000 | 0.200 | 0.200 | 0.200 |" in told
    assert f"Its tensors are in `{gate_document()['gate']['tensors']}`" in told


def test_a_target_keeps_its_digits(tmp_path: Path) -> None:
    made = document()
    made["operating_points"][1]["target_skip_ratio"] = 0.125
    assert "| 0.125 (policy) | 0.900000 |" in card_of(tmp_path, made)


@pytest.mark.parametrize("make", [document, gate_document, tuned_document])
def test_its_commands_are_understood_and_its_python_compiles(tmp_path: Path, make: Any) -> None:
    made = make()
    made["model"].update(name="org/a model's", revision="abc", trust_remote_code=True, quantization="gptq")
    card = card_of(tmp_path, made)
    commands = re.findall(r"^\$ skipcal (.+)$", card, re.M)
    assert len(commands) == 3
    group: Any = typer.main.get_command(app)
    for command in commands:
        name, *words = shlex.split(command)
        group.commands[name].make_context(name, [*words])  # raises on an unknown or missing option
        assert "me/tiny" in words
        if name != "show":
            assert words[:5] == ["--model", "org/a model's", "--revision", "abc", "--trust-remote-code"]
    (block,) = re.findall(r"```python\n(.*?)```", card, re.S)
    compile(block, "card", "exec")
    assert 'load_model("org/a model\'s", revision="abc", trust_remote_code=True)' in block


def test_its_python_runs_as_it_stands(
    tmp_path: Path,
    worded: LoadedModel,
    worded_profile: SkipProfile,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    worded.model.save_pretrained(tmp_path / "tiny")
    worded.tokenizer.save_pretrained(tmp_path / "tiny")
    worded_profile.save_pretrained(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", worded_profile.model_card("tiny"), re.S)
    names: dict[str, Any] = {}
    exec(block.replace("max_new_tokens=128", "max_new_tokens=12"), names)
    assert names["output"].shape[1] == names["inputs"]["input_ids"].shape[1] + 12
    assert capsys.readouterr().out.splitlines()[-1] == str(names["run"].report.skip_ratio)
    assert names["run"].report.decode_steps == 11


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a_b [1, 17) has *stars*", "a_b [1, 17) has *stars*"),
        ("![a](b) [c](d)", r"!\[a]\(b) [c]\(d)"),
        ("<b> & `x` | y\\", "&lt;b> &amp; \\`x\\` \\| y\\\\"),
        ("two\nlines\tand \x1b", "two lines and \N{REPLACEMENT CHARACTER}"),
    ],
)
def test_text_shows_as_it_is(text: str, shown: str) -> None:
    assert escaped(text) == shown


# What `skipcal show` says of the same


def test_show_tells_which_rule_is_the_policy(tmp_path: Path) -> None:
    static = SkipProfile.load(write(tmp_path / "s.json", tuned_document()))
    text = summarize(static)
    assert "static        the policy: the FFNs of layers 1 are skipped, nothing stands in" in text
    assert "<- policy" not in text

    aside = gate_document()
    aside["policy"] = aside.pop("paper_policy")
    aside["gate"]["operating_points"][0]["threshold"] = aside["policy"][
        "threshold"
    ]  # by chance the same number
    text = summarize(SkipProfile.load(write(tmp_path / "a.json", aside)))
    assert "gate          fitted, not the policy, in 2 layers: 1 to 2" in text
    assert text.count("<- policy") == 1


def test_corpora_that_differ_by_point_are_shown_where_they_are(tmp_path: Path) -> None:
    made = gate_document()
    made["gate"]["operating_points"][1]["by_corpus"] = {"other": 0.3}
    profile = SkipProfile.load(write(tmp_path / "p.json", made))
    assert "0.20            -1.000      0.200     0.200         -  <- policy" in summarize(profile)
    assert "| 0.2 (policy) | -1.000 | 0.200 | 0.200 | - |" in profile.model_card()
