"""Operators that sum up an axis, or look along it.

Deleting positions of a reduced axis leaves the reduction over the kept positions: a mean divides by
their number, a softmax is that of logits which are -inf elsewhere.
"""

from __future__ import annotations

from netlathe.analysis.axes.signature import Signature, Site, Table, named


def reduced_letters(s: Site) -> tuple[list[str], list[str]]:
    """Letters for the dims of input 0, and those for the output of a reduction over input 1."""
    letters = named("d", s.rank())
    axes = s.ints(1) if s.has(1) else ()
    if axes is None:
        s.refuse("reduces axes that are computed")
    if not axes:
        axes = () if s.integer("noop_with_empty_axes") else tuple(range(len(letters)))
    gone = {axis % len(letters) for axis in axes}
    return letters, _without(letters, gone, keep=bool(s.integer("keepdims", 1)))


def _without(letters: list[str], gone: set[int], *, keep: bool) -> list[str]:
    """Letters without those at ``gone``, or with dims of one position in their place."""
    pairs = enumerate(letters)
    return [
        "1" if index in gone else letter for index, letter in pairs if keep or index not in gone
    ]


def _reduction(s: Site) -> Signature:
    letters, left = reduced_letters(s)
    kind = s.node.op_type.removeprefix("Reduce")
    return Signature(
        f"{' '.join(letters)}, _ -> {' '.join(left)}",
        linear="0" if kind in ("L1", "L2", "Max", "Mean", "Min", "Sum") else "",
        positive=kind not in ("Mean", "Sum"),
    )


def _along(s: Site, letter: str = "n") -> tuple[list[str], int]:
    """Letters of input 0 with ``letter`` at the node's axis, and that axis."""
    letters, axis = named("d", s.rank()), s.axis(-1)
    letters[axis] = letter
    return letters, axis


def _arg(s: Site) -> Signature:
    """ArgMax, ArgMin: which position of ``n`` it is."""
    letters, axis = _along(s)
    left = _without(letters, {axis}, keep=bool(s.integer("keepdims", 1)))
    return Signature(f"{' '.join(letters)} -> {' '.join(left)}", makes={0: "n"})


def _top_k(s: Site) -> Signature:
    """Values and positions of the ``k`` largest; which ones they are, the data say."""
    letters, axis = _along(s)
    best = list(letters)
    best[axis] = "k"
    count = s.ints(1)
    return Signature(
        f"{' '.join(letters)}, _ -> {' '.join(best)}, {' '.join(best)}",
        fixed={"k": "keeps a set number of positions"},
        least={"n": count[0]} if count else {},
        makes={1: "n"},
    )


def _softmax(s: Site) -> Signature:
    letters = " ".join(_along(s)[0])
    return Signature(f"{letters} -> {letters}")


def _cumulative(s: Site) -> Signature:
    axis = s.ints(1)
    if axis is None:
        s.refuse("runs along an axis that is computed")
    letters = named("d", s.rank())
    order = {letters[axis[0] % len(letters)]: "adds up positions in their order"}
    line = " ".join(letters)
    return Signature(f"{line}, _ -> {line}", ordered=order, linear="0")


_REDUCTIONS = "L1 L2 LogSum LogSumExp Max Mean Min Prod Sum SumSquare"

TABLE: Table = {
    **{f"Reduce{name}": _reduction for name in _REDUCTIONS.split()},
    **dict.fromkeys(("ArgMax", "ArgMin"), _arg),
    **dict.fromkeys(("Hardmax", "LogSoftmax", "Softmax"), _softmax),
    "CumSum": _cumulative,
    "TopK": _top_k,
}
