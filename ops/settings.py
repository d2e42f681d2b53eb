"""How kernels that stream weights are cut: what a program takes of a matrix W [outputs, inputs] at a time.

What is fastest depends on the launch and the device. settings.json has what was measured, launch by launch;
`python benchmarks/gpu_visit measure` makes it. For all else there are defaults by the number of rows, each of
which lets a multiprocessor (SM) have 64 KiB or more on the way at the shapes of Llama-2 7B and 13B, without
spilling (benchmarks/results/ops_sm90.json, of an H100).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from skipcal.errors import ConfigError
from skipcal.files.reading import validation_message
from skipcal.ops.lang import DOT_ROWS, padded

TABLE = Path(__file__).with_name("settings.json")


def _power_of_two(n: int) -> int:
    if n != padded(n):
        raise ValueError(f"expected a power of two, got {n}")
    return n


Block = Annotated[PositiveInt, AfterValidator(_power_of_two)]


class Settings(NamedTuple):
    """outputs, inputs: rows of W a block has, and columns of W it takes at a time; warps; pipeline stages.

    With n stages n - 1 tiles of W, and of what it is multiplied by, are on their way.
    """

    outputs: Block
    inputs: Block
    warps: Block
    stages: PositiveInt


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
_SMALL_BYTES = 99 * 1024
_NO_PIPELINE_BYTES = 3 * 1024  # of shared memory: what sums and changes of layout take besides


@dataclass(frozen=True)
class Launch:
    """What settings depend on. rows: as `row_class` has them; outputs: of W, or of all that `project` has."""

    kernel: str
    rows: int
    outputs: int
    inputs: int
    dtype: str
    device: str


class Measured(BaseModel):
    """A launch and its fastest settings. us, default_us: what the op takes by them, and by the default."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kernel: Literal["gate_up", "down", "project"]
    rows: Literal[1, 16, 32, 64]
    outputs: PositiveInt
    inputs: PositiveInt
    dtype: str
    device: str
    settings: Settings
    us: PositiveFloat
    default_us: PositiveFloat

    @model_validator(mode="after")
    def _fits_a_matrix_product(self) -> Measured:
        if self.rows > 1 and min(self.settings[:2]) < DOT_ROWS:
            raise ValueError(f"blocks of several rows have {DOT_ROWS} outputs and inputs or more")
        return self

    @property
    def launch(self) -> Launch:
        """The launch that was measured."""
        return Launch(self.kernel, self.rows, self.outputs, self.inputs, self.dtype, self.device)


class Table(BaseModel):
    """The file. made_by: by device, the command, versions and commit that measured its launches."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["skipcal.settings/1"]
    made_by: dict[str, dict[str, Any]]
    launches: tuple[Measured, ...]

    @model_validator(mode="after")
    def _is_whole(self) -> Table:
        found = [measured.launch for measured in self.launches]
        if twice := next((launch for launch in found if found.count(launch) > 1), None):
            raise ValueError(f"{twice} is there twice")
        if unknown := {launch.device for launch in found} - {*self.made_by}:
            raise ValueError(f"made_by does not say what measured on {min(unknown)}")
        return self


def read_table(path: Path) -> Table:
    """What was measured. Raises ConfigError, in one line, for a file that is no such table."""
    data: Any = None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return Table.model_validate(data)
    except (OSError, ValueError) as error:  # pydantic's are such, too
        raise ConfigError(f"{path} is no table of settings: {validation_message(error, data)}") from error


@cache
def measured(path: Path) -> Mapping[Launch, Settings]:
    """What was measured, read once."""
    return {row.launch: row.settings for row in read_table(path).launches}


@dataclass(frozen=True)
class Chip:
    """A device as kernels see it. shared_bytes: what a block can have of an SM's shared memory."""

    name: str
    shared_bytes: int


@cache
def chip(device: torch.device) -> Chip:
    """Of a device of tensors; where kernels are interpreted, one that has as little as small GPUs have."""
    if device.type != "cuda":
        return Chip("cpu", _SMALL_BYTES)
    properties = torch.cuda.get_device_properties(device)  # AMD's do not tell it
    return Chip(properties.name, getattr(properties, "shared_memory_per_block_optin", _SMALL_BYTES))


def row_class(rows: int) -> int:
    """1, or the rows to which a matrix product is filled up: launches of one class share a kernel."""
    return 1 if rows == 1 else max(DOT_ROWS, padded(rows))


def launch_of(kernel: str, x: Tensor, outputs: int) -> Launch:
    """One that multiplies x [rows, inputs] by W."""
    dtype = str(x.dtype).removeprefix("torch.")
    return Launch(kernel, row_class(len(x)), outputs, x.shape[1], dtype, chip(x.device).name)


def settings_for(kernel: str, x: Tensor, outputs: int, *, given: Settings | None = None) -> Settings:
    """Of a launch that multiplies x [rows, inputs] by W; given: instead of what is set here.

    Of several rows' stages those are taken that fit into shared memory, at least two: a tile is read while
    the next one is on its way.
    """
    launch = launch_of(kernel, x, outputs)
    n, k, warps, stages = given or measured(TABLE).get(launch) or DEFAULTS[kernel][launch.rows]
    if launch.rows > 1:
        tile_bytes = (_MATRICES[kernel] * n + launch.rows) * k * x.element_size()
        fit = (chip(x.device).shared_bytes - _NO_PIPELINE_BYTES) // tile_bytes
        stages = min(stages, 1 + max(1, fit))
    return Settings(n, k, warps, stages)
