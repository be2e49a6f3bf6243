"""The ONNX backend: what it writes is checked, runs in plain ONNX Runtime, and is the IR's function."""

from __future__ import annotations

import dataclasses
import errno
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.checker
import onnx_ir as ir
import onnxruntime
import pytest
import torch

import netlathe
from netlathe.backends import onnx_file
from netlathe.backends.onnx_file import DATA_FILE, MODEL_FILE, OnnxArtifact, OnnxBackend
from netlathe.diagnostics import LowerError, OptionError, VerifyError
from netlathe.execute import ort, samples
from netlathe.execute.compare import relative_error
from netlathe.frontends.onnx_file import OnnxFile
from netlathe.ir import edit, normal, provenance, verify, weights
from tests.ir.onnx_text import matrix, model, ops

TARGET = OnnxBackend.targets()[0]
OPSETS = range(17, 26)
# Normal activations in 8 bits: steps of 3/127 of their RMS, of which 0.29 is rounded off (uniform), so
# 0.7 % of the product's RMS; the largest of a thousand outputs is off by 4.5 times that.
ROUNDED_ACTIVATIONS = 0.04


def target(**settings: Any) -> Any:
    return dataclasses.replace(TARGET, settings={**TARGET.settings, **settings})


def compiled(made: ir.Model, **settings: Any) -> OnnxArtifact:
    return OnnxBackend().compile(made, target(**settings))


def settled(made: ir.Model) -> ir.Model:
    normal.normalize(made)
    verify.check(made)
    return made


def block() -> ir.Model:
    """A decoder block: RMSNorm, grouped-query attention, a Swish gate, LayerNorm, Gelu."""
    made = model(
        "float[b,s,16] x",
        "float[b,s,16] y",
        """
        n = RMSNormalization<axis = -1>(x, g)
        q = MatMul(n, wq)  k = MatMul(n, wk)  v = MatMul(n, wv)
        a = Attention<q_num_heads = 4, kv_num_heads = 2, is_causal = 1>(q, k, v)
        o = MatMul(a, wo)
        h = Add(x, o)
        l = LayerNormalization<axis = -1>(h, g, c)
        up = MatMul(l, w1)
        gate = Swish(up)
        e = Gelu(up)
        both = Mul(gate, e)
        down = MatMul(both, w2)
        y = Add(h, down)
        """,
        g=1 + matrix(16, seed=1) / 4,
        c=matrix(16, seed=2) / 4,
        wq=matrix(16, 16, seed=3) / 4,
        wk=matrix(16, 8, seed=4) / 4,
        wv=matrix(16, 8, seed=5) / 4,
        wo=matrix(16, 16, seed=6) / 4,
        w1=matrix(16, 32, seed=7) / 4,
        w2=matrix(32, 16, seed=8) / 6,
    )
    made = settled(made)
    for node in made.graph:
        provenance.mark(node, module=f"layers.0.{node.op_type.lower()}")
    made.metadata_props["netlathe.test"] = "kept"
    made.graph.doc_string = "a block"
    return made


def convolution() -> ir.Model:
    return settled(
        model(
            "float[b,3,8,8] x",
            "float y",
            """
            c = Conv<pads = [1,1,1,1]>(x, w)
            p = MaxPool<kernel_shape = [2,2], strides = [2,2]>(c)
            m = ReduceMean<keepdims = 0>(p, axes)
            y = Softmax(m)
            """,
            w=matrix(4, 3, 3, 3) / 5,
            axes=[2, 3],
        )
    )


def quantized() -> ir.Model:
    """A weight in int8 with a scale a column, as weight-only quantization leaves it."""
    rng = np.random.default_rng(0)
    return settled(
        model(
            "float[b,64] x",
            "float y",
            "w = DequantizeLinear<axis = 1>(wq, scale)  y = MatMul(x, w)",
            wq=rng.integers(-127, 128, (64, 48)).astype(np.int8),
            scale=(rng.random(48, np.float32) + 0.5) / 127,
        )
    )


