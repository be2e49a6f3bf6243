"""ONNX files of any readable opset come in as the same function; damaged and hostile ones do not."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import netlathe
from netlathe.diagnostics import CaptureError, InputError, OptionError, VerifyError
from netlathe.execute import ort
from netlathe.frontends import compare
from netlathe.frontends.onnx_file import OnnxFile
from netlathe.frontends.onnx_opset import _ADAPTERS, NEWEST, OLDEST, raise_opset
from netlathe.pipeline import verification


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def tower(opset: int = 17, rows: int = 16) -> onnx.ModelProto:
    """x [batch, rows] -> two MatMul and a Relu; weights of rows * rows floats."""
    weights = [rng().standard_normal((rows, rows)).astype(np.float32) / 4 for _ in range(2)]
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w0"], ["a"], name="first"),
            helper.make_node("Relu", ["a"], ["b"], name="relu"),
            helper.make_node("MatMul", ["b", "w1"], ["y"], name="second"),
        ],
        "tower",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", rows])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", rows])],
        [numpy_helper.from_array(w, f"w{i}") for i, w in enumerate(weights)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def write(model: onnx.ModelProto, folder: Path, external: bool = False) -> Path:
    path = folder / "model.onnx"
    if external:
        onnx.save_model(
            model, str(path), save_as_external_data=True, location="model.data", size_threshold=0
        )
    else:
        onnx.save_model(model, str(path))
    return path


def reference(path: Path, feeds: dict[str, Any]) -> list[Any]:
    """What ONNX Runtime makes of the file itself."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    results: list[Any] = list(session.run(None, feeds))
    return results


