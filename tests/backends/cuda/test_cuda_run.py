"""Kernels run on a GPU: products on ragged shapes against float64, and the ONNX project's node tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from onnx.backend.test.case.test_case import TestCase

pytest.importorskip("tvm", reason="the tvm extra is not installed")

from netlathe.backends.tvm import runtime
from netlathe.backends.tvm.cuda import toolkit
from netlathe.backends.tvm.cuda.machine import ARCHITECTURES, Gpu, gpu
from netlathe.ir import normal
from tests.backends.tvm.test_tvm_nodes import _prepared
from tests.execute.test_node_backend import CASES, _array

Array = npt.NDArray[Any]
HERE = [arch for arch in ARCHITECTURES if not runtime.gpu_lack([arch])]
pytestmark = pytest.mark.skipif(not HERE, reason="no GPU that there are kernels for")
ROWS = (0, 1, 3, 8, 9, 16, 17, 64, 65, 128, 130, 256, 300)
# Rounding the result to nearest, once: half a unit in the last place, over the mean significand.
BOUNDS = {"bfloat16": 2.5e-3, "float16": 3.2e-4}
LAST_PLACE = {"bfloat16": 2.0**-7, "float16": 2.0**-10}  # of the smallest significand
HALVES: dict[str, Any] = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


@dataclass(frozen=True)
class OnMma(Gpu):
    """A GPU that is taken for one without warpgroup products."""

    @property
    def has_wgmma(self) -> bool:
        return False


class OnGpu:
    """A model compiled for the first GPU and held in its memory."""

    def __init__(self, model: ir.Model, machine: Gpu) -> None:
        toolkit.load()
        import tvm
        import tvm_ffi
        from tvm import relax, tirx

        from netlathe.backends.tvm import build as relaxed
        from netlathe.backends.tvm import packing
        from netlathe.backends.tvm.cuda import build
        from netlathe.backends.tvm.lowering import Lowering

        def compiled(source: str) -> bytes:
            return toolkit.compile_fatbin(source, machine.archs)[0]

        tvm_ffi.register_global_func("tvm_callback_cuda_compile", compiled, override=True)
        pipeline = "netlathe-cuda-test"
        tirx.compilation_pipeline.register_tir_pipeline(pipeline, build._tir_pipeline)
        lowered = Lowering(model, machine).run()
        executable = relax.build(
            lowered.module,
            build.target(machine),
            relax_pipeline=relaxed.relax_pipeline(),
            tir_pipeline=pipeline,
        )
        constants = packing.constants(model)
        self._device = tvm.cuda(0)
        self._tensor = tvm.runtime.tensor
        made = [parameter.recipe.make(constants) for parameter in lowered.parameters]
        self._parameters = [self._tensor(array, self._device) for array in made]
        self._outputs = packing.records(model.graph.outputs)
        self._inputs = packing.records(v for v in model.graph.inputs if not v.is_initializer())
        virtual: Any = relax.VirtualMachine  # its annotation names another Device
        self._main = virtual(executable, [self._device, tvm.cpu()])["main"]

    def run(self, feeds: dict[str, Array], behind: int = 0) -> dict[str, Array]:
        """Outputs by name; ``behind`` every input lie so many NaNs."""
        arrays = runtime.check_feeds(self._inputs, feeds)
        given = [self._held(array, behind) for array in arrays]
        results = self._main(*given, *self._parameters)
        return {
            record["name"]: runtime.restored(result.numpy(), record["dtype"])
            for record, result in zip(self._outputs, results, strict=True)
        }

    def _held(self, array: Array, behind: int) -> Any:
        if not behind:
            return self._tensor(np.require(array, requirements="C"), self._device)
        whole = np.append(array, np.full(behind, np.nan, array.dtype))
        return self._tensor(whole, self._device)._create_view(array.shape)


def linear(
    half: str, kind: str, inner: int, columns: int, group: int, rows: int | str = "n"
) -> tuple[ir.Model, Array]:
    """y = x * weight + bias as a model, of any number of rows or so many, and its weight in float64."""
    rng = np.random.default_rng(inner + columns)
    dtype = HALVES[half]
    low, high, stored = {
        "int8": (-128, 128, np.int8),
        "int4": (-8, 8, ml_dtypes.int4),
        "uint4": (0, 16, ml_dtypes.uint4),
        half: (0, 1, dtype),
    }[kind]
    blocks = inner // group if group else 1
    scale = ((rng.random((blocks, columns)) + 0.5) / (8 if "4" in kind else 128)).astype(dtype)
    constants: dict[str, Any] = {"bias": rng.standard_normal(columns).astype(dtype)}
    if kind == half:
        weight = (rng.standard_normal((inner, columns)) / inner**0.5).astype(dtype)
        constants["w"] = weight
        values, node, name = weight.astype(np.float64), "", "w"
    else:
        whole = rng.integers(low, high, (inner, columns))
        zero = rng.integers(low, high, (blocks, columns)) if kind == "uint4" else 0 * whole[:blocks]
        constants["q"], constants["s"] = whole.astype(stored), scale if group else scale[0]
        given = "q, s"
        if kind == "uint4":
            constants["z"] = (zero if group else zero[0]).astype(stored)
            given = "q, s, z"
        repeat = inner // blocks
        factor = np.repeat(scale.astype(np.float64), repeat, 0)
        values = (whole - np.repeat(zero, repeat, 0)) * factor
        how = f"axis = 0, block_size = {group}" if group else "axis = 1"
        node, name = f"d = DequantizeLinear <{how}> ({given})", "d"
    model = ir.from_onnx_text(
        f"""
        <ir_version: 12, opset_import: ["" : 25]>
        g ({half}[{rows}, {inner}] x) => ({half}[{rows}, {columns}] y)
        {{
            {node}
            p = MatMul (x, {name})
            y = Add (p, bias)
        }}
        """
    )
    used = {v.name: v for node in model.graph for v in node.inputs if v is not None}
    for key, array in constants.items():
        value = used[key]
        value.const_value = ir.Tensor(array, dtype=ir.DataType.from_numpy(array.dtype))
        value.dtype, value.shape = value.const_value.dtype, ir.Shape(array.shape)
        model.graph.register_initializer(value)
    normal.normalize(model)
    return model, values


@pytest.mark.parametrize("kernels", [Gpu, OnMma])
@pytest.mark.parametrize("half", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("kind", "inner", "columns", "group"),
    [
        ("half", 520, 391, 0),
        ("half", 4160, 391, 0),
        ("int8", 1088, 391, 0),
        ("int8", 1024, 4100, 128),
        ("int8", 2112, 391, 0),
        ("int8", 4096, 4096, 0),
        # Expanded from 17 rows on, on sm_90a as well: K is no multiple of 64, or groups do not fit stages.
        ("int8", 520, 391, 0),
        ("uint4", 520, 391, 0),
        ("int8", 1152, 391, 192),
        ("int4", 1024, 391, 128),
        ("int4", 1472, 130, 0),
        ("int4", 1472, 9001, 0),
        ("uint4", 1024, 4100, 256),
        ("uint4", 896, 391, 0),
    ],
)
def test_product(
    kernels: type[Gpu], half: str, kind: str, inner: int, columns: int, group: int
) -> None:
    model, weight = linear(half, half if kind == "half" else kind, inner, columns, group)
    machine = gpu([HERE[-1]])
    program = OnGpu(model, kernels(**vars(machine)))
    rng = np.random.default_rng(1)
    bias = next(v for v in model.graph.initializers.values() if v.name == "bias")
    assert bias.const_value is not None
    offset = bias.const_value.numpy().astype(np.float64)
    for rows in ROWS:
        x = rng.standard_normal((rows, inner)).astype(HALVES[half])
        found = program.run({"x": x})["y"].astype(np.float64)
        wanted = x.astype(np.float64) @ weight + offset
        assert found.shape == wanted.shape
        error = np.linalg.norm(found - wanted) / max(1.0, float(np.linalg.norm(wanted)))
        assert error < BOUNDS[half], (rows, error)


def check_rows(
    half: str,
    kind: str,
    inner: int,
    columns: int,
    group: int,
    numbers: Sequence[int],
    known: bool = False,
) -> None:
    """Products of so many rows, of numbers around 1, against float64; ``known``: the model has the first."""
    given = (half if kind == "half" else kind, inner, columns, group, numbers[0] if known else "n")
    model, weight = linear(half, *given)
    program = OnGpu(model, gpu([HERE[-1]]))
    bias = next(v for v in model.graph.initializers.values() if v.name == "bias").const_value
    assert bias is not None
    rng = np.random.default_rng(1)
    for rows in numbers:
        x = (rng.standard_normal((rows, inner)) + 1).astype(HALVES[half])
        wanted = x.astype(np.float64) @ weight + bias.numpy().astype(np.float64)
        found = program.run({"x": x})["y"].astype(np.float64)
        error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
        assert error < BOUNDS[half], (rows, error)


def convolution(half: str, x: str, w: tuple[int, ...], how: str) -> tuple[ir.Model, Array, Array]:
    """y = relu(conv(x, weight) + bias) as a model, its weight and its bias."""
    rng = np.random.default_rng(sum(w))
    weight = (rng.standard_normal(w) / np.prod(w[1:]) ** 0.5).astype(HALVES[half])
    bias = rng.standard_normal(w[0]).astype(HALVES[half])
    model = ir.from_onnx_text(
        f"""
        <ir_version: 12, opset_import: ["" : 25]>
        g ({half}[{x}] x) => ({half}[b, {w[0]}, h, v] y)
        {{
            c = Conv <{how}> (x, w, bias)
            y = Relu (c)
        }}
        """
    )
    used = {v.name: v for node in model.graph for v in node.inputs if v is not None}
    for name, array in (("w", weight), ("bias", bias)):
        value = used[name]
        value.const_value = ir.Tensor(array, dtype=ir.DataType.from_numpy(array.dtype))
        value.dtype, value.shape = value.const_value.dtype, ir.Shape(array.shape)
        model.graph.register_initializer(value)
    normal.normalize(model)
    return model, weight, bias


@pytest.mark.parametrize("kernels", [Gpu, OnMma])
@pytest.mark.parametrize("half", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("shape", "weight", "stride", "pad", "dilation"),
    [
        ((2, 3, 37, 41), (70, 3, 7, 7), 2, 3, 1),
        ((3, 24, 14, 15), (40, 24, 3, 3), 1, 1, 1),
        ((1, 64, 9, 30), (130, 64, 3, 3), 1, 2, 2),
        ((2, 20, 13, 7), (64, 20, 1, 1), 1, 0, 1),
        ((2, 136, 17, 17), (200, 136, 1, 1), 2, 0, 1),
    ],
)
def test_convolution(
    kernels: type[Gpu],
    half: str,
    shape: tuple[int, ...],
    weight: tuple[int, ...],
    stride: int,
    pad: int,
    dilation: int,
) -> None:
    import torch

    how = f"strides = [{stride}, {stride}], dilations = [{dilation}, {dilation}]"
    how += f", pads = [{pad}, {pad}, {pad}, {pad}]"
    given = ", ".join(map(str, shape))
    model, held, bias = convolution(half, given, weight, how)
    program = OnGpu(model, kernels(**vars(gpu([HERE[-1]]))))
    x = np.random.default_rng(2).standard_normal(shape).astype(HALVES[half])
    found = program.run({"x": x})["y"].astype(np.float64)
    image, taps, offset = (torch.from_numpy(a.astype(np.float64)) for a in (x, held, bias))
    wanted = torch.conv2d(image, taps, offset, stride, pad, dilation).relu().numpy()
    assert found.shape == wanted.shape
    assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < BOUNDS[half]


_MASKED = "(q, k, v, m)"


def attention(
    kernels: type[Gpu], half: str, depth: int, mask: str, node: str = _MASKED, shared: int = 4
) -> OnGpu:
    """y = Attention of 4 heads, with a mask, over ``shared`` heads of keys; n are lengths."""
    rows = [f"{half}[b,4,s,{depth}] q", *(f"{half}[b,{shared},t,{depth}] {name}" for name in "kv")]
    lengths = ", int64[b] n" if "n)" in node else ""
    model = ir.from_onnx_text(
        f'<ir_version: 11, opset_import: ["" : 25]> g ({", ".join(rows)}, {mask} m{lengths}) =>'
        f" ({half}[b,4,s,{depth}] y) {{ y = Attention {node} }}"
    )
    normal.normalize(model)
    return OnGpu(model, kernels(**vars(gpu([HERE[-1]]))))


def heads(half: str, batch: int, queries: int, keys: int, depth: int, shared: int = 4) -> Any:
    """Queries, keys and values of :func:`attention`."""
    rng = np.random.default_rng(queries + keys)
    sizes = {"q": (4, queries), "k": (shared, keys), "v": (shared, keys)}
    return {
        name: rng.standard_normal((batch, *size, depth)).astype(HALVES[half])
        for name, size in sizes.items()
    }


def attended(feeds: dict[str, Array], cap: int = 0) -> Array:
    """What :func:`attention` should give, in float64; with lengths it is causal."""
    import torch

    groups = feeds["q"].shape[1] // feeds["k"].shape[1]
    q, k, v = (torch.from_numpy(feeds[name].astype(np.float64)) for name in "qkv")
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) / q.shape[3] ** 0.5
    scores = cap * torch.tanh(scores / cap) if cap else scores
    mask = feeds["m"]
    if mask.dtype == np.bool_:
        scores = scores.masked_fill(torch.from_numpy(~mask), -np.inf)
    else:  # beside the lowest of floats a score counts nothing
        scores = (scores.float() + torch.from_numpy(mask.astype(np.float32))).double()
    if "n" in feeds:
        queries, keys = scores.shape[2:]
        lengths = torch.from_numpy(feeds["n"])[:, None, None, None]
        last = torch.arange(queries)[:, None] - queries + lengths
        scores = scores.masked_fill(torch.arange(keys) > last, -np.inf)
    result: Array = (torch.softmax(scores, -1).nan_to_num(0.0) @ v).numpy()
    return result


def check_attention(program: OnGpu, feeds: dict[str, Array], cap: int = 0) -> None:
    """Against float64, where weights are rounded as well as results."""
    found, wanted = program.run(feeds)["y"].astype(np.float64), attended(feeds, cap)
    bound = 2 * BOUNDS[str(feeds["q"].dtype)]
    assert np.linalg.norm(found - wanted) < bound * np.linalg.norm(wanted)


@pytest.mark.parametrize("kernels", [Gpu, OnMma])
@pytest.mark.parametrize(
    ("half", "depth", "kind", "dims", "cap"),
    [
        ("bfloat16", 64, "bfloat16", "1hst", 0),
        ("bfloat16", 128, "float", "bhst", 30),
        ("float16", 72, "float16", "b11t", 0),
        ("float16", 96, "bool", "11st", 0),
        ("bfloat16", 80, "bool", "b1st", 30),
    ],
)
def test_attention_with_a_bias(
    kernels: type[Gpu], half: str, depth: int, kind: str, dims: str, cap: int
) -> None:
    """Of few queries and of many; the second sees no key, and the third's biases are the lowest floats."""
    node = f"{f'<softcap = {cap}.0> ' if cap else ''}(q, k, v, m)"
    mask = f"{kind}[{','.join(dims.replace('h', '4'))}]"
    program = attention(kernels, half, depth, mask, node)
    for batch, queries, keys in [(1, 1, 40), (2, 16, 129), (3, 130, 77), (1, 200, 264)]:
        sizes = dict(zip("bhst1", (batch, 4, queries, keys, 1), strict=True))
        feeds = heads(half, batch, queries, keys, depth)
        feeds["m"] = some_mask(kind, [sizes[dim] for dim in dims])
        if kind != "bool" and feeds["m"].shape[2] > 2:
            feeds["m"][..., 2, :] = ml_dtypes.finfo(feeds["m"].dtype).min
        check_attention(program, feeds, cap)


