"""The check of artifacts that round: their codes, stretch by stretch, and what it does not let through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from netlathe.backends.tvm import codes, judge, packing, runtime
from netlathe.backends.tvm import machine as machines
from netlathe.backends.tvm.backend import TvmBackend
from netlathe.diagnostics import VerifyError
from netlathe.execute import ort

pytest.importorskip("tvm", reason="the tvm extra is not installed")

from tests.backends.tvm.in_process import InProcess
from tests.ir.onnx_text import normal_model

Array = npt.NDArray[Any]
LEVELS = [
    level
    for level, (_, flags, _) in machines.LEVELS.items()
    if runtime.cpu_features().issuperset(flags)
]


def static() -> ir.Model:
    """Unsigned and signed codes, a convolution, a residual, a softmax between two roundings."""
    rng = np.random.default_rng(0)
    return normal_model(
        """<ir_version: 10, opset_import: ["" : 25]>
        net (float[n, 8, 6, 6] x, int8[8, 8, 3, 3] w, float[8] ws, int8[8, 20] v, float vs,
             float xs, uint8 xz, float hs, int8 hz)
            => (float[n, 36, 20] y) {
            q = QuantizeLinear(x, xs, xz)
            d = DequantizeLinear(q, xs, xz)
            wd = DequantizeLinear<axis=0>(w, ws)
            c = Conv<pads=[1, 1, 1, 1]>(d, wd)
            a = Add(c, x)
            r = Relu(a)
            shape = Constant<value = int64[3] {0, 8, 36}>()
            f = Reshape(r, shape)
            t = Transpose<perm=[0, 2, 1]>(f)
            s = Softmax<axis=-1>(t)
            p = QuantizeLinear(s, hs, hz)
            e = DequantizeLinear(p, hs, hz)
            vd = DequantizeLinear(v, vs)
            y = MatMul(e, vd)
        }""",
        w=rng.integers(-127, 128, (8, 8, 3, 3)).astype(np.int8),
        ws=rng.uniform(0.001, 0.002, 8).astype(np.float32),
        v=rng.integers(-127, 128, (8, 20)).astype(np.int8),
        vs=np.asarray(0.01, np.float32),
        xs=np.asarray(0.03, np.float32),
        xz=np.asarray(120, np.uint8),
        hs=np.asarray(1 / 255, np.float32),
        hz=np.asarray(-128, np.int8),
    )


def dynamic() -> ir.Model:
    """A scale and a zero point that the data decide."""
    rng = np.random.default_rng(0)
    return normal_model(
        """<ir_version: 10, opset_import: ["" : 25]>
        net (float[n, 16] x, int8[16, 9] w, float ws) => (float[n, 9] y) {
            h = Tanh(x)
            q, s, z = DynamicQuantizeLinear(h)
            m = MatMulInteger(q, w, z)
            f = Cast<to=1>(m)
            a = Mul(f, s)
            y = Mul(a, ws)
        }""",
        w=rng.integers(-127, 128, (16, 9)).astype(np.int8),
        ws=np.asarray(0.01, np.float32),
    )


def integers() -> ir.Model:
    """Operators that scale and round sums of integers, by tensor and by channel, with a bias."""
    rng = np.random.default_rng(0)
    return normal_model(
        """<ir_version: 10, opset_import: ["" : 25]>
        net (float[n, 8, 6, 6] x, float s, uint8 z, int8[8, 8, 3, 3] w, float[8] ws, int8[8] wz,
             int32[8] b, int8[6, 5] v, float[1] vs, int8[1] vz) => (float[n, 8, 6, 5] y) {
            q = QuantizeLinear(x, s, z)
            c = QLinearConv<pads=[1, 1, 1, 1]>(q, s, z, w, ws, wz, s, z, b)
            m = QLinearMatMul(c, s, z, v, vs, vz, s, z)
            y = DequantizeLinear(m, s, z)
        }""",
        s=np.asarray(0.03, np.float32),
        z=np.asarray(120, np.uint8),
        w=rng.integers(-127, 128, (8, 8, 3, 3)).astype(np.int8),
        ws=rng.uniform(0.001, 0.002, 8).astype(np.float32),
        wz=np.zeros(8, np.int8),
        b=rng.integers(-999, 999, 8).astype(np.int32),
        v=rng.integers(-127, 128, (6, 5)).astype(np.int8),
        vs=np.asarray([0.005], np.float32),
        vz=np.zeros(1, np.int8),
    )


def feeds_of(model: ir.Model) -> dict[str, Array]:
    rng = np.random.default_rng(1)
    (x,) = (value for value in model.graph.inputs if not value.is_initializer())
    assert x.shape is not None
    shape = [dim if isinstance(dim, int) else 3 for dim in x.shape]
    return {"x": rng.normal(size=shape).astype(np.float32)}


def told(model: ir.Model, feeds: dict[str, Array], level: str = "native") -> dict[str, Array]:
    """Outputs and codes, as the artifact tells them."""
    return InProcess(codes.telling(model), level).run(feeds)


@pytest.mark.parametrize(
    ("make", "level"),
    [(dynamic, "native"), (integers, "native"), *((static, level) for level in LEVELS)],
)
def test_outputs_are_the_same_bits_and_all_codes_may_be_what_they_are(
    make: Any, level: str
) -> None:
    model = make()
    feeds = feeds_of(model)
    found = told(model, feeds, level)
    assert np.array_equal(found["y"], InProcess(model, level).run(feeds)["y"])
    report = judge.compare(model, feeds, found)
    assert report["bound"] == 1e-4 and report["error"] <= 1e-5
    assert report["codes"] == sum(found[n].size for n in "qpcm" if n in found)
    assert report["ties"] <= 0.005 * report["codes"]


@pytest.mark.parametrize("step", [-1, 1])
def test_a_code_beside_the_right_one_is_found(step: int) -> None:
    model = static()
    feeds = feeds_of(model)
    found = ort.run(model, feeds, ["y", "q", "p"])
    judge.compare(model, feeds, found)  # its own are right
    steps = feeds["x"] / np.float32(0.03)
    far = (np.abs(steps) < 100) & (
        np.abs(steps - np.floor(steps) - 0.5) > 0.01
    )  # from the ends, ties
    at = tuple(int(i) for i in np.argwhere(far)[7])
    found["q"][at] = int(found["q"][at]) + step
    where = ", ".join(map(str, at))
    with pytest.raises(VerifyError, match=rf"'q' .* 1 of 864 codes .* at \[{where}\]"):
        judge.compare(model, feeds, found)


@pytest.mark.parametrize("name", ["c", "m"])
def test_codes_of_integer_operators_are_held_too(name: str) -> None:
    model = integers()
    feeds = feeds_of(model)
    found = ort.run(model, feeds, ["y", "q", "c", "m"])
    judge.compare(model, feeds, found)
    found[name] = found[name] ^ np.uint8(2)  # two steps away
    with pytest.raises(VerifyError, match=f"'{name}' .* codes that the IR does not round to"):
        judge.compare(model, feeds, found)


def test_beside_a_tie_both_codes_are_right_and_no_other() -> None:
    model = normal_model(
        """<ir_version: 10, opset_import: ["" : 25]>
        tie (float[n] x, float s, uint8 z) => (uint8[n] q) { q = QuantizeLinear(x, s, z) }""",
        s=np.asarray(0.5, np.float32),
        z=np.asarray(3, np.uint8),
    )
    x = np.asarray([0.25, 0.75, 1.24999, 2.0, 300.0], np.float32)  # 0.5, 1.5 and 2.49998 steps
    for given in ([3, 4, 5, 7, 255], [3, 5, 5, 7, 255], [4, 5, 6, 7, 255]):
        report = judge.compare(model, {"x": x}, {"q": np.asarray(given, np.uint8)})
        assert report["codes"] == 5
    for given in ([2, 5, 5, 7, 255], [3, 6, 5, 7, 255], [3, 5, 5, 8, 255], [3, 5, 5, 7, 254]):
        with pytest.raises(VerifyError, match="1 of 5 codes that the IR does not round to"):
            judge.compare(model, {"x": x}, {"q": np.asarray(given, np.uint8)})


def test_an_output_is_held_to_the_bound_of_arithmetic() -> None:
    model = static()
    feeds = feeds_of(model)
    found = ort.run(model, feeds, ["y", "q", "p"])
    found["y"] = found["y"] * np.float32(1.001)
    with pytest.raises(VerifyError, match=r"output 'y' .* \(at most 1\.0e-04\)"):
        judge.compare(model, feeds, found)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [("s", 1.001, "has the scale"), ("z", 1.1, "has the zero point"), ("q", 1.1, "codes")],
)
def test_a_dynamic_scale_and_zero_point_are_held_against_the_range(
    name: str, change: float, message: str
) -> None:
    model = dynamic()
    feeds = feeds_of(model)
    found = ort.run(model, feeds, ["y", "q", "s", "z"])
    judge.compare(model, feeds, found)
    found[name] = (found[name] * change).astype(found[name].dtype)
    with pytest.raises(VerifyError, match=message):
        judge.compare(model, feeds, found)


def test_a_kernel_whose_scales_are_off_by_a_thousandth_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Among codes of 8 bits, of which a whole run shows differences of a hundredth anyway."""
    if "avx512vnni" not in LEVELS:
        pytest.skip("this CPU lacks VNNI")
    right = packing.products

    def wrong(*given: Any) -> Array:
        return right(*given) * np.float32(1.001)

    model = static()
    feeds = feeds_of(model)
    monkeypatch.setattr(packing, "products", wrong)
    with pytest.raises(VerifyError):
        judge.compare(model, feeds, told(model, feeds))


