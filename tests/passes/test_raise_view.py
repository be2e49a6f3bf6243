"""Strided views written as look-ups become a Reshape, where they are one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.passes.raising import graph, ops, raised, refusals

# as_strided(x, [b, 6, 2], [12, 2, 1]), as PyTorch's exporter writes it
STRIDED = """flat = Reshape(x, minus) n = Shape<start=0, end=1>(x) count = Squeeze(n)
    rows = Range(zero, count, one) starts = Mul(rows, twelve) column = Unsqueeze(starts, axes)
    at = Add(column, inner) y = Gather<axis=0>(flat, at)"""
INT = np.int64
NUMBERS: dict[str, Any] = {
    "minus": [-1],
    "zero": np.array(0, INT),
    "one": np.array(1, INT),
    "twelve": np.array(12, INT),
    "axes": [1, 2],
    "inner": np.arange(12).reshape(1, 6, 2),
}


@pytest.mark.parametrize("dims", ["b,12", "b,6,2", "b,3,4", "b,6,1,2"])
def test_a_view_of_all_of_a_value_is_a_reshape(dims: str) -> None:
    after, entries = raised(graph(f"float[{dims}] x", STRIDED, **NUMBERS))
    assert "Gather" not in ops(after)
    (entry,) = entries
    assert entry.status == "applied" and entry.reason.endswith("to [b,6,2] from 6 nodes")
    assert ops(after)["Reshape"] == (dims != "b,6,2")


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"inner": np.arange(12).reshape(1, 2, 6).transpose(0, 2, 1)}, "differs by"),
        ({"inner": np.arange(12)[::-1].reshape(1, 6, 2)}, "differs by"),
        ({"inner": np.arange(6).reshape(1, 6, 1)}, "ONNX Runtime cannot run it"),  # half of it
        ({"twelve": np.array(6, INT)}, "differs by"),  # rows overlap
    ],
)
def test_another_view_stays_a_look_up(changed: dict[str, Any], why: str) -> None:
    made = graph("float[b,12] x", STRIDED, **NUMBERS | changed)
    assert why in refusals(raised(made)[1])


def test_positions_that_are_data_stay_a_look_up() -> None:
    made = graph("float[b,4] x, int64[s] i", "f = Reshape(x, n) y = Gather<axis=0>(f, i)", n=[-1])
    assert refusals(raised(made)[1]) == "looks up positions that are data (i)"


def test_constant_positions_stay_a_look_up() -> None:
    made = graph("float[b,4] x", "f = Reshape(x, n) y = Gather<axis=0>(f, i)", n=[-1], i=[0, 3])
    assert refusals(raised(made)[1]).startswith("looks up constant positions")
