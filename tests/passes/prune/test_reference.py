"""Every operator in which an axis may end: the masked reference equals the pruned model."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from netlathe.passes.prune import Prune
from netlathe.passes.prune.reference import _RULES
from tests.analysis.residual import typed
from tests.passes.prune.helpers import check, pruned

# What becomes of h [b,s,6], which is also summed over by a weight.
ENDS = {
    "ArgMax": "i = ArgMax<axis=-1, keepdims=1>(h) e = Gather(g1, i)",
    "ArgMin": "i = ArgMin<axis=-1, keepdims=1>(h) e = Gather(g1, i)",
    "CumSum": "c = CumSum(h, axis) e = MatMul(c, w3)",
    "Einsum": 'e = Einsum<equation="bsi,ij->bsj">(h, w3)',
    "Gemm": "f = Reshape(h, flat) m = Gemm(f, w3) e = Reshape(m, back)",
    "Hardmax": "c = Hardmax<axis=-1>(h) e = MatMul(c, w3)",
    "LayerNormalization": "c = LayerNormalization(h, g1, g2) e = MatMul(c, w3)",
    "LogSoftmax": "c = LogSoftmax<axis=-1>(h) e = MatMul(c, w3)",
    "LpNormalization": "c = LpNormalization<axis=-1, p=2>(h) e = MatMul(c, w3)",
    "RMSNormalization": "c = RMSNormalization(h, g1) e = MatMul(c, w3)",
    "Softmax": "c = Softmax<axis=-1>(h) e = MatMul(c, w3)",
    "TopK": "e, i = TopK<axis=-1>(h, one)",
    **{
        f"Reduce{kind}": f"c = Abs(h) e = Reduce{kind}<keepdims=1>(c, axes)"
        for kind in "L1 L2 LogSum LogSumExp Max Mean Min Prod Sum SumSquare".split()
    },
}
CHANNELS = {
    "Conv": "e = Conv(c, k1)",
    "ConvTranspose": "e = ConvTranspose(c, k2)",
    "GroupNormalization": "n = GroupNormalization<num_groups=2>(c, g1, g2) e = Conv(n, k1)",
}
COVERED = {*ENDS, *CHANNELS, "MatMul", "Attention"}  # attention: in the models


def test_every_rule_is_covered() -> None:
    assert set(_RULES) == COVERED


def _arrays(*shapes: tuple[int, ...]) -> list[npt.NDArray[np.float32]]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("op", ENDS)
def test_an_axis_that_ends_in_an_operator(op: str) -> None:
    w1, w2, w3, g1, g2, x = _arrays((4, 6), (6, 1), (6, 1), (6,), (6,), (2, 3, 4))
    body = f"h = MatMul(x, w1) r = MatMul(h, w2) {ENDS[op]} y = Add(r, e)"
    numbers = {
        "axis": np.array(-1),
        "axes": np.array([-1]),
        "one": np.array([1]),
        "flat": np.array([-1, 6]),
        "back": np.array([2, 3, 1]),
    }
    weights = {"w1": w1, "w2": w2, "w3": w3, "g1": g1, "g2": g2, **numbers}
    model = typed(body, "float[2,3,4] x", "float[2,3,1] y", **weights)
    (entry,) = check(model, Prune(ratio=0.5), [{"x": x}])
    assert len(entry.arrays["kept"]) == 3


@pytest.mark.parametrize("op", CHANNELS)
def test_channels_that_end_in_an_operator(op: str) -> None:
    k0, k1, k2, g1, g2, x = _arrays(
        (6, 3, 1, 1), (2, 6, 3, 3), (6, 2, 2, 2), (6,), (6,), (2, 3, 5, 5)
    )
    weights = {"k0": k0, "k1": k1, "k2": k2, "g1": g1, "g2": g2}
    body = f"c = Conv(x, k0) {CHANNELS[op]} y = Relu(e)"
    model = typed(body, "float[2,3,5,5] x", "float y", **weights)
    check(model, Prune(ratio=0.4, scope=("channels",)), [{"x": x}])


_MERGED = """
    c = Conv(x, k0)  rows = Reshape(c, flat)  s = Softmax<axis={axis}>(rows)
    u = Reshape(s, back)  y = Conv(u, k1)
"""


@pytest.mark.parametrize("axis", [0, 1])
def test_channels_that_are_one_dim_with_a_dynamic_batch(axis: int) -> None:
    """As MobileViT unfolds its patches: they go, unless something looks along channels and batch as one."""
    k0, k1 = _arrays((6, 3, 1), (2, 6, 1))
    numbers = {"flat": np.array([-1, 5]), "back": np.array([-1, 6, 5])}
    model = typed(_MERGED.format(axis=axis), "float[b,3,5] x", "float y", k0=k0, k1=k1, **numbers)
    pass_ = Prune(ratio=0.5, scope=("channels",))
    if axis:
        check(model, pass_, [{"x": _arrays((batch, 3, 5))[0]} for batch in (2, 3)])
    else:
        _, entries = pruned(model, pass_)
        assert {entry.status for entry in entries} == {"refused"}
        assert any("Softmax looks along it and a dynamic dim as one" in e.reason for e in entries)


def test_a_size_computed_before_it_is_known_to_hold_channels() -> None:
    """DeBERTa spreads indices over (batch heads) before it looks up scores of that size with them."""
    k0, k1 = _arrays((6, 3, 1), (2, 6, 1))
    body = """
        c = Conv(x, k0)  rows = Reshape(c, flat)
        n = Shape<start=0, end=1>(x)  n6 = Mul(n, six)  size = Concat<axis=0>(n6, five)
        where = Expand(order, size)  found = GatherElements<axis=1>(rows, where)
        u = Reshape(found, back)  y = Conv(u, k1)
    """
    numbers = {"flat": np.array([-1, 5]), "back": np.array([-1, 6, 5])}
    numbers |= {"six": np.array([6]), "five": np.array([5]), "order": np.array([[4, 3, 2, 1, 0]])}
    model = typed(body, "float[b,3,5] x", "float y", k0=k0, k1=k1, **numbers)
    _, entries = pruned(model, Prune(ratio=0.5, scope=("channels",)))
    assert {entry.status for entry in entries} == {"refused"}
    assert any("Expand gets its size from a computation" in entry.reason for entry in entries)


def test_a_value_of_unknown_rank_loses_nothing() -> None:
    """What an If gives has none where its branches have other ranks, and is no part of any width."""
    w1, w2, x = _arrays((4, 6), (6, 4), (2, 4))
    body = """
        h = MatMul(x, w1) r = MatMul(h, w2) flat = ReduceSum <keepdims=0> (r) one = Less(flat, zero)
        i = If (one) <
            then_branch = a () => (float[2,4] t) { t = Identity(r) },
            else_branch = b () => (float[8] e) { e = Reshape(r, all) }
        >
        mean = ReduceMean <keepdims=0> (i)  y = Reshape(mean, all)
    """
    numbers = {"zero": np.array(0, np.float32), "all": np.array([-1])}
    model = typed(body, "float[2,4] x", "float y", w1=w1, w2=w2, **numbers)
    check(model, Prune(ratio=0.5), [{"x": x}])
