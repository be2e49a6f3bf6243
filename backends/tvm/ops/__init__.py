"""The op table: ONNX operator -> the row that lowers it."""

from __future__ import annotations

from netlathe.backends.tvm.ops import (
    attention,
    contraction,
    elementwise,
    loss,
    movement,
    norm,
    order,
    quantize,
    recurrent,
    reduction,
    resize,
    signal,
    window,
)
from netlathe.backends.tvm.ops.op import Op, Rule

RULES: dict[str, Rule] = {
    **elementwise.ROWS,
    **movement.ROWS,
    **contraction.ROWS,
    **reduction.ROWS,
    **norm.ROWS,
    **attention.ROWS,
    **window.ROWS,
    **signal.ROWS,
    **recurrent.ROWS,
    **loss.ROWS,
    **resize.ROWS,
    **order.ROWS,
    **quantize.ROWS,
}

__all__ = ["RULES", "Op", "Rule"]
