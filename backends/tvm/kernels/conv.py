"""Convolutions of channels-last planes [b, rows, columns, channels].

conv.direct      a register tile of neighbouring columns of one output row by vectors of output channels;
                 the sum goes over the window's rows, columns and the input channels. Of a window of one
                 element that is a matrix product, and :mod:`netlathe.backends.tvm.kernels.gemm` does it.
conv.depthwise   one channel a lane; a tile of neighbouring columns shares the elements it loads
conv.dots        the same of bytes, four products at a time
conv.padded      the input with its border, where a window reaches beyond the plane

Every vector lies along the channels, so neighbours in it are neighbours in memory whatever the window's
strides are. Weights are packed at compile time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from netlathe.backends.tvm.kernel import Kernel
from netlathe.backends.tvm.kernels.general import vectors
from netlathe.backends.tvm.kernels.tile import Arithmetic, Panels, Tiles, by_rows
from netlathe.backends.tvm.machine import Machine
from netlathe.backends.tvm.tir import (
    PARALLEL,
    VECTORIZED,
    Code,
    Expr,
    broadcast,
    cast,
    flat_index,
    i64,
    idiv,
    imod,
    known,
    total,
    unflatten,
)
from netlathe.backends.tvm.values import Ready, Store, Value

# Weights or planes of more bytes than this do not stay in a level-2 cache while the others go by.
_CACHED_BYTES = 1 << 19
# Columns of a depthwise tile: their sums and the weights of a 3 x 3 window fit the registers.
_MOST_COLUMNS = 14


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

    @property
    def is_depthwise(self) -> bool:
        """Whether each channel is convolved by itself."""
        return self.inputs == self.outputs == 1 and self.groups > 1


def padded(
    kernel: Kernel,
    x: Value,
    begins: tuple[int, int],
    whole: list[Expr],
    border: Callable[[Code], Expr],
    store: Store,
) -> str:
    """store([b, row, column, channel], element): ``x`` within a border; ``whole`` is that shape.

    There may be more channels than ``x`` has; these are of the border too.
    """
    code = kernel.code
    height, width, channels = kernel.shape(x.shape)[1:]
    # Lanes of 4-byte elements, whatever the type: LLVM splits what is wider.
    lanes = of_a_line = kernel.lowering.machine.lanes("float32")
    most = known(whole[3])
    while most is not None and lanes > 1 and lanes > most:
        lanes //= 2
    outside = code.bind(border(code))
    with code.loop(whole[0] * whole[1], PARALLEL) as line:
        b, row = (code.bind(i) for i in unflatten(line, whole[:2]))
        inner = code.bind(row - i64(begins[0]))

        def clear(column: Expr, first: Expr) -> None:
            vectors(
                code,
                whole[3] - first,
                lanes,
                lambda c: store(code, [b, row, column, first + c], outside),
            )

        def element(position: Expr) -> None:
            """Of a line without gaps between columns."""
            to = position + i64(begins[1]) * channels
            value = x.at(code, [b, inner, idiv(position, channels), imod(position, channels)])
            store(code, [b, row, idiv(to, channels), imod(to, channels)], value)

        def copy() -> None:
            with code.loop(i64(begins[1])) as column:
                clear(column, i64(0))
            uneven = known(channels) is not None and int(channels) % of_a_line
            if uneven and isinstance(x, Ready) and known(whole[3] - channels) == 0:
                vectors(code, width * channels, of_a_line, element)
            else:
                columns()
            with code.loop(whole[2] - width - i64(begins[1])) as column:
                clear(width + i64(begins[1]) + column, i64(0))

        def columns() -> None:
            with code.loop(width) as column:
                at = code.bind(column + i64(begins[1]))
                vectors(
                    code,
                    channels,
                    lanes,
                    lambda c: store(code, [b, row, at, c], x.at(code, [b, inner, column, c])),
                )
                if known(whole[3] - channels) != 0:
                    clear(at, channels)

        def nothing() -> None:
            with code.loop(whole[2]) as column:
                clear(column, i64(0))

        code.branch(tirx.And(inner >= i64(0), inner < height), copy, nothing)
    return "conv.padded"


def direct(
    kernel: Kernel,
    x: Ready,
    weight: Ready,
    cut: Panels,
    geometry: Geometry,
    out: list[Expr],
    arithmetic: Arithmetic,
    store: Store,
) -> str:
    """store([b, row, column, channel], product); ``out`` is that shape.

    ``x`` is [b, rows, columns, groups * inputs] with its border, ``weight`` [groups, panels, K, width],
    where K goes over the window's rows, its columns and the input channels; several steps of K lie
    side by side if the arithmetic takes several at once.
    """
    code, g = kernel.code, geometry
    b_, h, w, c = kernel.shape(x.shape)
    data, factors = kernel.read(x), kernel.read(weight)
    depth = g.inputs * g.taps
    columns = out[2]
    # Along a row of a window its columns and channels follow each other, unless something is skipped.
    joined = g.groups == 1 and g.dilations[1] == 1
    extents = [g.kernel[0], g.kernel[1] * g.inputs] if joined else [*g.kernel, g.inputs]
    step = arithmetic.step
    extents[-1] //= step

    def tasks(tile_rows: int) -> None:
        number_of_lines = [out[0], out[1]]
        heavy = (4 // arithmetic.step) * depth * g.outputs > _CACHED_BYTES
        order = [i64(cut.count), *number_of_lines] if heavy else [*number_of_lines, i64(cut.count)]
        whole = [i64(g.groups), *order]
        with code.loop(total(whole), PARALLEL) as task:
            group, *rest = (code.bind(i) for i in unflatten(task, whole))
            panel, b, row = rest if heavy else (rest[2], rest[0], rest[1])
            corner = [b, row * i64(g.strides[0]), i64(0), group * i64(g.inputs)]
            begin = code.bind(flat_index(corner, [b_, h, w, c]))
            first = (group * i64(cut.count) + panel) * i64(depth * cut.width)
            first = code.bind(first)

            def element(column: Expr, index: list[Expr]) -> Expr:
                at = begin + column * (c * i64(g.strides[1])) + index[0] * (w * c * g.dilations[0])
                if not joined:
                    at = at + index[1] * (c * i64(g.dilations[1]))
                return arithmetic.element(code, data, at + index[-1] * i64(step))

            def vector(index: list[Expr], number: int) -> Expr:
                k = flat_index(index, [i64(extent) for extent in extents])
                at = (k * i64(cut.width) + i64(number * cut.lanes)) * i64(step)
                return arithmetic.vector(code, factors, first + at, cut.lanes)

            def finish(column: Expr, channel: Expr, value: Expr) -> None:
                store(code, [b, row, column, group * i64(g.outputs) + channel], value)

            sizes = [i64(extent) for extent in extents]
            job = Tiles(
                code,
                cut.lanes,
                arithmetic.dtype,
                sizes,
                columns,
                element,
                finish,
                arithmetic.add,
            )
            job.panel(tile_rows, i64(0), columns, cut, panel, vector)

    by_rows(code, columns, cut.rows, tasks)
    return "conv.direct" if step == 1 else "conv.dots"


# -- depthwise --------------------------------------------------------------------------------------


def depthwise(
    kernel: Kernel,
    x: Ready,
    weight: Ready,
    geometry: Geometry,
    begins: tuple[int, int],
    out: list[Expr],
    dtype: str,
    store: Store,
    zero: Callable[[Code], Expr] | None = None,
) -> str:
    """store([b, row, column, channel], product); ``out`` is that shape.

    ``x`` is [b, rows, columns, channels] without its border, ``weight`` [taps, channels]. ``zero`` is
    what is taken off every element of ``x``.
    """
    code, machine = kernel.code, kernel.lowering.machine
    # Halves are computed with as halves where the machine can, and else widened before.
    lanes = machine.lanes(dtype) * (2 if dtype == "float16" else 1)
    while lanes > geometry.groups:
        lanes //= 2
    columns = known(out[2])
    with code.loop(out[0] * out[1], PARALLEL) as line:
        b, row = (code.bind(i) for i in unflatten(line, out[:2]))
        offset = None if zero is None else code.bind(zero(code))
        job = _Depthwise(kernel, x, weight, geometry, begins, lanes, dtype, b, row, store, offset)
        if columns is None:
            with code.loop(out[2]) as column:
                job.tile(1, column)
        else:
            job.line(columns)
    return "conv.depthwise"


@dataclass
class _Depthwise:
    kernel: Kernel
    x: Ready
    weight: Ready
    geometry: Geometry
    begins: tuple[int, int]
    lanes: int
    dtype: str
    b: Expr
    row: Expr
    store: Store
    zero: Expr | None

    def line(self, columns: int) -> None:
        """One output row in tiles, the last of which starts early enough to be whole.

        Only tiles near the ends look beyond the plane; where they start is known, and so is what they
        leave out.
        """
        code, g = self.kernel.code, self.geometry
        size = _tile_columns(self.kernel.lowering.machine, columns, g)
        width = known(self.kernel.shape(self.x.shape)[2])
        starts = [min(start, columns - size) for start in range(0, columns, size)]

        def inside(start: int) -> bool:
            first = start * g.strides[1] - self.begins[1]
            reach = (size - 1) * g.strides[1] + (g.kernel[1] - 1) * g.dilations[1]
            return width is not None and first >= 0 and first + reach < width

        middle = [number for number, start in enumerate(starts) if inside(start)]
        if len(middle) <= 1:
            middle = []
        begin, end = (middle[0], middle[-1] + 1) if middle else (len(starts), len(starts))
        if middle and starts[end - 1] != (end - 1) * size:  # the last tile starts early
            end -= 1
        for start in starts[:begin]:
            self.tile(size, start)
        if begin < end:
            with code.loop(i64(end - begin)) as number:
                self.tile(size, code.bind((number + i64(begin)) * i64(size)), whole=True)
        for start in starts[end:]:
            self.tile(size, start)

    def tile(self, size: int, start: int | Expr, whole: bool = False) -> None:
        """``size`` columns from ``start``, all channels; ``whole``: no tap lies beyond the plane's sides."""
        code, lanes, channels = self.kernel.code, self.lanes, self.geometry.groups
        with code.loop(i64(-(-channels // lanes))) as number:
            first = code.bind(tirx.min(number * i64(lanes), i64(channels - lanes)))
            sums = code.registers(size, lanes, self.dtype)
            self._sum(sums, size, start, first, whole)
            for i in range(size):

                def give(lane: Expr, i: int = i) -> None:
                    value = tirx.BufferLoad(sums[i], [lane])
                    index = [self.b, self.row, i64(start) + i64(i), first + lane]
                    self.store(code, index, value)

                if lanes == 1:
                    give(i64(0))
                else:
                    with code.loop(lanes, VECTORIZED) as lane:
                        give(lane)

    def _sum(self, sums: list[Any], size: int, start: int | Expr, first: Expr, whole: bool) -> None:
        code, g, lanes = self.kernel.code, self.geometry, self.lanes
        _, height, width, channels = shape = self.kernel.shape(self.x.shape)
        data, factors = self.kernel.read(self.x), self.kernel.read(self.weight)
        for kh in range(g.kernel[0]):
            line = self.row * i64(g.strides[0]) + i64(kh * g.dilations[0] - self.begins[0])
            line = code.bind(line)
            with code.when(tirx.And(line >= i64(0), line < height)):
                taps = [
                    code.bind(
                        code.vload(factors, i64((kh * g.kernel[1] + kw) * g.groups) + first, lanes)
                    )
                    for kw in range(g.kernel[1])
                ]
                origin = code.bind(flat_index([self.b, line, i64(0), first], shape))

                def add(
                    at: Expr,
                    uses: list[tuple[int, int]],
                    origin: Expr = origin,
                    taps: list[Expr] = taps,
                ) -> None:
                    loaded = code.vload(data, origin + at * channels, lanes)
                    value = cast_vector(loaded, self.dtype, lanes)
                    if self.zero is not None:
                        value = value - broadcast(self.zero, lanes)
                    value = code.bind(value)
                    for i, kw in uses:
                        held = code.vload(sums[i], 0, lanes)
                        code.vstore(sums[i], 0, held + value * taps[kw], lanes)

                for offset, uses in _columns_read(g, size).items():
                    at = i64(start) * i64(g.strides[1]) + i64(offset - self.begins[1])
                    inside = True if whole else _inside(at, width)
                    if isinstance(inside, bool):
                        if inside:
                            add(at, uses)
                        continue
                    with code.when(inside):
                        add(at, uses)


def _inside(at: Expr, width: Expr) -> bool | Expr:
    """Whether a column lies in the plane; a bool if that is known now."""
    number, size = known(at), known(width)
    if number is None or size is None:
        return tirx.And(at >= i64(0), at < width)
    return 0 <= number < size


def _columns_read(g: Geometry, size: int) -> dict[int, list[tuple[int, int]]]:
    """Column that a tile reads, counted from its first -> (output, tap) pairs that it belongs to."""
    found: dict[int, list[tuple[int, int]]] = {}
    for i in range(size):
        for kw in range(g.kernel[1]):
            found.setdefault(i * g.strides[1] + kw * g.dilations[1], []).append((i, kw))
    return dict(sorted(found.items()))


def _tile_columns(machine: Machine, columns: int, g: Geometry) -> int:
    """The tile that loads and computes least for a row."""
    most = min(_MOST_COLUMNS if machine.registers == 32 else 8, max(columns, 1))

    def work(size: int) -> float:
        read = g.kernel[0] * (len(_columns_read(g, size)) + g.kernel[1])
        return -(-columns // size) * (read + size * g.taps + 2 * size)

    return min(range(1, most + 1), key=work)


def cast_vector(value: Expr, dtype: str, lanes: int) -> Expr:
    """A vector in another element type."""
    return cast(value, dtype if lanes == 1 else f"{dtype}x{lanes}")