def test_a_mistake_in_raising_is_not_taken_for_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How far rounding moves a model is told from the model alone, whatever raising has made of it."""

    def wrong(model: ir.Model) -> int:
        version = raise_opset(model)
        for node in model.graph:
            if node.op_type == "Relu":
                node.op_type = "Abs"
        return version

    monkeypatch.setattr("netlathe.frontends.onnx_file.raise_opset", wrong)
    with pytest.raises(CaptureError, match="differs from the original"):
        OnnxFile().capture(write(tower(17), tmp_path))


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("opset", [13, 17, 21, 25])
def test_a_file_comes_in_as_the_same_function(opset: int, external: bool, tmp_path: Path) -> None:
    path = write(tower(opset), tmp_path, external)
    captured = OnnxFile().capture(path)
    assert captured.model.opset_imports[""] == 25
    assert [v.name for v in captured.model.graph.inputs] == ["x"]
    assert [v.name for v in captured.model.graph.outputs] == ["y"]
    assert set(captured.dynamic) == {"batch"}
    feeds = dict(captured.sample({"batch": 5}, 3))
    assert feeds["x"].shape == (5, 16)
    actual = ort.run(captured.model, feeds)["y"]
    np.testing.assert_allclose(actual, reference(path, feeds)[0], atol=1e-6)
    raised = [e for e in captured.entries if e.candidate == "opset"]
    assert bool(raised) == (opset != 25)


# -- opsets ---------------------------------------------------------------------------------------


def test_every_operator_that_changed_has_an_adapter() -> None:
    """Read from the schemas: attributes that went, new demands, fewer inputs or outputs."""
    changed = set()
    for name in {s.name for s in onnx.defs.get_all_schemas_with_history() if s.domain == ""}:
        for first in range(OLDEST, NEWEST):
            try:
                old = onnx.defs.get_schema(name, first, "")
                new = onnx.defs.get_schema(name, NEWEST, "")
            except onnx.defs.SchemaError:
                continue
            gone = set(old.attributes) - set(new.attributes)
            asked = {
                a for a in set(new.attributes) - set(old.attributes) if new.attributes[a].required
            }
            other = {
                a
                for a in set(new.attributes) & set(old.attributes)
                if str(new.attributes[a].default_value) != str(old.attributes[a].default_value)
            }
            if gone or asked or other or new.min_input > old.min_input:
                changed.add(name)
            if new.deprecated:
                changed.add(name)
            if new.max_input < old.max_input or new.max_output < old.max_output:
                changed.add(name)
    # The rest of the table changed meaning without changing form.
    assert changed <= set(_ADAPTERS)
    assert {"RoiAlign", "Split", "GroupNormalization", "GridSample"} <= set(_ADAPTERS)


def one_node(
    op: str, opset: int, inputs: dict[str, Any], outputs: int = 1, **attributes: Any
) -> Any:
    names = [f"y{i}" for i in range(outputs)]
    data, *rest = inputs.items()
    graph = helper.make_graph(
        [helper.make_node(op, list(inputs), names, name=op, **attributes)],
        op,
        [helper.make_tensor_value_info(data[0], TensorProto.FLOAT, list(data[1].shape))],
        [helper.make_empty_tensor_value_info(n) for n in names],
        [numpy_helper.from_array(value, name) for name, value in rest],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def f32(*shape: int) -> Any:
    return rng().standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    "model",
    [
        one_node("ReduceMean", 13, {"x": f32(2, 3, 4)}, axes=[1, 2], keepdims=0),
        one_node("ReduceL2", 17, {"x": f32(2, 3, 4)}, axes=[-1]),
        one_node("ReduceMax", 13, {"x": f32(2, 3)}),
        one_node("ReduceSum", 9, {"x": f32(2, 3, 4)}, axes=[1], keepdims=0),
        one_node("Squeeze", 11, {"x": f32(2, 1, 3)}, axes=[1]),
        one_node("Unsqueeze", 7, {"x": f32(2, 3)}, axes=[0, 3]),
        one_node("Split", 11, {"x": f32(6, 2)}, outputs=2, axis=0, split=[4, 2]),
        one_node("Split", 7, {"x": f32(6, 2)}, outputs=2),
        one_node("Slice", 9, {"x": f32(6, 5)}, starts=[1], ends=[-1], axes=[1]),
        one_node("Slice", 7, {"x": f32(6, 5)}, starts=[1, 0], ends=[100, 3]),
        one_node("TopK", 7, {"x": f32(3, 7)}, outputs=2, k=2, axis=1),
        one_node("Pad", 10, {"x": f32(2, 3)}, pads=[0, 1, 2, 0], value=1.5),
        one_node("Pad", 9, {"x": f32(2, 3)}, pads=[0, 1, 0, 1], mode="reflect"),
        one_node("Clip", 7, {"x": f32(2, 3)}, min=-0.5),
        one_node("Clip", 10, {"x": f32(2, 3)}, min=-0.5, max=0.25),
        one_node("Dropout", 10, {"x": f32(2, 3)}, ratio=0.25),
        one_node("Dropout", 7, {"x": f32(2, 3)}),
        one_node("Softmax", 11, {"x": f32(2, 3, 4)}),
        one_node("Softmax", 12, {"x": f32(2, 3, 4)}, axis=-1),
        one_node("LogSoftmax", 7, {"x": f32(2, 3, 4, 1)}, axis=2),
        one_node("Hardmax", 9, {"x": f32(2, 3, 4)}),
        one_node(
            "Upsample", 7, {"x": f32(1, 2, 3, 4)}, scales=[1.0, 1.0, 2.0, 3.0], mode="nearest"
        ),
        one_node(
            "Upsample",
            9,
            {"x": f32(1, 2, 3, 4), "s": np.array([1, 1, 2, 2], np.float32)},
            mode="linear",
        ),
        one_node("Resize", 10, {"x": f32(1, 2, 3, 4), "s": np.array([1, 1, 2.5, 2], np.float32)}),
        one_node("Resize", 10, {"x": f32(1, 2, 6, 6), "s": np.array([1, 1, 0.4, 0.5], np.float32)}),
        one_node("Resize", 10, {"x": f32(1, 2, 7, 4), "s": np.array([1, 1, 0.4, 2.5], np.float32)}),
        one_node(
            "Resize",
            10,
            {"x": f32(1, 2, 3, 4), "s": np.array([1, 1, 2, 2], np.float32)},
            mode="linear",
        ),
        one_node(
            "Resize",
            10,
            {"x": f32(1, 2, 7, 4), "s": np.array([1, 1, 0.4, 2.5], np.float32)},
            mode="linear",
        ),
        one_node(
            "Resize",
            11,
            {"x": f32(1, 2, 3, 4), "r": f32(0), "s": f32(0), "z": np.array([1, 2, 5, 7])},
            mode="linear",
        ),
        one_node(
            "Resize",
            12,
            {"x": f32(1, 2, 3, 4), "r": f32(0), "s": np.array([1, 1, 2, 2], np.float32)},
        ),
        one_node(
            "Scatter",
            9,
            {"x": f32(3, 3), "i": np.array([[1, 0, 2]]), "u": f32(1, 3)},
            axis=0,
        ),
        one_node("Split", 13, {"x": f32(6, 2)}, outputs=3, axis=0),
        one_node(
            "GridSample",
            16,
            {"x": f32(1, 2, 5, 5), "grid": np.tanh(f32(1, 3, 3, 2))},
            mode="bilinear",
        ),
        one_node(
            "RoiAlign",
            13,
            {
                "x": f32(1, 2, 8, 8),
                "rois": np.asarray([[0, 0, 5, 5]], np.float32),
                "batch": np.zeros(1, np.int64),
            },
            output_height=2,
            output_width=2,
        ),
        one_node("DFT", 17, {"x": f32(1, 8, 4, 1)}, axis=1),
        one_node(
            "BatchNormalization",
            13,
            {
                "x": f32(2, 3, 4, 4),
                "s": f32(3),
                "b": f32(3),
                "m": f32(3),
                "v": np.abs(f32(3)) + 1,
            },
        ),
        one_node(
            "BatchNormalization",
            7,
            {"x": f32(2, 3, 4), "s": f32(3), "b": f32(3), "m": f32(3), "v": np.abs(f32(3)) + 1},
            spatial=1,
        ),
    ],
    ids=lambda m: f"{m.graph.node[0].op_type}-{m.opset_import[0].version}",
)
def test_raising_keeps_the_function(model: onnx.ModelProto) -> None:
    """Judged by ONNX Runtime, which has its own kernel for each version of an operator."""
    value = model.graph.input[0]
    shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
    feeds = {"x": np.random.default_rng(1).standard_normal(shape).astype(np.float32)}
    raised = ir.from_proto(model)
    raise_opset(raised)
    raised.ir_version = 11
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    expected = dict(
        zip([v.name for v in model.graph.output], session.run(None, feeds), strict=True)
    )
    actual = ort.run(raised, feeds)
    assert list(actual) == list(expected)
    for name, before in expected.items():
        np.testing.assert_allclose(actual[name], np.asarray(before), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("op", "opset", "attributes"),
    [
        ("BatchNormalization", 7, {"spatial": 0}),
        ("Scan", 8, {"num_scan_inputs": 1}),
        ("Resize", 11, {"coordinate_transformation_mode": "tf_half_pixel_for_nn"}),
    ],
)
def test_what_has_no_equal_is_refused_by_name(
    op: str, opset: int, attributes: dict[str, Any]
) -> None:
    model = ir.from_proto(one_node(op, opset, {"x": f32(2, 3)}, **attributes))
    with pytest.raises(InputError, match=f"{op} .*has no equal") as caught:
        raise_opset(model)
    assert caught.value.diagnostics[0].at == op


@pytest.mark.parametrize("opset", [7, 10, 11])
@pytest.mark.parametrize("read", [False, True])
def test_the_mask_of_an_old_dropout_is_refused(read: bool, opset: int) -> None:
    model = one_node("Dropout", opset, {"x": f32(2, 3)}, outputs=2)
    if read:
        del model.graph.output[1:]
        model.graph.output.append(helper.make_empty_tensor_value_info("z"))
        model.graph.node.append(helper.make_node("Cast", ["y1"], ["z"], to=TensorProto.FLOAT))
    with pytest.raises(InputError, match="Dropout whose mask is used has no equal"):
        raise_opset(ir.from_proto(model))


@pytest.mark.parametrize("listed", [1, 5])
def test_an_old_batch_norm_of_more_outputs_trains(listed: int) -> None:
    """Whether or not anything reads the others."""
    weights = {"s": f32(3), "b": f32(3), "m": f32(3), "v": np.abs(f32(3)) + 1}
    model = one_node("BatchNormalization", 9, {"x": f32(2, 3, 4), **weights}, outputs=5)
    del model.graph.output[listed:]
    with pytest.raises(InputError, match="training") as caught:
        raise_opset(ir.from_proto(model))
    assert [d.code for d in caught.value.diagnostics] == ["onnx.training"]


@pytest.mark.parametrize(
    ("op", "opset", "inputs", "attributes"),
    [
        ("Upsample", 7, 1, {"mode": "nearest"}),
        ("Upsample", 7, 1, {"scales": [1, 1, 2, 2]}),
        ("Clip", 7, 1, {"min": 0}),
        ("Clip", 7, 0, {"min": 0.0}),
        ("Softmax", 11, 0, {}),
        ("ReduceSum", 9, 1, {"axes": [0.5]}),
        ("BatchNormalization", 7, 1, {"spatial": 1.0}),
    ],
)
def test_a_malformed_node_is_shown(
    op: str, opset: int, inputs: int, attributes: dict[str, Any], tmp_path: Path
) -> None:
    model = one_node(op, opset, {"x": f32(1, 2, 3, 4)}, **attributes)
    del model.graph.node[0].input[inputs:]
    with pytest.raises(InputError, match=f"{op} cannot be understood") as caught:
        OnnxFile().capture(write(model, tmp_path))
    assert [(d.code, d.at) for d in caught.value.diagnostics] == [("onnx.malformed", op)]


@pytest.mark.parametrize("opset", [7, 10])
@pytest.mark.parametrize(
    ("op", "to", "attributes"),
    [
        ("Clip", TensorProto.FLOAT16, {"min": -0.3, "max": 0.3}),
        ("Clip", TensorProto.FLOAT16, {"min": 0.0, "max": float(np.finfo(np.float32).max)}),
        ("Pad", TensorProto.FLOAT16, {"pads": [0, 1, 2, 0], "value": 1.5}),
        ("Pad", TensorProto.DOUBLE, {"pads": [0, 1, 2, 0], "value": 0.1}),
    ],
)
def test_numbers_that_became_inputs_are_of_the_data_s_dtype(
    op: str, to: int, attributes: dict[str, Any], opset: int, tmp_path: Path
) -> None:
    """Which is not in the file: dtypes of inner values seldom are."""
    model = one_node(op, opset, {"x": f32(2, 3)}, **attributes)
    model.graph.node.insert(0, helper.make_node("Cast", ["x"], ["half"], to=to))
    model.graph.node.insert(1, helper.make_node("Neg", ["half"], ["r"]))
    model.graph.node[2].input[0] = "r"
    captured = OnnxFile().capture(write(model, tmp_path))
    made = [node.op_type for node in captured.model.graph]
    assert made == ["Cast", "Neg", op]


@pytest.mark.parametrize("known", [True, False])
def test_an_old_softmax_over_the_last_dim_stays_one(known: bool, tmp_path: Path) -> None:
    """Its rank is not in the file: shapes of inner values seldom are."""
    model = one_node("Softmax", 11, {"x": f32(2, 3, 4)}, axis=2 if known else 1)
    model.graph.node.insert(0, helper.make_node("Relu", ["x"], ["r"]))
    model.graph.node[1].input[0] = "r"
    captured = OnnxFile().capture(write(model, tmp_path))
    assert ("Reshape" in [n.op_type for n in captured.model.graph]) is not known


def test_group_normalization_repeats_its_scales() -> None:
    """Against the definition: before 21 there is one scale and bias a group."""
    x = f32(2, 6, 3)
    scale, bias = np.asarray([0.5, -2.0], np.float32), np.asarray([3.0, 0.25], np.float32)
    model = one_node(
        "GroupNormalization",
        18,
        {"x": x, "scale": scale, "bias": bias},
        num_groups=2,
        epsilon=1e-5,
    )
    raised = ir.from_proto(model)
    raise_opset(raised)
    results: list[Any] = list(ReferenceEvaluator(ir.to_proto(raised)).run(None, {"x": x}))
    (after,) = results
    groups = x.astype(np.float64).reshape(2, 2, -1)
    mean, var = groups.mean(-1, keepdims=True), groups.var(-1, keepdims=True)
    scaled = (groups - mean) / np.sqrt(var + 1e-5) * scale[:, None] + bias[:, None]
    np.testing.assert_allclose(after, scaled.reshape(x.shape), rtol=1e-4, atol=1e-5)


def test_group_normalization_inside_a_file_finds_its_channels(tmp_path: Path) -> None:
    weights = {"scale": f32(2), "bias": f32(2)}
    model = one_node("GroupNormalization", 18, {"x": f32(2, 6, 3), **weights}, num_groups=2)
    model.graph.node.insert(0, helper.make_node("Relu", ["x"], ["r"]))
    model.graph.node[1].input[0] = "r"
    captured = OnnxFile().capture(write(model, tmp_path))
    assert "GroupNormalization" in [node.op_type for node in captured.model.graph]


# -- bad files ------------------------------------------------------------------------------------


def truncate_file(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def random_bytes(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04 surely a zip file" * 10)


def empty_file(path: Path) -> None:
    path.write_bytes(b"")


def only_a_header(path: Path) -> None:
    path.write_bytes(b"\x08\x08")


def drop_a_node(path: Path) -> None:
    model = onnx.load(str(path))
    del model.graph.node[0]
    onnx.save(model, str(path))


def plant_nan(path: Path) -> None:
    model = onnx.load(str(path))
    weight = numpy_helper.to_array(model.graph.initializer[1]).copy()
    weight[3, 4] = np.nan
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(weight, "w1"))
    onnx.save(model, str(path))


def set_opset(version: int) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        model = onnx.load(str(path))
        model.opset_import[0].version = version
        onnx.save(model, str(path))

    return edit


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (remove, "onnx.missing"),
        (truncate_file, "onnx.truncated"),
        (only_a_header, "onnx.truncated"),
        (random_bytes, "onnx.not_onnx"),
        (empty_file, "onnx.not_onnx"),
        (drop_a_node, "onnx.dangling"),
        (plant_nan, "weights.not_finite"),
        (set_opset(6), "onnx.opset"),
        (set_opset(26), "onnx.opset"),
    ],
)
def test_a_bad_file_is_explained(spoil: Callable[[Path], None], code: str, tmp_path: Path) -> None:
    path = write(tower(), tmp_path)
    spoil(path)
    with pytest.raises(InputError) as caught:
        OnnxFile().capture(path)
    assert caught.value.diagnostics[0].code == code
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("cut", [1, 7, 50, 300])
def test_a_file_cut_anywhere_is_refused(cut: int, tmp_path: Path) -> None:
    path = write(tower(), tmp_path)
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(InputError):
        OnnxFile().capture(path)


def relocate(path: Path, location: str) -> None:
    model = onnx.load(str(path), load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    path.write_bytes(model.SerializeToString())


def data_missing(path: Path) -> None:
    (path.parent / "model.data").unlink()


def data_short(path: Path) -> None:
    os.truncate(path.parent / "model.data", 1000)


def data_above(path: Path) -> None:
    (path.parent / "model.data").rename(path.parent.parent / "model.data")
    relocate(path, "../model.data")


def data_absolute(path: Path) -> None:
    relocate(path, str((path.parent / "model.data").resolve()))


def data_linked(path: Path) -> None:
    outside = path.parent.parent / "elsewhere.data"
    (path.parent / "model.data").rename(outside)
    (path.parent / "model.data").symlink_to(outside)


def data_hard_linked(path: Path) -> None:
    os.link(path.parent / "model.data", path.parent.parent / "elsewhere.data")


def wrong_length(path: Path) -> None:
    model = onnx.load(str(path), load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "length":
            entry.value = "12"
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (data_missing, "onnx.external_missing"),
        (data_short, "onnx.external_short"),
        (data_above, "onnx.external_path"),
        (data_absolute, "onnx.external_path"),
        (data_linked, "onnx.external_path"),
        (data_hard_linked, "onnx.external_path"),
        (wrong_length, "onnx.external_length"),
    ],
)
def test_bad_external_data_is_refused(
    spoil: Callable[[Path], None], code: str, tmp_path: Path
) -> None:
    folder = tmp_path / "inner"
    folder.mkdir()
    path = write(tower(), folder, external=True)
    spoil(path)
    with pytest.raises(InputError) as caught:
        OnnxFile().capture(path)
    assert caught.value.diagnostics[0].code == code
    assert "w" in caught.value.diagnostics[0].message


def test_external_weights_stay_mapped(tmp_path: Path) -> None:
    captured = OnnxFile().capture(write(tower(), tmp_path, external=True))
    kinds = {type(v.const_value) for v in captured.model.graph.initializers.values()}
    assert kinds == {ir.ExternalTensor}


def test_anonymous_dims_and_weights_among_the_inputs(tmp_path: Path) -> None:
    model = tower()
    model.graph.input[0].type.tensor_type.shape.dim[0].ClearField("dim_param")
    model.graph.input.append(helper.make_tensor_value_info("w0", TensorProto.FLOAT, [16, 16]))
    captured = OnnxFile().capture(write(model, tmp_path))
    assert [v.name for v in captured.model.graph.inputs] == ["x"]
    assert set(captured.dynamic) == {"x_dim0"}
    assert any(e.candidate == "w0" for e in captured.entries)


@pytest.mark.parametrize("op", ["Clip", "Add"])
def test_infinity_is_a_bound_and_no_weight(op: str, tmp_path: Path) -> None:
    model = tower()
    model.graph.node[1].CopyFrom(helper.make_node(op, ["a", "bound"], ["b"]))
    model.graph.initializer.append(numpy_helper.from_array(np.array(np.inf, np.float32), "bound"))
    path = write(model, tmp_path)
    if op == "Add":
        with pytest.raises(InputError, match=r"'bound' of .* holds inf"):
            OnnxFile().capture(path)
        return
    model.graph.node[1].input[:] = ["a", "floor", "bound"]
    model.graph.initializer.append(numpy_helper.from_array(np.array(0, np.float32), "floor"))
    captured = OnnxFile().capture(write(model, tmp_path))
    feeds = dict(captured.sample({"batch": 3}, 0))
    np.testing.assert_allclose(
        ort.run(captured.model, feeds)["y"], reference(path, feeds)[0], atol=1e-6
    )


def test_padding_may_be_infinite(tmp_path: Path) -> None:
    """What a largest element is looked for in is padded by what is never the largest."""
    model = tower()
    model.graph.node.append(helper.make_node("Pad", ["y", "by", "least"], ["padded"]))
    model.graph.output[0].name = "padded"
    model.graph.output[0].type.tensor_type.ClearField("shape")
    model.graph.initializer.append(numpy_helper.from_array(np.array([0, 0, 0, 1]), "by"))
    least = numpy_helper.from_array(np.array(-np.inf, np.float32), "least")
    model.graph.initializer.append(least)
    OnnxFile().capture(write(model, tmp_path))
    bias = numpy_helper.from_array(np.full((2, 16), -np.inf, np.float32), "bias")
    model.graph.initializer.append(bias)
    model.graph.node[-1].input[:] = ["bias", "by", "least"]  # what is padded is a weight
    with pytest.raises(InputError, match=r"'bias' of .* holds -inf"):
        OnnxFile().capture(write(model, tmp_path))


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-0.5B", "openai-community/gpt2", "a/b_c"])
def test_a_name_of_a_hub_is_told_how_to_get(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"hf download {name} --local-dir {Path(name).name}`"):
        netlathe.capture(name)
    Path(name).parent.mkdir()
    with pytest.raises(InputError, match="no such file") as caught:
        netlathe.capture(name)
    assert "hf download" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["../model", "/model", "~/model", "a/b/c", "model", "org/model.onnx", "a b/c"]
)
def test_a_path_is_no_name_of_a_hub(name: str) -> None:
    with pytest.raises(InputError, match="no such file") as caught:
        netlathe.capture(name)
    assert "hf download" not in str(caught.value)


def windowed(kernel: int) -> onnx.ModelProto:
    """A window of ``kernel`` steps over x [batch, 1, length]: shorter ones fail."""
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"])],
        "windowed",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 1, "length"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4, None])],
        [numpy_helper.from_array(rng().standard_normal((4, 1, kernel)).astype(np.float32), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_sizes_are_doubled_until_the_model_runs(tmp_path: Path) -> None:
    captured = OnnxFile().capture(write(windowed(400), tmp_path))
    assert captured.dynamic == {"batch": 4, "length": 512}
    (entry,) = [e for e in captured.entries if e.candidate == "sizes"]
    assert "length=512" in entry.reason
    assert len(captured.entries[-2].detail["relative_error"]) == 2


def test_a_model_that_runs_at_no_size_is_refused(tmp_path: Path) -> None:
    model = windowed(3)
    model.graph.node.insert(0, helper.make_node("Reshape", ["x", "shape"], ["r"]))
    model.graph.node[1].input[0] = "r"
    model.graph.initializer.append(numpy_helper.from_array(np.array([7, 1, 11]), "shape"))
    with pytest.raises(CaptureError, match=r"(?s)itself fails at batch=2, length=16.*larger"):
        OnnxFile().capture(write(model, tmp_path))


def baked(kernel: int, *, hidden: bool = False) -> onnx.ModelProto:
    """Padding that the batch of the export is held in, though the input is declared [N, 1, length].

    Where it is ``hidden``, the size of the padding is a computed number, which shape rules do not follow.
    """
    model = windowed(kernel)
    model.graph.node.insert(0, helper.make_node("Concat", ["x", "padding"], ["p"], axis=2))
    model.graph.node[1].input[0] = "p"  # the convolution
    held: dict[str, Any] = {"padding": np.zeros((1, 1, 2), np.float32)}
    if hidden:
        held = {"zero": np.float32(0), "one": np.array([1]), "rest": np.array([1, 2])}
        for node in reversed(
            [
                helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0),
                helper.make_node("Mul", ["most", "zero"], ["nothing"]),
                helper.make_node("Cast", ["nothing"], ["whole"], to=TensorProto.INT64),
                helper.make_node("Add", ["whole", "one"], ["rows"]),
                helper.make_node("Concat", ["rows", "rest"], ["shape"], axis=0),
                helper.make_node("ConstantOfShape", ["shape"], ["padding"]),
            ]
        ):
            model.graph.node.insert(0, node)
    for name, array in held.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    for place in (model.graph.input[0], model.graph.output[0]):
        place.type.tensor_type.shape.dim[0].dim_param = "N"
    return model


@pytest.mark.parametrize("kernel", [3, 100])
def test_a_dim_that_is_held_in_the_graph_is_offered_as_fixed(tmp_path: Path, kernel: int) -> None:
    path = write(baked(kernel), tmp_path)
    for sizes in ({}, {"N": 1}):
        with pytest.raises(VerifyError, match=r"it runs at N=1 alone: --fix-dims N=1 \("):
            OnnxFile(sizes=sizes).capture(path)
    captured = netlathe.capture(path, fixed={"N": 1})
    length = 128 if kernel == 100 else 16
    assert captured.dynamic == {"length": length}
    assert [str(v.shape) for v in captured.model.graph.inputs] == ["[1,1,length]"]
    long = "length" if kernel == 3 else f"length - {kernel - 3}"
    assert [str(v.shape) for v in captured.model.graph.outputs] == [f"[1,4,{long}]"]
    (entry,) = [e for e in captured.entries if e.candidate == "dims"]
    assert entry.reason == "fixed at N=1, as asked for"
    assert entry.detail == {"fixed": {"N": 1}}
    with pytest.raises(OptionError, match="no dynamic dim 'n'"):
        netlathe.capture(path, fixed={"n": 1})


def test_a_dim_that_turns_out_to_be_held_is_offered_as_fixed(tmp_path: Path) -> None:
    path = write(baked(3, hidden=True), tmp_path)
    for sizes, told in (({}, "fails at N=16, length=16"), ({"N": 1}, "fails at N=2, length=25")):
        with pytest.raises(CaptureError, match=rf"(?s){told}.*it runs at N=1 alone") as caught:
            OnnxFile(sizes=sizes).capture(path)
        assert "--fix-dims N=1 (from Python: fixed={'N': 1})" in str(caught.value)
    assert netlathe.capture(path, fixed={"N": 1}).dynamic == {"length": 16}


def simple(
    nodes: list[onnx.NodeProto], inputs: dict[str, list[Any]], weights: dict[str, Any]
) -> onnx.ModelProto:
    """From inputs of any shape to y, of a shape that is not told."""
    graph = helper.make_graph(
        nodes,
        "simple",
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, dims)
            for name, dims in inputs.items()
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_a_dim_of_which_smaller_sizes_run_is_not_offered_as_fixed(tmp_path: Path) -> None:
    """A table of 20 positions: it runs at 1 to 20."""
    nodes = [
        helper.make_node("Shape", ["x"], ["length"], start=1, end=2),
        helper.make_node("Slice", ["table", "zero", "length"], ["positions"]),
        helper.make_node("Add", ["x", "positions"], ["y"]),
    ]
    weights = {"table": rng().standard_normal((20, 4)).astype(np.float32), "zero": np.array([0])}
    path = write(simple(nodes, {"x": ["batch", "T", 4]}, weights), tmp_path)
    with pytest.raises((CaptureError, VerifyError)) as caught:
        OnnxFile().capture(path)
    assert "--fix-dims" not in str(caught.value)


@pytest.mark.parametrize("batch", ["A", "B"])
def test_dims_that_have_to_be_equal_are_not_offered_as_fixed(tmp_path: Path, batch: str) -> None:
    """L = M, whatever they are; the batches are what the graph holds."""
    nodes = [
        helper.make_node("MatMul", ["a", "b"], ["ab"]),
        helper.make_node("Concat", ["ab", "held"], ["y"], axis=2),
    ]
    inputs = {"a": ["A", 4, "L"], "b": [batch, "M", 4]}
    model = simple(nodes, inputs, {"held": np.zeros((1, 4, 2), np.float32)})
    fixed = dict.fromkeys(["A", batch], 1)
    with pytest.raises((CaptureError, VerifyError)) as caught:
        OnnxFile().capture(write(model, tmp_path))
    named = ", ".join(f"{name}=1" for name in fixed)
    assert f"of the sizes tried, it runs at {named} alone: --fix-dims" in str(caught.value)
    captured = netlathe.capture(write(model, tmp_path), fixed=fixed)
    assert captured.dynamic == {"L": 16, "M": 16}


@pytest.mark.parametrize("setting", ["sizes", "fixed"])
@pytest.mark.parametrize("size", [0, -3, "8", 1.5, True, None])
def test_sizes_are_positive_integers(tmp_path: Path, setting: str, size: Any) -> None:
    path = write(windowed(3), tmp_path)
    given: dict[str, Any] = {setting: {"batch": size}}
    with pytest.raises(
        OptionError, match=f"{setting} takes a positive integer for dim 'batch', not"
    ):
        netlathe.capture(path, **given)
    given = {setting: {"batch": np.int64(1)}}
    kept = vars(OnnxFile(**given))[setting]
    assert type(kept["batch"]) is int  # what a cache can tell apart


def test_a_dim_that_is_fixed_has_no_other_size() -> None:
    with pytest.raises(OptionError, match=r"dim 'N' is to be fixed.*\n.*leave it out of --dims"):
        OnnxFile(sizes={"N": 1, "length": 8}, fixed={"N": 1})


def test_rounding_is_told_at_fixed_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []

    def moved(model: ir.Model, *_: object) -> dict[str, float]:
        shapes.append(str(model.graph.inputs[0].shape))
        return {"y": 1.0}

    monkeypatch.setattr(verification, "moved_by_rounding", moved)
    monkeypatch.setattr(compare, "relative_error", lambda *_: 1e-4)
    OnnxFile(fixed={"batch": 1}).capture(write(windowed(3), tmp_path))
    assert set(shapes) == {"[1,1,length]"}


def test_a_capture_is_compared_at_the_sizes_asked_for(tmp_path: Path) -> None:
    path = write(windowed(3), tmp_path)
    captured = netlathe.capture(path, sizes={"batch": 1, "length": 9})
    assert captured.dynamic == {"batch": 1, "length": 9}
    assert next(iter(captured.entries[-1].detail["relative_error"])) == "batch=1, length=9"
    with pytest.raises(OptionError, match="did you mean batch"):
        netlathe.capture(path, sizes={"bach": 1})
    long = write(windowed(100), tmp_path)
    assert netlathe.capture(long, sizes={"batch": 3}).dynamic == {"batch": 3, "length": 128}
    with pytest.raises(CaptureError, match="fails at batch=2, length=9"):
        netlathe.capture(long, sizes={"length": 9})


def test_dims_that_tell_nothing_get_names(tmp_path: Path) -> None:
    """Paddle's exporter writes -1 and "?", and each "?" is another size."""
    model = tower()
    for place in (model.graph.input[0], model.graph.output[0]):
        dims = place.type.tensor_type.shape.dim
        dims.insert(0, onnx.TensorShapeProto.Dimension(dim_value=-1))
        dims[1].dim_param = "?"
    captured = OnnxFile().capture(write(model, tmp_path))
    assert set(captured.dynamic) == {"x_dim0", "x_dim1"}


