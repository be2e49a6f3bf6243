"""The artifact for GPUs: the same folder, its library with machine code for every architecture asked for."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from netlathe.backends.tvm import runtime
from netlathe.backends.tvm.artifact import TvmArtifact
from netlathe.backends.tvm.cuda.machine import Gpu


class CudaArtifact(TvmArtifact):
    """A compiled model. It is made without a GPU, and compared with the IR where there is a fitting one.

    Raises:
        LowerError: nodes have no form here, nvcc refused a kernel, or TVM crashed.
    """

    machine: Gpu

    def __init__(self, model: ir.Model, machine: Gpu) -> None:
        super().__init__(model, machine)

    def report(self) -> dict[str, Any]:
        """As for a CPU, and of all kernels the most registers, and those that spill any."""
        resources = self._built.resources  # type: ignore[attr-defined]  # the worker's CudaBuilt
        return {
            **super().report(),
            "archs": list(self.machine.archs),
            "most_registers": max((r.registers for r in resources), default=0),
            "spilling": sorted({r.kernel for r in resources if r.spill_bytes}),
        }

    def like(self, model: ir.Model) -> CudaArtifact:
        return CudaArtifact(model, self.machine)

    def lack(self) -> str:
        """As for a CPU, or that there is no fitting GPU."""
        return super().lack() or runtime.gpu_lack(self.machine.archs)

    def _meta(self, records: list[dict[str, Any]], parameter_bytes: int) -> dict[str, Any]:
        return {**super()._meta(records, parameter_bytes), "archs": list(self.machine.archs)}
