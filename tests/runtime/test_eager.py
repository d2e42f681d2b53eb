"""The eager engine's two ways, for one token and for many, do the same."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from architectures import CASES
from conftest import lively

from skipcal.arch.check import tiny_model
from skipcal.arch.locate import locate, observe
from skipcal.core.host import PassTokens
from skipcal.core.policy import SkipPolicy
from skipcal.core.surrogates import LowRank, Surrogates
from skipcal.errors import SessionError
from skipcal.runtime.engines.eager import EagerEngine
from skipcal.runtime.session import skipping

ALWAYS = SkipPolicy(cold_s=0, cold_e=4, threshold=-1.0, warm_up_tokens=0, max_skips=2)


class Alternate:
    """Skips every second layer, by a tensor or by a number: rules may answer with either."""

    layers = range(4)
    learns = True

    def __init__(self, as_tensor: bool) -> None:
        self._as_tensor = as_tensor
        self.seen: list[int] = []

    def start(self, tokens: PassTokens, device: torch.device) -> Any:
        return torch.zeros(0, device=device)

    def before(self, layer: int, state: Any, h: torch.Tensor) -> tuple[Any, Any]:
        skip = layer % 2 == 1
        return torch.full((len(h),), skip) if self._as_tensor or len(h) > 1 else skip, state

    def after(self, layer: int, state: Any, h: torch.Tensor, f: torch.Tensor, ran: Any) -> Any:
        self.seen.append(layer)
        return state


def surrogates(hidden: int) -> Surrogates:
    maps = {
        i: LowRank(down=torch.randn(3, hidden), up=torch.randn(hidden, 3) * 0.1, bias=torch.randn(hidden))
        for i in (1, 2)
    }
    return Surrogates(maps)


def run(model: Any, engine: EagerEngine, rows: int) -> torch.Tensor:
    ids = torch.tensor([[7]] * rows)
    engine.attach()
    try:
        model(input_ids=torch.tensor([[5]]), use_cache=False)  # a prefill
        engine.begin(PassTokens(active=torch.ones(rows, dtype=torch.bool), step=0))
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    finally:
        engine.detach()
    return logits


@pytest.mark.parametrize("model_type", ["llama", "granite", "gemma2", "opt"])
@pytest.mark.parametrize("stand_in", [False, True])
def test_one_token_gets_what_each_of_two_equal_tokens_gets(model_type: str, stand_in: bool) -> None:
    model = lively(model_type)
    architecture = locate(model)
    chosen = surrogates(architecture.hidden_size) if stand_in else None
    one, two = (EagerEngine(architecture, ALWAYS.make_rule(), surrogates=chosen) for _ in range(2))
    alone, together = run(model, one, 1), run(model, two, 2)
    torch.testing.assert_close(together, alone.expand_as(together), atol=1e-4, rtol=1e-4)
    assert one.skipped_per_layer == [0, 1, 1, 0]
    assert two.skipped_per_layer == [0, 2, 2, 0]
    assert one.weight_bytes_saved == two.weight_bytes_saved
    blocks = sum(architecture.blocks[i].weight_bytes for i in (1, 2))
    assert one.weight_bytes_saved == blocks - sum(chosen.weight_bytes(i) for i in (1, 2) if chosen)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_rule_may_answer_for_one_token_with_a_number_or_a_tensor(tiny: Any, as_tensor: bool) -> None:
    rule = Alternate(as_tensor)
    engine = EagerEngine(locate(tiny), rule)
    run(tiny, engine, 1)
    assert engine.skipped_per_layer == [0, 1, 0, 1]
    assert rule.seen == [0, 2]  # a rule is told of the FFNs that ran, of no others


@pytest.mark.parametrize("learns", [True, False])
def test_a_rule_that_learns_nothing_is_not_told(tiny: Any, learns: bool) -> None:
    rule = Alternate(as_tensor=False)
    rule.learns = learns
    run(tiny, EagerEngine(locate(tiny), rule), 1)
    assert rule.seen == ([0, 2] if learns else [])


def test_a_rule_that_asks_for_no_cosine_pays_for_none(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("residual_cosine", "residual_cosine_of_one"):
        monkeypatch.delattr(f"skipcal.core.cosine.{name}")
    run(tiny, EagerEngine(locate(tiny), Alternate(False)), 1)
    with pytest.raises(NameError):
        run(tiny, EagerEngine(locate(tiny), ALWAYS.make_rule()), 1)


class Planned:
    """Skips what a table [layers, tokens] says, and keeps what it is told of the FFNs that ran."""

    layers = range(4)
    learns = True

    def __init__(self, table: list[list[bool]]) -> None:
        self._table = torch.tensor(table)
        self.told: dict[int, tuple[torch.Tensor, torch.Tensor, Any]] = {}

    def start(self, tokens: PassTokens, device: torch.device) -> Any:
        return torch.zeros(0, device=device)

    def before(self, layer: int, state: Any, h: torch.Tensor) -> tuple[Any, Any]:
        return self._table[layer], state

    def after(self, layer: int, state: Any, h: torch.Tensor, f: torch.Tensor, ran: Any) -> Any:
        self.told[layer] = h.clone(), f.clone(), ran
        return state


TABLE = [  # by layer: one of three tokens, two, none, all
    [False, True, False],
    [True, False, True],
    [False, False, False],
    [True, True, True],
]
KINDS = [
    "llama", "granite", "granitemoeshared", "gemma2", "opt", "gptj", "cohere", "mixtral", "gpt_oss",
    "gemma4_text", "gemma4, mixture",
]  # fmt: skip


def of_kind(kind: str) -> Any:
    if kind in ("mixtral", "gpt_oss"):
        return lively(kind, num_local_experts=4, num_experts_per_tok=2)
    model_type, _, options = CASES.get(kind, (kind, None, {}))
    return lively(model_type, **options)


def planned(
    model: Any, table: list[list[bool]], ids: list[int], chosen: Surrogates | None, **announced: Any
) -> tuple[torch.Tensor, EagerEngine, Planned]:
    """Logits [tokens, vocabulary] of rows of one token each, after a full pass, as every prefill is."""
    rule = Planned(table)
    engine = EagerEngine(locate(model), rule, surrogates=chosen)
    engine.attach()
    try:
        model(input_ids=torch.tensor([[5]]), use_cache=False)
        engine.begin(PassTokens(active=torch.ones(len(ids), dtype=torch.bool), step=0, **announced))
        logits = model(input_ids=torch.tensor(ids)[:, None], use_cache=False).logits
    finally:
        engine.detach()
    return logits[:, 0], engine, rule


@pytest.mark.parametrize("stand_in", [False, True])
@pytest.mark.parametrize("model_type", KINDS)
def test_tokens_of_a_batch_that_skip_apart_get_what_each_gets_alone(model_type: str, stand_in: bool) -> None:
    model = of_kind(model_type)
    architecture = locate(model)
    chosen = surrogates(architecture.hidden_size) if stand_in else None
    ids = [7, 21, 60]
    together, engine, rule = planned(model, TABLE, ids, chosen)
    for token in range(3):
        alone, single, told = planned(model, [[row[token]] for row in TABLE], [ids[token]], chosen)
        torch.testing.assert_close(together[token], alone[0], atol=2e-4, rtol=2e-4)
        assert single.skipped_per_layer == [int(row[token]) for row in TABLE]
        for layer, row in enumerate(TABLE):
            assert (layer in told.told) is not row[token]
            if layer in told.told:
                for mine, theirs in zip(rule.told[layer][:2], told.told[layer][:2], strict=True):
                    torch.testing.assert_close(mine[token], theirs[0], atol=2e-4, rtol=2e-4)
    assert engine.skipped_per_layer == [1, 2, 0, 3]
    assert sorted(rule.told) == [0, 1, 2]  # of the last, which all skip, there is nothing to tell
    assert rule.told[0][2].tolist() == [True, False, True]
    assert rule.told[2][2] is True or rule.told[2][2].tolist() == [True] * 3
    # Weights are left unread where all skip; a surrogate is read where any does.
    read = sum(chosen.weight_bytes(layer) for layer in (0, 1, 3)) if chosen else 0
    assert engine.weight_bytes_saved == architecture.blocks[3].weight_bytes - read


@pytest.mark.parametrize("model_type", KINDS)
def test_a_rule_is_told_the_stream_and_all_that_the_block_adds(model_type: str) -> None:
    model = of_kind(model_type)
    for ids in ([7], [7, 21, 60]):
        seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

        def see(layer: int, h: torch.Tensor, f: torch.Tensor, seen: Any = seen) -> None:
            seen[layer] = h.clone(), f.clone()

        expected = model(input_ids=torch.tensor(ids)[:, None], use_cache=False).logits[:, 0]
        with observe(locate(model).blocks, see):
            logits, engine, rule = planned(model, [[False] * len(ids)] * 4, ids, None)
        assert torch.equal(logits, expected)
        assert (engine.skipped_per_layer, engine.weight_bytes_saved) == ([0, 0, 0, 0], 0)
        assert sorted(rule.told) == [0, 1, 2, 3]
        for layer, (h, f) in seen.items():
            torch.testing.assert_close(rule.told[layer][0], h.reshape(len(ids), -1))
            torch.testing.assert_close(rule.told[layer][1], f.reshape(len(ids), -1))


def test_only_rows_that_go_on_are_counted(tiny: Any) -> None:
    live = torch.tensor([True, True, False])
    _, engine, _ = planned(tiny, TABLE, [7, 21, 60], None, counted=live)
    assert engine.skipped_per_layer == [1, 1, 0, 2]
    assert engine.weight_bytes_saved == locate(tiny).blocks[3].weight_bytes
    _, engine, _ = planned(tiny, [[True]] * 4, [7], None, counted=torch.tensor([False]))
    assert engine.skipped_per_layer == [0, 0, 0, 0]


def test_a_full_pass_asks_no_rule_and_shows_what_ffns_return_besides() -> None:
    for model_type, extras in (("llama", 0), ("gpt_oss", 1)):
        model = of_kind(model_type)
        ids = torch.tensor([[7, 21]])
        expected = model(input_ids=ids, use_cache=False).logits
        rule = Planned([[True, True]] * 4)
        engine = EagerEngine(locate(model), rule, reason="why not")
        engine.attach()
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, expected)
        assert [engine.extras(layer) for layer in range(5)] == [extras] * 4 + [0]
        engine.detach()
        engine.detach()
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, expected)
        assert engine.skipped_per_layer == [0, 0, 0, 0]
        assert (rule.told, engine.weight_bytes_saved, engine.reason) == ({}, 0, "why not")
        assert (engine.name, engine.row_decisions) == ("eager", (0, 0))


@pytest.mark.parametrize("model_type", ["llama", "gpt_oss"])
def test_a_prefill_before_the_session_is_gone_on_from(model_type: str) -> None:
    """What an FFN returns besides f is then seen once, in a run that is not counted as skipped bytes."""
    model = of_kind(model_type)
    policy = SkipPolicy(cold_s=1, cold_e=4, threshold=-1.0, warm_up_tokens=0)
    first, later = torch.tensor([[5, 7, 21]]), [torch.tensor([[n]]) for n in (9, 60, 2)]

    def steps(cache: Any) -> list[torch.Tensor]:
        return [model(input_ids=ids, past_key_values=cache).logits for ids in later]

    with skipping(model, policy=policy, engine="eager") as inside:
        expected = steps(model(input_ids=first, use_cache=True).past_key_values)
    cache = model(input_ids=first, use_cache=True).past_key_values
    with skipping(model, policy=policy, engine="eager") as outside:
        found = steps(cache)
    torch.testing.assert_close(torch.cat(found), torch.cat(expected))
    assert outside.report.skipped_per_layer == inside.report.skipped_per_layer == (0, 0, 3, 3)
    blocks = locate(model).blocks
    once = blocks[2].weight_bytes + blocks[3].weight_bytes
    assert outside.report.weight_bytes_saved == inside.report.weight_bytes_saved - once


def test_a_layer_that_calls_its_ffn_first_is_refused() -> None:
    """A parallel layer's stream is known when its attention has run."""
    model = of_kind("gptj")
    engine = EagerEngine(locate(model), Planned(TABLE))
    engine.attach()
    try:
        engine.begin(PassTokens(active=torch.ones(3, dtype=torch.bool), step=0))
        with pytest.raises(SessionError, match="layer 1 called its FFN before its attention"):
            model.transformer.h[1].mlp(torch.zeros(3, 1, 32))
    finally:
        engine.detach()


