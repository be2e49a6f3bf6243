"""GPTQ and coordinate descent against the formulas in float64, and the walk through a quantized prefix."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from netlathe.diagnostics import PassError
from netlathe.execute import ort
from netlathe.execute.calibration import sweep
from netlathe.execute.compare import inputs_of
from netlathe.execute.statistics import Covariance, MeanSquare
from netlathe.execute.walk import Walk
from netlathe.ir import normal, weights
from netlathe.passes.quantize import Quantize, gptq
from netlathe.passes.quantize.scheme import Scheme, decode, encode, scales_for
from netlathe.pipeline.pass_ import Context, SilentProgress
from tests import zoo_ir
from tests.ir.onnx_text import matrix, model

Array = np.ndarray[Any, np.dtype[Any]]


def problem(
    rows: int, columns: int, group: int, seed: int = 0
) -> tuple[Array, Array, Array, Array]:
    """A weight, the second moment of correlated inputs, scales and zero points."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((4 * columns, columns)) @ rng.standard_normal((columns, columns))
    x *= np.exp(rng.standard_normal(columns))
    w = rng.standard_normal((rows, columns))
    scale, zero = scales_for(w.reshape(-1, group), Scheme(weights="int4"))
    return w, x.T @ x / len(x), scale.reshape(rows, -1), zero.reshape(rows, -1)


def by_the_book(
    w: Array, h: Array, s: Array, z: Array, scheme: Scheme, damping: float, order: bool
) -> Array:
    """Optimal brain quantization with a fixed order, its inverse updated one column at a time: numbers.

    arXiv 2208.11580, eq. 3-4: the same result as GPTQ's Cholesky factor, in another way.
    """
    per = w.shape[1] // s.shape[1]
    s, z = np.repeat(s, per, 1), np.repeat(z, per, 1)
    h = h + damping * np.mean(np.diagonal(h)) * np.eye(len(h))
    inverse, w = np.linalg.inv(h), w.copy()
    made = np.zeros(w.shape)
    columns = np.argsort(-np.diagonal(h), kind="stable") if order else np.arange(len(h))
    for j in columns:
        codes = encode(w[:, j], s[:, j], z[:, j], scheme)
        made[:, j] = decode(codes, s[:, j], z[:, j], scheme)
        error = (w[:, j] - made[:, j]) / inverse[j, j]
        w -= error[:, None] * inverse[j]
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j, j] = 1.0  # not used again
    return made


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("group", [16, 160])
def test_codes_are_those_of_optimal_brain_quantization(order: bool, group: int) -> None:
    w, h, s, z = problem(12, 160, group)  # more columns than one block
    scheme = Scheme(weights="int4")
    found = gptq.solve(w, h, s, z, scheme, damping=0.01, act_order=order, sweeps=0)
    wanted = by_the_book(w, h, s, z, scheme, 0.01, order)
    # Where a number lies on the middle of two codes up to 160 roundings of float64, either may be taken, and
    # what follows in that row differs; none does here.
    per = np.repeat(s, group, 1), np.repeat(z, group, 1)
    assert np.array_equal(decode(found.codes, *per, scheme), wanted)
    assert found.damping == 0.01


def losses(
    w: Array, h: Array, s: Array, z: Array, scheme: Scheme, sweeps: int
) -> tuple[float, float]:
    per = w.shape[1] // s.shape[1]
    wide = np.repeat(s, per, 1), np.repeat(z, per, 1)
    found = gptq.solve(w, h, s, z, scheme, damping=0.01, act_order=True, sweeps=sweeps)
    codes = found.codes.view(scheme.code_type)
    nearest = encode(w, *wide, scheme)
    return tuple(gptq.error(w, decode(c, *wide, scheme), h) for c in (codes, nearest))  # type: ignore[return-value]


def test_columns_that_are_fed_the_same_come_in_one_order_however_sums_are_rounded() -> None:
    w, h, s, z = problem(48, 32, 8)
    np.fill_diagonal(h, h.trace() / len(h) * 2)  # as of the taps of a padded convolution
    ulps = np.random.default_rng(1).integers(-2, 3, len(h)) * np.spacing(h[0, 0])
    codes = [
        gptq.solve(w, each, s, z, Scheme(weights="int4"), damping=0.01, act_order=True, sweeps=0)
        for each in (h, h + np.diag(ulps))
    ]
    assert np.array_equal(codes[0].codes, codes[1].codes)