def test_a_difference_that_rounding_makes_is_none(tmp_path: Path) -> None:
    """A Sigmoid near 0 has the digits of 1: raising the activation behind it moves the last bit."""
    rows = 64
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("HardSigmoid", ["a"], ["h"], alpha=1 / 6, beta=0.5),
        helper.make_node("Mul", ["a", "h"], ["s"]),
        helper.make_node("Sub", ["s", "far"], ["f"]),
        helper.make_node("Sigmoid", ["f"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "no",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", rows])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", rows])],
        [
            numpy_helper.from_array(f32(rows, rows) / 4, "w"),
            numpy_helper.from_array(np.array(18, np.float32), "far"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    captured = OnnxFile().capture(write(model, tmp_path))
    assert "HardSwish" in [node.op_type for node in captured.model.graph]
    compiled = netlathe.compile(captured, "cleanup")
    compiled.save(tmp_path / "out")


def test_what_is_raised_may_have_dims_of_any_name(tmp_path: Path) -> None:
    """tf2onnx writes names with colons; behind a stride they stand in an expression."""
    model = windowed(3)
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "unk__1::0"
    model.graph.node[0].attribute.append(helper.make_attribute("strides", [2]))
    model.graph.node[0].output[0] = "a"
    model.graph.node.append(helper.make_node("HardSigmoid", ["a"], ["h"], alpha=1 / 6, beta=0.5))
    model.graph.node.append(helper.make_node("Mul", ["a", "h"], ["y"]))
    captured = OnnxFile().capture(write(model, tmp_path))
    assert [node.op_type for node in captured.model.graph] == ["Conv", "HardSwish"]
