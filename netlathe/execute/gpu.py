"""An artifact on a GPU as it is timed, and what that GPU can do at best.

A call is replayed as a CUDA graph and waited for; inputs and results stay in the GPU's memory. The rate of
memory is that of copying a gigabyte, read and written. That of arithmetic is reckoned: multiprocessors times
clock times what the tensor cores of one do in a clock, from NVIDIA's whitepapers on these architectures. No
program reaches it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt

from netlathe.analysis.roofline import Ceilings
from netlathe.backends.tvm import runtime
from netlathe.diagnostics import Diagnostic, InputError
from netlathe.execute.timing import Timing

COPY = "copy on the GPU"
_COPIED, _TIMES = 1 << 30, 4  # bytes, and how often: a launch and a wait take some microseconds
# Compute capability -> operations (2 a MAC) in a clock of a multiprocessor on halves, with sums in float32.
# On bytes there are twice as many.
_OPERATIONS: Mapping[int, int] = {80: 2048, 86: 1024, 89: 1024, 90: 4096}
# cudaDeviceAttr
_CLOCK_KHZ, _PROCESSORS, _MAJOR, _MINOR = 13, 16, 75, 76


def replayed(model: runtime.Model, feeds: Mapping[str, npt.NDArray[Any]]) -> Callable[[], object]:
    """A function that runs the model once, recorded with these inputs, and waits for the GPU.

    Raises:
        ArtifactError: a name, dtype or shape is not the model's; or it cannot be recorded.
        InputError: from the function: CUDA fails.
    """
    recording = model.record(feeds)

    def run() -> None:
        recording.replay()
        _wait()

    return run


def copies() -> Callable[[], object]:
    """A function that copies a gigabyte within the GPU's memory a few times; see :func:`ceilings`.

    Raises:
        InputError: CUDA fails, as where there is no room.
    """
    cudart = runtime._cuda_runtime(Path())
    ends = ctypes.c_void_p(), ctypes.c_void_p()
    for end in ends:
        _check(cudart.cudaMalloc(ctypes.byref(end), ctypes.c_size_t(_COPIED)), "taking memory")

    def copy() -> None:
        source, target = ends
        for _ in range(_TIMES):  # a copy within the device does not wait
            _check(cudart.cudaMemcpy(target, source, ctypes.c_size_t(_COPIED), 3), "copying")
        _wait()

    return copy


def ceilings(found: Mapping[str, Timing]) -> Ceilings:
    """The rates of the first GPU, the one of memory from :func:`copies` in its fastest quarter.

    Raises:
        InputError: CUDA fails, or there is no rate for this GPU.
    """
    peak = operations(*(_attribute(n) for n in (_MAJOR, _MINOR, _PROCESSORS, _CLOCK_KHZ)))
    return Ceilings(peak, 2 * peak, 2e3 * _COPIED * _TIMES / found[COPY].low_ms)


def operations(major: int, minor: int, processors: int, clock_khz: int) -> float:
    """Operations a second on halves of a GPU of this compute capability.

    Raises:
        InputError: there is no rate for it.
    """
    known = [
        capability
        for capability in _OPERATIONS
        if capability // 10 == major and capability % 10 <= minor
    ]
    if not known:
        raise InputError(
            Diagnostic(
                "bench.gpu",
                f"no rate of arithmetic is known for GPUs of compute capability {major}.{minor}",
            )
        )
    return 1e3 * clock_khz * processors * _OPERATIONS[max(known)]


def _attribute(number: int) -> int:
    value = ctypes.c_int()
    cudart = runtime._cuda_runtime(Path())
    status = cudart.cudaDeviceGetAttribute(ctypes.byref(value), number, 0)
    _check(status, f"reading attribute {number}")
    return value.value


def _wait() -> None:
    _check(runtime._cuda_runtime(Path()).cudaDeviceSynchronize(), "running the model")


def _check(status: int, what: str) -> None:
    if status:
        raise InputError(
            Diagnostic(
                "bench.gpu",
                f"{what} failed on the GPU: CUDA error {status}",
                help="nvidia-smi shows what else runs there; measuring takes 2 GiB beside the models",
            )
        )
