"""Integer-only networks against the same arithmetic in numpy integers, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from netlathe.diagnostics import PassError
from netlathe.execute import ort
from netlathe.execute.compare import inputs_of
from netlathe.execute.executor import Executor
from netlathe.ir import normal, verify, weights
from netlathe.passes.fold_batch_norm import FoldBatchNorm
from netlathe.passes.quantize import Quantize
from netlathe.passes.quantize.integer import grid_of, multiplier_and_shift, requantize
from netlathe.pipeline.ledger import Entry
from netlathe.pipeline.pass_ import Context
from netlathe.pipeline.run import run
from tests import zoo_ir
from tests.ir.onnx_text import feeds, matrix, model, ops
from tests.pipeline.toy import captured_of

Array = np.ndarray[Any, np.dtype[Any]]
INTEGER = Quantize(min_size=0, activations="int8")


def settled(inputs: str, body: str, **constants: Any) -> ir.Model:
    made = model(inputs, "float y", body, **constants)
    normal.normalize(made)
    return made


def quantized(
    before: ir.Model, pass_: Quantize = INTEGER, order: float = 0.0
) -> tuple[ir.Model, list[Entry], Context]:
    """Quantize, and hold ONNX Runtime and our executor against the reference and each other.

    ``order`` is what the order of float sums may change, where there are any.
    """
    sizes = ({"b": 2, "s": 5}, {"b": 3, "s": 8})
    samples = [feeds(before, one, seed) for seed, one in enumerate(sizes)]
    ctx = Context(calibration=samples)
    chosen = pass_.choose(before, ctx)
    after = before.clone()
    pass_.edit(after, chosen, ctx)
    normal.normalize(after)
    assert verify.verify(after) == []
    reference = pass_.simulate(before.clone(), chosen).model
    for seed, one in enumerate(sizes):
        fed = feeds(before, one, 10 + seed)
        actual = ort.run(after, fed)["y"]
        assert np.array_equal(actual, ort.run(reference, fed)["y"])
        again = Executor(after).run(fed)["y"].numpy()
        assert np.abs(again - actual).max() <= order * np.abs(actual).max()
    return after, chosen, ctx


# -- numbers --------------------------------------------------------------------------------------


@given(st.floats(2.0**-24, 2.0**10), st.integers(-(2**24), 2**24), st.integers(-128, 127))
def test_a_multiplier_and_a_shift_are_the_ratio(ratio: float, acc: int, zero: int) -> None:
    m, n = (int(x) for x in multiplier_and_shift(np.asarray(ratio)))
    assert 0 < m < 2**16 and 1 <= n <= 46
    assert abs(m / 2**n - ratio) <= 2.0**-16 * ratio  # half of the last of 16 bits
    # Python's own integers: floor, halves up.
    wanted = max(-128, min(127, (acc * m + (1 << n - 1) >> n) + zero))
    got = requantize(np.array([acc], np.int32), np.array([m]), np.array([n]), zero)
    assert got.tolist() == [wanted]


def test_zero_is_on_every_grid() -> None:
    for low, high in ((-1.0, 3.0), (0.0, 5.0), (2.0, 5.0), (-7.0, -1.0), (0.0, 0.0)):
        grid = grid_of(low, high)
        assert -128 <= grid.zero <= 127
        ends = (np.array([-128, 127]) - grid.zero) * grid.scale
        assert ends[0] <= min(low, 0) + grid.scale and ends[1] >= max(high, 0) - grid.scale


def test_a_scale_per_token() -> None:
    w, c = matrix(16, 6), matrix(6, seed=1)
    before = settled("float[b,s,16] x", "h = MatMul (x, w) y = Add (h, c)", w=w, c=c)
    pass_ = Quantize(min_size=0, activations="int8", activation_scales="token")
    after, chosen, _ = quantized(before, pass_)
    assert [e.reason for e in chosen][1] == "int8, one scale per token"
    assert "MatMul" not in ops(after) and ops(after)["MatMulInteger"] == 1
    x = feeds(before, {"b": 2, "s": 5}, 77)["x"]
    x[1, 2] = 0  # a token of zeros
    s = np.maximum(np.abs(x).max(-1, keepdims=True) / np.float32(127), np.float32(2.0**-120))
    wq, ws = rows(w)
    acc = (np.rint(x / s).astype(np.int64) @ wq).astype(np.float32)
    assert np.array_equal(ort.run(after, {"x": x})["y"], acc * s * ws.astype(np.float32) + c)


def test_scales_of_weights_are_stored_as_asked_for() -> None:
    before = settled("float[b,s,64] x", "y = MatMul (x, w)", w=matrix(64, 48))
    pass_ = Quantize(
        min_size=0, activations="int8", activation_scales="token", scales="float16", solver="gptq"
    )
    ctx = Context(calibration=[{"x": matrix(2, 90, 64, seed=1)}])
    chosen = pass_.choose(before, ctx)
    after = before.clone()
    pass_.edit(after, chosen, ctx)
    normal.normalize(after)
    held = {
        v.dtype: v.const_value.nbytes for v in after.graph.initializers.values() if v.const_value
    }
    assert held[ir.DataType.FLOAT16] == 2 * 48 and held[ir.DataType.INT8] == 64 * 48
    fed = {"x": matrix(3, 5, 64, seed=2)}
    reference = pass_.simulate(before.clone(), chosen)
    expected, found = ort.run(reference.model, fed)["y"], ort.run(after, fed)["y"]
    assert np.abs(found - expected).max() <= reference.tolerance * np.sqrt(np.mean(expected**2))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_tokens_of_zoo_models(name: str) -> None:
    before = zoo_ir.captured(name)
    pass_ = Quantize(min_size=0, activations="int8", activation_scales="token")
    chosen = pass_.choose(before, Context())
    after = before.clone()
    pass_.edit(after, chosen, Context())
    normal.normalize(after)
    assert verify.verify(after) == [] and ops(after)["MatMulInteger"] >= 4
    reference = pass_.simulate(before.clone(), chosen).model
    for fed in zoo_ir.feeds(name):
        actual = ort.run(after, inputs_of(after, fed))
        for key, expected in ort.run(reference, inputs_of(reference, fed)).items():
            assert np.array_equal(actual[key], expected)


# -- a network by hand ------------------------------------------------------------------------------


def numbers(chosen: list[Entry]) -> dict[str, tuple[float, int]]:
    return {
        e.candidate: (e.detail["scale"], e.detail["zero"])
        for e in chosen
        if "activation" in e.detail
    }


def to_int8(x: Array, scale: float, zero: int) -> Array:
    return np.clip(np.rint(x / np.float32(scale)) + zero, -128, 127).astype(np.int64)


def rows(w: Array) -> tuple[Array, Array]:
    """Integers and scales of the columns of a matrix [k, n]."""
    scale = (np.abs(w.astype(np.float64)).max(0) / 127).astype(np.float32).astype(np.float64)
    return np.rint(w / scale).astype(np.int64), scale


def shifted(acc: Array, ratio: Array, zero: int) -> Array:
    """In Python's integers."""
    m, n = multiplier_and_shift(ratio)
    items = [x.reshape(-1).tolist() for x in np.broadcast_arrays(acc, m, n)]
    flat = [((a * k + (1 << s - 1)) >> s) + zero for a, k, s in zip(*items, strict=True)]
    return np.clip(flat, -128, 127).reshape(acc.shape)


