"""How kernels that stream weights are cut: what a program takes of a matrix W [outputs, inputs] at a time.

How fast they stream is decided by the bytes that a multiprocessor (SM) has asked for and not yet received.
Each setting below lets 64 KiB or more be on the way at the shapes of Llama-2 7B and 13B, without spilling
(benchmarks/results/ops_sm90.json, of an H100).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from skipcal.ops.lang import DOT_ROWS, padded


class Settings(NamedTuple):
    """outputs, inputs: rows of W a block has, and columns of W it takes at a time; warps; pipeline stages.

    With n stages n - 1 tiles of W, and of what it is multiplied by, are on their way.
    """

    outputs: int
    inputs: int
    warps: int
    stages: int


# By kernel, and rows as `row_class` has them. On an H100 one row of an FFN of 4096 x 11008 streams at 95 % of
# copy bandwidth by these; eight did at 87 % with five stages of `down`, 61 KiB on the way to an SM, and with
# four at 85 % (gpu_check.json). Of many rows most of a tile is what W is multiplied by, and the more outputs
# a block has, the less often that is read; 128 inputs at a time make `gate_up` of 64 rows spill by Triton
# 3.7. Not measured yet: six stages and more, 32 and 64 rows, and `project`.
DEFAULTS: Mapping[str, Mapping[int, Settings]] = {
    "gate_up": {
        1: Settings(4, 1024, 4, 3),
        16: Settings(32, 128, 4, 3),
        32: Settings(32, 64, 4, 5),
        64: Settings(32, 64, 4, 5),
    },
    "down": {
        1: Settings(4, 1024, 4, 3),
        16: Settings(16, 256, 4, 6),
        32: Settings(32, 128, 4, 10),
        64: Settings(32, 128, 4, 10),
    },
    "project": {
        1: Settings(2, 1024, 4, 5),
        16: Settings(16, 256, 4, 6),
        32: Settings(32, 128, 4, 10),
        64: Settings(32, 128, 4, 10),
    },
}
_MATRICES = {"gate_up": 2, "down": 1, "project": 1}  # of W, side by side
_NO_PIPELINE_BYTES = 3 * 1024  # of shared memory: what sums and changes of layout take besides


@dataclass(frozen=True)
class Chip:
    """A device as kernels see it. shared_bytes: what a block can have of an SM's shared memory."""

    name: str
    shared_bytes: int


@cache
def chip(device: torch.device) -> Chip:
    """Of a device of tensors; where kernels are interpreted, one as small as GPUs are."""
    if device.type != "cuda":
        return Chip("cpu", 99 * 1024)
    properties = torch.cuda.get_device_properties(device)
    return Chip(properties.name, properties.shared_memory_per_block_optin)


def row_class(rows: int) -> int:
    """1, or the rows to which a matrix product is filled up: launches of one class share a kernel."""
    return 1 if rows == 1 else max(DOT_ROWS, padded(rows))


def settings_for(kernel: str, x: Tensor, outputs: int, *, given: Settings | None = None) -> Settings:
    """Of a launch that multiplies x [rows, inputs] by W; given: instead of what is set here.

    Of several rows' stages those are taken that fit into shared memory, at least two: a tile is read while
    the next one is on its way.
    """
    rows = row_class(len(x))
    n, k, warps, stages = given or DEFAULTS[kernel][rows]
    if rows > 1:
        tile_bytes = (_MATRICES[kernel] * n + rows) * k * x.element_size()
        fit = (chip(x.device).shared_bytes - _NO_PIPELINE_BYTES) // tile_bytes
        stages = min(stages, 1 + max(1, fit))
    return Settings(n, k, warps, stages)