def test_less_is_lost_than_by_rounding_and_each_sweep_loses_no_more() -> None:
    w, h, s, z = problem(24, 128, 32, seed=3)
    scheme = Scheme(weights="int4")
    found, nearest = losses(w, h, s, z, scheme, 0)
    assert found < 0.5 * nearest
    last = found
    for sweeps in (1, 2, 3):
        now, _ = losses(w, h, s, z, scheme, sweeps)
        assert now <= last * (1 + 1e-12), "every step is the best for its column"
        last = now
    assert last < found


def test_error_is_that_of_the_outputs() -> None:
    rng = np.random.default_rng(5)
    x, w = rng.standard_normal((50, 8)), rng.standard_normal((3, 8))
    made = w + 0.1 * rng.standard_normal(w.shape)
    wanted = np.square(x @ (made - w).T).sum() / np.square(x @ w.T).sum()
    assert abs(gptq.error(w, made, x.T @ x / 50) - wanted) <= 1e-12


OTHER = [
    Scheme("int3"),
    Scheme("int3", symmetric=False),
    Scheme("int2", symmetric=False, zeros="float", scales="float16"),
    Scheme("nf4"),
    Scheme("codebook2", codebook=(-1.0, -0.25, 0.0, 0.5)),
    Scheme("float8e4m3fn"),
    Scheme("float8e5m2"),
    Scheme("float4e2m1"),
    Scheme("mxfp4"),
    Scheme("nvfp4", tensor_scale=0.01),
]


@pytest.mark.parametrize("scheme", OTHER, ids=str)
def test_other_formats(scheme: Scheme) -> None:
    w, h, _, _ = problem(12, 160, 16)
    s, z = (a.reshape(12, -1) for a in scales_for(w.reshape(-1, 16), scheme))
    found = gptq.solve(w, h, s, z, scheme, damping=0.01, act_order=True, sweeps=0)
    codes = found.codes.view(scheme.code_type)
    wanted = by_the_book(w, h, s, z, scheme, 0.01, True)
    per = np.repeat(s, 16, 1), np.repeat(z, 16, 1)
    assert np.array_equal(decode(codes, *per, scheme), wanted)
    less, nearest = losses(w, h, s, z, scheme, 1)
    assert less < nearest


def test_singular_inputs_are_damped_more_and_columns_never_fed_are_rounded() -> None:
    w, h, s, z = problem(6, 32, 32)
    h[5], h[:, 5] = 0, 0
    h[6:8], h[:, 6:8] = 0, 0
    h[6:8, 6:8] = 1  # two inputs that are one
    scheme = Scheme(weights="int4")
    found = gptq.solve(w, h, s, z, scheme, damping=1e-300, act_order=False, sweeps=1)
    assert 1e-300 < found.damping <= 1.0
    wanted = encode(w, s, z, scheme)
    assert np.array_equal(found.codes[:, 5], wanted[:, 5])
    with pytest.raises(ValueError, match="NaN"):
        gptq.solve(w, h * np.nan, s, z, scheme, damping=0.01, act_order=False, sweeps=0)


# -- in a model -------------------------------------------------------------------------------------


def chain() -> tuple[ir.Model, Context]:
    body = "a = MatMul (x, w) r = Relu (a) b = MatMul (r, v) c = MatMul (r, u) y = Add (b, c)"
    made = model(
        "float[b,s,32] x",
        "float y",
        body,
        w=matrix(32, 48),
        v=matrix(48, 16, seed=1),
        u=matrix(48, 16, seed=2),
    )
    normal.normalize(made)
    return made, Context(calibration=[{"x": correlated(10 + i)} for i in range(3)])


def correlated(seed: int) -> Array:
    mixed: Array = matrix(4, 50, 32, seed=seed) @ matrix(32, 32, seed=5)
    return mixed


