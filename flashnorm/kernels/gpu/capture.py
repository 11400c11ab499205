"""Steps as CUDA graphs, and how far the capture of one is."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache, partial
from typing import Any, TypeVar

import torch

from flashnorm.kernels import backend

T = TypeVar("T")
ACTIVE = 1  # CU_STREAM_CAPTURE_STATUS_ACTIVE


class CudaGraphs(backend.Captures):
    """`torch.cuda.CUDAGraph`, each with memory of its own."""

    def capture(
        self, function: Callable[[], T], device: torch.device
    ) -> tuple[Callable[[], None], T]:
        with torch.cuda.device(device):
            before = torch.cuda.current_stream()
            graph, side = torch.cuda.CUDAGraph(), _side(before.device_index)
            try:
                # Other threads may allocate meanwhile, and wait for the device.
                with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                    result = function()
            finally:
                # torch leaves its own stream in place where the end of a capture fails.
                torch.cuda.set_stream(before)
            return Replay(graph, device), result

    def position(self) -> object:
        stream = torch.cuda.current_stream().cuda_stream
        found = _position(stream)
        return object() if found is None else (stream, *found)

    def settings(self) -> tuple[object, ...]:
        cuda = torch.backends.cuda
        return (
            torch.cuda.current_device(),
            cuda.matmul.fp32_precision,
            cuda.matmul.allow_fp16_reduced_precision_reduction,
            cuda.matmul.allow_bf16_reduced_precision_reduction,
            torch.backends.cudnn.fp32_precision,
            cuda.preferred_blas_library(),
            cuda.flash_sdp_enabled(),
            cuda.mem_efficient_sdp_enabled(),
            cuda.math_sdp_enabled(),
            cuda.cudnn_sdp_enabled(),
            torch.are_deterministic_algorithms_enabled(),
        )


class Replay:
    """Runs a graph on the stream of whoever asks, behind its own last run."""

    def __init__(self, graph: torch.cuda.CUDAGraph, device: torch.device) -> None:
        self.graph, self.device = graph, device
        self.last = torch.cuda.current_stream(device)

    def __call__(self) -> None:
        stream = torch.cuda.current_stream(self.device)
        if stream != self.last:
            stream.wait_stream(self.last)
            self.last = stream
        with torch.cuda.device(self.device):
            self.graph.replay()


@cache
def _side(device: int) -> torch.cuda.Stream:
    """The stream that steps are captured on; the library's products have run on it before."""
    side = torch.cuda.Stream(device)
    with torch.cuda.stream(side):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            probe = torch.zeros(16, 16, device=side.device, dtype=dtype)
            torch.addmm(probe[0], probe, probe)
    side.synchronize()
    return side


@cache
def _driver() -> tuple[Any, Any] | None:
    """cuStreamGetCaptureInfo and cuGraphGetNodes, or None where the driver has none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        nodes = driver.cuGraphGetNodes
        # The third also tells of edges that are no plain ones, such as those of kernels that start
        # before others have ended; the second fails where there are any.
        newer = hasattr(driver, "cuStreamGetCaptureInfo_v3")
        info = driver.cuStreamGetCaptureInfo_v3 if newer else driver.cuStreamGetCaptureInfo_v2
    except (OSError, AttributeError):
        return None
    pointer = ctypes.c_void_p
    given: list[Any] = [pointer, ctypes.POINTER(ctypes.c_int), ctypes.POINTER(ctypes.c_uint64)]
    given += [ctypes.POINTER(pointer), ctypes.POINTER(ctypes.POINTER(pointer))]
    edges: list[Any] = [ctypes.POINTER(pointer)] if newer else []
    info.argtypes = [*given, *edges, ctypes.POINTER(ctypes.c_size_t)]
    nodes.argtypes = [pointer, pointer, ctypes.POINTER(ctypes.c_size_t)]
    info.restype = nodes.restype = ctypes.c_int
    return (partial(_with_edges, info) if newer else info), nodes


def _with_edges(info: Any, *given: Any) -> int:
    """The newer question, of which the edges are not looked at."""
    *first, many = given
    found: int = info(*first, ctypes.byref(ctypes.c_void_p()), many)
    return found


def _position(stream: int) -> tuple[int, int, tuple[int | None, ...]] | None:
    """(which capture, its nodes on all streams, the last on this one); None where unknown."""
    if (found := _driver()) is None:
        return None
    info, nodes = found
    status, number, graph = ctypes.c_int(), ctypes.c_uint64(), ctypes.c_void_p()
    last, many = ctypes.POINTER(ctypes.c_void_p)(), ctypes.c_size_t()
    given = map(ctypes.byref, (status, number, graph, last, many))
    if info(stream, *given) or status.value != ACTIVE:
        return None
    count = ctypes.c_size_t()
    if nodes(graph, None, ctypes.byref(count)):
        return None
    return number.value, count.value, tuple(last[i] for i in range(many.value))
