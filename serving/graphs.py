"""CUDA graphs, and decisions: on the host between them, or on the device within. Not run on a GPU yet.

A graph replays what was on the device and no Python, so a model in one graph would silently be the full one.
vLLM compiles a model in pieces, cut at attention, and captures each piece by itself. The operator of the
FFNs becomes one more place to cut at: it runs between two graphs, and the next one reads what it has written
where it was when that graph was captured. That serves passes of any kind.

Passes that only decode are by default captured as a whole too. These graphs stay where decisions can be part
of them (`skipcal.serving.captured`); else such passes are run in pieces as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from skipcal.serving.operator import OPERATOR
from skipcal.serving.refusals import COMPILED_IN_PIECES

if TYPE_CHECKING:
    from skipcal.serving.host import ServingHost


def cut_at_ffns(config: Any) -> str | None:
    """Have a VllmConfig that was not refused capture no FFN undecided; what was changed, for the log."""
    compilation = config.compilation_config
    if config.device_config.device_type == "cpu" or compilation.mode != COMPILED_IN_PIECES:
        return None
    if OPERATOR not in compilation.splitting_ops:
        compilation.splitting_ops.append(OPERATOR)
    mode = compilation.cudagraph_mode
    if not mode.has_full_cudagraphs():
        return None
    reason = _against_whole_passes(config)
    if reason is not None:
        return _in_pieces(compilation, reason)
    if mode.name != "FULL":
        return None
    compilation.cudagraph_mode = type(mode)["FULL_AND_PIECEWISE"]
    return "CUDA graphs are FULL_AND_PIECEWISE instead of FULL: passes with prompts are decided on in between"


def _against_whole_passes(config: Any) -> str | None:
    if config.parallel_config.tensor_parallel_size > 1:
        return "processes that share the layers agree on what is skipped"
    if config.lora_config is not None:
        return "adapters are not in skipcal's ops"
    return None


def _in_pieces(compilation: Any, reason: str) -> str:
    mode = compilation.cudagraph_mode
    compilation.cudagraph_mode = type(mode)["PIECEWISE"]
    return (
        f"CUDA graphs are PIECEWISE instead of {mode.name}: which FFNs are skipped is decided between them, "
        f"not within ({reason})"
    )


@dataclass
class WholePasses:
    """The graphs of whole passes that a worker will capture, unless the host cannot decide in them.

    outcome: what has come of it, in words.
    """

    compilation: Any
    outcome: str = ""

    def prepare(self, host: ServingHost) -> None:
        """Have the decisions in the graphs, or none captured. Before vLLM captures any."""
        from skipcal.ops.ffn import MAX_ROWS  # where vLLM is only configured, no kernel is looked at

        reason = host.prepare_graphs(self.compilation.cudagraph_capture_sizes)
        if reason is not None:
            self.outcome = _in_pieces(self.compilation, reason)
        else:
            self.outcome = (
                "which FFNs are skipped is decided within CUDA graphs, in passes that only decode, for up "
                f"to {MAX_ROWS} requests"
            )


def whole_passes(config: Any) -> WholePasses | None:
    """The graphs of whole passes that a worker with this VllmConfig would capture; None: it captures none."""
    compilation = config.compilation_config
    if config.device_config.device_type == "cpu" or not compilation.cudagraph_mode.has_full_cudagraphs():
        return None
    return WholePasses(compilation)
