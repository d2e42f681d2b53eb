"""What all tests share: the package on the path, tiny models, the embedded model."""

from __future__ import annotations

import argparse
import atexit
import gc
import importlib.util
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, so it stands first
os.environ["TQDM_DISABLE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # two workers with two threads each would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

if importlib.util.find_spec("skipcal") is None:  # a clone that was never installed
    link = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, link)  # takes the link away, not what it points to
    (Path(link) / "skipcal").symlink_to(ROOT, target_is_directory=True)
    sys.path.insert(0, link)
    old = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{link}{os.pathsep}{old}" if old else link

sys.path.insert(0, str(ROOT / "tests"))  # for `import oracle`

_options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
_options.add_argument("-n", "--numprocesses", default="0")
# A process that only hands tests out to others needs nothing of all this, and they wait for it to begin.
HANDS_OUT = (
    "PYTEST_XDIST_WORKER" not in os.environ
    and _options.parse_known_args()[0].numprocesses != "0"
    and not {"--pdb", "--co", "--collect-only"} & set(sys.argv)  # with which it works alone
)

if not HANDS_OUT:
    gc.disable()  # what is imported stays; to look it through again and again takes seconds

    import torch

    if importlib.util.find_spec("triton") and not torch.cuda.is_available():  # then kernels are interpreted
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which transformers does
        from interpreted import mend_loop_bounds, patch_language_once

        mend_loop_bounds()
        patch_language_once()

    import matplotlib
    import warm_python
    from interpreted import Reads
    from transformers import PreTrainedModel

    from skipcal.arch.check import tiny_model
    from skipcal.arch.loading import LoadedModel, load_model
    from skipcal.arch.locate import locate
    from skipcal.calibrate.pipeline import calibrate_model
    from skipcal.configs.fit import FitConfig
    from skipcal.configs.run import ProfileConfig
    from skipcal.fit.pipeline import fit_gate_profile
    from skipcal.profiles.schema import SkipProfile

    gc.enable()
    matplotlib.use("Agg")

# Families whose layers every engine can run; all kinds of layers are in arch/test_architectures.py.
DENSE = (
    "gemma", "gemma2", "gemma3_text", "gpt2", "granite", "llama", "mistral", "olmo", "olmo2", "olmo3", "opt",
    "phi3", "qwen2", "qwen3", "smollm3", "starcoder2",
)  # fmt: skip


