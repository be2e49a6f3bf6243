"""The model that a quantized one must equal, from its ledger alone and without the code that edits.

Float weights are replaced by what their codes stand for. The formulas are written out once more: a
slip in `scheme`, `layout`, `rounding` or `graph` shows as a difference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.ir import edit, weights
from netlathe.passes.quantize import bias_reference, integer, qdq_reference, token
from netlathe.passes.quantize.integer_reference import Emulator
from netlathe.pipeline.ledger import Entry
from netlathe.pipeline.pass_ import Reference

Array = npt.NDArray[Any]

# The reference holds the same float32 weights bit for bit: both sides divide float32 numbers in
# float64 and round once to a code, and the product with the scale is rounded once to float32,
# by DequantizeLinear or by numpy. ONNX Runtime then runs the same kernels on them. What is left is
# room for a kernel that adds in another order where its weight is a constant: 4 ulp of float32.
TOLERANCE = 4 * 2.0**-23

_FLOAT_MAX = {
    "float8e4m3fn": 448.0,
    "float8e5m2": 57344.0,
    "float4e2m1": 6.0,
    "mxfp4": 6.0,
    "nvfp4": 6.0,
}
_STORED_AS = {"mxfp4": "float4e2m1", "nvfp4": "float4e2m1"}
_SCALE_DTYPES = {"float32": np.float32, "float16": np.float16}


def build(before: ir.Model, chosen: Sequence[Entry]) -> Reference:
    """``before``, which is consumed, with fake-quantized weights."""
    found = {v.name: v for graph in before.graphs() for v in graph.initializers.values()}
    applied = [entry for entry in chosen if entry.status == "applied"]
    bias_reference.emulate(before, applied)
    for entry in applied:
        if "low_rank" in entry.detail:
            _put_beside(before, found[entry.detail["value"]], entry)
    grids = {
        e.detail["activation"]: (e.detail["scale"], e.detail["zero"])
        for e in applied
        if "activation" in e.detail
    }
    stored = {e.detail["value"]: e for e in applied if "value" in e.detail}
    fit = [
        name
        for name, e in stored.items()
        if (e.detail["symmetric"], e.detail["block_size"]) == (True, 0)
        and (e.detail["weights"] == "int8" or "operand" in e.detail)
    ]
    plan = integer.plan(before, fit) if grids else integer.Plan()
    inside = {layer.weight.name for layer in plan.layers.values()}
    listed = [name for e in applied if "token" in e.detail for name in e.detail["weights"]]
    by_token = token.products(before, listed)
    inside |= set(listed)
    held = {}
    beside = {e.detail["weight"] for e in applied if "bias" in e.detail}
    scales = {}
    for name in beside:
        tensor = found[name].const_value
        assert tensor is not None
        _, scales[name] = _codes_and_scales(
            tensor.numpy(), stored[name].detail, stored[name].arrays
        )
    qdq_reference.emulate(before, applied, scales)
    for name, entry in stored.items():
        value = found[name]
        base = value.const_value
        assert base is not None
        if name in inside:
            held[name] = _codes_and_scales(base.numpy(), entry.detail, entry.arrays)
            continue
        made = _fake_quantizer(entry.detail, entry.arrays)
        value.const_value = weights.derived(
            base, made, base.dtype, base.shape.numpy(), base.name or ""
        )
    Emulator(before, plan, grids, held).run()
    per = next((e.detail["scales"] for e in applied if "token" in e.detail), "token")
    token.emulate(before, by_token, held, per)
    return Reference(before, TOLERANCE)


def _put_beside(before: ir.Model, weight: ir.Value, entry: Entry) -> None:
    """Let products with a weight add those with its two thin matrices, held in float."""
    taken = edit.names_in(before.graph)
    thin = []
    for key in ("a", "b"):
        array = entry.arrays[key].astype(np.float64)
        if entry.detail["low_rank"]["stored"] == "float16":
            array = array.astype(np.float16)
        else:
            s = _stored(np.abs(array).max(0, keepdims=True) / 127, {"scale_type": "float16"})
            array = np.around(array / s) * s
        thin.append(edit.constant(before.graph, array.astype(np.float32), f"thin_{key}", taken))
    for node in [user for user, _ in weight.uses()]:
        output, inputs = node.outputs[0], (node.inputs[0], thin[0])
        whole = edit.node(
            "MatMul", node.inputs, {}, name=edit.unique_name(before.graph, "whole", taken)
        )
        first = edit.node("MatMul", inputs, {}, name=edit.unique_name(before.graph, "first", taken))
        inputs = first.outputs[0], thin[1]
        second = edit.node(
            "MatMul", inputs, {}, name=edit.unique_name(before.graph, "second", taken)
        )
        both = whole.outputs[0], second.outputs[0]
        total = edit.node("Add", both, {}, name=edit.unique_name(before.graph, "total", taken))
        edit.replace(node, [whole, first, second, total], {output: total.outputs[0]}, "reference")


def _codes_and_scales(
    array: Array, detail: Mapping[str, Any], solved: Mapping[str, Array]
) -> tuple[Array, Array]:
    """The integers of a weight, as floats, and the scales of its channels."""
    wide, back = _in_rows(array, detail)
    w = wide.astype(np.float64)
    s, z = (
        (solved[key].reshape(-1, 1) for key in ("scales", "zeros"))
        if "scales" in solved
        else _formula(w, detail)
    )
    if "codes" in solved:
        return solved["codes"].reshape(array.shape).astype(np.float64), s.reshape(-1)
    return back(_units(w, s, z, detail)), s.reshape(-1)


def _fake_quantizer(
    detail: Mapping[str, Any], solved: Mapping[str, Array]
) -> Callable[[Array], Array]:
    """What is left of a weight."""
    if detail["weights"] in ("float16", "bfloat16"):
        dtype = ir.DataType[detail["weights"].upper()].numpy()
        return lambda array: array.astype(dtype).astype(array.dtype)

    def fake_quantize(array: Array) -> Array:
        wide, back = _in_rows(array, detail)
        made = np.empty(wide.shape, array.dtype)
        step = max(1, (1 << 21) // max(1, wide.shape[1]))
        codes = None
        if "codes" in solved:
            codes, _ = _in_rows(solved["codes"].reshape(array.shape), detail)
        for start in range(0, len(wide), step):
            part = slice(start, start + step)
            w = wide[part].astype(np.float64)
            if "scales" in solved:
                s, z = (solved[key][part].reshape(-1, 1) for key in ("scales", "zeros"))
            else:
                s, z = _formula(w, detail)
            units = _units(w, s, z, detail) if codes is None else _numbers(codes[part], z, detail)
            made[part] = (units * s).astype(np.float32).astype(array.dtype)
        return back(made)

    return fake_quantize


def _in_rows(array: Array, detail: Mapping[str, Any]) -> tuple[Array, Callable[[Array], Array]]:
    """The elements that share a scale as rows, and the way back."""
    shape, axis, block = array.shape, detail["axis"], detail["block_size"]
    if axis is None:
        return array.reshape(1, -1), lambda rows: rows.reshape(shape)
    if not block:
        swapped = np.swapaxes(array, 0, axis)
        return swapped.reshape(shape[axis], -1), lambda rows: np.swapaxes(
            rows.reshape(swapped.shape), 0, axis
        )
    if detail["flat"]:
        return array.reshape(-1, block), lambda rows: rows.reshape(shape)
    order = [*(a for a in range(len(shape)) if a != axis), axis]
    moved = np.transpose(array, order)
    return moved.reshape(-1, block), lambda rows: np.transpose(
        rows.reshape(moved.shape), np.argsort(order)
    )


def _formula(w: Array, detail: Mapping[str, Any]) -> tuple[Array, Array]:
    """Scale and zero point of each row, round to nearest over its whole range."""
    name, top, bottom = detail["weights"], w.max(1, keepdims=True), w.min(1, keepdims=True)
    m = np.maximum(top, -bottom)
    zero = np.zeros_like(m)
    if name.startswith("int") and not detail["symmetric"]:
        levels = 2 ** detail["bits"] - 1
        low, high = np.minimum(bottom, 0), np.maximum(top, 0)
        s = _stored((high - low) / levels, detail)
        if "zeros" in detail:
            between = np.minimum(np.maximum(-low / s, 0), levels)
            return s, between.astype(_scale_dtype(detail)).astype(np.float64)
        return s, np.minimum(np.maximum(np.around(-low / s), 0), levels)
    if name == "int8":
        s = m / 127
    elif "operand" in detail:  # above 0, and both ends are codes
        most = 2 ** (detail["bits"] - 1)
        s = np.where(top * most > -bottom * (most - 1), top / (most - 1), -bottom / most)
    elif name.startswith("int"):
        extreme = np.where(top > -bottom, -m, m)
        s = extreme / 2 ** (detail["bits"] - 1)
    elif name == "mxfp4":  # OCP MX 1.0, sec. 6.3: the exponent of the largest, less that of 6
        some = np.where(m > 0, m, 1)
        return np.where(m > 0, 2.0 ** (np.floor(np.log2(some)) - 2), 1), zero
    elif name == "nvfp4":
        t, small = detail["tensor_scale"], ir.DataType.FLOAT8E4M3FN.numpy()
        held = np.minimum(m / 6 / t, 448).astype(small).astype(np.float64)
        held = np.where(m > 0, np.maximum(held, 2.0**-9), 1)
        return (held * t).astype(np.float32).astype(np.float64), zero
    else:
        s = m / _FLOAT_MAX.get(name, 1.0)
    return _stored(s, detail), zero


def _stored(s: Array, detail: Mapping[str, Any]) -> Array:
    dtype = _scale_dtype(detail)
    least = 2.0**-24 if dtype == np.float16 else 2.0**-126  # the smallest scale that kernels keep
    held = s.astype(dtype).astype(np.float64)
    held = np.where(np.abs(held) < least, np.copysign(least, s), held)
    held[s == 0] = 1
    return held


def _scale_dtype(detail: Mapping[str, Any]) -> Any:
    kind = detail["scale_type"]
    return ir.DataType.BFLOAT16.numpy() if kind == "bfloat16" else _SCALE_DTYPES[kind]


def _units(w: Array, s: Array, z: Array, detail: Mapping[str, Any]) -> Array:
    """The nearest number that a code can stand for, in units of the scale."""
    name, x = detail["weights"], w / s
    if name.startswith("int"):
        bits = detail["bits"]
        low, high = (
            (0, 2**bits - 1)
            if not detail["symmetric"]
            else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        )
        if "zeros" in detail:
            return _numbers(np.minimum(np.maximum(np.around(x + z), low), high), z, detail)
        low = -127 if (name, low) == ("int8", -128) else low
        return np.asarray(np.minimum(np.maximum(np.around(x) + z, low), high) - z)
    if (table := _table(detail)) is not None:
        return np.asarray(table[np.abs(x[..., None] - table).argmin(-1)])
    limit, dtype = _FLOAT_MAX[name], ir.DataType[str(_STORED_AS.get(name, name)).upper()].numpy()
    return np.minimum(np.maximum(x, -limit), limit).astype(dtype).astype(np.float64)


def _numbers(codes: Array, z: Array, detail: Mapping[str, Any]) -> Array:
    if (table := _table(detail)) is not None:
        return np.asarray(table[codes])
    if detail["weights"] in _FLOAT_MAX:  # kept as bits
        name = _STORED_AS.get(detail["weights"], detail["weights"])
        return np.asarray(codes.view(ir.DataType[str(name).upper()].numpy()).astype(np.float64))
    units = codes.astype(np.float64) - z
    return units.astype(np.float32).astype(np.float64) if "zeros" in detail else units


def _table(detail: Mapping[str, Any]) -> Array | None:
    """The numbers that codes are places of, float32."""
    held = _NF4 if detail["weights"] == "nf4" else detail.get("codebook")
    return None if held is None else np.array(held, np.float32).astype(np.float64)


# arXiv 2305.14314, appendix E, in the digits that float32 holds.
_NF4 = (
    -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
)  # fmt: skip
