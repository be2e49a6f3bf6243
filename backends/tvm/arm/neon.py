"""Inner loops on NEON registers: tiles of up to 8 rows and 18 accumulators.

lanes    a register of one row of A holds several values of k, and each multiplies a vector of B as a
         lane (``fmla v0.4s, v1.4s, v2.s[3]``, ``sdot v0.4s, v1.16b, v2.4b[3]``). Broadcasting would load
         once for each value, and on the Neoverse cores shuffle once more.
pairs    ``smmla`` multiplies two rows by two columns, eight values of k each; a block of A is packed for it.

16 accumulators hide the latency of the multiplications, 8 registers hold A, and B goes through the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from tvm import tirx

from netlathe.backends.tvm.tir import Code, Expr, Index, broadcast, cast, const, flat_index, i64

ROWS = 8  # of the largest tile
Load = Callable[[Expr, int], Expr]  # (step, number) -> a vector of B


@dataclass(frozen=True)
class Scheme:
    """How ``elements`` values of k of each row are multiplied with ``width`` columns, ``vectors`` registers.

    ``multiply(code, sums, a, load)`` adds to the sums, row by row; ``a`` has a register for each row. B comes
    in ``steps`` of ``vectors`` registers. ``chunk``: so many values of k are summed in ``sum_type``, then in
    float32; 0 for all.
    """

    a_type: str
    b_type: str
    sum_type: str
    elements: int
    steps: int
    vectors: int
    width: int
    multiply: Callable[[Code, Sequence[Any], Sequence[Expr], Load], None]
    put: Callable[
        [Code, Sequence[Any], int, Any], None
    ]  # sums of so many rows to memory, row by row
    chunk: int = 0

    @property
    def b_lanes(self) -> int:
        """Elements of B in a register."""
        return {"float32": 4, "float16": 8, "int8": 16}[self.b_type]

    @property
    def constant(self) -> ir.DataType:
        """The type of B in the file of constants."""
        types = {
            "float32": ir.DataType.FLOAT,
            "float16": ir.DataType.FLOAT16,
            "int8": ir.DataType.INT8,
        }
        return types[self.b_type]

    @property
    def name(self) -> str:
        """As names of kernels have it."""
        if self.a_type != "int8":
            return self.a_type
        return "matrix" if self.paired else "dot"

    @property
    def paired(self) -> bool:
        """Whether A is packed two rows at a time: ``a`` then has a register for each pair and step."""
        return self.elements // self.steps == 8

    @property
    def rows(self) -> int:
        """Rows of the largest tile: as many as 18 accumulators hold."""
        return min(ROWS, 18 // self.vectors * (2 if self.paired else 1))


def _lane(vector: Expr, lane: int, lanes: int) -> Expr:
    return broadcast(tirx.Shuffle([vector], [tirx.IntImm("int32", lane)]), lanes)


def _intrinsic(name: str, dtype: str, *arguments: Expr) -> Expr:
    return tirx.call_llvm_pure_intrin(dtype, f"llvm.aarch64.neon.{name}", *arguments)


def _by_lanes(
    lanes: int,
    columns: int,
    fused: Callable[[Expr, Expr, Expr, int], Expr],
    sum_type: str,
    vectors: int = 2,
) -> dict[str, Any]:
    """``multiply`` and ``put`` where every lane of A is one step."""

    def multiply(code: Code, sums: Sequence[Any], a: Sequence[Expr], load: Load) -> None:
        chains = len(sums) // (len(a) * vectors)
        for lane in range(lanes):
            b = [code.bind(load(i64(lane), number)) for number in range(vectors)]
            for i, row in enumerate(a):
                for number in range(vectors):
                    held = sums[((lane % chains) * len(a) + i) * vectors + number]
                    code.vstore(
                        held, 0, fused(code.vload(held, 0, columns), b[number], row, lane), columns
                    )

    def put(code: Code, sums: Sequence[Any], rows: int, out: Any) -> None:
        tile = rows * vectors
        for slot in range(tile):
            value = code.vload(sums[slot], 0, columns)
            for chain in range(1, len(sums) // tile):
                value = value + code.vload(sums[chain * tile + slot], 0, columns)
            if sum_type == "float16":
                at = slot * columns
                held = code.vload(out, at, columns)
                code.vstore(out, at, held + cast(value, f"float32x{columns}"), columns)
            else:
                code.vstore(out, slot * columns, value, columns)

    return {"multiply": multiply, "put": put}


def _dot(held: Expr, b: Expr, a: Expr, lane: int) -> Expr:
    four = tirx.reinterpret("int8x16", _lane(tirx.reinterpret("int32x4", a), lane, 4))
    return _intrinsic("sdot.v4i32.v16i8", "int32x4", held, b, four)


def _multiply_pairs(code: Code, sums: Sequence[Any], a: Sequence[Expr], load: Load) -> None:
    """Sum [pair of rows][pair of columns] is [r0 c0, r0 c1, r1 c0, r1 c1]; ``a`` [pair of rows][step]."""
    vectors = len(sums) * 2 // len(a)
    for step in range(2):
        for number in range(vectors):
            b = code.bind(load(i64(step), number))
            for i in range(len(a) // 2):
                held = sums[i * vectors + number]
                value = _intrinsic(
                    "smmla.v4i32.v16i8", "int32x4", code.vload(held, 0, 4), a[2 * i + step], b
                )
                code.vstore(held, 0, value, 4)


def _put_pairs(code: Code, sums: Sequence[Any], rows: int, out: Any) -> None:
    vectors = len(sums) * 2 // rows
    for row in range(rows):
        for number in range(0, vectors, 2):
            slot = row // 2 * vectors + number
            both = [code.vload(sums[slot + i], 0, 4) for i in range(2)]
            first = row % 2 * 2
            places: list[Expr] = [tirx.IntImm("int32", first + i) for i in (0, 1, 4, 5)]
            code.vstore(out, (row * vectors + number) * 2, tirx.Shuffle(both, places), 4)


def pair(first: Expr, second: Expr, step: int) -> Expr:
    """Eight bytes of each of two rows, from 8 * ``step`` on."""
    halves = [tirx.reinterpret("int64x2", row) for row in (first, second)]
    indices: list[Expr] = [tirx.IntImm("int32", step + 2 * row) for row in range(2)]
    return tirx.reinterpret("int8x16", tirx.Shuffle(halves, indices))


def fused_lane(held: Expr, b: Expr, a: Expr, lane: int) -> Expr:
    """A sum with lane ``lane`` of ``a`` times ``b``."""
    return held + b * _lane(a, lane, 4)


FLOAT32 = Scheme(
    "float32", "float32", "float32", 4, 4, 2, 8,
    **_by_lanes(4, 4, fused_lane, "float32"),
)  # fmt: skip
MIDDLE_FLOAT32 = Scheme(
    "float32", "float32", "float32", 4, 4, 3, 12,
    **_by_lanes(4, 4, fused_lane, "float32", 3),
)  # fmt: skip
WIDE_FLOAT32 = Scheme(
    "float32", "float32", "float32", 4, 4, 4, 16,
    **_by_lanes(4, 4, fused_lane, "float32", 4),
)  # fmt: skip
# Sums of 64 products in float16 stay within 2**-11 * 64 of the sum of their sizes, and mostly far below.
FLOAT16 = Scheme(
    "float16", "float16", "float16", 8, 8, 2, 16,
    **_by_lanes(8, 8, lambda held, b, a, lane: held + b * _lane(a, lane, 8), "float16"),
    chunk=64,
)  # fmt: skip
MIDDLE_FLOAT16 = Scheme(
    "float16", "float16", "float16", 8, 8, 3, 24,
    **_by_lanes(8, 8, lambda held, b, a, lane: held + b * _lane(a, lane, 8), "float16", 3),
    chunk=64,
)  # fmt: skip
WIDE_FLOAT16 = Scheme(
    "float16", "float16", "float16", 8, 8, 4, 32,
    **_by_lanes(8, 8, lambda held, b, a, lane: held + b * _lane(a, lane, 8), "float16", 4),
    chunk=64,
)  # fmt: skip
DOT = Scheme("int8", "int8", "int32", 16, 4, 2, 8, **_by_lanes(4, 4, _dot, "int32"))
MATRIX = Scheme("int8", "int8", "int32", 16, 2, 4, 8, _multiply_pairs, _put_pairs)
WIDE_MATRIX = Scheme("int8", "int8", "int32", 16, 2, 8, 16, _multiply_pairs, _put_pairs)


@dataclass
class Tile:
    """One tile: the sums of ``rows`` rows of A with a panel of B.

    ``a(i, k)`` is a register of row i from k on; ``b(k, step, number)`` a register of B. ``k`` is a multiple
    of the scheme's elements, ``tail`` gives the registers of A where fewer are left than that.
    """

    code: Code
    scheme: Scheme
    inner: int
    a: Callable[[int, Expr], Expr]
    b: Callable[[Expr, Expr, int], Expr]
    tail: Callable[[int], Expr]

    def run(self, rows: int, out: Any) -> None:
        """Write the sums to ``out``, [rows, width] of int32 or float32."""
        code, scheme = self.code, self.scheme
        whole = self.inner // scheme.elements
        if not scheme.chunk:
            sums = self._zero(rows)
            self._blocks(rows, sums, i64(0), i64(whole))
            self._rest(rows, sums, whole)
            scheme.put(code, sums, rows, out)
            return
        per = scheme.chunk // scheme.elements
        self._clear(rows, out)
        chunks = -(-whole // per)
        with code.loop(chunks) as chunk:
            sums = self._zero(rows)
            first = code.bind(chunk * i64(per))
            count = i64(per) if whole % per == 0 else tirx.min(i64(per), i64(whole) - first)
            self._blocks(rows, sums, first, count)
            scheme.put(code, sums, rows, out)
        if self.inner % scheme.elements:
            sums = self._zero(rows)
            self._rest(rows, sums, whole)
            scheme.put(code, sums, rows, out)

    def run_windows(
        self, rows: int, out: Any, extents: Sequence[int], offset: Callable[[Index], Expr]
    ) -> None:
        """:meth:`run` over all indices below ``extents``, the last of which counts the registers of a run.

        ``a`` is asked for ``offset(index)``, ``b`` for the registers of all runs one after another.
        """
        code, scheme = self.code, self.scheme
        # A run is cut into equal chunks.
        chunks = -(-extents[-1] * scheme.elements // scheme.chunk) if scheme.chunk else 1
        per = -(-extents[-1] // chunks)

        def block(index: list[Expr], sums: list[Any]) -> None:
            where = code.bind(offset(index))
            k = code.bind(flat_index(index, [i64(size) for size in extents]) * i64(scheme.elements))
            self._multiply([code.bind(self.a(i, where)) for i in range(rows)], sums, k)

        def along(index: list[Expr], sums: list[Any]) -> None:
            if not scheme.chunk:
                with code.loop(extents[-1]) as at:
                    block([*index, at], sums)
                return
            with code.loop(-(-extents[-1] // per)) as chunk:
                part = self._zero(rows)
                first = code.bind(chunk * i64(per))
                count = tirx.min(i64(per), i64(extents[-1]) - first)
                with code.loop(count) as at:
                    block([*index, code.bind(first + at)], part)
                scheme.put(code, part, rows, out)

        def inside(index: list[Expr], sums: list[Any]) -> None:
            if len(index) == len(extents) - 1:
                return along(index, sums)
            with code.loop(extents[len(index)]) as at:
                inside([*index, at], sums)

        if scheme.chunk:
            self._clear(rows, out)
            return inside([], [])
        sums = self._zero(rows)
        inside([], sums)
        scheme.put(code, sums, rows, out)

    def _clear(self, rows: int, out: Any) -> None:
        """Zeros, to which sums of chunks are added."""
        zero = broadcast(const(0.0, "float32"), 8)
        for at in range(0, rows * self.scheme.width, 8):
            self.code.vstore(out, at, zero, 8)

    def _zero(self, rows: int) -> list[Any]:
        """A row alone has too few sums to hide latency: every lane gets its own."""
        scheme = self.scheme
        columns = 8 if scheme.sum_type == "float16" else 4
        if scheme.paired:
            count = rows // 2 * scheme.vectors
        else:
            count = 8 if rows == 1 else rows * scheme.vectors
        return self.code.registers(count, columns, scheme.sum_type)

    def _blocks(self, rows: int, sums: list[Any], first: Expr, count: Expr) -> None:
        code, scheme = self.code, self.scheme
        with code.loop(count) as block:
            k = code.bind((first + block) * i64(scheme.elements))
            self._multiply([code.bind(self.a(i, k)) for i in range(rows)], sums, k)

    def _rest(self, rows: int, sums: list[Any], whole: int) -> None:
        scheme = self.scheme
        if self.inner % scheme.elements == 0:
            return
        code = self.code
        with code.loop(1):
            a = [code.bind(self.tail(i)) for i in range(rows)]
            self._multiply(a, sums, i64(whole * scheme.elements))

    def _multiply(self, a: list[Expr], sums: list[Any], k: Expr) -> None:
        self.scheme.multiply(self.code, sums, a, lambda step, number: self.b(k, step, number))
