"""Operators that put axes one after another, and take them apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from netlathe.analysis.axes.signature import Signature, Site, Spot, Table, named
from netlathe.ir.movement import TO_THE_END


def _concat(s: Site) -> Signature:
    letters, axis = named("d", s.rank()), s.axis()
    parts = named("x", len(s.node.inputs))
    inputs = [" ".join(_with(letters, axis, part)) for part in parts]
    out = " ".join(_with(letters, axis, segments(parts)))
    formula = " + ".join(map(str, range(len(parts))))
    return Signature(f"{', '.join(inputs)} -> {out}", linear=formula, moves=True)


def _split(s: Site) -> Signature:
    letters, axis = named("d", s.rank()), s.axis()
    parts = named("x", len(s.node.outputs))
    outputs = ", ".join(" ".join(_with(letters, axis, part)) for part in parts)
    stated = s.has(1)
    return Signature(
        f"{' '.join(_with(letters, axis, segments(parts)))}, _ -> {outputs}",
        uses={(1, index): part for index, part in enumerate(parts)} if stated else {},
        fixed={} if stated else {" ".join(parts): "cuts it into equal parts"},
        linear="0",
        moves=True,
    )


def _with(letters: list[str], axis: int, term: str) -> list[str]:
    return [*letters[:axis], term, *letters[axis + 1 :]]


def segments(parts: Iterable[str]) -> str:
    """The term of segments one after another; of a single one that segment."""
    found = [part for part in parts if part]
    return found[0] if len(found) == 1 else f"({'|'.join(found)})"


# -- Slice ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """What a slice takes of one axis: terms of the whole axis, of the part, and of its literals.

    ``start`` and ``end`` are the terms whose size the literals are; empty where the literal says the
    beginning, the end, or a place within a row.
    """

    whole: str
    part: str
    sizes: Mapping[str, int] = field(default_factory=dict)
    start: str = ""
    end: str = ""
    fixed: Mapping[str, str] = field(default_factory=dict)


def _slice(s: Site) -> Signature:
    rank = s.rank()
    axes = s.ints(3) if s.has(3) else tuple(range(len(s.ints(1) or ())))
    steps = s.ints(4) if s.has(4) else (1,) * len(axes or ())
    if axes is None or steps is None:
        s.refuse("slices axes that are computed")
    starts, ends = s.ints(1), s.ints(2)
    before, after = named("d", rank), named("d", rank)
    sizes: dict[str, int] = {}
    uses: dict[Spot, str] = {}
    fixed: dict[str, str] = {}
    for index, (axis, step) in enumerate(zip(axes, steps, strict=True)):
        axis %= rank
        size = s.shape()[axis]
        if starts is None or ends is None or not isinstance(size, int):
            part = _unknown(axis, "takes a part of it that is computed")
        else:
            part = sliced(axis, size, starts[index], ends[index], step)
        before[axis], after[axis] = part.whole, part.part
        sizes |= part.sizes
        fixed |= part.fixed
        uses |= {(1, index): part.start} if part.start else {}
        uses |= {(2, index): part.end} if part.end else {}
    return Signature(
        f"{' '.join(before)}, _, _, _, _ -> {' '.join(after)}",
        sizes=sizes,
        uses=uses,
        fixed=fixed,
        linear="0",
        moves=True,
    )


def _unknown(axis: int, reason: str) -> Part:
    whole, part = f"x{axis}", f"y{axis}"
    return Part(whole, part, fixed={f"{whole} {part}": reason})


def sliced(axis: int, size: int, start: int, end: int, step: int) -> Part:
    """``whole[start:end:step]``; with a step, whole rows of ``step`` positions and one column of them.

    ``[p | x | q]`` for a step of 1, of which x is taken. Else ``([p | x | q] [u | v | w])``, of which
    ``x v`` is taken, followed by the first positions of a row that is not complete (``t``).
    """
    taken = range(*slice(start, end, step).indices(size))
    if step < 0:
        return _unknown(axis, "reverses it")
    if start < 0 or -TO_THE_END < end < 0:
        return _unknown(axis, "counts its positions from the end")
    if not taken:
        return _unknown(axis, "takes nothing of it")
    p, x, q, u, v, w = (f"{letter}{axis}" for letter in "pxquvw")
    open_end = end >= size
    if step == 1:
        there = _there({p: taken.start, x: len(taken), q: size - taken.stop})
        upto = segments(letter for letter in (p, x) if letter in there)
        return Part(segments(there), x, there, p if p in there else "", "" if open_end else upto)

    # Rows of `step` positions, and perhaps the first positions of one more.
    rows, rest = divmod(size, step)
    above, column = divmod(taken.start, step)
    full = min(len(taken), rows - above)  # rows of which a position is taken
    columns = _there({u: column, v: 1, w: step - 1 - column} if rows else {})
    lines = _there({p: above, x: full, q: rows - above - full})
    last = full < len(taken)
    tail = _there(
        {f"e{axis}": column, f"f{axis}": 1, f"g{axis}": rest - column - 1}
        if last
        else {f"g{axis}": rest}
    )
    whole_rows = f"({segments(lines)} {segments(columns)})" if rows else ""
    upto = segments(name for name in lines if name != q)
    taken_rows = f"({upto} {segments(columns)})" if above + full else ""
    taken_tail = [name for name in tail if last and name[0] in "ef"]
    return Part(
        segments([whole_rows, *tail]),
        segments([f"({x} {v})" if full else "", f"f{axis}" if last else ""]),
        {**lines, **columns, **tail},
        start=segments([f"({p} {segments(columns)})", u if column else ""]) if above else "",
        end="" if open_end else segments([taken_rows, *taken_tail]),
        fixed={" ".join([*columns, *tail]): f"takes one of {step} positions"},
    )


def _there(lengths: Mapping[str, int]) -> dict[str, int]:
    return {letter: length for letter, length in lengths.items() if length}


# -- Pad --------------------------------------------------------------------------------------------


def _pad(s: Site) -> Signature:
    """New positions before and after; what they hold comes from elsewhere unless it is constant."""
    rank = s.rank()
    pads = s.ints(1)
    axes = s.ints(3) if s.has(3) else tuple(range(rank))
    if pads is None or axes is None:
        s.refuse("pads by computed numbers")
    constant = s.text("mode", "constant") == "constant"
    before, after = named("d", rank), named("d", rank)
    sizes: dict[str, int] = {}
    uses: dict[Spot, str] = {}
    fixed: dict[str, str] = {}
    for index, axis in enumerate(axes):
        axis %= rank
        start, end = pads[index], pads[index + len(axes)]
        if not start and not end:
            continue
        if not constant or start < 0 or end < 0 or not isinstance(s.shape()[axis], int):
            reason = "pads it with its own positions" if not constant else "crops it"
            before[axis], after[axis] = f"x{axis}", f"y{axis}"
            fixed[f"x{axis} y{axis}"] = reason
            continue
        first, last = f"u{axis}" if start else "", f"v{axis}" if end else ""
        sizes |= _there({f"u{axis}": start, f"v{axis}": end})
        uses |= {(1, index): first} if start else {}
        uses |= {(1, index + len(axes)): last} if end else {}
        after[axis] = segments([first, before[axis], last])
    return Signature(
        f"{' '.join(before)}, _, _, _ -> {' '.join(after)}",
        sizes=sizes,
        uses=uses,
        fixed=fixed,
        linear="0"
        if not s.has(2) or s.number(2) == 0
        else "",  # other constants do not scale along
        moves=not s.has(2),
    )


TABLE: Table = {"Concat": _concat, "Pad": _pad, "Slice": _slice, "Split": _split}
