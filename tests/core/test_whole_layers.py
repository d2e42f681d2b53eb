"""ShortGPT and SkipDecode against naive implementations: kept layers, cache contents, tokens."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import left_padded, lively
from transformers import DynamicCache, StaticCache

from skipcal.core.policy import Policy
from skipcal.core.whole_layers import ShortGPT, SkipDecode
from skipcal.errors import ConfigError, ProfileMismatch, SessionError
from skipcal.profiles.methods import skipdecode_for
from skipcal.runtime.session import skipping

PROMPT = [5, 9, 31, 7]
NEW = 10


def smaller(model: Any, removed: tuple[int, ...]) -> Any:
    """A model built with fewer layers, holding the weights of the kept ones."""
    kept = [i for i in range(model.config.num_hidden_layers) if i not in removed]
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [model.config.layer_types[i] for i in kept]
    made = type(model)(config).eval()
    weights = {
        name: value for name, value in model.state_dict().items() if not name.startswith("model.layers.")
    }
    for place, index in enumerate(kept):
        for name, value in model.model.layers[index].state_dict().items():
            weights[f"model.layers.{place}.{name}"] = value
    made.load_state_dict(weights)
    made.generation_config = model.generation_config
    return made


def generate(model: Any, policy: Policy | None, **options: Any) -> Any:
    inputs = {"input_ids": torch.tensor([PROMPT]), "attention_mask": torch.ones(1, len(PROMPT)).long()}
    settings = {**inputs, "max_new_tokens": NEW, "do_sample": False, "output_logits": True, **options}
    settings["return_dict_in_generate"] = True
    if policy is None:
        return model.generate(**settings)
    with skipping(model, policy=policy) as run:
        output = model.generate(**settings)
    return output, run.report


@pytest.mark.parametrize("removed", [(0,), (2,), (0, 1), (1, 3), (0, 1, 2)])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2"])
def test_shortgpt_is_the_model_built_with_fewer_layers(model_type: str, removed: tuple[int, ...]) -> None:
    model: Any = lively(model_type)
    theirs = generate(smaller(model, removed), None, past_key_values=DynamicCache())
    cache = DynamicCache()
    mine, report = generate(model, ShortGPT(removed=removed), past_key_values=cache)
    assert torch.equal(mine.sequences, theirs.sequences)
    assert torch.equal(torch.stack(mine.logits), torch.stack(theirs.logits))
    kept = 4 - len(removed)
    assert len(mine.past_key_values.layers) == kept
    for a, b in zip(mine.past_key_values.layers, theirs.past_key_values.layers, strict=True):
        assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)
    assert report.skipped_per_layer == tuple(NEW - 1 if i in removed else 0 for i in range(4))
    assert report.skip_ratio == report.skip_ratio_all == len(removed) / 4
    assert report.skip_ratio_bytes == pytest.approx(len(removed) / 4)
    assert (report.method, report.unit) == ("shortgpt", "layer")


def test_shortgpt_with_a_static_cache(tiny: Any) -> None:
    dynamic, _ = generate(tiny, ShortGPT(removed=(0, 2)))
    static, _ = generate(tiny, ShortGPT(removed=(0, 2)), cache_implementation="static")
    assert torch.equal(dynamic.sequences, static.sequences)
    assert isinstance(static.past_key_values, StaticCache)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "gemma3_text", "phi3", "smollm3"])
def test_shortgpt_leaves_the_model_as_it_was(model_type: str) -> None:
    model: Any = lively(model_type)
    config = copy.deepcopy(model.config.to_dict())
    before = generate(model, None)
    generate(model, ShortGPT(removed=(1,)))
    after = generate(model, None)
    assert torch.equal(torch.stack(before.logits), torch.stack(after.logits))
    assert model.config.to_dict() == config
    assert [n for n, _ in model.named_modules()] == [n for n, _ in lively(model_type).named_modules()]


def test_shortgpt_teacher_forced_equals_stepping(tiny: Any) -> None:
    policy = ShortGPT(removed=(1, 2))
    output, stepped = generate(tiny, policy)
    with skipping(tiny, policy=policy, teacher_forced=True, prompt_tokens=len(PROMPT)) as run:
        logits = tiny(output.sequences[:, :-1], use_cache=False).logits
    torch.testing.assert_close(logits[0, len(PROMPT) - 1 :], torch.stack(output.logits)[:, 0])
    assert run.report.skipped_per_layer == stepped.skipped_per_layer
    assert run.report.decode_steps == stepped.decode_steps


def naive_skipdecode(model: Any, policy: SkipDecode) -> tuple[list[int], list[list[int]], Any]:
    """Greedy decoding that walks the layers by hand -> tokens, layers run per step, cache."""
    stack = model.model
    cache = DynamicCache()
    tokens, runs = list(PROMPT), []
    ids = torch.tensor([PROMPT])
    past = 0
    for step in range(-1, NEW - 1):
        layers = len(stack.layers)
        run = list(range(layers))
        if step >= 0:
            share = min(step, policy.steps - 1) / max(policy.steps - 1, 1)
            count = round(policy.max_layers - (policy.max_layers - policy.min_layers) * share)
            top = count - policy.warm_up_layers
            run = [*range(policy.warm_up_layers), *range(layers - top, layers)]
            runs.append(run)
        positions = torch.arange(past, past + ids.shape[1])[None]
        h = stack.embed_tokens(ids)
        rotary = stack.rotary_emb(h, position_ids=positions)
        size = ids.shape[1]
        mask = torch.full((size, size), float("-inf")).triu(1)[None, None] if size > 1 else None
        for i in run:
            layer = stack.layers[i]
            attended, _ = layer.self_attn(
                hidden_states=layer.input_layernorm(h),
                attention_mask=mask,
                past_key_values=cache,
                position_embeddings=rotary,
            )
            h = h + attended
            h = h + layer.mlp(layer.post_attention_layernorm(h))
        past += ids.shape[1]
        tokens.append(int(model.lm_head(stack.norm(h))[0, -1].argmax()))
        ids = torch.tensor([[tokens[-1]]])
    return tokens, runs, cache


@pytest.mark.parametrize(
    "policy",
    [
        SkipDecode(num_layers=8, max_layers=8, min_layers=2, steps=NEW - 1),
        SkipDecode(num_layers=8, max_layers=6, min_layers=3.5, steps=4, warm_up_layers=2),
        SkipDecode(num_layers=8, max_layers=5, min_layers=5, steps=1),
    ],
)
def test_skipdecode_against_a_naive_loop(policy: SkipDecode) -> None:
    model: Any = lively("llama", num_hidden_layers=8)
    tokens, runs, cache = naive_skipdecode(model, policy)
    mine, report = generate(model, policy, past_key_values=DynamicCache())
    assert mine.sequences[0].tolist() == tokens
    for i, (a, b) in enumerate(zip(mine.past_key_values.layers, cache.layers, strict=True)):
        assert a.keys.shape == b.keys.shape, i
        torch.testing.assert_close(a.keys, b.keys, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(a.values, b.values, atol=1e-5, rtol=1e-5)
    skipped = tuple(sum(i not in run for run in runs) for i in range(8))
    assert report.skipped_per_layer == skipped
    assert report.skip_ratio == pytest.approx(sum(skipped) / (8 * (NEW - 1)))
    assert sum(len(run) for run in runs) < 8 * (NEW - 1)
    layer_bytes = sum(p.numel() * 4 for p in model.model.layers[0].parameters())
    assert report.weight_bytes_saved == sum(skipped) * layer_bytes


def test_skipdecode_teacher_forced_equals_stepping() -> None:
    model: Any = lively("llama", num_hidden_layers=8)
    policy = SkipDecode(num_layers=8, max_layers=8, min_layers=2, steps=6)
    output, stepped = generate(model, policy)
    with skipping(model, policy=policy, teacher_forced=True, prompt_tokens=len(PROMPT)) as run:
        logits = model(output.sequences[:, :-1], use_cache=False).logits
    torch.testing.assert_close(
        logits[0, len(PROMPT) - 1 :], torch.stack(output.logits)[:, 0], atol=1e-4, rtol=1e-4
    )
    assert run.report.skipped_per_layer == stepped.skipped_per_layer


def test_skipdecode_gives_left_padded_rows_what_each_gets_alone() -> None:
    model: Any = lively("llama", num_hidden_layers=8)
    policy = SkipDecode(num_layers=8, max_layers=8, min_layers=2, steps=6)
    rows = [PROMPT, [3, 8], [40, 2, 2, 60, 11, 12, 13]]
    with skipping(model, policy=policy):
        together = model.generate(**left_padded(rows), max_new_tokens=NEW, do_sample=False)
    for row, got in zip(rows, together, strict=True):
        with skipping(model, policy=policy):
            alone = model.generate(**left_padded([row]), max_new_tokens=NEW, do_sample=False)
        assert alone[0, -NEW:].tolist() == got[-NEW:].tolist()


def test_skipdecode_leaves_nothing_behind(tiny: Any) -> None:
    before = generate(tiny, None)
    attributes = {name: set(vars(module)) for name, module in tiny.named_modules()}
    generate(tiny, SkipDecode(num_layers=4, max_layers=4, min_layers=2, steps=3))
    assert torch.equal(torch.stack(before.logits), torch.stack(generate(tiny, None).logits))
    assert {name: set(vars(module)) for name, module in tiny.named_modules()} == attributes


def test_a_mask_sized_by_a_skipped_layer_is_refused() -> None:
    model: Any = lively("gemma3_text", num_hidden_layers=8)
    assert len(set(model.config.layer_types)) == 2
    with (
        pytest.raises(SessionError, match="one kind of attention"),
        skipping(model, policy=SkipDecode(num_layers=8, max_layers=8, min_layers=2, steps=3)),
    ):
        pass


@pytest.mark.parametrize("target", [0.05, 0.1, 0.25, 0.35, 0.5, 0.7])
@pytest.mark.parametrize("steps", [7, 31, 127])
def test_a_schedule_meets_its_ratio(target: float, steps: int) -> None:
    schedule = skipdecode_for(target, 30, steps)
    runs = [schedule.layers_run(s) for s in range(steps)]
    assert runs == sorted(runs, reverse=True)
    assert runs[0] <= 30 and runs[-1] >= 2
    assert 1 - sum(runs) / (30 * steps) == pytest.approx(target, abs=0.5 / 30)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_layers": 3, "min_layers": 4}, "min_layers 4 <= max_layers 3"),
        ({"max_layers": 9, "min_layers": 4}, "max_layers 9 <= 8 layers"),
        ({"max_layers": 8, "min_layers": 1}, "warm_up_layers 1 < min_layers 1"),
        ({"max_layers": 8, "min_layers": 4, "steps": 0}, "over 0 steps"),
    ],
)
def test_impossible_schedules_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SkipDecode(**{"num_layers": 8, "steps": 5, **values})


def test_layers_that_are_not_there_are_refused(tiny: Any) -> None:
    with (
        pytest.raises(ProfileMismatch, match="layer 4 lies beyond"),
        skipping(tiny, policy=ShortGPT(removed=(4,))),
    ):
        pass
    with (
        pytest.raises(ConfigError, match="all 4 layers"),
        skipping(tiny, policy=ShortGPT(removed=(0, 1, 2, 3))),
    ):
        pass


def test_a_cache_from_elsewhere_is_refused() -> None:
    model: Any = lively("llama", num_hidden_layers=8)
    policy = SkipDecode(num_layers=8, max_layers=8, min_layers=2, steps=6)
    ids = torch.tensor([PROMPT])
    with skipping(model, policy=policy):
        out = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
        with pytest.raises(SessionError, match="cannot go on from a cache that holds 8 tokens"):
            model.generate(
                input_ids=out.sequences,
                past_key_values=out.past_key_values,
                max_new_tokens=3,
                do_sample=False,
            )
    whole = model(ids, use_cache=True).past_key_values
    with skipping(model, policy=policy), pytest.raises(SessionError, match="cannot go on from a cache"):
        model(ids[:, :1], past_key_values=whole)
