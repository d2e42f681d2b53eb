"""What stands on instances for a while: how it goes away when others were there too, and what copies see."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from skipcal.arch.patch import InstancePatches


def ours(*_args: Any) -> str:
    return "ours"


def theirs(*_args: Any) -> str:
    return "theirs"


@pytest.fixture
def module() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.ReLU())


def test_what_was_there_comes_back(module: Any) -> None:
    module.forward = theirs
    patches = InstancePatches()
    patches.set(module, "forward", ours)
    patches.set(module, "fresh", ours)
    assert module(1) == "ours"
    assert patches.restore() == []
    assert module(1) == "theirs"
    assert not hasattr(module, "fresh")
    assert "__getstate__" not in module.__dict__


def test_what_somebody_else_has_set_stays_and_is_named(module: Any, caplog: pytest.LogCaptureFixture) -> None:
    patches = InstancePatches(module)
    patches.set(module[1], "forward", ours)
    module[1].forward = theirs
    assert patches.restore() == ["forward"]
    assert module[1](1) == "theirs"
    assert "changed 1.forward" in caplog.text
    assert patches.restore() == []


def test_what_somebody_else_has_deleted_is_no_error(module: Any, caplog: pytest.LogCaptureFixture) -> None:
    patches = InstancePatches(module)
    patches.set(module[1], "forward", ours)
    del module[1].forward
    patches.set(module, "extra", ours)
    assert patches.restore() == ["forward"]
    assert "changed 1.forward" in caplog.text
    assert "forward" not in module[1].__dict__
    assert "extra" not in module.__dict__


def test_what_stood_there_before_comes_back_even_if_ours_was_deleted(module: Any) -> None:
    module.forward = theirs
    patches = InstancePatches()
    patches.set(module, "forward", ours)
    del module.forward
    patches.restore()
    assert module.forward is theirs


def test_a_wrapper_that_goes_away_later_puts_the_original_back(module: Any) -> None:
    """As accelerate does it: the wrapper keeps what it found on the instance."""
    x = torch.tensor([-1.0, 1.0])
    patches = InstancePatches()
    patches.set(module[1], "forward", ours)
    module[1]._old_forward = module[1].forward
    module[1].forward = theirs
    patches.restore()
    module[1].forward = module[1]._old_forward
    assert module[1](x).tolist() == [0.0, 1.0]


def test_a_number_that_others_have_too_is_theirs(module: Any) -> None:
    module.layers, module.heads = 2, 3
    patches = InstancePatches()
    patches.set(module, "layers", 3)
    patches.restore()
    assert (module.layers, module.heads) == (2, 3)


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_has_nothing_of_ours_and_all_of_theirs(module: Any, copied: Any) -> None:
    module[0].register_forward_hook(theirs)
    patches, more = InstancePatches(), InstancePatches()
    patches.set(module[1], "forward", ours)
    more.set(module[1], "forward", lambda x: x)
    patches.before_forward(module[0], lambda *_: None)
    patches.after_forward(module[0], lambda *_: None, always_call=True)
    more.before_forward(module, lambda *_: None)
    module[1]._old_forward = module[1].forward
    for part in (module, module[0], module[1]):
        made = copied(part)
        for inside in (m for m in made.modules() if copied is not copy.copy or m is made):
            assert "forward" not in inside.__dict__
            assert "__getstate__" not in inside.__dict__
            assert not inside._forward_pre_hooks
            assert not inside._forward_pre_hooks_with_kwargs
            assert not inside._forward_hooks_always_called
    assert list(copied(module[0])._forward_hooks.values()) == [theirs]
    x = torch.tensor([-1.0, 1.0])
    assert copied(module[1])._old_forward(x).tolist() == [0.0, 1.0]
    assert module[1](x) is x
    more.restore()
    assert module[1](x) == "ours"


def test_hooks_that_somebody_else_has_cleared_are_no_error(module: Any) -> None:
    patches = InstancePatches()
    patches.before_forward(module, lambda *_: None)
    module._forward_pre_hooks.clear()
    patches.restore()
    assert "__getstate__" not in module.__dict__
