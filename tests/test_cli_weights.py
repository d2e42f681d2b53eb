"""Options that say which model is loaded: every command takes them, none is ignored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import refused, run
from conftest import lively, saved

from skipcal.configs.run import ModelSettings
from skipcal.errors import Unavailable

OPTIONS = {
    "--revision": "r1",
    "--adapter": "some/adapter",
    "--dtype": "bfloat16",
    "--quantization": "torchao:int8",
    "--attn-implementation": "eager",
    "--trust-remote-code": None,
    "--device-map": "auto",
    "--max-memory": "cpu=3GiB",
    "--offload-folder": "weights",
}
EXPECTED = {
    "revision": "r1", "adapter": "some/adapter", "dtype": "bfloat16", "quantization": "torchao:int8",
    "attn_implementation": "eager", "trust_remote_code": True, "device_map": "auto",
    "max_memory": {"cpu": "3GiB"}, "offload_folder": "weights", "device": None,
}  # fmt: skip
SHIPPED = "smollm2-135m-instruct"
COMMANDS = {
    "profile": ["--data-files", "TEXT", "-o", "OUT/p.json"],
    "fit": ["--profile", SHIPPED, "--data-files", "TEXT", "-o", "OUT/p.json"],
    "tune": ["--profile", SHIPPED, "--max-kl", "1", "--data-files", "TEXT", "-o", "OUT/p.json"],
    "generate": ["--profile", SHIPPED, "--prompt", "w1"],
    "evaluate": ["--profile", SHIPPED, "--task", "perplexity", "--data-files", "TEXT", "-o", "OUT/e"],
    "sweep": ["--profile", SHIPPED, "--tasks", "perplexity", "--data-files", "TEXT", "-o", "OUT/e"],
    "compare": [SHIPPED, "--data-files", "TEXT"],
}


@pytest.mark.parametrize("command", [*COMMANDS, "evaluate --lm-eval-tasks"])
def test_every_command_hands_over_every_option(
    command: str, tmp_path: Path, worded_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "lm-eval" in command:
        pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    seen: list[Any] = []

    def load(name: str, **options: Any) -> None:
        seen.append((name, options))
        raise Unavailable("that is enough")

    monkeypatch.setattr("skipcal.arch.loading.load_model", load)
    own = (
        ["--profile", SHIPPED, "--lm-eval-tasks", "arc_easy"]
        if "lm-eval" in command
        else [
            part.replace("TEXT", str(worded_text)).replace("OUT", str(tmp_path)) for part in COMMANDS[command]
        ]
    )
    given = [part for pair in OPTIONS.items() for part in pair if part is not None]
    assert (
        refused(command.split()[0], *own, "--model", "some/model", *given, code=4) == "error: that is enough"
    )
    assert seen == [("some/model", EXPECTED)]
    assert {"model", *EXPECTED} == set(ModelSettings.model_fields)


def test_bench_hands_over_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def load(name: str, **options: Any) -> None:
        seen.append(options)
        raise Unavailable("that is enough")

    monkeypatch.setattr("skipcal.arch.loading.load_model", load)
    refused("bench", "--model", "m", "--adapter", "some/adapter", "--quantization", "torchao:int8", code=4)
    assert seen[0]["adapter"] == "some/adapter" and seen[0]["quantization"] == "torchao:int8"
    assert "adapter 'a' has no effect on a shape" in refused(
        "bench", "--shape", "tiny", "--adapter", "a", code=2
    )


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--model", "nobody/auto"], 4, "could not be loaded"),
        (
            ["--model", "nobody/auto", "--device-map", "auto", "--attn-implementation", "eager"],
            4,
            "be loaded",
        ),
        (
            ["--model", "nobody/auto", "--device-map", "everywhere"],
            2,
            "device_map 'everywhere' cannot be used",
        ),
        (["--model", "nobody/auto", "--attn-implementation", "quick"], 2, "attn_implementation 'quick'"),
        (["--model", "nobody/auto", "--quantization", "int3"], 2, "quantization 'int3' is not known"),
        (["--max-memory", "cpu=1GiB"], 2, "add --device-map auto"),
        (["--device-map", "auto", "--max-memory", "lots"], 2, "expected DEVICE=SIZE"),
        (["--model", "no/such.gguf"], 4, "there is no such file"),
    ],
)
def test_a_missing_model_is_4_and_a_bad_option_2(options: list[str], code: int, message: str) -> None:
    pytest.importorskip("gguf", reason="the extra gguf is not installed")
    assert message in refused("generate", "--profile", SHIPPED, "--prompt", "w1", *options, code=code)


def test_a_profile_made_with_offloaded_weights_is_the_same(tmp_path: Path, worded_text: Path) -> None:
    place = saved(lively("llama"), tmp_path / "model")
    options: list[str | Path] = [
        "--data-files", worded_text, "--prompts", "4", "--prompt-tokens", "8", "--new-tokens", "8",
        "--warm-up-tokens", "2", "--cold-s", "1", "--cold-e", "3",
    ]  # fmt: skip
    spread: list[str | Path] = [
        "--device-map",
        "auto",
        "--max-memory",
        "cpu=100KB",
        "--offload-folder",
        tmp_path / "weights",
    ]
    run("profile", "--model", place, *options, "-o", tmp_path / "plain.json")
    run("profile", "--model", place, *spread, *options, "-o", tmp_path / "spread.json")
    plain, offloaded = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("plain", "spread"))
    for part in ("model", "layers", "regions", "policy", "operating_points"):
        assert plain[part] == offloaded[part]
    assert offloaded["config"]["device_map"] == "auto" and offloaded["config"]["max_memory"] == ["cpu=100KB"]
    assert "offload_folder" not in offloaded["config"]
    assert str(tmp_path) not in (tmp_path / "spread.json").read_text()
