"""Recurrent layers: sequences [s, b, i] (or [b, s, i] with layout=1) and states [d, b, h]."""

from __future__ import annotations

from netlathe.ir import dims
from netlathe.ir.dims import Dim, Shape
from netlathe.ir.shapes.elementwise import same_dtype
from netlathe.ir.types import Site, Type

_GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
_STALE = "slice all gates of the input, recurrence and bias weights together"


def _recurrent(s: Site) -> list[Type]:
    gates, cell = _GATES[s.node.op_type], s.node.op_type == "LSTM"
    dtype = same_dtype(s, (0, 1, 2, 3, 5, 6, 7))
    for index in (0, 1, 2):
        s.rank(index, 3)
    x, weight, recurrence = s.shape(0), s.shape(1), s.shape(2)
    batch_first = s.integer("layout") == 1
    length, batch, width = (None, None, None) if x is None else (x[0], x[1], x[2])
    if batch_first:
        length, batch = batch, length
    directions = 2 if s.text("direction", "forward") == "bidirectional" else 1
    hidden: Dim = s.integer("hidden_size") or None
    if recurrence is not None:
        what = f"hidden_size must be the last axis of the recurrence weight {s.name(2)}"
        hidden = s.equal(hidden, recurrence[2], "width", what, *s.show(2), help=_STALE)
    stacked = dims.product((gates, hidden))
    bias = dims.product((2, stacked))
    peephole = dims.product((3, hidden))
    state: Shape = (batch, directions, hidden) if batch_first else (directions, batch, hidden)
    wanted: dict[int, Shape] = {
        1: (directions, stacked, width),
        2: (directions, stacked, hidden),
        3: (directions, bias),
        4: (batch,),
        5: state,
    }
    if cell:
        wanted |= {6: state, 7: (directions, peephole)}
    for index, shape in wanted.items():
        own = s.shape(index)
        if own is None:
            continue
        s.rank(index, len(shape))
        for axis, (need, have) in enumerate(zip(shape, own, strict=True)):
            what = f"axis {axis} of {s.name(index)} does not fit {s.node.op_type}"
            s.equal(need, have, "width", what, *s.show(0, 1, 2, index), help=_STALE)
    if weight is not None and width is None:
        width = weight[2]
    whole: Shape = (length, directions, batch, hidden)
    if batch_first:
        whole = (batch, length, directions, hidden)
    return [Type(dtype, whole), Type(dtype, state), Type(dtype, state)]


RULES = {"GRU": _recurrent, "LSTM": _recurrent, "RNN": _recurrent}
