"""The convolution kernel at sizes that fit no tile: narrow planes, strides, ragged channels, groups."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from netlathe.execute import ort
from netlathe.execute.compare import relative_error
from netlathe.ir import normal

pytest.importorskip("tvm", reason="the tvm extra is not installed")

from tests.backends.tvm.in_process import InProcess
from tests.ir.onnx_text import normal_model

BOUND = 1e-5  # share of the RMS: float32 sums of at most 300 products in another order

# rows, columns, channels in and out, kernel, stride, padding, groups, dilation
SIZES = [
    (7, 7, 20, 30, 3, 1, 1, 1, 1),
    (14, 14, 9, 40, 3, 2, 1, 1, 1),
    (7, 7, 33, 50, 1, 1, 0, 1, 1),
    (13, 9, 6, 6, 3, 1, 1, 6, 1),
    (14, 14, 6, 6, 3, 2, 1, 6, 1),
    (15, 17, 8, 16, 1, 2, 0, 1, 1),
    (31, 29, 3, 17, 7, 2, 3, 1, 1),
    (12, 12, 4, 8, 3, 1, 2, 2, 2),
    (3, 3, 2, 3, 3, 1, 0, 1, 1),  # one output
]


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_agrees_with_onnx_runtime(sizes: tuple[int, ...], dynamic: bool) -> None:
    h, w, inputs, outputs, k, s, p, g, d = sizes
    plane = "h, w" if dynamic else f"{h}, {w}"
    made = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 25]>
        one (float[n, {inputs}, {plane}] x, float[{outputs}, {inputs // g}, {k}, {k}] w, float[{outputs}] b)
            => (float[n, {outputs}, rows, columns] y) {{
            c = Conv<kernel_shape=[{k}, {k}], strides=[{s}, {s}], pads=[{p}, {p}, {p}, {p}],
                     group={g}, dilations=[{d}, {d}]>(x, w, b)
            y = Relu(c)
        }}"""
    )
    rng = np.random.default_rng(0)
    for name, shape in (("w", (outputs, inputs // g, k, k)), ("b", (outputs,))):
        value = next(v for v in made.graph.inputs if v.name == name)
        made.graph.inputs.remove(value)
        value.const_value = ir.tensor(rng.normal(size=shape).astype(np.float32), name=name)
        made.graph.register_initializer(value)
    normal.normalize(made)
    x = rng.normal(size=(2, inputs, h, w)).astype(np.float32)
    expected = ort.run(made, {"x": x})["y"]
    assert relative_error(InProcess(made).run({"x": x})["y"], expected) < BOUND


# channels in and out, window and stride, padding before and behind, groups
COLUMNS = [(9, 40, 5, 1, (0, 0), 1), (8, 16, 3, 2, (1, 2), 2), (6, 6, 3, 1, (1, 1), 6)]


@pytest.mark.parametrize("weight", ["constant", "given"])
@pytest.mark.parametrize("sizes", COLUMNS, ids=str)
def test_windows_over_a_plane_of_one_column_are_laid_along_a_row(
    sizes: tuple[int, int, int, int, tuple[int, int], int], weight: str
) -> None:
    """A convolution over time as TensorFlow writes it; a tile of its columns would hold a single one."""
    inputs, outputs, k, s, (before, behind), g = sizes
    rng = np.random.default_rng(0)
    feeds = {
        "x": rng.normal(size=(2, inputs, 21)).astype(np.float32),
        "w": rng.normal(size=(outputs, inputs // g, k)).astype(np.float32),
    }
    made = {}
    for name, one, pads in (
        ("column", ", 1", f"{before}, 0, {behind}, 0"),
        ("line", "", f"{before}, {behind}"),
    ):
        shaped = {n: a[..., None] if one else a for n, a in feeds.items()}
        ones = "1" if one else ""
        held = {"w": shaped.pop("w")} if weight == "constant" else {}
        model = normal_model(
            f"""<ir_version: 10, opset_import: ["" : 25]>
            g (float[b, {inputs}, t{one}] x, float[{outputs}, {inputs // g}, {k}{one}] w)
                => (float[b, {outputs}, u{one}] y) {{
                c = Conv <group={g}, strides=[{s}{"," if ones else ""}{ones}], pads=[{pads}]> (x, w)
                y = Tanh (c)
            }}""",
            **held,
        )
        made[name] = InProcess(model).run(shaped)["y"]
        assert relative_error(made[name], ort.run(model, shaped)["y"]) < BOUND
    np.testing.assert_array_equal(made["column"][..., 0], made["line"])


def test_channels_that_are_moved_twice() -> None:
    """[b, c, h, w] as [b, w, c, h], where it is made with channels last."""
    rng = np.random.default_rng(0)
    made = normal_model(
        """<ir_version: 10, opset_import: ["" : 25]>
        g (float[2, 8, 5, 7] x, float[16, 8, 1, 1] w) => (float[2, 7, 16, 5] y) {
            c = Conv (x, w) y = Transpose <perm = [0, 3, 1, 2]> (c)
        }""",
        w=rng.normal(size=(16, 8, 1, 1)).astype(np.float32),
    )
    x = rng.normal(size=(2, 8, 5, 7)).astype(np.float32)
    assert relative_error(InProcess(made).run({"x": x})["y"], ort.run(made, {"x": x})["y"]) < BOUND
