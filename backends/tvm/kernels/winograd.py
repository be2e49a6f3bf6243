"""Convolutions of 3 x 3 windows with fewer products: F(2 x 2, 3 x 3) and F(4 x 4, 3 x 3).

conv.winograd    a task transforms a block of tiles, multiplies them, and transforms the sums back

A tile is m x m outputs, made of (m + 2) x (m + 2) inputs. Of transformed tiles each position is a matrix of
tiles by channels, and multiplied by a matrix of its own: (m + 2)^2 products for each tile and pair of
channels, where there were 9 m^2 (Lavin and Gray, arXiv 1509.09308, section 4.1 and algorithm 1; the
transforms are those of :mod:`netlathe.backends.tvm.toom_cook`). Weights are transformed when they are
packed. What a task works on stays in the level-2 cache from the inputs to the results, which are handed
on like those of any convolution, so that what follows runs on them.

Planes are channels-last and have no border: a tile that reaches beyond one reads zeros. Tiles are
counted over batch, rows and columns; the last block starts early enough to be whole, and where there are
fewer tiles than that, the last of them is computed again.

A number that is not finite reaches all outputs of its tiles: also those whose windows do not hold it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import onnx_ir as ir
from tvm import tirx

from netlathe.backends.tvm import packing
from netlathe.backends.tvm.kernel import Kernel
from netlathe.backends.tvm.kernels import gemv
from netlathe.backends.tvm.kernels.conv import Geometry
from netlathe.backends.tvm.kernels.general import vectors
from netlathe.backends.tvm.kernels.winograd_plan import Plan, plan
from netlathe.backends.tvm.lowering import Lowering
from netlathe.backends.tvm.packing import Recipe
from netlathe.backends.tvm.tir import (
    PARALLEL,
    Expr,
    broadcast,
    const,
    flat_index,
    i64,
    idiv,
    total,
    unflatten,
)
from netlathe.backends.tvm.toom_cook import inputs_at_points, outputs_of_points
from netlathe.backends.tvm.values import Pending, Ready, Store, Value
from netlathe.ir.dims import Shape

_LINE = 16  # elements of a cache line: positions lie so much further apart, lest they share a set


def by_constant(
    low: Lowering,
    x: Value,
    constant: ir.Value | None,
    geometry: Geometry,
    pads: tuple[int, ...],
    shape: Shape,
) -> Pending | None:
    """[b, rows, columns, channels] of ``shape``, or None where the direct kernel is as good, or the only one.

    ``x`` is float32 and lies so too, ``constant`` is its weight, ``pads`` are the borders of its planes, the
    two before them first.
    """
    machine = low.machine
    if constant is None or constant.dtype != ir.DataType.FLOAT or machine.architecture != "x86_64":
        return None
    batch, *plane = (size if isinstance(size, int) else None for size in shape[:3])
    made = plan(machine, geometry, batch, (plane[0], plane[1]))
    if made is None:
        return None
    chosen, m, cut = made, made.outputs, made.cut
    assert constant.name is not None  # the IR has no constant without one
    weight = low.parameter(
        constant.name,
        constant.dtype,
        (cut.count, made.positions, geometry.inputs, cut.width),
        Recipe(packing.winograd_panels, (constant.name,), (m, cut.count, cut.width)),
        (constant, "winograd", m, cut.count, cut.width),
    )
    source = low.force(x)

    def build(kernel: Kernel, store: Store) -> str:
        out = kernel.shape(shape)
        return convolution(kernel, source, weight, chosen, (pads[0], pads[1]), out, store)

    return Pending(constant.dtype, shape, build)


def convolution(
    kernel: Kernel,
    x: Ready,
    weight: Ready,
    made: Plan,
    begins: tuple[int, int],
    out: list[Expr],
    store: Store,
) -> str:
    """store([b, row, column, channel], product), float32; ``out`` is that shape.

    ``x`` is [b, rows, columns, inputs] without its border, ``weight`` [panels, positions, inputs, width].
    """
    code, m = kernel.code, made.outputs
    grid = [out[0], *(code.bind(idiv(size + i64(m - 1), m)) for size in out[1:3])]
    tiles = code.bind(total(grid))
    blocks = code.bind(idiv(tiles + i64(made.block - 1), made.block))
    with code.loop(i64(made.parts) * blocks, PARALLEL) as task:
        part, block = (code.bind(i) for i in unflatten(task, [i64(made.parts), blocks]))
        last = tirx.max(tiles - i64(made.block), i64(0))
        first = code.bind(tirx.min(block * i64(made.block), last))

        def corner(tile: Expr) -> list[Expr]:
            """[b, row, column] of the first output of a tile of the block."""
            number = code.bind(tirx.min(first + tile, tiles - i64(1)))
            b, down, across = unflatten(number, grid)
            return [code.bind(i) for i in (b, down * i64(m), across * i64(m))]

        job = _Block(kernel, x, weight, made, begins, out, corner, store)
        job.inputs()
        with code.loop(i64(made.part)) as number:
            panel = code.bind(part * i64(made.part) + number)
            if made.part * made.parts == made.cut.count:
                job.panel(panel)
            else:
                with code.when(panel < i64(made.cut.count)):
                    job.panel(panel)
    return "conv.winograd"


class _Block:
    """What a task does: :meth:`inputs` once, then :meth:`panel` for each of its panels."""

    def __init__(
        self,
        kernel: Kernel,
        x: Ready,
        weight: Ready,
        made: Plan,
        begins: tuple[int, int],
        out: list[Expr],
        corner: Callable[[Expr], list[Expr]],
        store: Store,
    ) -> None:
        self.code = code = kernel.code
        self.plan, self.cut, self.lanes = made, made.cut, made.cut.lanes
        self.n, self.m = made.inputs, made.outputs
        self.begins, self.out, self.corner, self.store = begins, out, corner, store
        self.shape = kernel.shape(x.shape)
        self.channels = int(x.shape[3])  # type: ignore[arg-type]  # known, as those of the weight are
        self.data, self.factors = kernel.read(x), kernel.read(weight)
        # How far positions lie apart.
        self.apart = made.block * self.channels + _LINE
        self.sums_apart = made.block * self.cut.width + _LINE

        def memory(elements: int) -> Any:
            return code.alloc([elements], "float32", scope="global")

        self.transformed = memory(made.positions * self.apart)
        self.sums = memory(made.positions * self.sums_apart)
        self.results = memory(self.m**2 * self.cut.width)
        # A vector of each element of a tile: its inputs, and what is transformed along columns only.
        self.patch, self.half = (memory(made.positions * self.lanes) for _ in range(2))

    # -- inputs -------------------------------------------------------------------------------------

    def inputs(self) -> None:
        """B^T d B of each tile of the block, all channels."""
        code, n = self.code, self.n
        _, height, width, channels = self.shape
        with code.loop(i64(self.plan.block)) as tile:
            b, row, column = self.corner(tile)
            row = code.bind(row - i64(self.begins[0]))
            column = code.bind(column - i64(self.begins[1]))
            origin = code.bind(flat_index([b, row, column, i64(0)], self.shape))

            def load(i: Expr, j: Expr, first: Expr) -> Expr:
                at = origin + (i * width + j) * channels + first
                return code.vload(self.data, at, self.lanes)

            def within() -> None:
                with self._vectors() as first:
                    self._transform(tile, first, lambda i, j: load(i, j, first))

            def across() -> None:
                with self._vectors() as first:
                    self._fill_patch(row, column, lambda i, j: load(i, j, first))
                    self._transform(tile, first, lambda i, j: self._get(self.patch, i, j))

            inside = tirx.And(row >= i64(0), row + i64(n) <= height)
            inside = tirx.And(inside, tirx.And(column >= i64(0), column + i64(n) <= width))
            code.branch(inside, within, across)

    @contextlib.contextmanager
    def _vectors(self) -> Iterator[Expr]:
        """Input channels a vector at a time; the last one starts early enough to be whole."""
        code, lanes = self.code, self.lanes
        with code.loop(i64(-(-self.channels // lanes))) as number:
            yield code.bind(tirx.min(number * i64(lanes), i64(self.channels - lanes)))

    def _fill_patch(self, row: Expr, column: Expr, load: Callable[[Expr, Expr], Expr]) -> None:
        """Copy the inputs of a tile, zeros where it reaches beyond the plane."""
        code = self.code
        _, height, width, _ = self.shape
        zero = broadcast(const(0, "float32"), self.lanes)
        with code.loop(self.n) as i, code.loop(self.n) as j:
            there = tirx.And(row + i >= i64(0), row + i < height)
            there = tirx.And(there, tirx.And(column + j >= i64(0), column + j < width))
            code.branch(
                there,
                lambda: self._put(self.patch, i, j, load(i, j)),
                lambda: self._put(self.patch, i, j, zero),
            )

    def _transform(self, tile: Expr, first: Expr, load: Callable[[Expr, Expr], Expr]) -> None:
        """A vector of channels of a tile: its columns, then its rows."""
        code, n = self.code, self.n
        with code.loop(n) as j:
            column = [code.bind(load(i64(i), j)) for i in range(n)]
            for i, value in enumerate(inputs_at_points(self.m, column, self._times, code.bind)):
                self._put(self.half, i64(i), j, value)
        with code.loop(n) as i:
            row = [code.bind(self._get(self.half, i, i64(j))) for j in range(n)]
            for j, value in enumerate(inputs_at_points(self.m, row, self._times, code.bind)):
                at = (i * i64(n) + i64(j)) * i64(self.apart) + tile * i64(self.channels) + first
                code.vstore(self.transformed, at, value, self.lanes)

    # -- products and results -----------------------------------------------------------------------

    def panel(self, number: Expr) -> None:
        """All results of a panel of output channels."""
        code, cut, positions = self.code, self.cut, self.plan.positions
        with code.loop(positions) as position:
            matrix = number * i64(positions) + position
            begin = code.bind(matrix * i64(self.channels * cut.width))
            with code.loop(self.plan.block // cut.rows) as step:
                self._multiply(position, begin, code.bind(step * i64(cut.rows)))
        column = code.bind(number * i64(cut.width))
        width = i64(cut.width)
        if cut.columns % cut.width:
            width = code.bind(tirx.min(width, i64(cut.columns) - column))
        self._results(column, width)

    def _multiply(self, position: Expr, begin: Expr, row: Expr) -> None:
        """A register tile: some tiles by the vectors of a panel, summed over the input channels."""
        code, cut, lanes = self.code, self.cut, self.lanes
        sums = code.registers(cut.rows * cut.vectors, lanes, "float32")
        origin = code.bind(position * i64(self.apart) + row * i64(self.channels))
        with code.loop(i64(self.channels)) as k:
            at = begin + k * i64(cut.width)
            if cut.width == _LINE:  # of wider rows the CPU asks in time by itself
                gemv.ask(code, self.factors, at + i64(gemv.AHEAD // 4))
            b = [
                code.bind(code.vload(self.factors, at + i64(number * lanes), lanes))
                for number in range(cut.vectors)
            ]
            for i in range(cut.rows):
                element = tirx.BufferLoad(self.transformed, [origin + i64(i * self.channels) + k])
                for number in range(cut.vectors):
                    held = sums[i * cut.vectors + number]
                    value = code.vload(held, 0, lanes) + broadcast(element, lanes) * b[number]
                    code.vstore(held, 0, value, lanes)
        to = code.bind(position * i64(self.sums_apart) + row * i64(cut.width))
        for slot, held in enumerate(sums):
            code.vstore(self.sums, to + i64(slot * lanes), code.vload(held, 0, lanes), lanes)

    def _results(self, column: Expr, width: Expr) -> None:
        """A^T M A of each tile; what of it lies in the plane is handed on."""
        code, m = self.code, self.m
        with code.loop(i64(self.plan.block)) as tile:
            b, row, first = self.corner(tile)
            with code.loop(self.cut.vectors) as vector:
                self._transform_back(tile, vector)
            rows = code.bind(tirx.min(self.out[1] - row, i64(m)))
            columns = code.bind(tirx.min(self.out[2] - first, i64(m)))
            with code.loop(rows) as i, code.loop(columns) as j:
                begin = code.bind((i * i64(m) + j) * i64(self.cut.width))
                index = [b, code.bind(row + i), code.bind(first + j)]

                def one(channel: Expr) -> None:
                    value = tirx.BufferLoad(self.results, [begin + channel])
                    self.store(code, [*index, column + channel], value)

                vectors(code, width, self.lanes, one)

    def _transform_back(self, tile: Expr, vector: Expr) -> None:
        """A vector of output channels of a tile: its columns, then its rows."""
        code, n, m, lanes = self.code, self.n, self.m, self.lanes
        begin = code.bind(tile * i64(self.cut.width) + vector * i64(lanes))
        with code.loop(n) as j:
            places = [(i64(i * n) + j) * i64(self.sums_apart) + begin for i in range(n)]
            column = [code.bind(code.vload(self.sums, at, lanes)) for at in places]
            for i, value in enumerate(outputs_of_points(m, column, self._times, code.bind)):
                self._put(self.half, i64(i), j, value)
        with code.loop(m) as i:
            row = [code.bind(self._get(self.half, i, i64(j))) for j in range(n)]
            for j, value in enumerate(outputs_of_points(m, row, self._times, code.bind)):
                at = (i * i64(m) + i64(j)) * i64(self.cut.width) + vector * i64(lanes)
                code.vstore(self.results, at, value, lanes)

    # -- vectors ------------------------------------------------------------------------------------

    def _get(self, buffer: Any, i: Expr, j: Expr) -> Expr:
        """Row ``i``, column ``j`` of a buffer of n x n vectors."""
        return self.code.vload(buffer, (i * i64(self.n) + j) * i64(self.lanes), self.lanes)

    def _put(self, buffer: Any, i: Expr, j: Expr, value: Expr) -> None:
        at = (i * i64(self.n) + j) * i64(self.lanes)
        self.code.vstore(buffer, at, value, self.lanes)

    def _times(self, value: Expr, factor: float) -> Expr:
        if factor in (1.0, -1.0):
            return value if factor > 0 else -value
        return value * broadcast(const(factor, "float32"), self.lanes)
