"""A model that comes with its own code, under names that no table knows."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import Oddity, decode

from skipcal.arch.families import FAMILIES, register_family
from skipcal.arch.loading import load_model
from skipcal.arch.locate import locate
from skipcal.core.policy import SkipPolicy
from skipcal.errors import UnsupportedModel
from skipcal.runtime.session import skipping

CONFIGURATION = """
from transformers import PreTrainedConfig


class BrookConfig(PreTrainedConfig):
    model_type = "brook"

    def __init__(self, depth=4, width=32, beside=False, first="mix", **kwargs):
        self.num_hidden_layers, self.hidden_size = depth, width
        self.vocab_size, self.beside, self.first = 97, beside, first
        super().__init__(**kwargs)
"""
MODELING = '''
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_brook import BrookConfig


class Mean(nn.Module):
    """Attends to all earlier tokens alike: the cache holds their sum."""

    def __init__(self, width, index):
        super().__init__()
        self.value, self.out, self.index = nn.Linear(width, width), nn.Linear(width, width), index

    def forward(self, x, places, past):
        values = self.value(x)[:, None]
        if past is not None:
            _, values = past.update(values, values, self.index)
        total = values[:, 0].cumsum(1)[:, -x.shape[1] :]
        return self.out(total / (places[..., None] + 1)), None


class Wide(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


class Stone(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        width = config.hidden_size
        self.one, self.two = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.wide = Mean(width, index), Wide(width)
        self.beside, self.first = config.beside, config.first

    def forward(self, x, places, past=None):
        if self.beside and self.first == "wide":
            wide = self.wide(self.two(x))
            return x + self.mix(self.one(x), places, past)[0] + wide
        mixed, _ = self.mix(self.one(x), places, past)
        if self.beside:
            return x + mixed + self.wide(self.two(x))
        h = x + mixed
        return h + self.wide(self.two(h))


class BrookForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = BrookConfig

    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(97, config.hidden_size)
        self.stones = nn.ModuleList(Stone(config, i) for i in range(config.num_hidden_layers))
        self.head = nn.Linear(config.hidden_size, 97)
        self.post_init()

    def get_input_embeddings(self):
        return self.words

    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=True, **kwargs):
        from transformers import DynamicCache

        past = past_key_values
        if use_cache and past is None:
            past = DynamicCache()
        start = 0 if past is None else past.get_seq_length()
        places = torch.arange(start, start + input_ids.shape[1])[None]
        x = self.words(input_ids)
        for stone in self.stones:
            x = stone(x, places, past=past)
        return CausalLMOutputWithPast(logits=self.head(x), past_key_values=past)
'''


@pytest.fixture(autouse=True)
def _modules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Code of models is copied to a folder of its own, and imported from there."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    paths, known = list(sys.path), set(sys.modules)
    yield
    FAMILIES.pop("brook", None)
    sys.path[:] = paths
    for name in set(sys.modules) - known:
        if name.startswith("transformers_modules"):
            del sys.modules[name]


def brook(tmp_path: Path, **settings: Any) -> Any:
    """The model, loaded as a user would from a folder with its code."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path / "brook"
    folder.mkdir()
    (folder / "configuration_brook.py").write_text(CONFIGURATION)
    (folder / "modeling_brook.py").write_text(MODELING)
    auto = {"AutoConfig": "configuration_brook.BrookConfig",
            "AutoModelForCausalLM": "modeling_brook.BrookForCausalLM"}  # fmt: skip
    (folder / "config.json").write_text(json.dumps({"model_type": "brook", "auto_map": auto, **settings}))
    words = Tokenizer(WordLevel({f"w{n}": n for n in range(97)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    for parameter in model.parameters():
        parameter.mul_(1.0 if parameter.dim() == 1 else 8.0)
    model.save_pretrained(folder)
    loaded: Any = load_model(str(folder), device="cpu", trust_remote_code=True).model
    shutil.rmtree(folder)
    return loaded


@pytest.mark.parametrize("beside", [False, True])
def test_blocks_under_names_nobody_knows_are_found_and_skipped(tmp_path: Path, beside: bool) -> None:
    model = brook(tmp_path, beside=beside)
    found = locate(model)
    assert (found.found, found.model_type) == ("structure", "brook")
    assert found.kind == ("parallel" if beside else "sequential")
    assert found.family.chain == ("two", "wide")
    assert found.family.attention == ("mix" if beside else None)

    policy = SkipPolicy(cold_s=0, cold_e=4, threshold=0.8, warm_up_tokens=1, max_skips=2)
    by_hand = decode(model, Oddity(layers="stones", adds=("wide",)), [5, 17, 31], 10, policy)
    with skipping(model, policy=policy) as run:
        out = model.generate(input_ids=torch.tensor([[5, 17, 31]]), max_new_tokens=10, do_sample=False)
    assert out[0, 3:].tolist() == by_hand.tokens
    assert run.report.skipped_blocks == sum(map(len, by_hand.skipped)) > 0
    assert (
        run.report.engine_reason == "recorded is not possible: attention 'eager' is not torch's own; sdpa is"
    )


def test_a_model_with_its_own_code_can_be_registered(tmp_path: Path) -> None:
    model = brook(tmp_path, beside=True)
    register_family("brook", layers="stones", chain=("wide",), attention="mix")
    found = locate(model)
    assert (found.found, found.kind, found.family.chain) == ("table", "parallel", ("wide",))


def test_an_ffn_that_runs_before_attention_is_refused(tmp_path: Path) -> None:
    """Its decision would need what attention has not computed yet."""
    model = brook(tmp_path, beside=True, first="wide")
    with pytest.raises(UnsupportedModel, match=r"stones: in layer 0 no run of modules has h \+ f == sum"):
        locate(model)
    register_family("brook", layers="stones", chain=("wide",), attention="mix")
    with pytest.raises(UnsupportedModel, match="layer 0: the modules were not called in that order"):
        locate(model)
