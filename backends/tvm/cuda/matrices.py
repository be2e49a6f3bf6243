"""Products of two computed matrices of halves on tensor cores: how both lie in memory.

Copies are of pieces of 16 bytes, so that a line, neighbours in memory, begins at a multiple of that. Which of
the two axes of a matrix lies along lines does not matter, nor how the others lie: a tensor with its axes in
another order is read where it is. One whose lines are no whole pieces gets lines that are filled up: when it
is written, if it is not in memory yet, else by a copy, which, where sizes are known at run time only, is made
if they ask for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir
import sympy
from tvm import tirx

from netlathe.backends.tvm import storage
from netlathe.backends.tvm.cuda import grids, tensor
from netlathe.backends.tvm.cuda.code import GpuCode
from netlathe.backends.tvm.cuda.operands import HALVES
from netlathe.backends.tvm.cuda.tensor import Batch, Finish, Side
from netlathe.backends.tvm.kernel import Kernel
from netlathe.backends.tvm.kernels import general
from netlathe.backends.tvm.lowering import Lowering
from netlathe.backends.tvm.tir import (
    PARALLEL,
    Expr,
    Index,
    const,
    flat_index,
    i64,
    imod,
    known,
    select,
    total,
    unflatten,
)
from netlathe.backends.tvm.values import ChannelsLast, Lazy, Pending, Ready, Store, Value, turned
from netlathe.ir import dims
from netlathe.ir.dims import Dim, Shape

D = ir.DataType
_PIECE = 8  # halves that are copied at one time


@dataclass(frozen=True)
class _Plan:
    """How an operand is going to lie: the elements from one to the next along each of its axes.

    ``source`` is the tensor in memory; where it is None, ``value`` is written so, with its lines filled up. A
    ``loose`` one lies so only if its lines happen to be whole pieces.
    """

    value: Value
    strides: tuple[Dim, ...]
    source: Ready | None = None
    loose: bool = False

    @property
    def unit(self) -> int:
        """The axis along lines: -1 or -2."""
        return -1 if self.strides[-1] == 1 else -2


def product(low: Lowering, a: Value, b: Value, dtype: D, batch: Shape) -> Pending | None:
    """``a`` [..., rows, inner] times ``b`` [..., inner, columns], both of ``dtype``, for each of ``batch``.

    None where they are no halves or not both of that type, there is surely no result, K has fewer than 8, or
    too many dims of the batch are spread over others.
    """
    half, shape = HALVES.get(dtype), (*batch, a.shape[-2], b.shape[-1])
    if half is None or not a.dtype == b.dtype == dtype or 0 in shape:
        return None
    inner = a.shape[-1] if isinstance(a.shape[-1], int) else b.shape[-2]
    if isinstance(inner, int) and inner < _PIECE:
        return None
    plans = [_planned(value) for value in (a, b)]
    steps = [_steps(plan, batch) for plan in plans]
    if steps[0] is None or steps[1] is None:
        return None
    parts = _parts(batch, steps[0], steps[1])
    if len(parts) > tensor.MOST_PARTS:
        return None
    held = [plan.source or _written(low, plan.value) for plan in plans]

    def build(kernel: Kernel, store: Store) -> str:
        code = kernel.code
        assert isinstance(code, GpuCode)
        *count, rows, columns = kernel.shape(shape)
        sizes = (rows, kernel.size(inner), columns)

        def finish(number: Expr) -> Finish:
            where = [code.bind(i) for i in unflatten(number, count)]
            return lambda row, column, value: store(code, [*where, row, column], value)

        def products() -> None:
            sides = [
                _side(
                    kernel,
                    code,
                    plan,
                    ready,
                    [part[1 + i] for part in parts],
                    down=plan.unit == far,
                )
                for i, (plan, ready, far) in enumerate(zip(plans, held, (-2, -1), strict=True))
            ]
            numbered = Batch([kernel.size(part[0]) for part in parts], finish)
            tensor.of_matrices(code, half, sides[0], sides[1], sizes, numbered)

        def zeros() -> None:
            with code.loop(total(kernel.shape(shape)), PARALLEL) as at:
                index = [code.bind(i) for i in unflatten(at, kernel.shape(shape))]
                store(code, index, const(0.0, "float32"))

        with tensor.unless_empty(code, total(kernel.shape(shape))):
            if known(sizes[1]) is None:
                code.branch(sizes[1] > i64(0), products, zeros)
            else:
                products()
        return "gemm.warpgroups" if code.has_wgmma else "gemm.warps"

    return Pending(dtype, shape, build)


def _planned(value: Value) -> _Plan:
    found = turned(value)
    if found is not None:
        source, order = found
        width, unit = source.shape[-1], order.index(source.rank - 1)
        if unit >= len(order) - 2:
            if isinstance(width, int) and width % _PIECE == 0:
                strides = _strides(source.shape)
                return _Plan(value, tuple(strides[axis] for axis in order), source)
            if isinstance(value, Ready) and not isinstance(width, int):
                return _Plan(value, _strides(_filled(value.shape)), source, loose=True)
    return _Plan(value, _strides(_filled(value.shape)))


def _filled(shape: Shape) -> Shape:
    """With lines of whole pieces."""
    width = shape[-1]
    if isinstance(width, int):
        return (*shape[:-1], -(-width // _PIECE) * _PIECE)
    return (*shape[:-1], dims.simplify(_PIECE * sympy.ceiling(sympy.sympify(width) / _PIECE)))


def _strides(shape: Shape) -> tuple[Dim, ...]:
    return tuple(dims.product(shape[axis + 1 :]) for axis in range(len(shape)))


def _steps(plan: _Plan, batch: Shape) -> list[Dim] | None:
    """The elements from one matrix to the next for each dim of ``batch``, 0 where one is for all.

    None where it depends on sizes whether one is.
    """
    extra = len(batch) - (plan.value.rank - 2)
    found: list[Dim] = [0] * extra
    for axis, size in enumerate(batch[extra:]):
        own = plan.value.shape[axis]
        if own != 1 and dims.same(own, size) is not True:
            return None
        found.append(0 if own == 1 else plan.strides[axis])
    return found


def _parts(batch: Shape, a: Sequence[Dim], b: Sequence[Dim]) -> list[tuple[Dim, Dim, Dim]]:
    """Dims of ``batch`` and the steps of both operands; neighbours are one where they are in both."""
    found: list[tuple[Dim, Dim, Dim]] = []
    for size, *steps in zip(batch, a, b, strict=True):
        if size == 1:
            continue
        if found and all(
            before == step == 0
            or (step != 0 and dims.same(before, dims.product((size, step))) is True)
            for before, step in zip(found[-1][1:], steps, strict=True)
        ):
            found[-1] = (dims.product((found[-1][0], size)), steps[0], steps[1])
        else:
            found.append((size, steps[0], steps[1]))
    return found


def _written(low: Lowering, value: Value) -> Ready:
    """``value`` in memory, with its lines filled up; what they are filled with is nobody's."""
    shape = _filled(value.shape)
    if shape == value.shape:
        return low.force(value)
    value = low.force(value) if isinstance(value, ChannelsLast) else value
    kernel = Kernel(low)
    store = general.into(kernel.write(value.dtype, shape), value.dtype, kernel.shape(shape))
    if isinstance(value, Pending):
        return kernel.finish(value.build(kernel, store))[0]
    # Under an index of its own: an element's number would be another one here.
    apart = Lazy(value.dtype, value.shape, value.at)
    return kernel.finish(general.elementwise(kernel, apart, store))[0]


def _side(
    kernel: Kernel, code: GpuCode, plan: _Plan, held: Ready, steps: Sequence[Dim], down: bool
) -> Side:
    buffer = kernel.read(held)
    pointer = code.address(buffer)
    if plan.loose:
        shape, filled = kernel.shape(held.shape), kernel.shape(_filled(held.shape))
        fits = imod(shape[-1], _PIECE) == i64(0)
        copied = kernel.workspace(select(fits, i64(1), total(filled)), storage.STORED[held.dtype])

        def copy(at: Index) -> None:
            value = tirx.BufferLoad(buffer, [flat_index(at, shape)])
            code.store(copied, flat_index(at, filled), value)

        with code.when(tirx.Not(fits)):
            grids.elementwise(code, shape, False, copy)
        both = (tirx.reinterpret("uint64", each) for each in (pointer, code.address(copied)))
        pointer = tirx.reinterpret("handle", select(fits, *both))
    pitch = plan.strides[-1 if plan.unit == -2 else -2]
    return Side(
        pointer,
        kernel.size(pitch),
        down,
        tuple(None if step == 0 else kernel.size(step) for step in steps),
    )