def test_an_engine_without_a_reason_was_asked_for(tiny: Any) -> None:
    assert EagerEngine(locate(tiny), Planned(TABLE)).reason == "asked for"


def test_skips_of_all_passes_add_up(tiny: Any) -> None:
    engine = EagerEngine(locate(tiny), Planned(TABLE))
    engine.attach()
    try:
        tiny(input_ids=torch.tensor([[5]]), use_cache=False)  # a prefill
        for step in range(3):
            engine.begin(PassTokens(active=torch.ones(3, dtype=torch.bool), step=step))
            tiny(input_ids=torch.tensor([[7], [21], [60]]), use_cache=False)
    finally:
        engine.detach()
    assert engine.skipped_per_layer == [3, 6, 0, 9]
    assert engine.weight_bytes_saved == 3 * locate(tiny).blocks[3].weight_bytes


@pytest.mark.parametrize("live", [None, True, False])
@pytest.mark.parametrize("learns", [True, False])
def test_a_whole_block_of_one_token_does_what_the_rule_says_by_hand(
    tiny: Any, learns: bool, live: bool | None
) -> None:
    """Four blocks, of which the second and the last are skipped; a surrogate stands for the second."""
    hidden = tiny.config.hidden_size
    blocks, chosen = locate(tiny).blocks, surrogates(hidden)
    told: list[tuple[int, list[bool]]] = []
    rule = Alternate(as_tensor=False)
    rule.learns = learns
    engine = EagerEngine(locate(tiny), rule, surrogates=chosen)
    weights = torch.randn(4, hidden, hidden)
    leave = [
        engine.whole_block(block, partial(torch.matmul, other=weight))
        for block, weight in zip(blocks, weights, strict=True)
    ]
    h = expected = torch.randn(1, 1, hidden)
    for block in leave:  # nothing is announced: a prefill
        h = block(h)
    for weight in weights:
        expected = expected + expected @ weight
    assert torch.equal(h, expected) and rule.seen == [] and engine.skipped_per_layer == [0] * 4

    counted = None if live is None else torch.tensor([live])
    active = torch.ones(1, dtype=torch.bool)
    engine.begin(PassTokens(active, counted, step=0, watcher=lambda i, skip: told.append((i, skip.tolist()))))
    h = expected = torch.randn(1, 1, hidden)
    for block in leave:
        h = block(h)
    for i, weight in enumerate(weights):
        if i % 2 == 0:
            expected = expected + expected @ weight
        elif i == 1:
            expected = expected + chosen(1, expected[0])[None]  # type: ignore[index]
    assert torch.equal(h, expected)
    assert rule.seen == ([0, 2] if learns else [])
    once = 0 if live is False else 1
    assert engine.skipped_per_layer == [0, once, 0, once]
    assert told == [(1, [True]), (3, [True])]
    unread = blocks[1].weight_bytes + blocks[3].weight_bytes - chosen.weight_bytes(1)
    assert engine.weight_bytes_saved == unread


