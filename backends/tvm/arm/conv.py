"""Convolutions with a constant on ARM: tiles of :mod:`netlathe.backends.tvm.arm.neon`, without im2col.

neon.{float32,float16,dot,matrix}.conv    the schemes of products, A read where it lies

Planes are channels-last, so a row of a window is one run of memory, of its columns times the channels;
of groups, or where columns are skipped, each element of the window is a run of its own. A tile is
neighbouring columns of one output row by a panel of output channels. A run is multiplied in whole registers:

* floats: the copy with the border has channels to whole registers, of zeros;
* bytes: the last register of a run reads on into what follows, times weights of zero. The copy with the
  border has columns to spare for that.

Where this multiplies many zeros, as of the three channels of a stem, the windows of a row of the output are
copied, each with its runs one behind the other, and all panels read the copy.

A window of one element, all of which are taken, is a matrix product
(:mod:`netlathe.backends.tvm.arm.products`). Each function here gives None for what the kernels of every
machine take.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from netlathe.backends.tvm import packing as common
from netlathe.backends.tvm import storage
from netlathe.backends.tvm.arm import neon, packing, products
from netlathe.backends.tvm.arm.neon import ROWS, Scheme, Tile
from netlathe.backends.tvm.kernel import Kernel
from netlathe.backends.tvm.kernels import conv
from netlathe.backends.tvm.kernels.conv import Geometry
from netlathe.backends.tvm.lowering import Lowering
from netlathe.backends.tvm.machine import Machine
from netlathe.backends.tvm.packing import Recipe
from netlathe.backends.tvm.tir import (
    PARALLEL,
    Code,
    Expr,
    Index,
    broadcast,
    cast,
    const,
    dtype_of,
    i64,
    known,
    total,
    unflatten,
)
from netlathe.backends.tvm.values import Pending, Ready, Store, Value
from netlathe.ir import dims
from netlathe.ir.dims import Shape

D = ir.DataType
# Weights of more bytes than this do not stay in a level-2 cache while a row of the output is made.
_CACHED_BYTES = 1 << 18
_WIDER = {
    neon.FLOAT32: (neon.MIDDLE_FLOAT32, neon.WIDE_FLOAT32),
    neon.FLOAT16: (neon.MIDDLE_FLOAT16, neon.WIDE_FLOAT16),
    neon.MATRIX: (neon.WIDE_MATRIX,),
}
# Units that multiply times the cycles that a sum is waited for.
_SUMS = {"cortex-a72": 8, "neoverse-n1": 8, "neoverse-v1": 16}


def by_constant(
    low: Lowering,
    x: Value,
    constant: ir.Value | None,
    geometry: Geometry,
    pads: Sequence[int],
    shape: Shape,
) -> Pending | None:
    """``x`` [b, rows, columns, channels] of floats with a constant kernel of the same type, as ``shape``.

    ``pads`` are those of ONNX: top, left, bottom, right, of zeros.
    """
    scheme = multiplies(low.machine, x.dtype, constant)
    if scheme is None or constant is None or geometry.is_depthwise:
        return None
    return _convolution(low, x, None, constant, geometry, pads, shape, scheme)


def multiplies(machine: Machine, dtype: D, constant: ir.Value | None) -> Scheme | None:
    """The scheme for floats of a type with a constant of theirs; None where they are widened first."""
    if machine.architecture != "aarch64" or constant is None or constant.dtype != dtype:
        return None
    return products.of_floats(machine, dtype)


def by_integers(
    low: Lowering,
    x: Value,
    zero: Value | None,
    constant: ir.Value,
    geometry: Geometry,
    pads: Sequence[int],
    shape: Shape,
) -> Pending | None:
    """``x`` - ``zero`` of 8 bits, channels-last, with a constant kernel of int8, in int32."""
    features = low.machine.features
    if "asimddp" not in features or low.machine.architecture != "aarch64":
        return None
    if geometry.is_depthwise or constant.dtype != D.INT8 or x.dtype not in (D.INT8, D.UINT8):
        return None
    scheme = neon.MATRIX if "i8mm" in features else neon.DOT
    return _convolution(low, x, zero, constant, geometry, pads, shape, scheme)


def _convolution(
    low: Lowering,
    x: Value,
    zero: Value | None,
    constant: ir.Value,
    geometry: Geometry,
    pads: Sequence[int],
    shape: Shape,
    scheme: Scheme,
) -> Pending | None:
    g = geometry
    if g.taps == 1 and g.strides == (1, 1) and not any(pads) and g.groups == 1:
        product = products.Product(low, low.force(x), constant, scheme)
        if scheme.a_type == "int8":
            product.shift_by(zero)
        return product.pending(_result(scheme), shape)
    whole = 8 if scheme.a_type == "float16" else 4
    if g.inputs % whole and g.groups > 1:
        return None
    # Of three channels in float32 the common schedule multiplies no zeros, and copies nothing.
    if g.inputs < 4 and scheme.a_type == "float32":
        return None
    return _Convolution(low, x, zero, constant, geometry, pads, shape, scheme).pending()


def _result(scheme: Scheme) -> D:
    return {"int8": D.INT32, "float32": D.FLOAT, "float16": D.FLOAT16}[scheme.a_type]


@dataclass(frozen=True)
class _Runs:
    """What a window reads: ``extents`` runs of ``blocks`` registers each, of ``length`` elements."""

    extents: tuple[int, ...]
    length: int
    elements: int

    @property
    def blocks(self) -> int:
        """Registers of a run, the last one perhaps partly of something else."""
        return -(-self.length // self.elements)

    @property
    def beyond(self) -> int:
        """Elements that the last register of a run reads behind it."""
        return self.blocks * self.elements - self.length

    @property
    def count(self) -> int:
        """How many runs there are."""
        return self.extents[0] * (self.extents[1] if len(self.extents) > 1 else 1)

    @property
    def registers(self) -> int:
        """Registers of A for each output."""
        return self.count * self.blocks

    @property
    def inner(self) -> int:
        """Elements of A for each output, with those beyond runs."""
        return self.registers * self.elements


class _Convolution:
    """A convolution with a packed constant."""

    def __init__(
        self,
        low: Lowering,
        x: Value,
        zero: Value | None,
        constant: ir.Value,
        geometry: Geometry,
        pads: Sequence[int],
        shape: Shape,
        scheme: Scheme,
    ) -> None:
        assert constant.name is not None  # the IR has no constant without one
        g = geometry
        self.low, self.geometry, self.shape = low, geometry, shape
        columns = shape[2] if isinstance(shape[2], int) else ROWS
        scheme, self.size = _tile(scheme, low.machine, max(columns, 1), g.outputs)
        self.scheme = scheme
        self.count = -(-g.outputs // scheme.width)
        floats = scheme.a_type != "int8"
        taps = (g.kernel[0],) if g.groups == 1 and g.dilations[1] == 1 else g.kernel

        def runs(channels: int) -> _Runs:
            return _Runs(taps, g.taps // math.prod(taps) * channels, scheme.elements)

        whole = -(-g.inputs // scheme.elements) * scheme.elements if floats else g.inputs
        self.channels, self.runs, self.copied = whole, runs(whole), None
        gathered = _Runs((1,), g.taps * g.inputs, scheme.elements)
        # A register is multiplied at least eight times; to copy one takes two instructions.
        saved = (self.runs.registers - gathered.registers) * self.count
        if 4 * saved > self.runs.registers and not self._heavy:
            self.channels, self.runs, self.copied = g.inputs, gathered, runs(g.inputs)
        self.x = self._bordered(x, zero, pads)
        group = scheme.elements // scheme.steps
        numbers = (
            g.groups, self.runs.count, self.channels, self.runs.blocks * scheme.elements,
            self.count, scheme.width, group,
        )  # fmt: skip
        self.weight = low.parameter(
            constant.name,
            scheme.constant,
            (g.groups * self.count * self.runs.inner * scheme.width,),
            Recipe(packing.windows, (constant.name,), numbers),
            (constant, "neon windows", scheme, g),
        )
        self.shift: products.Shift | None = None
        if not floats and (zero is not None or self.x.dtype == D.UINT8):
            sums = low.parameter(
                constant.name,
                D.INT32,
                (g.groups * g.outputs,),
                Recipe(common.dot_sums, (constant.name,), (g.groups, 1)),
                (constant, "sums", g.groups, 1),
            )
            middle = 128 if self.x.dtype == D.UINT8 else 0
            self.shift = products.Shift(zero, middle, sums)

    def _bordered(self, x: Value, zero: Value | None, pads: Sequence[int]) -> Ready:
        """``x`` in memory within a border of ``zero``, with channels and columns to whole registers."""
        top, left, bottom, right = pads
        whole_channels = self.channels * self.geometry.groups
        spare = -(-(self.copied or self.runs).beyond // whole_channels)
        if not any(pads) and not spare and self.channels == self.geometry.inputs:
            return self.low.force(x)
        source = self.low.operand(x)
        b, h, w, _ = x.shape
        whole = (b, dims.add(h, top + bottom), dims.add(w, left + right + spare), whole_channels)
        dtype = storage.computed(x.dtype)

        def border(code: Code) -> Expr:
            if zero is None:
                return const(0, dtype)
            return cast(zero.at(code, [i64(0)] * zero.rank), dtype)

        def build(kernel: Kernel, store: Store) -> str:
            return conv.padded(kernel, source, (top, left), kernel.shape(whole), border, store)

        return self.low.force(Pending(x.dtype, whole, build))

    @property
    def _heavy(self) -> bool:
        """Whether not all weights stay in a cache while the plane goes by."""
        size = self.runs.inner * self.geometry.outputs * self.scheme.constant.itemsize
        return size > _CACHED_BYTES

    def pending(self) -> Pending:
        """The convolution, with a kernel to be written."""
        return Pending(_result(self.scheme), self.shape, self.build)

    def build(self, kernel: Kernel, store: Store) -> str:
        """Write the kernel; its schedule's name."""
        code, scheme, g = kernel.code, self.scheme, self.geometry
        out = kernel.shape(self.shape)
        columns = out[2]

        def lines(size: int) -> None:
            first = self.count if self._heavy else 1  # one panel stays while the plane goes by
            last = 1 if self._heavy or self.copied is not None else self.count
            whole = [i64(g.groups), i64(first), out[0], out[1], i64(last)]
            with code.loop(total(whole), PARALLEL) as task:
                group, outer, b, row, inner = (code.bind(i) for i in unflatten(task, whole))
                line = _Line(self, kernel, store, columns, group, b, row)
                if self.copied is None:
                    line.tiles(size, line.plane(), outer if self._heavy else inner)
                    return
                source = line.copy(self.copied)
                with code.loop(self.count) as panel:
                    line.tiles(size, source, panel)

        def split(first: int, *smaller: int) -> None:
            if not smaller:
                return lines(first)
            code.branch(columns >= i64(first), lambda: lines(first), lambda: split(*smaller))

        number = known(columns)
        if number is not None:
            lines(self.size)
        else:
            split(*(size for size in (ROWS, 4, 1) if size <= scheme.rows))
        return f"neon.{scheme.name}.conv"


