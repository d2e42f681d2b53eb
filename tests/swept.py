"""What the sweeps of fits are tried on: rows of random tokens, of which the first positions do not count."""

from __future__ import annotations

import torch

WARM_UP = 2
FIRST = 1 + WARM_UP
ROWS = torch.randint(3, 97, (10, 20), generator=torch.Generator().manual_seed(1)).tolist()
