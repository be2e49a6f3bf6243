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

from netlathe.diagnostics import InputError
from netlathe.execute import ort
from netlathe.frontends.onnx_file import OnnxFile
from netlathe.frontends.onnx_opset import _ADAPTERS, NEWEST, OLDEST, raise_opset


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
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in names],
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
        (set_opset(12), "onnx.opset"),
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
        with pytest.raises(InputError, match="'bound' of .* holds inf"):
            OnnxFile().capture(path)
        return
    model.graph.node[1].input[:] = ["a", "floor", "bound"]
    model.graph.initializer.append(numpy_helper.from_array(np.array(0, np.float32), "floor"))
    captured = OnnxFile().capture(write(model, tmp_path))
    feeds = dict(captured.sample({"batch": 3}, 0))
    np.testing.assert_allclose(
        ort.run(captured.model, feeds)["y"], reference(path, feeds)[0], atol=1e-6
    )
