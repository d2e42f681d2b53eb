"""Passes that count what is skipped run the layers that can change the count, and no others."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from conftest import lively

from skipcal.arch.blocks import ending_before
from skipcal.arch.locate import locate
from skipcal.calibrate.passes import teacher_forced_report
from skipcal.core.chosen_ffns import ChosenFFNs
from skipcal.core.gate import GatePolicy, Gates
from skipcal.core.policy import Policy, SkipPolicy
from skipcal.core.surrogates import Surrogates
from skipcal.runtime.session import skipping

LAYERS, HIDDEN, PROMPT = 6, 32, 2
ROWS = torch.randint(3, 90, (2, 3, 12), generator=torch.Generator().manual_seed(0)).tolist()
GATES = Gates(
    layers=(1, 3),
    weight=torch.randn(2, HIDDEN, generator=torch.Generator().manual_seed(1)),
    log_norm_weight=torch.zeros(2),
    bias=torch.zeros(2),
)
POLICIES: dict[str, tuple[Policy, int]] = {  # and the last FFN that it may skip
    "cosine": (SkipPolicy(cold_s=1, cold_e=4, threshold=0.0, warm_up_tokens=1), 3),
    "tolerances": (
        SkipPolicy(
            cold_s=0, cold_e=3, threshold=0.0, warm_up_tokens=0, max_skips=1, tolerances=(1.0,) * LAYERS
        ),
        2,
    ),
    "gate": (GatePolicy(gates=GATES, surrogates=Surrogates({}), threshold=0.0, warm_up_tokens=1), 3),
    "to the last": (ChosenFFNs(method="random", layers=(2, 5), probability=0.5, warm_up_tokens=0), 5),
    "none": (SkipPolicy(cold_s=2, cold_e=2, threshold=0.0, warm_up_tokens=0), LAYERS - 1),
}


@pytest.mark.parametrize("name", POLICIES)
def test_counts_are_those_of_whole_passes_and_what_follows_does_not_run(name: str) -> None:
    policy, last = POLICIES[name]
    model: Any = lively(num_hidden_layers=LAYERS, hidden_size=HIDDEN, vocab_size=100)
    architecture = locate(model)
    with skipping(model, policy=policy, teacher_forced=True, prompt_tokens=PROMPT) as run:
        for group in ROWS:
            architecture.stack(input_ids=torch.tensor(group), use_cache=False)
    ran: list[int] = []
    with ExitStack() as hooks:
        for block in architecture.blocks:
            handle = block.layer.register_forward_pre_hook(lambda *_, layer=block.index: ran.append(layer))
            hooks.callback(handle.remove)
        found = teacher_forced_report(model, architecture, policy, ROWS, prompt_tokens=PROMPT)
    assert found.skipped_per_layer == run.report.skipped_per_layer
    assert found.decode_steps_after_warm_up == run.report.decode_steps_after_warm_up > 0
    assert found.weight_bytes_saved == run.report.weight_bytes_saved
    assert (sum(found.skipped_per_layer) > 0) == (name != "none")
    # The layer behind it is entered, to end there.
    assert set(ran) == set(range(min(last + 2, LAYERS)))


def test_a_pass_that_fails_otherwise_says_so_and_leaves_no_hook(tiny: Any) -> None:
    architecture = locate(tiny)
    first, second = architecture.blocks[:2]

    def fail(*_: Any) -> None:
        raise ValueError("in the layer")

    handle = first.layer.register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="in the layer"), ending_before(second):
        architecture.stack(input_ids=torch.tensor([[3, 4]]), use_cache=False)
    handle.remove()
    assert not second.layer._forward_pre_hooks
    assert architecture.stack(input_ids=torch.tensor([[3, 4]]), use_cache=False) is not None
