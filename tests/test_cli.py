"""The command line: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from command_line import run
from warm_python import environment

from skipcal import __version__
from skipcal.arch.check import tiny_model
from skipcal.profiles.schema import SkipProfile
from skipcal.profiles.sources import shipped_profiles

SHIPPED = "smollm2-135m-instruct"


def refused(*args: str | Path, code: int) -> str:
    """The one line on stderr of a command that fails; stdout stays empty."""
    done = run(*args, code=code)
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert "Traceback" not in done.stderr
    if code != 2 or lines[-1].startswith("error: "):  # typer's own usage errors come with a hint
        assert len([line for line in lines if line.startswith("error: ")]) == 1
    return str(lines[-1])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama on disk, with the tokenizer of the embedded model cut to nothing: words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    vocabulary = {f"w{n}": n for n in range(97)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    model: Any = tiny_model("llama", num_hidden_layers=8)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0").save_pretrained(folder)
    return folder


@pytest.fixture
def text_file(here: Path) -> Path:
    path = here / "text.txt"
    path.write_text(" ".join(f"w{n % 97}" for n in range(400)))
    return path


def quick(tiny_folder: Path, text_file: Path) -> list[str]:
    return [
        "profile", "--model", str(tiny_folder), "--data-files", str(text_file), "--device", "cpu",
        "--prompts", "6", "--prompt-tokens", "8", "--new-tokens", "12", "--warm-up-tokens", "2",
    ]  # fmt: skip


# What works


def test_version_and_help() -> None:
    assert run("--version").stdout == f"skipcal {__version__}\n"
    for command in ("profile", "show", "plot", "generate", "bench", "models"):
        assert command in run("--help").stdout
        assert f"Example: skipcal {command}" in run(command, "--help").stdout


def test_profile_writes_a_profile_a_trace_and_a_summary(
    here: Path, tiny_folder: Path, text_file: Path
) -> None:
    done = run(*quick(tiny_folder, text_file), "--trace", "t.parquet")
    profile = SkipProfile.load(here / "profiles" / "tiny-llama.json")  # the default place
    assert profile.model.name == "tiny-llama"
    assert profile.calibration.corpora[0].name == "text"
    assert profile.calibration.corpora[0].tokens == 6 * 12
    assert profile.layers["text"].count == [72] * 8
    assert (here / "t.parquet").stat().st_size > 0
    assert f"cold_s        {profile.cosine_policy.cold_s}" in done.stdout
    assert "next: skipcal plot profiles/tiny-llama.json" in done.stdout
    assert done.stderr.count("\n") == len(re.findall("^warning: ", done.stderr, re.M))
    assert {p.name for p in here.iterdir()} == {"profiles", "t.parquet", "text.txt"}


def test_json_is_exactly_one_document_on_stdout(here: Path, tiny_folder: Path, text_file: Path) -> None:
    done = run(*quick(tiny_folder, text_file), "-o", "p.json", "--json")
    assert json.loads(done.stdout) == json.loads((here / "p.json").read_text())
    assert json.loads(run("show", "p.json", "--json").stdout)["format"] == "skipcal.profile/1"
    assert json.loads(run("plot", "p.json", "-o", "p.svg", "--json").stdout) == {"output": "p.svg"}
    known = json.loads(run("models", "--json").stdout)
    llama = {"family": "llama", "found": "table", "kind": "sequential"}
    assert {**llama, "chain": ["post_attention_layernorm", "mlp"]} in known["families"]
    assert {row["family"] for row in known["unsupported"]} >= {"mamba", "bert"}
    generated = run(
        "generate", "--model", tiny_folder, "--device", "cpu", "--profile", "p.json", "--prompt", "w3 w4",
        "--new-tokens", "9", "--json",
    )  # fmt: skip
    document = json.loads(generated.stdout)
    assert document["new_tokens"] == 9
    assert document["report"]["decode_steps"] == 8
    assert document["report"]["decode_steps_after_warm_up"] == 6
    assert len(document["report"]["skipped_per_layer"]) == 8


def test_prefill_mode_counts_all_but_the_first_position(
    here: Path, tiny_folder: Path, text_file: Path
) -> None:
    args = quick(tiny_folder, text_file)
    profile = json.loads(run(*args, "--mode", "prefill", "-o", "p.json", "--json").stdout)
    assert profile["calibration"]["corpora"][0]["tokens"] == 6 * 7
    assert profile["calibration"]["new_tokens"] == 0


def test_options_reach_the_policy(here: Path, tiny_folder: Path, text_file: Path) -> None:
    args = quick(tiny_folder, text_file)
    out = run(
        *args, "--cold-s", "2", "--cold-e", "7", "--max-skips", "3", "--target-skip-ratio", "0.2", "--json",
        "--seed", "5", "-o", "p.json", "--verify", "--closed-loop", "decode",
    ).stdout  # fmt: skip
    profile = json.loads(out)
    assert profile["policy"]["cold_s"] == 2
    assert profile["policy"]["cold_e"] == 7
    assert profile["policy"]["max_skips"] == 3
    assert profile["policy"]["warm_up_tokens"] == 2
    assert profile["regions"]["method"] == "given"
    assert profile["calibration"]["closed_loop"] == "decode"
    assert profile["config"]["seed"] == 5
    points = {point["target_skip_ratio"]: point for point in profile["operating_points"]}
    assert sorted(points) == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35])
    assert profile["policy"]["threshold"] == points[0.2]["threshold"]
    assert all((p["verified_skip_ratio"] is None) == (t > 0.2) for t, p in points.items())


def test_models_check_proves_every_family(monkeypatch: pytest.MonkeyPatch) -> None:
    from skipcal.arch import families

    some = {"gpt_neox", "llama", "mixtral"}  # all of them: tests/arch/test_locate.py
    monkeypatch.setattr(families, "FAMILIES", {n: families.FAMILIES[n] for n in some})
    out = run("models", "--check").stdout
    for line in (
        "gpt_neox +table +parallel",
        "llama +table +sequential",
        "mixtral +table +sequential mixture",
    ):
        assert re.search(rf"^{line} +\d\.\de-\d\d +post_attention_layernorm -> mlp$", out, re.M)
    assert re.search("^mamba +its layers have no FFN", out, re.M)
    for name in shipped_profiles():
        assert name in out


def test_show_prints_the_shipped_profile_within_80_columns() -> None:
    out = run("show", SHIPPED).stdout
    assert max(map(len, out.splitlines())) <= 80
    assert "skippable" in out
    assert "<- policy" in out


@pytest.mark.slow
def test_generate_streams_text_and_reports(here: Path) -> None:
    done = run("generate", "--profile", SHIPPED, "--prompt", "Why is the sky blue?", "--new-tokens", "30",
               "--device", "cpu", "--target-skip-ratio", "0.05")  # fmt: skip
    text, _, report = done.stdout.rpartition("\n\n")
    assert len(text) > 40
    assert re.search(r"30 tokens, \d+\.\d tokens/s in decoding; engine eager", report)
    assert re.search(r"\nset-up \d+\.\d\d s, prefill \d+\.\d\d s, decoding \d+\.\d\d s\n", report)
    assert "over all 29 decode steps" in report
    per_layer = [int(n) for n in report.rpartition("skipped per layer:")[2].split()]
    assert len(per_layer) == 30
    full = run("generate", "--profile", SHIPPED, "--prompt", "Why is the sky blue?", "--new-tokens", "4",
               "--device", "cpu", "--target-skip-ratio", "0", "--json")  # fmt: skip
    assert json.loads(full.stdout)["report"]["skipped_blocks"] == 0


# What does not


def test_a_checkpoint_that_lacks_weights_exits_with_4(here: Path, tiny_folder: Path) -> None:
    """transformers would fill them with random numbers and go on."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_folder, here / "part")
    weights = load_file(here / "part" / "model.safetensors")
    kept = {k: v for k, v in weights.items() if "layers.3.mlp" not in k}
    save_file(kept, here / "part" / "model.safetensors", metadata={"format": "pt"})
    line = refused("profile", "--model", "part", "-o", "p.json", code=4)
    assert "lacks weights for 3 parameters" in line
    assert "model.layers.3.mlp.down_proj.weight" in line
    (here / "part" / "model.safetensors").write_bytes(b"\x08\x00\x00\x00")
    assert "could not be loaded (SafetensorError" in refused(
        "profile", "--model", "part", "-o", "p.json", code=4
    )


