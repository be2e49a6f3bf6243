"""Direct convolution: a register tile of output channels by neighbouring positions of the output plane.

The input comes with its padding in memory and split by the strides: of strides (s, t) there are s * t planes,
and plane (u, v) holds the rows u, u + s, ... and columns v, v + t, .... So what a tap reads for
neighbouring outputs are neighbours in one plane, from one row into the next: positions run over rows of
the *plane's* width, and the few of them that lie beyond the output's width are computed and dropped.
Vectors are then full however narrow the image is. The last tile of channels or positions starts early
enough to be whole. A constant weight is packed so that a tap's factors for a tile are neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from netlathe.backends.tvm import storage
from netlathe.backends.tvm.kernel import Kernel
from netlathe.backends.tvm.kernels.general import vectors
from netlathe.backends.tvm.machine import Machine
from netlathe.backends.tvm.tir import (
    PARALLEL,
    Expr,
    broadcast,
    cast,
    const,
    flat_index,
    i64,
    idiv,
    imod,
    known,
    total,
    unflatten,
)
from netlathe.backends.tvm.values import Ready, Store, Value

# A weight of more bytes than this does not stay in a level-2 cache while the positions go by.
_WEIGHT_BYTES = 1 << 19


@dataclass(frozen=True)
class Geometry:
    """``groups`` of ``inputs`` to ``outputs`` channels each; windows over two dims."""

    groups: int
    inputs: int
    outputs: int
    kernel: tuple[int, int]
    strides: tuple[int, int]
    dilations: tuple[int, int]

    @property
    def taps(self) -> int:
        """Elements of a window."""
        return self.kernel[0] * self.kernel[1]


@dataclass(frozen=True)
class Tile:
    """``channels`` by ``vectors`` of ``lanes`` positions."""

    channels: int
    vectors: int
    lanes: int

    @property
    def width(self) -> int:
        """Positions of a tile."""
        return self.vectors * self.lanes


def tile(machine: Machine, outputs: int, positions: int | None, dtype: str) -> Tile:
    """The tile that computes least in vain; ``positions`` is None where only the run knows."""
    lanes = machine.lanes(dtype)
    while positions is not None and lanes > max(positions, 1):
        lanes //= 2
    if machine.registers == 32:
        choices: Sequence[tuple[int, int]] = ((8, 3), (6, 4), (12, 2), (14, 1))
    else:
        choices = ((4, 3), (6, 2), (12, 1))
    tiles = [Tile(min(channels, outputs), count, lanes) for channels, count in choices]
    if positions is None:
        return tiles[0]
    fitting = [t for t in tiles if t.width <= positions] or [Tile(min(8, outputs), 1, lanes)]

    def work(made: Tile) -> int:
        return (
            -(-outputs // made.channels) * made.channels * -(-positions // made.width) * made.width
        )

    return min(fitting, key=work)


def split(
    kernel: Kernel,
    x: Value,
    whole: list[Expr],
    strides: tuple[int, int],
    begins: tuple[int, int],
    store: Store,
) -> str:
    """store([b, channel, plane, row, column], element): ``x`` padded with zeros and split by the strides.

    ``whole`` is the shape of that. A row is cleared, then its part of ``x`` is copied.
    """
    code = kernel.code
    height, width = kernel.shape(x.shape)[2:]
    lanes = kernel.lowering.machine.lanes(storage.computed(x.dtype))
    zero = const(0, storage.computed(x.dtype))
    down, across = strides
    with code.loop(total(whole[:-1]), PARALLEL) as at:
        b, channel, plane, row = (code.bind(i) for i in unflatten(at, whole[:-1]))
        from_row = code.bind(row * i64(down) + idiv(plane, across) - i64(begins[0]))
        shift = code.bind(imod(plane, across) - i64(begins[1]))  # of the first column in x
        first = idiv(tirx.max(i64(across - 1) - shift, i64(0)), across)
        end = idiv(tirx.max(width - shift + i64(across - 1), i64(0)), across)
        first, end = code.bind(first), code.bind(tirx.min(end, whole[4]))
        vectors(code, whole[4], lanes, lambda j: store(code, [b, channel, plane, row, j], zero))

        def one(j: Expr) -> None:
            column = (first + j) * i64(across) + shift
            value = x.at(code, [b, channel, from_row, column])
            store(code, [b, channel, plane, row, first + j], value)

        with code.when(tirx.And(from_row >= i64(0), from_row < height)):
            vectors(code, code.bind(tirx.max(end - first, i64(0))), lanes, one)
    return "conv.split"


def direct(
    kernel: Kernel,
    x: Ready,
    weight: Ready,
    packed: Tile | None,
    geometry: Geometry,
    out: list[Expr],
    positions: int | None,
    dtype: str,
    store: Store,
) -> str:
    """store([b, channel, row, column], product); ``out`` is [b, channels, rows, columns].

    ``x`` is [b, channels, planes, rows, columns], ``weight`` [outputs, inputs, h, w], or as
    ``packing.channel_tiles`` packs it for a tile. ``positions`` may be more than there are: what comes
    after the last row is dropped; None: only the run knows.
    """
    code = kernel.code
    width = kernel.shape(x.shape)[4]
    columns = out[3]
    fits = width.same_as(columns) or (known(width) is not None and known(width) == known(columns))
    chosen = packed or tile(kernel.lowering.machine, geometry.outputs, positions, dtype)
    job = _Job(kernel, x, weight, packed is not None, fits, geometry, out, dtype, store)
    if positions is None:
        # From the first position of the first row to the last one of the last.
        count = code.bind((out[2] - i64(1)) * width + columns)
        one = Tile(chosen.channels, 1, 1)
        code.branch(
            count >= i64(chosen.width),
            lambda: job.tasks(chosen, count),
            lambda: job.tasks(one, count),
        )
    else:
        job.tasks(chosen, i64(positions))
    return "conv.direct"


@dataclass
class _Job:
    kernel: Kernel
    x: Ready
    weight: Ready
    packed: bool
    fits: bool  # whether every position is an element of the output
    geometry: Geometry
    out: list[Expr]
    dtype: str
    store: Store

    def tasks(self, tile: Tile, positions: Expr) -> None:
        """All tiles; the weight or the positions stay in the cache while the others go by."""
        code, g = self.kernel.code, self.geometry
        tiles = i64(-(-g.outputs // tile.channels))
        runs = idiv(positions + i64(tile.width - 1), tile.width)
        heavy = 4 * g.outputs * g.inputs * g.taps > _WEIGHT_BYTES
        inner = [tiles, runs] if heavy else [runs, tiles]
        extents = [self.out[0], i64(g.groups), *inner]
        with code.loop(total(extents), PARALLEL) as task:
            b, group, *where = (code.bind(i) for i in unflatten(task, extents))
            number, run = where if heavy else where[::-1]
            first = tirx.min(number * i64(tile.channels), i64(g.outputs - tile.channels))
            first = code.bind(first)
            start = tirx.min(run * i64(tile.width), positions - i64(tile.width))
            self._tile(tile, group, number, first, b, code.bind(start))

    def _tile(
        self, tile: Tile, group: Expr, number: Expr, first: Expr, b: Expr, start: Expr
    ) -> None:
        code, g, lanes = self.kernel.code, self.geometry, tile.lanes
        shape = self.kernel.shape(self.x.shape)
        data, weights = self.kernel.read(self.x), self.kernel.read(self.weight)
        sums = code.registers(tile.channels * tile.vectors, lanes, self.dtype)
        results = code.alloc([tile.channels * tile.width], self.dtype, scope="global")
        channel = code.bind(group * i64(g.outputs) + first)
        # Where the factors of a tile begin, and from one of its channels to the next.
        if self.packed:
            tiles = -(-g.outputs // tile.channels)
            begin = (group * i64(tiles) + number) * i64(g.inputs * g.taps * tile.channels)
            tap_step, channel_step = tile.channels, 1
        else:
            begin = channel * i64(g.inputs * g.taps)
            tap_step, channel_step = 1, g.inputs * g.taps
        begin = code.bind(begin)
        with code.loop(g.inputs) as c, code.loop(g.kernel[0]) as kh:
            plane = group * i64(g.inputs) + c
            down = kh * i64(g.dilations[0])
            split, line = imod(down, g.strides[0]), idiv(down, g.strides[0])
            tap = code.bind(begin + (c * i64(g.taps) + kh * i64(g.kernel[1])) * i64(tap_step))
            for kw in range(g.kernel[1]):
                across = kw * g.dilations[1]
                which = split * i64(g.strides[1]) + i64(across % g.strides[1])
                index = [b, plane, which, line, i64(across // g.strides[1])]
                at = code.bind(flat_index(index, shape) + start)
                values = [
                    code.bind(
                        cast_vector(code.vload(data, at + i64(n * lanes), lanes), self.dtype, lanes)
                    )
                    for n in range(tile.vectors)
                ]
                for i in range(tile.channels):
                    place = tap + i64(kw * tap_step + i * channel_step)
                    factor = cast(tirx.BufferLoad(weights, [place]), self.dtype)
                    for n in range(tile.vectors):
                        held = sums[i * tile.vectors + n]
                        value = code.vload(held, 0, lanes) + broadcast(factor, lanes) * values[n]
                        code.vstore(held, 0, value, lanes)
        for slot, held in enumerate(sums):
            code.vstore(results, slot * lanes, code.vload(held, 0, lanes), lanes)
        self._finish(tile, channel, b, start, shape[4], results)

    def _finish(
        self, tile: Tile, channel: Expr, b: Expr, start: Expr, width: Expr, results: Any
    ) -> None:
        """Hand the results on: all at once where no position is beyond the output, else row by row."""
        code, columns = self.kernel.code, self.out[3]
        if self.fits:
            with code.loop(tile.channels) as i:
                at = code.bind(channel + i)

                def one(j: Expr) -> None:
                    value = tirx.BufferLoad(results, [i * i64(tile.width) + j])
                    position = start + j
                    row, column = idiv(position, columns), imod(position, columns)
                    self.store(code, [b, at, row, column], value)

                vectors(code, i64(tile.width), tile.lanes, one)
            return
        first = code.bind(idiv(start, width))
        after = tirx.min(idiv(start + i64(tile.width - 1), width) + i64(1), self.out[2])
        rows = code.bind(after - first)
        lanes = tile.lanes
        while known(columns) is not None and lanes > max(known(columns) or 1, 1):
            lanes //= 2
        with code.loop(tile.channels) as i, code.loop(rows) as down:
            at = code.bind(channel + i)
            row = code.bind(first + down)
            begin = code.bind(tirx.max(start - row * width, i64(0)))
            end = tirx.min(start + i64(tile.width) - row * width, columns)
            count = code.bind(tirx.max(end - begin, i64(0)))
            offset = code.bind(i * i64(tile.width) + row * width - start + begin)

            def one(j: Expr) -> None:
                value = tirx.BufferLoad(results, [offset + j])
                self.store(code, [b, at, row, begin + j], value)

            vectors(code, count, lanes, one)


def cast_vector(value: Expr, dtype: str, lanes: int) -> Expr:
    """A vector in another element type."""
    return cast(value, dtype if lanes == 1 else f"{dtype}x{lanes}")
