"""CUDA graphs around decisions that are taken on the host. Not run on a GPU yet.

A graph replays what was on the device and no Python, so a model in one graph would silently be the full one.
vLLM compiles a model in pieces, cut at attention, and captures each piece by itself. The operator of the
FFNs becomes one more place to cut at: it runs between two graphs, and the next one reads what it has written
where it was when that graph was captured.
"""

from __future__ import annotations

from typing import Any

from skipcal.serving.operator import OPERATOR
from skipcal.serving.refusals import COMPILED_IN_PIECES


def cut_at_ffns(config: Any) -> str | None:
    """Have a VllmConfig that was not refused capture no FFN; what was changed for it, for the log."""
    compilation = config.compilation_config
    if config.device_config.device_type == "cpu" or compilation.mode != COMPILED_IN_PIECES:
        return None
    if OPERATOR not in compilation.splitting_ops:
        compilation.splitting_ops.append(OPERATOR)
    mode = compilation.cudagraph_mode
    if not mode.has_full_cudagraphs():
        return None
    compilation.cudagraph_mode = type(mode)["PIECEWISE"]
    return f"CUDA graphs are PIECEWISE instead of {mode.name}: which FFNs are skipped is decided between them"
