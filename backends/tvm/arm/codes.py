"""Products of float32 activations with constants that stay codes of 8 or 4 bits: scaled where they are read.

    y = sum over blocks of scale * sum over k in the block of a * (code - zero)

Codes are unsigned bytes; two of 4 bits share one, those of four values of k a register. Few rows: codes
become floats on their way to the multiplication, and a scale is applied to the sum of its block. Eight
rows and more: a task turns its panel of B into floats first, which its rows then share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from tvm import tirx

from netlathe.backends.tvm.arm import neon, packing
from netlathe.backends.tvm.arm.neon import ROWS, Tile
from netlathe.backends.tvm.arm.products import down, put_rows, tasks
from netlathe.backends.tvm.kernel import Kernel
from netlathe.backends.tvm.lowering import Lowering
from netlathe.backends.tvm.packing import Recipe
from netlathe.backends.tvm.tir import Code, Expr, broadcast, cast, const, i64, known, unflatten
from netlathe.backends.tvm.values import Pending, Ready, Store
from netlathe.ir import dims
from netlathe.ir.dims import Shape

D = ir.DataType
WIDTH = 8
# Cores on which interleaving two registers takes three turns of both ports (Cortex-A72 Software
# Optimization Guide, "ASIMD unzip/zip"): there codes are widened and converted.
_SLOW_ZIPS = ("cortex-a72",)
_BITS = {D.INT8: 8, D.UINT8: 8, D.INT4: 4, D.UINT4: 4}


def by_quantized(low: Lowering, a: Ready, node: ir.Node, dtype: D, shape: Shape) -> Pending | None:
    """``a`` [..., K] times what ``node``, a DequantizeLinear of a constant [K, N], makes; None: not here."""
    data, scale, *zeros = node.inputs
    assert data is not None and scale is not None and data.dtype is not None
    if low.machine.architecture != "aarch64" or a.dtype != D.FLOAT or data.dtype not in _BITS:
        return None
    inner, columns = data.shape.numpy()  # type: ignore[union-attr]
    block = node.attributes.get_int("block_size", 0) or 0
    axis = (node.attributes.get_int("axis", 1) or 0) % 2
    single = all(size == 1 for size in scale.shape.numpy())  # type: ignore[union-attr]
    if block and axis == 0:
        if block % 4:
            return None
    elif not single and (block or axis == 0):
        return None
    else:
        block = inner
    zero = zeros[0] if zeros else None
    return _Codes(low, a, data, scale, zero, inner, columns, block).pending(dtype, shape)


class _Codes:
    def __init__(
        self,
        low: Lowering,
        a: Ready,
        data: ir.Value,
        scale: ir.Value,
        zero: ir.Value | None,
        inner: int,
        columns: int,
        block: int,
    ) -> None:
        assert data.dtype is not None
        self.inner, self.columns, self.block = inner, columns, block
        self.bits = _BITS[data.dtype]
        self.a = a.viewed((dims.product(a.shape[:-1]), inner))
        self.lead = a.shape[:-1]
        self.count = -(-columns // WIDTH)
        self.blocks = -(-inner // block)
        self.padded = -(-inner // 4) * 4

        def parameter(value: ir.Value, what: str, dtype: D, size: int, recipe: Recipe) -> Ready:
            assert value.name is not None
            return low.parameter(value.name, dtype, (size,), recipe, (value, "codes", what, block))

        def name(value: ir.Value) -> tuple[str, ...]:
            assert value.name is not None
            return (value.name,)

        size = self.count * self.padded * WIDTH * self.bits // 8
        recipe = Recipe(packing.codes, name(data), (self.count, WIDTH, self.padded, self.bits))
        self.values = parameter(data, "values", D.UINT8, size, recipe)
        size, numbers = self.count * self.blocks * WIDTH, (self.blocks, self.count, WIDTH)
        recipe = Recipe(packing.code_scales, name(scale), numbers)
        self.scales = parameter(scale, "scales", D.FLOAT, size, recipe)
        self.zeros = None
        if zero is not None or data.dtype == D.UINT8 or data.dtype == D.UINT4:
            source = zero if zero is not None else data
            shape = numbers if zero is not None else (*numbers, 1)
            recipe = Recipe(packing.code_zeros, name(source), shape)
            self.zeros = parameter(source, "zeros", D.INT8, size, recipe)

    def pending(self, dtype: D, shape: Shape) -> Pending:
        """The product, with a kernel to be written."""
        return Pending(dtype, shape, self.build)

    def build(self, kernel: Kernel, store: Store) -> str:
        """Write the kernel; its schedule's name."""
        code = kernel.code
        rows = kernel.size(self.a.shape[0])
        lead = kernel.shape(self.lead)
        panel_ = _Panel(self, kernel)

        def finish(row: Expr, column: Expr, value: Expr) -> None:
            store(code, [*unflatten(row, lead), column], value)

        def task(size: int, first: Expr, end: Expr, panel: Expr) -> None:
            out = code.alloc([size * WIDTH], "float32")
            panel_.begin(panel)
            floats = panel_.floats() if size == ROWS else None

            def tile(row: Expr) -> None:
                start = [code.bind((row + i64(i)) * i64(self.inner)) for i in range(size)]
                tails = self._tails(code, panel_.activations, start)

                def a(i: int, k: Expr) -> Expr:
                    return code.vload(panel_.activations, start[i] + k, 4)

                if floats is not None:

                    def b(k: Expr, step: Expr, number: int) -> Expr:
                        return code.vload(floats, (k + step) * i64(WIDTH) + i64(number * 4), 4)

                    made = Tile(code, neon.FLOAT32, self.inner, a, b, tails)
                    made.run(size, out)
                else:
                    panel_.sums(size, a, tails, out)
                put_rows(code, size, row, panel, WIDTH, self.columns, out, finish)

            down(code, size, first, end, rows, tile)

        number = known(rows)
        assert number is None or number >= 0
        tasks(code, rows, self.count, task)
        return "neon.codes"

    def _tails(self, code: Code, buffer: Any, start: list[Expr]) -> Callable[[int], Expr]:
        """The last values of k of every row, with zeros behind them."""
        rest = self.inner % 4
        if not rest:
            return lambda i: i64(0)
        tails = code.alloc([len(start) * 4], "float32")
        for i, at in enumerate(start):
            code.vstore(tails, i * 4, broadcast(const(0.0, "float32"), 4), 4)
            for j in range(rest):
                value = tirx.BufferLoad(buffer, [at + i64(self.inner - rest + j)])
                code.store(tails, i64(i * 4 + j), value)
        return lambda i: code.vload(tails, i * 4, 4)


