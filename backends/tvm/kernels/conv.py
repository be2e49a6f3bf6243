"""Direct convolution: a register tile of output channels by neighbouring output columns.

The input comes with its padding in memory, and with the columns of a stride s dealt into s runs, so
that every load along a row is a vector. A task is a tile of channels, one output row and one run of
columns; the last tile of either starts early enough to be whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx

from netlathe.backends.tvm.kernel import Kernel
from netlathe.backends.tvm.kernels.general import vectors
from netlathe.backends.tvm.tir import (
    PARALLEL,
    Code,
    Expr,
    broadcast,
    cast,
    flat_index,
    i64,
    idiv,
    known,
    unflatten,
)
from netlathe.backends.tvm.values import Ready, Store


@dataclass(frozen=True)
class Geometry:
    """``groups`` of ``inputs`` to ``outputs`` channels each; windows over two dims."""

    groups: int
    inputs: int
    outputs: int
    kernel: tuple[int, int]
    strides: tuple[int, int]
    dilations: tuple[int, int]


def direct(
    kernel: Kernel,
    x: Ready,
    weight: Ready,
    geometry: Geometry,
    out: list[Expr],
    dtype: str,
    store: Store,
) -> str:
    """store([b, channel, row, column], product); ``out`` is [b, channels, rows, columns].

    ``x`` is [b, channels, rows, runs, columns of a run], ``weight`` [outputs, inputs, h, w].
    """
    code = kernel.code
    lanes = kernel.lowering.machine.lanes(dtype)
    columns = known(out[3])
    channels = next(size for size in (8, 4, 2, 1) if size <= geometry.outputs)
    most = 4 if channels == 1 else 3 if kernel.lowering.machine.registers == 32 else 1
    job = _Job(kernel, x, weight, geometry, out, dtype, store, channels)
    if columns is None:
        width = lanes * most
        code.branch(out[3] >= i64(width), lambda: job.tasks(lanes, most), lambda: job.tasks(1, 1))
    else:
        while lanes > max(columns, 1):
            lanes //= 2
        job.tasks(lanes, max(1, min(most, columns // lanes)))
    return "conv.direct"


@dataclass
class _Job:
    kernel: Kernel
    x: Ready
    weight: Ready
    geometry: Geometry
    out: list[Expr]
    dtype: str
    store: Store
    channels: int  # of a tile

    def tasks(self, lanes: int, count: int) -> None:
        """All tiles, with ``count`` vectors of ``lanes`` columns."""
        code, g = self.kernel.code, self.geometry
        batch, _, rows, columns = self.out
        width = lanes * count
        tiles = -(-g.outputs // self.channels)
        runs = idiv(columns + i64(width - 1), width)
        extents = [i64(g.groups), i64(tiles), batch, rows, runs]
        total = i64(1)
        for extent in extents:
            total = total * extent
        with code.loop(total, PARALLEL) as task:
            group, tile, b, row, run = (code.bind(i) for i in unflatten(task, extents))
            first = tirx.min(tile * i64(self.channels), i64(g.outputs - self.channels))
            channel = code.bind(group * i64(g.outputs) + first)
            column = code.bind(tirx.min(run * i64(width), columns - i64(width)))
            self._tile(group, channel, b, row, column, lanes, count)

    def _tile(
        self, group: Expr, channel: Expr, b: Expr, row: Expr, column: Expr, lanes: int, count: int
    ) -> None:
        code, g = self.kernel.code, self.geometry
        shape = self.kernel.shape(self.x.shape)
        data, weights = self.kernel.read(self.x), self.kernel.read(self.weight)
        sums = code.registers(self.channels * count, lanes, self.dtype)
        results = code.alloc([self.channels * count * lanes], self.dtype, scope="global")
        taps = g.kernel[0] * g.kernel[1]
        with code.loop(g.inputs) as c, code.loop(g.kernel[0]) as kh:
            plane = group * i64(g.inputs) + c
            line = row * i64(g.strides[0]) + kh * i64(g.dilations[0])
            at = code.bind(flat_index([b, plane, line, i64(0), i64(0)], shape))
            tap = code.bind((channel * i64(g.inputs) + c) * i64(taps) + kh * i64(g.kernel[1]))
            for kw in range(g.kernel[1]):
                offset = kw * g.dilations[1]
                run, skipped = offset % g.strides[1], offset // g.strides[1]
                start = at + i64(run) * shape[4] + i64(skipped) + column
                values = [
                    code.bind(
                        cast_vector(
                            code.vload(data, start + i64(n * lanes), lanes), self.dtype, lanes
                        )
                    )
                    for n in range(count)
                ]
                for i in range(self.channels):
                    place = tap + i64(i * g.inputs * taps + kw)
                    factor = cast(tirx.BufferLoad(weights, [place]), self.dtype)
                    for n in range(count):
                        held = sums[i * count + n]
                        value = code.vload(held, 0, lanes) + broadcast(factor, lanes) * values[n]
                        code.vstore(held, 0, value, lanes)
        for slot, held in enumerate(sums):
            code.vstore(results, slot * lanes, code.vload(held, 0, lanes), lanes)
        self._finish(channel, b, row, column, results, lanes * count, lanes)

    def _finish(
        self, channel: Expr, b: Expr, row: Expr, column: Expr, results: Any, width: int, lanes: int
    ) -> None:
        code: Code = self.kernel.code
        with code.loop(self.channels) as i:
            at = code.bind(channel + i)

            def one(j: Expr) -> None:
                value = tirx.BufferLoad(results, [i * i64(width) + j])
                self.store(code, [b, at, row, column + j], value)

            vectors(code, i64(width), lanes, one)


def cast_vector(value: Expr, dtype: str, lanes: int) -> Expr:
    """A vector in another element type."""
    return cast(value, dtype if lanes == 1 else f"{dtype}x{lanes}")
