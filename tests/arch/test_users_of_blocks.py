"""Everything that stands on located blocks, for parallel layers and mixtures: baselines, gate, fit, bf16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import CASES, lively_case, policy_between
from by_hand import ByHand, decode
from conftest import attentive, lively
from gated import NEW, PROMPT, gates_for, generated, surrogates_for

from skipcal.arch.locate import locate
from skipcal.core.chosen_ffns import ChosenFFNs
from skipcal.core.gate import GatePolicy
from skipcal.core.whole_layers import ShortGPT
from skipcal.errors import UnsupportedModel
from skipcal.fit.damage import fisher_damage, loss_gradients
from skipcal.fit.layer_damage import relative_damage
from skipcal.fit.layer_sweep import LayerRunner
from skipcal.fit.on_policy import Sweep
from skipcal.runtime.session import skipping

KINDS = ["gpt_neox", "falcon", "cohere2_moe", "mixtral", "granitemoeshared", "minimax", "gemma4"]
ROWS = torch.randint(3, 97, (12, 16), generator=torch.Generator().manual_seed(1)).tolist()


def forced(model: Any, policy: Any, ids: torch.Tensor) -> tuple[torch.Tensor, Any]:
    with skipping(model, policy=policy, teacher_forced=True, prompt_tokens=4) as run:
        logits: torch.Tensor = model(ids, use_cache=False).logits
    return logits, run.report


def zeroed(model: Any, case: str, layers: tuple[int, ...], ids: torch.Tensor, start: int) -> torch.Tensor:
    """Logits with what these layers' FFNs add overwritten by zeros, from position `start` on."""
    hand = ByHand(model, CASES[case][1])

    def zero(_module: Any, _args: Any, output: Any) -> Any:
        y = (output[0] if isinstance(output, tuple) else output).clone()
        y.view(*ids.shape, -1)[:, start:] = 0
        return (y, *output[1:]) if isinstance(output, tuple) else y

    handles = [
        hand.layers[layer].get_submodule(name).register_forward_hook(zero)
        for layer in layers
        for name in hand.oddity.adds
    ]
    logits: torch.Tensor = model(ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits


@pytest.mark.parametrize("case", KINDS)
def test_a_static_set_leaves_out_what_it_names(case: str) -> None:
    model, _ = lively_case(case)
    ids = torch.tensor(ROWS[:3])
    policy = ChosenFFNs(layers=(1, 2), warm_up_tokens=3, probability=1.0, method="static")
    logits, report = forced(model, policy, ids)
    torch.testing.assert_close(logits, zeroed(model, case, (1, 2), ids, 7), atol=2e-4, rtol=2e-4)
    assert report.skipped_per_layer == (0, 27, 27, 0)


@pytest.mark.parametrize("case", KINDS)
def test_random_choices_are_the_same_step_by_step_and_in_one_pass(case: str) -> None:
    model, _ = lively_case(case)
    policy = ChosenFFNs(layers=(0, 1, 2, 3), warm_up_tokens=1, probability=0.4, seed=3, method="random")
    ids = torch.tensor([PROMPT])
    with skipping(model, policy=policy, engine="eager") as run:
        out = model.generate(
            input_ids=ids,
            max_new_tokens=NEW,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    with skipping(model, policy=policy, teacher_forced=True, prompt_tokens=len(PROMPT)) as again:
        logits = model(out.sequences[:, :-1], use_cache=False).logits[0, len(PROMPT) - 1 :]
    assert 0 < run.report.skipped_blocks < 4 * (NEW - 2)
    assert again.report.skipped_per_layer == run.report.skipped_per_layer
    torch.testing.assert_close(logits, torch.cat(list(out.logits)), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("case", ["gpt_neox", "falcon", "cohere2_moe", "mixtral"])
def test_shortgpt_takes_whole_layers_out(case: str) -> None:
    model, oddity = lively_case(case)
    hand = ByHand(model, oddity)
    ids = torch.tensor(ROWS[:2])

    def pass_by(_module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        return (x, *output[1:]) if isinstance(output, tuple) else x

    handle = hand.layers[2].register_forward_hook(pass_by, with_kwargs=True)
    expected = model(ids, use_cache=False).logits
    handle.remove()
    with skipping(model, policy=ShortGPT(removed=(2,)), teacher_forced=True):
        logits = model(ids, use_cache=False).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", KINDS)
def test_surrogates_stand_in_for_what_a_gate_skips(case: str) -> None:
    """By hand: where the gate skips, the sum that the layer makes is h + s of the stream as it is then."""
    model, _ = lively_case(case)
    architecture = locate(model)
    gates, surrogates = gates_for(model), surrogates_for(model)
    limit = 0.4 if case == "cohere2_moe" else 0.0  # its text goes round in circles, where scores are higher
    policy = GatePolicy(gates=gates, surrogates=surrogates, threshold=limit, warm_up_tokens=2)
    output, report = generated(model, policy)
    assert 0 < sum(report.skipped_per_layer) < 2 * (NEW - 3)
    ids = output.sequences[:, :-1]
    with skipping(model, policy=policy, teacher_forced=True, prompt_tokens=len(PROMPT)) as run:
        logits = model(ids, use_cache=False).logits
    assert run.report.skipped_per_layer == report.skipped_per_layer
    kept = logits[0, len(PROMPT) - 1 :]
    torch.testing.assert_close(kept, torch.cat(list(output.logits)), atol=5e-4, rtol=5e-4)

    hand = ByHand(model, CASES[case][1])
    expected, skips = by_gate(model, architecture, hand, policy, ids)
    torch.testing.assert_close(expected, logits, atol=5e-4, rtol=5e-4)
    assert skips == sum(report.skipped_per_layer)


def by_gate(
    model: Any, architecture: Any, hand: ByHand, policy: GatePolicy, ids: torch.Tensor
) -> tuple[torch.Tensor, int]:
    """Logits of a pass in which what a layer adds is overwritten token by token, and how often."""
    from oracle import score

    skips = 0
    entered: dict[int, torch.Tensor] = {}
    active = torch.arange(ids.shape[1]) >= len(PROMPT) + policy.warm_up_tokens
    handles: list[Any] = []
    for index in policy.gates.layers:
        block = architecture.blocks[index]
        layer = block.layer

        def layer_in(_m: Any, args: Any, kwargs: Any, index: int = index) -> None:
            entered[index] = args[0] if args else kwargs["hidden_states"]

        def attended(_m: Any, _a: Any, output: Any, index: int = index) -> None:
            entered[index] = entered[index] + (output[0] if isinstance(output, tuple) else output)

        def block_in(_m: Any, args: Any, kwargs: Any, index: int = index, block: Any = block) -> None:
            if block.attention is None:
                x = args[0] if args else kwargs["hidden_states"]
                entered[index] = x * block.stream_scale

        def overwrite(module: Any, _a: Any, output: Any, index: int = index, block: Any = block) -> Any:
            nonlocal skips
            y = (output[0] if isinstance(output, tuple) else output).clone()
            rows, h = y.view(-1, y.shape[-1]), entered[index].view(-1, y.shape[-1])
            for token in torch.nonzero(active).flatten().tolist():
                if score(policy, index, h[token]) >= policy.threshold:
                    continue
                last = module is block.chain[-1]
                stand_in = policy.surrogates(index, h[token : token + 1])
                assert stand_in is not None
                rows[token] = stand_in[0] / block.scale if last else 0.0
                skips += last
            return (y, *output[1:]) if isinstance(output, tuple) else y

        handles.append(layer.register_forward_pre_hook(layer_in, with_kwargs=True))
        if block.attention is not None:
            handles.append(block.attention.register_forward_hook(attended))
        handles.append(block.chain[0].register_forward_pre_hook(block_in, with_kwargs=True))
        handles += [layer.get_submodule(name).register_forward_hook(overwrite) for name in hand.oddity.adds]
    logits: torch.Tensor = model(ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits, skips


@pytest.mark.parametrize("case", ["gpt_neox", "falcon", "mixtral", "granitemoeshared"])
def test_half_precision_decides_as_a_pass_over_the_same_text(case: str) -> None:
    model, oddity = lively_case(case)
    model = model.to(torch.bfloat16)
    assert locate(model).proof_error <= 2 * torch.finfo(torch.bfloat16).eps
    full = decode(model, oddity, PROMPT, NEW, policy_between([0.0, 0.1, 0.2, 0.3] * 3))
    policy = policy_between(full.cosines, max_skips=3)
    hand = decode(model, oddity, PROMPT, NEW, policy)
    output, report = generated(model, policy)
    assert output.sequences[0, len(PROMPT) :].tolist() == hand.tokens
    assert sum(report.skipped_per_layer) == sum(map(len, hand.skipped)) > 0


@pytest.mark.parametrize("case", ["gpt_neox", "falcon", "mixtral", "opt, norm after the sum"])
def test_gradients_are_those_of_the_sum(case: str) -> None:
    """Against a difference quotient: a little more f along the gradient raises the loss by its square."""
    model, _ = lively_case(case)
    architecture = locate(model)
    ids = torch.tensor(ROWS[:1])
    gradients = loss_gradients(model, architecture, ids, 4, torch.Generator().manual_seed(0))

    def loss(added: torch.Tensor | None) -> float:
        def add(_module: Any, _args: Any, output: Any) -> Any:
            y = output[0] if isinstance(output, tuple) else output
            y = y if added is None else y + added.view(y.shape)
            return (y, *output[1:]) if isinstance(output, tuple) else y

        handle = architecture.blocks[1].chain[-1].register_forward_hook(add)
        logits = model(ids, use_cache=False).logits[:, 4:].float().flatten(0, 1)
        handle.remove()
        labels = torch.multinomial(full, 1, generator=torch.Generator().manual_seed(0))[:, 0]
        return float(torch.nn.functional.cross_entropy(logits.double(), labels, reduction="sum"))

    full = model(ids, use_cache=False).logits[:, 4:].float().flatten(0, 1).softmax(-1)
    g = gradients[1]
    step = 1e-3 / float(g.norm())
    rise = (loss(g * step) - loss(-g * step)) / (2 * step)
    assert rise == pytest.approx(float(g.square().sum()), rel=0.05)


@pytest.mark.parametrize(
    "case", ["gpt_neox", "falcon", "mixtral", "granitemoeshared", "opt, norm after the sum"]
)
def test_a_sweep_leaves_the_stream_that_the_engine_makes(case: str) -> None:
    """A fitted gate and its surrogates, run by the engine over the same rows, skip what the sweep skipped."""
    model, _ = lively_case(case)
    architecture = locate(model)
    damage = fisher_damage(model, architecture, [torch.tensor(ROWS[:4])], first=3, seed=0)
    sweep = Sweep(
        architecture, ROWS, layers=(0, 1, 2, 3), damage=damage, rank=3, maps=2, first=3, batch_size=4
    )
    threshold = sweep.fit().scores.threshold(0.3)
    found = sweep.fit(threshold=threshold)
    assert 0.05 < found.skip_ratio < 0.8
    policy = GatePolicy(gates=found.gates, surrogates=found.surrogates, threshold=threshold, warm_up_tokens=2)
    with skipping(model, policy=policy, teacher_forced=True) as run:
        model(torch.tensor(ROWS), use_cache=False)
    assert run.report.skip_ratio == pytest.approx(found.skip_ratio, abs=0.03)
    weights = relative_damage(model, architecture, [torch.tensor(ROWS[:2])], first=3).weights
    assert all(weights[layer] > 0 for layer in range(4))


def test_layers_that_read_the_text_itself_cannot_be_fitted_one_by_one() -> None:
    model, _ = lively_case("gemma4")
    with pytest.raises(UnsupportedModel, match=r"layer 0 is given .* besides the stream"):
        LayerRunner(locate(model)).embed(torch.tensor(ROWS[:2]))


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("gpt_neox", "attention and FFN are parallel"),
        ("minimax", "scale the stream"),
        ("granitemoeshared", "add up several outputs"),
    ],
)
def test_the_graph_engine_leaves_such_layers_to_the_eager_one(model_type: str, reason: str) -> None:
    model: Any = attentive(lively(model_type))
    policy = ChosenFFNs(layers=(1, 2), warm_up_tokens=1, probability=1.0, method="static")
    ids = torch.tensor([PROMPT])
    found = {}
    for engine in ("eager", "graph"):
        with skipping(model, policy=policy, engine=engine) as run:
            found[engine] = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
        assert run.report.engine == "eager"
    assert reason in run.report.engine_reason
    assert torch.equal(found["eager"], found["graph"])