def test_two_layers_equal_numpy_integers() -> None:
    w, v, c = matrix(12, 10), matrix(10, 6, seed=1), matrix(10, seed=2)
    body = "h = MatMul (x, w) p = Add (h, c) r = Relu (p) y = MatMul (r, v)"
    after, chosen, _ = quantized(settled("float[b,s,12] x", body, w=w, v=v, c=c))
    found = numbers(chosen)
    assert set(found) == {"x", "r"}, "the range is that of what Relu leaves"
    fed = feeds(after, {"b": 2, "s": 5}, 77)
    (sx, zx), (sr, zr) = found["x"], found["r"]
    wq, ws = rows(w)
    vq, vs = rows(v)
    acc = (to_int8(fed["x"], sx, zx) - zx) @ wq + np.rint(c / (sx * ws)).astype(np.int64)
    r = shifted(acc, sx * ws / sr, zr)
    y = ((r - zr) @ vq).astype(np.float32) * (sr * vs).astype(np.float32)
    assert np.array_equal(ort.run(after, fed)["y"], y)
    floats = {"MatMul", "Relu", "DequantizeLinear", "Div"} & set(ops(after)) - {"Div"}
    assert not floats, "nothing but integers between the input and the last product"


def test_convolutions_sums_pools_and_means() -> None:
    body = (
        "a = Conv <pads=[1,1,1,1]> (x, w, c) r = Relu (a) m = MaxPool <kernel_shape=[2,2],"
        " strides=[2,2]> (r) d = Conv <pads=[1,1,1,1], group=8> (m, u) e = Conv (d, v)"
        " s = Add (e, m) t = Relu (s) g = GlobalAveragePool (t) f = Flatten (g) y = MatMul (f, k)"
    )
    before = settled(
        "float[b,3,8,8] x",
        body,
        w=matrix(8, 3, 3, 3),
        c=matrix(8, seed=1),
        u=matrix(8, 1, 3, 3, seed=2),
        v=matrix(8, 8, 1, 1, seed=3),
        k=matrix(8, 5, seed=4),
    )
    after, chosen, _ = quantized(before)
    assert not {"Conv", "MatMul", "Relu", "GlobalAveragePool"} & set(ops(after))
    assert ops(after)["QuantizeLinear"] == 1 and "DequantizeLinear" not in ops(after)
    assert {e.candidate for e in chosen if "activation" in e.detail} >= {"x", "r", "d", "e", "t"}
    # Close to the float network: 8 bits a value, 7 of them in a row at 1/255 of a range of some 8 sigma.
    fed = feeds(before, {"b": 2}, 5)
    expected = ort.run(before, fed)["y"]
    error = np.square(ort.run(after, fed)["y"] - expected).mean() / np.square(expected).mean()
    assert error <= 7 * (8 / 255) ** 2