APART = ("test_notebooks.py",)  # files whose tests share nothing and take long
# Files that take the longest, longest first: what is begun last should be short, for the ends to be even.
LONG = (
    "test_notebooks.py", "test_cli_evaluation.py", "docs/test_pages.py", "runtime/test_graph_engine.py",
    "speed/test_gpu_visit.py", "core/test_methods.py", "runtime/test_skip_rule.py",
    "evaluation/test_sweep.py", "runtime/test_step_proof.py", "ops/test_compiled.py",
    "profiles/test_mutations.py",
    "calibrate/test_pipeline.py", "runtime/test_recorded.py", "runtime/test_kept_steps.py",
    "calibrate/test_large_runs.py",
    "arch/test_architectures.py", "test_cli_terminal.py", "runtime/test_session.py", "test_cli.py",
    "runtime/test_session_intruders.py", "fit/test_pipeline.py", "test_cli_fit.py", "docs/test_build.py",
    "runtime/test_offloaded.py", "test_file_names.py", "runtime/test_tensor_parallel.py",
    "speed/test_bench.py", "arch/test_loading.py", "profiles/test_properties.py", "test_release.py",
)  # fmt: skip


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadfile` a file's tests stay in one process, so that its fixtures are made once.

    Files are handed out in the order of `pytest_collection_modifyitems`. (xdist's `loadgroup`, which
    would group by a mark, groups nothing with xdist 3.8 under pytest 9.2.)
    """
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadScopeScheduling

    def group(nodeid: str) -> str:
        file = nodeid.split("::", 1)[0]
        return nodeid if Path(file).name in APART else file

    config.option.loadscopereorder = False  # by the number of tests, which tells little
    scheduler = LoadScopeScheduling(config, log)
    scheduler._split_scope = group
    return scheduler


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In several processes: what takes long first, then files of many tests."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    counts = Counter(item.path for item in items)
    rank = {ROOT / "tests" / file: number for number, file in enumerate(LONG)}
    items.sort(key=lambda item: (rank.get(item.path, len(LONG)), -counts[item.path], item.path))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is collected stays, too."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(autouse=True)
def _no_open_figures() -> None:
    """Figures that a test finds open are its own, whatever ran in its process before."""
    if pyplot := sys.modules.get("matplotlib.pyplot"):
        pyplot.close("all")


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def lively(model_type: str = "llama", **overrides: Any) -> PreTrainedModel:
    """A tiny model whose FFNs add about as much as is there, so that cosines differ by token.

    Freshly initialised FFNs add next to nothing: every cosine would be 1.
    """
    model = tiny_model(model_type, **overrides)
    for block in locate(model).blocks:
        for name, parameter in torch.nn.ModuleList(block.chain).named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(14.0)
            elif "bias" not in name:
                parameter.add_(torch.rand_like(parameter) * 0.5)
    model.generation_config.eos_token_id = None  # rows of random tokens should not end by chance
    model.generation_config.pad_token_id = 0
    return model


def attentive(model: Any) -> Any:
    """The model with attention that adds about as much as is there, so that tokens depend on each other."""
    for name, parameter in model.named_parameters():
        if "attn" in name and parameter.dim() == 2:
            parameter.mul_(10.0)
    return model


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """What interpreted kernels read."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("only interpreted kernels can be watched")
    from triton.runtime import interpreter

    found = Reads()
    load = interpreter._interpreter.load

    def watched(addresses: Any, mask: Any, *rest: Any) -> Any:
        found.add(addresses, mask)
        return load(addresses, mask, *rest)

    monkeypatch.setattr(interpreter._interpreter, "load", watched)
    return found


@pytest.fixture
def references(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ops run as their torch references: the interpreter takes a millisecond for each block."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Python whose starts cost next to nothing: see `warm_python`."""
    with warm_python.started(tmp_path_factory.mktemp("warm")) as path:
        yield path


@pytest.fixture
def tiny() -> PreTrainedModel:
    return lively("llama")


@pytest.fixture(scope="session")
def smollm() -> LoadedModel:
    return load_model(device="cpu")


@pytest.fixture(scope="session")
def smollm_profile(smollm: LoadedModel) -> SkipProfile:
    """A small but real profile of the embedded model: a few prompts, few passes."""
    config = ProfileConfig(
        prompts=4, prompt_tokens=16, new_tokens=24, warm_up_tokens=4, closed_loop_prompts=2, max_skips=3
    )
    with torch.no_grad():
        return calibrate_model(smollm, config).profile


def word_tokenizer() -> Any:
    """A tokenizer of 97 words, w0 to w96."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"w{n}": n for n in range(97)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0")


def saved(model: Any, folder: Path) -> str:
    """A folder with the model and a tokenizer of words, as `--model` takes it."""
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def worded() -> LoadedModel:
    """A lively Llama of 8 layers with a tokenizer of 97 words."""
    torch.manual_seed(0)
    with torch.no_grad():
        model = lively("llama", num_hidden_layers=8)
    return LoadedModel(model=model, tokenizer=word_tokenizer(), name="tiny", revision=None)


@pytest.fixture(scope="session")
def worded_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("worded") / "words.txt"
    ids = torch.randint(3, 97, (1600,), generator=torch.Generator().manual_seed(0)).tolist()
    path.write_text(" ".join(f"w{n}" for n in ids))
    return path


@pytest.fixture(scope="session")
def worded_profile(worded: LoadedModel, worded_text: Path) -> SkipProfile:
    """By the paper's rule, with a warm-up of 2."""
    config = ProfileConfig(
        data_files=[str(worded_text)], prompts=8, prompt_tokens=8, new_tokens=16, warm_up_tokens=2,
        closed_loop_prompts=4, cold_s=1, cold_e=7, device="cpu",
    )  # fmt: skip
    with torch.no_grad():
        return calibrate_model(worded, config).profile


def quick_profile(loaded: LoadedModel, text: Path) -> SkipProfile:
    """By the paper's rule, of a model of 4 layers, in a second or two."""
    config = ProfileConfig(
        data_files=[str(text)], prompts=4, prompt_tokens=8, new_tokens=8, warm_up_tokens=2,
        closed_loop_prompts=2, cold_s=1, cold_e=3,
    )  # fmt: skip
    return calibrate_model(loaded, config).profile


def fit_config(worded_text: Path, **changes: Any) -> FitConfig:
    """A fit of a second: 20 windows of 24 tokens and 10 to close the loop on."""
    settings: dict[str, Any] = {
        "data_files": [str(worded_text)], "prompts": 20, "prompt_tokens": 24, "rank": 3, "damage_prompts": 4,
        "closed_loop_prompts": 10, "device": "cpu",
    }  # fmt: skip
    return FitConfig(**{**settings, **changes})


@pytest.fixture(scope="session")
def gated(worded: LoadedModel, worded_profile: SkipProfile, worded_text: Path) -> SkipProfile:
    """`worded_profile` with a gate that was fitted."""
    with torch.no_grad():
        return fit_gate_profile(worded, worded_profile, fit_config(worded_text))


def left_padded(rows: list[list[int]], pad: int = 0) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask of unlike rows, padded on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}
