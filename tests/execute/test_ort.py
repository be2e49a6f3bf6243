"""ONNX Runtime as judge: cut into ranges, at dtypes it cannot hand over, with errors that name the node."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto

from netlathe.diagnostics import InputError
from netlathe.execute import ort
from netlathe.ir import normal, weights
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


@pytest.mark.parametrize("max_bytes", [ort.SEGMENT_BYTES, 2 * 32 * 32 * 4])
def test_several_samples_read_each_weight_once(
    max_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    real = ort.Session._session
    monkeypatch.setattr(ort.Session, "_session", lambda *args: made.append(1) or real(*args))
    model = chain()
    samples = [{"x": text.normal(rows, 32, seed=rows)} for rows in (3, 5)]
    session = ort.Session(model, ["y", "h1"], max_bytes=max_bytes)
    results = session.run_each(samples)
    assert len(made) == len(session._segments) == (1 if max_bytes == ort.SEGMENT_BYTES else 3)
    for feeds, found in zip(samples, results, strict=True):
        alone = ort.run(model, feeds, ["y", "h1"])
        assert all(np.array_equal(found[name], alone[name]) for name in alone)


def test_no_more_weights_than_allowed_are_in_a_session(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = ort.Session._proto

    def proto(self: ort.Session, segment: ort._Segment, held: dict[str, onnxruntime.OrtValue]):  # type: ignore[no-untyped-def]  # what the real one returns
        made = real(self, segment, held)
        inline = sum(len(t.raw_data) for t in made[0].graph.initializer)
        sizes.append(inline + sum(v.numpy().nbytes for v in made[1].values()))
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


def mapped_chain(folder: Path, links: int, width: int) -> ir.Model:
    """Products with weights that are mapped from a file."""
    size = width * width * 4
    array = np.random.default_rng(0).standard_normal((links, width, width)).astype(np.float32)
    (folder / "weights").write_bytes((array / np.float32(width**0.5)).tobytes())
    model = chain(links, width)
    for i in range(links):
        model.graph.initializers[f"w{i}"].const_value = ir.ExternalTensor(
            *("weights", i * size, size, ir.DataType.FLOAT),
            shape=ir.Shape([width, width]),
            name=f"w{i}",
            base_dir=folder,
        )
    return model


def resident() -> tuple[int, int]:
    """Bytes of this process' own memory, and of mapped files, that are in RAM."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return tuple(int(fields[key].split()[0]) * 1024 for key in ("RssAnon", "RssFile"))  # type: ignore[return-value]  # two keys


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux' counters")
def test_mapped_weights_are_read_where_they_lie_and_given_back(tmp_path: Path) -> None:
    model = mapped_chain(tmp_path, links=4, width=2048)
    feeds = {"x": text.normal(2, 2048)}
    weights = 4 * 2048 * 2048 * 4  # 64 MiB
    ort.run(chain(), {"x": text.normal(3, 32)})  # what ONNX Runtime itself needs
    own, mapped = resident()
    session = ort.Session(model)
    first = session.run(feeds)["y"]
    held_own, held_mapped = resident()
    assert held_own - own < weights / 4, "the session holds a copy of the weights"
    assert held_mapped - mapped > weights / 2
    del session
    again = ort.run(model, feeds)["y"]
    assert resident()[1] - mapped < weights / 4, "the pages that were read are still held"
    assert np.array_equal(first, again)


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