def test_faulty_profiles_exit_with_3(here: Path) -> None:
    (here / "broken.json").write_text('{"format": "skipcal.profile/1"')
    assert "no valid JSON" in refused("show", "broken.json", code=3)
    (here / "foreign.json").write_text('{"model": 1}')
    assert "expected 'skipcal.profile/1'" in refused("plot", "foreign.json", "-o", "a.png", code=3)
    assert not (here / "a.png").exists()


def test_a_profile_of_another_model_exits_with_3(here: Path, tiny_folder: Path) -> None:
    line = refused(
        "generate", "--model", tiny_folder, "--profile", SHIPPED, "--prompt", "w1", "--device", "cpu", code=3
    )
    assert "made for HuggingFaceTB/SmolLM2-135M-Instruct" in line
    assert "give that model with --model HuggingFaceTB/SmolLM2-135M-Instruct" in line


def test_missing_things_exit_with_4(here: Path, tiny_folder: Path) -> None:
    assert "no shipped profile" in refused("show", "nothing", code=4)
    assert "check the path" in refused("profile", "--model", tiny_folder, "--data-files", "no.txt", code=4)
    assert "HF_HUB_OFFLINE" in refused("profile", "--model", "nobody/nothing", "-o", "p.json", code=4)
    line = refused("profile", "--model", tiny_folder, "--corpus", "nobody/nothing", "-o", "p.json", code=4)
    assert "--data-files PATH" in line
    line = refused("generate", "--profile", SHIPPED, "--prompt-file", "no.txt", code=4)
    assert "no.txt cannot be read" in line
    for name, content, message in (
        ("none.txt.gz", b"Why?", "it is not what .gz says"),
        ("utf-16.txt", "Why?".encode("utf-16-le"), "is binary, not text"),
        ("latin.txt", b"\xe4h?", "is not UTF-8 text (byte 0)"),
        ("cut.txt.gz", gzip.compress(b"Why is that so?")[:-9], "or is cut off"),
    ):
        (here / name).write_bytes(content)
        assert message in refused("generate", "--profile", SHIPPED, "--prompt-file", name, code=4)
    assert not (here / "p.json").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--prompts", "0"], "--prompts 0 cannot be used"),
        (["--prompts", "x"], "--prompts"),
        (["--target-skip-ratio", "25"], "--target-skip-ratio 25.0 cannot be used"),
        (["--target-skip-ratio", "nan"], "--target-skip-ratio nan cannot be used"),
        (["--target-skip-ratio", "0.99"], "target skip ratio 0.99 is out of reach"),
        (["--cold-s", "3"], "give both --cold-s and --cold-e"),
        (["--cold-s", "3", "--cold-e", "30"], "expected 1 <= cold_s < cold_e <= 7"),
        (["--mode", "train"], "--mode 'train' cannot be used"),
        (["--dtype", "int3"], "--dtype 'int3' cannot be used"),
        (["--device", "abacus"], "device 'abacus' cannot be used here"),
        (["--warm-up-tokens", "12"], "no token lies past the warm-up of 12"),
        (["--closed-loop", "maybe"], "--closed-loop 'maybe' cannot be used"),
        (["--data-files", "a.csv"], "'.csv'; expected .txt"),
        (["--nonsense"], "--nonsense"),
        (["--trace", "p.json"], "trace and output are both 'p.json'"),
        (["--attn-implementation", "magic"], "attn_implementation 'magic' cannot be used"),
        (["--new-tokens", "3000"], "do not fit the model's context of 256"),
        (["--config", "none.yaml"], "none.yaml cannot be read"),
        (["--trace", ""], "'--trace': it is empty"),
        (["--trace="], "'--trace': it is empty"),
        (["--data-files", ""], "'--data-files': it is empty"),
        (["--config", ""], "'--config': it is empty"),
    ],
)
def test_faulty_options_exit_with_2_before_anything_is_written(
    here: Path, tiny_folder: Path, text_file: Path, args: list[str], message: str
) -> None:
    line = refused(*quick(tiny_folder, text_file), *args, "-o", "p.json", code=2)
    assert message in line
    assert [p.name for p in here.iterdir()] == ["text.txt"]


