"""One PrimFunc in the making: its parameters, its sizes, and how it enters the Relax function."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from tvm import tirx

from netlathe.backends.tvm import sizes, storage
from netlathe.backends.tvm.cuda.code import GpuCode
from netlathe.backends.tvm.cuda.machine import Gpu
from netlathe.backends.tvm.tir import Code, Expr, i64
from netlathe.ir.dims import Dim, Shape

if TYPE_CHECKING:
    from netlathe.backends.tvm.lowering import Lowering
    from netlathe.backends.tvm.values import Ready

SCHEDULE = "netlathe.schedule"  # the attribute that names the schedule a PrimFunc was written with


class Kernel:
    """Reads ready values and writes outputs, each seen as one flat buffer.

    Parameters are the tensors read, the sizes used, then the tensors written. Every kernel is built
    from scratch; the lowering recognizes those that come out equal and keeps one.
    """

    def __init__(self, lowering: Lowering) -> None:
        self.lowering = lowering
        self.code = GpuCode(self) if isinstance(lowering.machine, Gpu) else Code(self)
        self._inputs: dict[Any, tuple[Any, Any]] = {}  # relax var -> parameter, flat view
        self._outputs: list[tuple[ir.DataType, Shape, Any, Any]] = []
        self._updated: list[Ready] = []
        self._workspaces: list[tuple[str, Expr, Any]] = []  # type, elements, flat view
        self._sizes: dict[str, Expr] = {}

    def size(self, dim: Dim) -> Expr:
        """A dim as an expression inside the kernel."""
        return sizes.to_expr(dim, self._size)

    def shape(self, dims: Shape) -> list[Expr]:
        """Dims as expressions inside the kernel."""
        return [self.size(dim) for dim in dims]

    def _size(self, name: str) -> Expr:
        if name not in self._sizes:
            self._sizes[name] = tirx.Var(f"size{len(self._sizes)}", "int64")
        return self._sizes[name]

    @property
    def sizes(self) -> list[Expr]:
        """The variables of sizes that are known at run time only."""
        return list(self._sizes.values())

    def read(self, value: Ready) -> Any:
        """The flat buffer of a ready value."""
        if value.var not in self._inputs:
            self._inputs[value.var] = self._parameter(value.stored_shape, value.dtype, "in")
        return self._inputs[value.var][1]

    def write(self, dtype: ir.DataType, shape: Shape) -> Any:
        """A new output's flat buffer."""
        parameter, flat = self._parameter(shape, dtype, "out")
        self._outputs.append((dtype, shape, parameter, flat))
        return flat

    def update(self, value: Ready) -> Any:
        """The flat buffer of a ready value that becomes an output: the kernel writes some of its elements.

        Whoever reads ``value`` later reads what the kernel left.
        """
        self._updated.append(value)
        return self.read(value)

    def workspace(self, count: Expr, dtype: str) -> Any:
        """Scratch memory of ``count`` elements that the caller provides: a flat buffer."""
        flat = tirx.decl_buffer([count], dtype, f"work{len(self._workspaces)}")
        self._workspaces.append((dtype, count, flat))
        return flat

    def _parameter(self, shape: Shape, dtype: ir.DataType, stem: str) -> tuple[Any, Any]:
        dims = [self.size(dim) for dim in shape]
        name = f"{stem}{len(self._inputs) + len(self._outputs)}"
        stored = storage.STORED[dtype]
        # What the caller hands in may lie anywhere: it is not copied for that, and loads take what they get.
        align = np.dtype(stored).itemsize
        parameter = tirx.decl_buffer(dims, stored, name, data_alignment=align)
        count = i64(1)
        for dim in dims:
            count = count * dim
        flat = tirx.decl_buffer(
            [count], stored, f"{name}_flat", data=parameter.data, data_alignment=align
        )
        return parameter, flat

    def finish(self, schedule: str) -> list[Ready]:
        """End the kernel and call it; new outputs in the order they were declared, then those updated."""
        inputs = list(self._inputs.values())
        outputs = [(parameter, flat) for _, _, parameter, flat in self._outputs]
        declared = [
            tirx.DeclBuffer(flat, data=parameter.data) for parameter, flat in inputs + outputs
        ]
        body = tirx.SeqStmt([*declared, self.code.whole()])
        parameters = [
            *(parameter for parameter, _ in inputs),
            *self._sizes.values(),
            *(parameter for parameter, _ in outputs),
            *(flat for _, _, flat in self._workspaces),
        ]
        function = tirx.PrimFunc(parameters, body)
        function = function.with_attr({"tirx.noalias": self.code.is_alone, SCHEDULE: schedule})
        return self.lowering.call(
            function,
            list(self._inputs),
            [(dtype, shape) for dtype, shape, _, _ in self._outputs],
            [(dtype, count) for dtype, count, _ in self._workspaces],
            self._sizes,
            schedule,
            self._updated,
        )