def test_a_clip_from_zero_is_the_end_of_the_range() -> None:
    body = "a = Conv (x, w) r = Clip (a, zero, top) b = Conv (r, v) y = Clip (b, zero, top)"
    ends = {"zero": np.float32(0), "top": np.float32(0.5)}
    before = settled(
        "float[b,3,6,6] x", body, w=matrix(8, 3, 3, 3), v=matrix(4, 8, 1, 1, seed=1), **ends
    )
    after, chosen, _ = quantized(before)
    assert set(numbers(chosen)) == {"x", "r"}, "the range is that of what Clip leaves"
    y = ort.run(after, feeds(before, {"b": 2}, 5))["y"]
    assert y.min() == 0 and y.max() == 0.5, "behind the last sums, which are floats, it stands"
    below = settled(
        "float[b,3,6,6] x",
        body.replace("zero", "low"),
        w=matrix(8, 3, 3, 3), v=matrix(4, 8, 1, 1, seed=1), low=np.float32(-0.1), top=ends["top"],
    )  # fmt: skip
    assert ops(quantized(below)[0])["QuantizeLinear"] == 2, "not one that lets less than zero by"


def test_a_mean_with_axes_and_other_readers() -> None:
    body = (
        "a = Conv (x, w) n = Neg (a) b1 = Conv (a, v) q = ReduceMean <keepdims=0> (b1, axes)"
        " h = MatMul (q, k) z = ReduceMean <keepdims=0> (n, axes) y = Add (h, z)"
    )
    before = settled(
        "float[b,3,6,6] x",
        body,
        w=matrix(8, 3, 3, 3),
        v=matrix(8, 8, 1, 1, seed=1),
        k=matrix(8, 8, seed=2),
        axes=[2, 3],
    )
    after, _, _ = quantized(before, order=1e-5)
    assert ops(after)["DequantizeLinear"] == 1, "for Neg, which knows floats only"
    assert ops(after)["ConvInteger"] == 2


def test_an_integer_value_that_is_an_output() -> None:
    made = model(
        "float[b,s,8] x",
        "float y, float h",
        "h = MatMul (x, w) y = MatMul (h, v)",
        w=matrix(8, 8),
        v=matrix(8, 4, seed=1),
    )
    normal.normalize(made)
    after, _, _ = quantized(made)
    assert [v.name for v in after.graph.outputs] == ["y", "h"]


# -- fewer bits -----------------------------------------------------------------------------------