@pytest.mark.parametrize(
    "args",
    [
        ("generate", "--profile="),
        ("plot", SHIPPED, "-o", ""),
        ("sweep", "-o", ""),
        ("profile", "-o", ""),
    ],
)
def test_a_word_without_anything_in_it_is_no_default(here: Path, args: tuple[str, ...]) -> None:
    assert "it is empty; give a value" in refused(*args, code=2)
    assert not list(here.iterdir())


def test_text_that_is_too_short_or_none_exits_with_4(here: Path, tiny_folder: Path, text_file: Path) -> None:
    line = refused(*quick(tiny_folder, text_file), "--prompts", "100", code=4)
    assert "it has 50 windows of 8 tokens, 100 are wanted" in line
    text_file.write_bytes(b"\x00\xff")
    assert "not UTF-8" in refused(*quick(tiny_folder, text_file), code=4)
    text_file.write_text("")
    assert "is empty" in refused(*quick(tiny_folder, text_file), code=4)


def test_an_output_that_exists_exits_with_2_at_once(here: Path, tiny_folder: Path, text_file: Path) -> None:
    (here / "p.json").write_text("mine")
    begin = time.monotonic()
    line = refused(*quick(tiny_folder, text_file), "-o", "p.json", code=2)
    assert "--overwrite" in line
    assert time.monotonic() - begin < 2, "the check comes before the work"
    assert (here / "p.json").read_text() == "mine"
    run(*quick(tiny_folder, text_file), "-o", "p.json", "--overwrite")
    assert SkipProfile.load(here / "p.json").model.name == "tiny-llama"


