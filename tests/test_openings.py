"""Every reader of text begins its rows as the tokenizer begins a text, and profiles say so."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run
from conftest import lively
from corpus_files import jsonl, local, prose
from special_tokens import around, ids_of, naive_rows
from tensor_files import SHIPPED

from skipcal.arch.loading import LoadedModel
from skipcal.arch.proof import proof_ids
from skipcal.calibrate.pipeline import calibrate_model
from skipcal.compare.comparison import CompareConfig, run_compare
from skipcal.configs.fit import FitConfig
from skipcal.configs.run import ProfileConfig
from skipcal.configs.sweep import SweepConfig
from skipcal.configs.tune import TuneConfig
from skipcal.core.policy import SkipPolicy
from skipcal.evaluation.sweep import run_sweep
from skipcal.evaluation.token_map import token_map
from skipcal.evaluation.transfer import calibration_prompts
from skipcal.evaluation.tune import tune_profile
from skipcal.fit.pipeline import fit_gate_profile
from skipcal.profiles.fits import warn_of_other_opening
from skipcal.profiles.parts import GateFit
from skipcal.profiles.schema import SkipProfile
from skipcal.profiles.summary import summarize
from skipcal.report.tables import provenance
from skipcal.runtime.generation import generate_text
from skipcal.runtime.session import skipping

BOS, EOS = ids_of("<s>", "</s>")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("openings") / "text.txt"
    path.write_text(prose(1, 900))
    return path


def loaded_with(before: tuple[str, ...], after: tuple[str, ...] = ()) -> LoadedModel:
    torch.manual_seed(0)
    with torch.no_grad():
        model = lively("llama", num_hidden_layers=8)
    return LoadedModel(model=model, tokenizer=around(before, after), name="tiny", revision=None)


@pytest.fixture(scope="module")
def closed() -> LoadedModel:
    """Its tokenizer begins a text with <s> and ends it with </s>."""
    return loaded_with(("<s>",), ("</s>",))


def profiled(loaded: LoadedModel, text: Path, **changes: Any) -> Any:
    values: dict[str, Any] = {
        "data_files": [str(text)], "prompts": 4, "prompt_tokens": 8, "new_tokens": 12, "warm_up_tokens": 2,
        "closed_loop_prompts": 2, "cold_s": 1, "cold_e": 7, "max_skips": 2, "device": "cpu",
    }  # fmt: skip
    with torch.no_grad():
        return calibrate_model(loaded, ProfileConfig(**{**values, **changes}))


@pytest.fixture(scope="module")
def profile(closed: LoadedModel, text: Path) -> SkipProfile:
    made: SkipProfile = profiled(closed, text).profile
    return made


def fitted(loaded: LoadedModel, profile: SkipProfile, text: Path) -> GateFit:
    config = FitConfig(
        data_files=[str(text)], prompts=4, prompt_tokens=16, rank=2, damage_prompts=2,
        closed_loop_prompts=2, device="cpu",
    )  # fmt: skip
    with torch.enable_grad():
        made = fit_gate_profile(loaded, profile, config)
    assert made.gate is not None
    return made.gate.fit


def fits(loaded: LoadedModel, profile: SkipProfile, text: Path, folder: Path) -> None:
    assert fitted(loaded, profile, text).corpora[0].opening == ["<s>"]


def tunes(loaded: LoadedModel, profile: SkipProfile, text: Path, folder: Path) -> None:
    config = TuneConfig(
        profile="-", data_files=[str(text)], prompts=2, prompt_tokens=16, rules=["static"], max_kl=99.0
    )
    tuned = tune_profile(loaded, profile, config)
    assert tuned.tuning is not None and tuned.tuning.text["corpora"][0]["opening"] == ["<s>"]


def sweeps(loaded: LoadedModel, profile: SkipProfile, text: Path, folder: Path) -> None:
    questions = jsonl(folder / "q.jsonl", ["what is a"], column="question")
    questions.write_text(json.dumps({"question": "what is a", "answers": ["b"]}) + "\n")
    lengths: dict[str, Any] = {"data_files": [str(text)], "warm_up_tokens": 2}
    tasks = {
        "perplexity": {**lengths, "windows": 2, "window_tokens": 16},
        "continuation": {**lengths, "prompts": 2, "prompt_tokens": 8, "new_tokens": 6},
        "freebaseqa": {"data_file": str(questions), "new_tokens": 6},
    }
    config = SweepConfig.model_validate(
        {"profile": "-", "methods": ["static"], "ratios": [0.25], "tasks": tasks}
    )
    run_sweep(loaded, profile, config, folder)
    for task in tasks:
        header = json.loads(next((folder / "records" / task).iterdir()).read_text().splitlines()[0])
        assert '"opening": ["<s>"]' in json.dumps(header)


def compares(loaded: LoadedModel, profile: SkipProfile, text: Path, folder: Path) -> None:
    profile.save(folder / "p.json")
    config = CompareConfig(data_files=[str(text)], prompts=2, text_tokens=16, prompt_tokens=4)
    result = run_compare([str(folder / "p.json")], config, lambda: loaded)
    assert result.texts[0]["opening"] == ["<s>"]


def maps(loaded: LoadedModel, profile: SkipProfile, text: Path, folder: Path) -> None:
    mapped = token_map(loaded.model, loaded.tokenizer, profile, "a few words")
    assert list(mapped.ids) == naive_rows(loaded.tokenizer, ("<s>",), "a few words", 12)[0]


def generates(loaded: LoadedModel, profile: SkipProfile, text: Path, folder: Path) -> None:
    assert generate_text(loaded, skipping(loaded.model, profile), "a few", new_tokens=3).prompt_tokens == 6


def calibrates(loaded: LoadedModel, profile: SkipProfile, text: Path, folder: Path) -> None:
    profiled(loaded, text, max_skips=1)  # one: with few operating points


def calibrates_on_text(loaded: LoadedModel, profile: SkipProfile, text: Path, folder: Path) -> None:
    profiled(loaded, text, mode="prefill", prompt_tokens=16)


@pytest.mark.parametrize(
    "reader", [calibrates, calibrates_on_text, fits, tunes, sweeps, compares, maps, generates]
)
def test_every_row_that_a_model_is_given_begins_once_and_does_not_end(
    reader: Callable[..., None],
    closed: LoadedModel,
    profile: SkipProfile,
    text: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    seen: list[list[int]] = []

    def watch(_module: Any, args: Any) -> None:
        seen.extend(args[0].tolist() if args[0].shape[1] > 1 else [])  # one token is a decode step

    model: Any = closed.model
    handle = model.get_input_embeddings().register_forward_pre_hook(watch)
    try:
        reader(closed, profile, text, tmp_path)
    finally:
        handle.remove()
    # What `locate` proves a model by is no text, nor what `fit` does: a text with each token one higher.
    proof = [*proof_ids(model).tolist(), *([token + 1 for token in row] for row in seen)]
    texts = [row for row in seen if row not in proof]
    given = [row[: profile.calibration.prompt_tokens] for row in texts]  # what follows may be generated
    assert texts
    wrong = [row for row in given if row[0] != BOS or row.count(BOS) > 1 or EOS in row[:6]]
    assert wrong == []
    assert "texts began" not in caplog.text


def test_the_tokens_of_a_text_are_scored_and_its_opening_is_not(text: Path) -> None:
    from skipcal.arch.locate import locate
    from skipcal.configs.sweep import PerplexitySettings
    from skipcal.evaluation.tasks.answers import Subject
    from skipcal.evaluation.tasks.perplexity import load_perplexity

    never = SkipPolicy(cold_s=1, cold_e=7, threshold=2.0, warm_up_tokens=2)
    for before in [(), ("<s>",), ("<s>", "<sop>")]:
        loaded = loaded_with(before, ("</s>",))
        subject = Subject(loaded, locate(loaded.model), chat_template=False)
        asked = PerplexitySettings(data_files=[str(text)], windows=3, window_tokens=20, warm_up_tokens=2)
        task = load_perplexity(asked, subject, seed=0)
        given = max(1, len(before))
        assert task.header()["prompt_tokens"] == given
        records = [r for group, _ in task.run(subject, never, task.ids, 8) for r in group]
        every = naive_rows(loaded.tokenizer, before, text.read_text(), 20)
        for record in records:
            row = task.windows[record["id"]]
            assert row in every
            logits = loaded.model(torch.tensor([row])).logits[0].double().log_softmax(-1)
            losses = [-float(logits[p - 1, row[p]]) for p in range(given, 20)]
            assert record["tokens"] == 20 - given
            assert record["nll"] == pytest.approx(sum(losses), abs=1e-3)


@pytest.mark.parametrize(("before", "first"), [((), 1), (("<s>",), 1), (("<s>", "<sop>"), 2)])
def test_no_special_token_is_counted_over_known_text(before: tuple[str, ...], first: int, text: Path) -> None:
    made = profiled(loaded_with(before), text, mode="prefill", prompt_tokens=16)
    assert sorted(set(made.traces[0].position.tolist())) == list(range(first, 16))
    assert made.profile.calibration.corpora[0].tokens == 4 * (16 - first)


def test_no_special_token_is_fitted_on(text: Path) -> None:
    loaded = loaded_with(("<s>", "<sop>"))
    fit = fitted(loaded, profiled(loaded, text).profile, text)
    assert fit.tokens == fit.corpora[0].tokens == 4 * (16 - 2 - 2)  # but the opening and the warm-up


# In profiles


def test_a_profile_says_how_its_texts_began_and_reads_it_again(profile: SkipProfile, tmp_path: Path) -> None:
    assert profile.calibration.opening == ["<s>"]
    profile.save(tmp_path / "p.json")
    assert json.loads((tmp_path / "p.json").read_text())["calibration"]["corpora"][0]["opening"] == ["<s>"]
    again = SkipProfile.load(tmp_path / "p.json")
    assert again == profile
    assert "mode generate, each text begun with <s>" in " ".join(summarize(again).split())
    assert "each begun with &lt;s>. Seed" in again.model_card()
    assert ("texts begin with", "<s>") in provenance(again)


def of_before(profile: SkipProfile) -> SkipProfile:
    """The profile as it was written before openings were recorded."""
    data = json.loads(profile.to_json())
    for corpus in data["calibration"]["corpora"]:
        del corpus["opening"]
    return SkipProfile.model_validate_json(json.dumps(data))


def test_a_profile_without_the_field_stays_as_it_is(profile: SkipProfile) -> None:
    for old in (SHIPPED, of_before(profile)):  # the shipped one as it was before its gate was fitted
        assert '"opening"' not in old.to_json()
        assert "begun with" not in summarize(old) + old.model_card()
        assert ("texts begin with", "not recorded") in provenance(old)


def test_other_openings_than_the_profiles_are_warned_of(
    profile: SkipProfile, closed: LoadedModel, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def said(about: SkipProfile, tokenizer: Any) -> str:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            warn_of_other_opening(about, tokenizer)
        return caplog.text

    plain = around((), ())
    old = of_before(profile)
    assert said(profile, closed.tokenizer) == said(old, plain) == ""
    assert "texts began with <s>, texts begin with no special token here" in said(profile, plain)
    assert "windows of running text lacked the <s> that texts begin with here" in said(old, closed.tokenizer)
    chat = old.model_copy(update={"calibration": old.calibration.model_copy(update={"chat_template": True})})
    assert said(chat, closed.tokenizer) == ""
    for reader in (sweeps, compares, maps):
        caplog.clear()
        (folder := tmp_path / reader.__name__).mkdir()
        reader(closed, old, text, folder)
        assert "windows of running text lacked the <s>" in caplog.text


def test_the_command_generate_warns_of_other_openings_too(
    profile: SkipProfile, closed: LoadedModel, tmp_path: Path
) -> None:
    folder: Any = tmp_path / "model"
    model: Any = closed.model
    model.save_pretrained(folder)
    closed.tokenizer.save_pretrained(folder)
    for name, about, warned in (("new.json", profile, 0), ("old.json", of_before(profile), 1)):
        about.save(tmp_path / name)
        words = ("--model", folder, "--device", "cpu", "--prompt", "w5 w6", "--new-tokens", "4")
        done = run("generate", "--profile", tmp_path / name, *words)
        assert done.stderr.count("warning: the profile does not say how its texts began") == warned


def test_the_texts_of_an_old_profile_are_drawn_again_as_they_were(
    profile: SkipProfile, closed: LoadedModel, text: Path
) -> None:
    """Else `compare` would keep other text apart than the profile was made from."""
    corpus = local(text)
    ids = closed.tokenizer(text.read_text())["input_ids"]
    starts = random.Random(profile.calibration.seed).sample(range(0, len(ids) - 7, 8), 4)
    assert calibration_prompts(of_before(profile), corpus, closed.tokenizer) == [
        ids[n : n + 8] for n in starts
    ]
    new = calibration_prompts(profile, corpus, closed.tokenizer)
    assert all(row in naive_rows(closed.tokenizer, ("<s>",), text.read_text(), 8) for row in new)


# In chats


def test_a_template_that_writes_the_opening_gets_no_second(closed: LoadedModel, text: Path) -> None:
    import copy

    from skipcal.arch.locate import locate
    from skipcal.evaluation.tasks.answers import Subject
    from skipcal.text.chat import sample_prompts

    tokenizer = copy.deepcopy(closed.tokenizer)
    tokenizer.chat_template = "<s>{% for m in messages %}u:{{ m['content'] }}a:{% endfor %}"
    chatty = replace(closed, tokenizer=tokenizer)
    subject = Subject(chatty, locate(chatty.model), chat_template=True)
    message = [{"role": "user", "content": "why"}]
    rendered = str(tokenizer.apply_chat_template(message, tokenize=False))
    encoded = subject.encode(message)
    assert encoded == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    # Text that somebody rendered, given as a prompt or as a document, is no different.
    assert replace(subject, chat_template=False).encode([{"role": "user", "content": rendered}]) == encoded
    policy = SkipPolicy(cold_s=1, cold_e=7, threshold=2.0)
    templated = generate_text(chatty, skipping(chatty.model, policy=policy), "why", new_tokens=2)
    by_hand = generate_text(
        chatty, skipping(chatty.model, policy=policy), rendered, new_tokens=2, chat_template=False
    )
    assert templated.prompt_tokens == by_hand.prompt_tokens == len(encoded)
    assert templated.text == by_hand.text
    sample = sample_prompts(local(text), tokenizer, prompt_tokens=12, chat_template=True, prompts=3, seed=0)
    assert all(row.count(BOS) == 1 and row[0] == BOS and EOS not in row for row in sample.prompts)
    assert sample.opening == []
