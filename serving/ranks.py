"""What processes that share a layer agree on, under tensor parallelism.

Each of them has the whole stream, and makes up its mind from it. Should two of them ever differ in the last
bit of a score, they would gather other tokens and wait for each other for ever. So the first one decides.
"""

from __future__ import annotations

import torch
from torch import Tensor


def first_decides(skip: Tensor | bool) -> Tensor:
    """Which tokens skip by the decision of the first process of the group: [tokens] bool."""
    from vllm.distributed import get_tp_group

    group = get_tp_group()
    mask = torch.as_tensor(skip, device=group.device).reshape(-1).to(torch.uint8)
    decided: Tensor = group.broadcast(mask)
    return decided.bool()
