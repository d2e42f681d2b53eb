"""The transfer matrix against decoding token by token, and text that is held out."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import oracle
import pandas as pd
import pytest
import torch
from conftest import lively
from transformers import DynamicCache

from skipcal.arch.loading import LoadedModel
from skipcal.arch.locate import locate
from skipcal.calibrate.passes import Passes
from skipcal.calibrate.pipeline import calibrate_model
from skipcal.configs.run import ProfileConfig
from skipcal.core.policy import SkipPolicy
from skipcal.errors import ConfigError, ProfileMismatch, TargetOutOfReach
from skipcal.evaluation.transfer import calibration_prompts, held_out_texts, transfer, transfer_matrix
from skipcal.profiles.schema import SkipProfile
from skipcal.text.chat import sample_prompts
from skipcal.text.corpora import resolve_corpora, sample_corpus

PROMPT = 5
SETTINGS: dict[str, Any] = {
    "prompts": 6,
    "prompt_tokens": 18,
    "new_tokens": 12,
    "warm_up_tokens": 2,
    "cold_s": 1,
    "cold_e": 7,
}


class Words:
    """A tokenizer of words: their ids are what follows the letter w; all others are token 1."""

    chat_template = None

    def __call__(self, text: str, **kwargs: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(w[1:]) if w[0] == "w" else 1 for w in text.split()]}


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    tokenizer: Any = Words()
    with torch.no_grad():
        model = lively("llama", num_hidden_layers=8)
    return LoadedModel(model=model, tokenizer=tokenizer, name="org/lively", revision=None)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two texts of random tokens: a stream, and documents."""
    folder = tmp_path_factory.mktemp("texts")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 97, (1600,), generator=generator).tolist()
    stream, documents = folder / "stream.txt", folder / "documents.jsonl"
    stream.write_text(" ".join(f"w{n}" for n in ids[:800]))
    texts = [" ".join(f"w{n}" for n in ids[start : start + 40]) for start in range(800, 1600, 40)]
    documents.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {"stream": stream, "documents": documents}


@pytest.fixture(scope="module")
def profiles(loaded: LoadedModel, files: dict[str, Path]) -> dict[str, SkipProfile]:
    with torch.no_grad():
        made = {
            name: calibrate_model(loaded, ProfileConfig(data_files=[str(path)], **SETTINGS)).profile
            for name, path in files.items()
        }
    other = made["documents"]  # so that the profiles differ in all that matters
    policy = replace(other.cosine_policy, cold_e=6, max_skips=2, warm_up_tokens=4)
    return {**made, "documents": other.model_copy(update={"policy": policy})}


def rows(count: int, *lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randint(3, 97, (n,), generator=generator).tolist() for n in lengths]


def naive(model: Any, texts: list[list[int]], policy: SkipPolicy | None, scored: int) -> tuple[float, float]:
    """Skip ratio, and perplexity from decode step `scored` on, row by row and token by token."""
    warm_up = policy.warm_up_tokens if policy else 0
    skipped = steps = 0
    losses = []
    for row in texts:
        cache = DynamicCache(config=model.config)
        oracle.step(model, cache, torch.tensor([row[:PROMPT]]), None)
        for p in range(PROMPT, len(row)):
            ruled = p - PROMPT >= warm_up
            logits, layers, _ = oracle.step(model, cache, torch.tensor([[row[p]]]), policy if ruled else None)
            if ruled:
                steps += 1
                skipped += len(layers)
            if p - PROMPT >= scored and p + 1 < len(row):
                losses.append(-float(logits.float().log_softmax(-1)[row[p + 1]]))
    return skipped / (steps * len(model.model.layers)), math.exp(sum(losses) / len(losses))


