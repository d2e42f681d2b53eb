"""A part of a CUDA graph that runs only if a flag on the device says so.

torch has this from 2.12. For 2.11 the driver is called by the bindings that its CUDA wheels bring:
a one-line kernel sets the node's condition from the flag, and the body is captured on a stream of
its own, into a graph of the node's. Needs CUDA 12.4.
"""

from __future__ import annotations

import ctypes
from contextlib import ExitStack
from functools import cache
from typing import Any

import torch
from torch import Tensor

# cudaGraphSetConditional is a device function of the CUDA runtime, for which NVRTC has no header.
_SET_CONDITION = rb"""
typedef unsigned long long cudaGraphConditionalHandle;
extern "C" __device__ void cudaGraphSetConditional(cudaGraphConditionalHandle, unsigned int);
extern "C" __global__ void set_condition(cudaGraphConditionalHandle node, const unsigned char *flag)
{
    cudaGraphSetConditional(node, *flag ? 1u : 0u);
}
"""


class IfNode:
    """`begin()`, what runs if `flag` (0-d bool) is set, `end()`.

    While a graph is captured the body becomes an IF node and `runs` is True, for it is recorded.
    Otherwise `runs` is the flag itself, read by the host. What is made in the body must be copied out.
    """

    def __init__(self, flag: Tensor) -> None:
        """A node on `flag`."""
        self._flag = flag
        self._capturing = flag.is_cuda and torch.cuda.is_current_stream_capturing()
        self.runs = self._capturing or bool(flag)
        self._body: Any = None

    def begin(self) -> None:
        """What follows belongs to the body."""
        if not self._capturing:
            return
        if hasattr(torch.cuda.CUDAGraph, "begin_capture_to_if_node"):
            graph: Any = torch.cuda.CUDAGraph.get_currently_capturing_graph()
            graph.begin_capture_to_if_node(self._flag)
            self._body = graph
        else:
            self._body = _driver(torch.cuda.current_device()).open(self._flag)

    def end(self) -> None:
        """The body ends here."""
        if self._body is None:
            return
        if isinstance(self._body, ExitStack):
            self._body.close()
        else:
            self._body.end_capture_to_conditional_node()
        self._body = None


class _Driver:
    """IF nodes by the CUDA driver's own functions, for torch without them; of one GPU, the current one."""

    def __init__(self) -> None:
        from cuda.bindings import driver

        self._cuda: Any = driver
        self._capture_info = with_edges(driver, "cuStreamGetCaptureInfo")
        self._add_node = with_edges(driver, "cuGraphAddNode")
        self._update_dependencies = with_edges(driver, "cuStreamUpdateCaptureDependencies")
        major, minor = torch.cuda.get_device_capability()
        self._module = _ok(driver.cuModuleLoadData(_compiled(f"compute_{major}{minor}")))
        self._kernel = _ok(driver.cuModuleGetFunction(self._module, b"set_condition"))
        self.stream = torch.cuda.Stream()
        # The capturing graph's own pool does not match the body's stream.
        self._pool = torch.cuda.MemPool()

    def open(self, flag: Tensor) -> ExitStack:
        """Add the node to the graph that the current stream captures, and start capturing its body."""
        cuda, outer = self._cuda, torch.cuda.current_stream().cuda_stream
        context = _ok(cuda.cuCtxGetCurrent())
        graph = _ok(self._capture_info(outer))[2]
        handle = _ok(cuda.cuGraphConditionalHandleCreate(graph, context, 0, 0))
        arguments = ((int(handle), flag.data_ptr()), (ctypes.c_ulonglong, ctypes.c_void_p))
        _ok(cuda.cuLaunchKernel(self._kernel, 1, 1, 1, 1, 1, 1, 0, outer, arguments, 0))

        node = cuda.CUgraphNodeParams()
        node.type = cuda.CUgraphNodeType.CU_GRAPH_NODE_TYPE_CONDITIONAL
        node.conditional.type = cuda.CUgraphConditionalNodeType.CU_GRAPH_COND_TYPE_IF
        node.conditional.handle, node.conditional.size, node.conditional.ctx = handle, 1, context
        _, _, graph, before, edges, count = _ok(self._capture_info(outer))
        added = _ok(self._add_node(graph, before, edges, count, node))
        replace = cuda.CUstreamUpdateCaptureDependencies_flags.CU_STREAM_SET_CAPTURE_DEPENDENCIES
        _ok(self._update_dependencies(outer, [added], None, 1, int(replace)))

        mode = cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        inner, body = self.stream.cuda_stream, node.conditional.phGraph_out[0]
        _ok(cuda.cuStreamBeginCaptureToGraph(inner, body, None, None, 0, mode))
        scope = ExitStack()
        scope.callback(lambda: _ok(cuda.cuStreamEndCapture(inner)))
        scope.enter_context(torch.cuda.stream(self.stream))
        scope.enter_context(torch.cuda.use_mem_pool(self._pool))
        return scope


@cache
def _driver(device: int) -> _Driver:
    assert device == torch.cuda.current_device()
    return _Driver()


def with_edges(driver: Any, name: str) -> Any:
    """The driver's function with the data of edges: called plainly from CUDA 13 on, before it _v2 or _v3."""
    return next(found for n in (f"{name}_v3", f"{name}_v2", name) if (found := getattr(driver, n, None)))


def prepare_if_nodes() -> torch.cuda.Stream | None:
    """Make before any capture what capturing needs; the stream on which bodies are captured, if it is ours.

    Whatever runs in a body has to have run once on that stream, for libraries set up lazily.
    """
    if hasattr(torch.cuda.CUDAGraph, "begin_capture_to_if_node"):
        return None
    return _driver(torch.cuda.current_device()).stream


def _compiled(architecture: str) -> bytes:
    from cuda.bindings import nvrtc

    program = _ok(nvrtc.nvrtcCreateProgram(_SET_CONDITION, b"set_condition.cu", 0, [], []))
    options = [f"--gpu-architecture={architecture}".encode()]
    _ok(nvrtc.nvrtcCompileProgram(program, len(options), options))
    code: bytes = b" " * _ok(nvrtc.nvrtcGetPTXSize(program))
    _ok(nvrtc.nvrtcGetPTX(program, code))
    return code


def _ok(answer: tuple[Any, ...]) -> Any:
    """The values of a call of the driver; RuntimeError if it failed."""
    error, *values = answer
    if int(error) != 0:
        raise RuntimeError(f"CUDA driver: {error!r}")
    return values[0] if len(values) == 1 else values
