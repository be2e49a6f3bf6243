"""If, Loop and Scan: their bodies are typed with what goes in, and their outputs are what comes out."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from netlathe.ir import dims
from netlathe.ir.dims import Dim, Shape
from netlathe.ir.types import UNTYPED, Inference, Site, Type, infer_graph

# A state that still changes type after so many rounds has no type: every round forgets a dim or rank.
_MOST_ROUNDS = 8
_SCALAR = Type(ir.DataType.INT64, ())
_FLAG = Type(ir.DataType.BOOL, ())
_BRANCHES = ("then_branch", "else_branch")


def _graph(s: Site, name: str) -> ir.Graph:
    attribute = s.node.attributes.get(name)
    if attribute is None:
        s.fail("attribute", f"{s.node.op_type} has no {name}")
    return attribute.as_graph()


def _if(s: Site) -> list[Type]:
    condition = s.ints(0)
    types: list[list[Type]] = []
    for name in _BRANCHES:
        problems, pins = len(s.found.problems), len(s.found.pins)
        graph = _graph(s, name)
        types.append(infer_graph(graph, s.found))
        if len(graph.outputs) != len(s.node.outputs):
            message = f"{name} has {len(graph.outputs)} outputs, the node {len(s.node.outputs)}"
            s.fail("arity", message)
        if not condition:
            continue
        if bool(condition[0]) == (name == "then_branch"):
            for output, value in enumerate(graph.outputs):
                s.remember(s.found.contents(value), output)
        else:
            # What the sizes rule out need not be right for them.
            del s.found.problems[problems:], s.found.pins[pins:]
    if condition:
        return types[0 if condition[0] else 1]
    for index, (a, b) in enumerate(zip(*types, strict=True)):
        if a.dtype is not None and b.dtype is not None and a.dtype != b.dtype:
            s.fail("dtype", f"output {index} is {a.dtype.name} or {b.dtype.name}")
    return [_common(a, b) for a, b in zip(*types, strict=True)]


def _common(a: Type, b: Type) -> Type:
    """What two types agree on."""
    dtype = a.dtype if a.dtype == b.dtype else None
    if a.shape is None or b.shape is None or len(a.shape) != len(b.shape):
        return Type(dtype, None)
    shape = tuple(x if dims.same(x, y) else None for x, y in zip(a.shape, b.shape, strict=True))
    return Type(dtype, shape)


def _fixed_point(
    found: Inference,
    body: ir.Graph,
    states: list[Type],
    before: Sequence[Type],
    after: Sequence[Type],
) -> tuple[list[Type], list[Type]]:
    """The states' types that hold in every round, and the body's output types under them.

    The body takes ``before``, states, ``after`` and gives as many values as ``before``'s second entry
    (the condition) stands for, then the states, then what it scans out.
    """
    leading = len(before) // 2  # Loop: (iteration, condition) in, condition out; Scan: none
    problems, pins = len(found.problems), len(found.pins)
    outputs: list[Type] = []
    for _ in range(_MOST_ROUNDS):
        del found.problems[problems:], found.pins[pins:]
        outputs = infer_graph(body, found, (*before, *states, *after))
        results = outputs[leading : leading + len(states)]
        merged = [_common(a, b) for a, b in zip(states, results, strict=False)]
        if merged == states:
            return states, outputs
        states = merged
    return [UNTYPED] * len(states), outputs


def _loop(s: Site) -> list[Type]:
    body = _graph(s, "body")
    states = [s.type(index) for index in range(2, len(s.node.inputs))]
    if len(body.inputs) != len(states) + 2:
        s.fail(
            "arity", f"the body takes {len(body.inputs)} values, the Loop gives {len(states) + 2}"
        )
    if len(body.outputs) != len(s.node.outputs) + 1:
        s.fail("arity", f"the body gives {len(body.outputs)} values, not {len(s.node.outputs) + 1}")
    # If the condition starts true and a true one stays true, the trip count decides alone.
    condition = body.inputs[1]
    endless = not s.has(1) or s.contents(1) == (1,)
    if endless:
        s.found.known[condition] = (1,)
    carried, outputs = _fixed_point(s.found, body, states, (_SCALAR, _FLAG), ())
    if endless and s.found.known.get(body.outputs[0]) != (1,):
        endless = False
        del s.found.known[condition]
        carried, outputs = _fixed_point(s.found, body, states, (_SCALAR, _FLAG), ())
    trips: Dim = None
    limit = s.contents(0)
    if endless and limit and limit[0] is not None:
        trips = dims.largest(limit[0], 0)
    out = list(carried)
    for scanned in outputs[1 + len(states) :]:
        shape = None if scanned.shape is None else (trips, *scanned.shape)
        out.append(Type(scanned.dtype, shape))
    return out


def _scan(s: Site) -> list[Type]:
    body = _graph(s, "body")
    count = s.integer("num_scan_inputs")
    number = len(s.node.inputs) - count
    if not 0 <= number <= len(s.node.inputs) or len(body.inputs) != len(s.node.inputs):
        s.fail("arity", f"the body takes {len(body.inputs)} values, the Scan gives another number")
    if len(body.outputs) != len(s.node.outputs):
        s.fail("arity", f"the body gives {len(body.outputs)} values, not {len(s.node.outputs)}")
    states = [s.type(index) for index in range(number)]
    axes = s.integers("scan_input_axes") or (0,) * count
    if len(axes) != count:
        s.fail("attribute", f"scan_input_axes has {len(axes)} entries for {count} inputs")
    trips: Dim = None
    slices = []
    for axis, index in zip(axes, range(number, number + count), strict=True):
        shape: Shape | None = s.shape(index)
        if shape is not None:
            s.least_rank(index, 1)
            axis = s.checked_axis(axis, len(shape))
            what = "all scanned inputs need one length"
            trips = s.equal(
                trips, shape[axis], "width", what, *s.show(*range(number, number + count))
            )
            shape = (*shape[:axis], *shape[axis + 1 :])
        slices.append(Type(s.dtype(index), shape))
    carried, outputs = _fixed_point(s.found, body, states, (), slices)
    out = list(carried)
    scanned = outputs[number:]
    out_axes = s.integers("scan_output_axes") or (0,) * len(scanned)
    if len(out_axes) != len(scanned):
        s.fail("attribute", f"scan_output_axes has {len(out_axes)} entries for {len(scanned)}")
    for type_, axis in zip(scanned, out_axes, strict=True):
        if type_.shape is None:
            out.append(type_)
            continue
        at = s.checked_axis(axis, len(type_.shape) + 1)
        stacked = (*type_.shape[:at], trips, *type_.shape[at:])
        out.append(Type(type_.dtype, stacked))
    return out


RULES = {"If": _if, "Loop": _loop, "Scan": _scan}