def test_saving_checks_the_codes(tmp_path: Path) -> None:
    backend = TvmBackend()
    artifact = backend.compile(static(), backend.targets()[0])
    artifact.save(tmp_path)
    report = artifact.report()
    assert report["error"] <= report["bound"] == 1e-4
    assert report["codes"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "meta.json",
        "model.so",
        "params.bin",
        "runtime.py",
    ]


@pytest.mark.parametrize(("factor", "passes"), [(1.001, True), (1.1, False)])
def test_an_ill_conditioned_model_is_no_false_alarm(factor: float, passes: bool) -> None:
    """(1000 p + p) - 1000 p moves by 1e-4 with every ulp of p."""
    model = normal_model(
        """<ir_version: 10, opset_import: ["" : 25]>
        ill (float[b, 16] x, float[16, 16] w, float t) => (float[b, 16] y) {
            p = MatMul(x, w)  big = Mul(p, t)  sum = Add(big, p)  y = Sub(sum, big) }""",
        w=np.random.default_rng(0).normal(size=(16, 16)).astype(np.float32),
        t=np.asarray(1000, np.float32),
    )
    feeds = feeds_of(model)
    found = {"y": ort.run(model, feeds)["y"] * np.float32(factor)}
    if passes:
        report = judge.compare(model, feeds, found)
        assert 1e-4 < report["error"] <= report["bound"] < 0.1
    else:
        with pytest.raises(VerifyError, match="output 'y' of the artifact is off"):
            judge.compare(model, feeds, found)


def test_where_rounding_overflows_nothing_more_is_allowed() -> None:
    """Exp of the largest number that it has a result for: an ulp more is infinity."""
    model = normal_model(
        """<ir_version: 10, opset_import: ["" : 25]>
        top (float[b, 4] x, float t) => (float[b, 4] y) { a = Abs(x)  e = Exp(a)  y = Mul(e, t) }""",
        t=np.asarray(1.0000001, np.float32),
    )
    feeds = {"x": np.full((2, 4), 88.72283, np.float32)}
    for wrong in (np.nan, 0.0):
        with pytest.raises(VerifyError, match="output 'y' of the artifact is off"):
            judge.compare(model, feeds, {"y": np.full((2, 4), wrong, np.float32)})
