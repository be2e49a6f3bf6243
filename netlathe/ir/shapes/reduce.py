"""Reductions, and operators that run along one axis."""

from __future__ import annotations

import onnx_ir as ir

from netlathe.ir import dims
from netlathe.ir.dims import Shape
from netlathe.ir.types import Site, Type


def _reduce(s: Site) -> list[Type]:
    shape = s.shape()
    if shape is None:
        return [s.type()]
    keep_dims = s.integer("keepdims", 1)
    axes = s.ints(1) if s.has(1) else ()
    if axes is None:
        return [Type(s.dtype(), _unknown(s.shape(1), len(shape), bool(keep_dims)))]
    if not axes and s.integer("noop_with_empty_axes"):
        return [s.type()]
    reduced = {s.checked_axis(a, len(shape)) for a in axes} or set(range(len(shape)))
    if s.node.op_type == "ReduceProd" and len(shape) == 1 and (items := s.contents(0)) is not None:
        s.remember((dims.product(items),))
    out = (1 if i in reduced else d for i, d in enumerate(shape) if keep_dims or i not in reduced)
    return [Type(s.dtype(), tuple(out))]


def _unknown(axes: Shape | None, rank: int, keep_dims: bool) -> Shape | None:
    """What is known where it is not known which axes are reduced: the rank, perhaps."""
    if keep_dims:
        return (None,) * rank
    count = axes[0] if axes else None
    return (None,) * (rank - count) if isinstance(count, int) and 0 < count <= rank else None


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
    shape, axis = s.shape(), s.ints(1)
    if shape is not None and axis:
        s.checked_axis(axis[0], len(shape))
    return [s.type()]


_REDUCE = "L1 L2 LogSum LogSumExp Max Mean Min Prod Sum SumSquare".split()

RULES = {
    **{f"Reduce{name}": _reduce for name in _REDUCE},
    "ArgMax": _arg,
    "ArgMin": _arg,
    "CumSum": _cumulative,
    "CumProd": _cumulative,
}
