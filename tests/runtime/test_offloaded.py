"""Models whose weights are partly on disk: everything as on the plain model, and accelerate's hooks stay."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import fit_config, lively, quick_profile, saved
from gated import gates_for, generated, surrogates_for

from skipcal.arch.loading import LoadedModel, fingerprint, load_model
from skipcal.arch.locate import locate
from skipcal.calibrate.capture import capture
from skipcal.core.gate import GatePolicy
from skipcal.core.policy import Policy, SkipPolicy
from skipcal.core.substituted import Substituted
from skipcal.errors import Unavailable
from skipcal.fit.pipeline import fit_gate_profile
from skipcal.runtime.session import skipping
from skipcal.speed.cost import step_bytes

IDS = torch.randint(3, 97, (2, 24), generator=torch.Generator().manual_seed(1))
SOME = SkipPolicy(cold_s=0, cold_e=4, threshold=0.6, warm_up_tokens=1)


class Pair(NamedTuple):
    """The same weights in memory, and with 29 or more of their tensors on disk."""

    plain: LoadedModel
    offloaded: LoadedModel


def pair_of(model: Any, folder: Path) -> Pair:
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    place = saved(model, folder)
    limits: Any = {"cpu": f"{0.6 * size / 1000:.1f}KB"}
    options: dict[str, Any] = {"device_map": "auto", "max_memory": limits}
    if model.config.model_type == "mixtral":  # its experts are stored apart and computed together
        options["offload_folder"] = str(folder / "offloaded")
    pair = Pair(load_model(place, device="cpu"), load_model(place, **options))
    assert sum(p.is_meta for p in pair.offloaded.model.parameters()) > 20
    return pair


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "gemma2": ("gemma2", {}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    kind, settings = KINDS[request.param]
    torch.manual_seed(0)
    with torch.no_grad():
        return pair_of(lively(kind, **settings), tmp_path_factory.mktemp(request.param))


def policies(model: Any) -> dict[str, Policy]:
    gates, surrogates = gates_for(model), surrogates_for(model)
    return {
        "cosine": SOME,
        "cosine+surrogates": Substituted(SOME, surrogates),
        "gate": GatePolicy(gates=gates, surrogates=surrogates, threshold=0.3, warm_up_tokens=1),
    }


def state(model: Any) -> list[Any]:
    """Of every module: its attributes, its hooks, whose `forward` it has, where its weights are."""
    return [
        (
            name,
            sorted(m.__dict__),
            id(m.__dict__.get("forward")),
            id(m.__dict__.get("_hf_hook")),
            [(key, str(p.device)) for key, p in m.named_parameters(recurse=False)],
            len(m._forward_hooks),
            len(m._forward_pre_hooks),
        )
        for name, m in model.named_modules()
    ]


def test_weights_are_the_same_wherever_they_are(pair: Pair) -> None:
    plain, offloaded = pair.plain.model, pair.offloaded.model
    assert fingerprint(offloaded) == fingerprint(plain)
    mine, its = locate(offloaded), locate(plain)
    assert [b.weight_bytes for b in mine.blocks] == [b.weight_bytes for b in its.blocks]
    assert [b.layer_bytes for b in mine.blocks] == [b.layer_bytes for b in its.blocks]
    costs = [step_bytes(m, a, batch_size=1, tokens=9) for m, a in ((offloaded, mine), (plain, its))]
    assert costs[0] == costs[1]


def test_an_offloaded_weight_changes_the_fingerprint(tmp_path: Path) -> None:
    model: Any = lively("llama")
    marks = []
    for folder in ("one", "two"):
        pair = pair_of(model, tmp_path / folder)
        marks.append(fingerprint(pair.offloaded.model))
        assert pair.offloaded.model.model.layers[3].mlp.down_proj.weight.is_meta
        model.model.layers[3].mlp.down_proj.weight.mul_(1.5)
    assert marks[0] != marks[1]


def test_cosines_are_those_of_the_plain_model(pair: Pair) -> None:
    taken = []
    for model in (pair.plain.model, pair.offloaded.model):
        with capture(model) as recorder:
            model(IDS)
        taken.append(recorder.take())
    assert (taken[0][0] == taken[1][0]).all() and (taken[0][1] == taken[1][1]).all()


@pytest.mark.parametrize("rule", ["cosine", "cosine+surrogates", "gate"])
def test_skipping_is_that_of_the_plain_model(pair: Pair, rule: str) -> None:
    policy = policies(pair.plain.model)[rule]
    output, report = generated(pair.plain.model, policy)
    mine, its = generated(pair.offloaded.model, policy)
    assert mine.sequences.tolist() == output.sequences.tolist()
    assert all(torch.equal(a, b) for a, b in zip(mine.logits, output.logits, strict=True))
    assert replace(its, engine_reason=report.engine_reason) == report and its.engine == "eager"
    assert 0 < report.skipped_blocks < 4 * report.decode_steps_after_warm_up

    forced = []
    for model in (pair.plain.model, pair.offloaded.model):
        with skipping(model, policy=policy, teacher_forced=True, prompt_tokens=3) as run:
            forced.append((model(IDS).logits, run.report.skipped_per_layer))
    assert torch.equal(forced[0][0], forced[1][0]) and forced[0][1] == forced[1][1]
    assert sum(forced[0][1]) > 0


def test_skipped_ffns_are_not_read_from_disk(pair: Pair) -> None:
    model: Any = pair.offloaded.model
    architecture = locate(model)
    block = architecture.blocks[2]
    hooks: list[Any] = [
        m._hf_hook for m in block.chain[1].modules() if getattr(m, "_hf_hook", None) is not None
    ]
    reads: list[str] = []
    offloaded = [hook for hook in hooks if getattr(hook, "offload", False)]
    assert offloaded
    for hook in offloaded:
        hook.weights_map = Counted(hook.weights_map, reads)
    always = SkipPolicy(cold_s=1, cold_e=4, threshold=-1.0, warm_up_tokens=0)
    try:
        with skipping(model, policy=always, architecture=architecture) as run:
            model.generate(IDS[:1], attention_mask=torch.ones_like(IDS[:1]), max_new_tokens=1)
            prefill = len(reads)
            model.generate(IDS[:1], attention_mask=torch.ones_like(IDS[:1]), max_new_tokens=5)
    finally:
        for hook in offloaded:
            hook.weights_map = hook.weights_map.inner
    assert run.report.skipped_per_layer[2] == 4
    assert len(reads) == 2 * prefill > 0  # both prefills, no decode step


class Counted:
    """A map of weights that notes what is read."""

    def __init__(self, inner: Any, reads: list[str]) -> None:
        self.inner = inner
        self._reads = reads

    def __getitem__(self, name: str) -> torch.Tensor:
        self._reads.append(name)
        found: torch.Tensor = self.inner[name]
        return found


def test_accelerates_hooks_stay_and_nothing_else(pair: Pair) -> None:
    model: Any = pair.offloaded.model
    before, logits = state(model), model(IDS).logits
    for policy in policies(model).values():
        generated(model, policy)
        with pytest.raises(RuntimeError, match="on purpose"), skipping(model, policy=policy):
            model.generate(IDS[:1], attention_mask=torch.ones_like(IDS[:1]), max_new_tokens=2)
            raise RuntimeError("on purpose")
    fingerprint(model)
    with capture(model):
        model(IDS)
    assert state(model) == before
    assert torch.equal(model(IDS).logits, logits)


def test_a_whole_calibration_is_that_of_the_plain_model(pair: Pair, worded_text: Path) -> None:
    plain, offloaded = (quick_profile(loaded, worded_text) for loaded in pair)
    assert len(plain.operating_points) > 1 and plain.operating_points[0].realised_skip_ratio
    for part in ("model", "calibration", "layers", "regions", "policy", "operating_points"):
        assert getattr(offloaded, part) == getattr(plain, part), part


def test_a_gate_is_fitted_as_on_the_plain_model(
    tmp_path: Path, worded_text: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pair = pair_of(lively("llama"), tmp_path)
    plain = quick_profile(pair.plain, worded_text)
    config = fit_config(worded_text, prompts=8, closed_loop_prompts=3)
    fitted = [fit_gate_profile(loaded, plain, config) for loaded in pair]
    assert [p.threshold for p in fitted[0].gate.operating_points] == [  # type: ignore[union-attr]
        p.threshold
        for p in fitted[1].gate.operating_points  # type: ignore[union-attr]
    ]
    assert "other weights" not in caplog.text


def test_other_offloaded_weights_are_told_of(tmp_path: Path, worded_text: Path, caplog: Any) -> None:
    profile = quick_profile(pair_of(lively("llama"), tmp_path / "mine").plain, worded_text)
    others = pair_of(lively("llama", seed=5), tmp_path / "others").offloaded.model
    profile.check_fits(others)
    assert "other weights" in caplog.text


def test_weights_that_must_be_stored_anew_ask_for_a_folder(tmp_path: Path) -> None:
    place = saved(lively("mixtral"), tmp_path)
    with pytest.raises(Unavailable, match="--offload-folder"):
        load_model(place, device_map="auto", max_memory={"cpu": "100KB"})