@dataclass(frozen=True)
class _Source:
    """Windows: that of a column begins at ``origin`` + column * ``step``, its registers ``offset`` behind."""

    data: Any
    origin: Expr
    step: Expr
    offset: Callable[[Index], Expr]


@dataclass
class _Line:
    """One row of the output."""

    job: _Convolution
    kernel: Kernel
    store: Store
    columns: Expr
    group: Expr
    b: Expr
    row: Expr

    def plane(self) -> _Source:
        """The windows as they lie in the plane."""
        job, code = self.job, self.kernel.code
        g, elements = job.geometry, job.scheme.elements
        _, h, w, c = self.kernel.shape(job.x.shape)
        line = (self.b * h + self.row * i64(g.strides[0])) * w * c

        def offset(index: Index) -> Expr:
            at = index[0] * (w * c * i64(g.dilations[0])) + index[-1] * i64(elements)
            return at + index[1] * (c * i64(g.dilations[1])) if len(index) > 2 else at

        origin = code.bind(line + self.group * i64(g.inputs))
        return _Source(self.kernel.read(job.x), origin, c * i64(g.strides[1]), offset)

    def copy(self, runs: _Runs) -> _Source:
        """The windows one behind the other, and their ``runs`` likewise.

        Whole registers are copied: the next one goes over what the last of a run has too many, and zeros
        behind the last run of a window.
        """
        code, plane = self.kernel.code, self.plane()
        elements, inner = runs.elements, self.job.runs.inner
        dtype = dtype_of(code.vload(plane.data, 0, 1))
        line = code.alloc([self.columns * i64(inner) + i64(elements)], dtype, scope="global")
        with code.loop(self.columns) as column:
            start = code.bind(plane.origin + column * plane.step)
            to = code.bind(column * i64(inner))
            for number, run in enumerate(itertools.product(*map(range, runs.extents))):
                with code.loop(runs.blocks) as block:
                    at = start + plane.offset([*map(i64, run), block])
                    place = to + i64(number * runs.length) + block * i64(elements)
                    code.vstore(line, place, code.vload(plane.data, at, elements), elements)
            if runs.count * runs.length < inner:
                place = to + i64(runs.count * runs.length)
                code.vstore(line, place, broadcast(const(0, dtype), elements), elements)
        return _Source(line, i64(0), i64(inner), lambda index: index[-1] * i64(elements))

    def tiles(self, size: int, source: _Source, panel: Expr) -> None:
        """Tiles of ``size`` columns by a panel; the last one starts early enough to be whole."""
        job, code = self.job, self.kernel.code
        scheme, g, runs = job.scheme, job.geometry, job.runs
        weight = self.kernel.read(job.weight)
        number = self.group * i64(job.count) + panel
        base = code.bind(number * i64(runs.inner * scheme.width))
        held = size + size % 2 if scheme.paired else size  # a pair may be one row twice
        sums = "int32" if scheme.sum_type == "int32" else "float32"
        out = code.alloc([held * scheme.width], sums)

        def register(at: Expr) -> Expr:
            return products.signed(code.vload(source.data, at, scheme.elements), job.x.dtype)

        def b(k: Expr, step: Expr, number: int) -> Expr:
            at = base + k * i64(scheme.width) + step * i64(scheme.vectors * scheme.b_lanes)
            return code.vload(weight, at + i64(number * scheme.b_lanes), scheme.b_lanes)

        def finish(column: Expr, channel: Expr, value: Expr) -> None:
            channel = self.group * i64(g.outputs) + channel
            if job.shift is not None:
                value = job.shift.add(code, channel, value)
            self.store(code, [self.b, self.row, column, channel], value)

        def tile(column: Expr) -> None:
            start = [
                code.bind(source.origin + (column + i64(min(i, size - 1))) * source.step)
                for i in range(held)
            ]

            def a(i: int, k: Expr) -> Expr:
                if not scheme.paired:
                    return register(start[i] + k)
                return neon.pair(register(start[i & ~1] + k), register(start[i | 1] + k), i % 2)

            made = Tile(code, scheme, runs.inner, a, b, lambda i: i64(0))
            made.run_windows(held, out, (*runs.extents, runs.blocks), source.offset)
            products.put_rows(code, size, column, panel, scheme.width, g.outputs, out, finish)

        products.down(code, size, i64(0), self.columns, self.columns, tile)


def _tile(scheme: Scheme, machine: Machine, columns: int, outputs: int) -> tuple[Scheme, int]:
    """The shape of tile, of few or of many channels, and its columns, that takes the least for a row.

    Fewer sums than hide the latency take as long as these. Then loads, of which two of B are one
    instruction, rows to be joined, and loop control count.
    """

    def work(shape: tuple[Scheme, int]) -> int:
        made, size = shape
        held = size + size % 2 if made.paired else size
        sums = held * made.vectors // (2 if made.paired else 1)
        multiplied = max(sums, _SUMS[machine.mcpu]) * made.steps
        joined = held if made.paired else 0
        each = multiplied + joined + size + made.vectors * made.steps // 2 + 2
        return -(-columns // size) * -(-outputs // made.width) * each

    shapes = [scheme, *_WIDER.get(scheme, ())]
    return min(
        ((made, size) for made in shapes for size in range(min(made.rows, columns), 0, -1)),
        key=work,
    )