@pytest.mark.parametrize(
    ("name", "dtype"), [("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16)]
)
def test_half_precision_is_float32_arithmetic_rounded_after_every_node(
    name: str, dtype: type[np.generic]
) -> None:
    model = text.model(
        f"g ({name}[64] a, {name}[64] b) => ({name}[64] y)"
        " { p = Mul(a, b) q = Add(p, a) y = Sqrt(q) }"
    )
    normal.normalize(model)  # types are known then
    a, b = (np.abs(text.normal(64, seed=i)).astype(dtype) for i in range(2))
    product = (a.astype(np.float32) * b.astype(np.float32)).astype(dtype)
    total = (product.astype(np.float32) + a.astype(np.float32)).astype(dtype)
    got = ort.run(model, {"a": a, "b": b})["y"]
    assert got.dtype == dtype
    assert got.tobytes() == np.sqrt(total.astype(np.float32)).astype(dtype).tobytes()


def test_optimizations_see_big_weights_as_constants(tmp_path: Path) -> None:
    """They fold and fuse constants only; the results agree."""
    model, feeds = mapped_chain(tmp_path, links=2, width=64), {"x": text.normal(3, 64)}
    proto, given = ort.Session(model, optimize=True)._proto(*segment_of(model))
    assert {t.name for t in proto.graph.initializer} == set(given) == {"w0", "w1"}
    proto, given = ort.Session(model)._proto(*segment_of(model))
    assert not proto.graph.initializer and set(given) == {"w0", "w1"}
    plain, optimized = ort.run(model, feeds)["y"], ort.run(model, feeds, optimize=True)["y"]
    # at most 64 products a sum, each rounding 2^-24 of values around 1
    np.testing.assert_allclose(optimized, plain, atol=2**-16)


def test_optimized_sessions_keep_the_weights_that_were_computed_for_them() -> None:
    """They read constants where they lie, and a recipe's array has no other owner."""
    size = 1 << 20
    model = text.model(f"g (float[{size}] x) => (float[{size}] y) {{ y = Mul(x, w) }}")
    base = ir.tensor(np.arange(size, dtype=np.float32), name="w")
    tensor = weights.derived(base, lambda array: array + 1, base.dtype, [size], "w")
    w = ir.Value(name="w", type=ir.TensorType(base.dtype), const_value=tensor)
    w.shape = ir.Shape([size])
    model.graph.register_initializer(w)
    model.graph[0].replace_input_with(1, w)
    session = ort.Session(model, optimize=True)
    ones = np.ones(size, np.float32)
    first = session.run({"x": ones})["y"]
    litter = [np.full(size, np.nan, np.float32) for _ in range(8)]  # where freed memory was
    assert len(litter) == 8
    for result in (first, session.run({"x": ones})["y"]):
        assert np.array_equal(result, np.arange(size) + 1)


def segment_of(model: ir.Model) -> tuple[ort._Segment, dict[str, onnxruntime.OrtValue]]:
    return ort.Session(model)._segments[0], {}


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
    align = (
        "RoiAlign<output_height = 2, output_width = 2, sampling_ratio = 2, mode = "
        '"avg", coordinate_transformation_mode = "half_pixel">(a, rois, which)'
    )
    edges = "(float[1, 2, 8, 8] x) => (float[2, 2, 2, 2] y)"
    model = text.model(
        f"g {edges} {{ a = Relu(x) r = {align} y = Swish(r) }}", {"rois": rois, "which": which}
    )
    model.opset_imports[""] = 25
    x = text.normal(1, 2, 8, 8)
    got = ort.run(model, {"x": x}, ["r", "y"])
    judge = text.model(f"g {edges} {{ a = Relu(x) y = {align} }}", {"rois": rois, "which": which})
    judge.opset_imports[""] = 16
    session = onnxruntime.InferenceSession(ir.to_proto(judge).SerializeToString())
    (expected,) = session.run(None, {"x": x})
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
        assert session._kept.session.get_session_options().graph_optimization_level == level


def test_mapped_weights_of_a_subgraph_run(tmp_path: Path) -> None:
    """A session knows no folder, and a captured model of the cache names its file by the whole path."""
    branch = "{ z = MatMul(x, w) }"
    model = text.model(
        "g (float[b, 8] x, bool c) => (float[b, 8] y) {"
        f" y = If(c) <then_branch = inner () => (float[b, 8] z) {branch},"
        " else_branch = other () => (float[b, 8] u) { u = Relu(x) }> }"
    )
    choice = next(node for node in model.graph if node.op_type == "If")
    inner = choice.attributes["then_branch"].as_graph()
    array = text.normal(8, 8, seed=1)
    file = tmp_path / "weights"
    file.write_bytes(array.tobytes())
    weight = ir.Value(name="w", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([8, 8]))
    weight.const_value = ir.ExternalTensor(
        str(file), 0, array.nbytes, ir.DataType.FLOAT, shape=ir.Shape([8, 8]), name="w"
    )
    inner.initializers["w"] = weight
    product = inner[0]
    product.replace_input_with(1, weight)
    feeds = {"x": text.normal(3, 8, seed=2), "c": np.array(True)}
    np.testing.assert_allclose(ort.run(model, feeds)["y"], feeds["x"] @ array, atol=1e-5)
