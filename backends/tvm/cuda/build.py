"""Relax and TIR to a library with embedded machine code for GPUs; runs in the worker process."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import tvm
import tvm_ffi
from tvm import relax, tirx

from netlathe.backends.tvm import build
from netlathe.backends.tvm.cuda import toolkit
from netlathe.backends.tvm.cuda.machine import Gpu
from netlathe.backends.tvm.lowering import Lowering
from netlathe.backends.tvm.packing import Built
from netlathe.diagnostics import LowerError

_PIPELINE = "netlathe-cuda"


@dataclass(frozen=True)
class CudaBuilt(Built):
    """``resources`` of every kernel on every architecture."""

    resources: tuple[toolkit.Resources, ...]


def target(machine: Gpu) -> Any:
    """TVM's target: the first architecture decides what its code generator may write."""
    return tvm.target.Target(
        {
            "kind": "cuda",
            "arch": machine.archs[0],
            "max_threads_per_block": 1024,
            "max_shared_memory_per_block": machine.shared_bytes,
            "thread_warp_size": 32,
        },
        host={"kind": "llvm", "mcpu": machine.mcpu},
    )


# Parts of what TVM launches a kernel with: that it may start before the one in front has ended (see
# GpuCode.launch); the size of its shared memory, which comes last.
_EARLY, _SIZED = "tirx.use_programtic_dependent_launch", "tirx.use_dyn_shared_memory"
_LAUNCH = "tirx.kernel_launch_params"


def _started_early(function: Any, _module: Any, _context: Any) -> Any:
    """A kernel for sm_90a, told so; any other function as it is."""
    if function.attrs is None or _LAUNCH not in function.attrs:
        return function
    if str(function.attrs["target"].attrs["arch"]) != "sm_90a":
        return function
    tags = [str(tag) for tag in function.attrs[_LAUNCH]]
    tags.insert(len(tags) - (tags[-1] == _SIZED), _EARLY)
    return function.with_attr(_LAUNCH, tags)


def _tir_pipeline() -> tuple[Any, Any, Any]:
    passes = tirx.transform
    sequential = tvm.ir.transform.Sequential

    @tvm.transform.module_pass(opt_level=0)  # type: ignore[untyped-decorator]  # TVM has no types
    def run(module: Any, _context: Any) -> Any:
        return sequential(
            [
                passes.VectorizeLoop(True),
                passes.AnnotateEntryFunc(),
                passes.SplitHostDevice(),
                passes.prim_func_pass(_started_early, opt_level=0),
                passes.MakePackedAPI(),
            ]
        )(module)

    return (
        run,
        tirx.compilation_pipeline.finalize_host_passes,
        lambda: sequential([passes.LowerIntrin()]),
    )


def library(model: ir.Model, machine: Gpu, path: Path, linker: Sequence[str]) -> CudaBuilt:
    """Lower and compile ``model``, whose weights are not read, and link it to ``path``.

    Raises:
        LowerError: with every node that has no form here, or nvcc refused a kernel.
    """
    found: list[toolkit.Resources] = []
    refused: list[LowerError] = []

    def compiled(source: str) -> bytes:
        try:
            binary, resources = toolkit.compile_fatbin(source, machine.archs)
        except LowerError as error:
            refused.append(error)  # of which TVM makes a RuntimeError
            raise
        found.extend(resources)
        return binary

    tvm_ffi.register_global_func("tvm_callback_cuda_compile", compiled, override=True)
    lowered = Lowering(model, machine).run()
    tirx.compilation_pipeline.register_tir_pipeline(_PIPELINE, _tir_pipeline)
    try:
        executable = relax.build(
            lowered.module,
            target(machine),
            relax_pipeline=build.relax_pipeline(),
            tir_pipeline=_PIPELINE,
        )
    except RuntimeError:
        if refused:
            raise refused[0] from None
        raise
    executable.export_library(os.fspath(path), fcompile=build.linked_by(linker))
    return CudaBuilt(lowered.parameters, lowered.kernels, lowered.in_place, tuple(found))