def branching() -> ir.Model:
    """A weight inside a branch of an If."""
    made = model(
        "float[b,16] x, bool flag",
        "float y",
        """y = If(flag) <
            then_branch = yes () => (float[b,16] t) { t = Neg(x) },
            else_branch = no () => (float[b,16] e) { e = Neg(x) }>""",
    )
    inner = next(iter(made.graph)).attributes["then_branch"].as_graph()
    weight = edit.constant(inner, matrix(16, 16), "wt")
    edit.replace(
        inner[0],
        [product := ir.node("MatMul", [made.graph.inputs[0], weight])],
        {inner[0].outputs[0]: product.outputs[0]},
        created_by="test",
    )
    return settled(made)


def plain(file: Path, feeds: dict[str, Any], *, optimize: bool) -> list[Any]:
    """What ONNX Runtime makes of the file, set up here and not by us."""
    options = onnxruntime.SessionOptions()
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, feeds))


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("make", [block, convolution, quantized, branching])
def test_every_opset_round_trips(make: Any, opset: int, tmp_path: Path) -> None:
    made = make()
    files = compiled(made, opset=opset).save(tmp_path)
    assert files == [tmp_path / MODEL_FILE]
    proto = onnx.load(str(files[0]))
    assert {o.domain: o.version for o in proto.opset_import}[""] == opset
    onnx.checker.check_model(proto, full_check=True)
    feeds = dict(samples.synthesize(made, {"b": 3}, 5))
    (expected,) = ort.run(made, feeds).values()
    # 84 ulp of float32; with optimizations ten times that, and rounded activations.
    loose = ROUNDED_ACTIVATIONS if make is quantized else 1e-4
    for optimize, bound in ((False, 1e-5), (True, loose)):
        (actual,) = plain(files[0], feeds, optimize=optimize)
        assert relative_error(actual, expected) <= bound
    again = OnnxFile().capture(files[0])
    (actual,) = ort.run(again.model, feeds).values()
    assert relative_error(actual, expected) <= 1e-5


def test_the_report_tells_what_was_written(tmp_path: Path) -> None:
    artifact = compiled(block(), opset=20)
    assert artifact.report()["opset"] == 20 and "bytes" not in artifact.report()
    artifact.save(tmp_path)
    report = artifact.report()
    assert report["bytes"] == (tmp_path / MODEL_FILE).stat().st_size
    assert report["ir_version"] == onnx.load(str(tmp_path / MODEL_FILE)).ir_version
    for way in ("off", "on"):
        assert report[f"error_optimizations_{way}"] <= report[f"bound_optimizations_{way}"]
    assert "not_run" not in report


def test_default_settings_are_measured_where_weights_are_quantized(tmp_path: Path) -> None:
    """ONNX Runtime then rounds activations too: told apart from what is wrong with the file."""
    artifact = compiled(quantized())
    artifact.save(tmp_path)
    report = artifact.report()
    assert report["error_optimizations_on"] <= 1e-4
    assert 1e-4 < report["error_default_settings"] < ROUNDED_ACTIVATIONS
    assert 0.9999 < report["cosine_default_settings"] < 1
    feeds = dict(samples.synthesize(quantized(), samples.dynamic_dims(quantized()), 0))
    (actual,) = plain(tmp_path / MODEL_FILE, feeds, optimize=True)
    (expected,) = ort.run(quantized(), feeds).values()
    assert report["error_default_settings"] == relative_error(actual, expected)