def some_mask(kind: str, shape: Sequence[int]) -> Array:
    """One that hides a part of the keys, and all from the second query."""
    rng = np.random.default_rng(3)
    hidden = rng.random(shape) > 0.7
    if shape[2] > 2:
        hidden[..., 1, :] = True
    if kind == "bool":
        return ~hidden
    dtype = HALVES.get(kind, np.float32)
    return np.where(hidden, -np.inf, rng.standard_normal(shape)).astype(dtype)


@pytest.mark.parametrize("kernels", [Gpu, OnMma])
@pytest.mark.parametrize(
    ("half", "depth", "kind", "one", "shared"),
    [
        ("bfloat16", 64, "float", 4, 2),
        ("float16", 72, "bool", 1, 1),
        ("bfloat16", 128, "bfloat16", 4, 1),
    ],
)
def test_attention_with_a_bias_for_heads_that_share_keys(
    kernels: type[Gpu], half: str, depth: int, kind: str, one: int, shared: int
) -> None:
    """Causal, and with lengths, so that the queries of each sequence stand elsewhere."""
    node = "<is_causal = 1> (q, k, v, m, , , n)"
    program = attention(kernels, half, depth, f"{kind}[b,{one},s,t]", node, shared)
    for queries, keys in [(1, 300), (4, 129), (130, 264)]:
        feeds = heads(half, 2, queries, keys, depth, shared)
        feeds["m"] = some_mask(kind, (2, one, queries, keys))
        feeds["n"] = np.array([keys, keys - 70])
        check_attention(program, feeds)


