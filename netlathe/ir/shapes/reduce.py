"""Reductions, and operators that run along one axis."""

from __future__ import annotations

import onnx_ir as ir

from netlathe.ir import dims
from netlathe.ir.dims import Dim
from netlathe.ir.types import Site, Type


def _reduce(s: Site) -> list[Type]:
    shape = s.shape()
    if shape is None:
        return [Type(s.dtype(), None)]
    keep = s.integer("keepdims", 1)
    axes = s.ints(1) if s.has(1) else ()
    if axes is None:
        unknown: tuple[Dim, ...] | None = tuple(None for _ in shape) if keep else None
        return [Type(s.dtype(), unknown)]
    if not axes and s.integer("noop_with_empty_axes"):
        return [Type(s.dtype(), shape)]
    reduced = {s.checked_axis(a, len(shape)) for a in axes} or set(range(len(shape)))
    out = [1 if i in reduced else d for i, d in enumerate(shape) if keep or i not in reduced]
    if s.node.op_type == "ReduceProd" and reduced == {0} and len(shape) == 1:
        contents = s.contents(0)
        if contents is not None:
            s.remember((dims.product(contents),))
    return [Type(s.dtype(), tuple(out))]


def _arg(s: Site) -> list[Type]:
    shape = s.shape()
    if shape is None:
        return [Type(ir.DataType.INT64, None)]
    axis = s.axis(len(shape))
    if s.integer("keepdims", 1):
        out = (*shape[:axis], 1, *shape[axis + 1 :])
    else:
        out = (*shape[:axis], *shape[axis + 1 :])
    return [Type(ir.DataType.INT64, out)]


def _cumulative(s: Site) -> list[Type]:
    return [Type(s.dtype(), s.shape())]


_REDUCE = "L1 L2 LogSum LogSumExp Max Mean Min Prod Sum SumSquare".split()

RULES = {
    **{f"Reduce{name}": _reduce for name in _REDUCE},
    "ArgMax": _arg,
    "ArgMin": _arg,
    "CumSum": _cumulative,
    "CumProd": _cumulative,
}
