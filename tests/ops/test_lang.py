"""Without Triton, and without a device for it, the ops are their references."""

from __future__ import annotations

import subprocess
import sys

from skipcal.ops.lang import padded

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from skipcal.ops import count, decode_attention, gate, low_rank
h, down, up, one = torch.ones(1, 8), torch.ones(2, 8), torch.ones(8, 2), torch.tensor(1.0)
skip, _ = gate.gate(h, h[0], log_norm_weight=one, bias=one, threshold=one * 99)
low_rank.low_rank(h, down, up, h[0].clone(), skip)
assert (h == 18).all(), h
k = torch.ones(1, 1, 4, 8)
out = decode_attention.decode_attention(h[None], k, k, torch.tensor(3), scale=1.0)
assert (out == 1).all(), out
flags, counters = torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, dtype=torch.long)
per_layer = torch.zeros(3, 2, dtype=torch.long)
count.count(flags, flags[0], flags[0], ruled=flags[:, 0].clone(), per_layer=per_layer, agreement=counters)
assert per_layer.tolist() == [[3, 3], [1, 1], [1, 1]] and counters.tolist() == [2, 2]
"""


def test_the_ops_work_where_triton_is_not_installed() -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_TRITON], check=True)


def test_blocks_are_padded_to_powers_of_two() -> None:
    assert [padded(n) for n in (1, 2, 3, 64, 65)] == [1, 2, 4, 64, 128]
