"""A small world in which every command and snippet of the documentation can be typed as it stands.

Models, data files and profiles have the names that the pages use; what they hold is tiny. Hub corpora and
the judge answer from here. So the pages are run word for word, and the tests say what is added to a command.
"""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import lively
from fake_hub import FakeHub
from pages import text_of

from skipcal.arch.embedded import EMBEDDED_MODEL
from skipcal.arch.families import FAMILIES, families_listed
from skipcal.arch.loading import load_model
from skipcal.calibrate.pipeline import calibrate_model
from skipcal.configs.fit import FitConfig
from skipcal.configs.run import ProfileConfig
from skipcal.fit.pipeline import fit_gate_profile
from skipcal.speed.hardware import copy_bandwidth

LAYERS = 8
_TINY_SHAPE = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 256,
    "max_position_embeddings": 1024,
}
MODELS = (
    "meta-llama/Llama-2-7b-hf",
    "meta-llama/Llama-2-7b-chat-hf",
    "meta-llama/Llama-2-13b-chat-hf",
    "meta-llama/Llama-2-70b-hf",
)
WORDS = re.findall(
    r"[\w']+|[^\w\s]",
    " ".join(
        file.read_text(encoding="utf-8")
        for file in sorted((resources.files("skipcal.text") / "embedded").iterdir(), key=str)
        if file.name.endswith(".txt")
    ).lower(),
)


def passage(start: int, words: int) -> str:
    """So many words of skipcal's own text, from the word `start` on, round and round."""
    return " ".join(WORDS[(start + n) % len(WORDS)] for n in range(words))


def build(folder: Path) -> None:
    """Write models, profiles and data into an empty folder."""
    _write_data(folder)
    model = folder / "tiny"
    _save_model(model)
    for name in MODELS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(model)
        (folder / Path(name).name).symlink_to(model)  # a profile keeps of a folder its name alone
    loaded = load_model(str(model), device="cpu")
    text = str(folder / "wikitext2_raw_valid.txt")
    with torch.no_grad():
        paper = calibrate_model(
            loaded,
            ProfileConfig(
                data_files=[f"wikitext={text}"], prompts=6, prompt_tokens=8, new_tokens=14, warm_up_tokens=2,
                closed_loop_prompts=4, cold_s=1, cold_e=LAYERS - 1, device="cpu",
            ),
        ).profile  # fmt: skip
        gated = fit_gate_profile(
            loaded,
            paper,
            FitConfig(
                data_files=[f"wikitext={text}"], prompts=12, prompt_tokens=24, rank=3, damage_prompts=4,
                closed_loop_prompts=6, device="cpu",
            ),
        )  # fmt: skip
    paper.save(folder / "paper.json")
    # It stands for the shipped profile, of the embedded model; a folder goes before a shipped name.
    shipped = gated.model_copy(update={"model": gated.model.model_copy(update={"name": EMBEDDED_MODEL})})
    shipped.save_pretrained(folder / "smollm2-135m-instruct")


def _save_model(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    torch.manual_seed(0)
    with torch.no_grad():
        model: Any = lively("llama", num_hidden_layers=LAYERS, max_position_embeddings=4096)
    model.save_pretrained(folder)
    common = [word for word, _ in Counter(WORDS).most_common(94)]
    vocabulary = {word: n for n, word in enumerate(["<unk>", "<s>", "</s>", *common])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<unk>", eos_token="</s>"
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    tokenizer.save_pretrained(folder)


def _write_data(folder: Path) -> None:
    for name, start in (("wikitext2_raw_valid.txt", 0), ("wikitext2_raw_test.txt", 3000)):
        (folder / name).write_text(passage(start, 2500))
    texts = [{"text": passage(41 * n, 90)} for n in range(60)]
    for name in ("c4.jsonl", "c4_test.jsonl", "c4_en_train_sample.jsonl"):
        _jsonl(folder / name, texts)
    questions = [
        {"id": f"q{n}", "question": passage(7 * n, 6), "answers": [passage(7 * n, 1)]} for n in range(8)
    ]
    _jsonl(folder / "freebaseqa_eval.jsonl", questions)
    release = [
        {
            "Question-ID": row["id"],
            "RawQuestion": row["question"],
            "Parses": [{"Answers": [{"AnswersName": row["answers"]}]}],
        }
        for row in questions
    ]
    (folder / "FreebaseQA-eval.json").write_text(json.dumps({"Questions": release}))
    _jsonl(folder / "cnndm_test200.jsonl", articles())
    _jsonl(folder / "gsm8k.jsonl", sums())
    (folder / "prompt.txt").write_text("Why is the sky blue?\n")
    (folder / "run.yaml").write_text("model: meta-llama/Llama-2-13b-chat-hf\n")


def _jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def articles() -> list[dict[str, Any]]:
    """Three of each bucket of length."""
    return [
        {"id": f"{length}-{n}", "article": passage(n, length), "highlights": passage(n, 12)}
        for length in (100, 500, 800)
        for n in range(3)
    ]


def sums() -> list[dict[str, Any]]:
    """Questions as GSM8K has them."""
    return [{"question": passage(11 * n, 9), "answer": f"{passage(13 * n, 8)}\n#### {n}"} for n in range(60)]


# The hub, by data set: the records that every split has.
HUB: dict[str, list[dict[str, Any]]] = {
    "Salesforce/wikitext": [{"text": passage(60 * n, 60) + "\n"} for n in range(60)],
    "allenai/c4": [{"text": passage(37 * n, 90)} for n in range(80)],
    "openai/gsm8k": sums(),
    "abisee/cnn_dailymail": articles(),
    "HuggingFaceH4/mt_bench_prompts": [
        {"prompt_id": n, "category": category, "prompt": [passage(n, 9), passage(3 * n, 7)]}
        for n, category in enumerate(("writing", "math"))
    ],
    "allenai/ai2_arc": [
        {
            "id": f"a{n}",
            "question": passage(5 * n, 8),
            "choices": {"text": [passage(n, 2), passage(9 * n, 2)], "label": ["A", "B"]},
            "answerKey": "A",
        }
        for n in range(4)
    ],
}


def load_dataset(path: str, name: str | None = None, **options: Any) -> Any:
    """`datasets.load_dataset`, but what is on the hub lies here."""
    import datasets

    if path not in HUB:
        return _REAL_LOAD(path, name, **options)
    rows = datasets.Dataset.from_list(HUB[path])
    if options.get("split") is None:
        return datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), rows))
    return rows.to_iterable_dataset() if options.get("streaming") else rows


