"""The builder of TIR where loops run on a GPU: a parallel loop becomes a grid of threads.

The outermost loop of a kernel that any template or operator writes must be parallel, or of one step;
each becomes a launch of its own, in the order they are written. Inside, loops are serial: a thread is a
task. Kernels that let threads work together open their grid themselves (:meth:`GpuCode.launch`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tvm import sym, tirx
from tvm.backend.cuda.op import cuda_func_call
from tvm.ir import PointerType, PrimType

from netlathe.backends.tvm.tir import (
    _ON_STACK,
    PARALLEL,
    SERIAL,
    VECTORIZED,
    Code,
    Expr,
    Index,
    _body,
    cast,
    dtype_of,
    i64,
    idiv,
    imod,
    known,
    plain,
    substituted,
)

if TYPE_CHECKING:
    from netlathe.backends.tvm.kernel import Kernel

UNROLLED = tirx.ForKind.UNROLLED
THREADS = 256  # of a block, where nothing else is asked for


class GpuCode(Code):
    """:class:`Code` for a GPU. Outside of a grid there is only the host: it can compute sizes."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel)
        self._task: tuple[Expr, Expr] | None = (
            None  # number and count of the tasks of the open grid
        )
        # What the open loop over lanes stores: the buffer, the position by lane, the values.
        self._leaving: list[tuple[Any, Expr, Any]] = []
        self._open = 0  # blocks that were open when that loop began

    @property
    def has_wgmma(self) -> bool:
        """Whether the kernel is for sm_90a alone."""
        machine: Any = self.kernel.lowering.machine
        return bool(machine.has_wgmma)

    @property
    def is_alone(self) -> bool:
        """On sm_90a kernels in front may still write when this one starts: see :meth:`launch`.

        Behind pointers that nothing else is said to reach nvcc reads by ld.global.nc, for all time the same,
        and ptxas moves such loads in front of griddepcontrol.wait.
        """
        return not self.has_wgmma

    @property
    def on_host(self) -> bool:
        """Whether no grid is open, so that one can be."""
        return not self._loops

    def bind(self, value: Expr, cost: int = 0) -> Expr:
        """A name inside a grid; on the host the expression itself, since it may size scratch memory.

        So are bytes in a loop over lanes: TVM has no vector of one repeated byte for nvcc.
        """
        is_byte = self._lane is not None and dtype_of(value) in ("int8", "uint8")
        return super().bind(value, cost) if self._loops and not is_byte else plain(value)

    @contextlib.contextmanager
    def loop(self, extent: int | Expr, kind: Any = SERIAL) -> Iterator[Expr]:
        """for index in range(extent); the outermost one is a grid with a thread for each index."""
        if self._loops:
            with super().loop(extent, UNROLLED if kind == VECTORIZED else SERIAL) as var:
                yield var
            return
        assert kind == PARALLEL or known(extent) == 1, "a kernel's outermost loop is not parallel"
        count = i64(extent)
        with self.launch(idiv(count + i64(THREADS - 1), THREADS), THREADS) as (block, thread):
            index = self.bind(block * i64(THREADS) + thread)
            self._task = (index, count)
            with self.when(index < count):
                yield index
            self._task = None

    @contextlib.contextmanager
    def lanes(self, count: int) -> Iterator[Expr]:
        """A thread's loop over neighbouring elements: what is next to each other moves at one time.

        That is so where TVM sees that the first one's position in its buffer is a multiple of ``count``: an
        expression such as ``n * 4``, which no name hides. Where it depends on sizes, they decide at run time.
        """
        if count == 1:
            yield i64(0)
            return
        before, self._leaving = self._leaving, []
        with super().loop(count, VECTORIZED) as lane:
            self._open = len(self._blocks)
            yield lane
        leaving, self._leaving = self._leaving, before
        for buffer, position, held in leaving:
            first, second = (substituted(position, {lane: i64(n)}) for n in (0, 1))
            size = count * np.dtype(str(buffer.dtype)).itemsize

            def together(
                buffer: Any = buffer, held: Any = held, first: Expr = first, size: int = size
            ) -> None:
                pointers = (self.address(buffer, first), self.address(held))
                self.run(f"netlathe_put<{size}>", _PUT, *pointers)

            def apart(buffer: Any = buffer, held: Any = held, position: Expr = position) -> None:
                with self.loop(count, VECTORIZED) as each:
                    value = tirx.BufferLoad(held, [each])
                    super(GpuCode, self).store(buffer, substituted(position, {lane: each}), value)

            sizes = {size: size * i64(count) for size in self.kernel.sizes}
            if size < 4 or known(sym.Analyzer().simplify(second - first)) != 1:
                apart()
            elif _is_multiple(first, count):
                together()
            elif _is_multiple(
                substituted(first, sizes), count
            ):  # it depends on the sizes there are
                self.branch(imod(first, count) == i64(0), together, apart)
            else:
                apart()

    def store(self, buffer: Any, index: Expr | Index, value: Expr) -> None:
        """Store one element; in a loop over lanes all of them when it has ended, unless a condition is open.

        The type of a vector says nothing of its alignment to nvcc, which then writes element by element.
        """
        if self._lane is None or buffer.scope() != "global" or len(self._blocks) > self._open:
            super().store(buffer, index, value)
            return
        lane, lanes, hoisted = self._lane
        held = self._scratch([lanes], str(buffer.dtype))
        hoisted.append(tirx.AllocBuffer(held, _ON_STACK))
        super().store(held, lane, value)
        (position,) = index if isinstance(index, (list, tuple)) else (index,)
        self._leaving.append((buffer, position, held))

    @contextlib.contextmanager
    def launch(
        self, blocks: Expr, threads: int, cluster: int = 1, least: int = 0, waits: bool = True
    ) -> Iterator[tuple[Expr, Expr]]:
        """A grid of blocks; what is written inside runs in every thread: (block, thread) in int64.

        Of no blocks none is launched.
        ``cluster`` blocks of the grid run side by side; at least ``least`` of them fit a multiprocessor. On
        sm_90a a grid may start before the one in front of it has ended. It waits for that first of all,
        or, without ``waits``, where its own code does, before it touches what another kernel writes or reads.
        """
        grid, lane = (tirx.Var(self.var("int32", stem).name, "int32") for stem in ("b", "t"))
        self._loops += 1
        with self._block() as statements:
            if waits:
                self.follow()
            yield cast(grid, "int64"), cast(lane, "int64")
        self._loops -= 1
        body = _body(statements)
        if least:
            bound = "tirx.launch_bounds_min_blocks_per_sm"
            body = tirx.AttrStmt(tirx.IntImm("int32", 0), bound, tirx.IntImm("int32", least), body)
        launched = [
            (lane, "threadIdx.x", tirx.IntImm("int32", threads)),
            (grid, "blockIdx.x", cast(blocks, "int32")),
        ]
        if cluster > 1:
            member = tirx.Var(self.var("int32", "m").name, "int32")
            launched.insert(1, (member, "clusterCtaIdx.x", tirx.IntImm("int32", cluster)))
        for var, tag, extent in launched:
            no_range: Any = None  # the annotation forgets that a thread's axis has none
            axis = tirx.IterVar(no_range, var, tirx.IterVar.ThreadIndex, tag)
            body = tirx.AttrStmt(axis, "thread_extent", extent, body)
        # TVM launches a block where there would be none.
        self.emit(body if known(blocks) else tirx.IfThenElse(blocks > i64(0), body, None))

    def follow(self) -> None:
        """Wait for the grids in front, and let the one behind start: see :meth:`launch`."""
        if self.has_wgmma:
            self.run("netlathe_follow", _FOLLOW)

    def ahead(self, buffer: Any, at: Expr) -> None:
        """Ask for an element of a constant, before it is read: it may be far away in memory."""
        self.run("netlathe_ahead", _AHEAD, self.address(buffer, at))

    def alloc(self, shape: Sequence[int | Expr], dtype: str, scope: str = "local") -> Any:
        """Scratch memory: ``local`` of a thread, ``shared`` by a block.

        ``global``, of sizes known at run time, is a part for each task of a workspace that the
        caller of the kernel provides.
        """
        dims = [i64(dim) for dim in shape]
        if scope != "global":
            self._count += 1
            buffer = tirx.decl_buffer(dims, dtype, f"scratch{self._count}", scope=scope)
            self.emit(tirx.AllocBuffer(buffer, _ON_STACK))
            return buffer
        if all(known(dim) is not None for dim in dims):
            return self.alloc(shape, dtype)
        assert self._task is not None
        task, count = self._task
        size = i64(1)
        for dim in dims:
            size = size * dim
        whole = self.kernel.workspace(size * count, dtype)
        self._count += 1
        pointer = tirx.Var(f"own{self._count}", PointerType(PrimType(dtype), "global"))
        self.emit(tirx.Bind(pointer, tirx.address_of(tirx.BufferLoad(whole, [task * size]))))
        buffer = tirx.decl_buffer([size], dtype, f"scratch{self._count}", data=pointer)
        self.emit(tirx.DeclBuffer(buffer, data=pointer))
        return buffer

    # -- threads that work together -----------------------------------------------------------------

    def barrier(self) -> None:
        """Wait for all threads of the block."""
        self.emit(tirx.Evaluate(tirx.call_intrin("", "tirx.tvm_storage_sync", "shared")))

    def call(self, name: str, source: str, dtype: str, *arguments: Expr) -> Expr:
        """A call of the device function ``name``, which ``source`` defines, as an expression."""
        return cuda_func_call(name, *arguments, source_code=source, return_type=dtype)

    def run(self, name: str, source: str, *arguments: Expr) -> None:
        """A call of a device function that gives nothing back."""
        self.emit(
            tirx.Evaluate(cuda_func_call(name, *arguments, source_code=source, return_type="void"))
        )

    def tensor_map(
        self,
        pointer: Expr,
        sizes: Sequence[Expr],
        strides: Sequence[Expr],
        box: Sequence[int | Expr],
        bytes_: int,
        swizzled: bool = True,
        steps: Sequence[int] | None = None,
    ) -> Expr:
        """A descriptor of the array at ``pointer`` for copies of ``box``, made on the host.

        The innermost dim is first; it has no stride, those of the others are in elements of ``bytes_`` bytes.
        Of a dim whose ``steps`` are n only every n-th element of the box is copied. A box is written to
        shared memory row by row, ``swizzled`` as rows of 128 bytes with the 128-byte swizzle; zeros stand
        for what lies outside of the array.
        """
        self._count += 1
        made = tirx.Var(f"map{self._count}", PointerType(tirx.TensorMapType()))
        self.emit(tirx.Bind(made, tirx.tvm_stack_alloca("tensormap", 1)))
        encode = tirx.tensormap_encode_tiled(
            made,
            pointer,
            *sizes,
            *(stride * i64(bytes_) for stride in strides),
            *(i64(size) for size in box),
            *(i64(step) for step in steps or (1,) * len(box)),
            descriptor_dtype={1: "uint8", 2: "uint16", 4: "uint32"}[bytes_],
            rank=len(box),
            swizzle=3 if swizzled else 0,
            l2_promotion=2,
        )
        self.emit(tirx.Evaluate(encode))
        return made

    def address(self, buffer: Any, at: int | Expr = 0) -> Expr:
        """A pointer to an element of a buffer."""
        return tirx.address_of(tirx.BufferLoad(buffer, [i64(at)]))

    def given(self, value: Expr) -> Expr:
        """A number that the host works out for the kernels behind, which would divide in every thread."""
        if known(value) is not None:
            return value
        made = self.var("int64", "given")
        self.emit(tirx.Bind(made, value))
        return made

    def null(self) -> Expr:
        """A pointer to nothing."""
        return self.call("netlathe_null", _NULL, "handle")

    def shuffled(self, value: Expr, mask: int) -> Expr:
        """The value that the thread whose number differs in ``mask`` holds, within a warp."""
        return self._exchanged("netlathe_exchange", _EXCHANGE, value, tirx.IntImm("int32", mask))

    def broadcasted(self, value: Expr, lane: Expr) -> Expr:
        """The value that thread ``lane`` of the warp holds."""
        return self._exchanged("netlathe_broadcast", _BROADCAST, value, cast(lane, "int32"))

    def function(self, name: str, x: Expr) -> Expr:
        """CUDA's function ``name`` of a float32."""
        source = (
            f"__device__ __forceinline__ float netlathe_{name}(float x) {{ return {name}(x); }}"
        )
        return self.bind(self.call(f"netlathe_{name}", source, "float32", x))

    def reciprocal(self, x: Expr) -> Expr:
        """1 / x of a float32 within 1 ulp: one instruction.

        A division has a branch for what is out of its range, and no load is moved in front of that.
        """
        return self.bind(self.call("netlathe_reciprocal", _RECIPROCAL, "float32", x))

    def bfloat16(self, value: Expr) -> Expr:
        """A float32 as the bits of a bfloat16, to nearest even: one instruction."""
        return self.call("netlathe_bfloat16", _BFLOAT16, "uint16", value)

    def _exchanged(self, name: str, source: str, value: Expr, other: Expr) -> Expr:
        dtype = dtype_of(value)
        narrow = dtype == "bool" or dtype.endswith(("8", "16"))  # warps exchange whole registers
        wide = "int32" if narrow else dtype
        # Under a name: inside a condition not every thread would take part.
        return cast(self.bind(self.call(name, source, wide, cast(value, wide), other)), dtype)


