"""Operators on whole rows: each row is computed once into a scratch row that stays in the cache.

rows.softmax, rows.log_softmax, rows.layer_norm, rows.rms_norm: rows in parallel, vectors along them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx

from netlathe.backends.tvm import mathfn
from netlathe.backends.tvm.cuda import grids
from netlathe.backends.tvm.cuda.code import GpuCode
from netlathe.backends.tvm.kernel import Kernel
from netlathe.backends.tvm.kernels.general import vectors
from netlathe.backends.tvm.kernels.reduce import COMBINE, row
from netlathe.backends.tvm.tir import (
    PARALLEL,
    Code,
    Expr,
    Index,
    cast,
    const,
    total,
    unflatten,
)
from netlathe.backends.tvm.values import Store, Value

# (code, row index, position in the row, element) -> None
Finish = Callable[[Code, Index, Expr, Expr], None]


class _Row:
    """One row in scratch memory."""

    def __init__(self, code: Code, length: Expr, lanes: int, dtype: str) -> None:
        self.code, self.length, self.lanes, self.dtype = code, length, lanes, dtype
        self.buffer = code.alloc([length], dtype, scope="global")

    def get(self, j: Expr) -> Expr:
        return tirx.BufferLoad(self.buffer, [j])

    def combined(self, kind: str, element: Callable[[Expr], Expr]) -> Expr:
        return row(
            self.code,
            [self.length],
            self.lanes,
            self.dtype,
            COMBINE[kind],
            lambda at: element(at[0]),
        )

    def put(self, j: Expr, value: Expr) -> Expr:
        """Store, and the stored value."""
        value = self.code.bind(value)
        self.code.store(self.buffer, j, value)
        return value


def _each_row(
    kernel: Kernel, lead: list[Expr], length: Expr, dtype: str, body: Callable[[_Row, Index], None]
) -> None:
    code = kernel.code
    lanes = kernel.lowering.machine.lanes(dtype)
    with code.loop(total(lead), PARALLEL) as at:
        index = [code.bind(i) for i in unflatten(at, lead)]
        body(_Row(code, length, lanes, dtype), index)


def softmax(
    kernel: Kernel, x: Value, lead: list[Expr], length: Expr, dtype: str, log: bool, store: Store
) -> str:
    """Softmax or its logarithm along the last axis; the largest element is taken off first."""
    code = kernel.code
    if isinstance(code, GpuCode) and code.on_host:
        return grids.softmax(code, x, lead, length, dtype, log, COMBINE, store)

    def body(line: _Row, index: Index) -> None:
        largest = line.combined("max", lambda j: line.put(j, x.at(code, [*index, j])))

        def power(j: Expr) -> Expr:
            shifted = line.get(j) - largest
            value = mathfn.exp(code, shifted)
            if log:
                line.put(j, shifted)
                return value
            return line.put(j, value)

        whole = line.combined("sum", power)
        if log:
            offset = code.bind(mathfn.log(code, whole))
            finish: Callable[[Expr], Expr] = lambda j: line.get(j) - offset  # noqa: E731
        else:
            factor = code.bind(const(1, dtype) / whole)
            finish = lambda j: line.get(j) * factor  # noqa: E731
        vectors(code, length, line.lanes, lambda j: store(code, [*index, j], finish(j)))

    _each_row(kernel, lead, length, dtype, body)
    return "rows.log_softmax" if log else "rows.softmax"


def normalize(
    kernel: Kernel,
    x: Callable[[Code, Index, Expr], Expr],
    lead: list[Expr],
    length: Expr,
    dtype: str,
    epsilon: float,
    centred: bool,
    finish: Finish,
    constants: Sequence[tuple[Any, int]] = (),
) -> str:
    """(x - mean) / sqrt(variance + epsilon), or without the mean x / sqrt(mean square + epsilon).

    ``constants`` are vectors as long as a row that ``finish`` reads, with the bytes of an element each.
    """
    code = kernel.code
    if isinstance(code, GpuCode) and code.on_host:
        how = (dtype, epsilon, centred, COMBINE, finish, constants)
        return grids.normalize(code, x, lead, length, *how)

    def body(line: _Row, index: Index) -> None:
        count = cast(length, dtype)

        def load(j: Expr) -> Expr:
            return line.put(j, x(code, index, j))

        if centred:
            mean = code.bind(line.combined("sum", load) / count)

            def centre(j: Expr) -> Expr:
                value = line.put(j, line.get(j) - mean)
                return value * value

            square = line.combined("sum", centre)
        else:

            def squared(j: Expr) -> Expr:
                value = load(j)
                return value * value

            square = line.combined("sum", squared)
        deviation = tirx.sqrt(square / count + const(epsilon, dtype))
        factor = code.bind(const(1, dtype) / deviation)
        vectors(code, length, line.lanes, lambda j: finish(code, index, j, line.get(j) * factor))

    _each_row(kernel, lead, length, dtype, body)
    return "rows.layer_norm" if centred else "rows.rms_norm"