def test_the_walk_sees_weights_as_they_have_become() -> None:
    made, ctx = chain()
    walk = Walk(made, ctx.calibration, device="cpu", progress=SilentProgress())
    assert walk.position("x") < walk.position("r") < walk.position("y")
    (first,) = walk.collect([Covariance("x")])
    x = np.concatenate([f["x"].reshape(-1, 32) for f in ctx.calibration]).astype(np.float64)
    assert np.allclose(first.array, x.T @ x / len(x), rtol=1e-12)
    other = matrix(32, 48, seed=7)
    walk.replace("w", ir.tensor(other))
    (second,) = walk.collect([Covariance("r")])
    r = np.maximum(x @ other, 0)
    # float32 products of 32 terms: a few ulp of the largest.
    assert np.abs(second.array - r.T @ r / len(r)).max() <= 1e-5 * np.abs(second.array).max()
    with pytest.raises(PassError, match="never reaches z"):
        walk.position("z")


def test_the_walk_equals_the_sweep() -> None:
    before = zoo_ir.captured("llama")
    samples = [inputs_of(before, fed) for fed in zoo_ir.feeds("llama")]
    names = [n.inputs[0].name or "" for n in before.graph if n.op_type == "MatMul" and n.inputs[0]]
    wanted = [MeanSquare(name) for name in dict.fromkeys(names)]
    once = sweep(before, samples, wanted, device="cpu", progress=SilentProgress())
    walk = Walk(before, samples, device="cpu", progress=SilentProgress())
    for statistic, result in sorted(
        zip(wanted, once, strict=True), key=lambda pair: walk.position(pair[0].value)
    ):
        (again,) = walk.collect([statistic])
        assert np.array_equal(again.array, result.array)


def test_a_model_is_solved_in_order() -> None:
    made, ctx = chain()
    options: dict[str, Any] = {"min_size": 0, "weights": "int3", "group_size": 16, "clip": "mse"}
    error, outputs = {}, {}
    fed = {"x": correlated(99)}
    expected = ort.run(made, fed)["y"]
    for solver in ("rtn", "gptq"):
        pass_ = Quantize(solver=solver, sweeps=1, **options)  # type: ignore[arg-type]
        chosen = pass_.choose(made, ctx)
        after = made.clone()
        pass_.edit(after, chosen, ctx)
        normal.normalize(after)
        outputs[solver] = ort.run(after, fed)["y"]
        reference = pass_.simulate(made.clone(), chosen).model
        assert np.array_equal(ort.run(reference, fed)["y"], outputs[solver])
        error[solver] = float(np.square(outputs[solver] - expected).mean())
    assert error["gptq"] < 0.8 * error["rtn"]
    by_name = {e.candidate: e for e in chosen}
    assert all("gptq" in e.reason and e.detail["error"] > 0 for e in chosen)
    # v is solved on what Relu makes of the quantized w.
    w = weights.array(
        reference_weights := pass_.simulate(made.clone(), chosen).model.graph.initializers["w"]
    )
    assert reference_weights.const_value is not None
    x = np.concatenate([f["x"].reshape(-1, 32) for f in ctx.calibration]).astype(np.float64)
    r = np.maximum(x @ w.astype(np.float64), 0)
    v = weights.array(made.graph.initializers["v"]).astype(np.float64)
    entry = by_name["v"]
    s, z = entry.arrays["scales"].reshape(16, -1), entry.arrays["zeros"].reshape(16, -1)
    wanted = gptq.solve(
        v.T, r.T @ r / len(r), s, z, Scheme(weights="int3"), damping=0.01, act_order=True, sweeps=1
    )
    # Float32 products on the way may move a number across the middle of two codes, and its row with it.
    same = (entry.arrays["codes"].T == wanted.codes).all(1).mean()
    assert same >= 0.75


def test_the_same_bytes_again_and_data_is_asked_for() -> None:
    made, ctx = chain()
    pass_ = Quantize(min_size=0, weights="int4", solver="gptq")
    first, again = (pass_.choose(made, ctx) for _ in range(2))
    assert [e.to_json() for e in first] == [e.to_json() for e in again]
    with pytest.raises(PassError, match="solver='gptq' needs calibration data"):
        pass_.choose(made, Context())


def test_what_data_cannot_solve_is_rounded_to_nearest_and_says_so() -> None:
    body = "e = Gather (w, i) n = Neg (e) y = MatMul (n, v)"
    made = model("int64[b,s] i", "float y", body, w=matrix(9, 16), v=matrix(16, 8, seed=1))
    normal.normalize(made)
    ctx = Context(calibration=[{"i": np.arange(9).reshape(1, 9)}])
    table, product = Quantize(min_size=0, solver="gptq").choose(made, ctx)
    assert table.reason.endswith("; to nearest") and "gptq" in product.reason
