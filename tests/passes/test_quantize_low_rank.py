"""Thin matrices beside a quantized weight: the formulas in float64, and what runtimes make of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from netlathe.diagnostics import OptionError, PassError
from netlathe.execute import ort
from netlathe.ir import normal, verify, weights
from netlathe.passes.quantize import Quantize, low_rank
from netlathe.pipeline.ledger import Entry
from netlathe.pipeline.pass_ import Context
from tests.ir.onnx_text import matrix, model

Array = np.ndarray[Any, np.dtype[Any]]


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_the_error_itself(shape: tuple[int, int]) -> None:
    error = matrix(*shape).astype(np.float64)
    a, b = (t.numpy() for t in low_rank.solve(torch.tensor(error), 5))
    u, s, v = np.linalg.svd(error, full_matrices=False)
    # Of the Gram matrix a singular value is known to s_1^2 / s_5 ulps of float64.
    assert np.abs(a @ b - (u[:, :5] * s[:5]) @ v[:5]).max() <= 1e-12 * s[0]
    assert np.allclose(np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=1)), "S is shared evenly"
    left = np.linalg.norm(error - a @ b) ** 2
    assert abs(left - (s[5:] ** 2).sum()) <= 1e-12 * s[0] ** 2


def correlated(rows: int, columns: int, seed: int) -> Array:
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((rows, columns)) @ rng.standard_normal((columns, columns))
    return np.asarray(mixed * np.exp(rng.standard_normal(columns)))


def test_what_the_error_does_to_inputs() -> None:
    x, error = correlated(200, 24, 1), matrix(24, 40).astype(np.float64)
    a, b = (t.numpy() for t in low_rank.solve(torch.tensor(error), 5, torch.tensor(x.T @ x)))
    u, s, v = np.linalg.svd(x @ error, full_matrices=False)
    best = (u[:, :5] * s[:5]) @ v[:5]  # nothing of rank 5 is nearer to what the error adds
    assert np.abs(x @ a @ b - best).max() <= 1e-9 * np.abs(best).max()
    plain = low_rank.solve(torch.tensor(error), 5)
    lost = np.linalg.norm(x @ (error - a @ b))
    assert lost < 0.9 * np.linalg.norm(x @ (error - (plain[0] @ plain[1]).numpy()))


def test_directions_without_input_get_nothing() -> None:
    x, error = correlated(200, 24, 2), matrix(24, 40).astype(np.float64)
    x[:, 7] = 0
    a, b = (t.numpy() for t in low_rank.solve(torch.tensor(error), 5, torch.tensor(x.T @ x)))
    assert np.abs(a[7]).max() <= 1e-9 * np.abs(a).max() and np.isfinite(b).all()


def chain() -> tuple[ir.Model, Context]:
    body = "a = MatMul (x, w) r = Relu (a) b = MatMul (r, v) c = MatMul (r, u) y = Add (b, c)"
    made = model(
        "float[b,s,32] x",
        "float y",
        body,
        w=matrix(32, 48),
        v=matrix(48, 24, seed=1),
        u=matrix(48, 24, seed=2),
    )
    normal.normalize(made)
    return made, Context(calibration=[{"x": data(10 + i)} for i in range(3)])


def data(seed: int) -> Array:
    return np.asarray(matrix(4, 50, 32, seed=seed) @ matrix(32, 32, seed=5))


def run(made: ir.Model, ctx: Context, pass_: Quantize) -> tuple[ir.Model, list[Entry], Array]:
    """Quantize; ONNX Runtime must read what the reference holds, bit for bit."""
    chosen = pass_.choose(made, ctx)
    after = made.clone()
    pass_.edit(after, chosen, ctx)
    normal.normalize(after)
    assert verify.verify(after) == []
    fed = {"x": data(99)}
    output = ort.run(after, fed)["y"]
    assert np.array_equal(ort.run(pass_.simulate(made.clone(), chosen).model, fed)["y"], output)
    return after, chosen, output


OPTIONS: dict[str, Any] = {"min_size": 0, "weights": "int3", "group_size": 16, "scales": "float16"}


@pytest.mark.parametrize("stored", ["float16", "int8"])
@pytest.mark.parametrize("solver", ["rtn", "gptq"])
def test_a_branch_takes_less_from_the_outputs(solver: Any, stored: Any) -> None:
    made, ctx = chain()
    expected = ort.run(made, {"x": data(99)})["y"]
    options = OPTIONS | {"solver": solver}
    lost = {}
    for basis in ("none", "error", "input"):
        more: dict[str, Any] = {"low_rank": 6, "low_rank_basis": basis, "low_rank_stored": stored}
        pass_ = Quantize(**options, **({} if basis == "none" else more))
        after, chosen, output = run(made, ctx, pass_)
        lost[basis] = float(np.square(output - expected).mean())
        # Bytes are those that are stored, less what the graph takes.
        held = sum(
            v.const_value.nbytes
            for v in after.graph.initializers.values()
            if v.const_value is not None and v.const_value.nbytes > 40
        )
        planes = 5 * 8  # constants of the bit planes
        assert abs(sum(e.detail["bytes"] for e in chosen) - held) <= 3 * planes
    assert lost["input"] < lost["error"] < lost["none"]


def test_the_branch_is_seen_behind_it() -> None:
    made, ctx = chain()
    options: dict[str, Any] = {"low_rank": 6, "low_rank_basis": "input"}
    chosen = Quantize(solver="gptq", **OPTIONS, **options).choose(made, ctx)
    by_name = {entry.candidate: entry for entry in chosen}
    first = by_name["w"]
    w = weights.array(made.graph.initializers["w"]).astype(np.float64)
    assert first.detail["low_rank"] == {"rank": 6, "basis": "input", "stored": "float16"}
    assert first.detail["error"] > 0 and "6 directions" in first.reason
    a, b = (first.arrays[k].astype(np.float16).astype(np.float64) for k in "ab")
    groups = first.arrays["codes"].T.reshape(48, 2, 16) - first.arrays["zeros"].reshape(48, 2, 1)
    read = (groups * first.arrays["scales"].reshape(48, 2, 1)).reshape(48, 32).T + a @ b
    x = np.concatenate([f["x"].reshape(-1, 32) for f in ctx.calibration]).astype(np.float64)
    wanted = np.square(x @ (read - w)).sum() / np.square(x @ w).sum()
    assert abs(first.detail["error"] - wanted) <= 1e-5 * wanted


def test_with_integers_by_token() -> None:
    made, ctx = chain()
    pass_ = Quantize(
        min_size=0, low_rank=4, solver="gptq", activations="int8", activation_scales="token"
    )
    after, _, _ = run(made, ctx, pass_)
    assert sum(node.op_type == "MatMulInteger" for node in after.graph) == 3


def test_what_gets_no_branch_says_why() -> None:
    body = "e = Gather (w, i) n = Neg (e) y = MatMul (n, v)"
    made = model("int64[b,s] i", "float y", body, w=matrix(9, 16), v=matrix(16, 8, seed=1))
    normal.normalize(made)
    table, product = Quantize(min_size=0, low_rank=6).choose(made, Context())
    assert "not read as x W alone" in table.reason and "low_rank" not in table.detail
    assert "larger than the weight" in product.reason
    half = model(
        "float16[b,16] x", "float16 y", "y = MatMul (x, v)", v=matrix(16, 8).astype(np.float16)
    )
    normal.normalize(half)
    (entry,) = Quantize(min_size=0, low_rank=1).choose(half, Context())
    assert entry.status == "applied" and "for products in float32" in entry.reason
    small = Quantize(min_size=0, low_rank=6, overrides={"v": {"low_rank": 2}})
    assert small.choose(made, Context())[1].detail["low_rank"]["rank"] == 2
    with pytest.raises(PassError, match="low_rank_basis='input' needs calibration data"):
        Quantize(min_size=0, low_rank=2, low_rank_basis="input").choose(made, Context())
    with pytest.raises(OptionError, match="low_rank does not go with correct_bias"):
        Quantize(low_rank=2, correct_bias=True).choose(made, Context())


def test_the_same_bytes_again() -> None:
    made, ctx = chain()
    pass_ = Quantize(solver="gptq", low_rank=4, low_rank_basis="input", **OPTIONS)
    first, again = (pass_.choose(made, ctx) for _ in range(2))
    assert [e.to_json() for e in first] == [e.to_json() for e in again]
