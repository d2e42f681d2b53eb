"""The eager engine's two ways, for one token and for many, do the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import lively

from skipcal.arch.locate import locate
from skipcal.runtime.engines.base import PassTokens
from skipcal.runtime.engines.eager import EagerEngine
from skipcal.runtime.policy import SkipPolicy
from skipcal.runtime.surrogates import LowRank, Surrogates

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
        monkeypatch.delattr(f"skipcal.runtime.rules.{name}")
    run(tiny, EagerEngine(locate(tiny), Alternate(False)), 1)
    with pytest.raises(NameError):
        run(tiny, EagerEngine(locate(tiny), ALWAYS.make_rule()), 1)
