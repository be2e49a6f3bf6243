"""The dialect of ONNX Runtime: the same numbers as standard ONNX, in operators that read codes."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from netlathe.backends import onnx_file, ort_dialect
from netlathe.backends.onnx_file import DIALECT, OnnxBackend
from netlathe.diagnostics import OptionError, VerifyError
from netlathe.execute import ort
from netlathe.ir import normal, weights
from netlathe.passes.quantize import Quantize
from netlathe.pipeline import verification
from netlathe.pipeline.pass_ import Context
from netlathe.pipeline.registry import find_target
from tests.ir.onnx_text import feeds, matrix, model, node, ops

Array = np.ndarray[Any, np.dtype[Any]]
(TARGET,) = (target for target in OnnxBackend.targets() if target.name == DIALECT)

SCHEMES = [
    {"weights": "int4", "group_size": 16},
    {"weights": "int4", "group_size": 32, "scales": "float16"},
    {"weights": "int4", "group_size": 32, "symmetric": False},
    {"weights": "int4", "group_size": 48, "symmetric": False, "scales": "bfloat16"},
    {"weights": "int4"},
    {"weights": "int4", "symmetric": False, "per_tensor": True},
    {"weights": "int8", "group_size": 96},
    {"weights": "int8", "symmetric": False},
    {"weights": "int8", "per_tensor": True},
]  # fmt: skip


def settled(inputs: str, body: str, **constants: Any) -> ir.Model:
    made = model(inputs, "float y", body, **constants)
    normal.normalize(made)
    return made


def quantized(before: ir.Model, **options: Any) -> tuple[ir.Model, ir.Model]:
    """A model after quantize, and the simulated reference of it."""
    pass_, after = Quantize(min_size=0, **options), before.clone()
    chosen = pass_.choose(before, Context())
    pass_.edit(after, chosen, Context())
    normal.normalize(after)
    return after, pass_.simulate(before.clone(), chosen).model


def unpacked(made: ir.Model, name: str) -> Array:
    """The weight that MatMulNBits or GatherBlockQuantized stands for, [N, K], as its schema reads it."""
    found = node(made, "MatMulNBits") if name == "MatMulNBits" else node(made, name)
    bits, block = found.attributes.get_int("bits", 0), found.attributes.get_int("block_size", 0)
    probe = made.clone()
    wanted = [v.name for v in found.inputs if v is not None and v.name != "x"]
    held = {
        v.name: v.const_value.numpy() for v in made.graph.initializers.values() if v.const_value
    }
    missing = [n for n in wanted if n not in held]
    held |= ort.run(probe, feeds(made, {"b": 2, "s": 5}), [n or "" for n in missing])
    arrays = [held.get(v.name) if v is not None else None for v in found.inputs]
    codes, scales = arrays[1], arrays[2]
    zeros = arrays[3] if len(arrays) > 3 else None

    def taken_apart(packed: Array) -> Array:
        parts = [packed >> (bits * i) & (2**bits - 1) for i in range(8 // bits)]
        return np.stack(parts, -1).reshape(*packed.shape[:-1], -1).astype(np.float64)

    assert codes is not None and scales is not None
    numbers = taken_apart(codes)
    middle: Any = 2.0 ** (bits - 1)
    if zeros is not None:
        middle = taken_apart(zeros)[:, : numbers.shape[1], None]
    assert numbers.shape[2] == block
    values = ((numbers - middle) * scales[..., None].astype(np.float64)).astype(np.float32)
    return values.reshape(len(values), -1)[:, : found.attributes.get_int("K", 0)]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_packed_weights_are_the_numbers_of_the_reference(scheme: dict[str, Any]) -> None:
    body = "h = MatMul (x, w) y = Add (h, c)"
    before = settled("float[b,s,96] x", body, w=matrix(96, 40), c=matrix(40))
    after, reference = quantized(before, **scheme)
    made = after.clone()
    written = ort_dialect.rewrite(made, 4)
    assert written == ort_dialect.Written({"MatMulNBits": 1})
    assert not {"MatMul", "Add", "DequantizeLinear"} & set(ops(made)), "the bias went in as well"
    wanted = weights.array(reference.graph.initializers["w"])
    assert np.array_equal(unpacked(made, "MatMulNBits").T, wanted)
    fed = feeds(before, {"b": 2, "s": 5})
    expected = ort.run(reference, fed)["y"]
    assert np.abs(ort.run(made, fed)["y"] - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_what_a_product_may_lose_at_level_4(scheme: dict[str, Any]) -> None:
    before = settled("float[b,s,96] x", "y = MatMul (x, w)", w=matrix(96, 40))
    after, reference = quantized(before, **scheme)
    made = after.clone()
    ort_dialect.rewrite(made, 4)
    block = node(made, "MatMulNBits").attributes.get_int("block_size", 0)
    x = feeds(before, {"b": 2, "s": 5})["x"]
    w = weights.array(reference.graph.initializers["w"]).astype(np.float64)
    exact = x.astype(np.float64) @ w
    # A block of x is rounded to multiples of its largest magnitude / 127: each element is off by at most
    # half of that, and float32 adds 96 terms.
    parts = [slice(at, at + block) for at in range(0, 96, block)]
    steps = [np.abs(x[..., part]).max(-1, keepdims=True) / 127 for part in parts]
    bound = sum(s / 2 * np.abs(w[p]).sum(0) for s, p in zip(steps, parts, strict=True))
    bound = bound + 96 * 2.0**-23 * (np.abs(x) @ np.abs(w))
    fast = ort.run(made, {"x": x}, optimize=True, exact=False)["y"]
    assert (np.abs(fast - exact) <= bound).all()
    assert np.abs(fast - exact).max() > 1e-3 * np.abs(exact).max(), "it did round"
    exactly = ort.run(ort_dialect.at_level(made, 1), {"x": x}, optimize=True, exact=False)["y"]
    assert np.abs(exactly - exact).max() <= 1e-5 * np.abs(exact).max()


@pytest.mark.parametrize("length", [20, 90, 200])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_length_that_blocks_do_not_divide(length: int, symmetric: bool) -> None:
    before = settled(f"float[b,s,{length}] x", "y = MatMul (x, w)", w=matrix(length, 24))
    after, reference = quantized(before, weights="int4", symmetric=symmetric)
    made = after.clone()
    assert ort_dialect.rewrite(made, 1).operators == {"MatMulNBits": 1}
    wanted = weights.array(reference.graph.initializers["w"])
    assert np.array_equal(unpacked(made, "MatMulNBits").T, wanted)
    fed = feeds(before, {"b": 2, "s": 5})
    expected = ort.run(reference, fed)["y"]
    for optimize in (False, True):
        actual = ort.run(made, fed, optimize=optimize)["y"]
        assert np.abs(actual - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_tied_table_is_stored_once(symmetric: bool) -> None:
    body = "e = Gather (w, i) n = Neg (e) t = Transpose <perm=[1,0]> (w) y = MatMul (n, t)"
    before = settled("int64[b,s] i", body, w=matrix(50, 64))
    after, reference = quantized(before, weights="int4", group_size=32, symmetric=symmetric)
    made = after.clone()
    assert ort_dialect.rewrite(made, 1).operators == {"MatMulNBits": 1, "GatherBlockQuantized": 1}
    assert weights.num_bytes(made) <= weights.num_bytes(after) + 64
    assert np.array_equal(
        unpacked(made, "MatMulNBits"), weights.array(reference.graph.initializers["w"])
    )
    fed = feeds(before, {"b": 2, "s": 5})
    expected = ort.run(reference, fed)["y"]
    for optimize in (False, True):
        actual = ort.run(made, fed, optimize=optimize)["y"]
        assert np.abs(actual - expected).max() <= 1e-5 * np.abs(expected).max()


# -- activations --------------------------------------------------------------------------------------


def executed(file: Path, fed: dict[str, Array]) -> Counter[str]:
    """The operators that ONNX Runtime runs with default settings, from its own profile."""
    settings = onnxruntime.SessionOptions()
    settings.enable_profiling, settings.profile_file_prefix = True, str(file.parent / "profile")
    session = onnxruntime.InferenceSession(file, settings, providers=["CPUExecutionProvider"])
    session.run(None, fed)
    events = json.loads(Path(session.end_profiling()).read_text())
    kernels = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    return Counter(e["args"]["op_name"] for e in kernels)


@pytest.mark.parametrize("number", ["int8", "uint8"])
def test_pairs_become_integer_kernels(tmp_path: Path, number: Any) -> None:
    body = (
        "a = Conv <pads=[1,1,1,1]> (x, w, c) r = Relu (a) d = Conv (r, u) e = Conv (r, v)"
        " s = Add (d, e) y = GlobalAveragePool (s)"
    )
    before = settled(
        "float[b,3,8,8] x",
        body,
        w=matrix(8, 3, 3, 3),
        c=matrix(8),
        u=matrix(8, 8, 1, 1, seed=1),
        v=matrix(8, 8, 1, 1, seed=2),
    )
    fed = feeds(before, {"b": 2})
    ctx, after = Context(calibration=[fed]), before.clone()
    pass_ = Quantize(min_size=0, activations=number, activation_form="qdq")
    chosen = pass_.choose(before, ctx)
    pass_.edit(after, chosen, ctx)
    normal.normalize(after)
    artifact = OnnxBackend().compile(after, TARGET)
    artifact.save(tmp_path)
    assert artifact.report()["dialect"]["unsigned"] == (6 if number == "int8" else 0)
    ran = executed(tmp_path / "model.onnx", fed)
    assert (ran["QLinearConv"], ran["QLinearAdd"], ran["Conv"], ran["Add"]) == (3, 1, 0, 0)
    reference = pass_.simulate(before.clone(), chosen).model
    assert np.array_equal(
        ort.run(ir.load(tmp_path / "model.onnx"), fed)["y"], ort.run(reference, fed)["y"]
    )


@pytest.mark.parametrize("scales", ["static", "token"])
def test_integer_products_take_uint8(scales: Any) -> None:
    before = settled(
        "float[b,s,64] x", "h = MatMul (x, w) y = MatMul (h, v)", w=matrix(64, 32), v=matrix(32, 8)
    )
    fed = feeds(before, {"b": 2, "s": 5})
    after, ctx = before.clone(), Context(calibration=[fed])
    Quantize(min_size=0, activations="int8", activation_scales=scales).run(after, ctx)
    normal.normalize(after)
    made = after.clone()
    assert ort_dialect.rewrite(made, 4).unsigned == 2
    products = [n for n in made.graph if n.op_type == "MatMulInteger"]
    for product in products:
        assert [v.dtype for v in product.inputs if v] == [
            ir.DataType.UINT8,
            ir.DataType.INT8,
            ir.DataType.UINT8,
        ]
    assert len(products) == 2
    for optimize in (False, True):
        assert np.array_equal(
            ort.run(made, fed, optimize=optimize)["y"], ort.run(after, fed, optimize=False)["y"]
        )


def test_pairs_by_token_behind_a_product_keep_their_types(tmp_path: Path) -> None:
    """Blocks along tokens need ranks at older opsets, and no shape rule knows MatMulNBits."""
    body = "h = MatMul (x, w) r = Relu (h) y = MatMul (r, v)"
    before = settled("float[b,s,64] x", body, w=matrix(64, 32), v=matrix(32, 16))
    after, reference = quantized(
        before,
        weights="int4",
        group_size=16,
        activations="int8",
        activation_scales="token",
        activation_form="qdq",
    )
    artifact = OnnxBackend().compile(after, TARGET)
    artifact.save(tmp_path)
    fed = feeds(before, {"b": 2, "s": 5})
    wanted = ort.run(reference, fed)["y"]
    found = ort.run(ort_dialect.at_level(ir.load(tmp_path / "model.onnx"), 1), fed)["y"]
    assert np.abs(found - wanted).max() <= 64 * 2.0**-23 * np.sqrt(np.square(wanted).mean())
    assert artifact.report()["dialect"]["operators"]["MatMulNBits"] == 2


def test_codes_that_change_are_told_from_wrong_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few codes may change by rounding; what changes the outputs more than these do is wrong."""
    body = "h = MatMul (x, w) r = Relu (h) y = MatMul (r, v)"
    before = settled("float[b,s,64] x", body, w=matrix(64, 96), v=matrix(96, 16))
    after = before.clone()
    fed = feeds(before, {"b": 8, "s": 40})
    pass_ = Quantize(min_size=0, activations="int8", activation_form="qdq")
    pass_.run(after, Context(calibration=[fed]))
    normal.normalize(after)
    wrong = 0.0
    real = onnx_file.run_file

    def run_file(file: Path, given: Any, *, optimize: bool, exact: bool = True) -> dict[str, Array]:
        found = real(file, given, optimize=optimize, exact=exact)
        far = wrong * np.sqrt(np.square(found["y"]).mean()) * matrix(*found["y"].shape, seed=7)
        return {"y": found["y"] + far} if optimize else found

    monkeypatch.setattr(onnx_file, "run_file", run_file)
    moved = verification.disturbed_outputs(after, fed, 64)["y"]
    expected = ort.run(after, fed)["y"]
    share = np.sqrt(np.square(moved - expected).mean() / np.square(expected).mean())
    assert 1e-4 < share < 0.1, "some codes change"
    for number, (wrong, fine) in enumerate(
        [(0.0, True), (1.0 * share, True), (3.0 * share, False)]
    ):
        artifact = OnnxBackend().compile(after, find_target("onnx")[1])
        artifact.sample = fed
        (tmp_path / str(number)).mkdir()
        if not fine:
            with pytest.raises(VerifyError, match="where codes change by rounding"):
                artifact.save(tmp_path / str(number))
            continue
        artifact.save(tmp_path / str(number))
        report = artifact.report()
        if wrong:
            assert report["least_cosine_optimizations_on"] <= report["cosine_optimizations_on"] < 1
        else:
            assert report["error_optimizations_on"] <= report["bound_optimizations_on"]