def test_names_and_provenance_are_kept(tmp_path: Path) -> None:
    made = block()
    compiled(made, opset=23).save(tmp_path)
    read = ir.load(tmp_path / MODEL_FILE)
    assert read.metadata_props["netlathe.test"] == "kept"
    assert (read.graph.doc_string, read.producer_name) == ("a block", "netlathe")
    assert [v.name for v in read.graph.inputs] == ["x"]
    assert [v.name for v in read.graph.outputs] == ["y"]
    assert set(read.graph.initializers) >= {"wq", "wk", "wv", "wo", "w1", "w2"}
    paths = {provenance.module_path(node) for node in read.graph}
    assert {"layers.0.attention", "layers.0.rmsnormalization", "layers.0.swish"} <= paths
    assert all(paths)  # nodes that the lowering wrote have one too
    assert str(read.graph.outputs[0].shape) == str(made.graph.outputs[0].shape)


def test_the_compiled_model_is_left_as_it_was() -> None:
    made = block()
    before = ir.to_proto(made).SerializeToString(deterministic=True)
    compiled(made, opset=17)
    assert ir.to_proto(made).SerializeToString(deterministic=True) == before


def test_run_equals_the_ir_and_takes_the_same_feeds() -> None:
    made = block()
    artifact = compiled(made, opset=18)
    feeds = samples.synthesize(made, {"b": 1, "s": 4}, 0)
    assert relative_error(artifact.run(feeds)["y"], ort.run(made, feeds)["y"]) <= 1e-4


@pytest.mark.parametrize("external_over", [0, onnx_file.EXTERNAL_OVER])
def test_the_same_model_gives_the_same_bytes(external_over: int, tmp_path: Path) -> None:
    contents = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        artifact = compiled(block(), opset=19, external_over=external_over)
        artifact.stamp("0" * 64)
        files = artifact.save(tmp_path / name)
        contents.append([file.read_bytes() for file in files])
    assert contents[0] == contents[1]
    assert ir.load(tmp_path / "a" / MODEL_FILE).metadata_props[onnx_file.MANIFEST_KEY] == "0" * 64


# -- weights beside the model ---------------------------------------------------------------------


def test_large_weights_go_beside_the_model(tmp_path: Path) -> None:
    made = settled(
        model(
            "float[b,64] x",
            "float y",
            "a = MatMul(x, w)  h = Add(a, small)  y = MatMul(h, narrow)",
            w=matrix(64, 64) / 8,
            small=matrix(64),
            narrow=matrix(64, 64, seed=1) / 8,
        )
    )
    num_bytes = weights.num_bytes(made)
    inline = compiled(made, external_over=num_bytes)
    inside = tmp_path / "inside"
    inside.mkdir()
    assert len(inline.save(inside)) == 1  # not over the threshold
    files = compiled(made, external_over=num_bytes - 1).save(tmp_path)
    assert [file.name for file in files] == [MODEL_FILE, DATA_FILE]
    proto = onnx.load(str(files[0]), load_external_data=False)
    placed = {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in proto.graph.initializer
    }
    assert placed.keys() == {"w", "small", "narrow"} and not placed["small"]
    for name in ("w", "narrow"):
        assert placed[name]["location"] == DATA_FILE  # beside the model wherever that goes
        assert int(placed[name]["offset"]) % 4096 == 0  # so that readers can map it
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in files:
        file.rename(moved / file.name)
    feeds = dict(samples.synthesize(made, {}, 0))
    (expected,) = ort.run(made, feeds).values()
    (actual,) = plain(moved / MODEL_FILE, feeds, optimize=False)
    assert relative_error(actual, expected) <= 1e-5


@pytest.mark.parametrize("opset", [17, 25])
def test_weights_of_branches_go_beside_the_model(opset: int, tmp_path: Path) -> None:
    made = branching()
    files = compiled(made, opset=opset, external_over=0).save(tmp_path)
    assert len(files) == 2
    for flag in (True, False):
        feeds = {"x": matrix(2, 16, seed=1), "flag": np.asarray(flag)}
        (expected,) = ort.run(made, feeds).values()
        (actual,) = plain(files[0], feeds, optimize=False)
        assert relative_error(actual, expected) <= 1e-5


