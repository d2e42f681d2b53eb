"""A model that is copied, pickled or saved inside a session: the plain model comes out."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import lively
from sessions import ALWAYS, ROWS, SOME, prompt, state_of
from transformers import AutoModelForCausalLM

from skipcal.calibrate.capture import capture
from skipcal.core.whole_layers import ShortGPT, SkipDecode
from skipcal.errors import SessionError
from skipcal.runtime.session import skipping

COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


def decoded(model: Any) -> torch.Tensor:
    output: torch.Tensor = model.generate(**prompt(ROWS), max_new_tokens=6, do_sample=False)
    return output


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("model_type", ["llama", "gptj"])  # in sequence, in parallel: that has hooks besides
@pytest.mark.parametrize("engine", ["eager", "recorded"])
def test_a_copy_is_the_plain_model_and_the_session_goes_on(model_type: str, copied: str, engine: str) -> None:
    model: Any = lively(model_type)
    before, plain = state_of(model), decoded(model)
    with skipping(model, policy=SOME, engine=engine) as run:
        skipped = decoded(model)
        made = COPIES[copied](model)
        assert state_of(made) == before
        assert torch.equal(decoded(made), plain)
        assert run.report.decode_steps == 3 * 5
        assert torch.equal(decoded(model), skipped)
    assert state_of(model) == before
    with skipping(made, policy=SOME, engine=engine):
        assert torch.equal(decoded(made), skipped)
    assert not torch.equal(skipped, plain)


def test_a_copy_of_a_part_is_plain(tiny: Any) -> None:
    layer = tiny.model.layers[2]
    x = torch.rand(1, 3, 32)
    with skipping(tiny, policy=ALWAYS):
        made = copy.deepcopy(layer)
    made.mlp.down_proj.weight.zero_()
    assert state_of(made) == state_of(layer)
    assert made.mlp(x).abs().max() == 0.0
    assert layer.mlp(x).abs().max() > 0.0


def test_a_copy_does_without_the_session_it_was_made_in(tiny: Any) -> None:
    """Its modules compute with its own weights, not with those of the model it was copied from."""
    with skipping(tiny, policy=SOME):
        made = copy.deepcopy(tiny)
    plain = decoded(made)
    for parameter in tiny.parameters():
        parameter.zero_()
    assert torch.equal(decoded(made), plain)


def test_a_copy_made_while_cosines_are_captured_is_not_captured(tiny: Any) -> None:
    ids = torch.tensor([[5, 6, 7]])
    with capture(tiny) as recorder:
        made = copy.deepcopy(tiny)
        made(torch.tensor([[9, 9, 9, 9]]))
        tiny(ids)
        made(torch.tensor([[9, 9, 9, 9]]))
        assert recorder.take()[0].shape == (3, 4)
    assert state_of(made) == state_of(tiny)


def test_what_is_saved_inside_is_the_plain_model(tiny: Any, tmp_path: Path) -> None:
    plain, weights = decoded(tiny), {name: t.clone() for name, t in tiny.state_dict().items()}
    with skipping(tiny, policy=SOME):
        tiny.save_pretrained(tmp_path)
        inside = tiny.state_dict()
    assert list(inside) == list(weights)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(decoded(loaded), plain)


def test_layers_passed_by_are_in_a_copy(tiny: Any) -> None:
    plain = decoded(tiny)
    policy = SkipDecode(num_layers=4, max_layers=3, min_layers=2, steps=4)
    with skipping(tiny, policy=policy):
        made = copy.deepcopy(tiny)
    assert state_of(made) == state_of(tiny)
    assert torch.equal(decoded(made), plain)


def test_a_model_whose_layers_are_out_is_not_copied_or_saved(tiny: Any, tmp_path: Path) -> None:
    before = state_of(tiny)
    with skipping(tiny, policy=ShortGPT(removed=(1,))):
        for attempt in (copy.deepcopy, pickle.dumps, lambda model: model.save_pretrained(tmp_path)):
            with pytest.raises(SessionError, match="1 layers are out of the model"):
                attempt(tiny)
    assert state_of(tiny) == before
    assert list(tmp_path.iterdir()) == []
    assert state_of(copy.deepcopy(tiny)) == before