def test_ratio_and_perplexity_are_those_of_decoding_token_by_token(
    loaded: LoadedModel, profiles: dict[str, SkipProfile]
) -> None:
    texts = {"short": rows(1, 14, 22, 17), "long": rows(2, 30, 12)}
    frame = transfer(loaded, profiles, texts, target_skip_ratio=0.25, prompt_tokens=PROMPT, batch_size=2)
    assert [(r.profile, r.text) for r in frame.itertuples()] == [
        ("stream", "short"), ("documents", "short"), ("stream", "long"), ("documents", "long")
    ]  # fmt: skip
    for row in frame.itertuples():
        policy = profiles[str(row.profile)].cosine_policy_for(0.25)
        scored = max(p.policy.warm_up_tokens for p in profiles.values())  # one set of tokens for all
        ratio, perplexity = naive(loaded.model, texts[str(row.text)], policy, scored)
        _, full = naive(loaded.model, texts[str(row.text)], None, scored)
        assert row.realised_skip_ratio == pytest.approx(ratio, abs=1e-9)
        assert 0 < ratio < policy.most_skips() / 8
        assert row.perplexity == pytest.approx(perplexity, rel=1e-4)
        assert row.full_perplexity == pytest.approx(full, rel=1e-4)
        assert row.tokens == sum(len(text) - 1 - PROMPT - scored for text in texts[str(row.text)])
        assert (row.threshold, row.cold_s, row.cold_e) == (policy.threshold, policy.cold_s, policy.cold_e)
        assert row.target_skip_ratio == 0.25


def test_on_its_own_text_a_profile_realises_what_its_closed_loop_measured(
    loaded: LoadedModel, files: dict[str, Path]
) -> None:
    config = ProfileConfig(data_files=[str(files["stream"])], **SETTINGS)
    profile = calibrate_model(loaded, config).profile
    drawn = sample_corpus(
        resolve_corpora([], config.data_files)[0], Words(), prompts=6, prompt_tokens=18, seed=0
    )
    text = Passes(loaded, locate(loaded.model), config).continued(drawn.prompts, "continue")
    points = profile.operating_points[1:6:2]
    assert len(points) == 3
    for point in points:
        frame = transfer(
            loaded,
            {"p": profile},
            {"t": text},
            target_skip_ratio=point.target_skip_ratio,
            prompt_tokens=18,
            batch_size=4,
        )
        assert frame["realised_skip_ratio"].item() == point.realised_skip_ratio


def test_without_a_target_each_profiles_own_policy_applies_and_no_skips_cost_nothing(
    loaded: LoadedModel, profiles: dict[str, SkipProfile]
) -> None:
    texts = {"t": rows(3, 20, 20)}
    own = transfer(loaded, profiles, texts, target_skip_ratio=None, prompt_tokens=PROMPT)
    assert own["threshold"].tolist() == [profile.cosine_policy.threshold for profile in profiles.values()]
    assert own["target_skip_ratio"].isna().all()
    full = transfer(loaded, profiles, texts, target_skip_ratio=0.0, prompt_tokens=PROMPT)
    assert full["realised_skip_ratio"].tolist() == [0, 0]
    assert full["perplexity"].tolist() == full["full_perplexity"].tolist()


def test_what_cannot_be_measured_is_refused(loaded: LoadedModel, profiles: dict[str, SkipProfile]) -> None:
    def run(text: list[list[int]], target: float | None = 0.25, model: LoadedModel = loaded) -> pd.DataFrame:
        return transfer(model, profiles, {"t": text}, target_skip_ratio=target, prompt_tokens=PROMPT)

    with pytest.raises(ConfigError, match="rows of 10 tokens have none past the prompt of 5 and the warm-up"):
        run(rows(1, 10))  # 11 would do
    with pytest.raises(ConfigError, match="have none past the prompt"):
        run([])
    with pytest.raises(ConfigError, match="do not fit the model's context of 256"):
        run(rows(1, 257))
    with pytest.raises(TargetOutOfReach, match=r"profile 'stream': target skip ratio 0\.9 is out"):
        run(rows(1, 20), 0.9)
    other = replace(loaded, model=lively("llama", num_hidden_layers=5))
    with pytest.raises(ProfileMismatch, match="number of layers"):
        run(rows(1, 20), 0.25, other)


