"""Axes of tensors as terms: an axis is an atom, a product of axes, or axes one after another.

    64                     an atom of 64 positions
    (kv r h)               a product in row-major order, as Reshape merges dims
    [gate | up]            a concatenation; gate and up are its segments

Operators look at the same axis in different ways: one splits 64 into 4 heads of 16, another into two
halves. :class:`Space` keeps one term per axis that suits all of them, by refining atoms: `join` says
that two axes are one, position by position; `cut` puts a boundary between two positions; `regroup`
splits and merges products. Refinement only ever replaces an atom by a term of smaller atoms, so it
ends, and the atoms left at the end are the finest that the operators force.

What cannot be one term, such as 4 x 6 seen as 6 x 4 with both kept, is reported to `misfit`; the
caller pins it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Generator, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TypeAlias, TypeVar

import sympy

from netlathe.ir import dims

Size: TypeAlias = int | sympy.Expr


class Axis:
    """One axis; what is known of it grows. Compare axes only after :meth:`Space.find`."""

    __slots__ = ("form", "link", "row", "size", "stays")

    def __init__(self, size: Size, form: Form | None = None, *, row: bool = False) -> None:
        self.size = size
        self.form = form  # None: an atom
        self.row = row  # one position cut out of several, as opposed to a dim that has just one
        self.stays: object = None  # why none of its positions may ever go
        self.link: Axis | None = None  # the axis that this one turned out to be

    def __repr__(self) -> str:
        return show(self)


@dataclass(frozen=True, eq=False, slots=True)
class Product:
    """Row-major product: position = ((i * |b| + j) * |c| + k) for factors a, b, c."""

    factors: tuple[Axis, ...]


@dataclass(frozen=True, eq=False, slots=True)
class Segments:
    """The positions of one part after those of another."""

    parts: tuple[Axis, ...]


Form: TypeAlias = Product | Segments


class Misfit(Exception):
    """Two views of an axis have no common refinement that is a term."""


# -- reading terms ----------------------------------------------------------------------------------


def find(axis: Axis) -> Axis:
    """The axis that stands for all that were joined with this one."""
    root = axis
    while root.link is not None:
        root = root.link
    while axis.link is not None:
        axis.link, axis = root, axis.link
    return root


def is_atom(axis: Axis) -> bool:
    """Whether the axis is not (yet) a term of smaller ones."""
    return find(axis).form is None


def factors(axis: Axis) -> list[Axis]:
    """The factors of a product, nested products opened; the axis itself where it is none."""
    axis = find(axis)
    if not isinstance(axis.form, Product):
        return [axis]
    return [inner for factor in _telling(axis.form) for inner in factors(factor)]


def parts(axis: Axis) -> list[Axis]:
    """The segments of a concatenation, nested ones opened; the axis itself where it is none."""
    found: list[Axis] = []
    stack = [axis]
    while stack:
        axis = find(stack.pop())
        if isinstance(axis.form, Segments):
            stack += reversed(axis.form.parts)
        else:
            found.append(axis)
    return found


def atoms(axis: Axis) -> Iterator[Axis]:
    """All atoms of the term, each once, in order of appearance."""
    stack, seen = [axis], set()
    while stack:
        axis = find(stack.pop())
        if axis in seen:
            continue
        seen.add(axis)
        if axis.form is None:
            yield axis
        else:
            stack += reversed(_children(axis.form))


def _children(form: Form) -> Sequence[Axis]:
    return _telling(form) if isinstance(form, Product) else form.parts


def _telling(form: Product) -> Sequence[Axis]:
    """Factors that say something: not a row that stays, which is there whatever goes.

    Long chains of shuffles cut an axis into rows of rows; without this all of them would stand in each
    position for good.
    """
    found = [factor for factor in form.factors if factor.size != 1 or not _held(factor)]
    return found or form.factors[:1]


def _reduced(axis: Axis) -> Axis:
    """The axis; of a product with rows that stay, and one other factor, that factor."""
    axis = find(axis)
    while isinstance(axis.form, Product) and len(found := _telling(axis.form)) == 1:
        axis.link = found[0]
        axis = find(axis)
    return axis


def _held(axis: Axis) -> bool:
    """Whether a row, or a product of rows, stays for good."""
    axis = find(axis)
    if axis.stays is None and isinstance(axis.form, Product):
        if all(map(_held, axis.form.factors)):
            axis.stays = find(axis.form.factors[0]).stays
    return axis.stays is not None


def hold(axis: Axis, why: object) -> None:
    """Let none of the positions of an axis ever go."""
    for atom in list(atoms(axis)):
        atom.stays = atom.stays or why


def positions(axis: Axis, of: Collection[Axis]) -> frozenset[int]:
    """The positions of an axis of known size that only these atoms could take away."""
    axis = find(axis)
    assert isinstance(axis.size, int)
    if axis.form is None:
        return frozenset(range(axis.size)) if axis in of else frozenset()
    found = [0] if isinstance(axis.form, Product) else []
    start = 0
    for inner in axis.form.factors if isinstance(axis.form, Product) else parts(axis):
        assert isinstance(inner.size, int)
        if isinstance(axis.form, Product):
            own = positions(inner, of)
            found = [outer * inner.size + position for outer in found for position in own]
        else:
            found += [start + position for position in positions(inner, of)]
            start += inner.size
    return frozenset(found)


def resized(axis: Axis, known: MutableMapping[Axis, Size | None]) -> Size | None:
    """The size of an axis once atoms have the sizes in ``known``, which grows; None if it stays as it is."""
    axis = find(axis)
    if axis not in known:
        form = axis.form
        inner = form.factors if isinstance(form, Product) else parts(axis) if form else ()
        found = [(resized(each, known), each.size) for each in inner]
        sizes = [old if new is None else new for new, old in found]
        if all(new is None for new, _ in found):
            known[axis] = None
        elif isinstance(form, Product):
            known[axis] = dims.product(sizes)
        else:
            known[axis] = reduce(_add, sizes)
    return known[axis]


def show(axis: Axis, name: Callable[[Axis], str] = lambda atom: str(atom.size)) -> str:
    """The term as text; atoms are shown by ``name``."""
    axis = find(axis)
    if axis.form is None:
        return name(axis)
    if isinstance(axis.form, Product):
        each = [show(factor, name) for factor in _telling(axis.form)]
        return "(" + " ".join(each) + ")" if len(each) > 1 else each[0]
    return "[" + " | ".join(show(part, name) for part in parts(axis)) + "]"


# -- making terms -----------------------------------------------------------------------------------


def product(of: Sequence[Axis]) -> Axis:
    """The product of axes; of a single one that axis itself.

    A factor of one position says nothing, unless it is a row that may go: then the product goes with it.
    """
    of = [axis for axis in of if axis.size != 1 or (find(axis).row and not _held(axis))] or of[:1]
    if len(of) == 1:
        return of[0]
    size = dims.product(axis.size for axis in of)
    assert size is not None
    return Axis(size, Product(tuple(of)), row=size == 1)


def segments(of: Sequence[Axis]) -> Axis:
    """Axes one after another; of a single one that axis itself. One without positions adds nothing."""
    of = [axis for axis in of if axis.size != 0] or of[:1]
    if len(of) == 1:
        return of[0]
    size: Size = 0
    for axis in of:
        size = _add(size, axis.size)
        if axis.size == 1:
            find(axis).row = True
    return Axis(size, Segments(tuple(of)))


# -- refining terms ---------------------------------------------------------------------------------

_T = TypeVar("_T")
# Work that yields the joins that it needs done before it goes on.
_Steps: TypeAlias = Generator["_Steps[None]", None, _T]


def _done(steps: _Steps[_T]) -> _T:
    """What work gives that needs joins, which need others, however deep these lie in each other.

    Frames of a signal that overlap, [x | 143840] and [143840 | y] seen as 900 rows of 160, make one row the
    next: joins as deep as there are rows.
    """
    stack: list[_Steps[None]] = []
    while True:
        try:
            stack.append(next(stack[-1] if stack else steps))
        except StopIteration as end:
            if not stack:
                given: _T = end.value
                return given
            stack.pop()


class Space:
    """Joins and refines axes.

    What has no common refinement goes to ``misfit``, with the axes that it is of; a position that may
    not go, because it is there in one view of an axis and not in another, to ``stays``.
    """

    def __init__(
        self, misfit: Callable[[Axis, Sequence[Axis]], None], stays: Callable[[Axis], None]
    ) -> None:
        self._misfit = misfit
        self._stays = stays

    def join(self, a: Axis, b: Axis) -> None:
        """Let two axes be one: position i of either is position i of the other."""
        try:
            _done(self._join(a, b))
        except Misfit:
            self._misfit(a, [a])
            self._misfit(b, [b])

    def cut(self, axis: Axis, sizes: Sequence[Size]) -> list[Axis]:
        """See the axis as segments of these sizes, which add up to its size."""
        pieces: list[Axis] = []
        rest = axis
        try:
            for size in sizes[:-1]:
                if size in (0, rest.size):
                    piece, rest = (Axis(0), rest) if size == 0 else (rest, Axis(0))
                else:
                    piece, rest = _cut(rest, size)
                pieces.append(piece)
        except Misfit:
            self._misfit(axis, [axis])
            return [self._lost(size, [axis]) for size in sizes]
        return [*pieces, rest]

    def regroup(self, axes: Sequence[Axis], sizes: Sequence[Size]) -> list[Axis]:
        """See the product of ``axes`` as a product of axes with these sizes, as Reshape does.

        Axes of size 1 carry nothing: those given are dropped, those wanted are new.
        """
        try:
            return _done(self._regroup(axes, sizes))
        except Misfit:
            pass
        every = [factor for axis in axes for factor in factors(axis)]
        made = [Axis(size) for size in sizes]
        try:
            _done(
                self._join_factors(
                    [factor for factor in every if factor.size != 1],
                    [axis for axis in made if axis.size != 1],
                )
            )
        except Misfit:
            for axis in axes:
                self._misfit(axis, [axis])
            return [self._lost(size, axes) for size in sizes]
        for row in every:
            if row.size == 1 and not _held(row):
                self._stays(row)
        return made

    def _lost(self, size: Size, of: Sequence[Axis]) -> Axis:
        axis = Axis(size)
        self._misfit(axis, of)
        return axis

    # -- joining ----------------------------------------------------------------------------------

    def _join(self, a: Axis, b: Axis) -> _Steps[None]:
        a, b = _reduced(a), _reduced(b)
        if a is b:
            return
        if not _same(a.size, b.size):
            raise Misfit
        if a.form is None and (b.row or not a.row) and a not in factors(b):
            _link(a, b)
            return
        if b.form is None and (a.row or not b.row) and b not in factors(a):
            _link(b, a)
            return
        if a.size == 1:
            yield from self._join_rows(factors(a), factors(b))
            return
        (left, left_rows), (right, right_rows) = _solid(a), _solid(b)
        yield from self._join_rows(left_rows, right_rows)
        if len(left) == len(right) == 1:
            yield from self._join_segments(left[0], right[0])
        elif len(left) == 1:
            yield from self._join_product(left[0], right)
        elif len(right) == 1:
            yield from self._join_product(right[0], left)
        else:
            yield from self._join_factors(left, right)
            if not left_rows and not right_rows:
                a.link = b

    def _join_rows(self, left: list[Axis], right: list[Axis]) -> _Steps[None]:
        """A row in a product is one position of something: both products go when it goes.

        ``[a | b | c]`` cut out of 3 x 4 is 1 x 4 with the first of the 3. What is joined with it and
        is no row, or one of something else, would stay: then the row must stay as well.
        """
        only_left = [row for row in left if row not in right and not _held(row)]
        only_right = [row for row in right if row not in left and not _held(row)]
        if len(only_left) == len(only_right) == 1:
            yield self._join(only_left[0], only_right[0])
        else:
            for row in (*only_left, *only_right):
                self._stays(row)

    def _join_segments(self, a: Axis, b: Axis) -> _Steps[None]:
        """Join two axes that are not products."""
        if a.form is None or b.form is None:
            yield self._join(a, b)
        elif a is not b:
            yield from self._align(parts(a), parts(b))
            find(a).link = find(b)

    def _join_product(self, single: Axis, of: list[Axis]) -> _Steps[None]:
        """Join an atom or segments with a product."""
        if single.form is not None:
            yield from self._align(parts(single), [product(of)])
        single.form = Product(tuple(of))
        if single.stays is not None:
            hold(single, single.stays)

    def _lay(self, segment: Axis, piece: Axis) -> _Steps[None]:
        """Join a segment with what it is of new rows and columns.

        ``[(g 4) | (h 2)]`` seen as (2 6) is one of the 2: the 6 is ``[(g 4) | (h 2)]``, and the one of
        the 2 is a row that none of the segments knows of, so it stays.
        """
        segment = _reduced(segment)
        row, *inner = factors(piece)
        if segment.form is None or row.size != 1 or not inner or inner == _solid(segment)[0]:
            yield self._join(segment, piece)
        else:
            yield self._join(segment, product(inner))
            self._stays(row)

    def _align(
        self,
        left: list[Axis],
        right: list[Axis],
        join: Callable[[Axis, Axis], _Steps[None]] | None = None,
    ) -> _Steps[None]:
        """Join two lists of segments, which cover the same positions, on their common boundaries."""
        join = join or self._join
        left, right = left[::-1], right[::-1]
        while left and right:
            a, b = left.pop(), right.pop()
            if _same(a.size, b.size):
                yield join(a, b)
            elif _less(a.size, b.size):
                b, rest = _cut(b, a.size)
                right.append(rest)
                yield join(a, b)
            elif _less(b.size, a.size):
                a, rest = _cut(a, b.size)
                left.append(rest)
                yield join(a, b)
            else:
                raise Misfit

    def _join_factors(self, left: list[Axis], right: list[Axis]) -> _Steps[None]:
        """Join two products of the same size: (2 6) with (4 3) makes (2 2 3) of both.

        What their ends have in common is one, and stays free: of (3 4) with (2 6) the last 2. No term
        expresses what is left between, (3 2) with (2 3).
        """
        yield from self._join_ends(left, right, 0)
        yield from self._join_ends(left, right, -1)
        for axis in left:
            self._misfit(axis, [axis])
        for axis in right:
            self._misfit(axis, left or [axis])

    def _join_ends(self, left: list[Axis], right: list[Axis], end: int) -> _Steps[None]:
        """Join what two products have in common at their first (0) or last (-1) factors."""
        while left and right and (size := _common(left[end].size, right[end].size)) != 1:
            a = yield from self._taken(left, end, size)
            b = yield from self._taken(right, end, size)
            yield self._join(a, b)

    def _taken(self, of: list[Axis], end: int, size: Size) -> _Steps[Axis]:
        """Take a factor of this size off the first (0) or last (-1) one."""
        axis = of.pop(end)
        times = divide(axis.size, size)
        assert times is not None
        if times == 1:
            return axis
        sizes = [size, times] if end == 0 else [times, size]
        first, last = yield from self._regroup([axis], sizes)
        of.insert(0 if end == 0 else len(of), last if end == 0 else first)
        return first if end == 0 else last

    def _regroup(self, axes: Sequence[Axis], sizes: Sequence[Size]) -> _Steps[list[Axis]]:
        """Row-major regrouping: take factors off the front until each wanted size is reached."""
        left = [factor for axis in axes if axis.size != 1 for factor in factors(axis)][::-1]
        found: list[list[Axis]] = []
        for size in sizes:
            taken: list[Axis] = []
            missing = size
            while missing != 1:
                if not left:
                    raise Misfit
                factor = find(left.pop())
                if isinstance(factor.form, Product):
                    left += reversed(factors(factor))
                elif (rest := divide(missing, factor.size)) is not None:
                    taken.append(factor)
                    missing = rest
                elif (inner := divide(factor.size, missing)) is not None:
                    rows, columns = Axis(missing), Axis(inner)
                    if factor.form is not None:
                        piece = product([rows, columns])
                        yield from self._align(parts(factor), [piece], self._lay)
                    factor.form = Product((rows, columns))
                    rows.stays = columns.stays = factor.stays
                    left += [columns, rows]
                else:
                    raise Misfit
            found.append(taken)
        if any(factor.size != 1 for factor in left):
            raise Misfit
        if left:  # rows at the very end belong to what stands before them
            found[-1] += reversed(left)
        return [product(taken) if taken else Axis(1) for taken in found]


def _link(atom: Axis, axis: Axis) -> None:
    """Let an atom be another axis from now on."""
    atom.link = axis
    if atom.stays is not None:
        hold(axis, atom.stays)


def _solid(axis: Axis) -> tuple[list[Axis], list[Axis]]:
    """Factors of more than one position, of which there is one, and rows."""
    every = factors(axis)
    return [f for f in every if f.size != 1], [f for f in every if f.size == 1]


def _cut(axis: Axis, at: Size) -> tuple[Axis, Axis]:
    """The first ``at`` positions and the others, neither of which is empty."""
    axis = find(axis)
    if axis.form is None:
        rest = _subtract(axis.size, at)
        left, right = Axis(at, row=at == 1), Axis(rest, row=rest == 1)
        left.stays = right.stays = axis.stays
        axis.form = Segments((left, right))
        return left, right
    if isinstance(axis.form, Segments):
        return _cut_segments(parts(axis), at)
    solid, units = _solid(axis)
    if len(solid) == 1:
        left, right = _cut(solid[0], at)
        return product([*units, left]), product([*units, right])
    # Rows of `inner` positions: whole rows, then perhaps one that is cut through.
    row, inner = solid[0], product([*units, *solid[1:]])
    count = divide(at, inner.size)
    if count is not None:
        above, below = _cut(row, count)
        return product([above, inner]), product([below, inner])
    if not isinstance(at, int) or not isinstance(inner.size, int) or not isinstance(row.size, int):
        raise Misfit
    whole, into = divmod(at, inner.size)
    start, end = _cut(inner, into)
    before: list[Axis] = []
    after: list[Axis] = []
    if whole:
        above, row = _cut(row, whole)
        before.append(product([above, inner]))
    if row.size != 1:
        row, below = _cut(row, 1)
        after.append(product([below, inner]))
    return segments([*before, product([row, start])]), segments([product([row, end]), *after])


def _cut_segments(of: list[Axis], at: Size) -> tuple[Axis, Axis]:
    before: list[Axis] = []
    after = of[::-1]
    left = at
    while True:
        part = after.pop()
        if _same(part.size, left):
            return segments([*before, part]), segments(after[::-1])
        if _less(left, part.size):
            start, end = _cut(part, left)
            return segments([*before, start]), segments([end, *after[::-1]])
        if not _less(part.size, left):
            raise Misfit
        before.append(part)
        left = _subtract(left, part.size)


# -- sizes; symbolic ones are compared as far as that holds for all values ----------------------------


def _same(a: Size, b: Size) -> bool:
    return dims.same(a, b) is True


def _less(a: Size, b: Size) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a < b
    return sympy.expand(b - a).is_positive is True


def _add(a: Size, b: Size) -> Size:
    total = dims.add(a, b)
    assert total is not None
    return total


def _subtract(a: Size, b: Size) -> Size:
    rest = dims.subtract(a, b)
    assert rest is not None
    return rest


def _common(a: Size, b: Size) -> Size:
    """The greatest size that divides both, as far as that is known; else 1."""
    if isinstance(a, int) and isinstance(b, int):
        return math.gcd(a, b)
    if _same(a, b) or divide(b, a) is not None:
        return a
    return b if divide(a, b) is not None else 1


def divide(a: Size, b: Size) -> Size | None:
    """a / b where that is a whole number for all values, else None."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    if a == 0 or b == 0:
        return None
    ratio = dims.quotient(a, b)
    return dims.simplify(ratio) if ratio.is_polynomial() and ratio.is_integer else None
