"""What stands in for a skipped FFN: against the oracle, in batches, in bytes, in every kind of block."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from conftest import left_padded, lively
from gated import LAYERS, NEW, PROMPT, gates_for, generated, random_map, surrogates_for

from skipcal.arch.locate import Block, locate
from skipcal.core.chosen_ffns import ChosenFFNs
from skipcal.core.gate import GatePolicy
from skipcal.core.policy import Policy, SkipPolicy
from skipcal.core.substituted import Substituted
from skipcal.core.surrogates import Surrogate, Surrogates, direction, rank_for
from skipcal.runtime.session import skipping

ROWS = [[5, 17, 31, 8, 44, 9], [7, 12], [60, 61, 62, 63]]
KINDS = ("gate", "gate of several maps", "static", "cosine", "bounded cosine")


@pytest.fixture(scope="module")
def model() -> Any:
    with torch.no_grad():
        torch.manual_seed(0)
        return lively("llama")


def policy_of(kind: str, model: Any, warm_up: int = 1) -> Any:
    """Policies that skip some FFNs of some tokens, with surrogates of all of their layers but one."""
    if kind.startswith("gate"):
        stand_ins = surrogates_for(model, maps=1 if kind == "gate" else 4)
        return GatePolicy(gates=gates_for(model), surrogates=stand_ins, threshold=0.0, warm_up_tokens=warm_up)
    if kind == "static":
        chosen = ChosenFFNs(method="static", layers=(1, 3), probability=1.0, warm_up_tokens=warm_up)
        return Substituted(chosen, surrogates_for(model, (0, 1)))
    bound = 1 if kind == "bounded cosine" else None
    cosine = SkipPolicy(cold_s=0, cold_e=4, threshold=0.55, warm_up_tokens=warm_up, max_skips=bound)
    return Substituted(cosine, surrogates_for(model, (1, 2)))


# The map itself


def drawn(maps: int) -> Surrogate:
    return random_map(32, 3, maps, torch.Generator().manual_seed(6))


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("maps", [1, 4])
def test_a_map_is_its_formula(maps: int, tokens: int) -> None:
    h, map_ = 7 * torch.randn(tokens, 32), drawn(maps)
    found = Surrogates({2: map_})(2, h)
    assert found is not None
    for token, s in zip(h.double(), found.double(), strict=True):
        expected = oracle.one_map(map_, (32**0.5) * token / token.norm())
        torch.testing.assert_close(s, expected, atol=1e-5, rtol=1e-5)  # float32, values about 30


def test_of_several_maps_a_token_reads_one() -> None:
    one, several = drawn(1), drawn(4)
    assert one.weight_bytes == 4 * (2 * 3 * 32 + 32)
    assert several.weight_bytes == one.weight_bytes + 4 * (4 * 32 + 4)  # the route, and no other map
    assert Surrogates({1: several}).weight_bytes(1) == several.weight_bytes
    # 500 numbers: 32 of the bias, 64 for each rank, and 4 x 33 of a route
    assert rank_for(0.05, 32, 20_000, 2) == 7 and rank_for(0.05, 32, 20_000, 2, maps=4) == 5


@pytest.mark.parametrize("maps", [1, 4])
def test_shapes_before_the_last_axis_stay(maps: int) -> None:
    u = direction(torch.randn(2, 3, 5, 32))
    together = drawn(maps)(u)
    assert together.shape == u.shape
    torch.testing.assert_close(together[1, 2], drawn(maps)(u[1, 2]))


def test_the_length_of_the_stream_does_not_matter_and_zero_stays_zero() -> None:
    h = torch.randn(3, 32)
    torch.testing.assert_close(direction(h), direction(1e-6 * h), atol=1e-6, rtol=1e-5)
    assert torch.equal(direction(torch.zeros(2, 32)), torch.zeros(2, 32))
    assert direction(h.bfloat16()).dtype == torch.float32
    assert float(direction(h).square().mean()) == pytest.approx(1.0)


@pytest.mark.parametrize("maps", [1, 4])
@pytest.mark.parametrize("length", [1e-6, 1.0, 1e6])
def test_one_token_gets_what_it_gets_in_a_batch(length: float, maps: int) -> None:
    found = Surrogates({1: drawn(maps)})
    h = torch.randn(4, 32) * length
    together = found(1, h)
    assert together is not None
    for place in range(4):
        torch.testing.assert_close(found(1, h[place : place + 1]), together[place : place + 1])
    zero = found(1, torch.zeros(1, 32))
    bias = found.maps[1].bias
    assert zero is not None and torch.equal(zero[0], bias if maps == 1 else bias[_largest(found.maps[1])])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("maps", [1, 4])
def test_one_token_in_half_precision_is_as_near_to_the_formula_as_a_batch(
    maps: int, dtype: torch.dtype
) -> None:
    map_ = drawn(maps).to(torch.device("cpu"), dtype)
    found, h = Surrogates({1: map_}), (15_000 * torch.randn(24, 32)).clamp(-6e4, 6e4).to(dtype)
    h[0] = 6e4 * map_.down[0].sign()  # whose product with that row is beyond float16
    together = found(1, h)
    alone = torch.cat([found(1, token[None]) for token in h])  # type: ignore[misc]
    expected = torch.stack([oracle.one_map(map_, (32**0.5) * token / token.norm()) for token in h.double()])
    assert alone.dtype == dtype and together is not None
    near = (alone - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert near.max() < 0.02  # a few roundings of 2^-9, and no token in another region of directions
    assert (together - expected).norm(dim=-1).max() < 0.02 * expected.norm(dim=-1).max()


def _largest(map_: Any) -> int:
    """Where nothing is known of a direction, its length being 0, the bias of the route decides."""
    return int(map_.route_bias.argmax())


def test_a_layer_without_a_map_adds_nothing_and_costs_nothing() -> None:
    empty = Surrogates({})
    assert empty(3, torch.randn(1, 32)) is None
    assert empty.weight_bytes(3) == 0


def test_the_stand_in_has_the_streams_precision(model: Any) -> None:
    assert surrogates_for(model)(1, torch.randn(2, 32).bfloat16()).dtype == torch.bfloat16  # type: ignore[union-attr]


# The oracle


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("warm_up", [0, 3, 40])
def test_equals_the_oracle_token_for_token_and_ffn_for_ffn(model: Any, kind: str, warm_up: int) -> None:
    policy = policy_of(kind, model, warm_up)
    expected = oracle.decode(model, PROMPT, policy, NEW)
    output, report = generated(model, policy)
    assert output.sequences[0, len(PROMPT) :].tolist() == expected.tokens
    for mine, theirs in zip(output.logits, expected.logits, strict=True):
        torch.testing.assert_close(mine[0], theirs, atol=1e-4, rtol=1e-4)
    per_layer = [sum(i in skipped for skipped in expected.skipped) for i in range(4)]
    assert list(report.skipped_per_layer) == per_layer
    assert report.decode_steps_after_warm_up == max(NEW - 1 - warm_up, 0)
    if warm_up < NEW:
        assert sum(per_layer) > 0
        plain = getattr(policy, "policy", None)
        if plain is not None:  # the surrogates matter
            without = oracle.decode(model, PROMPT, plain, NEW).logits
            assert not all(
                torch.allclose(a, b, atol=1e-2) for a, b in zip(without, expected.logits, strict=True)
            )


def test_the_gate_of_these_tests_skips_some_and_not_all(model: Any) -> None:
    skipped = oracle.decode(model, PROMPT, policy_of("gate", model, 0), NEW).skipped
    assert len({tuple(layers) for layers in skipped}) > 2


@pytest.mark.parametrize("kind", KINDS)
def test_teacher_forcing_equals_stepping(model: Any, kind: str) -> None:
    policy = policy_of(kind, model)
    output, stepped = generated(model, policy)
    with skipping(model, policy=policy, teacher_forced=True, prompt_tokens=len(PROMPT)) as run:
        logits = model(output.sequences[:, :-1], use_cache=False).logits
    theirs = torch.stack(output.logits, dim=1)
    limit = 1e-4 * float(theirs.abs().max())  # matrices against vectors, as in test_skip_rule.py
    torch.testing.assert_close(logits[:, len(PROMPT) - 1 :], theirs, atol=limit, rtol=0.0)
    assert run.report.skipped_per_layer == stepped.skipped_per_layer
    assert run.report.decode_steps_after_warm_up == stepped.decode_steps_after_warm_up


# Batches


@pytest.mark.parametrize("kind", KINDS)
def test_each_row_of_a_left_padded_batch_gets_what_it_gets_alone(model: Any, kind: str) -> None:
    policy = policy_of(kind, model)
    with skipping(model, policy=policy) as run:
        together = model.generate(**left_padded(ROWS), max_new_tokens=10, do_sample=False)
    reports = []
    for i, row in enumerate(ROWS):
        with skipping(model, policy=policy) as alone:
            single = model.generate(**left_padded([row]), max_new_tokens=10, do_sample=False)
        assert together[i, -10:].tolist() == single[0, -10:].tolist()
        reports.append(alone.report)
    summed = [sum(r.skipped_per_layer[layer] for r in reports) for layer in range(4)]
    assert list(run.report.skipped_per_layer) == summed
    assert kind not in ("gate", "cosine") or len({r.skip_ratio for r in reports}) > 1


@pytest.mark.parametrize("kind", ["gate", "static"])
def test_a_row_counts_until_its_end_of_sequence(model: Any, kind: str) -> None:
    policy = policy_of(kind, model, 0)
    with skipping(model, policy=policy):
        free = model.generate(**left_padded(ROWS), max_new_tokens=12, do_sample=False)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": int(free[0, -8])}
    with skipping(model, policy=policy) as run:
        model.generate(**left_padded(ROWS), **options)
    steps, per_layer = 0, [0] * 4
    for row in ROWS:
        with skipping(model, policy=policy) as alone:
            model.generate(**left_padded([row]), **options)
        steps += alone.report.decode_steps
        per_layer = [a + b for a, b in zip(per_layer, alone.report.skipped_per_layer, strict=True)]
    assert run.report.decode_steps == steps < 33
    assert list(run.report.skipped_per_layer) == per_layer


# Bytes


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_bytes_are_net_of_the_surrogates_in_the_models_precision(dtype: torch.dtype, size: int) -> None:
    model: Any = lively("llama")
    model.to(dtype)
    gates = gates_for(model)
    policy = GatePolicy(gates=gates, surrogates=surrogates_for(model), threshold=9e9, warm_up_tokens=0)
    with skipping(model, policy=policy) as run:
        model.generate(**left_padded(ROWS), max_new_tokens=5, do_sample=False)
    ffn = size * (3 * 32 * 48 + 32)  # gate, up and down projections; the norm
    surrogate = size * (2 * 3 * 32 + 32)
    layer = ffn + size * (32 * 32 + 2 * 16 * 32 + 32 * 32 + 32)  # query, key, value, output; the norm
    assert run.report.weight_bytes_saved == 4 * 2 * (ffn - surrogate)  # 4 steps, 2 layers, all rows at once
    assert run.report.skip_ratio_bytes == pytest.approx(2 * (ffn - surrogate) / (4 * layer))


def test_a_surrogate_is_read_as_soon_as_one_row_skips(model: Any) -> None:
    policy = policy_of("gate", model, 0)
    text = torch.tensor([[5, 17, 31, 8], [44, 60, 61, 62]])
    with skipping(model, policy=policy, teacher_forced=True) as run:
        model(text, use_cache=False)
    skipping_layers = sum(n > 0 for n in run.report.skipped_per_layer)
    assert 0 < run.report.skipped_blocks < 2 * 6 and skipping_layers
    surrogate = 4 * (2 * 3 * 32 + 32)
    assert run.report.weight_bytes_saved == -skipping_layers * surrogate  # the FFN is read as well


# Kinds of blocks

FAMILIES = ["llama", "granite", "olmo2", "gemma2", "opt", "gpt2"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("threshold", [0.0, 9e9])
def test_a_skipped_block_adds_exactly_its_surrogate(family: str, threshold: float) -> None:
    model: Any = lively(family)
    policy = GatePolicy(
        gates=gates_for(model), surrogates=surrogates_for(model), threshold=threshold, warm_up_tokens=0
    )
    entered: dict[int, Any] = {}
    left: dict[int, Any] = {}

    def enter(block: Block) -> Any:
        def hook(_module: Any, args: Any, kwargs: Any) -> None:
            entered[block.index] = (args[0] if args else next(iter(kwargs.values()))).reshape(-1, 32)

        return block.chain[0].register_forward_pre_hook(hook, with_kwargs=True)

    def leave(block: Block) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            left[block.index] = (output[0] if isinstance(output, tuple) else output).reshape(-1, 32)

        return block.layer.register_forward_hook(hook)

    handles = [add(block) for block in locate(model).blocks for add in (enter, leave)]
    text = torch.randint(3, 97, (2, 20))
    with skipping(model, policy=policy, teacher_forced=True) as run:
        model(text, use_cache=False)
    for handle in handles:
        handle.remove()
    rule = policy.make_rule()
    decoded = torch.arange(20).expand(2, -1).flatten() >= 1
    for layer in LAYERS:
        h = entered[layer]
        skips = (rule.scores(layer, h) < threshold) & decoded
        assert run.report.skipped_per_layer[layer] == int(skips.sum()) > 0
        expected = h + policy.surrogates(layer, h)
        # granite's layer multiplies by 0.22 what was divided by it: one rounding of each
        torch.testing.assert_close(left[layer][skips], expected[skips], atol=1e-6, rtol=1e-6)
        assert not torch.isclose(left[layer][~skips], expected[~skips]).all(-1).any()
        assert bool((~skips).any())


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_that_run_are_the_full_models(family: str) -> None:
    """Of the first candidate layer, whose stream no skip has touched: outputs of those that do not skip."""
    model: Any = lively(family)
    gates = gates_for(model, (1,))
    policy = GatePolicy(gates=gates, surrogates=surrogates_for(model), threshold=0.0, warm_up_tokens=0)
    outputs: list[Any] = []
    block = locate(model).blocks[1]
    handle = block.layer.register_forward_hook(
        lambda m, a, y: outputs.append((y[0] if isinstance(y, tuple) else y).reshape(-1, 32))
    )
    text = torch.randint(3, 97, (2, 20))
    model(text, use_cache=False)
    with skipping(model, policy=policy, teacher_forced=True) as run:
        model(text, use_cache=False)
    handle.remove()
    same = torch.isclose(outputs[0], outputs[-1], atol=1e-5, rtol=1e-5).all(-1)
    assert int((~same).sum()) == run.report.skipped_blocks
    assert 0 < run.report.skipped_blocks < 38


# Leaving nothing behind


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_on_the_model(family: str, fails: bool) -> None:
    model: Any = lively(family)
    policy: Policy = policy_of("gate", model, 0)
    ids = torch.tensor([PROMPT])

    def state() -> list[Any]:
        return [
            (sorted(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()
        ]

    logits, before = model(ids).logits, state()
    try:
        with skipping(model, policy=policy) as run:
            model.generate(**left_padded(ROWS), max_new_tokens=4, do_sample=False)
            if fails:
                raise RuntimeError("in the middle")
    except RuntimeError:
        pass
    assert run.report.skipped_blocks > 0
    assert state() == before
    assert torch.equal(model(ids).logits, logits)