NARROW = {"int6": 6, "int5": 5, "int4": 4, "int3": 3, "int2": 2}


def narrow_rows(w: Array, bits: int) -> tuple[Array, Array]:
    """As `rows`, in fewer bits: the least scale above 0 that holds both ends of a column."""
    wide, top = w.astype(np.float64), 2 ** (bits - 1)
    scale = np.maximum(wide.max(0) / (top - 1), -wide.min(0) / top)
    scale = scale.astype(np.float32).astype(np.float64)
    return np.clip(np.rint(wide / scale), -top, top - 1).astype(np.int64), scale


@pytest.mark.parametrize("name", NARROW)
def test_weights_of_fewer_bits_equal_numpy_integers(name: str) -> None:
    bits = NARROW[name]
    w, v, c = matrix(12, 10), matrix(10, 6, seed=1), matrix(10, seed=2)
    w[:, 3], w[:, 4] = np.abs(w[:, 3]), -np.abs(w[:, 4])  # columns of one sign
    body = "h = MatMul (x, w) p = Add (h, c) r = Relu (p) y = MatMul (r, v)"
    pass_ = Quantize(min_size=0, weights=name, activations="int8")  # type: ignore[arg-type]
    after, chosen, _ = quantized(settled("float[b,s,12] x", body, w=w, v=v, c=c), pass_)
    held = {e.candidate: e for e in chosen if "value" in e.detail}
    assert held["w"].reason.startswith(f"{name} in bytes, 10 scales")
    assert held["w"].detail["bytes"] == 120 + 4 * 10
    stored = after.graph.initializers["w_int8"].const_value
    wq, ws = narrow_rows(w, bits)
    vq, vs = narrow_rows(v, bits)
    assert stored is not None and stored.dtype == ir.DataType.INT8
    assert np.array_equal(stored.numpy(), wq) and (ws > 0).all()
    assert wq.min() == -(2 ** (bits - 1)) and wq.max() == 2 ** (bits - 1) - 1, "all codes are there"
    found, fed = numbers(chosen), feeds(after, {"b": 2, "s": 5}, 77)
    (sx, zx), (sr, zr) = found["x"], found["r"]
    acc = (to_int8(fed["x"], sx, zx) - zx) @ wq + np.rint(c / (sx * ws)).astype(np.int64)
    r = shifted(acc, sx * ws / sr, zr)
    y = ((r - zr) @ vq).astype(np.float32) * (sr * vs).astype(np.float32)
    assert np.array_equal(ort.run(after, fed)["y"], y)
    floats = {"MatMul", "Relu", "DequantizeLinear"} & set(ops(after))
    assert not floats, "nothing but integers between the input and the last product"


@pytest.mark.parametrize(
    "options",
    [
        {"clip": "mse"},
        {"clip": "percentile", "percentile": 95.0, "scales": "float16"},
        {"per_tensor": True},
        {"solver": "gptq", "clip": "mse", "sweeps": 1},
        {"correct_bias": True},
        {"activation_scales": "token", "solver": "gptq"},
        {"activation_scales": "tensor", "activations": "uint8"},
    ],
    ids=str,
)
def test_int4_in_integers_however_it_is_rounded(options: dict[str, Any]) -> None:
    """Scales above 0, codes that fill their range, equal to the reference."""
    body = "h = MatMul (x, w) p = Add (h, c) r = Relu (p) y = MatMul (r, v)"
    before = settled(
        "float[b,s,16] x", body, w=matrix(16, 12), v=matrix(12, 8, seed=1), c=matrix(12, seed=2)
    )
    chosen_options = {"weights": "int4", "activations": "int8", "min_size": 0, **options}
    after, chosen, _ = quantized(before, Quantize(**chosen_options))
    assert ops(after)["MatMulInteger"] == 2 and "MatMul" not in ops(after)
    for entry in chosen:
        assert (entry.arrays.get("scales", np.ones(1)) > 0).all()
    for name in ("w", "v"):
        codes = after.graph.initializers[f"{name}_int8"].const_value
        assert codes is not None and codes.dtype == ir.DataType.INT8
        assert -8 <= codes.numpy().min() < -4 and 4 < codes.numpy().max() <= 7


