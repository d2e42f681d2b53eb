"""How often a session compiles: kernels of a decode step, over batches, prompts and caches of many sizes.

Sessions run in a process of their own, where Triton is asked for its keys and launches nothing. What a kernel
would have written is then whatever was there, so that no step is held against the model's own pass.
"""

from __future__ import annotations

import importlib.util

import pytest
from triton_keys import variants_of

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")

SESSION = """
from transformers import StoppingCriteria
from skipcal.arch.check import tiny_model
from skipcal.arch.locate import locate
from skipcal.core.gate import GatePolicy, Gates
from skipcal.core.policy import SkipPolicy
from skipcal.core.surrogates import LowRank, Surrogates
from skipcal.runtime.engines import graph_layer, graph_outside, step_engine
from skipcal.runtime.session import skipping

class ThreeTokens(StoppingCriteria):
    def __call__(self, ids, scores, **_):
        return torch.full((len(ids),), ids.shape[1] >= length + 3)

graph_layer._unlike = lambda *_: None
graph_outside._is_rms_norm = lambda norm: True
step_engine.StepEngine._prove = lambda self, step, given: setattr(step, "proofs", step.proofs + 1) or True

model = tiny_model("llama", hidden_size=64, head_dim=16, max_position_embeddings=8192)
model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
gates = Gates((1, 2), torch.zeros(2, 64), torch.zeros(2), torch.zeros(2))
maps = {i: LowRank(torch.zeros(3, 64), torch.zeros(64, 3), torch.zeros(64)) for i in (1, 2)}
policies = (
    SkipPolicy(cold_s=0, cold_e=4, threshold=0.5, warm_up_tokens=0),
    GatePolicy(gates=gates, surrogates=Surrogates(maps), threshold=0.0, warm_up_tokens=0),
)
for case, texts in CASES.items():
    variants = found[case]
    for policy in policies:
        session = skipping(model, policy=policy, engine="graph", architecture=locate(model))
        with torch.no_grad(), session as run:
            for rows, length, room in texts:
                ids, mask = torch.ones(2, rows, length, dtype=torch.long)
                mask[0, 0] = rows == 1  # of one row nothing is padded
                model.generate(
                    input_ids=ids, attention_mask=mask, max_new_tokens=room - length, do_sample=False,
                    stopping_criteria=[ThreeTokens()],
                )
        assert "4 layers fused" in run.report.engine_reason and run.report.engine == "graph"
"""
# Rows, tokens of the prompt, and what the call may come to.
LENGTHS = ((17, 21), (40, 300), (100, 1000), (1030, 1100), (300, 5000), (2500, 2600))
CASES = {
    "1 rows": [(1, *length) for length in (*LENGTHS, (4990, 5000))],
    "3 rows": [(3, *length) for length in LENGTHS],
    **{f"{rows} rows, one text": [(rows, *LENGTHS[0])] for rows in (1, 3)},
    "rows": [(rows, *LENGTHS[0]) for rows in range(1, 10)],
}
POWERS = 5  # 1, 2, 4, 8 and 16 rows


@pytest.fixture(scope="module")
def variants(warm: str) -> dict[str, dict[str, int]]:
    """By case: the kernels that its sessions compile, and how often."""
    return variants_of(warm, f"CASES = {CASES!r}\n{SESSION}")


@pytest.mark.parametrize("rows", [1, 3])
def test_longer_prompts_and_larger_caches_compile_nothing(
    rows: int, variants: dict[str, dict[str, int]]
) -> None:
    assert {"_attend_split", "_rotary_cache", "_arm", "_gate", "_count"} < variants[f"{rows} rows"].keys()
    assert variants[f"{rows} rows"] == variants[f"{rows} rows, one text"]


def test_kernels_are_compiled_for_powers_of_two_of_rows(variants: dict[str, dict[str, int]]) -> None:
    one_text = variants["3 rows, one text"] | variants["1 rows, one text"]
    for name, number in variants["rows"].items():
        assert number <= POWERS * one_text[name], name