def test_nothing_is_left_on_the_model(loaded: LoadedModel, profiles: dict[str, SkipProfile]) -> None:
    model: Any = loaded.model
    before = [(sorted(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    transfer(loaded, profiles, {"t": rows(1, 20)}, target_skip_ratio=0.25, prompt_tokens=PROMPT)
    after = [(sorted(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    assert before == after


def test_the_matrix_keeps_the_order_and_adds_the_full_model() -> None:
    frame = pd.DataFrame(
        {
            "profile": ["z", "a", "z", "a"],
            "text": ["y", "y", "b", "b"],
            "realised_skip_ratio": [0.1, 0.2, 0.3, 0.4],
            "perplexity": [5.0, 6.0, 7.0, 8.0],
            "full_perplexity": [4.0, 4.0, 3.0, 3.0],
        }
    )
    ratios = transfer_matrix(frame, "realised_skip_ratio")
    assert (ratios.index.tolist(), ratios.columns.tolist()) == (["z", "a"], ["y", "b"])
    assert ratios.to_numpy().tolist() == [[0.1, 0.3], [0.2, 0.4]]
    costs = transfer_matrix(frame, "perplexity")
    assert costs.index.tolist() == ["z", "a", "full model"]
    assert costs.to_numpy().tolist()[-1] == [4, 3]


# Held-out text


@pytest.mark.parametrize("verify", [False, True])
def test_a_profiles_prompts_are_found_again(
    loaded: LoadedModel, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, verify: bool
) -> None:
    drawn = []
    from skipcal.calibrate import pipeline

    def spy(*args: Any, **kwargs: Any) -> Any:
        drawn.append(sample_prompts(*args, **kwargs))
        return drawn[-1]

    monkeypatch.setattr(pipeline, "sample_prompts", spy)
    settings = {**SETTINGS, "closed_loop_prompts": 0, "verify": verify, "verify_prompts": 3}
    entries = [f"some={files['stream']}", str(files["documents"])]
    profile = calibrate_model(loaded, ProfileConfig(data_files=entries, **settings)).profile
    renamed = resolve_corpora([], [f"other={files['stream']}", f"again={files['documents']}"])
    for corpus, sample in zip(renamed, drawn, strict=True):
        assert calibration_prompts(profile, corpus, Words()) == sample.prompts
    foreign = files["stream"].with_name("foreign.txt")
    foreign.write_text(files["stream"].read_text() + " w5")
    assert calibration_prompts(profile, resolve_corpora([], [str(foreign)])[0], Words()) == []
    assert calibration_prompts(profile, resolve_corpora(["c4"], [])[0], Words()) == []


def test_held_out_text_shares_nothing_with_the_prompts_of_any_profile(
    profiles: dict[str, SkipProfile], files: dict[str, Path]
) -> None:
    corpora = resolve_corpora([], [str(path) for path in files.values()])
    texts = held_out_texts(corpora, profiles.values(), Words(), rows=8, tokens=25, seed=0)
    assert list(texts) == ["stream", "documents"]
    for corpus in corpora:
        prompts = [row for p in profiles.values() for row in calibration_prompts(p, corpus, Words())]
        assert len(prompts) == 6
        assert all(len(row) == 25 for row in texts[corpus.name].prompts)
        runs = {tuple(row[i : i + 16]) for row in prompts for i in range(3)}
        for row in texts[corpus.name].prompts:
            assert not {tuple(row[i : i + 16]) for i in range(10)} & runs


def test_questions_of_a_profile_are_held_out_in_every_format(loaded: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    generator = torch.Generator().manual_seed(1)
    bodies = torch.randint(3, 97, (60, 24), generator=generator).tolist()
    records = [{"body": " ".join(f"w{n}" for n in b), "question": "w7", "answer": "w8"} for b in bodies]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = {**SETTINGS, "closed_loop_prompts": 0}
    config = ProfileConfig(data_files=[f"svamp:in-context={path}"], **settings)
    profile = calibrate_model(loaded, config).profile
    assert profile.calibration.corpora[0].format == "in-context"
    corpus = resolve_corpora([], [f"svamp:single={path}"])[0]
    prompts = calibration_prompts(profile, corpus, Words())
    runs = {tuple(row[i : i + 16]) for row in prompts for i in range(3)}
    texts = held_out_texts([corpus], [profile], Words(), rows=20, tokens=26, seed=0)
    assert len(prompts) == 6
    for row in texts["svamp:single"].prompts:
        assert not {tuple(row[i : i + 16]) for i in range(11)} & runs