def _is_multiple(position: Expr, count: int) -> bool:
    """Whether it is surely one of ``count``."""
    found: Any = sym.Analyzer().modular_set(position)
    return bool(found.coeff % count == 0 and found.base % count == 0)


_AHEAD = """
__device__ __forceinline__ void netlathe_ahead(const void* line) {
  asm volatile("prefetch.global.L1 [%0];" ::"l"(line));
}
"""
_FOLLOW = """
__device__ __forceinline__ void netlathe_follow() {
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
}
"""
_PUT = """
#ifndef NETLATHE_PUT
#define NETLATHE_PUT
template <int kBytes> __device__ __forceinline__ void netlathe_put(void* to, const void* from) {
  if constexpr (kBytes == 4) {
    *static_cast<uint32_t*>(to) = *static_cast<const uint32_t*>(from);
  } else if constexpr (kBytes == 8) {
    *static_cast<uint64_t*>(to) = *static_cast<const uint64_t*>(from);
  } else {
    static_assert(kBytes % 16 == 0);
    const uint64_t* part = static_cast<const uint64_t*>(from);
#pragma unroll
    for (int i = 0; i < kBytes / 8; i += 2)
      asm volatile("st.global.v2.b64 [%0], {%1, %2};"
                   ::"l"(static_cast<uint64_t*>(to) + i), "l"(part[i]), "l"(part[i + 1]) : "memory");
  }
}
#endif
"""
_NULL = """
__device__ __forceinline__ void* netlathe_null() { return nullptr; }
"""
_BFLOAT16 = """
__device__ __forceinline__ uint16_t netlathe_bfloat16(float value) {
  uint32_t bits;  // of two: for one alone ptxas may take an instruction that is several times slower
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(0.0f), "f"(value));
  return (uint16_t)bits;
}
"""
_RECIPROCAL = """
__device__ __forceinline__ float netlathe_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
"""
_EXCHANGE = """
template <typename T> __device__ __forceinline__ T netlathe_exchange(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
"""
_BROADCAST = """
template <typename T> __device__ __forceinline__ T netlathe_broadcast(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
"""
