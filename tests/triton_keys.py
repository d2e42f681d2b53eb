"""Triton asked for its keys, in a process of its own: what would be compiled, where nothing is launched."""

from __future__ import annotations

import json
import subprocess

from warm_python import environment

# Kernels note their keys by name in `variants`, which a source sets anew for each of its cases and leaves
# in `found`, by case.
_NOTING = """
import collections, json
import torch, triton
from triton.backends.compiler import GPUTarget
from skipcal.ops import (
    arm, count, decode_attention, ffn, gate, low_rank, project, rms_norm, rotary_cache
)

class Driver:  # of a device on which nothing is launched
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_current_target(self): return GPUTarget("cuda", 90, 32)

def note(*, key, fn, **_):
    variants[fn.name.rsplit(".", 1)[-1]].add(key)
    return True  # neither compile nor launch

found = collections.defaultdict(lambda: collections.defaultdict(set))
triton.runtime.driver.set_active(Driver())
triton.knobs.runtime.jit_cache_hook = note
for op in (arm, count, decode_attention, ffn, gate, low_rank, project, rms_norm, rotary_cache):
    op.runs_kernels = lambda tensor: True
"""
_TELLING = """
print(json.dumps({case: {name: len(keys) for name, keys in v.items()} for case, v in found.items()}))
"""


def variants_of(warm: str, source: str) -> dict[str, dict[str, int]]:
    """By case of `source`: the kernels that it compiles, and how often. warm: a Python."""
    done = subprocess.run(
        [warm, "-c", _NOTING + source + _TELLING], env=environment(), stdout=subprocess.PIPE, text=True,
        check=True,
    )  # fmt: skip
    result: dict[str, dict[str, int]] = json.loads(done.stdout.splitlines()[-1])
    return result
