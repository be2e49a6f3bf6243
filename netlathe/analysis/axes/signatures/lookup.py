"""Operators that look up positions of an axis: constant ones cut it, computed ones must be its own."""

from __future__ import annotations

from itertools import pairwise

from netlathe.analysis.axes.signature import Signature, Site, Spot, Table, named
from netlathe.analysis.axes.signatures.segments import segments
from netlathe.ir import dims

_MOST_LISTED = 1024  # positions that a constant may list; more is data, not structure


def _gather(s: Site) -> Signature:
    data, axis = named("d", s.rank()), s.axis()
    listed = s.ints(1)
    if listed is not None and s.rank(1) <= 1 and isinstance(s.shape()[axis], int):
        return _listed(s, data, axis, listed, scalar=s.rank(1) == 0)
    index = named("i", s.rank(1))
    data[axis] = "n"
    out = [*data[:axis], *index, *data[axis + 1 :]]
    rule = f"{' '.join(data)}, {' '.join(index)} -> {' '.join(out)}"
    return Signature(rule, linear="0", moves=True, reads={1: "n"})


def _listed(
    s: Site, data: list[str], axis: int, listed: tuple[int, ...], *, scalar: bool
) -> Signature:
    """Constant positions: runs of consecutive ones are segments, put together in their order."""
    size = s.shape()[axis]
    assert isinstance(size, int)
    wanted = [position % size for position in listed]
    if not wanted or len(wanted) > _MOST_LISTED:
        s.refuse(f"looks up {len(wanted)} constant positions")
    starts = [0, *(i for i, (a, b) in enumerate(pairwise(wanted), start=1) if b != a + 1)]
    runs = [(wanted[start], wanted[end - 1] + 1) for start, end in pairwise([*starts, len(wanted)])]
    bounds = sorted({0, size, *(bound for run in runs for bound in run)})
    letter = {start: f"x{number}" for number, start in enumerate(bounds[:-1])}
    sizes = {letter[start]: end - start for start, end in pairwise(bounds)}
    taken = [letter[bound] for start, end in runs for bound in bounds if start <= bound < end]
    whole = segments(letter.values())
    order = "1" if scalar else segments(taken)
    before = [*data[:axis], whole, *data[axis + 1 :]]
    after = [*data[:axis], *([] if scalar else [order]), *data[axis + 1 :]]
    return Signature(
        f"{' '.join(before)}, _ -> {' '.join(after)}",
        sizes=sizes,
        lists={1: (whole, order)},
        fixed={taken[0]: "takes this position alone"} if scalar else {},
        linear="0",
        moves=True,
    )


_ROW = "reads it as one position per dim"
_SEVERAL = "looks up positions of several dims at once"


def _gather_nd(s: Site) -> Signature:
    """Each last row of the indices is a position per dim; one of a single dim is a position of it."""
    batch = s.integer("batch_dims")
    rank, index_rank = s.rank(0), s.rank(1)
    depth = s.shape(1)[-1]
    if not isinstance(depth, int):
        s.refuse("has indices of unknown depth")
    data, index = named("d", rank), named("i", index_rank - 1)
    index[:batch] = data[:batch]
    looked_up = data[batch : batch + depth]
    listed = s.ints(1)
    single = depth == 1 and batch == 0
    if listed is not None and single and index_rank == 2 and isinstance(s.shape()[0], int):
        return _listed(s, data, 0, listed, scalar=False)
    rule = f"{' '.join(data)}, {' '.join([*index, 'row'])} -> {' '.join([*index, *data[batch + depth :]])}"
    fixed = {"row": _ROW}
    if depth != 1:
        fixed[" ".join(looked_up)] = _SEVERAL
    reads = {1: looked_up[0]} if depth == 1 else {}
    return Signature(rule, fixed=fixed, linear="0", moves=True, reads=reads)


def _elements(s: Site) -> tuple[list[str], list[str], dict[str, str]]:
    """Letters of the data and of the indices of GatherElements or ScatterElements.

    Along the other dims the indices cover the first positions; all of them, or nobody can say which
    ones are left after an edit.
    """
    axis = s.axis()
    data, index = named("d", s.rank(0)), named("d", s.rank(0))
    fixed: dict[str, str] = {}
    for number, (a, b) in enumerate(zip(s.shape(0), s.shape(1), strict=True)):
        if number != axis and not dims.same(a, b):
            index[number] = f"i{number}"
            fixed[f"d{number} i{number}"] = "takes the first positions of it"
    data[axis], index[axis] = "n", "k"
    return data, index, fixed


def _gather_elements(s: Site) -> Signature:
    data, index, fixed = _elements(s)
    rule = f"{' '.join(data)}, {' '.join(index)} -> {' '.join(index)}"
    return Signature(rule, fixed=fixed, linear="0", moves=True, reads={1: "n"})


_SCATTERS = "writes every position of it"


def _scatter_elements(s: Site) -> Signature:
    data, index, fixed = _elements(s)
    fixed["k"] = _SCATTERS
    rule = f"{' '.join(data)}, {' '.join(index)}, {' '.join(index)} -> {' '.join(data)}"
    return Signature(rule, fixed=fixed, reads={1: "n"})


def _scatter_nd(s: Site) -> Signature:
    depth = s.shape(1)[-1]
    if not isinstance(depth, int):
        s.refuse("has indices of unknown depth")
    data, index = named("d", s.rank(0)), named("i", s.rank(1) - 1)
    rest = data[depth:]
    line = " ".join(data)
    fixed = {"row": _ROW, " ".join(index): _SCATTERS}
    if depth != 1:
        fixed[" ".join(data[:depth])] = _SEVERAL
    return Signature(
        f"{line}, {' '.join([*index, 'row'])}, {' '.join([*index, *rest])} -> {line}",
        fixed=fixed,
        reads={1: data[0]} if depth == 1 else {},
    )


def _one_hot(s: Site) -> Signature:
    """A new axis whose positions the indices are."""
    index = named("i", s.rank(0))
    axis = s.integer("axis", -1) % (len(index) + 1)
    out = [*index[:axis], "n", *index[axis:]]
    uses: dict[Spot, str] = {(1, 0): "n"}
    return Signature(f"{' '.join(index)}, _, _ -> {' '.join(out)}", uses=uses, reads={0: "n"})


# -- what makes tensors, or reads their shape ---------------------------------------------------------


def _range(_: Site) -> Signature:
    return Signature("_, _, _ -> n", fixed={"n": "counts its positions"})


def _constant_of_shape(s: Site) -> Signature:
    letters = named("d", len(s.out()))
    uses: dict[Spot, str] = {(0, index): letter for index, letter in enumerate(letters)}
    return Signature(f"_ -> {' '.join(letters)}", uses=uses)


def _trilu(s: Site) -> Signature:
    line = " ".join(named("d", s.rank()))
    last = " ".join(named("d", s.rank())[-2:])
    return Signature(f"{line}, _ -> {line}", fixed={last: "keeps a triangle of it"}, linear="0")


TABLE: Table = {
    "ConstantOfShape": _constant_of_shape,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "OneHot": _one_hot,
    "Range": _range,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    # The sizes themselves: whoever uses one as a size is told where it comes from.
    "Shape": Signature("*x -> n", fixed={"n": "lists sizes in it"}),
    "Trilu": _trilu,
}
