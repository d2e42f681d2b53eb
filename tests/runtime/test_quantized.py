"""Quantized weights: located, proven, skipped and restored; bytes are those that are stored."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import lively, quick_profile, saved
from gated import PROMPT, gates_for, generated, surrogates_for
from oracle import decode

from skipcal.arch.loading import LoadedModel, fingerprint, load_model
from skipcal.arch.locate import locate
from skipcal.arch.quantization import QUANTIZATIONS
from skipcal.arch.stored import compute_place, stored_bytes
from skipcal.core.gate import GatePolicy
from skipcal.core.policy import Policy, SkipPolicy
from skipcal.core.substituted import Substituted
from skipcal.errors import ConfigError
from skipcal.speed.cost import step_bytes

# torchao 0.18 and bitsandbytes 0.50 use what torch 2.13 calls old.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

HIDDEN, FFN = 64, 128
IDS = torch.arange(3, 23)[None]
SOME = SkipPolicy(cold_s=0, cold_e=4, threshold=0.6, warm_up_tokens=1)
# Bytes beside a weight's own: by rows and columns of a linear layer.
SCALES = {
    "torchao:int8": lambda rows, columns: 5 * rows,  # float32 and an int8 zero point a row
    "bitsandbytes:int8": lambda rows, columns: 4 * rows,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    with torch.no_grad():
        model = lively("llama", hidden_size=HIDDEN, intermediate_size=FFN, head_dim=32)
    return saved(model, tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module", params=QUANTIZATIONS)
def loaded(request: pytest.FixtureRequest, folder: str) -> LoadedModel:
    library = request.param.partition(":")[0]
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    return load_model(folder, quantization=request.param, device="cpu", dtype="float32")


def name_of(loaded: LoadedModel) -> str:
    found = str(loaded.described()["quantization"])
    return "torchao:int8" if found == "torchao:Int8WeightOnlyConfig" else found


def test_blocks_are_found_and_their_bytes_are_those_stored(loaded: LoadedModel, folder: str) -> None:
    architecture = locate(loaded.model)
    assert architecture.proof_error < 1e-6
    scales = SCALES.get(name_of(loaded))
    if scales is None:  # 4 bits a weight, and a scale for each 64
        assert FFN * HIDDEN * 3 * 0.5 < architecture.blocks[1].weight_bytes < FFN * HIDDEN * 3 * 0.6
    else:
        linears = FFN * HIDDEN * 3 + scales(FFN, HIDDEN) * 2 + scales(HIDDEN, FFN)
        assert architecture.blocks[1].weight_bytes == linears + 4 * HIDDEN  # and the norm
    again = locate(loaded.model)
    assert [b.weight_bytes for b in again.blocks] == [b.weight_bytes for b in architecture.blocks]
    layers = sum(block.layer_bytes for block in architecture.blocks)
    outside = 4 * (HIDDEN + 97 * HIDDEN)  # the last norm and the head are not quantized
    assert step_bytes(loaded.model, architecture, batch_size=1, tokens=1).weights == layers + outside


def test_fingerprints_tell_quantized_weights_apart(loaded: LoadedModel, folder: str) -> None:
    plain = load_model(folder, device="cpu")
    again = load_model(folder, quantization=name_of(loaded), device="cpu", dtype="float32")
    loaded.model(IDS)
    assert fingerprint(loaded.model) == fingerprint(again.model) != fingerprint(plain.model)


def policies(model: Any) -> list[Policy]:
    gates, surrogates = gates_for(model), surrogates_for(model)
    return [
        SOME,
        Substituted(SOME, surrogates),
        GatePolicy(gates=gates, surrogates=surrogates, threshold=0.0, warm_up_tokens=1),
    ]


def test_skipping_is_the_rule_and_leaves_nothing(loaded: LoadedModel) -> None:
    model: Any = loaded.model
    logits = model(IDS).logits
    before = [(name, sorted(m.__dict__), len(m._forward_hooks)) for name, m in model.named_modules()]
    for policy in policies(model):
        expected = decode(model, PROMPT, policy, 12)
        output, report = generated(model, policy)
        assert output.sequences[0, len(PROMPT) :].tolist() == expected.tokens
        counts = [sum(layer in step for step in expected.skipped) for layer in range(4)]
        assert list(report.skipped_per_layer) == counts and 0 < sum(counts) < 40
    after = [(name, sorted(m.__dict__), len(m._forward_hooks)) for name, m in model.named_modules()]
    assert before == after
    assert torch.equal(model(IDS).logits, logits)


def test_surrogates_lie_in_the_precision_that_layers_compute_in(folder: str) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    model = load_model(folder, quantization="torchao:int8", device="cpu", dtype="bfloat16").model
    placed = surrogates_for(model).for_blocks(locate(model).blocks)
    assert {t.dtype for m in placed.maps.values() for t in vars(m).values()} == {torch.bfloat16}


def test_weights_of_8_bit_floats_compute_in_more() -> None:
    layer: Any = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.RMSNorm(4))
    layer[0].weight = torch.nn.Parameter(layer[0].weight.to(torch.float8_e4m3fn), requires_grad=False)
    layer[1].to(torch.bfloat16)
    assert compute_place(layer) == (torch.device("cpu"), torch.bfloat16)
    assert stored_bytes(layer[0].weight) == 16


def test_a_profile_says_how_weights_are_quantized(
    loaded: LoadedModel, folder: str, worded_text: Path, caplog: pytest.LogCaptureFixture
) -> None:
    profile = quick_profile(loaded, worded_text)
    assert profile.model.quantization == loaded.described()["quantization"]
    profile.check_fits(loaded.model)
    assert not [record for record in caplog.records if record.name.startswith("skipcal")]
    profile.check_fits(load_model(folder, device="cpu").model)
    assert f"made with quantization {profile.model.quantization}, the model has none" in caplog.text


def test_a_checkpoint_that_is_quantized_loads_as_it_is(folder: str, tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    first = load_model(folder, quantization="torchao:int8", device="cpu")
    place = saved(first.model, tmp_path)
    again = load_model(place, device="cpu")
    assert fingerprint(again.model) == fingerprint(first.model)
    assert again.described()["quantization"] == "torchao:Int8WeightOnlyConfig"
    assert torch.equal(again.model(IDS).logits, first.model(IDS).logits)
    with pytest.raises(
        ConfigError, match=r"is quantized already \(torchao\), so quantization 'torchao:int8'"
    ):
        load_model(place, quantization="torchao:int8", device="cpu")