@dataclass
class _Panel:
    """The panel of a task: its codes as floats, four values of k at a time."""

    job: _Codes
    kernel: Kernel

    def __post_init__(self) -> None:
        job, kernel = self.job, self.kernel
        self.zips = kernel.lowering.machine.mcpu not in _SLOW_ZIPS
        self.activations = kernel.read(job.a)
        self.values, self.scales = kernel.read(job.values), kernel.read(job.scales)
        self.zeros = kernel.read(job.zeros) if job.zeros is not None else None

    def begin(self, panel: Expr) -> None:
        """Let ``panel`` be the one."""
        job, bind = self.job, self.kernel.code.bind
        self.base = bind(panel * i64(job.padded * WIDTH * job.bits // 8))
        self.first = bind(panel * i64(job.blocks * WIDTH))

    def offset(self, block: Expr) -> list[Expr]:
        """What :meth:`four` gives more than code - zero in a block, two registers."""
        code = self.kernel.code
        above = (2.0**23 if self.job.bits == 8 else 128.0) if self.zips else 0.0
        more = [broadcast(const(above + 2 ** (self.job.bits - 1), "float32"), 4)] * 2
        if self.zeros is None:
            return more
        zero = code.vload(self.zeros, self.first + block * i64(WIDTH), WIDTH)
        wide = code.bind(cast(zero, "float32x8"))
        return [code.bind(more[n] + _part(wide, 4 * n, 4)) for n in range(2)]

    def scale(self, block: Expr) -> list[Expr]:
        """The scales of a block, two registers."""
        code = self.kernel.code
        at = self.first + block * i64(WIDTH)
        return [code.bind(code.vload(self.scales, at + i64(n * 4), 4)) for n in range(2)]

    def four(self, k: Expr) -> list[list[Expr]]:
        """Codes of k to k + 3 as floats, two registers each, too large by :meth:`offset`."""
        code = self.kernel.code
        at = code.bind(self.base + k * i64(WIDTH * self.job.bits // 8))
        if self.job.bits == 8:
            pairs = [code.bind(code.vload(self.values, at + i64(16 * i), 16)) for i in range(2)]
        else:
            both = code.bind(code.vload(self.values, at, 16))
            low = both & broadcast(const(15, "uint8"), 16)
            pairs = [code.bind(low), code.bind(both >> broadcast(const(4, "uint8"), 16))]
        make = self._zipped if self.zips else self._widened
        return [make(pair, i) for pair in pairs for i in range(2)]

    def _widened(self, pair: Expr, i: int) -> list[Expr]:
        code = self.kernel.code
        row = code.bind(cast(_part(pair, 8 * i, 8), "uint16x8"))
        wide = [cast(_part(row, 4 * n, 4), "uint32x4") for n in range(2)]
        return [code.bind(cast(half, "float32x4")) for half in wide]

    def _zipped(self, pair: Expr, i: int) -> list[Expr]:
        """Interleaving makes floats without shifts and conversions, each of which one port does.

        A code of 8 bits becomes the last byte of 2**23, one of 4 bits the second of 128.
        """
        code = self.kernel.code
        four = self.job.bits == 4
        fill = broadcast(const(0x43 if four else 0, "uint8"), 16)
        row = code.bind(tirx.reinterpret("uint16x8", _zipped(pair, fill, i, 16)))
        rest = broadcast(const(0 if four else 0x4B00, "uint16"), 8)
        made = [_zipped(rest, row, n, 8) if four else _zipped(row, rest, n, 8) for n in range(2)]
        return [code.bind(tirx.reinterpret("float32x4", half)) for half in made]

    def floats(self) -> Any:
        """The panel as floats in memory, [K, width]."""
        code, job = self.kernel.code, self.job
        made = code.alloc([job.padded * WIDTH], "float32", scope="global")
        with code.loop(job.blocks) as at:
            offset, scale = self.offset(at), self.scale(at)
            with code.loop(self._groups(at, job.padded // 4)) as group:
                k = code.bind(at * i64(job.block) + group * i64(4))
                for i, pair in enumerate(self.four(k)):
                    for n in range(2):
                        where = (k + i64(i)) * i64(WIDTH) + i64(n * 4)
                        code.vstore(made, where, (pair[n] - offset[n]) * scale[n], 4)
        return made

    def _groups(self, block: Expr, whole: int) -> Expr:
        """Fours of k in a block, of ``whole`` in all."""
        per = -(-self.job.block // 4)
        return self.kernel.code.bind(tirx.min(i64(per), i64(whole) - block * i64(per)))

    def sums(
        self, rows: int, a: Callable[[int, Expr], Expr], tail: Callable[[int], Expr], out: Any
    ) -> None:
        """Sums of a few rows to ``out``.

        The offset is taken off the sum of a block, times the sum of its activations; one too large for
        that is taken off at once.
        """
        code, job = self.kernel.code, self.job
        late = job.bits == 4 or not self.zips
        total = code.registers(rows * 2, 4, "float32")
        chains = 4 if rows == 1 else 1
        whole = job.inner // 4
        with code.loop(job.blocks) as at:
            part = code.registers(chains * rows * 2, 4, "float32")
            given = code.registers(rows if late else 0, 4, "float32")
            early = [] if late else self.offset(at)

            def multiply(k: Expr, held: list[Expr]) -> None:
                for i, pair in enumerate(self.four(k)):
                    b = pair if late else [code.bind(pair[n] - early[n]) for n in range(2)]
                    for r in range(rows):
                        for n in range(2):
                            sum_ = part[((i % chains) * rows + r) * 2 + n]
                            value = neon.fused_lane(code.vload(sum_, 0, 4), b[n], held[r], i)
                            code.vstore(sum_, 0, value, 4)
                for r, sum_ in enumerate(given):
                    code.vstore(sum_, 0, code.vload(sum_, 0, 4) + held[r], 4)

            with code.loop(self._groups(at, whole)) as group:
                k = code.bind(at * i64(job.block) + group * i64(4))
                multiply(k, [code.bind(a(r, k)) for r in range(rows)])
            if job.inner % 4:
                with code.when(at == i64(job.blocks - 1)):
                    multiply(i64(whole * 4), [code.bind(tail(r)) for r in range(rows)])
            scale = self.scale(at)
            offset = self.offset(at) if late else []
            for r in range(rows):
                for n in range(2):
                    slot = r * 2 + n
                    value = code.vload(part[slot], 0, 4)
                    for chain in range(1, chains):
                        value = value + code.vload(part[chain * rows * 2 + slot], 0, 4)
                    if late:
                        value = value - offset[n] * _sum_of(code.vload(given[r], 0, 4))
                    held = code.vload(total[slot], 0, 4)
                    code.vstore(total[slot], 0, held + value * scale[n], 4)
        for slot, held in enumerate(total):
            code.vstore(out, slot * 4, code.vload(held, 0, 4), 4)


def _sum_of(vector: Expr) -> Expr:
    """The sum of four lanes, in each of four."""
    parts: list[Expr] = [tirx.Shuffle([vector], [tirx.IntImm("int32", i)]) for i in range(4)]
    return broadcast((parts[0] + parts[1]) + (parts[2] + parts[3]), 4)


def _zipped(first: Expr, second: Expr, half: int, lanes: int) -> Expr:
    """Lanes of two vectors in turn; ``half`` 0 takes the lower halves."""
    start = half * lanes // 2
    places = [place for i in range(start, start + lanes // 2) for place in (i, lanes + i)]
    return tirx.Shuffle([first, second], [tirx.IntImm("int32", place) for place in places])


def _part(vector: Expr, start: int, count: int) -> Expr:
    return tirx.Shuffle([vector], [tirx.IntImm("int32", start + i) for i in range(count)])
