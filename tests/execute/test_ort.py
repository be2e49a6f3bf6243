"""ONNX Runtime as judge: cut into ranges, at dtypes it cannot hand over, with errors that name the node."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper

from netlathe.diagnostics import InputError
from netlathe.execute import ort
from netlathe.ir import normal
from tests.execute import text


def chain(links: int = 6, width: int = 32) -> ir.Model:
    """``links`` products with 4 KiB weights each, and a first value that the last node reads too."""
    body = "h0 = Relu(x)" + "".join(
        f" m{i} = MatMul(h{i}, w{i}) h{i + 1} = Tanh(m{i})" for i in range(links)
    )
    weights = {f"w{i}": text.normal(width, width, seed=i) / 6 for i in range(links)}
    return text.model(
        f"g (float[b, {width}] x) => (float[b, {width}] y) {{ {body} y = Add(h{links}, h0) }}",
        weights,
    )


def test_ranges_give_what_the_whole_gives() -> None:
    model, feeds = chain(), {"x": text.normal(3, 32, seed=9)}
    whole = ort.run(model, feeds, ["y", "h2", "x", "w1"])
    session = ort.Session(model, ["y", "h2", "x", "w1"], max_bytes=2 * 32 * 32 * 4)
    assert len(session._segments) == 3
    for _ in range(2):
        parts = session.run(feeds)
        assert list(parts) == ["y", "h2", "x", "w1"]
        assert all(np.array_equal(parts[name], whole[name]) for name in whole)


def test_no_more_weights_than_allowed_are_in_a_session(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = ort.Session._proto

    def proto(self: ort.Session, segment: ort._Segment, held: dict[str, onnxruntime.OrtValue]):  # type: ignore[no-untyped-def]  # what the real one returns
        made = real(self, segment, held)
        inline = sum(len(t.raw_data) for t in made[0].graph.initializer)
        sizes.append(inline + sum(v.numpy().nbytes for v in made[2]))
        return made

    monkeypatch.setattr(ort.Session, "_proto", proto)
    ort.run(chain(), {"x": text.normal(3, 32)}, max_bytes=10_000)
    assert len(sizes) == 3 and max(sizes) <= 10_000


def test_only_what_is_asked_for_runs() -> None:
    model = chain()
    broken = model.graph.node(-1)
    broken.op_type = "NoSuchOp"
    assert list(ort.run(model, {"x": text.normal(3, 32)}, ["h1"])) == ["h1"]


def test_a_weight_and_an_input_can_be_asked_for() -> None:
    model, x = chain(), text.normal(3, 32)
    got = ort.run(model, {"x": x}, ["w3", "x"])
    assert np.array_equal(got["x"], x) and got["w3"].shape == (32, 32)


def test_big_weights_are_shared_and_not_copied(tmp_path: Path) -> None:
    """What ONNX Runtime is given lies in the mapped file."""
    array = text.normal(64, 64)
    (tmp_path / "weights").write_bytes(array.tobytes())
    model = text.model("g (float[b, 64] x) => (float[b, 64] y) { y = MatMul(x, w) }", {"w": array})
    mapped = ir.ExternalTensor(
        *("weights", 0, array.nbytes, ir.DataType.FLOAT),
        shape=ir.Shape([64, 64]),
        name="w",
        base_dir=tmp_path,
    )
    model.graph.initializers["w"].const_value = mapped
    session = ort.Session(model)
    _, names, values = session._proto(session._segments[0], {})
    assert names == ["w"]
    assert values[0].data_ptr() == mapped.numpy().ctypes.data


@pytest.mark.parametrize(
    ("dtype", "array", "low", "high"),
    [("INT4", ml_dtypes.int4, -8, 7), ("UINT4", ml_dtypes.uint4, 0, 15)],
)
@pytest.mark.parametrize("max_bytes", [ort.SEGMENT_BYTES, 1])
def test_integers_of_half_a_byte_come_and_go(
    dtype: str, array: type, low: int, high: int, max_bytes: int
) -> None:
    """Fed, handed from range to range, and given back."""
    source = (
        f"g ({dtype.lower()}[4] p, float[4] x, float s) => (float[4] y)"
        f" {{ q = QuantizeLinear<output_dtype = {TensorProto.DataType.Value(dtype)}>(x, s)"
        " a = DequantizeLinear(q, one) b = DequantizeLinear(p, s) y = Add(a, b) }"
    )
    model = text.model(source, {"one": np.array(1, np.float32)})
    normal.normalize(model)
    p = np.array([low, 1, 2, high]).astype(array)
    feeds = {"p": p, "x": np.array([-99, 2, 6, 99], np.float32), "s": np.array(2, np.float32)}
    got = ort.run(model, feeds, ["q", "y", "p"], max_bytes=max_bytes)
    assert got["q"].dtype == array and got["q"].astype(int).tolist() == [low, 1, 3, high]
    assert np.array_equal(got["p"], p)
    assert got["y"].tolist() == [3 * low, 3, 7, 3 * high]


def test_bfloat16_is_float32_arithmetic_rounded_after_every_node() -> None:
    model = text.model("g (bfloat16[3] a, bfloat16[3] b) => (bfloat16[3] y) { y = Mul(a, b) }")
    a, b = (text.normal(3, seed=i).astype(ml_dtypes.bfloat16) for i in range(2))
    got = ort.run(model, {"a": a, "b": b})["y"]
    exact = a.astype(np.float32) * b.astype(np.float32)
    assert got.dtype == ml_dtypes.bfloat16
    assert got.tobytes() == exact.astype(ml_dtypes.bfloat16).tobytes()


@pytest.mark.parametrize("alpha", [1.0, 1.7])
def test_swish_runs_at_opset_25(alpha: float) -> None:
    model = text.model(f"g (float[5] x) => (float[5] y) {{ y = Swish<alpha = {alpha}>(x) }}")
    model.opset_imports[""] = 25
    x = text.normal(5)
    wide = x.astype(np.float64)
    expected = wide / (1 + np.exp(-alpha * wide))
    # three float32 roundings, each 2^-24, and those of its exp
    np.testing.assert_allclose(ort.run(model, {"x": x})["y"], expected, rtol=2**-20)


def test_roi_align_between_other_nodes_runs_at_opset_25() -> None:
    """ONNX Runtime has its kernel below opset 22 only; the definition is the same."""
    rois = np.array([[0, 0, 5, 5], [1, 2, 6, 7]], np.float32)
    which = np.zeros(2, np.int64)
    body = (
        "a = Relu(x) r = RoiAlign<output_height = 2, output_width = 2, sampling_ratio = 2,"
        ' mode = "avg">(a, rois, which) y = Swish(r)'
    )
    source = f"g (float[1, 2, 8, 8] x) => (float[2, 2, 2, 2] y) {{ {body} }}"
    model = text.model(source, {"rois": rois, "which": which})
    model.opset_imports[""] = 25
    x = text.normal(1, 2, 8, 8)
    got = ort.run(model, {"x": x}, ["r", "y"])
    judge = helper.make_model(
        helper.make_graph(
            [
                helper.make_node(
                    *("RoiAlign", ["x", "rois", "which"], ["r"]),
                    **{"output_height": 2, "output_width": 2, "sampling_ratio": 2},
                )
            ],
            "judge",
            [
                helper.make_tensor_value_info("x", TensorProto.FLOAT, None),
                helper.make_tensor_value_info("rois", TensorProto.FLOAT, None),
                helper.make_tensor_value_info("which", TensorProto.INT64, None),
            ],
            [helper.make_tensor_value_info("r", TensorProto.FLOAT, None)],
        ),
        opset_imports=[helper.make_opsetid("", 16)],
        ir_version=8,
    )
    session = onnxruntime.InferenceSession(judge.SerializeToString())
    (expected,) = session.run(None, {"x": np.maximum(x, 0), "rois": rois, "which": which})
    assert np.array_equal(got["r"], np.asarray(expected))
    assert got["y"].shape == (2, 2, 2, 2)


def test_bad_feeds_are_named_together() -> None:
    with pytest.raises(InputError) as caught:
        ort.run(chain(), {"z": np.zeros(1, np.float32)})
    message = str(caught.value)
    assert "no input named 'z'" in message and "'x' is missing" in message
    with pytest.raises(InputError, match="float64, not float32"):
        ort.run(chain(), {"x": np.zeros((3, 32))})
    with pytest.raises(InputError, match="has 1 dims, not 2"):
        ort.run(chain(), {"x": np.zeros(32, np.float32)})
    with pytest.raises(InputError, match="cannot be handed over"):
        ort.run(chain(), {"x": np.array([["a"]], np.object_)})
    with pytest.raises(InputError, match="no value named nothing"):
        ort.run(chain(), {"x": text.normal(3, 32)}, ["nothing"])


def test_a_node_that_cannot_run_is_named_with_its_module() -> None:
    model = chain()
    node = model.graph.node(5)
    node.name, node.op_type = "odd_one", "NoSuchOp"
    node.metadata_props["netlathe.module"] = "layers.2"
    with pytest.raises(ort.RuntimeFailure) as caught:
        ort.run(model, {"x": text.normal(3, 32)})
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code == "run.onnxruntime"
    assert "NoSuchOp" in diagnostic.at and diagnostic.where == "layers.2"


def test_a_result_that_is_no_tensor_is_refused() -> None:
    source = "g (float[2] x) => (float[2] y) { s = SequenceConstruct(x, x) y = SequenceAt(s, i) }"
    model = text.model(source, {"i": np.array(0)})
    x = np.ones(2, np.float32)
    assert ort.run(model, {"x": x})["y"].tolist() == [1, 1]
    with pytest.raises(ort.RuntimeFailure, match="'s' is no tensor"):
        ort.run(model, {"x": x}, ["s"])


def test_an_input_with_a_default_need_not_be_fed() -> None:
    model = text.model("g (float[2] x, float[2] w) => (float[2] y) { y = Mul(x, w) }")
    weight = model.graph.inputs[1]
    weight.const_value = ir.Tensor(np.array([2, 3], np.float32), name="w")
    model.graph.initializers["w"] = weight
    x = np.array([1, 1], np.float32)
    assert ort.run(model, {"x": x})["y"].tolist() == [2, 3]
    assert ort.run(model, {"x": x, "w": x})["y"].tolist() == [1, 1]


def test_the_number_of_threads_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ort.THREADS_VARIABLE, "3")
    assert ort.default_threads() == 3
    monkeypatch.setenv(ort.THREADS_VARIABLE, "none")
    with pytest.raises(InputError, match="NETLATHE_THREADS must be a positive number"):
        ort.default_threads()


def test_optimizations_are_off_unless_asked_for() -> None:
    model = text.model("g (float[2] x) => (float[2] y) { a = Neg(x) b = Neg(a) y = Identity(b) }")
    off, on = (ort.Session(model, optimize=optimize) for optimize in (False, True))
    levels = onnxruntime.GraphOptimizationLevel
    for session, level in ((off, levels.ORT_DISABLE_ALL), (on, levels.ORT_ENABLE_ALL)):
        session.run({"x": np.ones(2, np.float32)})
        assert session._kept is not None
        assert session._kept.get_session_options().graph_optimization_level == level
