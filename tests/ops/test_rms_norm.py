"""The norm of a decode step against transformers' own, and against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from skipcal.ops.rms_norm import reference, rms_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of the largest value, about 4: rounded twice.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 4e-2}


@pytest.mark.parametrize("op", [rms_norm, reference])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "hidden"), [(1, 64), (3, 40), (2, 1)])
def test_agrees_with_transformers_and_float64(op: Any, dtype: torch.dtype, rows: int, hidden: int) -> None:
    h = (torch.randn(rows, hidden, device=DEVICE) * 3).to(dtype)
    norm: Any = LlamaRMSNorm(hidden, eps=1e-5).to(DEVICE, dtype)
    norm.weight.add_(torch.randn_like(norm.weight) * 0.1)
    x = op(h, norm.weight, 1e-5)
    exact = h.double() / (h.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
    assert x.dtype == dtype
    assert (x.double() - exact).abs().max() < TOLERANCE[dtype]
    torch.testing.assert_close(x, norm(h), atol=TOLERANCE[dtype], rtol=0.0)
