"""How often a kernel is compiled: a session's contexts, layers and growing caches share one variant.

Triton is asked for its keys in a process of its own, for here it interprets and compiles nothing.
"""

from __future__ import annotations

import importlib.util

import pytest
from triton_keys import variants_of

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")

LAUNCHES = """
for heads, kv_heads, padded in ((32, 32, True), (32, 8, False)):
    variants = found[f"{heads} heads on {kv_heads}"]
    q = torch.zeros(1, heads, 128, dtype=torch.bfloat16)
    for slots in (1, 32, 100, 1000, 1024, 2048, 4096, 5001):
        k = torch.zeros(1, kv_heads, slots, 128, dtype=torch.bfloat16)
        valid = torch.ones(1, slots, dtype=torch.bool) if padded else None
        decode_attention.decode_attention(q, k, k, torch.tensor(1), valid=valid, scale=1.0)

w = torch.zeros(64, 64, dtype=torch.bfloat16)
weights = ffn.FFNWeights(w[0], 1e-5, w, w, w)
for rows in (1, 3):
    variants = found[f"{rows} rows"]
    flags, scalars = torch.zeros(6, rows, dtype=torch.bool), torch.zeros(6)
    assert len({row.data_ptr() % 16 for row in flags}) > 1
    for layer in range(4):
        skip, following, live = flags[layer : layer + 3]
        _, sums = ffn.ffn(w[:rows], skip, weights)
        arm.arm(
            sums, torch.zeros(rows, dtype=torch.int32), skip, following, live=live,
            threshold=scalars[:1], limit=torch.ones(1, dtype=torch.int32),
        )
        qkv = project.project(w[:rows], [w] * 3, norm=w[0], eps=1e-5)
        project.project(w[:rows], [w], residual=w[:rows])
        cache = w.new_zeros(rows, 1, 5 + 16 * layer, 64)
        rotary_cache.rotary_cache(qkv, w[:1], w[:1], torch.tensor([layer]), cache, cache)
        scalar = scalars[layer]
        asked = {"log_norm_weight": scalar, "bias": scalar, "threshold": scalar}
        gate.gate(w[:rows], torch.zeros(64), **asked, active=live, skip=skip)
        low_rank.low_rank(w[:rows], w[:4], w[:4].T.contiguous(), w[0], skip)
        count.count(
            flags, live, following, ruled=torch.ones(6, dtype=torch.bool),
            per_layer=torch.zeros(3, 6, dtype=torch.long), agreement=torch.zeros(2, dtype=torch.long),
        )
"""


@pytest.fixture(scope="module")
def variants(warm: str) -> dict[str, dict[str, int]]:
    """By case: the kernels that it compiles, and how often."""
    return variants_of(warm, LAUNCHES)


@pytest.mark.parametrize("case", ["32 heads on 32", "32 heads on 8"])
def test_a_cache_that_grows_compiles_nothing_anew(case: str, variants: dict[str, dict[str, int]]) -> None:
    assert variants[case] == {"_attend_split": 1, "_merge_splits": 1}


@pytest.mark.parametrize("rows", [1, 3])
def test_layers_share_their_kernels(rows: int, variants: dict[str, dict[str, int]]) -> None:
    of_ffn = {"_gate_up_one", "_down_one"} if rows == 1 else {"_norm_some", "_gate_up_some", "_down_some"}
    others = {"_arm", "_count", "_gate", "_down", "_up", "_rotary_cache"}
    projections = {"_project_one": 2} if rows == 1 else {"_project_some": 2, "_rms_norm": 1}
    assert variants[f"{rows} rows"] == dict.fromkeys(of_ffn | others, 1) | projections
