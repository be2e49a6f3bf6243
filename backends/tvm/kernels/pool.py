"""Pools of channels-last planes [b, rows, columns, channels]: pool.channels_last.

Output rows run in parallel; a window's elements that lie in the plane are combined, one channel a lane.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx

from netlathe.backends.tvm.cuda import windows
from netlathe.backends.tvm.cuda.code import GpuCode
from netlathe.backends.tvm.kernel import Kernel
from netlathe.backends.tvm.kernels.reduce import Combine
from netlathe.backends.tvm.tir import (
    PARALLEL,
    VECTORIZED,
    Code,
    Expr,
    broadcast,
    i64,
    idiv,
    known,
    unflatten,
)
from netlathe.backends.tvm.values import Store, Value

_VECTORS = 4  # of channels at a time: their sums hide each other's latency


@dataclass(frozen=True)
class Span:
    """Windows along one axis."""

    size: int
    stride: int
    dilation: int
    begin: int  # elements of the border before the plane

    def inside(self, code: Code, at: Expr, extent: Expr) -> tuple[Expr, Expr, Expr]:
        """Where window ``at`` begins in the plane, and the first tap and the end of those that lie in it."""
        first = code.bind(at * i64(self.stride) - i64(self.begin))
        step = i64(self.dilation)
        low = idiv(tirx.max(i64(0) - first, i64(0)) + step - i64(1), step)
        high = idiv(tirx.max(extent - first, i64(0)) + step - i64(1), step)
        return first, code.bind(low), code.bind(tirx.min(high, i64(self.size)))


def channels_last(
    kernel: Kernel,
    x: Value,
    spans: tuple[Span, Span],
    out: list[Expr],
    dtype: str,
    combine: Combine,
    store: Store,
) -> str:
    """store([b, row, column, channel], the window's elements combined); ``out`` is that shape."""
    code = kernel.code
    if isinstance(code, GpuCode):
        down, across = ((s.size, s.stride, s.dilation, s.begin) for s in spans)
        cut = windows.Windows(*zip(down, across, strict=True))
        return windows.pool(kernel, x, cut, out, dtype, combine, store)
    height, width = kernel.shape(x.shape)[1:3]
    lanes = kernel.lowering.machine.lanes(dtype)
    channels = known(out[3])
    if channels is not None and channels % (_VECTORS * lanes) == 0:
        lanes *= _VECTORS
    while channels is not None and lanes > max(channels, 1):
        lanes //= 2

    with code.loop(out[0] * out[1], PARALLEL) as line:
        b, row = (code.bind(i) for i in unflatten(line, out[:2]))
        top, low, high = spans[0].inside(code, row, height)
        with code.loop(out[2]) as column:
            left, first, end = spans[1].inside(code, column, width)

            def window(channel: Expr, count: int) -> None:
                held = code.alloc([count], dtype)
                code.vstore(held, 0, broadcast(combine.start(dtype), count), count)
                with code.loop(tirx.max(high - low, i64(0))) as down:
                    at = code.bind(top + (low + down) * i64(spans[0].dilation))
                    with code.loop(tirx.max(end - first, i64(0))) as across:
                        place = code.bind(left + (first + across) * i64(spans[1].dilation))

                        def step(lane: Expr) -> None:
                            item = x.at(code, [b, at, place, channel + lane])
                            now = tirx.BufferLoad(held, [lane])
                            code.store(held, lane, combine.function(now, item))

                        _lanes(code, count, step)
                _lanes(
                    code,
                    count,
                    lambda lane: store(
                        code, [b, row, column, channel + lane], tirx.BufferLoad(held, [lane])
                    ),
                )

            whole = code.bind(idiv(out[3], i64(lanes)))
            with code.loop(whole) as block:
                window(code.bind(block * i64(lanes)), lanes)
            if lanes > 1:
                with code.loop(out[3] - whole * i64(lanes)) as rest:
                    window(code.bind(whole * i64(lanes) + rest), 1)
    return "pool.channels_last"


def _lanes(code: Code, count: int, body: object) -> None:
    if count == 1:
        body(i64(0))  # type: ignore[operator]
        return
    with code.loop(count, VECTORIZED) as lane:
        body(lane)  # type: ignore[operator]
