"""Dims of several groups are scaled jointly, position by position, and the function stays."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from netlathe.analysis.axes import analyse
from netlathe.analysis.axes.joint import Joint, scale_jointly, to_scale_jointly
from netlathe.execute import compare, ort
from netlathe.ir import normal
from tests.ir.onnx_text import matrix, model

Array = npt.NDArray[Any]
IMAGE = {"x": matrix(2, 4, 6, 6, seed=9)}


def joints(made: ir.Model, name: str, dim: int = 1) -> list[Joint | str]:
    """What is found for a value of the model, while what its convolutions make stays."""
    normal.normalize(made)
    (value,) = (v for node in made.graph for v in node.outputs if v.name == name)
    keep = [node.outputs[0] for node, _ in value.uses() if node.op_type in ("Conv", "MatMul")]
    return to_scale_jointly(analyse(made), value, dim, keep=keep)


def scaled_alike(made: ir.Model, found: Joint, fed: dict[str, Array]) -> None:
    """Scaling by numbers that differ changes every weight of the joint, and no output."""
    before = ort.run(made, fed)
    held = {v: v.const_value.numpy().copy() for v in found.weights if v.const_value is not None}
    factors = np.exp(np.random.default_rng(3).standard_normal(found.count))
    scale_jointly(found, factors)
    for value, array in held.items():
        assert value.const_value is not None
        assert not np.array_equal(array, value.const_value.numpy())
    after = ort.run(made, fed)
    for key in before:
        assert compare.relative_error(after[key], before[key]) <= 1e-5


def test_channels_of_a_grouped_convolution() -> None:
    """The input's dim is (g i): a kernel has g in one dim and i in another."""
    made = model(
        "float[b,4,6,6] x",
        "float y",
        "h = Conv(x, one) r = Relu(h) y = Conv<group=2>(r, two)",
        one=matrix(6, 4, 1, 1, seed=1),
        two=matrix(8, 3, 3, 3, seed=2),
    )
    (found,) = joints(made, "r")
    assert isinstance(found, Joint) and found.count == 6
    assert {v.name: e for v, e in found.weights.items()} == {"one": 1, "two": -1}
    scaled_alike(made, found, IMAGE)


def test_each_segment_of_a_concatenation_by_itself() -> None:
    made = model(
        "float[b,4,6,6] x",
        "float y",
        "h = Conv(x, one) k = Sigmoid(h) r = Relu(h) s = Conv(k, two)"
        " c = Concat<axis=1>(r, s, r) y = Conv(c, three)",
        one=matrix(3, 4, 1, 1, seed=1),
        two=matrix(5, 3, 1, 1, seed=2),
        three=matrix(2, 11, 1, 1, seed=3),
    )
    twice, once = joints(made, "c")
    assert isinstance(twice, str) and "Sigmoid is not linear" in twice
    assert isinstance(once, Joint) and once.count == 5
    value = next(v for node in made.graph for v in node.outputs if v.name == "c")
    assert once.channels(value, 1).tolist() == [-1] * 3 + [0, 1, 2, 3, 4] + [-1] * 3
    scaled_alike(made, once, IMAGE)


def test_a_segment_that_stands_twice() -> None:
    made = model(
        "float[b,4,6,6] x",
        "float y",
        "h = Conv(x, one) r = Relu(h) c = Concat<axis=1>(r, r) y = Conv(c, two)",
        one=matrix(3, 4, 1, 1, seed=1),
        two=matrix(2, 6, 1, 1, seed=2),
    )
    (found,) = joints(made, "c")
    assert isinstance(found, Joint) and found.count == 3
    value = next(v for node in made.graph for v in node.outputs if v.name == "c")
    assert found.channels(value, 1).tolist() == [0, 1, 2, 0, 1, 2]
    scaled_alike(made, found, IMAGE)


def test_where_one_group_cannot_be_scaled_its_positions_share_factors() -> None:
    """What takes the factors in has no heads: a factor for each position of a head, alike in all."""
    made = model(
        "float[b,4] x",
        "float y",
        "h = MatMul(x, one) s = Sigmoid(h) t = Reshape(s, split) m = Mul(t, by)"
        " w = Reshape(m, whole) y = MatMul(w, two)",
        one=matrix(4, 6, seed=1),
        by=matrix(3, seed=4),
        two=matrix(6, 5, seed=2),
        split=[0, 2, 3],
        whole=[0, 6],
    )
    (found,) = joints(made, "w")
    assert isinstance(found, Joint) and found.count == 3
    assert {v.name: e for v, e in found.weights.items()} == {"by": 1, "two": -1}
    value = next(v for node in made.graph for v in node.outputs if v.name == "w")
    assert found.channels(value, 1).tolist() == [0, 1, 2, 0, 1, 2]
    scaled_alike(made, found, {"x": matrix(3, 4, seed=5)})


def test_factors_must_fit() -> None:
    made = model(
        "float[b,4,6,6] x",
        "float y",
        "h = Conv(x, one) r = Relu(h) y = Conv(r, two)",
        one=matrix(3, 4, 1, 1, seed=1),
        two=matrix(2, 3, 1, 1, seed=2),
    )
    (found,) = joints(made, "r")
    assert isinstance(found, Joint)
    for factors, message in (
        (np.ones(5), "takes 3 factors"),
        (np.zeros(3), "none of them 0"),
        (-np.ones(3), "takes positive factors"),
    ):
        with pytest.raises(ValueError, match=message):
            scale_jointly(found, factors)


def test_a_row_that_is_added_and_stacked_is_not_scaled() -> None:
    """EdgeNeXt stacks sines and cosines: nothing takes in a factor of the row that they are put into."""
    made = model(
        "float[b,4,6,6] x",
        "float y",
        "a = Sin(x) c = Cos(x) p = Unsqueeze(a, last) q = Unsqueeze(c, last) s = Concat<axis=4>(p, q)"
        " t = Transpose<perm=[0,1,4,2,3]>(s) h = Reshape(t, flat) y = Conv(h, w)",
        last=np.array([4]),
        flat=np.array([0, 8, 6, 6]),
        w=matrix(3, 8, 1, 1),
    )
    found = joints(made, "h")
    assert found and all(isinstance(each, str) for each in found)