def test_an_output_that_cannot_be_written_exits_with_1(
    here: Path, tiny_folder: Path, text_file: Path
) -> None:
    (here / "file").write_text("")
    assert "cannot be written" in refused(*quick(tiny_folder, text_file), "-o", "file/p.json", code=1)
    (here / "folder.png").mkdir()
    assert "is a folder" in refused("plot", SHIPPED, "-o", "folder.png", code=1)


def test_generate_refuses_what_it_could_only_ignore(here: Path) -> None:
    base = ("generate", "--profile", SHIPPED)
    assert "give the prompt once" in refused(*base, code=2)
    assert "give the prompt once" in refused(*base, "--prompt", "a", "--prompt-file", "b", code=2)
    assert "the prompt is empty" in refused(*base, "--prompt", "  ", code=2)
    assert "add --do-sample" in refused(*base, "--prompt", "a", "--seed", "3", code=2)
    assert "--seed -1" in refused(*base, "--prompt", "a", "--seed", "-1", "--do-sample", code=2)
    assert "--new-tokens 0" in refused(*base, "--prompt", "a", "--new-tokens", "0", code=2)
    assert "not one of auto, eager, graph" in refused(*base, "--prompt", "a", "--engine", "fast", code=2)
    assert "out of reach" in refused(*base, "--prompt", "a", "--target-skip-ratio", "0.97", code=2)
    assert "not a percentage" in refused(*base, "--prompt", "a", "--target-skip-ratio", "25", code=2)


def test_debug_shows_the_traceback() -> None:
    done = run("show", "nothing", "--debug", code=4)
    assert "Traceback" in done.stderr


def test_a_configuration_file_is_used_and_options_win(here: Path, tiny_folder: Path, text_file: Path) -> None:
    (here / "run.yaml").write_text("prompts: 3\nseed: 7\noutput: from-file.json\n")
    args = [a for a in quick(tiny_folder, text_file) if a not in ("--prompts", "6")]
    profile = json.loads(run(*args, "--config", "run.yaml", "--seed", "8", "--json").stdout)
    assert profile["config"]["prompts"] == 3
    assert profile["config"]["seed"] == 8
    assert (here / "from-file.json").exists()
    (here / "run.yaml").write_text("promts: 3\n")
    assert "did you mean 'prompts'" in refused(*args, "--config", "run.yaml", code=2)


def test_an_interrupt_leaves_no_file(
    here: Path, tiny_folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the middle of the work, and in the middle of writing its result."""

    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    for place in ("skipcal.calibrate.pipeline.calibrate_together", "os.fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(place, interrupt)
            done = run(*quick(tiny_folder, text_file), "-o", "p.json", code=130)
        assert done.stdout == ""
        assert done.stderr.strip().splitlines()[-1] == "interrupted: no output was written or changed"
        assert [p.name for p in here.iterdir()] == ["text.txt"]


def test_a_reader_that_goes_away_is_no_error(here: Path) -> None:
    line = " ".join([sys.executable, "-m", "skipcal.cli", "show", SHIPPED])
    done = subprocess.run(f"{line} | head -1", shell=True, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("model")
    assert done.stderr == ""


def test_stderr_is_silent_when_it_is_no_terminal(
    here: Path, tiny_folder: Path, text_file: Path, warm: str
) -> None:
    env = {k: v for k, v in environment().items() if k != "TQDM_DISABLE"}
    command = [warm, "-m", "skipcal.cli", *quick(tiny_folder, text_file), "-o", "p.json"]
    command += ["--cold-s", "1", "--cold-e", "7", "--max-skips", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    assert "it/s" not in done.stderr
    assert "%|" not in done.stderr