@pytest.mark.parametrize("kernels", [Gpu, OnMma])
@pytest.mark.parametrize("depth", [64, 72])
@pytest.mark.parametrize("kind", ["bool", "float16"])
def test_attention_of_nothing(kernels: type[Gpu], depth: int, kind: str) -> None:
    """No sequences, no queries, or no keys, which give zeros."""
    program = attention(kernels, "float16", depth, f"{kind}[b,1,s,t]")
    for batch, queries, keys in [(0, 3, 40), (0, 130, 40), (2, 0, 40), (2, 3, 0), (2, 130, 0)]:
        feeds = heads("float16", batch, queries, keys, depth)
        feeds["m"] = some_mask(kind, (batch, 1, queries, keys))
        found = program.run(feeds)["y"]
        np.testing.assert_array_equal(found, np.zeros((batch, 4, queries, depth), np.float16))


@pytest.mark.parametrize("kernels", [Gpu, OnMma])
@pytest.mark.parametrize(("half", "depth"), [("bfloat16", 64), ("float16", 72)])
@pytest.mark.parametrize("rows", ["s", "1"], ids=["for each query", "for each key"])
def test_what_a_mask_hides_may_be_anything(
    kernels: type[Gpu], half: str, depth: int, rows: str
) -> None:
    """Inf and NaN, as in the unused tail of a cache; all of the second sequence is hidden."""
    program = attention(kernels, half, depth, f"bool[b,1,{rows},t]")
    for queries, keys in [(1, 40), (16, 129), (130, 300)]:
        feeds = heads(half, 2, queries, keys, depth)
        feeds["k"][:, :, -9:] = np.inf
        feeds["k"][:, :, -4:] = np.nan
        feeds["m"] = np.ones((2, 1, queries if rows == "s" else 1, keys), np.bool_)
        feeds["m"][0, ..., -9:] = feeds["m"][1] = False
        check_attention(program, feeds)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name) for case in CASES if "_expanded" not in case.name],
)
def test_node(case: TestCase) -> None:
    from netlathe.diagnostics import InputError, LowerError

    assert case.model is not None and case.data_sets is not None
    try:
        model = _prepared(ir.serde.deserialize_model(case.model))
        program = OnGpu(model, gpu([HERE[-1]]))
    except (InputError, LowerError) as error:
        pytest.skip(f"refused: {error.diagnostics[0].message}")
    for inputs, expected in case.data_sets:
        names = [value.name or "" for value in model.graph.inputs]
        results = program.run(dict(zip(names, map(_array, inputs), strict=True)))
        for value, wanted in zip(model.graph.outputs, map(_array, expected), strict=True):
            actual = results[value.name or ""]
            assert actual.dtype == wanted.dtype and actual.shape == wanted.shape
            # float32 sums in another order, functions of other libraries; of halves the last place
            rtol = max(case.rtol, LAST_PLACE.get(str(actual.dtype), 1e-3))
            if case.name.startswith("test_attention") and actual.dtype in HALVES.values():
                rtol *= 2  # what ONNX expects is rounded after every step, ours at the end
            atol = max(case.atol, 1e-5)
            if actual.dtype.kind not in "biufc":
                actual, wanted = actual.astype(np.float32), wanted.astype(np.float32)
            np.testing.assert_allclose(actual, wanted, rtol=rtol, atol=atol)
