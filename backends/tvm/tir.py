"""A small builder of TIR: statements in order, loops whose kind is stated, values bound once.

Kernels write their loops through it, so what runs in parallel and what is a vector is decided by us
and nowhere else. Indices are int64. Every loop variable is fresh: TIR takes a name for one thing only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import tvm
import tvm_ffi
from tvm import tirx

if TYPE_CHECKING:
    from netlathe.backends.tvm.kernel import Kernel

Expr: TypeAlias = Any  # a tirx expression; TVM's Python classes carry no types
Index: TypeAlias = Sequence[Expr]

SERIAL = tirx.ForKind.SERIAL
PARALLEL = tirx.ForKind.PARALLEL
VECTORIZED = tirx.ForKind.VECTORIZED

# Without it TVM takes scratch memory of any size from a pool, and accumulators never become registers.
_ON_STACK = {"disable_lower_builtin": tirx.IntImm("bool", 1)}
NAMED = 16  # the cost of what is always kept under a name
_CHEAP = 8  # operators of an index that are rather computed again than kept


def i64(value: int | Expr) -> Expr:
    """An int as an index; an expression as it is."""
    return tirx.IntImm("int64", value) if isinstance(value, int) else value


def known(value: int | Expr) -> int | None:
    """The number that an expression is, if it is a literal."""
    if isinstance(value, int):
        return value
    return int(value.value) if isinstance(value, tirx.IntImm) else None


def const(value: float | int | bool, dtype: str) -> Expr:
    """A literal of a TIR dtype."""
    return tirx.const(value, dtype)


def ramp(start: int | Expr, lanes: int) -> Expr:
    """The indices of ``lanes`` neighbours."""
    return tirx.Ramp(i64(start), i64(1), _lanes(lanes))


def _lanes(count: int) -> Expr:
    return count  # TVM's annotation asks for an expression, its constructor takes the int


def plain(expr: Expr) -> Expr:
    """``a == b`` and ``a != b`` are comparisons only once they are asked for as expressions."""
    return expr.asobject() if hasattr(expr, "asobject") else expr


def dtype_of(expr: Expr) -> str:
    """The TIR dtype of an expression."""
    return str(plain(expr).ty.dtype)


def cast(expr: Expr, dtype: str) -> Expr:
    """``expr`` in another dtype, by C's rules."""
    expr = plain(expr)
    return expr if dtype_of(expr) == dtype else tirx.Cast(dtype, expr)


def broadcast(expr: Expr, lanes: int) -> Expr:
    """A vector of one value."""
    return expr if lanes == 1 else tirx.Broadcast(expr, _lanes(lanes))


def is_nan(x: Expr) -> Expr:
    """Whether ``x`` is NaN; TVM folds ``x != x`` to false."""
    return tirx.isnan(x)


def select(condition: Expr, yes: Expr, no: Expr) -> Expr:
    """One of two values that are both computed: it vectorizes."""
    return tirx.Select(plain(condition), plain(yes), plain(no))


def idiv(a: Expr, b: int | Expr) -> Expr:
    """a // b of an index by a size: neither is negative, so C's division will do."""
    return tirx.truncdiv(a, i64(b))


def imod(a: Expr, b: int | Expr) -> Expr:
    """a % b of an index by a size."""
    return tirx.truncmod(a, i64(b))


def substituted(expr: Expr, values: Mapping[Expr, Expr]) -> Expr:
    """``expr`` with values in the place of variables."""
    changed = (tvm.ir.Var, lambda var: values.get(var, var))
    return tvm_ffi.structural_map(expr, changed, order="post")


def total(dims: Sequence[Expr]) -> Expr:
    """The product of dims."""
    product = i64(1)
    for dim in dims:
        product = product * dim
    return product


def flat_index(index: Index, dims: Sequence[Expr]) -> Expr:
    """Where an element of a contiguous tensor lies.

    p // n and p % n next to each other, where n is that dim, are p: so a vector of neighbours stays one,
    and :func:`unflatten` is undone.
    """
    position, pairs = i64(0), list(zip(index, dims, strict=True))
    while pairs:
        item, dim = pairs.pop(0)
        if pairs and (whole := _rejoined(item, *pairs[0])) is not None:
            pairs[0] = (whole, dim * pairs[0][1])
        else:
            position = position * dim + item
    return position


