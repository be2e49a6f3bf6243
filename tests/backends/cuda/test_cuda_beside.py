"""Products of one left operand as one kernel: which are joined, how weights lie then, and what comes out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("tvm", reason="the tvm extra is not installed")

from netlathe.backends.tvm import runtime
from netlathe.backends.tvm.cuda import packing
from netlathe.backends.tvm.cuda.artifact import CudaArtifact
from netlathe.backends.tvm.cuda.machine import ARCHITECTURES, gpu
from netlathe.backends.tvm.lowering import Lowered, Lowering
from netlathe.ir import normal

HERE = [arch for arch in ARCHITECTURES if not runtime.gpu_lack([arch])]
INNER, GROUP = 256, 128
EPSILON = 0.01
HALVES: dict[str, tuple[ir.DataType, Any]] = {
    "float16": (ir.DataType.FLOAT16, np.float16),
    "bfloat16": (ir.DataType.BFLOAT16, ml_dtypes.bfloat16),
}


@dataclass
class Case:
    """A model and what its weights are in float64."""

    model: ir.Model
    weights: dict[str, Any]
    gains: dict[str, Any]  # of the norms in front, if there are any

    def wanted(self, x: Any) -> dict[str, Any]:
        """Its outputs for rows ``x``, in float64."""
        wide = x.astype(np.float64)
        square = (wide**2).mean(-1, keepdims=True) + EPSILON
        left = {name: gain * wide / np.sqrt(square) for name, gain in self.gains.items()}
        made = {
            name: left.get("n" if len(name) == 1 else "m", wide) @ weight
            for name, weight in self.weights.items()
        }
        found = {
            f"{name}o": made[name].reshape(1, len(x), 2, -1).transpose(0, 2, 1, 3) for name in "qkv"
        }
        swish = made["gate"] / (1 + np.exp(-made["gate"]))
        return {**found, "f": (swish * made["up"])[None]}


def case(half: str, kind: str, seed: int = 0, normed: bool = False, gate: int = 96) -> Case:
    """Queries, keys and values of 128, 64 and 64 columns, then a gate; ``kind``: half, int8, int4, uint4.

    ``gate``: columns of that. ``normed``: each of both has an RMSNormalization in front.
    """
    columns = {"q": 128, "k": 64, "v": 64, "gate": gate, "up": gate}
    dtype, numbers = HALVES[half]
    rng = np.random.default_rng(seed)
    body, weights, gains, constants = [], {}, {}, {}

    def constant(name: str, values: Any, dtype: ir.DataType) -> None:
        constants[name] = ir.Tensor(values, dtype=dtype, name=name)

    for name in "nm" if normed else "":
        gain = rng.uniform(-2, 2, INNER).astype(numbers)
        constant(f"g{name}", gain, dtype)
        gains[name] = gain.astype(np.float64)
        body.append(f"{name} = RMSNormalization <axis = -1, epsilon = {EPSILON}> (x, g{name})")
    for name, count in columns.items():
        left = ("n" if len(name) == 1 else "m") if normed else "x"
        if kind == "half":
            values = (rng.standard_normal((INNER, count)) / 16).astype(numbers)
            constant(f"w{name}", values, dtype)
            weights[name] = values.astype(np.float64)
        else:
            low, high = {"int8": (-128, 128), "int4": (-8, 8), "uint4": (0, 16)}[kind]
            code = {"int8": np.int8, "int4": ml_dtypes.int4, "uint4": ml_dtypes.uint4}[kind]
            whole = kind == "int8"
            blocks = 1 if whole else INNER // GROUP
            values = rng.integers(low, high, (INNER, count))
            scales = (rng.random((blocks, count)) / 8 / high).astype(numbers)
            zeros = rng.integers(low, high, (blocks, count)) if kind == "uint4" else 0 * scales
            constant(f"c{name}", values.astype(code), ir.DataType[kind.upper()])
            constant(f"s{name}", scales[0] if whole else scales, dtype)
            rest = ""
            if kind == "uint4":
                constant(f"z{name}", zeros.astype(code), ir.DataType.UINT4)
                rest = f", z{name}"
            how = "axis = 1" if whole else f"axis = 0, block_size = {GROUP}"
            body.append(f"w{name} = DequantizeLinear <{how}> (c{name}, s{name}{rest})")
            spread = [np.repeat(a.astype(np.float64), INNER // blocks, 0) for a in (zeros, scales)]
            weights[name] = (values - spread[0]) * spread[1]
        body.append(f"{name} = MatMul ({left}, w{name})")
        if len(name) == 1:
            body.append(f"{name}r = Reshape ({name}, heads)")
            body.append(f"{name}o = Transpose <perm = [0, 2, 1, 3]> ({name}r)")
    outputs = ", ".join(f"{half}[1, 2, n, {columns[name] // 2}] {name}o" for name in "qkv")
    model = ir.from_onnx_text(
        f"""
        <ir_version: 12, opset_import: ["" : 25]>
        g ({half}[1, n, {INNER}] x) => ({outputs}, {half}[1, n, {gate}] f)
        {{
            heads = Constant <value_ints = [1, -1, 2, {columns["q"] // 2}]> ()
            few = Constant <value_ints = [1, -1, 2, {columns["k"] // 2}]> ()
            {" ".join(body).replace("(k, heads)", "(k, few)").replace("(v, heads)", "(v, few)")}
            s = Swish (gate)
            f = Mul (s, up)
        }}
        """
    )
    values_ = {v.name: v for node in model.graph for v in node.inputs if v is not None}
    for name, tensor in constants.items():
        value = values_[name]
        value.const_value, value.dtype, value.shape = tensor, tensor.dtype, ir.Shape(tensor.shape)
        model.graph.register_initializer(value)
    normal.normalize(model)
    return Case(model, weights, gains)


def lowered(text: str, widths: dict[str, int]) -> Lowered:
    model = ir.from_onnx_text(text)
    values = {v.name: v for node in model.graph for v in node.inputs if v is not None}
    for name, columns in widths.items():
        zeros = np.zeros((64, columns), np.float16)
        zeros[0, :1] = len(name) + columns  # no two constants are equal
        values[name].const_value = ir.Tensor(zeros, name=name)
        values[name].dtype, values[name].shape = ir.DataType.FLOAT16, ir.Shape(zeros.shape)
        model.graph.register_initializer(values[name])
    normal.normalize(model)
    return Lowering(model, gpu(["sm_90a"])).run()


@pytest.mark.parametrize("gate", [96, 90, 75])
@pytest.mark.parametrize("kind", ["half", "int8", "int4", "uint4"])
def test_five_products_are_two_kernels(kind: str, gate: int) -> None:
    made = Lowering(case("bfloat16", kind, gate=gate).model, gpu(["sm_90a"])).run()
    assert made.kernels == 4  # those, and what transposes q, and k or v
    first = "w" if kind == "half" else "c"
    sources = [p.recipe.sources for p in made.parameters]
    assert (f"{first}q", f"{first}k", f"{first}v") in sources
    assert (f"{first}gate", f"{first}up") in sources
    assert len(sources) == 2 * (1 if kind == "half" else 3 if kind == "uint4" else 2)


def test_products_that_something_is_appended_to_stay_alone() -> None:
    """A sum with another vector after each costs less in the product than a launch of its own."""
    text = """
        <ir_version: 12, opset_import: ["" : 25]>
        g (float16[n, 64] x, float16[64] b, float16[96] c) => (float16[n, 64] y, float16[n, 96] z)
        { p = MatMul (x, u) y = Add (p, b) q = MatMul (x, ww) z = Add (q, c) }
        """
    made = lowered(text, {"u": 64, "ww": 96})
    assert made.kernels == 2 and all(len(p.recipe.sources) == 1 for p in made.parameters)


def test_products_of_different_sizes_do_not_meet() -> None:
    """One has a column that is broadcast over the other's, so that no two elements belong together."""
    text = """
        <ir_version: 12, opset_import: ["" : 25]>
        g (float16[n, 64] x) => (float16[n, 64] y)
        { p = MatMul (x, u) q = MatMul (x, ww) y = Mul (p, q) }
        """
    assert lowered(text, {"u": 64, "ww": 64}).kernels == 1
    assert lowered(text, {"u": 64, "ww": 1}).kernels == 2


def test_a_product_of_something_else_does_not_meet_either() -> None:
    text = """
        <ir_version: 12, opset_import: ["" : 25]>
        g (float16[n, 64] x, float16[n, 64] t) => (float16[n, 64] y)
        { p = MatMul (x, u) q = MatMul (t, ww) y = Mul (p, q) }
        """
    assert lowered(text, {"u": 64, "ww": 64}).kernels == 2


@pytest.mark.parametrize("width", ["m", "96"])
def test_a_product_with_a_matrix_that_is_computed_stays_alone(width: str) -> None:
    """Its columns may be known when it runs only."""
    text = f"""
        <ir_version: 12, opset_import: ["" : 25]>
        g (float16[n, 64] x, float16[64, {width}] t) => (float16[64, n] y, float16[{width}, n] z)
        {{ p = MatMul (x, u) y = Transpose (p) q = MatMul (x, t) z = Transpose (q) }}
        """
    made = lowered(text, {"u": 64})
    assert made.kernels == 4 and [p.recipe.sources for p in made.parameters] == [("u",)]


def test_no_columns_are_joined_with_nothing() -> None:
    text = """
        <ir_version: 12, opset_import: ["" : 25]>
        g (float16[n, 64] x) => (float16[64, n] y, float16[96, n] w, float16[0, n] z)
        {
            p = MatMul (x, u) y = Transpose (p)
            q = MatMul (x, none) z = Transpose (q)
            r = MatMul (x, ww) w = Transpose (r)
        }
        """
    made = lowered(text, {"u": 64, "none": 0, "ww": 96})
    assert ("u", "ww") in [p.recipe.sources for p in made.parameters]


def test_scales_of_another_type_are_not_taken() -> None:
    """With output_dtype a weight may be float16 and its scales float32."""
    model = case("float16", "int4").model
    for node in model.graph:
        if node.op_type == "DequantizeLinear":
            scale = node.inputs[1]
            assert scale is not None and scale.const_value is not None
            wide = scale.const_value.numpy().astype(np.float32)
            scale.const_value, scale.dtype = ir.Tensor(wide, name=scale.name), ir.DataType.FLOAT
            node.attributes["output_dtype"] = ir.AttrInt64("output_dtype", ir.DataType.FLOAT16)
    made = Lowering(model, gpu(["sm_90a"])).run()
    assert not any(p.recipe.function is packing.group_values for p in made.parameters)
    assert all(len(p.recipe.sources) == 1 for p in made.parameters)


def test_one_weight_twice_lies_there_twice() -> None:
    text = """
        <ir_version: 12, opset_import: ["" : 25]>
        g (float16[n, 64] x) => (float16[n, 32, 2] y, float16[64, n] z)
        {
            s = Constant <value_ints = [0, 32, 2]> ()
            p = MatMul (x, u) y = Reshape (p, s)
            q = MatMul (x, u) r = Neg (q) z = Transpose (r)
        }
        """
    made = lowered(text, {"u": 64})
    assert [p.recipe.sources for p in made.parameters] == [("u",)]


def test_columns_lie_one_after_the_other_or_in_turn() -> None:
    rng = np.random.default_rng(0)
    parts = [rng.standard_normal((3, 4)).astype(np.float16) for _ in range(2)]
    tensors = [ir.Tensor(part) for part in parts]
    after = packing.Joined(packing.transposed, (4, 4), False)(*tensors)
    np.testing.assert_array_equal(after, np.concatenate(parts, 1).T)
    in_turn = packing.Joined(packing.transposed, (4, 4), True)(*tensors)
    np.testing.assert_array_equal(in_turn[0::2], parts[0].T)
    np.testing.assert_array_equal(in_turn[1::2], parts[1].T)


def test_a_scale_for_all_columns_is_repeated() -> None:
    scales = [ir.Tensor(np.array(1.5, np.float16)), ir.Tensor(np.array([1, 2], np.float16))]
    made = packing.Joined(packing.group_values, (3, 2), False)(*scales, 1, 5)
    np.testing.assert_array_equal(made[0, :5], [1.5, 1.5, 1.5, 1, 2])


@pytest.mark.parametrize("in_turn", [False, True])
def test_a_weight_of_one_column_has_one_scale(in_turn: bool) -> None:
    """Of one block of K: a matrix of one element, which stands beside others' rows."""
    counts = (1, 1) if in_turn else (2, 1)
    scales = [ir.Tensor(np.full((1, count), count, np.float16)) for count in counts]
    made = packing.Joined(packing.group_values, counts, in_turn)(*scales, 1, sum(counts))
    np.testing.assert_array_equal(made[0, : sum(counts)], [1, 1] if in_turn else [2, 2, 1])


@pytest.mark.skipif(not HERE, reason="no GPU that there are kernels for")
@pytest.mark.parametrize(
    ("half", "kind", "normed", "gate"),
    [
        *((half, kind, False, 96) for half in HALVES for kind in ("half", "int8", "int4", "uint4")),
        *(("bfloat16", kind, False, 90) for kind in ("int8", "uint4")),
        *(("float16", kind, False, 75) for kind in ("int8", "int4")),
        ("bfloat16", "half", True, 96),
        ("bfloat16", "int4", True, 90),
        ("float16", "int8", True, 96),
    ],
)
def test_what_joined_products_give(
    half: str, kind: str, normed: bool, gate: int, tmp_path: Path
) -> None:
    made = case(half, kind, normed=normed, gate=gate)
    CudaArtifact(made.model, gpu(HERE[-1:])).write(tmp_path)
    loaded = runtime.load(tmp_path)
    for rows in (1, 3, 4, 5, 9, 16, 17, 40, 130, 300):
        x = np.random.default_rng(rows).standard_normal((rows, INNER)).astype(HALVES[half][1])
        found = loaded.run({"x": x[None]})
        for name, value in made.wanted(x).items():
            error = np.linalg.norm(found[name].astype(np.float64) - value) / np.linalg.norm(value)
            # The last output is a product of two that are rounded first; what is normalized is rounded twice.
            assert error <= (2 if normed else 1) * (4e-3 if half == "bfloat16" else 5e-4)
