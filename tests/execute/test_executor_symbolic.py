"""Symbolic runs: models that work for all sizes pass, and baked sizes are found and named."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from netlathe.diagnostics import VerifyError
from netlathe.execute.symbolic import check_symbolic
from tests.execute import text


def model(body: str, inputs: str, **weights: Any) -> ir.Model:
    """A graph ``y = body(inputs)``; lists become int64 weights."""
    arrays = {name: np.asarray(value) for name, value in weights.items()}
    return text.model(f"g ({inputs}) => (float[a, b, c] y) {{ {body} }}", arrays)


HEADS = """
    q = Reshape(x, shape)
    y = Transpose<perm = [0, 2, 1, 3]>(q)
"""
X = "float[batch, sequence, 64] x"


@pytest.mark.parametrize("shape", [[0, 0, 4, 16], [0, -1, 4, 16]])
def test_reshape_that_follows_the_input(shape: list[int]) -> None:
    assert check_symbolic(model(HEADS, X, shape=shape)) == []


@pytest.mark.parametrize("batch", [2, 3, 11])
def test_a_baked_batch_is_found_and_named(batch: int) -> None:
    """Also where the literal happens to be the size that the check tries."""
    checked = model(HEADS, X, shape=[batch, 5, 4, 16])
    checked.graph[0].metadata_props["netlathe.module"] = "layers.3.attention"
    with pytest.raises(VerifyError) as caught:
        check_symbolic(checked)
    (problem,) = caught.value.diagnostics
    assert "q = Reshape" in problem.at
    assert problem.where == "layers.3.attention"


def test_a_computed_shape_stays_symbolic() -> None:
    body = """
        zero = Constant<value_int = 0>()
        one = Constant<value_int = 1>()
        four = Constant<value_ints = [4]>()
        rest = Constant<value_ints = [-1]>()
        axis = Constant<value_ints = [0]>()
        dims = Shape(x)
        b = Gather<axis = 0>(dims, zero)
        s = Gather<axis = 0>(dims, one)
        tokens = Mul(b, s)
        listed = Unsqueeze(tokens, axis)
        shape = Concat<axis = 0>(listed, four, rest)
        flat = Reshape(x, shape)
        bs = Unsqueeze(b, axis)
        ss = Unsqueeze(s, axis)
        back = Concat<axis = 0>(bs, ss, four, rest)
        y = Reshape(flat, back)
    """
    assert check_symbolic(model(body, X)) == []


def test_positions_made_from_a_shape() -> None:
    body = """
        start = Constant<value_int = 0>()
        step = Constant<value_int = 1>()
        dims = Shape<start = 1, end = 2>(x)
        length = Squeeze(dims)
        positions = Range(start, length, step)
        rows = Gather<axis = 0>(table, positions)
        y = Add(x, rows)
    """
    assert check_symbolic(model(body, X, table=np.zeros((512, 64), np.float32))) == []


def test_a_slice_of_a_baked_length_is_found() -> None:
    body = """
        s = Constant<value_ints = [0]>()
        e = Constant<value_ints = [16]>()
        a = Constant<value_ints = [1]>()
        part = Slice(x, s, e, a)
        y = Add(x, part)
    """
    # A cut to 16 positions fits for short inputs only: at the sizes tried it is the whole.
    notes = check_symbolic(model(body, X))
    assert notes == []
    with pytest.raises(VerifyError, match="y = Add"):
        check_symbolic(model(body, X), {"sequence": 20})


def test_an_expression_among_the_input_dims() -> None:
    body = """
        whole = Concat<axis = 1>(past, x)
        y = Add(whole, mask)
    """
    inputs = (
        "float[batch, sequence, 64] x, float[batch, past, 64] past,"
        ' float[batch, "past + sequence", 1] mask'
    )
    checked = model(body, inputs.replace('"past + sequence"', "total"))
    checked.graph.inputs[2].shape = ir.Shape(["batch", ir.SymbolicDim("past + sequence"), 1])
    assert check_symbolic(checked) == []


def test_dims_of_different_names_are_different_unless_sizes_say_otherwise() -> None:
    checked = model("y = Add(x, z)", X + ", float[batch, other, 64] z")
    with pytest.raises(VerifyError, match="y = Add"):
        check_symbolic(checked)
    (note,) = check_symbolic(checked, {"sequence": 5, "other": 5})
    assert "other" in note.message and "sequence" in note.message


def test_what_depends_on_data_is_noted_and_not_followed() -> None:
    body = """
        flag = ReduceMax<keepdims = 0>(x)
        count = Cast<to = 7>(flag)
        axis = Constant<value_ints = [0]>()
        listed = Unsqueeze(count, axis)
        rest = Constant<value_ints = [-1]>()
        shape = Concat<axis = 0>(listed, rest)
        flat = Reshape(x, shape)
        y = Relu(flat)
    """
    notes = check_symbolic(model(body, X))
    assert all("data" in note.message or "takes it" in note.message for note in notes)
