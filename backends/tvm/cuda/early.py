"""What a kernel may read before the kernels in front of it have ended.

On sm_90a kernels start early (:meth:`netlathe.backends.tvm.cuda.code.GpuCode.launch`): the one behind may run
while several in front of it still do, those before the call among them, which may be writing the call's
inputs. :func:`hold` is a kernel that lets none behind it start until all in front have ended, and what they
wrote is there (PTX ISA 8.5, section 9.7.12.13, griddepcontrol). From then on the inputs, and all else that is
in memory, is only changed by kernels of the call, of which :class:`Written` keeps account.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from netlathe.backends.tvm.kernel import Kernel
from netlathe.backends.tvm.tir import i64

if TYPE_CHECKING:
    from netlathe.backends.tvm.cuda.code import GpuCode
    from netlathe.backends.tvm.lowering import Lowering
    from netlathe.backends.tvm.values import Ready, Rows


class Written:
    """What kernels have written since the one that holds."""

    def __init__(self) -> None:
        self.is_held = False
        self._variables: set[Any] = set()  # of Relax
        self._rows: dict[Any, Rows] = {}  # of those of which nothing else is new

    def hold(self) -> None:
        """Forget what was written before, which is there when kernels behind start."""
        self.is_held = True
        self._variables.clear()

    def add(self, variables: Iterable[Any]) -> None:
        """A kernel writes these."""
        self._variables.update(variables)

    def limit(self, variable: Any, rows: Rows | None) -> None:
        """A kernel writes over these ``rows`` of a caller's tensor; None: over any."""
        if rows is not None:
            self._rows[variable] = rows

    def is_old(self, value: Ready) -> bool:
        """Whether no kernel that may still run writes it."""
        return self.is_held and value.var not in self._variables

    def new_rows(self, values: Sequence[Ready]) -> list[Rows] | None:
        """Those of ``values`` that such kernels write: one that is alike for all; None: it is not known."""
        found: list[Rows] = []
        for value in values:
            if self.is_old(value):
                continue
            rows = self._rows.get(value.var) if value.shape == value.stored_shape else None
            if rows is None or not self.is_old(rows.first) or (found and not found[0].same(rows)):
                return None
            found.append(rows)
        return found[:1]


def hold(low: Lowering) -> None:
    """Emit the kernel that holds, once."""
    if low.written.is_held:
        return
    kernel = Kernel(low)
    code: GpuCode = kernel.code  # type: ignore[assignment]  # the caller's machine is a GPU
    kernel.write(ir.DataType.INT8, (1,))  # a call without results would be none
    with code.launch(i64(1), 32, waits=False):
        code.run("netlathe_hold", _HOLD)
    kernel.finish("grid.hold")
    low.written.hold()


_HOLD = """
__device__ __forceinline__ void netlathe_hold() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
"""
