"""Attention on tensor cores: which kernel takes it, and the kernels around the device code.

attention.flash    tiles of queries by tiles of keys (``flash_hopper.py``, ``flash_ampere.py``), to whose
                   scores a cap and a bias or a mask may be applied (``flash_bias.py``)
attention.decode   few queries: the keys are split over blocks, whose parts a second launch merges
                   (``decode.py``); a cache of int8 or int4 stays so

Taken are heads of halves, of keys and values alike, whose size is a multiple of 8, any number of query heads
to a head of keys, and what is causal, lengths, a flag for each key, one bias or mask of any kind that has all
keys, or all of that at once. Larger heads, windows, and few queries whose keys are not split are
:mod:`netlathe.backends.tvm.cuda.product_attention`'s.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
from tvm import tirx

from netlathe.backends.tvm.cuda import (
    decode,
    decode_merged,
    few,
    flash_ampere,
    flash_bias,
    flash_hopper,
    tensor,
    warpgroup,
)
from netlathe.backends.tvm.cuda.code import GpuCode
from netlathe.backends.tvm.cuda.machine import PROCESSORS, Gpu
from netlathe.backends.tvm.cuda.operands import HALVES
from netlathe.backends.tvm.tir import (
    PARALLEL,
    Expr,
    cast,
    const,
    i64,
    idiv,
    imod,
    known,
    select,
    unflatten,
)
from netlathe.backends.tvm.values import Ready
from netlathe.ir import dims
from netlathe.ir.dims import Dim

if TYPE_CHECKING:
    from netlathe.backends.tvm.kernel import Kernel
    from netlathe.backends.tvm.kernels.attention import Spec
    from netlathe.backends.tvm.values import Store, Value

D = ir.DataType
# Rows (queries by query heads that share keys) up to which the keys are split: where there are few heads, and
# where each of them may have a multiprocessor. Above, tiles fill the GPU.
MOST_ROWS, FEW_ROWS = 64, 16
_CACHED = (
    32 << 20
)  # bytes of keys and values that blocks at work at one time may share in the cache


def suits(machine: Gpu, q: Value, k: Value, v: Value) -> bool:
    """Whether the kernels take heads like these: [b, h, s, d], [b, kv, t, d] and the same.

    Tiles would leave a GPU idle with few queries, which products do not.
    """
    heads, queries, depth = q.shape[1:]
    rows = dims.divide(dims.product((heads, queries)), k.shape[1])
    if isinstance(rows, int) and rows <= FEW_ROWS and not splits_keys(depth):
        return False
    alike = q.dtype == k.dtype == v.dtype and depth == k.shape[3] == v.shape[3]
    most = flash_hopper.MOST_DEPTH if machine.has_wgmma else flash_ampere.MOST_DEPTH
    fits = isinstance(depth, int) and depth % 8 == 0 and 0 < depth <= most
    return alike and q.dtype in HALVES and fits


def splits_keys(depth: Dim) -> bool:
    """Whether few queries have a kernel of their own."""
    return isinstance(depth, int) and depth % 16 == 0


def attention(kernel: Kernel, code: GpuCode, spec: Spec, store: Store) -> str:
    """store([b, h, query, v], element), for a ``spec`` whose mask is plain and whose heads suit."""
    problem = _Problem(kernel, code, spec, store)
    if problem.is_few is True:
        problem.few()
        return "attention.decode"
    if problem.is_few is False:
        problem.many()
    else:
        code.branch(problem.is_few, problem.few, problem.many)
    return "attention.flash"


def _lines(bias: flash_bias.Bias | None) -> tuple[Expr, ...]:
    """Of a bias: elements of a matrix and of a line, and which of them is whose."""
    return (i64(0),) * 5 if bias is None else (bias.sizes[1] * bias.line, bias.line, *bias.by)


class _Problem:
    """What the kernels of one node have in common."""

    def __init__(self, kernel: Kernel, code: GpuCode, spec: Spec, store: Store) -> None:
        assert spec.plain is not None and isinstance(spec.q, Ready)
        self.kernel, self.code, self.spec, self.store = kernel, code, spec, store
        self.plain = spec.plain
        self.dtype = HALVES[spec.q.dtype]
        depth = spec.q.shape[3]
        assert isinstance(depth, int)
        self.depth = depth
        self.batch, self.heads, self.queries = (kernel.size(dim) for dim in spec.q.shape[:3])
        self.keys = kernel.size(spec.k.shape[2])
        self.rows = self.queries * i64(spec.groups)  # that share a head of keys
        self.pairs = self.batch * idiv(self.heads, spec.groups)  # heads of keys, in the whole batch
        self.offset = kernel.size(self.plain.offset)
        self.q = kernel.read(spec.q)
        self.lengths, self.allowed = (
            None if value is None else kernel.read(value)
            for value in (self.plain.lengths, self.plain.allowed)
        )
        if spec.coded is None:
            assert isinstance(spec.k, Ready) and isinstance(spec.v, Ready)
            self.caches: tuple[Any, ...] = (kernel.read(spec.k), kernel.read(spec.v))
        else:
            self.caches = tuple(kernel.read(value) for value in spec.coded)
        self.fresh = self._fresh()
        self.is_few = self._are_few()

    def _fresh(self) -> tuple[Any, Expr] | None:
        """How the kernels in front change the caches: rows from where on, if any, and how many.

        None where that is not known, or lengths are not, before those have ended.
        """
        spec, written = self.spec, self.kernel.lowering.written
        caches = [value for value in spec.coded or (spec.k, spec.v) if isinstance(value, Ready)]
        rows = written.new_rows(caches)
        lengths = self.plain.lengths
        if rows is None or not (lengths is None or written.is_old(lengths)):
            return None
        if not rows:
            return None, i64(0)
        return self.kernel.read(rows[0].first), self.kernel.size(rows[0].count)

    @property
    def adjusted(self) -> tuple[str, bool]:
        """What is done to scores: the type of their bias, if there is one, and whether they have a cap."""
        mask, half = self.plain.mask, self.spec.q.dtype
        return "" if mask is None else flash_bias.kind(mask, half), bool(self.spec.softcap)

    def bias(self, few: bool, align: int, least: int = 1) -> flash_bias.Bias | None:
        """The node's mask as the kernels of few queries, or of many, read it."""
        mask, half, is_few = self.plain.mask, self.spec.q.dtype, self.is_few
        if mask is None:
            return None
        taken = None if isinstance(is_few, bool) else is_few if few else tirx.Not(is_few)
        return flash_bias.bias(self.kernel, self.code, mask, half, align, least, taken)

    def pointer(self, buffer: Any, at: Expr | int = 0) -> Expr:
        """The address of an element; of what is not there, null."""
        return self.code.null() if buffer is None else self.code.address(buffer, at)

    def adjusting(self) -> tuple[Expr, Expr]:
        """What scores are multiplied with, and their cap.

        So weights are powers of 2, or scores what the node says, or, with a cap, exponents of 2 in its tanh.
        """
        scale, cap = self.spec.scale, self.spec.softcap
        if cap:
            scale *= 2 * math.log2(math.e) / cap
        elif self.plain.mask is None:
            scale *= math.log2(math.e)
        return const(scale, "float32"), const(cap, "float32")

    def _are_few(self) -> bool | Expr:
        """Whether keys are split over blocks, if that is known."""
        if not splits_keys(self.depth):
            return False
        number, heads = known(self.rows), self.batch * self.heads
        # Tiles would need a cache of int8 to become halves first.
        idle = const(True, "bool") if self.spec.coded else heads < i64(PROCESSORS)
        if number is None:
            return self.rows <= select(idle, i64(MOST_ROWS), i64(FEW_ROWS))
        if number <= FEW_ROWS or number > MOST_ROWS:
            return number <= FEW_ROWS
        return idle if known(idle) is None else bool(known(idle))

    # -- few queries ----------------------------------------------------------------------------------

    def _shape(self, products: int = 1) -> decode.Shape:
        bits, scale_bits = 16, 16
        if self.spec.coded is not None:
            bits = 4 if len(self.spec.coded) > 4 else 8
            scale_bits = 32 if self.spec.coded[2].dtype == D.FLOAT else 16
        ahead = decode.FAR if self.code.has_wgmma else decode.NEAR
        return decode.Shape(self.depth, bits, scale_bits, products, ahead, *self.adjusted)

    def few(self) -> None:
        """One product where it holds all the rows there are, or heads are large, else two side by side."""
        bias = self.bias(few=True, align=1)
        *fewer, most = (self._shape(count) for count in ((1, 2) if self.depth <= 128 else (1,)))
        fewer = [shape for shape in fewer if self.spec.groups <= shape.rows]
        kernels = [(shape.rows, partial(self._split, shape, bias)) for shape in fewer]
        few.by_rows(self.code, self.rows, kernels, partial(self._split, most, bias))

    def _split(self, shape: decode.Shape, bias: flash_bias.Bias | None) -> None:
        """Parts of the keys over blocks, then the parts' sum."""
        code, groups = self.code, i64(self.spec.groups)
        text = decode.source(shape, self.dtype)

        def named(function: str) -> str:
            return decode.name(shape, self.dtype, function)

        tiles = idiv(self.rows + i64(shape.rows - 1), shape.rows)
        wanted = idiv(i64(PROCESSORS), tirx.max(self.pairs * tiles, i64(1)))
        most = idiv(self.keys + i64(shape.step - 1), shape.step)
        parts = tirx.max(tirx.min(wanted, most), i64(1))
        size = self.pairs * parts * self.rows * i64(shape.partial)
        work = self.kernel.workspace(size, "float32")
        parts = code.given(parts)  # so that blocks ask for their first keys sooner
        own = idiv(self.heads, self.spec.groups)  # heads of keys in a sequence
        grid = self.pairs * tiles * parts
        with code.launch(grid, decode.THREADS, least=1, waits=False) as (block, thread):
            memory = code.alloc([shape.shared_bytes], "uint8", scope="shared.dyn")
            caches = (*self.caches, *(None,) * (6 - len(self.caches)))
            first, fresh = self.fresh or (None, i64(0))
            buffers = (self.q, *caches, self.allowed, self.lengths, first, work)
            pointers = [self.pointer(buffer) for buffer in buffers]
            numbers = (block, parts, groups, own, self.queries, self.keys, self.offset)
            causal = i64(int(self.plain.causal))
            pointers.append(code.null() if bias is None else bias.pointer)
            given = (code.address(memory), *pointers, *self.adjusting(), *numbers, causal, fresh)
            early = "false" if self.fresh is None else "true"
            code.run(named(f"part<{early}>"), text, *given, *_lines(bias))
            if known(parts) in (None, 1):
                with code.when(parts == i64(1)):
                    self._whole(shape, named("result"), text, code.address(memory), block, thread)
        if known(parts) == 1:
            return
        across = -(-self.depth // decode_merged.COLUMNS)
        grid, count = self.pairs * self.rows * i64(across), decode_merged.THREADS
        launch = code.launch(grid, count, waits=False)
        with code.when(parts > i64(1)), launch as (block, thread):
            # Where a result goes is worked out before the wait for the parts.
            sizes = (self.batch, own, groups, self.queries, i64(across))
            b, kv, member, i, left = (code.bind(item) for item in unflatten(block, sizes))
            head = code.bind(kv * groups + member)
            column = code.bind(left * i64(decode_merged.COLUMNS) + thread)
            shared = code.address(code.alloc([decode_merged.SHARED], "float32", scope="shared"))
            place = (self.pointer(work), block, parts, self.rows)
            value = code.bind(code.call(named("merged"), text, "float32", shared, *place))
            there = thread < i64(decode_merged.COLUMNS)
            if self.depth % decode_merged.COLUMNS:
                there = tirx.And(there, column < i64(self.depth))
            with code.when(there):
                self.store(code, [b, head, i, column], value)

    def _whole(
        self, shape: decode.Shape, name: str, text: str, shared: Expr, block: Expr, thread: Expr
    ) -> None:
        """The results of a block that has all keys of a head."""
        code, groups = self.code, i64(self.spec.groups)
        tiles = idiv(self.rows + i64(shape.rows - 1), shape.rows)
        pair, tile = (code.bind(item) for item in unflatten(block, [self.pairs, tiles]))
        b, kv = (
            code.bind(item) for item in unflatten(pair, [self.batch, idiv(self.heads, groups)])
        )
        with code.loop(-(-shape.rows * self.depth // decode.THREADS)) as step:
            at = code.bind(step * i64(decode.THREADS) + thread)
            line, column = code.bind(idiv(at, self.depth)), code.bind(imod(at, self.depth))
            row = code.bind(tile * i64(shape.rows) + line)
            with code.when(tirx.And(line < i64(shape.rows), row < self.rows)):
                value = code.bind(code.call(name, text, "float32", shared, line, column))
                member, i = (code.bind(item) for item in unflatten(row, [groups, self.queries]))
                self.store(code, [b, kv * groups + member, i, column], value)

    def _keys(self, b: Expr) -> tuple[Expr, Expr]:
        """How many keys a sequence has, and how many the first query sees less one."""
        if self.lengths is None:
            return self.keys, self.offset
        own = cast(tirx.BufferLoad(self.lengths, [b]), "int64")
        keys = self.code.bind(tirx.max(tirx.min(own, self.keys), i64(0)))
        return keys, self.code.bind(self.offset + own - self.queries)

    # -- many -----------------------------------------------------------------------------------------

    def many(self) -> None:
        """Tiles of queries."""
        caches = self.caches if self.spec.coded is None else self._expanded()
        machine: Any = self.kernel.lowering.machine
        if machine.has_wgmma:
            with tensor.unless_empty(self.code, self.batch * self.heads * self.queries):
                self._warpgroups(*caches)
        else:
            self._warps(*caches)

    def _expanded(self) -> tuple[Any, Any]:
        """A cache of codes as halves in scratch memory."""
        code, shape = self.code, self._shape()
        text, name = decode.source(shape, self.dtype), decode.name(shape, self.dtype, "widened")
        count = self.pairs * self.keys * i64(self.depth)
        made = []
        for which in range(2):
            codes, scales, *zeros = self.caches[which::2]
            wide = self.kernel.workspace(count, "uint16")
            with code.loop(count, PARALLEL) as at:
                place = (idiv(at, self.depth), imod(at, self.depth))
                held = (codes, scales, zeros[0] if zeros else None)
                pointers = [self.pointer(buffer) for buffer in held]
                code.store(wide, at, code.call(name, text, "uint16", *pointers, *place))
            made.append(wide)
        return made[0], made[1]

    def _warpgroups(self, k: Any, v: Any) -> None:
        """On sm_90a. The grid is as large as the GPU; a block walks over tiles."""
        code, dtype = self.code, self.dtype
        bias = self.bias(few=False, align=16, least=warpgroup.PART)
        shape = flash_hopper.Shape(self.depth, *self.adjusted)
        text = flash_hopper.source(shape, dtype)

        def named(function: str) -> str:
            return flash_hopper.name(shape, dtype, function)

        every, one = self.batch * self.heads, i64(1)
        down = idiv(self.queries + i64(flash_hopper.ROWS - 1), flash_hopper.ROWS)
        tiles = every * down
        grid = tirx.min(tiles, i64(PROCESSORS))
        rounds = idiv(tiles + grid - one, tirx.max(grid, one))
        # Heads worked on at one time: so many that their keys and values stay in the level-2 cache.
        fit = idiv(i64(_CACHED), tirx.max(self.keys, one) * i64(4 * self.depth))
        section = tirx.min(tirx.max(fit, one) * i64(self.spec.groups), tirx.max(every, one))
        rows = tirx.max(self.keys, one)
        width = i64(self.depth)
        maps = [
            tirx.address_of(
                code.tensor_map(
                    code.address(buffer), (width, size, outer), (width, width * size), box, 2
                )
            )
            for buffer, size, outer, box in (
                (self.q, self.queries, every, (64, flash_hopper.ROWS, 1)),
                (k, rows, self.pairs, (64, shape.keys, 1)),
                (v, rows, self.pairs, (64, shape.keys, 1)),
            )
        ]
        added = None
        if bias is not None:
            across, down, matrices = bias.sizes
            added = tirx.address_of(
                code.tensor_map(
                    bias.pointer,
                    (tirx.max(across, one), down, matrices),
                    (bias.line, bias.line * down),
                    (flash_hopper.WIDE // bias.bytes, warpgroup.PART, 1),
                    bias.bytes,
                )
            )
        numbers = (every, self.heads, i64(self.spec.groups), self.queries, self.keys, self.offset)
        with code.launch(grid, flash_hopper.THREADS, least=1) as (_, thread):
            shared = code.address(code.alloc([shape.shared_bytes], "uint8", scope="shared.dyn"))
            causal = i64(int(self.plain.causal))
            problem = (*numbers, causal, self.pointer(self.lengths), section)
            code.run(named("start"), text, shared)

            def copy() -> None:
                code.run(named("produce"), text, shared, *maps, rounds, *problem)
                if bias is not None:
                    code.run(named("produce_bias"), text, shared, added, *bias.by, rounds, *problem)

            def multiply() -> None:
                code.run(named("prepare"), text)
                results = code.alloc([self.depth // 2], "float32")
                state = code.alloc([2], "int32")
                code.store(state, 0, const(0, "int32"))
                code.store(state, 1, const(0, "int32"))
                with code.loop(rounds) as number:
                    places = (code.address(results), code.address(state), number)
                    given = (self.pointer(self.allowed), *self.adjusting())
                    code.run(named("consume"), text, shared, *places, *given, *problem)
                    head = code.bind(code.call(named("tile_head"), text, "int64", number, *problem))
                    top = code.bind(code.call(named("tile_top"), text, "int64", number, *problem))
                    with code.when(head >= i64(0)):
                        self._staged(shape, text, shared, results, thread, head, top)
                code.run(named("finish"), text)

            code.branch(thread < i64(warpgroup.GROUP), copy, multiply)

    def _staged(
        self,
        shape: flash_hopper.Shape,
        text: str,
        shared: Expr,
        results: Any,
        thread: Expr,
        head: Expr,
        top: Expr,
    ) -> None:
        """The results of a tile, through shared memory, as many columns at a time as it has room for."""
        code = self.code

        def named(function: str) -> str:
            return flash_hopper.name(shape, self.dtype, function)

        b, h = (code.bind(item) for item in unflatten(head, [self.batch, self.heads]))
        group = idiv(thread, warpgroup.GROUP) - i64(1)
        top = code.bind(top + group * i64(64))
        for left in range(0, self.depth, shape.columns):
            wide = min(shape.columns, self.depth - left)
            stage = named(f"stage<{wide}>")
            code.run(stage, text, shared, code.address(results, left // 2))
            member = code.bind(cast(code.call(named("member"), text, "int32"), "int64"))
            with code.loop(64 * wide // warpgroup.GROUP) as step:
                at = code.bind(step * i64(warpgroup.GROUP) + member)
                line, within = code.bind(idiv(at, wide)), code.bind(imod(at, wide))
                row = code.bind(top + line)
                with code.when(row < self.queries):
                    value = code.bind(
                        code.call(named("staged"), text, "float32", shared, line, within)
                    )
                    self.store(code, [b, h, row, code.bind(i64(left) + within)], value)
            code.run(named("unstage"), text)

    def _warps(self, k: Any, v: Any) -> None:
        """On sm_80 and later, a block for 64 queries; the longest rows of keys first."""
        code, dtype, depth = self.code, self.dtype, self.depth
        bias = self.bias(few=False, align=8)
        shape = flash_ampere.Shape(depth, *self.adjusted)
        text = flash_ampere.source(shape, dtype)
        down = idiv(self.queries + i64(flash_ampere.ROWS - 1), flash_ampere.ROWS)
        every = self.batch * self.heads
        with code.launch(down * every, flash_ampere.THREADS, least=1) as (block, thread):
            memory = code.alloc([shape.shared_bytes], "uint8", scope="shared.dyn")
            shared = code.address(memory)
            number, b, h = (
                code.bind(item) for item in unflatten(block, [down, self.batch, self.heads])
            )
            top = code.bind((down - i64(1) - number) * i64(flash_ampere.ROWS))
            head = code.bind(b * self.heads + h)
            keys, offset = self._keys(b)
            limit, step = (top + offset + i64(1), 1) if self.plain.causal else (keys, 0)
            pointers = [self.pointer(buffer) for buffer in (self.q, k, v)]
            pointers.append(self.pointer(self.allowed, b * self.keys))
            pointers.append(code.null() if bias is None else bias.pointer)
            matrix, line, by_batch, by_head, by_row = _lines(bias)
            lines = ((b * by_batch + h * by_head) * matrix, line, by_row)
            numbers = (head, idiv(head, self.spec.groups), self.queries, keys, self.keys)
            places = (top, limit, i64(step))
            name = flash_ampere.name(shape, dtype, "attend")
            code.run(name, text, shared, *pointers, *self.adjusting(), *numbers, *places, *lines)
            with code.loop(flash_ampere.ROWS * depth // flash_ampere.THREADS) as part:
                at = code.bind(part * i64(flash_ampere.THREADS) + thread)
                line, column = code.bind(idiv(at, depth)), code.bind(imod(at, depth))
                row = code.bind(top + line)
                with code.when(row < self.queries):
                    name = flash_ampere.name(shape, dtype, "result")
                    value = code.bind(code.call(name, text, "float32", shared, line, column))
                    self.store(code, [b, h, row, column], value)
