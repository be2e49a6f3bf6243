"""What is computed of rows becomes the operator along the last dim, where that is the same."""

from __future__ import annotations

import pytest

from tests.passes.raising import graph, node, ops, raised, refusals

OLD = "r = Flatten<axis={axis}>(x) p = {op}<axis=-1>(r) n = Shape(x) y = Reshape(p, n)"


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax", "Hardmax"])
@pytest.mark.parametrize("dims", ["b,s", "b,s,7", "b,4,s,t"])
def test_rows_of_the_last_dim_are_not_laid_out(op: str, dims: str) -> None:
    body = OLD.format(op=op, axis=dims.count(","))
    after, entries = raised(graph(f"float[{dims}] x", body))
    assert ops(after) == {op: 1}
    assert node(after, op).attributes.get_int("axis", 0) == dims.count(",")
    assert not entries or entries[0].reason == f"{op} along the last dim from 3 nodes"


def test_rows_of_more_dims_are_laid_out() -> None:
    made = graph("float[b,4,s] x", OLD.format(op="Softmax", axis=1))
    assert "rows are not what lies along the last dim" in refusals(raised(made)[1])


def test_rows_that_something_else_reads_stay() -> None:
    body = "r = Flatten<axis=2>(x) p = Softmax<axis=-1>(r) n = Shape(x) z = Reshape(p, n)"
    made = graph("float[b,4,s] x", f"{body} m = ReduceSum<keepdims=0>(p) y = Add(z, m)")
    assert "ReduceSum m reads the rows too" in refusals(raised(made)[1])


def test_a_softmax_of_another_shape_is_no_candidate() -> None:
    """Where it is no layout in rows and back, there is nothing to raise."""
    made = graph("float[b,8] x", "p = Softmax<axis=-1>(x) y = Reshape(p, n)", n=[-1, 2, 4])
    after, entries = raised(made)
    assert entries == [] and ops(after) == ops(made)
