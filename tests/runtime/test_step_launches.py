"""How many launches a step is: kernels are counted instead of run, and torch's operations beside them."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import left_padded, lively
from engines import ROWS, SOME
from torch.utils._python_dispatch import TorchDispatchMode

from skipcal.core.gate import GatePolicy, Gates
from skipcal.core.policy import Policy, SkipPolicy
from skipcal.core.surrogates import Surrogates
from skipcal.ops import (
    arm,
    count,
    decode_attention,
    ffn,
    gate,
    low_rank,
    project,
    rms_norm,
    rotary_cache,
)
from skipcal.runtime.session import skipping

pytest.importorskip("triton", reason="without Triton there are no kernels to count")
pytestmark = pytest.mark.usefixtures("references", "small_caches")
OPS = (arm, count, decode_attention, ffn, gate, low_rank, project, rms_norm, rotary_cache)
LAYER = ("project", "rotary_cache", "attend_split", "merge_splits", "project", "gate_up", "down")


class Launches(TorchDispatchMode):
    """What a GPU would be given, in order; kernels do nothing."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []
        for op in OPS:
            self._watch(op, patch)

    def _watch(self, op: ModuleType, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(op, "runs_kernels", lambda tensor: True)
        for name, kernel in vars(op).copy().items():
            if type(kernel).__module__.startswith("triton.runtime"):
                patch.setattr(op, name, _Noted(name.strip("_"), self.names))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and not name.startswith(("empty", "new_empty", "_unsafe_view", "detach")):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


class _Noted:
    def __init__(self, name: str, names: list[str]) -> None:
        self._name, self._names = name, names

    def __getitem__(self, grid: Any) -> Any:
        return lambda *_, **__: self._names.append(self._name)


def launches(
    policy: Policy, rows: int, monkeypatch: pytest.MonkeyPatch, model_type: str = "llama"
) -> list[str]:
    model: Any = lively(model_type)
    with skipping(model, policy=policy, engine="graph") as run:
        model.generate(**left_padded([ROWS[0]] * rows), max_new_tokens=4, do_sample=False)
        step: Any = run._engine._step  # type: ignore[union-attr]
        model(**left_padded([ROWS[0]] * rows), past_key_values=step.start(10))  # a text to go on with
        run._seam.stepping = True  # type: ignore[union-attr]
        with monkeypatch.context() as patch:
            seen = Launches(patch)
            with seen:
                step._compute()
    return seen.names


@pytest.mark.parametrize(("rows", "a_layer"), [(1, 7), (3, 9)])
@pytest.mark.parametrize("region", [(1, 1), (0, 4)])
@pytest.mark.parametrize("model_type", ["llama", "phi3"])
def test_a_layer_is_so_many_launches(
    rows: int, a_layer: int, region: tuple[int, int], model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one more where a rule watches it; the same whoever skips."""
    policy = SkipPolicy(cold_s=region[0], cold_e=region[1], threshold=0.55, warm_up_tokens=1)
    names = launches(policy, rows, monkeypatch, model_type)
    first, last = names.index("rms_norm" if rows > 1 else "project_one"), len(names)
    while names[last - 1] not in ("arm", "down_one", "down_some"):
        last -= 1
    in_layers, watched = names[first:last], region[1] - region[0]
    assert len(in_layers) == 4 * a_layer + watched, in_layers
    if rows == 1:
        expected = [*LAYER, "arm"] if watched else [*LAYER]
        assert [name.removesuffix("_one") for name in in_layers] == expected * 4


def test_a_gate_is_one_launch_before_an_ffn(monkeypatch: pytest.MonkeyPatch) -> None:
    gates = Gates((1, 2), torch.zeros(2, 32), torch.zeros(2), torch.zeros(2))
    policy = GatePolicy(gates=gates, surrogates=Surrogates({}), threshold=0.0, warm_up_tokens=0)
    names = launches(policy, 1, monkeypatch)
    asked = [*LAYER[:5], "gate", *LAYER[5:]]
    in_layers = names[names.index("project_one") : names.index("rms_norm")]
    assert [name.removesuffix("_one") for name in in_layers] == [*LAYER, *asked, *asked, *LAYER]


def test_so_many_launches_are_outside_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    names = launches(SOME, 1, monkeypatch)
    first = names.index("project_one")
    last = len(names) - names[::-1].index("arm")
    assert names[last:] == ["rms_norm", "mm", "count", "copy_"]
    assert names[:first] == ["sub", "add", "embedding", "index_select"]
