"""Attention of few and of many queries, heads that share keys, masks and ragged sizes, against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from netlathe.backends.tvm import machine as machines
from netlathe.backends.tvm import runtime
from netlathe.execute.compare import relative_error
from netlathe.ir import normal

pytest.importorskip("tvm", reason="the tvm extra is not installed")

from tests.backends.tvm.in_process import InProcess

Array = npt.NDArray[Any]
BOUND = 1e-5  # share of the RMS: float32 sums of some hundred products in another order

# heads, heads of keys, size of a head and of its values
HEADS = [(4, 4, 32, 32), (6, 2, 48, 16), (9, 1, 20, 36), (2, 1, 7, 5), (10, 1, 16, 64)]
# queries, keys
SIZES = [(1, 1), (1, 37), (3, 16), (7, 65), (8, 33), (29, 31), (300, 300)]


def expected(q: Array, k: Array, v: Array, mask: Array | None, causal: bool) -> Array:
    """softmax(q k' / sqrt d) v, of which what no key is left to attend is zero."""
    groups = q.shape[1] // k.shape[1]
    k, v = (np.repeat(x.astype(np.float64), groups, 1) for x in (k, v))
    scores = q.astype(np.float64) @ k.transpose(0, 1, 3, 2) / np.sqrt(q.shape[3])
    if mask is not None:
        scores = np.where(mask, scores, -np.inf)
    if causal:
        i, j = np.indices(scores.shape[2:])
        scores = np.where(j <= i, scores, -np.inf)
    top = scores.max(3, keepdims=True)
    weights = np.exp(scores - np.where(np.isinf(top), 0, top))
    total = weights.sum(3, keepdims=True)
    result: Array = (weights / np.where(total == 0, 1, total)) @ v
    return result


def built(heads: tuple[int, int, int, int], causal: bool, masked: bool, level: str) -> InProcess:
    count, shared, depth, width = heads
    mask = ", bool[b, 1, s, t] m" if masked else ""
    model = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 25]>
        one (float[b, {count}, s, {depth}] q, float[b, {shared}, t, {depth}] k,
             float[b, {shared}, t, {width}] v{mask}) => (float[b, {count}, s, {width}] y) {{
            y = Attention<is_causal={int(causal)}>(q, k, v{", m" if masked else ""})
        }}"""
    )
    normal.normalize(model)
    return InProcess(model, level)


@pytest.mark.parametrize("level", ["avx2", pytest.param("avx512", marks=pytest.mark.slow)])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("kind", ["all", "causal", "masked"])
def test_agrees_with_float64(heads: tuple[int, int, int, int], kind: str, level: str) -> None:
    if not runtime.cpu_features().issuperset(machines.LEVELS[level][1]):
        pytest.skip(f"this CPU lacks {level}")
    count, shared, depth, width = heads
    made = built(heads, kind == "causal", kind == "masked", level)
    rng = np.random.default_rng(0)
    for queries, keys in SIZES:
        feeds: dict[str, npt.NDArray[Any]] = {
            "q": rng.normal(size=(2, count, queries, depth)).astype(np.float32),
            "k": rng.normal(size=(2, shared, keys, depth)).astype(np.float32),
            "v": rng.normal(size=(2, shared, keys, width)).astype(np.float32),
        }
        mask = None
        if kind == "masked":
            mask = rng.random((2, 1, queries, keys)) < 0.7
            mask[0, 0, 0] = False
            feeds["m"] = mask
        wanted = expected(feeds["q"], feeds["k"], feeds["v"], mask, kind == "causal")
        actual = made.run(feeds)["y"]
        if np.abs(wanted).max() == 0:
            assert not actual.any()
        else:
            assert relative_error(actual, wanted.astype(np.float32)) < BOUND, (queries, keys)


def test_nan_reaches_its_own_query_alone() -> None:
    made = built(HEADS[0], False, False, "avx2")
    rng = np.random.default_rng(0)
    shape = (1, 4, 9, 32)
    feeds = {name: rng.normal(size=shape).astype(np.float32) for name in ("q", "k", "v")}
    feeds["q"][0, 1, 3, 5] = np.nan
    found = np.isnan(made.run(feeds)["y"])
    assert found[0, 1, 3].all() and found.sum() == 32
