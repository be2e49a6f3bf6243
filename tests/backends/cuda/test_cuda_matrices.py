"""Products of two computed matrices of halves: how operands lie, and ragged ones against float64 on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("tvm", reason="the tvm extra is not installed")

from tvm import tirx

from netlathe.backends.tvm.cuda import hopper
from netlathe.backends.tvm.cuda.machine import ARCHITECTURES, Gpu, gpu
from netlathe.backends.tvm.cuda.operands import operands
from netlathe.backends.tvm.kernel import SCHEDULE
from netlathe.backends.tvm.lowering import Lowered, Lowering
from tests.backends.cuda.test_cuda_run import BOUNDS, HALVES, HERE, Array, OnGpu, OnMma
from tests.ir.onnx_text import normal_model

on_gpu = pytest.mark.skipif(not HERE, reason="no GPU that there are kernels for")


@dataclass(frozen=True)
class Case:
    """y of a and b by a graph and in numpy, for some sizes."""

    a: str
    b: str
    y: str
    nodes: str
    wanted: Any
    sizes: tuple[dict[str, int], ...] = ({},)

    def text(self, half: str) -> str:
        return f"""<ir_version: 12, opset_import: ["" : 25]>
            g ({half}[{self.a}] a, {half}[{self.b}] b) => ({half}[{self.y}] y) {{ {self.nodes} }}"""


def softmax(x: Array) -> Array:
    power = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(power / power.sum(-1, keepdims=True))


SWAPPED = "c = Transpose <perm = [0, 1, 3, 2]> (b) y = MatMul (a, c)"
CASES = {
    "as it lies": Case(
        "b, m, k",
        "b, k, n",
        "b, m, n",
        "y = MatMul (a, b)",
        lambda a, b: a @ b,
        (
            {"b": 3, "m": 130, "k": 72, "n": 200},
            {"b": 2, "m": 300, "k": 33, "n": 77},
            {"b": 5, "m": 257, "k": 512, "n": 513},
            {"b": 2, "m": 128, "k": 1000, "n": 256},
            {"b": 2, "m": 64, "k": 1, "n": 30},
            {"b": 2, "m": 3, "k": 0, "n": 5},
            {"b": 0, "m": 3, "k": 8, "n": 5},
        ),
    ),
    "keys": Case(
        "b, 3, s, 64",
        "b, 3, t, 64",
        "b, 3, s, t",
        SWAPPED,
        lambda a, b: a @ b.swapaxes(2, 3),
        ({"b": 2, "s": 197, "t": 197}, {"b": 1, "s": 1, "t": 1000}, {"b": 2, "s": 520, "t": 512}),
    ),
    "known": Case(
        "2, 197, 96", "2, 96, 197", "2, 197, 197", "y = MatMul (a, b)", lambda a, b: a @ b
    ),
    "lines filled up": Case(
        "12, 197, 197", "12, 197, 64", "12, 197, 64", "y = MatMul (a, b)", lambda a, b: a @ b
    ),
    "left turned": Case(
        "b, s, 72",
        "s, 50",
        "b, 72, 50",
        "c = Transpose <perm = [0, 2, 1]> (a) y = MatMul (c, b)",
        lambda a, b: a.swapaxes(1, 2) @ b,
        ({"b": 3, "s": 197}, {"b": 1, "s": 64}),
    ),
    "both turned": Case(
        "200, 136",
        "72, 200",
        "136, 72",
        "y = Gemm <transA = 1, transB = 1, alpha = 0.5> (a, b)",
        lambda a, b: a.T @ b.T / 2,
    ),
    "spread": Case(
        "b, 1, g, m, 40",
        "2, 1, 40, 104",
        "b, 2, g, m, 104",
        "y = MatMul (a, b)",
        lambda a, b: a @ b,
        ({"b": 2, "g": 3, "m": 65}, {"b": 1, "g": 1, "m": 129}),
    ),
    "heads": Case(
        "b, s, 4, 64",
        "b, t, 4, 64",
        "b, s, 4, t",
        """c = Transpose <perm = [0, 2, 1, 3]> (a) d = Transpose <perm = [0, 2, 3, 1]> (b)
            e = MatMul (c, d) f = Relu (e) y = Transpose <perm = [0, 2, 1, 3]> (f)""",
        lambda a, b: np.maximum(np.einsum("bshd,bthd->bsht", a, b), 0),
        ({"b": 2, "s": 197, "t": 130}, {"b": 1, "s": 8, "t": 8}),
    ),
    "channels last, turned": Case(
        "1, 8, 24, 64",
        "1, 8, 24, 72",
        "1, 8, 64, 72",
        """c = Transpose <perm = [0, 3, 1, 2]> (a) d = MaxPool <kernel_shape = [1, 1]> (c)
            e = Transpose <perm = [0, 2, 1, 3]> (d) y = MatMul (e, b)""",
        lambda a, b: a.swapaxes(2, 3) @ b,
    ),
    "attention": Case(
        "b, s, 4, 64",
        "b, t, 4, 64",
        "b, 4, s, 64",
        """c = Transpose <perm = [0, 2, 1, 3]> (a) d = Transpose <perm = [0, 2, 3, 1]> (b)
            e = MatMul (c, d) f = Softmax (e) g = Transpose <perm = [0, 2, 1, 3]> (b)
            y = MatMul (f, g)""",
        lambda a, b: np.einsum("bhst,bthd->bhsd", softmax(np.einsum("bshd,bthd->bhst", a, b)), b),
        ({"b": 2, "s": 197, "t": 197}, {"b": 1, "s": 3, "t": 1000}),
    ),
    "vector": Case("300", "300, 40", "40", "y = MatMul (a, b)", lambda a, b: a @ b),
    "large": Case("512, 1024", "1024, 768", "512, 768", "y = MatMul (a, b)", lambda a, b: a @ b),
}


def schedules(case: Case, arch: str) -> list[str]:
    """Of the kernels of a case."""
    return written(Lowering(normal_model(case.text("bfloat16")), gpu([arch])).run())


def written(lowered: Lowered) -> list[str]:
    """The schedules of kernels."""
    functions: list[Any] = [f for _, f in lowered.module.functions_items()]
    return [
        str(f.attrs[SCHEDULE])
        for f in functions
        if isinstance(f, tirx.PrimFunc) and SCHEDULE in f.attrs
    ]


@pytest.mark.parametrize(("arch", "kernel"), [("sm_90a", "warpgroups"), ("sm_80", "warps")])
@pytest.mark.parametrize("name", CASES)
def test_operands_are_read_as_they_lie(name: str, arch: str, kernel: str) -> None:
    """Nothing is moved but what has lines of another length."""
    found = schedules(CASES[name], arch)
    product = f"gemm.{kernel}"
    copied = {"lines filled up": 1, "known": 1, "left turned": 1, "vector": 1}
    made = {"rows.softmax", "pool.channels_last"}
    assert found.count(product) == (2 if name == "attention" else 1)
    moved = [each for each in found if each not in {product, *made}]
    assert len(moved) == copied.get(name, 0), moved


def test_a_transpose_of_another_is_read_as_it_lies() -> None:
    """In a graph that is not in normal form, which has one of both."""
    nodes = "c = Transpose <perm = [0, 2, 1, 3]> (b) d = Transpose <perm = [0, 1, 3, 2]> (c)"
    case = Case("2, 3, 5, 64", "2, 7, 3, 64", "2, 3, 5, 7", f"{nodes} y = MatMul (a, d)", None)
    model = ir.from_onnx_text(case.text("bfloat16"))
    assert written(Lowering(model, gpu(["sm_90a"])).run()) == ["gemm.warpgroups"]


EMPTY = {
    "rows": Case("0, 64", "64, 8", "0, 8", "y = MatMul (a, b)", None),
    "columns": Case("m, 64", "64, 0", "m, 0", "y = MatMul (a, b)", None),
    "matrices": Case("0, 3, 8", "0, 8, 5", "0, 3, 5", "y = MatMul (a, b)", None),
    "values": Case("1, 2, 9, 64", "1, 2, 9, 0", "1, 2, 9, 0", "y = Attention (a, a, b)", None),
}


@pytest.mark.parametrize("arch", ["sm_90a", "sm_80"])
@pytest.mark.parametrize("name", EMPTY)
def test_nothing_is_multiplied_for_no_results(name: str, arch: str) -> None:
    assert not {"gemm.warpgroups", "gemm.warps"} & set(schedules(EMPTY[name], arch))


@pytest.mark.parametrize("down", [False, True])
@pytest.mark.parametrize(
    ("rows", "inner", "columns", "count"),
    [
        (None, None, None, None),
        (197, 64, 197, 768),
        (2048, 128, 2048, 32),
        (2048, 2048, 128, 32),
        (512, 64, 512, 16),
        (1, 64, 4096, 32),
    ],
)
def test_a_tile_fits(
    rows: int | None, inner: int | None, columns: int | None, count: int | None, down: bool
) -> None:
    shape = hopper.for_sizes(operands("bf16"), rows, inner, columns, count, down)
    assert shape.stages >= 4 and shape.shared_bytes <= ARCHITECTURES["sm_90a"][1]
    assert shape.columns % (64 if down else 16) == 0 and shape.box_rows % 8 == 0
    assert shape.box_rows * shape.cluster * shape.pieces == shape.columns


# Heads, heads of keys, elements of one; the mask; attributes; sizes.
MASKED = {
    "bias": (4, 4, 64, "{half}[1, 4, s, t] m", "", ({"b": 2, "s": 197, "t": 197},)),
    "capped": (8, 2, 40, "{half}[1, 8, s, t] m", "softcap = 2.0", ({"b": 2, "s": 65, "t": 130},)),
    "flags": (4, 2, 72, "bool[b, 1, s, t] m", "", ({"b": 3, "s": 5, "t": 1000},)),
    "none": (2, 2, 80, "bool[1] m", "", ({"b": 2, "s": 1, "t": 33}, {"b": 0, "s": 3, "t": 3})),
}


@on_gpu
@pytest.mark.parametrize("kernels", [Gpu, OnMma])
@pytest.mark.parametrize("half", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", MASKED)
def test_attention_of_any_mask(name: str, half: str, kernels: type[Gpu]) -> None:
    heads, shared, depth, mask, attributes, each = MASKED[name]
    named = "" if name == "none" else ", m"
    given = "" if name == "none" else f", {mask.format(half=half)}"
    text = f"""<ir_version: 12, opset_import: ["" : 25]>
        g ({half}[b, {heads}, s, {depth}] q, {half}[b, {shared}, t, {depth}] k,
            {half}[b, {shared}, t, {depth}] v{given}) => ({half}[b, {heads}, s, {depth}] y)
        {{ y = Attention <scale = 0.125{", " * bool(attributes)}{attributes}> (q, k, v{named}) }}"""
    program = OnGpu(normal_model(text), kernels(**vars(gpu([HERE[-1]]))))
    rng = np.random.default_rng(1)
    for sizes in each:
        b, s, t = sizes["b"], sizes["s"], sizes["t"]
        feeds: dict[str, Array] = {
            key: rng.standard_normal((b, count, length, depth)).astype(HALVES[half])
            for key, count, length in (("q", heads, s), ("k", shared, t), ("v", shared, t))
        }
        wide = {key: array.astype(np.float64) for key, array in feeds.items()}
        keys, values = (wide[key].repeat(heads // shared, 1) for key in "kv")
        scores = wide["q"] @ keys.swapaxes(2, 3) / 8
        if attributes:
            scores = 2 * np.tanh(scores / 2)
        empty = np.zeros((1, 1, 1, 1), bool)
        if name == "flags":
            feeds["m"] = rng.random((b, 1, s, t)) < 0.6
            feeds["m"][0, 0, 3] = False
            scores = np.where(feeds["m"], scores, -np.inf)
            empty = ~feeds["m"].any(-1, keepdims=True)
        elif named:
            feeds["m"] = rng.standard_normal((1, heads, s, t)).astype(HALVES[half])
            scores = scores + feeds["m"].astype(np.float64)
        found = program.run(feeds)["y"].astype(np.float64)
        wanted = np.where(empty, 0, softmax(np.where(empty, 0, scores)) @ values)
        error = np.linalg.norm(found - wanted) / max(1e-9, float(np.linalg.norm(wanted)))
        # Weights are rounded, too: two such errors side by side.
        assert found.shape == wanted.shape and error < 1.2 * BOUNDS[half], (sizes, error)


BIASED = """<ir_version: 12, opset_import: ["" : 25]>
    g (float16[b, 2, s, 80] q, float16[b, 2, t, 80] k, float16[b, 2, t, 80] v, float16[s, t] m)
        => (float16[b, 2, s, 80] y) { y = Attention (q, k, v, m) }"""


@on_gpu
@pytest.mark.parametrize("kernels", [Gpu, OnMma])
def test_what_is_no_number_is_seen(kernels: type[Gpu]) -> None:
    """A NaN in a query, an infinite bias: only a query without any key has zeros."""
    program = OnGpu(normal_model(BIASED), kernels(**vars(gpu([HERE[-1]]))))
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((2, 2, n, 80)).astype(np.float16) for n in (5, 130, 130))
    m = np.zeros((5, 130), np.float16)
    q[0, 1, 2, 7] = np.nan
    m[3], m[4, 1] = -np.inf, np.inf
    found = program.run({"q": q, "k": k, "v": v, "m": m})["y"]
    wanted = np.zeros(found.shape, bool)
    wanted[0, 1, 2] = wanted[:, :, 4] = True
    assert np.array_equal(np.isnan(found), wanted) and not found[:, :, 3].any()


@on_gpu
@pytest.mark.parametrize("kernels", [Gpu, OnMma])
def test_many_keys_weigh_the_same(kernels: type[Gpu]) -> None:
    """50,000 keys: a share of 2e-5 is no normal float16. What is one is rounded alike for all keys."""
    program = OnGpu(normal_model(BIASED), kernels(**vars(gpu([HERE[-1]]))))
    rng = np.random.default_rng(1)
    k, v = (rng.standard_normal((1, 2, 50_000, 80)).astype(np.float16) for _ in range(2))
    v += np.float16(1)
    given = {"q": np.zeros((1, 2, 3, 80), np.float16), "m": np.zeros((3, 50_000), np.float16)}
    found = program.run({"k": k, "v": v, **given})["y"].astype(np.float64)
    wanted = np.broadcast_to(v.astype(np.float64).mean(2, keepdims=True), found.shape)
    error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    assert error < BOUNDS["float16"] + 2.0**-11, error


MIXED = """<ir_version: 12, opset_import: ["" : 25]>
    g (bfloat16[2, 4, 70, 80] q, bfloat16[2, 2, 130, 80] k, {values}[2, 2, 130, 80] v)
        => (bfloat16[2, 4, 70, 80] y, bfloat16[2, 4, 70, 130] scores)
    {{ y, , , scores = Attention (q, k, v) }}"""
VALUES: dict[str, Any] = {"float": np.float32, **HALVES}


@pytest.mark.parametrize("values", VALUES)
def test_tensor_cores_multiply_what_has_one_type(values: str) -> None:
    lowered = Lowering(normal_model(MIXED.format(values=values)), gpu(["sm_90a"])).run()
    products = written(lowered).count("gemm.warpgroups")
    assert products == (2 if values == "bfloat16" else 1)


@on_gpu
@pytest.mark.parametrize("values", VALUES)
def test_values_of_another_type(values: str) -> None:
    program = OnGpu(normal_model(MIXED.format(values=values)), gpu([HERE[-1]]))
    rng = np.random.default_rng(1)
    q = rng.standard_normal((2, 4, 70, 80)).astype(HALVES["bfloat16"])
    k = rng.standard_normal((2, 2, 130, 80)).astype(HALVES["bfloat16"])
    v = rng.standard_normal((2, 2, 130, 80)).astype(VALUES[values])
    found = program.run({"q": q, "k": k, "v": v})["y"].astype(np.float64)
    wide, keys, items = (x.astype(np.float64) for x in (q, k.repeat(2, 1), v.repeat(2, 1)))
    wanted = softmax(wide @ keys.swapaxes(2, 3) / 80**0.5) @ items
    # Scores and weights are rounded, too.
    error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    assert error < 3 * BOUNDS["bfloat16"], error


@on_gpu
@pytest.mark.parametrize("kernels", [Gpu, OnMma])
@pytest.mark.parametrize("half", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", CASES)
def test_product(name: str, half: str, kernels: type[Gpu]) -> None:
    case = CASES[name]
    program = OnGpu(normal_model(case.text(half)), kernels(**vars(gpu([HERE[-1]]))))
    rng = np.random.default_rng(1)
    for sizes in case.sizes:
        shapes = [
            [sizes[dim] if dim in sizes else int(dim) for dim in text.split(", ")]
            for text in (case.a, case.b)
        ]
        a, b = (rng.standard_normal(shape).astype(HALVES[half]) for shape in shapes)
        if name == "attention":  # scores around 1: how they are rounded counts otherwise
            a = a / HALVES[half](8)
        found = program.run({"a": a, "b": b})["y"].astype(np.float64)
        wanted = case.wanted(a.astype(np.float64), b.astype(np.float64))
        assert found.shape == wanted.shape
        error = np.linalg.norm(found - wanted) / max(1e-9, float(np.linalg.norm(wanted)))
        assert error < BOUNDS[half] * (2 if name == "attention" else 1), (sizes, error)
