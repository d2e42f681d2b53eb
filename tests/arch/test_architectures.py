"""Every kind of architecture: located, captured, skipped and restored, against a naive decoder."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from architectures import CASES, PARALLEL, lively_case, policy_between
from by_hand import ByHand, Oddity, cosines, decode

from skipcal.arch.locate import locate
from skipcal.calibrate.capture import capture
from skipcal.core.policy import SkipPolicy
from skipcal.runtime.session import skipping

PROMPT = [5, 17, 31, 8, 44, 23]
NEW = 10
FULL = SkipPolicy(cold_s=0, cold_e=4, threshold=2.0, warm_up_tokens=0)


@pytest.mark.parametrize("case", sorted(CASES))
def test_an_architecture_does_what_the_naive_decoder_does(case: str) -> None:
    model, oddity = lively_case(case)
    ids = torch.tensor([PROMPT])
    before = model(ids, use_cache=False).logits
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}

    architecture = locate(model)
    assert architecture.found == "table"
    assert architecture.kind.startswith("parallel") == (case in PARALLEL)
    assert architecture.num_layers == 4
    assert 0 < architecture.proof_error <= 2 * torch.finfo(torch.float32).eps
    options: dict[str, Any] = {"engine": "eager", "architecture": architecture}

    cosines_are_those_of_the_residual_stream(model, oddity, architecture)
    full = decode(model, oddity, PROMPT, NEW, FULL)
    policy = policy_between(full.cosines, max_skips=3)
    by_hand = decode(model, oddity, PROMPT, NEW, policy)
    skipped = [sum(layer in step for step in by_hand.skipped) for layer in range(4)]
    assert 0 < sum(skipped) < 3 * (NEW - 1)

    tokens, logits, report = generated(model, policy, options)
    assert tokens == by_hand.tokens
    assert list(report.skipped_per_layer) == skipped
    assert report.engine == "eager"
    torch.testing.assert_close(logits, torch.stack(by_hand.logits), atol=2e-4, rtol=2e-4)

    with skipping(model, policy=policy, teacher_forced=True, prompt_tokens=len(PROMPT), **options) as run:
        text = torch.tensor([PROMPT + tokens[:-1]])
        forced = model(text, use_cache=False).logits[0, len(PROMPT) - 1 :]
    torch.testing.assert_close(forced, logits, atol=2e-4, rtol=2e-4)
    assert run.report.skipped_per_layer == report.skipped_per_layer

    tokens, logits, report = generated(model, FULL, options)
    plain, plain_logits, _ = generated(model, None, {})
    assert (tokens, sum(report.skipped_per_layer)) == (plain, 0)
    assert torch.equal(logits, plain_logits)

    assert torch.equal(model(ids, use_cache=False).logits, before)
    for name, module in model.named_modules():
        assert set(vars(module)) == attributes[name], name
        assert not module._forward_hooks and not module._forward_pre_hooks, name


def cosines_are_those_of_the_residual_stream(model: Any, oddity: Oddity, architecture: Any) -> None:
    ids = torch.tensor([PROMPT, PROMPT[::-1]])
    hand = ByHand(model, oddity)
    with hand.watching():
        hand.start()
        expected_logits = model(ids, use_cache=False).logits
    expected = torch.stack([cosines(total, f).flatten() for total, f in hand.streams], -1)
    ratios = torch.stack([(f.norm(dim=-1) / (t - f).norm(dim=-1)).flatten() for t, f in hand.streams], -1)
    with capture(model, architecture=architecture) as recorder:
        logits = model(ids, use_cache=False).logits
    got, got_ratios = recorder.take()
    assert torch.equal(logits, expected_logits)
    np.testing.assert_allclose(got, expected.numpy(), atol=2e-6)
    np.testing.assert_allclose(got_ratios, ratios.numpy(), rtol=1e-4)


def generated(model: Any, policy: SkipPolicy | None, options: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Tokens, logits [steps, vocabulary] and the report of greedy decoding."""
    ids = torch.tensor([PROMPT])
    asked = dict(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    if policy is None:
        out, report = model.generate(**asked), None
    else:
        with skipping(model, policy=policy, **options) as run:
            out = model.generate(**asked)
        report = run.report
    return out.sequences[0, len(PROMPT) :].tolist(), torch.cat(list(out.logits)), report
