"""Values while they are lowered: in memory, an expression that is not computed yet, or a pending kernel.

Whatever has one reader is not written to memory: an elementwise or movement operator becomes an
expression of its operands (:class:`Lazy`) and ends up inside the kernel that reads it; what follows
a matrix product, one element at a time, is appended to the product's own kernel (:class:`Pending`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import onnx_ir as ir
from tvm import tirx

from netlathe.backends.tvm import storage
from netlathe.backends.tvm.kernel import Kernel
from netlathe.backends.tvm.tir import NAMED, Code, Expr, Index, flat_index, i64, known, select
from netlathe.ir import dims
from netlathe.ir.dims import Dim, Shape

# at(code, index) -> the element, computed by the kernel that `code` belongs to
Element = Callable[[Code, Index], Expr]
# store(code, index, element): what a pending kernel does with each of its results
Store = Callable[[Code, Index, Expr], None]
# dims, and what a kernel does for every index into them
Section = tuple[list[Expr], Callable[[Index], None]]


@dataclass(eq=False)
class Value:
    """``dtype`` and ``shape`` as the type inference derived them."""

    dtype: ir.DataType
    shape: Shape

    @property
    def rank(self) -> int:
        """Number of dims."""
        return len(self.shape)

    def at(self, code: Code, index: Index) -> Expr:
        """The element at ``index``, in the type it is computed with."""
        raise NotImplementedError

    @property
    def is_one(self) -> bool:
        """Whether there is exactly one element, for all sizes."""
        return all(dim == 1 for dim in self.shape)


@dataclass(eq=False)
class Ready(Value):
    """A tensor in memory, contiguous. ``shape`` may be another view of it than ``stored_shape``."""

    var: Any = None  # the relax variable
    stored_shape: Shape = ()

    def at(self, code: Code, index: Index) -> Expr:
        """Load one element; a single index into a tensor of several dims counts its elements."""
        buffer = code.kernel.read(self)
        if len(index) == 1 and self.rank != 1:
            position = index[0]
        else:
            position = flat_index(index, code.kernel.shape(self.shape))
        return code.remembered(
            self,
            index,
            lambda: storage.load(code, self.dtype, tirx.BufferLoad(buffer, [position])),
            NAMED,
        )

    def viewed(self, shape: Shape) -> Ready:
        """The same elements in the same order under another shape."""
        return replace(self, shape=shape)


@dataclass(eq=False)
class Scalar(Value):
    """A constant with one element, written into the kernels that read it."""

    value: Any = 0

    def at(self, code: Code, index: Index) -> Expr:
        """The literal."""
        return tirx.const(self.value, storage.computed(self.dtype))


@dataclass(eq=False)
class Lazy(Value):
    """An expression. ``flat``: may be indexed by element number, because every operand has this very
    shape or one element. ``cheap``: costs no more than a load. ``unit``: neighbours along the last
    axis are neighbours in memory. ``along``: they are along this other axis. ``turned``: a tensor in memory,
    and the order in which its axes are those of this.
    """

    element: Element = field(default=lambda code, index: i64(0))
    flat: bool = False
    cheap: bool = False
    unit: bool = False
    cost: int = 1  # operators in the expression
    along: int | None = None
    turned: tuple[Ready, tuple[int, ...]] | None = None

    def at(self, code: Code, index: Index) -> Expr:
        """Compute one element, once per index and block."""
        return code.remembered(
            self,
            index,
            lambda: storage.rounded(code, self.dtype, self.element(code, index)),
            self.cost,
        )


@dataclass(eq=False)
class Known(Value):
    """A small integer tensor whose elements are sizes known by name: nothing is computed."""

    contents: tuple[Dim, ...] = ()

    def at(self, code: Code, index: Index) -> Expr:
        """The element, chosen by position."""
        dtype = storage.computed(self.dtype)
        items = [code.kernel.size(dim) for dim in self.contents]
        position = index[0] if index else i64(0)
        number = known(position)
        if number is not None:
            return _as(items[number], dtype)
        result = items[-1]
        for number in range(len(items) - 2, -1, -1):
            result = select(position == i64(number), items[number], result)
        return code.remembered(self, index, lambda: _as(result, dtype))


def _as(expr: Expr, dtype: str) -> Expr:
    return expr if dtype == "int64" else tirx.Cast(dtype, expr)


@dataclass(eq=False)
class Pending(Value):
    """A kernel that is not written yet: ``build`` writes it and hands every result to ``store``.

    What follows elementwise or moves elements one to one is appended with :meth:`then`, until the
    value is needed in memory.
    """

    build: Callable[[Kernel, Store], str] = field(default=lambda kernel, store: "")

    def then(
        self,
        function: Callable[[Code, Index, Expr], Expr],
        dtype: ir.DataType,
        shape: Shape | None = None,
        index: Callable[[Index], Index] | None = None,
    ) -> Pending:
        """The kernel with ``function`` applied to each result, stored at ``index`` of ``shape``.

        ``function`` sees the index in the new shape.
        """

        def build(kernel: Kernel, store: Store) -> str:
            def store_result(code: Code, at: Index, element: Expr) -> None:
                moved = at if index is None else index(at)
                store(code, moved, storage.rounded(code, dtype, function(code, moved, element)))

            return self.build(kernel, store_result)

        return Pending(dtype, self.shape if shape is None else shape, build)

    def at(self, code: Code, index: Index) -> Expr:
        """Not before it is in memory."""
        raise AssertionError("a pending kernel is read before it is written")


@dataclass(eq=False)
class Joinable(Pending):
    """A product that may be one kernel with another of the same left operand.

    ``paired(other)`` is that kernel, which gives both elements to its store; None where there is none. What
    was appended since is ``after`` each element.
    """

    operands: object = None
    paired: Callable[[Joinable], Pending | None] = field(default=lambda other: None)
    after: Callable[[Code, Index, Expr], Expr] = field(default=lambda code, index, element: element)

    def then(
        self,
        function: Callable[[Code, Index, Expr], Expr],
        dtype: ir.DataType,
        shape: Shape | None = None,
        index: Callable[[Index], Index] | None = None,
    ) -> Pending:
        """As of any; one that is computed at the same place can still be joined."""
        made = super().then(function, dtype, shape, index)
        if shape is not None or index is not None:
            return made

        def after(code: Code, at: Index, element: Expr) -> Expr:
            return storage.rounded(code, dtype, function(code, at, self.after(code, at, element)))

        return replace(self, dtype=dtype, build=made.build, after=after)

    def joined(
        self,
        other: Joinable,
        function: Callable[[Code, Index, Expr, Expr], Expr],
        dtype: ir.DataType,
    ) -> Pending | None:
        """One kernel that stores ``function`` of an element of each; None where it takes two."""
        both = self.paired(other) if type(self.operands) is type(other.operands) else None
        if both is None:
            return None
        whole = both

        def build(kernel: Kernel, store: Store) -> str:
            def store_both(code: Code, index: Index, *elements: Expr) -> None:
                each = (
                    p.after(code, index, e) for p, e in zip((self, other), elements, strict=True)
                )
                store(code, index, storage.rounded(code, dtype, function(code, index, *each)))

            return whole.build(kernel, store_both)

        return Pending(dtype, self.shape, build)


@dataclass(eq=False)
class Normed(Pending):
    """RMSNormalization of ``x`` over its last axis, which products that read it may do themselves.

    ``gain`` is a constant as long as a row. Whoever else reads it forces a kernel of its own, as of any.
    """

    x: Ready = field(default_factory=lambda: Ready(ir.DataType.UNDEFINED, ()))
    gain: Ready = field(default_factory=lambda: Ready(ir.DataType.UNDEFINED, ()))
    epsilon: float = 0.0


@dataclass(frozen=True)
class Rows:
    """Neighbours along axis 2 of a [b, h, t, d]: ``count`` from ``first``, an int64 [b], on."""

    first: Ready
    count: Dim

    def same(self, other: Rows) -> bool:
        """Whether both are surely the same rows."""
        alike = dims.same(self.count, other.count) is True
        return alike and bool(self.first.var.same_as(other.first.var))


@dataclass(eq=False)
class Placed(Value):
    """A tensor of the caller's, some of whose elements are written over once the value is read or given out.

    ``section`` begins that in a kernel: how many elements there are, along which dims, and what writes one.
    ``rows``: all of them lie there, where that is known.
    """

    target: Ready | None = None
    rows: Rows | None = None
    section: Callable[[Kernel], Section] = field(default=lambda kernel: ([], lambda index: None))

    def at(self, code: Code, index: Index) -> Expr:
        """Not before it is written."""
        raise AssertionError("a tensor is read before it is written over")


@dataclass(eq=False)
class ChannelsLast(Value):
    """A [b, channels, *spatial] whose elements lie, or are computed, as ``last``: [b, *spatial, channels].

    Convolutions make and read it, and what is elementwise keeps it: a whole network of them is never
    transposed. Whoever does not know of it reads it by index, or forces a copy in the usual order.
    """

    last: Value

    def at(self, code: Code, index: Index) -> Expr:
        """The element of ``last``, which is not pending."""
        return self.last.at(code, to_last(index))

    def usual(self) -> Value:
        """The same value; if it is pending, as a kernel that writes it in the usual order."""
        last = self.last.usual() if isinstance(self.last, ChannelsLast) else self.last
        if isinstance(last, Pending):
            return last.then(lambda code, at, e: e, self.dtype, self.shape, from_last)
        return self


T = TypeVar("T")


def to_last(index: Sequence[T]) -> list[T]:
    """An index or shape with its second axis moved to the end."""
    return [index[0], *index[2:], index[1]]


def from_last(index: Sequence[T]) -> list[T]:
    """The inverse of :func:`to_last`."""
    return [index[0], index[-1], *index[1:-1]]


def turned(value: Value) -> tuple[Ready, tuple[int, ...]] | None:
    """The tensor in memory that ``value`` is, and the order in which its axes are those of ``value``."""
    if isinstance(value, Ready):
        return value, tuple(range(value.rank))
    if isinstance(value, ChannelsLast):
        found = turned(value.last)
        return found and (found[0], tuple(from_last(found[1])))
    return value.turned if isinstance(value, Lazy) else None
