"""Run configurations: files, options over them, and faults in one line."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml

from skipcal.configs.run import ProfileConfig, load_config, read_yaml
from skipcal.configs.sweep import load_sweep
from skipcal.errors import ConfigError

SHIPPED = sorted(f.name for f in resources.files("skipcal.configs").iterdir() if f.name.endswith(".yaml"))


def test_options_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("prompts: 8\nseed: 3\ncorpus: [c4]\n")
    config = load_config(path, {"prompts": 2, "seed": None, "corpus": [], "new_tokens": 40})
    assert (config.prompts, config.seed, config.corpus, config.new_tokens) == (2, 3, ["c4"], 40)


def test_default_corpora_depend_on_the_model() -> None:
    assert ProfileConfig().corpora() == ["embedded"]
    assert ProfileConfig(model="org/m").corpora() == ["wikitext", "c4"]
    assert ProfileConfig(corpus=["c4"]).corpora() == ["c4"]
    assert ProfileConfig(model="org/m", data_files=["a.txt"]).corpora() == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("promtps: 3", "unknown key 'promtps'; did you mean 'prompts'"),
        ("zzz: 3", "unknown key 'zzz'; known: adapter"),
        ("prompts: 0", "prompts 0 cannot be used"),
        ("prompts: many", "prompts 'many' cannot be used"),
        ("target_skip_ratio: 25", "target_skip_ratio 25 cannot be used"),
        ("target_skip_ratio: .nan", "target_skip_ratio nan cannot be used"),
        ("mode: train", "mode 'train' cannot be used: expected 'generate' or 'prefill'"),
        ("cold_s: 3", "cold_s and cold_e belong together"),
        ("mode: prefill\nclosed_loop: decode", "does not go with mode prefill"),
        ("- a\n- b", "expected `key: value` lines"),
        ("a: [", "is no YAML"),
        ("7: 8", "expected `key: value` lines"),
    ],
)
def test_a_faulty_file_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        load_config(path, {})
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_faulty_option_is_named_as_it_is_typed() -> None:
    with pytest.raises(ConfigError, match="--prompt-tokens 1 cannot be used"):
        load_config(None, {"prompt_tokens": 1})


def test_a_missing_or_binary_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "none.yaml", {})
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is no YAML"):
        load_config(tmp_path / "b.yaml", {})


def test_an_empty_file_is_the_default(tmp_path: Path) -> None:
    (tmp_path / "e.yaml").write_text("# nothing yet\n")
    assert load_config(tmp_path / "e.yaml", {}) == ProfileConfig()


def test_what_is_recorded_names_no_place_on_this_computer(tmp_path: Path) -> None:
    config = ProfileConfig(
        model=str(tmp_path),
        data_files=[f"w={tmp_path}/a.txt", f"{tmp_path}/b.jsonl", f"gsm8k:in-context={tmp_path}/g.jsonl"],
        output="/o/p.json",
    )
    recorded = config.recorded()
    assert str(tmp_path) not in str(recorded)
    assert recorded["data_files"] == ["w=a.txt", "b.jsonl", "gsm8k:in-context=g.jsonl"]
    assert recorded["model"] == tmp_path.name
    assert not {"output", "overwrite", "trace"} & set(recorded)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_configuration_is_valid_and_short(name: str, tmp_path: Path) -> None:
    text = (resources.files("skipcal.configs") / name).read_text()
    (tmp_path / name).write_text(text)
    settings = yaml.safe_load(text)
    load: Any = load_sweep if "tasks" in settings else load_config
    config = load(tmp_path / name, {})
    assert config.model_dump(exclude_unset=True).keys() == settings.keys()
    assert load(Path(name.removesuffix(".yaml")), {}) == config  # by its name alone
    command = "sweep" if "tasks" in settings else "profile"
    assert f"skipcal {command} --config {name.removesuffix('.yaml')}" in text
    assert text.startswith("# ")
    assert len(text.splitlines()) < 20


def test_a_folder_named_like_a_shipped_configuration_does_not_hide_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("gate-sweep").mkdir()
    assert read_yaml(Path("gate-sweep"))["profile"] == "smollm2-135m-instruct"
    Path("gate-sweep").rmdir()
    Path("gate-sweep").write_text("profile: mine.json\n")
    assert read_yaml(Path("gate-sweep")) == {"profile": "mine.json"}
