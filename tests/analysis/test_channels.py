"""Where an axis goes: every answer is held against positions pushed through ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from netlathe.analysis import channels
from netlathe.execute import ort
from tests.passes.raising import graph

SHAPE = (2, 3, 4, 5)
# name -> (operator on x [2,3,4,5], constants, the axes that come out and where)
MOVES: dict[str, tuple[str, dict[str, Any], dict[int, int]]] = {
    "transpose": ("Transpose<perm = [3, 1, 0, 2]>(x)", {}, {3: 0, 1: 1, 0: 2, 2: 3}),
    "merge": ("Reshape(x, to)", {"to": [6, 4, 5]}, {2: 1, 3: 2}),
    "split": ("Reshape(x, to)", {"to": [2, 3, 2, 2, 5]}, {0: 0, 1: 1, 3: 4}),
    "regroup": ("Reshape(x, to)", {"to": [3, 2, 4, 5]}, {2: 2, 3: 3}),
    "a dim of one": ("Reshape(x, to)", {"to": [2, 1, 3, 20]}, {0: 0, 1: 2}),
    "unsqueeze": ("Unsqueeze(x, at)", {"at": [0, 3]}, {0: 1, 1: 2, 2: 4, 3: 5}),
    "slice": ("Slice(x, at, to, axes)", {"at": [1], "to": [3], "axes": [2]}, {0: 0, 1: 1, 3: 3}),
    "gather": ("Gather<axis = 1>(x, i)", {"i": [2, 0, 0]}, {0: 0, 2: 2, 3: 3}),
    "gather one": ("Gather<axis = 1>(x, i)", {"i": np.array(2)}, {0: 0, 2: 1, 3: 2}),
    "gather many": ("Gather<axis = 0>(x, i)", {"i": np.ones((2, 2), np.int64)}, {1: 2, 2: 3, 3: 4}),
    "gather slices": ("GatherND(x, i)", {"i": np.ones((7, 2), np.int64)}, {2: 1, 3: 2}),
    "expand": ("Expand(x, to)", {"to": [6, 1, 1, 1, 1]}, {0: 1, 1: 2, 2: 3, 3: 4}),
    "mean": ("ReduceMean<keepdims = 0>(x, axes)", {"axes": [0, 2]}, {1: 0, 3: 1}),
    "sum": ("ReduceSum(x, axes)", {"axes": [2]}, {0: 0, 1: 1, 3: 3}),
    "activation": ("Relu(x)", {}, {}),
}


def made(operator: str, constants: dict[str, Any]) -> tuple[ir.Model, ir.Node]:
    shape = ",".join(map(str, SHAPE))
    model = graph(f"float[{shape}] x", f"v = {operator} y = Identity(v)", **constants)
    return model, model.graph[0]


@pytest.mark.parametrize("name", MOVES)
def test_where_axes_go(name: str) -> None:
    operator, constants, expected = MOVES[name]
    _, node = made(operator, constants)
    assert dict(channels.mixed(node)) == expected
    if not node.op_type.startswith("Reduce"):
        assert dict(channels.moved(node)) == expected


@pytest.mark.parametrize("name", MOVES)
def test_positions_come_out_where_they_are_said_to(name: str) -> None:
    operator, constants, _ = MOVES[name]
    model, node = made(operator, constants)
    for axis, after in channels.mixed(node).items():
        sizes = [1] * len(SHAPE)
        sizes[axis] = SHAPE[axis]
        positions = np.broadcast_to(np.arange(SHAPE[axis], dtype=np.float32).reshape(sizes), SHAPE)
        (out,) = ort.run(model, {"x": np.ascontiguousarray(positions)}).values()
        lines = np.moveaxis(out, after, 0).reshape(out.shape[after], -1)
        if node.op_type == "ReduceSum":
            lines = lines / SHAPE[2]
        np.testing.assert_array_equal(
            lines, np.repeat(np.arange(SHAPE[axis]), lines.shape[1]).reshape(lines.shape)
        )


def test_squeeze_and_casts() -> None:
    model = graph(
        "float[1,3,1,5] x",
        "a = Squeeze(x, at) c = Cast<to = 10>(a) d = Cast<to = 7>(c) e = Cast<to = 1>(d) y = Exp(e)",
        at=[0, 2],
    )
    squeeze, half, whole, back, _ = model.graph
    assert dict(channels.moved(squeeze)) == {1: 0, 3: 1}
    assert dict(channels.moved(half)) == {0: 0, 1: 1}
    assert not channels.moved(whole) and not channels.moved(back)  # integers cut off


def test_dynamic_sizes() -> None:
    model = graph(
        "float[b,s,64] x",
        "a = Reshape(x, rows) y = Reshape(a, parts)",
        rows=[-1, 64],
        parts=[0, 4, 16],
    )
    rows = model.graph[0]
    assert rows.op_type == "Reshape" and dict(channels.moved(rows)) == {}
    model = graph("float[b,s,64] x", "a = Reshape(x, rows) y = Exp(a)", rows=[-1, 64])
    assert dict(channels.moved(model.graph[0])) == {2: 1}