def test_static_pairs_of_products_stay(tmp_path: Path) -> None:
    before = settled("float[b,s,64] x", "y = MatMul (x, w)", w=matrix(64, 32))
    fed, after = feeds(before, {"b": 2, "s": 5}), before.clone()
    pass_ = Quantize(min_size=0, activations="int8", activation_form="qdq")
    pass_.run(after, Context(calibration=[fed]))
    normal.normalize(after)
    artifact = OnnxBackend().compile(after, TARGET)
    artifact.save(tmp_path)
    assert "8 bits already" in artifact.report()["dialect"]["left"]["w"]
    assert executed(tmp_path / "model.onnx", fed)["MatMulIntegerToFloat"] == 1


def test_dynamic_activations_become_one_kernel(tmp_path: Path) -> None:
    before = settled("float[b,s,64] x", "y = MatMul (x, w)", w=matrix(64, 32))
    options: Any = {"activations": "uint8", "activation_scales": "tensor"}
    after, _ = quantized(before, **options)
    OnnxBackend().compile(after, TARGET).save(tmp_path)
    ran = executed(tmp_path / "model.onnx", feeds(before, {"b": 2, "s": 5}))
    assert ran == {"DynamicQuantizeMatMul": 1}


# -- what stays standard ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "inputs, body, shape, options, why",
    [
        ("float[b,s,3,16] x", "y = MatMul (x, w)", (3, 16, 6), {}, "3 dims: only matrices"),
        ("float[b,4,9,s] x", "y = Conv (x, w)", (6, 4, 4, 4), {}, "only matrices"),
        ("float[b,16,s] x", "y = MatMul (w, x)", (6, 16), {}, "read by MatMul y as well"),
        ("float[b,24] x", "y = MatMul (x, w)", (24, 6), {"group_size": 8}, "no multiple of 16"),
        ("float[16] x", "y = MatMul (x, w)", (16, 6), {}, "with a vector"),
        ("float[b,16] x", "y = MatMul (x, w)", (16, 6), {"weights": "nf4"}, "places in a table"),
        ("float[b,16] x", "y = MatMul (x, w)", (16, 6), {"weights": "int3"}, "bit planes"),
        ("float[b,16] x", "y = MatMul (x, w)", (16, 6), {"weights": "float8e5m2"}, "float8e5m2"),
        (
            "float[b,16] x",
            "y = MatMul (x, w)",
            (16, 6),
            {"weights": "int8"},
            "run slower than float32",
        ),
    ],
)
def test_what_has_no_form_is_left_with_a_reason(
    inputs: str, body: str, shape: tuple[int, ...], options: dict[str, Any], why: str
) -> None:
    before = settled(inputs, body, w=matrix(*shape))
    after, _ = quantized(before, **{"weights": "int4", **options})
    made = after.clone()
    written = ort_dialect.rewrite(made, 1)
    assert written.operators == {} and ops(made) == ops(after)
    (reason,) = written.left.values()
    assert why in reason


