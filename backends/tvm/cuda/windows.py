"""Windows over channels-last planes, where no product is made: pools and depthwise convolutions.

A thread makes 4 neighbouring channels of one place, so that a warp reads and writes 128 neighbouring elements
or several places whole; what windows share comes from the level-1 cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from tvm import tirx

from netlathe.backends.tvm.cuda.code import THREADS, GpuCode
from netlathe.backends.tvm.kernel import Kernel
from netlathe.backends.tvm.kernels.reduce import Combine
from netlathe.backends.tvm.tir import (
    SERIAL,
    VECTORIZED,
    Expr,
    cast,
    const,
    i64,
    idiv,
    known,
)
from netlathe.backends.tvm.values import Ready, Store, Value

LANES = 4
_UNROLLED = 32  # taps of a window that are written out
_WIDE = 2  # places of a row that a thread of a depthwise convolution makes


@dataclass(frozen=True)
class Windows:
    """Windows over (rows, columns): their size, and where the first begins before the input."""

    kernel: tuple[int, int]
    strides: tuple[int, int]
    dilations: tuple[int, int]
    begins: tuple[int, int]

    @property
    def each(self) -> tuple[tuple[int, int], ...]:
        """The four of them in this order."""
        return self.kernel, self.strides, self.dilations, self.begins


def narrow(code: GpuCode, position: Expr, dims: list[Expr]) -> list[Expr]:
    """The indices of an element below 2^31: 32 bits divide faster than 64."""
    rest = code.bind(cast(position, "int32"))
    index: list[Expr] = []
    for dim in reversed(dims[1:]):
        size = code.bind(cast(dim, "int32"))
        whole = code.bind(tirx.truncdiv(rest, size))
        index.append(code.bind(cast(rest - whole * size, "int64")))
        rest = whole
    return [code.bind(cast(rest, "int64")), *reversed(index)]


def lanes_of(channels: Expr, dtype: str) -> int:
    """Channels of a thread: several where rows of them are whole vectors."""
    size = known(channels)
    return LANES if size is not None and size % LANES == 0 and dtype == "float32" else 1


def pool(
    kernel: Kernel,
    x: Value,
    windows: Windows,
    out: list[Expr],
    dtype: str,
    combine: Combine,
    store: Store,
) -> str:
    """store([b, row, column, channel], the window's elements combined); ``out`` is that shape."""
    code = kernel.code
    assert isinstance(code, GpuCode)
    height, width = kernel.shape(x.shape)[1:3]

    def one(b: Expr, row: Expr, column: Expr, channel: Expr, lanes: int) -> None:
        held = code.alloc([lanes], dtype)
        with code.lanes(lanes) as lane:
            code.store(held, lane, combine.start(dtype))

        def step(_: Expr, at: Expr, place: Expr) -> None:
            with code.lanes(lanes) as lane:
                item = x.at(code, [b, at, place, channel + lane])
                now = tirx.BufferLoad(held, [lane])
                code.store(held, lane, combine.function(now, item))

        _taps(code, windows, (row, column), (height, width), step)
        with code.lanes(lanes) as lane:
            value = tirx.BufferLoad(held, [lane])
            store(code, [b, row, column, channel + lane], value)

    _each(code, out, lanes_of(out[3], dtype), one)
    return "pool.channels_last"


def depthwise(
    kernel: Kernel, x: Ready, taps: Ready, windows: Windows, out: list[Expr], store: Store
) -> str:
    """store([b, row, column, channel], sum over taps of x times its weight), in float32.

    ``x`` is [b, rows, columns, channels], ``taps`` [rows * columns of a window, channels]. A thread makes
    neighbouring places of a row, which share weights and most of what they read.
    """
    code = kernel.code
    assert isinstance(code, GpuCode)
    height, width = kernel.shape(x.shape)[1:3]
    wide = _WIDE if prod(windows.kernel) <= _UNROLLED else 1
    down, across = windows.kernel

    def one(b: Expr, row: Expr, column: Expr, channel: Expr, lanes: int) -> None:
        sums = [code.alloc([lanes], "float32") for _ in range(wide)]
        for held in sums:
            with code.lanes(lanes) as lane:
                code.store(held, lane, const(0.0, "float32"))
        top = code.bind(row * i64(windows.strides[0]) - i64(windows.begins[0]))
        left = code.bind(column * i64(wide * windows.strides[1]) - i64(windows.begins[1]))

        def line(i: Expr) -> None:
            """The row of taps ``i``: each element is read once, for every window that it is in."""
            at = code.bind(top + i * i64(windows.dilations[0]))
            with code.when(tirx.And(at >= i64(0), at < height)):
                weights = [code.alloc([lanes], "float32") for _ in range(across)]
                for j, weight in enumerate(weights):
                    with code.lanes(lanes) as lane:
                        value = taps.at(code, [i * i64(across) + i64(j), channel + lane])
                        code.store(weight, lane, value)
                for offset, pairs in _readers(windows, wide).items():
                    place = code.bind(left + i64(offset))
                    with code.when(tirx.And(place >= i64(0), place < width)):
                        item = code.alloc([lanes], "float32")
                        with code.lanes(lanes) as lane:
                            code.store(item, lane, x.at(code, [b, at, place, channel + lane]))
                        for which, j in pairs:
                            with code.lanes(lanes) as lane:
                                now, left_, right = (
                                    tirx.BufferLoad(held, [lane])
                                    for held in (sums[which], item, weights[j])
                                )
                                code.store(sums[which], lane, now + left_ * right)

        with code.loop(down, VECTORIZED if wide > 1 else SERIAL) as i:
            line(i)
        for which, held in enumerate(sums):
            place = code.bind(column * i64(wide) + i64(which))
            with code.when(place < out[2]), code.lanes(lanes) as lane:
                store(code, [b, row, place, channel + lane], tirx.BufferLoad(held, [lane]))

    groups = idiv(out[2] + i64(wide - 1), wide)
    _each(code, [out[0], out[1], groups, out[3]], lanes_of(out[3], "float32"), one)
    return "conv.depthwise"


def _readers(windows: Windows, wide: int) -> dict[int, list[tuple[int, int]]]:
    """Column of the input after the first -> which of ``wide`` windows read it, with which tap."""
    found: dict[int, list[tuple[int, int]]] = {}
    for which in range(wide):
        for j in range(windows.kernel[1]):
            offset = which * windows.strides[1] + j * windows.dilations[1]
            found.setdefault(offset, []).append((which, j))
    return found


def _each(
    code: GpuCode,
    out: list[Expr],
    lanes: int,
    one: Callable[[Expr, Expr, Expr, Expr, int], None],
) -> None:
    """one(b, row, column, channel, lanes) in a thread for each; a block stays within a row of a plane."""
    pieces = idiv(out[3], i64(lanes))
    line = out[2] * pieces
    chunks = idiv(line + i64(THREADS - 1), THREADS)
    with code.launch(out[0] * out[1] * chunks, THREADS) as (block, thread):
        b, row, chunk = narrow(code, block, [out[0], out[1], chunks])
        within = code.bind(chunk * i64(THREADS) + thread)
        with code.when(within < line):
            column, piece = narrow(code, within, [out[2], pieces])
            # A product without a name: vectors must see what it is a multiple of.
            one(b, row, column, piece * i64(lanes), lanes)


def _taps(
    code: GpuCode,
    windows: Windows,
    place: tuple[Expr, Expr],
    sizes: tuple[Expr, Expr],
    step: Callable[[Expr, Expr, Expr], None],
) -> None:
    """step(tap, row, column) for every tap of a window that lies in the plane."""
    kind = VECTORIZED if prod(windows.kernel) <= _UNROLLED else SERIAL
    first = [
        code.bind(at * i64(stride) - i64(begin))
        for at, stride, begin in zip(place, windows.strides, windows.begins, strict=True)
    ]
    with code.loop(windows.kernel[0], kind) as down:
        row = code.bind(first[0] + down * i64(windows.dilations[0]))
        with code.loop(windows.kernel[1], kind) as across:
            column = code.bind(first[1] + across * i64(windows.dilations[1]))
            tap = down * i64(windows.kernel[1]) + across
            inside = tirx.And(row >= i64(0), row < sizes[0])
            inside = tirx.And(inside, tirx.And(column >= i64(0), column < sizes[1]))
            with code.when(inside):
                step(tap, row, column)