def _rejoined(quotient: Expr, remainder: Expr, dim: Expr) -> Expr | None:
    """p, if the two are p // dim and p % dim."""
    if not isinstance(quotient, tirx.Div) or not isinstance(remainder, tirx.Mod):
        return None
    same = tvm_ffi.structural_equal
    if same(quotient.a, remainder.a) and same(quotient.b, remainder.b) and same(quotient.b, dim):
        return quotient.a
    return None


def unflatten(position: Expr, dims: Sequence[Expr]) -> list[Expr]:
    """The inverse of :func:`flat_index`, of a position that is there."""
    index: list[Expr] = []
    # What is left of a position is an index of the first dim that has more than one: no remainder of it.
    single = [known(dim) in (0, 1) for dim in dims]  # of an empty tensor there is no element
    for axis in range(len(dims) - 1, -1, -1):
        if single[axis]:
            index.append(i64(0))
        elif all(single[:axis]):
            index.append(position)
        else:
            index.append(imod(position, dims[axis]))
            position = idiv(position, dims[axis])
    return index[::-1]


class Code:
    """The statements of one kernel, written from top to bottom."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self._blocks: list[list[Any]] = [[]]
        self._memo: list[dict[Hashable, tuple[Any, Expr]]] = [{}]
        self._count = 0
        self._loops = 0  # how many are open
        self._lane: tuple[Expr, int, list[Any]] | None = None  # of the open vector loop
        self._names: dict[int, Expr] = {}  # loads of scratch buffers that are names
        self._early: dict[tuple[Any, int], Expr] = {}  # what is read before all loops

    @property
    def is_alone(self) -> bool:
        """Whether nothing else writes what the kernel reads, from its first instruction on."""
        return True

    # -- statements ---------------------------------------------------------------------------------

    def emit(self, statement: Any) -> None:
        """Append a statement."""
        self._blocks[-1].append(statement)

    def store(self, buffer: Any, index: Expr | Index, value: Expr) -> None:
        """buffer[index] = value."""
        indices = list(index) if isinstance(index, (list, tuple)) else [index]
        self.emit(tirx.BufferStore(buffer, value, [i64(item) for item in indices]))

    def vload(self, buffer: Any, start: int | Expr, lanes: int) -> Expr:
        """``lanes`` neighbouring elements of a flat buffer."""
        if lanes == 1:
            return tirx.BufferLoad(buffer, [i64(start)])
        return tirx.BufferLoad(buffer, [ramp(start, lanes)])

    def vstore(self, buffer: Any, start: int | Expr, value: Expr, lanes: int) -> None:
        """Store ``lanes`` neighbouring elements."""
        index = i64(start) if lanes == 1 else ramp(start, lanes)
        self.emit(tirx.BufferStore(buffer, value, [index]))

    def bind(self, value: Expr, cost: int = 0) -> Expr:
        """A name for ``value``, so that it is computed once; literals and names stay as they are.

        TVM's passes put the value of a bound variable back in its place, again and again until a
        kernel takes minutes to compile. So inside a loop a name is a scratch buffer of one
        element (in a vector, one per lane), which LLVM turns into a register.

        Index arithmetic inside vectors gets no name, unless it has many operators (``cost``): a load
        must see that its index is a ramp.
        """
        value = plain(value)
        if isinstance(value, (tirx.Var, tirx.IntImm, tirx.FloatImm)) or id(value) in self._names:
            return value
        dtype = dtype_of(value)
        if not self._loops:
            var = self.var(dtype)
            self.emit(tirx.Bind(var, value))
            return var
        if dtype.startswith("bool"):
            if cost <= _CHEAP:
                return value
            return self.bind(tirx.Cast("int8", value)) != const(0, "int8")
        if self._lane is not None and "x" not in dtype:
            if not dtype.startswith("float") and cost <= _CHEAP:
                return value
            lane, lanes, hoisted = self._lane
            buffer = self._scratch([lanes], dtype)
            hoisted.append(tirx.AllocBuffer(buffer, _ON_STACK))
            self.emit(tirx.BufferStore(buffer, value, [lane]))
            return self._named(tirx.BufferLoad(buffer, [lane]))
        element, _, lanes_ = dtype.partition("x")
        count = int(lanes_ or 1)
        buffer = self.alloc([count], element)
        self.vstore(buffer, 0, value, count)
        return self._named(self.vload(buffer, 0, count))

    def early(self, buffer: Any, place: int) -> Expr:
        """buffer[place], which no loop writes, read once, in front of the outermost loop that is open.

        LLVM leaves it inside, as it does not know that stores are to other memory.
        """
        if (buffer, place) not in self._early:
            load = tirx.BufferLoad(buffer, [i64(place)])
            var = self.var(dtype_of(load))
            self._blocks[0].append(tirx.Bind(var, load))
            self._early[buffer, place] = var
        return self._early[buffer, place]

    def _named(self, load: Expr) -> Expr:
        self._names[id(load)] = load
        return load

    def _scratch(self, shape: Sequence[int], dtype: str) -> Any:
        self._count += 1
        dims = [i64(dim) for dim in shape]
        return tirx.decl_buffer(dims, dtype, f"v{self._count}", scope="local")

    def var(self, dtype: str, stem: str = "v") -> Expr:
        """A fresh variable."""
        self._count += 1
        return tirx.Var(f"{stem}{self._count}", dtype)

    def alloc(self, shape: Sequence[int | Expr], dtype: str, scope: str = "local") -> Any:
        """A scratch buffer that lives until the end of the block.

        ``local`` is for registers and small fixed sizes, ``global`` for sizes known at run time.
        """
        self._count += 1
        buffer = tirx.decl_buffer(
            [i64(dim) for dim in shape], dtype, f"scratch{self._count}", scope=scope
        )
        self.emit(tirx.AllocBuffer(buffer, _ON_STACK if scope == "local" else None))
        return buffer

    def registers(self, count: int, lanes: int, dtype: str) -> list[Any]:
        """``count`` accumulators of ``lanes`` elements, zero.

        Each is a buffer of its own: of one buffer for all, LLVM makes one vector of hundreds of elements.
        """
        made = [self.alloc([lanes], dtype) for _ in range(count)]
        for buffer in made:
            self.vstore(buffer, 0, broadcast(const(0, dtype), lanes), lanes)
        return made

    # -- blocks -------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def loop(self, extent: int | Expr, kind: Any = SERIAL) -> Iterator[Expr]:
        """for index in range(extent)."""
        var = self.var("int64", "i")
        self._loops += 1
        hoisted: list[Any] = []
        if kind == VECTORIZED:
            assert isinstance(extent, int) and self._lane is None
            self._lane = (var, extent, hoisted)
        with self._block() as statements:
            yield var
        self._loops -= 1
        if kind == VECTORIZED:
            self._lane = None
        for allocation in hoisted:
            self.emit(allocation)
        self.emit(tirx.For(var, i64(0), i64(extent), kind, _body(statements)))

    @contextlib.contextmanager
    def when(self, condition: Expr) -> Iterator[None]:
        """if condition."""
        with self._block() as statements:
            yield
        self.emit(tirx.IfThenElse(plain(condition), _body(statements), None))

    def branch(self, condition: Expr, yes: Callable[[], None], no: Callable[[], None]) -> None:
        """if condition: yes() else: no()."""
        with self._block() as first:
            yes()
        with self._block() as second:
            no()
        self.emit(tirx.IfThenElse(plain(condition), _body(first), _body(second)))

    @contextlib.contextmanager
    def repeat(self, condition: Expr) -> Iterator[None]:
        """while condition, which reads a buffer."""
        with self._block() as statements:
            yield
        self.emit(tirx.While(condition, _body(statements)))

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """A block of its own for names bound inside; its statements stay in place."""
        self._memo.append({})
        yield
        self._memo.pop()

    @contextlib.contextmanager
    def _block(self) -> Iterator[list[Any]]:
        self._blocks.append([])
        self._memo.append({})
        yield self._blocks[-1]
        self._blocks.pop()
        self._memo.pop()

    def whole(self) -> Any:
        """The body written so far."""
        return _body(self._blocks[0])

    # -- values computed once per block -------------------------------------------------------------

    def remembered(
        self, owner: object, index: Index, compute: Callable[[], Expr], cost: int = 0
    ) -> Expr:
        """``compute()`` under a name, once per owner and index in the blocks that are open."""
        key = (id(owner), *(id(item) for item in index))
        for memo in reversed(self._memo):
            if key in memo:
                return memo[key][1]
        value = self.bind(compute(), cost)
        self._memo[-1][key] = ((owner, tuple(index)), value)  # holds what the ids stand for
        return value


def _body(statements: list[Any]) -> Any:
    if not statements:
        return tirx.Evaluate(i64(0))
    return statements[0] if len(statements) == 1 else tirx.SeqStmt(statements)