def test_packed_elements_go_beside_the_model(tmp_path: Path) -> None:
    """Two int4 to a byte, scales of blocks of 16 rows, an odd number of columns."""
    rng = np.random.default_rng(0)
    numbers = rng.integers(-8, 8, (128, 33)).astype(ml_dtypes.int4)
    made = model(
        "float[b,128] x",
        "float y",
        "w = DequantizeLinear<axis = 0, block_size = 16>(wq, scale)  y = MatMul(x, w)",
        scale=(rng.random((8, 33), np.float32) + 0.5) / 8,
        wq=np.zeros((128, 33), np.int8),
    )
    value = made.graph.initializers["wq"]
    value.const_value = ir.tensor(numbers, name="wq")
    value.type = ir.TensorType(ir.DataType.INT4)
    settled(made)
    files = compiled(made, external_over=0).save(tmp_path)
    assert len(files) == 2
    np.testing.assert_array_equal(
        weights.array(ir.load(files[0]).graph.initializers["wq"]), numbers
    )
    feeds = dict(samples.synthesize(made, {}, 0))
    (expected,) = ort.run(made, feeds).values()
    (actual,) = plain(files[0], feeds, optimize=False)
    assert relative_error(actual, expected) <= 1e-5


_SAVE_LAZY_WEIGHTS = """
import resource, sys
import numpy as np, onnx_ir as ir
from netlathe.backends import onnx_file
from netlathe.ir import edit, weights
from tests.ir.onnx_text import model

made = model("float[b,1024] x", "float y", "y = Identity(x)")
base = ir.tensor(np.zeros((1024, 1024), np.int8))
for _ in range(48):
    edit.constant(
        made.graph,
        weights.derived(base, lambda a: a + np.float32(1), ir.DataType.FLOAT, (1024, 1024), "w"),
        "w",
    )
with open(sys.argv[1], "wb") as file:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    onnx_file._externalize(made, file)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is KiB on Linux")
def test_a_weight_is_in_memory_only_while_it_is_written(tmp_path: Path) -> None:
    """48 recipes of 4 MiB each are written with a few of them in memory, not 192 MiB."""
    done = subprocess.run(
        [sys.executable, "-c", _SAVE_LAZY_WEIGHTS, str(tmp_path / "data")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (tmp_path / "data").stat().st_size == 48 << 22
    assert int(done.stdout) < 32 << 10


# -- what ONNX Runtime cannot run -----------------------------------------------------------------


def narrow(opset: int = 25) -> ir.Model:
    """bfloat16 arithmetic, which ONNX Runtime has few CPU kernels for."""
    made = model("bfloat16[b,16] x", "bfloat16 y", "a = MatMul(x, w)  h = Swish(a)  y = Add(h, x)")
    value = ir.Value(
        name="w",
        type=ir.TensorType(ir.DataType.BFLOAT16),
        shape=ir.Shape([16, 16]),
        const_value=ir.tensor((matrix(16, 16) / 4).astype(ml_dtypes.bfloat16), name="w"),
    )
    made.graph[0].replace_input_with(1, value)
    made.graph.initializers["w"] = value
    return settled(made)


@pytest.mark.parametrize("opset", [17, 21, 25])
def test_bfloat16_is_read_back_and_compared(opset: int, tmp_path: Path) -> None:
    artifact = compiled(narrow(), opset=opset)
    (file,) = artifact.save(tmp_path)
    assert "NOT_IMPLEMENTED" in artifact.report()["not_run"]
    assert artifact.report()["error_read_back"] <= artifact.report()["bound_read_back"]
    read = ir.load(file)
    assert read.graph.initializers["w"].dtype == ir.DataType.BFLOAT16
    assert read.graph.outputs[0].dtype == ir.DataType.BFLOAT16


def test_swish_is_written_so_that_it_runs(tmp_path: Path) -> None:
    """ONNX Runtime 1.32 has no kernel for Swish at opset 25: this test says when it gets one."""
    text = (
        '<ir_version: 10, opset_import: ["": 25]> g (float[4] x) => (float[4] y) { y = Swish(x) }'
    )
    with pytest.raises(Exception, match="NOT_IMPLEMENTED"):
        onnxruntime.InferenceSession(onnx.parser.parse_model(text).SerializeToString())
    compiled(block(), opset=25).save(tmp_path)
    assert "Swish" not in ops(ir.load(tmp_path / MODEL_FILE))
    assert ops(OnnxFile().capture(tmp_path / MODEL_FILE).model)["Swish"] == 1  # raised again


def test_all_positions_that_are_picked_one_by_one_are_slices(tmp_path: Path) -> None:
    """Slices stand for them, and the values are the same; what for: see the next test."""
    pick = "p{i} = Gather<axis = 1>({x}, one) q{i} = Gather<axis = 1>({x}, zero) d{i} = Sub(p{i}, q{i})"
    first = pick.format(x="h", i=1)
    again = "w = Concat<axis = 1>(d1, d1) v = Reshape(w, shape)"
    made = settled(
        model(
            "float[b,2,4] x",
            "float y",
            f"h = Relu(x) {first} {again} {pick.format(x='v', i=2)} y = Neg(d2)",
            one=np.array(1),
            zero=np.array(0),
            shape=np.array([-1, 2, 4]),
        )
    )
    for opset in (17, 24):
        folder = tmp_path / str(opset)
        folder.mkdir()
        compiled(made, opset=opset).save(folder)
        assert "Gather" not in ops(ir.load(folder / MODEL_FILE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention_that_picks_q_k_and_v_of_one_projection_runs(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    """Without Slice in place of Gather, ONNX Runtime adds one constant twice in the second layer."""

    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (
                torch.nn.MultiheadAttention(16, 2, batch_first=True, dtype=dtype) for _ in range(2)
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in (self.first, self.second):
                x = x + layer(x, x, x, need_weights=False)[0]
            return x

    sizes = {"x": {0: "batch", 1: "sequence"}}
    taken = netlathe.capture(Two().eval(), args=(torch.ones(2, 5, 16, dtype=dtype),), dynamic=sizes)
    netlathe.compile(taken, "cleanup").save(tmp_path / "out")


def test_an_average_of_codes_runs(tmp_path: Path) -> None:
    """ONNX Runtime makes QLinearAveragePool of it, with attributes that this has not."""
    made = settled(
        model(
            "float[b,2,4,4] x",
            "float y",
            "q = QuantizeLinear(x, s, zero) d = DequantizeLinear(q, s, zero)"
            " a = AveragePool<kernel_shape = [2, 2]>(d)"
            " p = QuantizeLinear(a, s, zero) y = DequantizeLinear(p, s, zero)",
            s=np.array(0.1, np.float32),
            zero=np.array(3, np.int8),
        )
    )
    compiled(made).save(tmp_path)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
@pytest.mark.parametrize("opset", [19, 24])
def test_an_average_of_codes_that_lie_apart_runs(dtype: Any, opset: int, tmp_path: Path) -> None:
    made = settled(
        model(
            "float[b,2,8,8] x",
            "float y",
            "q = QuantizeLinear(x, s, zero) d = DequantizeLinear(q, s, zero)"
            " a = AveragePool<kernel_shape = [2, 2], dilations = [2, 3]>(d)"
            " p = QuantizeLinear(a, s, zero) y = DequantizeLinear(p, s, zero)",
            s=np.array(0.1, np.float32),
            zero=np.array(3, dtype),
        )
    )
    compiled(made, opset=opset).save(tmp_path)  # runs it with optimizations off and on


@pytest.mark.parametrize(
    "moves",
    [
        "m = Reshape(d, shape) n = Transpose(m)",
        "m = Unsqueeze(d, axes) n = Squeeze(m, axes)",
        "m = Slice(d, one, four, axes) n = Reshape(m, shape)",
        "m = Transpose(d) k = Unsqueeze(m, axes) n = Slice(k, one, four, axes)",
    ],
)
def test_codes_that_are_moved_by_several_steps_stay_codes(moves: str, tmp_path: Path) -> None:
    made = settled(
        model(
            "float[b,8] x",
            "float y",
            f"q = QuantizeLinear(x, s, zero) d = DequantizeLinear(q, s, zero) {moves}"
            " p = QuantizeLinear(n, s, zero) e = DequantizeLinear(p, s, zero) y = Neg(e)",
            s=np.array(0.1, np.float32),
            zero=np.array(3, np.int8),
            shape=np.array([-1, 1]),
            one=np.array([0]),
            four=np.array([4]),
            axes=np.array([1]),
        )
    )
    compiled(made).save(tmp_path)  # runs it with optimizations off and on
    written = onnx.load(tmp_path / MODEL_FILE)
    assert "Mul" not in [node.op_type for node in written.graph.node]


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [20, 21, 24, 25])
@pytest.mark.parametrize(
    "move", ["Reshape(d, shape)", "Slice(d, one, four, axes)", "Transpose(d)", "Unsqueeze(d, axes)"]
)
def test_floats_that_are_moved_behind_codes_run(move: str, opset: int, tmp_path: Path) -> None:
    """ONNX Runtime's optimizer breaks its own graph where a DequantizeLinear of int8 is moved."""
    made = settled(
        model(
            "float[b,8] x",
            "float y, float z",
            f"q = QuantizeLinear(x, s, zero) d = DequantizeLinear(q, s, zero) m = {move}"
            " y = Neg(m) z = Abs(d)",
            s=np.array(0.1, np.float32),
            zero=np.array(3, np.int8),
            shape=np.array([-1, 2]),
            one=np.array([1]),
            four=np.array([4]),
            axes=np.array([1]),
        )
    )
    compiled(made, opset=opset).save(tmp_path)  # runs it with optimizations off and on
    written = onnx.load(tmp_path / MODEL_FILE)
    (kept,) = [node for node in written.graph.node if node.op_type == "DequantizeLinear"]
    readers = [node.op_type for node in written.graph.node if kept.output[0] in node.input]
    assert readers == (["Abs"] if opset > 20 else [move.partition("(")[0], "Abs"])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"opset": 16}, "choose an opset from 17 to 25"),
        ({"opset": 26}, "opset 26 is out of range"),
        ({"opset": "20"}, "must be an integer"),
        ({"opset": True}, "must be an integer"),
        ({"external_over": -1}, "from 0 to"),
        ({"external_over": 1 << 31}, "from 0 to"),
        ({"opsett": 20}, "no setting opsett"),
    ],
)
def test_a_wrong_setting_is_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        compiled(convolution(), **settings)
    with pytest.raises(OptionError):
        OnnxBackend().unsupported(convolution(), target(**settings))


