"""Smallest sets of positions that can go together, from what must go when a position goes.

Elements of tensors are equal in pairs; an element is gone if one of its positions is. So of each pair,
with the places ``l1 l2 ..`` of the one element and ``r1 r2 ..`` of the other, holds
``l1 or l2 or .. == r1 or r2 or ..``. Of some pairs of dims only one may lose places. :class:`Deletions` makes
rules of the elements:

    edge    x goes, then y goes
    clause  x goes, then all places of one of several options go

Places that need each other are one (strongly connected components of the edges), which leaves few. The
rest is a search with unit propagation in both directions: what goes, and what must stay.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

Array: TypeAlias = npt.NDArray[Any]
Option: TypeAlias = tuple[int, ...]  # all of these go
Clause: TypeAlias = tuple[int, tuple[Option, ...]]
Pairs: TypeAlias = tuple[Array, Array]  # places of equal elements: [pairs, dims], [pairs, dims]


class Deletions:
    """What can go of places 0 to n - 1, which lie in ranges of which none may go entirely."""

    def __init__(
        self,
        starts: Sequence[int],
        stays: Array,
        pairs: Iterable[Pairs],
        apart: Iterable[tuple[int, int]] = (),
    ) -> None:
        """``starts``: of the ranges, and n at the end. ``stays``: [n] bool, places that may not go.

        ``apart``: ranges of which one stays as a whole. Places that cannot go are added to ``stays`` while
        ``pairs`` come.
        """
        self.apart: dict[int, set[int]] = defaultdict(set)
        for one, other in apart:
            self.apart[one].add(other)
            self.apart[other].add(one)
        self.sizes = np.diff(starts)
        self.range_of = np.repeat(np.arange(len(self.sizes)), self.sizes)
        self.stays = stays
        self.pairs = [self._settled(*pair) for pair in pairs]
        while True:
            before = int(self.stays.sum())
            self.pairs = [self._settled(*pair) for pair in self.pairs]
            if self.stays.sum() == before:
                break
        self.edges: list[Array] = []  # [2, edges]
        self.clauses: list[Clause] = []
        for left, right in self.pairs:
            self._rules(left, right)
            self._rules(right, left)
        self._collapse()
        self._found: dict[int, list[Array]] = {}

    # -- pairs to rules ---------------------------------------------------------------------------

    def _settled(self, left: Array, right: Array) -> Pairs:
        """The pairs without dims that stay as a whole; what stays because of them is noted."""
        while True:
            sides = [
                side[:, [not self.stays[column].all() for column in side.T]]
                for side in (left, right)
            ]
            width = sides[0].shape[1]
            rows = unique_rows(np.concatenate(sides, axis=1))
            left, right = rows[:, :width], rows[:, width:]
            before = int(self.stays.sum())
            for here, there in ((left, right), (right, left)):
                self.stays[here[self.stays[there].all(axis=1)]] = True
                self._keep_what_holds_all(here, there)
            if self.stays.sum() == before:
                return left, right

    def _keep_what_holds_all(self, here: Array, there: Array) -> None:
        """Let stay a place with which all positions of a dim on the other side would go."""
        if there.shape[1] == 0:
            return
        cells = np.prod(self.sizes[self.range_of[there[0]]])
        if cells > len(there):
            return
        for column in here.T:
            pairs = unique_rows(np.concatenate([column[:, None], there], axis=1))
            places, counts = np.unique(pairs[:, 0], return_counts=True)
            self.stays[places[counts == cells]] = True

    def _rules(self, here: Array, there: Array) -> None:
        """What must go there if a place goes here."""
        if there.shape[1] < 2:
            self.edges += [np.stack([column, there[:, 0]]) for column in here.T if there.size]
            return
        for column in here.T:
            order = np.argsort(column, kind="stable")
            places, first = np.unique(column[order], return_index=True)
            bounds = [*first.tolist(), len(order)]
            for place, (start, end) in zip(places.tolist(), pairwise(bounds), strict=True):
                if not self.stays[place]:
                    self._cover(place, unique_rows(there[order[start:end]]))

    def _cover(self, place: int, cells: Array) -> None:
        """If ``place`` goes, each cell goes: one of its places does. [cells, dims]

        A slab of cells that is complete needs its own place, since else a whole dim would have to go.
        """
        sizes = self.sizes[self.range_of[cells[0]]]
        forced: list[int] = []
        slab = np.prod(sizes) // sizes
        while len(cells):
            complete = [
                value
                for column, cells_each in zip(cells.T, slab.tolist(), strict=True)
                for value in self._often(column, cells_each)
            ]
            if not complete:
                break
            forced += complete
            cells = cells[~np.isin(cells, complete).any(axis=1)]
        self.edges += [np.array([[place], [value]]) for value in forced]
        if not len(cells):
            return
        values = [np.unique(column) for column in cells.T]
        if len(cells) == np.prod([len(each) for each in values]):  # a block: all of it along a dim
            options = [
                tuple(each.tolist())
                for each, size in zip(values, sizes.tolist(), strict=True)
                if len(each) < size
            ]
            self.clauses.append((place, tuple(options)))
        else:
            self.clauses += [(place, tuple((one,) for one in cell)) for cell in cells.tolist()]

    def _often(self, column: Array, times: int) -> list[int]:
        values, counts = np.unique(column, return_counts=True)
        found: list[int] = values[counts == times].tolist()
        return found

    # -- places that need each other ----------------------------------------------------------------

    def _collapse(self) -> None:
        """Join places that need each other, until no option of a clause falls away any more."""
        count = len(self.stays)
        edges = np.concatenate([*self.edges, np.zeros((2, 0), np.int64)], axis=1)
        clauses = self.clauses
        while True:
            edges = np.unique(edges, axis=1)
            ones = np.ones(edges.shape[1], np.int8)
            graph = coo_array((ones, (edges[0], edges[1])), (count, count))
            self.number, self.joined = connected_components(graph, connection="strong")
            stays = np.zeros(self.number, np.bool_)
            stays[self.joined[self.stays]] = True
            own = np.unique(self.joined[edges], axis=1)
            own = own[:, own[0] != own[1]]
            while True:
                more = own[0, stays[own[1]] & ~stays[own[0]]]
                if not len(more):
                    break
                stays[more] = True
            self.stays = stays[self.joined]
            kept, news = [], []
            for place, options in clauses:
                if self.stays[place]:
                    continue
                left = tuple(option for option in options if not self.stays[list(option)].any())
                if len(left) > 1:
                    kept.append((place, left))
                elif left:
                    news += [(place, other) for other in left[0]]
                else:
                    self.stays[place] = True
                    news.append((place, place))  # look again
            if not news:
                break
            edges = np.concatenate([edges, np.array(news).T], axis=1)
            clauses = kept
        self._index(own, clauses, stays)

    def _index(self, edges: Array, clauses: list[Clause], stays: Array) -> None:
        self.value = np.where(stays, STAYS, OPEN).tolist()
        self.after: list[list[int]] = [[] for _ in range(self.number)]
        self.before: list[list[int]] = [[] for _ in range(self.number)]
        for x, y in edges.T.tolist():
            self.after[x].append(y)
            self.before[y].append(x)
        joined = self.joined.tolist()
        self.rules = sorted({
            (joined[place], tuple(sorted({tuple(sorted({joined[at] for at in option}))
                                          for option in options})))
            for place, options in clauses
        })  # fmt: skip
        self.heads: dict[int, list[int]] = defaultdict(list)
        self.of: dict[int, list[int]] = defaultdict(list)
        for number, (place, options) in enumerate(self.rules):
            self.heads[place].append(number)
            for at in {at for option in options for at in option}:
                self.of[at].append(number)
        within: Counter[tuple[int, int]] = Counter(zip(self.range_of.tolist(), joined, strict=True))
        self.ranges: list[list[int]] = [[] for _ in self.sizes]
        self.touched: dict[int, list[int]] = defaultdict(list)
        for range_, at in within:
            self.ranges[range_].append(at)
            self.touched[at].append(range_)
        self.left = [len(of) for of in self.ranges]
        self.trail: list[int] = []
        for of in self.ranges:
            if len(of) == 1:  # its places only go together, so they stay
                self._set(of[0], STAYS)
        self.trail.clear()

    # -- search -------------------------------------------------------------------------------------

    def minimal(self, place: int) -> list[Array]:
        """The smallest sets of places that can go and hold this one, each ascending."""
        start = int(self.joined[place])
        if start not in self._found:
            solutions: list[frozenset[int]] = []
            if self._set(start, GONE):
                self._search(solutions)
            self._undo(0)
            least = [one for one in solutions if not any(other < one for other in solutions)]
            if not least:
                self._set(start, STAYS)  # it can never go: others need not try
                self.trail.clear()
            self._found[start] = [self._places(one) for one in dict.fromkeys(least)]
        return self._found[start]

    def _places(self, of: frozenset[int]) -> Array:
        gone = np.isin(self.joined, list(of))
        for left, right in self.pairs:
            assert (gone[left].any(axis=1) == gone[right].any(axis=1)).all()
        return np.flatnonzero(gone)

    def _search(self, solutions: list[frozenset[int]]) -> None:
        """All ways to go on; those that hold a solution are left out."""
        gone = frozenset(at for at in self.trail if self.value[at] == GONE)
        if any(solution <= gone for solution in solutions):
            return
        choice = self._choice(gone)
        if not choice:
            solutions.append(gone)
            return
        mark = len(self.trail)
        for option in choice:
            here = len(self.trail)
            if all(self._set(at, GONE) for at in option):
                self._search(solutions)
            self._undo(here)
            # What goes with this option has been found: from here on it stays.
            if len(option) == 1 and not self._set(option[0], STAYS):
                break
        self._undo(mark)

    def _choice(self, gone: frozenset[int]) -> list[Option]:
        """The options of an open clause that has the fewest."""
        best: list[Option] = []
        for at in gone:
            for number in self.heads.get(at, ()):
                options = self.rules[number][1]
                if not any(all(self.value[o] == GONE for o in option) for option in options):
                    alive = [o for o in options if all(self.value[at] != STAYS for at in o)]
                    if not best or len(alive) < len(best):
                        best = sorted(alive, key=len)
                    if len(best) == 2:
                        return best
        return best

    def _set(self, at: int, value: int) -> bool:
        """Set a value and all that follows from it; False at a contradiction."""
        todo = [(at, value)]
        while todo:
            at, value = todo.pop()
            if self.value[at] != OPEN:
                if self.value[at] != value:
                    return False
                continue
            self.value[at] = value
            self.trail.append(at)
            if value == GONE:
                todo += [(other, GONE) for other in self.after[at]]
                for range_ in self.touched[at]:
                    self.left[range_] -= 1
                    if self.left[range_] == 1:
                        todo += [(o, STAYS) for o in self.ranges[range_] if self.value[o] != GONE]
                    for other in self.apart.get(range_, ()):
                        todo += [(o, STAYS) for o in self.ranges[other]]
            else:
                todo += [(other, STAYS) for other in self.before[at]]
            for number in (*self.heads.get(at, ()), *self.of.get(at, ())):
                more = self._unit(number)
                if more is None:
                    return False
                todo += more
        return True

    def _unit(self, number: int) -> Sequence[tuple[int, int]] | None:
        """What a clause says by now; None where it cannot hold."""
        head, options = self.rules[number]
        value = self.value
        if value[head] == STAYS:
            return ()
        alive: Option = ()
        for option in options:
            for at in option:
                if value[at] == STAYS:
                    break
            else:
                if alive:
                    return ()  # still a choice
                alive = option
        if value[head] == GONE:
            return [(at, GONE) for at in alive if value[at] == OPEN] if alive else None
        return () if alive else [(head, STAYS)]

    def _undo(self, mark: int) -> None:
        while len(self.trail) > mark:
            at = self.trail.pop()
            if self.value[at] == GONE:
                for range_ in self.touched[at]:
                    self.left[range_] += 1
            self.value[at] = OPEN


OPEN, GONE, STAYS = 0, 1, -1


def unique_rows(rows: Array) -> Array:
    """The different rows of a table of places, sorted."""
    if rows.shape[1] == 0:
        return rows[:1]
    order = np.lexsort(rows.T[::-1])
    rows = rows[order]
    new = np.ones(len(rows), np.bool_)
    new[1:] = (rows[1:] != rows[:-1]).any(axis=1)
    return rows[new]
