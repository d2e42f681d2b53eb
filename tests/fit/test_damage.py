"""Damages: Fisher matrices by naive autograd, what they predict of the loss, weights without gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import attentive, lively
from torch import Tensor

from skipcal.arch.locate import locate
from skipcal.fit.damage import (
    SENSITIVITY_PENALTY,
    SHRINKAGE,
    FisherDamage,
    RelativeDamage,
    fisher_damage,
)
from skipcal.fit.gate import SENSITIVITY, gate_inputs, sharpened
from skipcal.fit.layer_damage import KEPT, relative_damage
from skipcal.fit.moments import Linear, Moments, ridge

FIRST = 3
HIDDEN = 32


@pytest.fixture
def tiny() -> Any:
    return attentive(lively("llama"))


def texts(rows: int, tokens: int) -> Tensor:
    return torch.randint(3, 97, (rows, tokens), generator=torch.Generator().manual_seed(1))


def streams(model: Any, ids: Tensor) -> tuple[Tensor, list[Tensor], list[tuple[Tensor, Tensor]]]:
    """Logits, the stream after each layer, and (h, f) of each layer: a Llama's layers called by hand."""
    stack = model.model
    positions = torch.arange(ids.shape[1])[None]
    x = stack.embed_tokens(ids)
    rotary = stack.rotary_emb(x, position_ids=positions)
    mask = torch.full((ids.shape[1], ids.shape[1]), float("-inf")).triu(1)[None, None]
    after, parts = [], []
    for layer in stack.layers:
        attended, _ = layer.self_attn(
            hidden_states=layer.input_layernorm(x), attention_mask=mask, position_embeddings=rotary
        )
        h = x + attended
        f = layer.mlp(layer.post_attention_layernorm(h))
        x = h + f
        if x.requires_grad:
            x.retain_grad()
        after.append(x)
        parts.append((h, f))
    return model.lm_head(stack.norm(x)), after, parts


def sampled(model: Any, ids: Tensor, seed: int) -> Tensor:
    """Labels [batch, seq - first], from the same generator."""
    chances = model(ids, use_cache=False).logits[:, FIRST:].flatten(0, 1).softmax(-1)
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(chances, 1, generator=generator).reshape(len(ids), -1)


def naive_fisher(model: Any, groups: list[Tensor], seed: int) -> list[Tensor]:
    """Row by row, token by token: the mean of g gT, g the gradient for one token's stream."""
    sums = [torch.zeros(HIDDEN, HIDDEN, dtype=torch.float64) for _ in range(4)]
    count = 0
    for ids in groups:
        labels = sampled(model, ids, seed + count)
        for row, wanted in zip(ids, labels, strict=True):
            with torch.enable_grad():
                logits, after, _ = streams(model, row[None])
                chances = logits[0, FIRST:].log_softmax(-1)
                loss = torch.stack([-chances[p, label] for p, label in enumerate(wanted)]).sum()
                loss.backward()
            for layer, stream in enumerate(after):
                for p in range(FIRST, len(row)):
                    assert stream.grad is not None
                    g = stream.grad[0, p].double()
                    sums[layer] += torch.outer(g, g)
            model.zero_grad()
        count += ids.shape[0] * (ids.shape[1] - FIRST)
    return [total / count for total in sums]


def test_fisher_matrices_are_the_mean_square_of_gradients_token_by_token(tiny: Any) -> None:
    ids = texts(3, 14)
    groups = [ids[:2], ids[2:]]
    found = fisher_damage(tiny, locate(tiny), groups, first=FIRST, seed=5)
    for layer, naive in enumerate(naive_fisher(tiny, groups, 5)):
        shrunk = naive + SHRINKAGE * naive.diagonal().mean() * torch.eye(HIDDEN)
        limit = 1e-4 * float(shrunk.abs().max())  # gradients in float32 through four layers
        torch.testing.assert_close(found.fisher[layer].double(), shrunk, atol=limit, rtol=0.0)