def test_all_gaps_are_told_before_any_work() -> None:
    made = model(
        "float[4] x",
        "float8e4m3fn y, float8e5m2 z",
        "y = Cast<to = 17>(x)  z = Cast<to = 19>(x)",
    )
    settled(made)
    found = OnnxBackend().unsupported(made, target(opset=18))
    assert [d.code for d in found] == ["onnx.opset", "onnx.opset"]
    assert "y = Cast" in found[0].at and "choose opset 19 or newer" in found[0].help
    assert not OnnxBackend().unsupported(made, target(opset=19))
    with pytest.raises(LowerError) as error:
        compiled(made, opset=18)
    assert len(error.value.diagnostics) == 2


def test_a_wrong_lowering_is_caught(tmp_path: Path) -> None:
    """Planted: one weight of the lowered model is not the IR's."""
    artifact = compiled(block(), opset=17)
    value = artifact.model.graph.initializers["wo"]
    value.const_value = ir.tensor(weights.array(value) * np.float32(1.01), name="wo")
    with pytest.raises(VerifyError, match=r"'y' of the written file differs.*optimizations off"):
        artifact.save(tmp_path)


@pytest.mark.parametrize(("factor", "passes"), [(1 + 2**-22, True), (1.01, False)])
def test_an_ill_conditioned_model_is_no_false_alarm(
    factor: float, passes: bool, tmp_path: Path
) -> None:
    """(1000 p + p) - 1000 p moves by 1e-4 if p is off by an ulp or two, as a lowering may have it."""
    made = settled(
        model(
            "float[b,16] x",
            "float y",
            "p = MatMul(x, w)  big = Mul(p, t)  sum = Add(big, p)  y = Sub(sum, big)",
            w=matrix(16, 16) / 4,
            t=np.float32(1000),
        )
    )
    artifact = compiled(made)
    value = artifact.model.graph.initializers["w"]
    value.const_value = ir.tensor(weights.array(value) * np.float32(factor), name="w")
    if not passes:
        with pytest.raises(VerifyError):
            artifact.save(tmp_path)
        return
    artifact.save(tmp_path)
    report = artifact.report()
    assert 1e-5 < report["error_optimizations_off"] <= report["bound_optimizations_off"] < 0.01