def test_whole_blocks_hand_the_state_on_and_begin_anew_with_each_token(tiny: Any) -> None:
    """The rule `cosine` skips only what follows the block that armed: never the first, for each token."""
    engine = EagerEngine(locate(tiny), ALWAYS.make_rule())
    leave = [engine.whole_block(block, torch.neg) for block in locate(tiny).blocks]
    for _ in range(2):
        engine.begin(PassTokens(active=torch.ones(1, dtype=torch.bool), step=0))
        h = torch.ones(1, 1, tiny.config.hidden_size)
        for block in leave:
            h = block(h)
    assert engine.skipped_per_layer == [0, 2, 2, 0]  # at most two of them


def test_a_forward_that_somebody_set_is_told_from_the_classs(tiny: Any) -> None:
    engine = EagerEngine(locate(tiny), ALWAYS.make_rule())
    module = locate(tiny).blocks[1].chain[-1]
    assert not engine.has_another_forward(module)
    engine.attach()
    try:
        assert not engine.has_another_forward(module)  # the engine's own
        asking = module.forward
        module.forward = lambda *args: asking(*args)
        assert engine.has_another_forward(module)
        module.forward = asking
    finally:
        engine.detach()
    own = module.forward
    module.forward = lambda *args: own(*args)
    assert engine.has_another_forward(module)
    engine.attach()
    try:
        assert engine.has_another_forward(module)  # set before the session, it lies below the engine's
    finally:
        engine.detach()
        del module.forward


def test_outputs_besides_f_are_those_of_the_layer_that_is_asked_about() -> None:
    model: Any = tiny_model("mixtral", num_local_experts=4, num_experts_per_tok=2)
    dense = EagerEngine(locate(lively()), ALWAYS.make_rule())
    engine = EagerEngine(locate(model), ALWAYS.make_rule())
    assert [engine.extras(layer) for layer in range(5)] == [0] * 5
    engine._extras = {engine.blocks[2].chain[-1]: 1}
    assert [engine.extras(layer) for layer in range(5)] == [0, 0, 1, 0, 0]
    assert dense.extras(2) == 0