def test_labels_are_drawn_by_the_seed(tiny: Any) -> None:
    fits = [
        fisher_damage(tiny, locate(tiny), [texts(2, 14)], first=FIRST, seed=s).fisher[2] for s in (0, 0, 1)
    ]
    assert torch.equal(fits[0], fits[1])
    assert not torch.allclose(fits[0], fits[2])


def test_sensitivity_is_a_ridge_of_the_log_of_squared_gradients() -> None:
    """Relative to their mean, from what a gate sees; gradients token by token, by hand."""
    model: Any = lively("llama")
    ids = texts(6, 16)
    found = fisher_damage(model, locate(model), [ids], first=FIRST, seed=2)
    labels = sampled(model, ids, 2)
    squares, inputs = [], []
    for row, wanted in zip(ids, labels, strict=True):
        with torch.enable_grad():
            logits, after, parts = streams(model, row[None])
            chances = logits[0, FIRST:].log_softmax(-1)
            torch.stack([-chances[p, label] for p, label in enumerate(wanted)]).sum().backward()
        assert after[2].grad is not None
        squares.append(after[2].grad[0, FIRST:].double().square().sum(-1))
        inputs.append(gate_inputs(parts[2][0][0, FIRST:].detach()))
    y, x = torch.cat(squares), torch.cat(inputs)
    moments = Moments.empty(HIDDEN + 1, 1)
    moments.add(x, (y / y.mean()).log()[:, None])
    probe = found.sensitivity(2)
    assert probe is not None
    torch.testing.assert_close(probe(x), ridge(moments, SENSITIVITY_PENALTY)(x), atol=1e-4, rtol=1e-4)


def test_a_gate_is_sharpened_by_a_part_of_the_log_sensitivity() -> None:
    gate, probe = (Linear(torch.randn(5, 1), torch.randn(1)) for _ in range(2))
    x = torch.randn(7, 5)
    torch.testing.assert_close(sharpened(gate, probe)(x), gate(x) + SENSITIVITY * probe(x))
    assert sharpened(gate, None) is gate


def test_fisher_damage_is_half_the_quadratic_form() -> None:
    half = torch.randn(HIDDEN, HIDDEN)
    damage = FisherDamage({4: half @ half.T})
    off = torch.randn(6, HIDDEN)
    found = damage(4, off, torch.randn(6, HIDDEN))
    for n, d in enumerate(off.double()):
        metric = damage.fisher[4].double()
        naive = 0.5 * sum(float(d[i] * metric[i, j] * d[j]) for i in range(HIDDEN) for j in range(HIDDEN))
        assert float(found[n]) == pytest.approx(naive, rel=1e-4)
    assert float(damage(4, torch.zeros(1, HIDDEN), off)) > 0  # its logarithm is taken


def test_relative_damage_is_the_weighted_relative_error() -> None:
    delta, h = torch.randn(5, HIDDEN), 3 * torch.randn(5, HIDDEN)
    naive = [float((d @ d) / (x @ x)) for d, x in zip(delta.double(), h.double(), strict=True)]
    damage = RelativeDamage({2: 0.25})
    assert damage(2, delta, h).tolist() == pytest.approx([0.25 * n for n in naive], rel=1e-5)
    assert damage(3, delta, h).tolist() == pytest.approx(naive, rel=1e-5)
    assert bool((damage(3, torch.zeros(1, HIDDEN), torch.zeros(1, HIDDEN)) > 0).all())