def test_roundings_that_onnx_runtime_leaves_out_are_no_false_alarm(tmp_path: Path) -> None:
    """(64 p + p) - 64 p in float16: the IR rounds after every operator, ONNX Runtime at the end."""
    text = "p = MatMul(x, w)  big = Mul(p, t)  sum = Add(big, p)  y = Sub(sum, big)"
    half = {"w": (matrix(16, 16) / 4).astype(np.float16), "t": np.array(64, np.float16)}
    artifact = compiled(settled(model("float16[b,16] x", "float16[b,16] y", text, **half)))
    artifact.save(tmp_path)
    report = artifact.report()
    assert 2**-6 < report["error_optimizations_off"] <= report["bound_optimizations_off"] < 1


def test_a_layer_that_is_missing_is_no_rounding_in_float16() -> None:
    """However far roundings of every value move the output, what is allowed for them is less than a layer."""
    text, half, layers = "", {"g": np.ones(32, np.float16)}, 24
    for i in range(layers):
        text += f"n{i} = RMSNormalization<axis = -1>(x{i}, g)  h{i} = MatMul(n{i}, a{i})  "
        text += f"r{i} = Relu(h{i})  m{i} = MatMul(r{i}, b{i})  x{i + 1} = Add(x{i}, m{i})  "
        for number, name in enumerate("ab"):
            half[f"{name}{i}"] = (matrix(32, 32, seed=2 * i + number) / 5).astype(np.float16)
    whole = settled(model("float16[b,32] x0", f"float16[b,32] x{layers}", text, **half))
    half[f"b{layers - 1}"] *= np.float16(0)
    without = settled(model("float16[b,32] x0", f"float16[b,32] x{layers}", text, **half))
    feeds = {"x0": matrix(4, 32, seed=99).astype(np.float16)}
    expected = ort.run(whole, feeds)
    for wrong in (ort.run(without, feeds), {name: 0 * y for name, y in expected.items()}):
        found = onnx_file.compare(whole, wrong, expected, feeds, optimize=True)
        assert found.error > found.bound


def test_a_file_that_the_checker_refuses_is_caught(tmp_path: Path) -> None:
    """Planted: an output that claims another width."""
    artifact = compiled(block())
    artifact.model.graph.outputs[0].shape = ir.Shape(["b", "s", 17])
    with pytest.raises(LowerError) as error:
        artifact.save(tmp_path)
    assert error.value.diagnostics[0].code == "onnx.checker"


def test_too_small_a_disk_is_found_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = compiled(block())
    free = weights.num_bytes(artifact.model) - 1
    usage = namedtuple("usage", "total used free")(free, 0, free)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(OSError) as error:
        artifact.save(tmp_path)
    assert error.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())
