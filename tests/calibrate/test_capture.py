"""Capturing `cos_i`: the right pair of tensors, nothing kept, nothing left."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from conftest import DENSE, left_padded, lively

from skipcal.arch.loading import LoadedModel
from skipcal.calibrate.capture import capture
from skipcal.core.residual import norm_ratio, residual_cosine, residual_cosine_of_one
from skipcal.errors import SessionError


def by_hand(model: Any, ids: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cosines and norm ratios of the residual stream, and those of the FFN module, by walking a Llama."""
    stack = model.model
    h = stack.embed_tokens(ids)
    positions = torch.arange(ids.shape[1])[None]
    rotary = stack.rotary_emb(h, position_ids=positions)
    mask = torch.full((ids.shape[1],) * 2, float("-inf")).triu(1)[None, None]
    cosines, ratios, modules = [], [], []
    for layer in stack.layers:
        attended, _ = layer.self_attn(layer.input_layernorm(h), rotary, mask)
        h = h + attended
        x = layer.post_attention_layernorm(h)
        f = layer.mlp(x)
        a, b = h.double(), (h + f).double()
        cosines.append((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)))
        ratios.append(f.norm(dim=-1) / h.norm(dim=-1))
        modules.append(torch.nn.functional.cosine_similarity(x, f, dim=-1))
        h = h + f
    return tuple(torch.stack(part, -1).flatten(0, 1).numpy() for part in (cosines, ratios, modules))  # type: ignore[return-value]


@pytest.mark.slow
def test_cosines_are_those_of_the_residual_stream_and_not_of_the_ffn_module(smollm: LoadedModel) -> None:
    ids = torch.tensor([smollm.tokenizer("The moon raises two tides a day in most places.")["input_ids"]])
    cosines, ratios, modules = by_hand(smollm.model, ids)
    with capture(smollm.model) as recorder:
        smollm.model(ids)
    got, got_ratios = recorder.take()
    assert got.shape == (ids.shape[1], 30)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, cosines, atol=1e-5)
    np.testing.assert_allclose(got_ratios, ratios, rtol=1e-4)
    # The module's own input and output are nearly orthogonal; mistaking them for the pair is the
    # classic error, and would put every middle layer far below any threshold.
    assert np.abs(modules[:, 2:28].mean()) < 0.3
    assert got[:, 2:28].mean() > 0.9


@pytest.mark.parametrize("model_type", [*DENSE, "gpt_neox", "falcon", "mixtral", "recurrent_gemma"])
def test_capture_changes_no_logit_and_leaves_no_hook(model_type: str) -> None:
    model: Any = lively(model_type)
    inputs = left_padded([[5, 6, 7, 8, 9], [11, 12]], pad=0)
    expected = model(**inputs).logits
    with capture(model) as recorder:
        logits = model(**inputs).logits
    cosines, ratios = recorder.take()
    assert torch.equal(logits, expected)
    assert cosines.shape == ratios.shape == (10, 4)
    assert np.all(np.abs(cosines) <= 1)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_hooks_go_when_the_model_raises(tiny: Any) -> None:
    with pytest.raises(IndexError), capture(tiny):
        tiny(torch.tensor([[10_000]]))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny.modules())


def test_taking_without_a_pass_is_an_error(tiny: Any) -> None:
    with capture(tiny) as recorder, pytest.raises(SessionError, match="0 of 4 FFN blocks"):
        recorder.take()


def test_only_numbers_per_token_are_kept(tiny: Any) -> None:
    """Nothing of hidden size survives the hook: [tokens] is all that is held until take()."""
    with capture(tiny) as recorder:
        tiny(torch.arange(1, 9)[None])
        held = [tensor for pair in recorder._passed.values() for tensor in pair]
    assert {tuple(tensor.shape) for tensor in held} == {(8,)}


def test_a_generated_token_has_the_cosine_of_the_clean_pass(tiny: Any) -> None:
    """For a causal model, hooking each decode step and one clean pass over the text are the same."""
    ids = torch.tensor([[5, 17, 31]])
    text = tiny.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    with capture(tiny) as recorder:
        tiny(text, use_cache=False)
    clean, _ = recorder.take()
    out = tiny(ids, use_cache=True)
    for place in range(3, 9):
        with capture(tiny) as recorder:
            out = tiny(text[:, place : place + 1], past_key_values=out.past_key_values, use_cache=True)
        np.testing.assert_allclose(recorder.take()[0][0], clean[place], atol=1e-5)


def test_the_cosine_is_formed_in_float32_from_half_precision() -> None:
    h = torch.randn(7, 64, dtype=torch.bfloat16)
    f = torch.randn(7, 64, dtype=torch.bfloat16) * 1e-3
    exact = torch.nn.functional.cosine_similarity(h.double(), h.double() + f.double(), dim=-1)
    rounded = torch.nn.functional.cosine_similarity(h.double(), (h + f).double(), dim=-1)
    got = residual_cosine(h, f).double()
    assert (got - exact).abs().max() < 1e-6
    assert (got - exact).abs().max() < (rounded - exact).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_cosine_of_one_token_is_the_cosine(dtype: torch.dtype) -> None:
    for scale in (1e-3, 1.0, 30.0):
        h = torch.randn(1, 577).to(dtype)
        f = (torch.randn(1, 577) * scale).to(dtype)
        got, known = residual_cosine_of_one(h, f), residual_cosine(h, f).item()
        assert got == pytest.approx(known, abs=4 * torch.finfo(torch.float32).eps)


def test_zero_vectors_give_zero_and_no_nan() -> None:
    zero, one = torch.zeros(1, 4), torch.ones(1, 4)
    assert residual_cosine(zero, zero).item() == 0.0
    assert residual_cosine(one, -one).item() == 0.0
    assert residual_cosine_of_one(zero, zero) == 0.0
    assert residual_cosine_of_one(one, -one) == 0.0
    assert residual_cosine_of_one(one * 1e3, one) <= 1.0
    assert norm_ratio(one, zero).item() == 0.0
    assert torch.isfinite(norm_ratio(zero, one)).all()
    assert residual_cosine(one * 1e3, one).item() <= 1.0


def test_the_host_waits_for_the_device_only_when_the_numbers_are_taken(tiny: Any) -> None:
    """A scalar read or a copy to the host inside a forward pass would stall a GPU once a layer."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Reads(TorchDispatchMode):
        seen: ClassVar[list[str]] = []

        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "_local_scalar_dense" in str(func) or "nonzero" in str(func):
                self.seen.append(str(func))
            return func(*args, **(kwargs or {}))

    ids = torch.arange(1, 9)[None]
    with Reads():
        tiny(ids, use_cache=False)
    without = len(Reads.seen)
    Reads.seen.clear()
    with capture(tiny) as recorder:
        with Reads():
            tiny(ids, use_cache=False)
        recorder.take()
    assert len(Reads.seen) == without
