"""A tiny model with a tokenizer of words, as a subject of evaluation, and a profile of it; a judge."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from judge_endpoint import Endpoint, serving

from skipcal.arch.loading import LoadedModel
from skipcal.arch.locate import locate
from skipcal.calibrate.pipeline import calibrate_model
from skipcal.configs.run import ProfileConfig
from skipcal.evaluation.tasks.answers import Subject
from skipcal.profiles.schema import SkipProfile


@pytest.fixture(scope="session")
def loaded(worded: LoadedModel) -> LoadedModel:
    return worded


@pytest.fixture(scope="session")
def subject(loaded: LoadedModel) -> Subject:
    return Subject(loaded, locate(loaded.model), chat_template=False)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(f"w{(n * n + 7 * n) % 97}" for n in range(900)))
    return path


@pytest.fixture(scope="session")
def profile(loaded: LoadedModel, text_file: Path) -> SkipProfile:
    config = ProfileConfig(
        data_files=[str(text_file)], prompts=8, prompt_tokens=8, new_tokens=16, warm_up_tokens=2,
        device="cpu", closed_loop_prompts=4, cold_s=1, cold_e=7,
    )  # fmt: skip
    with torch.no_grad():
        return calibrate_model(loaded, config).profile


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    import json

    path = tmp_path / "questions.jsonl"
    rows: list[dict[str, Any]] = [
        {"id": f"q{n}", "question": " ".join(f"w{(n * k) % 97}" for k in range(3 + n)), "answers": [f"w{n}"]}
        for n in range(7)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int]]:
    root = tmp_path_factory.mktemp("judge")
    with serving(root) as port:
        yield root, port


@pytest.fixture
def endpoint(
    server: tuple[Path, int], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Endpoint:
    root, port = server
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    folder = root / f"test{len(list(root.iterdir()))}"
    folder.mkdir()
    (folder / "plan.json").write_text("{}")
    return Endpoint(folder, port)
