"""Settings worth timing, by what launches them and rows: `gpu_visit measure` does, where there is a GPU.

`python benchmarks/ops_sm90.py --candidates` sees that each compiles for an H100 without spilling, and lets
64 KiB or more be on the way to an SM at the shapes of Llama-2 7B and 13B.
"""

from __future__ import annotations

from collections.abc import Mapping

from skipcal.ops.settings import Settings

Tried = tuple[tuple[int, int, int, int], ...]
_FEW: Tried = ((16, 256, 4, 6), (16, 256, 4, 7), (32, 128, 4, 10), (16, 128, 4, 11))
_MANY: Tried = ((32, 128, 4, 10), (32, 128, 8, 10), (32, 64, 4, 19))
_TRIED: Mapping[str, Mapping[int, Tried]] = {
    "gate_up": {
        1: ((4, 1024, 4, 3), (4, 512, 4, 3), (4, 512, 4, 4)),
        16: ((32, 128, 4, 3), (32, 128, 4, 4), (32, 64, 4, 6), (64, 64, 8, 6)),
        64: ((32, 64, 4, 5), (32, 128, 8, 4), (64, 64, 8, 6), (64, 128, 8, 4)),
    },
    "down": {
        1: ((4, 1024, 4, 3), (2, 1024, 4, 4), (4, 512, 4, 4), (4, 2048, 8, 3)),
        16: _FEW,
        64: _MANY,
    },
    "q k v": {
        1: ((2, 1024, 4, 5), (4, 512, 4, 5), (2, 512, 4, 6), (2, 1024, 4, 6)),
        16: ((16, 256, 4, 6), (16, 256, 4, 5), (32, 128, 4, 6), (32, 128, 4, 10)),
        64: ((32, 128, 4, 10), (64, 128, 4, 7), (64, 128, 8, 7), (64, 64, 4, 7)),
    },
    "o": {
        1: ((2, 1024, 4, 5), (2, 1024, 4, 4), (2, 1024, 4, 6)),
        16: _FEW,
        64: _MANY,
    },
}
CANDIDATES = {
    part: {rows: [Settings(*each) for each in tried] for rows, tried in by_rows.items()}
    for part, by_rows in _TRIED.items()
}