def test_convolutions_in_int4_between_layers_in_int8() -> None:
    body = (
        "a = Conv <pads=[1,1,1,1]> (x, w, c) r = Relu (a) d = Conv <pads=[1,1,1,1], group=8> (r, u)"
        " e = Conv (d, v) s = Add (e, r) g = GlobalAveragePool (s) f = Flatten (g) y = MatMul (f, k)"
    )
    before = settled(
        "float[b,3,8,8] x",
        body,
        w=matrix(8, 3, 3, 3),
        c=matrix(8, seed=1),
        u=matrix(8, 1, 3, 3, seed=2),
        v=matrix(8, 8, 1, 1, seed=3),
        k=matrix(8, 5, seed=4),
    )
    wide: Any = {name: {"weights": "int8"} for name in ("w", "k")}
    pass_ = Quantize(min_size=0, weights="int4", activations="int8", overrides=wide)
    after, _, _ = quantized(before, pass_)
    assert not {"Conv", "MatMul", "DequantizeLinear"} & set(ops(after))
    for name, four in {"w": False, "u": True, "v": True, "k": False}.items():
        codes = after.graph.initializers[f"{name}_int8"].const_value
        assert codes is not None
        assert (codes.numpy().min() >= -8 and codes.numpy().max() <= 7) == four


def test_weights_that_integers_cannot_multiply_stay_float() -> None:
    body = "h = MatMul (x, w) y = MatMul (h, v)"
    before = settled("float[b,s,16] x", body, w=matrix(16, 8), v=matrix(8, 8, seed=1))
    own: Any = {"v": {"symmetric": False}}
    pass_ = Quantize(min_size=0, weights="int4", activations="int8", group_size=8, overrides=own)
    after, chosen, _ = quantized(before, pass_, order=1e-5)
    reasons = {entry.candidate: entry.reason for entry in chosen if entry.status == "skipped"}
    assert "w has scales of groups of 8" in reasons["x"] and "group_size=0" in reasons["x"]
    own = {"v": {"symmetric": False, "group_size": 0}}
    pass_ = Quantize(min_size=0, weights="int4", activations="int8", group_size=8, overrides=own)
    _, chosen, _ = quantized(before, pass_, order=1e-5)
    reasons = {entry.candidate: entry.reason for entry in chosen if entry.status == "skipped"}
    assert "only with symmetric integer weights" in reasons["h"]
    codes = after.graph.initializers["w_int4"].const_value
    assert codes is not None and codes.dtype == ir.DataType.INT4, "stored as everywhere else"


def test_calibration_data_is_asked_for() -> None:
    before = settled("float[b,s,8] x", "y = MatMul (x, w)", w=matrix(8, 8))
    with pytest.raises(PassError, match="activations='int8' needs calibration data"):
        INTEGER.choose(before, Context())


@pytest.mark.parametrize("name", zoo_ir.some("resnet", "llama", "gpt2"))
def test_zoo_models(name: str) -> None:
    before = zoo_ir.captured(name).clone()
    FoldBatchNorm().run(before, Context())
    normal.normalize(before)
    samples = [inputs_of(before, fed) for fed in zoo_ir.feeds(name)]
    ctx = Context(calibration=samples)
    chosen = INTEGER.choose(before, ctx)
    after = before.clone()
    INTEGER.edit(after, chosen, ctx)
    normal.normalize(after)
    assert verify.verify(after) == []
    reference = INTEGER.simulate(before.clone(), chosen).model
    for fed in zoo_ir.feeds(name):
        actual = ort.run(after, inputs_of(after, fed))
        for key, expected in ort.run(reference, inputs_of(reference, fed)).items():
            assert np.array_equal(actual[key], expected)
    if name == "resnet":
        assert "Conv" not in ops(after) and ops(after)["QuantizeLinear"] == 1


def test_the_manager_checks_it() -> None:
    body = "a = MatMul (x, w) y = MatMul (a, v)"
    made = settled("float[batch,s,64] x", body, w=matrix(64, 64), v=matrix(64, 64, seed=1))
    ctx = Context(calibration=[{"x": matrix(2, 5, 64, seed=9)}])
    (step,) = run(captured_of(made), [Quantize(activations="int8")], ctx).steps
    assert step.check.error == 0.0 and step.check.against == "simulated reference"
    assert weights.num_bytes(made) == 2 * 4 * 64 * 64
