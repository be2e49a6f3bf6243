"""Terms mean positions: whatever is joined, cut and regrouped, every view of an axis agrees on them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product as pairs

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netlathe.analysis.axes import algebra
from netlathe.analysis.axes.algebra import Axis, Space, find, product, segments, show
from netlathe.ir import dims

Label = tuple[tuple[bool, int, int], ...]  # (atom of several positions, atom, position of it) ...


def labels(axis: Axis) -> list[Label]:
    """What each position of an axis is, in terms of atoms."""
    axis = find(axis)
    if isinstance(axis.form, algebra.Product):
        parts = [labels(factor) for factor in axis.form.factors]
        return [_together(each) for each in pairs(*parts)]
    if isinstance(axis.form, algebra.Segments):
        return [label for part in algebra.parts(axis) for label in labels(part)]
    if axis.size == 1 and not axis.row:
        return [()]  # the one position of a dim: there is nothing to tell apart
    assert isinstance(axis.size, int)
    return [((axis.size > 1, id(axis), at),) for at in range(axis.size)]


def _together(of: Sequence[Label]) -> Label:
    """Labels of factors as one; rows of one position are a set, as their order says nothing."""
    every = [atom for label in of for atom in label]
    return (*sorted({atom for atom in every if not atom[0]}), *(atom for atom in every if atom[0]))


class Views:
    """Axes and all the views of them that were asked for, to be compared at the end."""

    def __init__(self) -> None:
        self.misfits: list[Axis] = []
        self.staying: list[Axis] = []
        self.space = Space(lambda axis, of: self.misfits.append(axis), self.staying.append)
        self.same: list[tuple[Axis, Axis]] = []

    def join(self, a: Axis, b: Axis) -> None:
        self.space.join(a, b)
        self.same.append((a, b))

    def cut(self, axis: Axis, *sizes: int) -> list[Axis]:
        pieces = self.space.cut(axis, sizes)
        self.same.append((axis, segments(pieces)))
        return pieces

    def regroup(self, axes: list[Axis], *sizes: int) -> list[Axis]:
        found = self.space.regroup(axes, sizes)
        self.same.append((product(axes), product(found)))
        return found

    def check(self) -> None:
        assert not self.misfits
        stay = {id(atom) for axis in self.staying for atom in algebra.atoms(axis)}

        def moving(label: Label) -> Label:
            """Without rows that are there in one view only, and for that may not go."""
            return tuple(part for part in label if part[1] not in stay)

        for a, b in self.same:
            assert list(map(moving, labels(a))) == list(map(moving, labels(b))), (show(a), show(b))


def sizes_of(*axes: Axis) -> list[str]:
    return [show(axis) for axis in axes]


# -- by example -------------------------------------------------------------------------------------


def test_boundaries_of_two_views_are_refined_to_those_of_both() -> None:
    views, three, five = Views(), Axis(3), Axis(5)
    whole = segments([three, five])
    left, right = views.cut(whole, 4, 4)
    views.check()
    assert sizes_of(whole, left, right, five) == ["[3 | 1 | 4]", "[3 | 1]", "4", "[1 | 4]"]


def test_frames_that_overlap_are_one_row_however_many_they_are() -> None:
    """A signal without its end and without its beginning, in rows: each row is the next one."""
    views, signal = Views(), Axis(5005)
    begin, _ = views.cut(signal, 5000, 5)
    _, end = views.cut(signal, 5, 5000)
    rows, columns = views.regroup([begin], 1000, 5)
    others, same = views.regroup([end], 1000, 5)
    views.join(rows, others)
    views.join(columns, same)
    views.check()
    assert len(set(algebra.parts(rows))) == 1
    assert algebra.resized(signal, {find(columns): 4}) == 4004


def test_factors_of_two_views_are_refined_to_those_of_both() -> None:
    views, a, b = Views(), Axis(12), Axis(12)
    views.regroup([a], 2, 6)
    views.regroup([b], 4, 3)
    views.join(a, b)
    views.check()
    assert show(a) == show(b) == "(2 (2 3))" or sizes_of(*algebra.factors(a)) == ["2", "2", "3"]


def test_a_reshape_of_segments_makes_them_rows() -> None:
    """Fused projections: [q | k | v] seen as (3 64)."""
    views, q, k, v = Views(), Axis(64), Axis(64), Axis(64)
    three, width = views.regroup([segments([q, k, v])], 3, 64)
    views.check()
    assert find(width).form is None and {show(axis) for axis in (q, k, v)} == {"(1 64)"}
    assert len(algebra.parts(three)) == 3


def test_halves_that_swap_places_are_one() -> None:
    views, x = Views(), Axis(8)
    low, high = views.cut(x, 4, 4)
    views.join(x, segments([high, low]))
    views.check()
    assert find(low) is find(high)


def test_a_cut_through_a_row_cuts_every_row() -> None:
    views = Views()
    rows, columns = Axis(3), Axis(4)
    left, right = views.cut(product([rows, columns]), 6, 6)
    views.check()
    assert show(rows) == "[1 | 1 | 1]" and show(columns) == "[2 | 2]"
    assert sizes_of(left, right) == ["[(1 [2 | 2]) | (1 2)]", "[(1 2) | (1 [2 | 2])]"]


def test_what_has_no_common_refinement_is_a_misfit() -> None:
    views, a, b, c, d = Views(), Axis(4), Axis(6), Axis(6), Axis(4)
    views.space.join(product([a, b]), product([c, d]))
    assert [axis.size for axis in views.misfits] == [2, 3, 3, 2]  # but for the 2 at either end


def test_what_two_views_share_at_their_ends_is_free() -> None:
    views, rows, columns = Views(), Axis(3), Axis(4)
    left, right = views.space.regroup([rows, columns], [2, 6])
    assert [axis.size for axis in views.misfits] == [3, 2, 2, 3]
    assert sizes_of(rows, columns, left, right) == ["3", "(2 2)", "2", "(3 2)"]
    assert algebra.factors(columns)[-1] is algebra.factors(right)[-1]


def test_sizes_may_be_symbols() -> None:
    batch, length = dims.symbol("batch"), dims.symbol("length")
    views, b, s, d = Views(), Axis(batch), Axis(length), Axis(12)
    (flat,) = views.space.regroup([b, s, d], [batch * length * 12])
    found = views.space.regroup([flat], [batch, length * 4, 3])
    assert not views.misfits
    assert find(found[0]) is b and algebra.factors(found[1])[0] is s
    assert sizes_of(d) == ["(4 3)"]


# -- at random --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [200, pytest.param(20000, marks=pytest.mark.slow)])
def test_views_agree_whatever_is_asked_for(count: int) -> None:
    """Axes of 12 positions, seen in many ways; those that are joined have the same atoms."""

    @settings(max_examples=count, deadline=None, derandomize=True, database=None)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        views = Views()
        axes = [Axis(12) for _ in range(3)]
        for _ in range(data.draw(st.integers(1, 6))):
            _look(views, axes, data)
            if views.misfits:
                return  # reported: nothing is claimed of it
        views.check()

    check()


def _look(views: Views, axes: list[Axis], data: st.DataObject) -> None:
    axis = data.draw(st.sampled_from(axes))
    what = data.draw(st.sampled_from(("cut", "regroup", "join", "swap", "turn")))
    if what == "join":
        views.join(axis, data.draw(st.sampled_from(axes)))
    elif what == "regroup":
        views.regroup([axis], *data.draw(st.sampled_from(((3, 4), (4, 3), (2, 6), (2, 3, 2)))))
    elif what == "turn":  # a transposed product is another axis
        first, second = views.regroup([axis], *data.draw(st.sampled_from(((3, 4), (2, 6)))))
        axes.append(product([second, first]))
    else:
        at = data.draw(st.integers(1, 11))
        first, second = views.cut(axis, at, 12 - at)
        if what == "swap":
            axes.append(segments([second, first]))
