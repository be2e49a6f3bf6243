"""Products with a constant on ARM: which inner loop takes them, how B is packed for it, tails and epilogues.

neon.float32, neon.float16, neon.dot, neon.matrix     the scheme of :mod:`netlathe.backends.tvm.arm.neon`
neon.codes                                            B in 8 or 4 bits with scales, A in float32

A task is a block of rows and a panel of B. It goes down its rows a tile at a time; the last tile starts early
enough to be whole, so a few rows are computed twice, to the same values. Each function here gives None for
what the kernels of every machine take.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from tvm import tirx

from netlathe.backends.tvm.arm import neon, packing
from netlathe.backends.tvm.arm.neon import ROWS, Scheme, Tile
from netlathe.backends.tvm.kernel import Kernel
from netlathe.backends.tvm.kernels.general import vectors
from netlathe.backends.tvm.lowering import Lowering
from netlathe.backends.tvm.machine import Machine
from netlathe.backends.tvm.packing import Recipe
from netlathe.backends.tvm.tir import (
    PARALLEL,
    Code,
    Expr,
    broadcast,
    cast,
    const,
    dtype_of,
    i64,
    idiv,
    imod,
    known,
    unflatten,
)
from netlathe.backends.tvm.values import Pending, Ready, Store, Value
from netlathe.ir import dims
from netlathe.ir.dims import Shape

D = ir.DataType
# Rows of A that one task works on: with K = 1536 in float32 they fill most of a level-2 cache.
_ROW_BLOCK = 128
_PANELS = 8  # that one task takes where it packs A first


def by_constant(
    low: Lowering, a: Ready, constant: ir.Value, dtype: D, shape: Shape
) -> Pending | None:
    """``a`` [..., K] times a constant [K, N] of floats of the same type."""
    scheme = of_floats(low.machine, a.dtype)
    if low.machine.architecture != "aarch64" or a.dtype != constant.dtype or scheme is None:
        return None
    return Product(low, a, constant, scheme).pending(dtype, shape)


def of_floats(machine: Machine, dtype: D) -> Scheme | None:
    """The scheme that multiplies floats of a type; None if the core cannot."""
    if dtype == D.FLOAT16 and "asimdhp" in machine.features:
        return neon.FLOAT16
    return neon.FLOAT32 if dtype == D.FLOAT else None


def by_integers(
    low: Lowering, a: Value, a_zero: Value | None, constant: ir.Value, shape: Shape
) -> Pending | None:
    """``a`` - ``a_zero`` [..., K], of 8 bits, times a constant [K, N] of int8, in int32."""
    features = low.machine.features
    if "asimddp" not in features or low.machine.architecture != "aarch64":
        return None
    if a.dtype not in (D.INT8, D.UINT8) or constant.dtype != D.INT8:
        return None
    if a_zero is not None and not a_zero.is_one:
        return None
    scheme = neon.MATRIX if "i8mm" in features else neon.DOT
    product = Product(low, low.force(a), constant, scheme)
    if a_zero is not None or a.dtype == D.UINT8:
        product.shift_by(a_zero)
    return product.pending(D.INT32, shape)


@dataclass
class Shift:
    """What is added for the zero point of A: (middle - zero) times the sum of a column of B."""

    zero: Value | None
    middle: int
    columns: Ready

    def add(self, code: Code, column: Expr, value: Expr) -> Expr:
        total = tirx.BufferLoad(code.kernel.read(self.columns), [column])
        by = const(self.middle, "int32")
        if self.zero is not None:
            by = by - cast(self.zero.at(code, [i64(0)] * self.zero.rank), "int32")
        return value + by * total


class Product:
    """A product with a packed constant [K, N], or with a kernel of one element, [N, K, 1, 1]."""

    def __init__(self, low: Lowering, a: Ready, constant: ir.Value, scheme: Scheme) -> None:
        assert constant.const_value is not None and constant.name is not None
        self.low, self.scheme, self.constant = low, scheme, constant
        self.inner, self.columns = packing.matrix_shape(constant.const_value)
        self.a = a.viewed((dims.product(a.shape[:-1]), self.inner))
        self.lead = a.shape[:-1]
        self.count = -(-self.columns // scheme.width)
        self.padded = -(-self.inner // scheme.elements) * scheme.elements
        self.shift: Shift | None = None
        # Bytes that are left are read with those before them, which zeros multiply; floats might be infinite.
        piece = 8 if scheme.paired or self.inner < scheme.elements else scheme.elements
        self.piece = piece if scheme.a_type == "int8" and self.inner >= piece else 0
        group = scheme.elements // scheme.steps
        numbers = (self.count, scheme.width, self.padded, group, self.piece)
        elements = self.count * self.padded * scheme.width
        self.weight = low.parameter(
            constant.name,
            scheme.constant,
            (elements,),
            Recipe(packing.neighbours, (constant.name,), numbers),
            (constant, "neon", scheme),
        )

    def shift_by(self, zero: Value | None) -> None:
        """Let A have a zero point, and be unsigned."""
        name = self.constant.name
        assert name is not None
        columns = self.low.parameter(
            name,
            D.INT32,
            (self.columns,),
            Recipe(packing.column_sums, (name,)),
            (self.constant, "neon sums"),
        )
        middle = 128 if self.a.dtype == D.UINT8 else 0
        self.shift = Shift(zero, middle, columns)

    def pending(self, dtype: D, shape: Shape) -> Pending:
        """The product, with a kernel to be written."""
        return Pending(dtype, shape, self.build)

    def build(self, kernel: Kernel, store: Store) -> str:
        """Write the kernel; its schedule's name."""
        if self.scheme.paired:
            return self._build_pairs(kernel, store)
        code, scheme = kernel.code, self.scheme
        rows = kernel.size(self.a.shape[0])
        lead = kernel.shape(self.lead)
        buffer = kernel.read(self.a)
        weight = kernel.read(self.weight)
        panel_size = self.padded * scheme.width
        stored = "uint8" if self.a.dtype == D.UINT8 else scheme.a_type
        out_type = "int32" if scheme.sum_type == "int32" else "float32"

        def finish(row: Expr, column: Expr, value: Expr) -> None:
            if self.shift is not None:
                value = self.shift.add(code, column, value)
            store(code, [*unflatten(row, lead), column], value)

        def register(start: Expr) -> Expr:
            return signed(code.vload(buffer, start, scheme.elements), self.a.dtype)

        def task(size: int, first: Expr, end: Expr, panel: Expr) -> None:
            out = code.alloc([size * scheme.width], out_type)
            rest = self.inner % scheme.elements
            copied = rest and not self.piece
            tails = code.alloc([size * scheme.elements], stored) if copied else None
            base = code.bind(panel * i64(panel_size))

            def b(k: Expr, step: Expr, number: int) -> Expr:
                per_step = scheme.vectors * scheme.b_lanes
                at = base + k * i64(scheme.width) + step * i64(per_step)
                return code.vload(weight, at + i64(number * scheme.b_lanes), scheme.b_lanes)

            def tile(row: Expr) -> None:
                start = [code.bind((row + i64(i)) * i64(self.inner)) for i in range(size)]
                if tails is not None:
                    self._copy_tails(code, buffer, tails, stored, start, rest)

                def tail(i: int) -> Expr:
                    if tails is not None:
                        at = i * scheme.elements
                        return signed(code.vload(tails, at, scheme.elements), self.a.dtype)
                    last = start[i] + i64(self.inner - self.piece)
                    if self.piece == scheme.elements:
                        return register(last)
                    both = [code.vload(buffer, at, self.piece) for at in (start[i], last)]
                    places: list[Expr] = [tirx.IntImm("int32", j) for j in range(scheme.elements)]
                    return signed(tirx.Shuffle(both, places), self.a.dtype)

                made = Tile(code, scheme, self.inner, lambda i, k: register(start[i] + k), b, tail)
                made.run(size, out)
                put_rows(code, size, row, panel, scheme.width, self.columns, out, finish)

            down(code, size, first, end, rows, tile)

        tasks(code, rows, self.count, task)
        return f"neon.{scheme.name}"

    def _build_pairs(self, kernel: Kernel, store: Store) -> str:
        """A task packs its rows by pairs, then takes some panels: that is done once for all of these."""
        code, scheme, padded = kernel.code, self.scheme, self.padded
        rows = kernel.size(self.a.shape[0])
        lead = kernel.shape(self.lead)
        buffer, weight = kernel.read(self.a), kernel.read(self.weight)
        number = known(rows)
        size = 2 if number is not None and number <= 2 else ROWS

        def finish(row: Expr, column: Expr, value: Expr) -> None:
            if self.shift is not None:
                value = self.shift.add(code, column, value)
            store(code, [*unflatten(row, lead), column], value)

        groups = -(-self.count // _PANELS)
        blocks = idiv(rows + i64(_ROW_BLOCK - 1), i64(_ROW_BLOCK))
        with code.loop(blocks * i64(groups), PARALLEL) as task:
            first = code.bind(idiv(task, i64(groups)) * i64(_ROW_BLOCK))
            end = code.bind(tirx.min(first + i64(_ROW_BLOCK), rows))
            start = code.bind(imod(task, i64(groups)) * i64(_PANELS))
            panels = tirx.min(i64(_PANELS), i64(self.count) - start)
            tiles = code.bind(idiv(end - first + i64(size - 1), i64(size)))
            most = _ROW_BLOCK if number is None else min(_ROW_BLOCK, -(-number // size) * size)
            packed = code.alloc([most * padded], "int8", scope="global")
            # Read row by row, of which only the run knows how many: no registers.
            out = code.alloc([size * scheme.width], "int32", scope="global")
            with code.loop(tiles * i64(size)) as i:
                row = code.bind(tirx.min(first + i, rows - i64(1)) * i64(self.inner))
                pair = idiv(i, i64(2)) * i64(2 * padded) + imod(i, i64(2)) * i64(8)
                self._pack_row(code, buffer, packed, row, code.bind(pair))
            with code.loop(panels) as number_, code.loop(tiles) as tile:
                panel = code.bind(start + number_)
                base = code.bind(panel * i64(padded * scheme.width))
                at = code.bind(tile * i64(size * padded))

                def a(i: int, k: Expr, at: Expr = at) -> Expr:
                    pair, step = divmod(i, 2)
                    where = at + i64(pair * 2 * padded + step * 16) + k * i64(2)
                    return code.vload(packed, where, 16)

                def b(k: Expr, step: Expr, number: int, base: Expr = base) -> Expr:
                    where = base + k * i64(scheme.width) + step * i64(64)
                    return code.vload(weight, where + i64(number * 16), 16)

                Tile(code, scheme, padded, a, b, lambda i: i64(0)).run(size, out)
                row = code.bind(first + tile * i64(size))
                count = tirx.min(i64(size), end - row)
                put_rows(code, count, row, panel, scheme.width, self.columns, out, finish)
        return "neon.matrix"

    def _pack_row(self, code: Code, buffer: Any, packed: Any, row: Expr, at: Expr) -> None:
        """Values of k by eights, each behind those of the row before in the pair; zeros behind the last."""

        def put(eight: int | Expr, value: Expr) -> None:
            code.vstore(packed, at + i64(eight) * i64(16), value, 8)

        def read(k: Expr) -> Expr:
            return signed(code.vload(buffer, row + k, 8), self.a.dtype)

        whole, rest = divmod(self.inner, 8)
        if whole:
            with code.loop(whole) as eight:
                put(eight, read(eight * i64(8)))
        if rest and self.piece:
            put(whole, read(i64(self.inner - 8)))
            whole, rest = whole + 1, 0
        for eight in range(whole, self.padded // 8):
            put(eight, broadcast(const(0, "int8"), 8))
        for j in range(rest):
            value = tirx.BufferLoad(buffer, [row + i64(whole * 8 + j)])
            code.store(packed, at + i64(whole * 16 + j), signed(value, self.a.dtype))

    def _copy_tails(
        self, code: Code, buffer: Any, tails: Any, stored: str, start: list[Expr], rest: int
    ) -> None:
        """The last values of k of every row, and zeros behind them."""
        elements = self.scheme.elements
        first = self.inner - rest
        empty = 128 if self.a.dtype == D.UINT8 else 0
        for i, at in enumerate(start):
            blank = broadcast(const(empty, stored), elements)
            code.vstore(tails, i * elements, blank, elements)
            for j in range(rest):
                value = tirx.BufferLoad(buffer, [at + i64(first + j)])
                code.store(tails, i64(i * elements + j), value)


def signed(value: Expr, dtype: D) -> Expr:
    """A number or vector of uint8 less 128, as int8; one of another ``dtype`` as it is."""
    if dtype != D.UINT8:
        return value
    lanes = int(dtype_of(value).partition("x")[2] or 1)
    flipped = value ^ broadcast(const(128, "uint8"), lanes)
    return tirx.reinterpret("int8" if lanes == 1 else f"int8x{lanes}", flipped)


def tasks(
    code: Code, rows: Expr, panels: int, task: Callable[[int, Expr, Expr, Expr], None]
) -> None:
    """``task(tile rows, first row, end, panel)`` for every block of rows and panel, in parallel."""

    def all_of(size: int) -> None:
        blocks = idiv(rows + i64(_ROW_BLOCK - 1), i64(_ROW_BLOCK))
        with code.loop(blocks * i64(panels), PARALLEL) as number:
            block = code.bind(idiv(number, i64(panels)))
            panel = code.bind(imod(number, i64(panels)))
            first = code.bind(block * i64(_ROW_BLOCK))
            task(size, first, code.bind(tirx.min(first + i64(_ROW_BLOCK), rows)), panel)

    number = known(rows)
    if number is not None:
        all_of(next((size for size in (ROWS, 4) if size <= number), 1))
        return
    few = lambda: code.branch(rows >= i64(4), lambda: all_of(4), lambda: all_of(1))  # noqa: E731
    code.branch(rows >= i64(ROWS), lambda: all_of(ROWS), few)


def down(
    code: Code, size: int, first: Expr, end: Expr, rows: Expr, tile: Callable[[Expr], None]
) -> None:
    """``tile(row)`` down the rows [first, end)."""
    with code.loop(idiv(end - first + i64(size - 1), i64(size))) as step:
        row = first + step * i64(size)
        tile(code.bind(tirx.min(row, rows - i64(size)) if size > 1 else row))


def put_rows(
    code: Code,
    size: int | Expr,
    row: Expr,
    panel: Expr,
    width: int,
    columns: int,
    out: Any,
    finish: Callable[[Expr, Expr, Expr], None],
) -> None:
    """Hand a tile's results on from memory; what lies beyond the columns is dropped."""
    column = code.bind(panel * i64(width))

    def part(count: int) -> None:
        with code.loop(size) as i:
            at = code.bind(row + i)

            def one(j: Expr) -> None:
                finish(at, column + j, tirx.BufferLoad(out, [i * i64(width) + j]))

            vectors(code, i64(count), min(4, count), one)

    last = columns % width
    if not last:
        part(width)
    elif columns < width:
        part(last)
    else:
        code.branch(panel < i64(columns // width), lambda: part(width), lambda: part(last))