def _real_load() -> Any:
    import datasets

    return datasets.load_dataset


_REAL_LOAD = _real_load()


class _Judge(BaseHTTPRequestHandler):
    """Rates every answer 7."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        message = {"role": "assistant", "content": "[[7]]"}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        body = json.dumps(
            {"id": "1", "object": "chat.completion", "created": 0, "model": "gpt-4", "choices": [choice]}
        ).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def judging() -> Iterator[str]:
    """The address of a judge."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Judge)
    server.daemon_threads = False  # joined at the end, so that no socket is left open
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Hub(FakeHub):
    """What is pushed can be had again at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        super().__init__(monkeypatch, folder)
        self._cache = folder / ".hub"
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(self._cache))

    def _create_commit(self, repo_id: str, operations: list[Any], **options: Any) -> Any:
        done = super()._create_commit(repo_id, operations, **options)
        self.into_cache(repo_id, self._cache)
        return done


# Profiles that a page speaks of without having made them.
PRESUPPOSED = {
    "docs/large-runs.md": ["profiles/llama-2-70b-hf.json"],
    "docs/sharing.md": ["profiles/llama-2-7b-hf.json"],
    "docs/weights.md": ["profiles/mine.json"],
}


def enter(monkeypatch: pytest.MonkeyPatch, built: Path, folder: Path, page: str) -> None:
    """Make `folder` the current one, with all that `page` may find there, and the hub as it is here."""
    for name in PRESUPPOSED.get(page, []):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(built / "paper.json")
    for entry in built.iterdir():
        if entry.name != "paper.json":
            (folder / entry.name).symlink_to(entry)
    monkeypatch.chdir(folder)
    monkeypatch.setattr("skipcal.arch.source.embedded_model_folder", lambda: built / "tiny")
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    commit = SimpleNamespace(sha="c0ffee" + "0" * 34)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_args, **_kwargs: commit)
    Hub(monkeypatch, folder)
    shapes = dict.fromkeys(("llama-2-7b", "llama-2-13b"), _TINY_SHAPE)
    monkeypatch.setattr("skipcal.speed.shapes.shapes", lambda: shapes)
    known = dict(FAMILIES)
    few = [row for row in families_listed() if row["family"] in ("gptj", "llama", "mixtral")]
    monkeypatch.setattr("skipcal.arch.families.families_listed", lambda: few)
    for module in ("families", "locate"):  # what a page registers is gone afterwards
        monkeypatch.setattr(f"skipcal.arch.{module}.FAMILIES", known)
    # Seconds for each sweep; tests/plots/test_sweep.py draws them.
    monkeypatch.setattr("skipcal.report.sweep.save_sweep_figures", lambda *_args, **_kwargs: [])
    # A megabyte is copied to and fro, not half a gigabyte.
    monkeypatch.setattr("skipcal.speed.bench.copy_bandwidth", partial(copy_bandwidth, size=1 << 20))
    if "--lm-eval-tasks" in text_of(page):
        _read_one_folder_of_tasks(monkeypatch)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def _read_one_folder_of_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of lm-eval's tasks the ARC's: the index of all of them takes ten seconds to read."""
    import lm_eval.tasks as harness_tasks

    folder = Path(harness_tasks.__file__).parent / "arc"
    real = harness_tasks.TaskManager
    monkeypatch.setattr(
        "skipcal.evaluation.harness.lm_eval.TaskManager",
        lambda **_options: real(include_path=str(folder), include_defaults=False),
    )