# -- the backend --------------------------------------------------------------------------------------


def block() -> ir.Model:
    """Two products and a lookup of different bits."""
    body = "e = Gather (t, i) h = MatMul (e, w) r = Relu (h) y = MatMul (r, v)"
    before = settled("int64[b,s] i", body, t=matrix(50, 64), w=matrix(64, 96), v=matrix(96, 32))
    after, _ = quantized(
        before, weights="int4", group_size=32, overrides={"v": {"weights": "int8", "group_size": 0}}
    )
    return after


@pytest.mark.parametrize("opset", [18, 24])
@pytest.mark.parametrize("level", [1, 4])
def test_the_backend_writes_and_judges_it(tmp_path: Path, opset: int, level: int) -> None:
    backend, target = find_target("onnx-ort", opset=opset, accuracy_level=level)
    made = block()
    assert backend.unsupported(made, target) == []
    artifact = backend.compile(made, target)
    artifact.save(tmp_path)
    report = artifact.report()
    assert report["error_optimizations_on"] <= report["bound_optimizations_on"]
    operators = {"MatMulNBits": 2 if level == 4 else 1, "GatherBlockQuantized": 1}
    assert report["dialect"]["operators"] == operators
    assert set(report["dialect"]["left"]) == (set() if level == 4 else {"v"})
    written = Counter(n.op_type for n in ir.load(tmp_path / "model.onnx").graph)
    assert written["MatMulNBits"] == operators["MatMulNBits"]
    # At level 1 the weight of 8 bits stays, and ONNX Runtime itself rounds what it is multiplied with.
    assert 1e-4 < report["error_default_settings"] < 0.1


def test_an_impossible_level_is_refused() -> None:
    bad = dataclasses.replace(TARGET, settings={**TARGET.settings, "accuracy_level": 2})
    with pytest.raises(OptionError, match="accuracy_level 2"):
        OnnxBackend().check(bad)
    with pytest.raises(OptionError, match="no setting"):
        find_target("onnx", accuracy_level=1)