@pytest.mark.parametrize("layer", [0, 2])
def test_the_loss_rises_by_what_the_fisher_matrix_says(tiny: Any, layer: int) -> None:
    """Expected divergence for small random errors after a layer, isotropic and along leading directions.

    Eight labels are drawn for each of 480 tokens, so it is known to some 10 %. The ratio tends to 1 as errors
    get smaller: it is 0.5 at twenty times the size. Divergences of 1e-5 a token need float64.
    """
    ids = texts(16, FIRST + 30)
    architecture = locate(tiny)
    metric = fisher_damage(tiny, architecture, [ids] * 8, first=FIRST, seed=0).fisher[layer]
    other_labels = fisher_damage(tiny, architecture, [ids] * 8, first=FIRST, seed=1).fisher[layer]
    tiny.double()
    full = tiny(ids, use_cache=False).logits[:, FIRST:].log_softmax(-1)
    vectors = torch.linalg.eigh(other_labels).eigenvectors
    for kind in (torch.eye(HIDDEN), vectors[:, -4:], vectors[:, :8]):
        size = 0.005 / float((kind.T @ metric @ kind).trace()) ** 0.5
        predicted, risen = 0.0, 0.0
        for _ in range(4):
            delta = size * torch.randn(*ids.shape, kind.shape[1]) @ kind.T
            delta[:, :FIRST] = 0

            def off(_m: Any, _a: Any, y: Any, delta: Tensor = delta) -> Any:
                return (y[0] + delta, *y[1:]) if isinstance(y, tuple) else y + delta

            handle = architecture.blocks[layer].layer.register_forward_hook(off)
            other = tiny(ids, use_cache=False).logits[:, FIRST:].log_softmax(-1)
            handle.remove()
            risen += float((full.exp() * (full - other)).sum())
            tokens = delta[:, FIRST:].flatten(0, 1)
            predicted += float(FisherDamage({layer: metric})(layer, tokens, tokens).sum())
        assert risen == pytest.approx(predicted, rel=0.25), f"{kind.shape[1]} directions"


def naive_weights(model: Any, ids: Tensor) -> list[float]:
    """Divergence when a layer's down projection is halved, over the relative error that makes."""
    logits, _, parts = streams(model, ids)
    full = logits[:, FIRST:].double().log_softmax(-1)
    weights = []
    for layer, (h, f) in enumerate(parts):
        halved = copy.deepcopy(model)
        halved.model.layers[layer].mlp.down_proj.weight.mul_(KEPT)
        other = streams(halved, ids)[0][:, FIRST:].double().log_softmax(-1)
        missed = ((1 - KEPT) * f[:, FIRST:]).double().square().sum(-1)
        error = float((missed / h[:, FIRST:].double().square().sum(-1)).sum())
        weights.append(float((full.exp() * (full - other)).sum()) / error)
    return weights


def test_weights_are_divergence_over_relative_error(tiny: Any) -> None:
    ids = texts(3, 14)
    found = relative_damage(tiny, locate(tiny), [ids[:2], ids[2:]], first=FIRST)
    expected = naive_weights(tiny, ids)
    assert [found.weights[layer] for layer in range(4)] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("family", ["opt", "gemma2", "granite", "gpt2"])
def test_other_kinds_of_blocks_have_damages_too(family: str) -> None:
    model: Any = lively(family)
    ids = texts(2, 12)
    fisher = fisher_damage(model, locate(model), [ids], first=FIRST, seed=0).fisher
    weights = relative_damage(model, locate(model), [ids], first=FIRST).weights
    for layer in range(4):
        assert float(torch.linalg.eigvalsh(fisher[layer].double())[0]) > 0
        assert weights[layer] > 1e-9


def state(model: Any) -> list[Any]:
    return [
        [(p.requires_grad, p.grad is None) for p in model.parameters()],
        [(sorted(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
    ]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("kind", ["fisher", "relative"])
def test_the_model_is_left_as_it_was(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, kind: str, fails: bool
) -> None:
    tiny.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    before, ids = state(tiny), texts(2, 12)
    logits = tiny(ids).logits
    architecture = locate(tiny)

    def measure() -> Any:
        if kind == "fisher":
            return fisher_damage(tiny, architecture, [ids], first=FIRST, seed=0)
        return relative_damage(tiny, architecture, [ids], first=FIRST)

    if fails:
        calls: list[None] = []

        def stop(*args: Any) -> Any:
            calls.append(None)
            if len(calls) == (1 if kind == "fisher" else 3):  # in the middle: a damped pass
                raise KeyboardInterrupt

        handle = tiny.lm_head.register_forward_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            measure()
        handle.remove()
    else:
        measure()
    assert state(tiny) == before
    assert torch.equal(tiny(ids).logits, logits)
