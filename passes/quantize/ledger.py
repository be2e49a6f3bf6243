"""What a ledger entry says of a quantized weight, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.ir import weights
from netlathe.passes.quantize import rounding
from netlathe.passes.quantize.layout import Layout
from netlathe.passes.quantize.scheme import Scheme
from netlathe.pipeline.ledger import Entry

Array = npt.NDArray[Any]


def detail(name: str, own: Layout, scheme: Scheme) -> dict[str, Any]:
    """Scheme and layout as JSON data."""
    known: dict[str, Any] = {"tensor_scale": scheme.tensor_scale} if scheme.tensor_scale else {}
    if scheme.fractional:
        known["zeros"] = scheme.zeros
    if scheme.has_codebook:
        known["codebook"] = list(scheme.codebook)
    if scheme.operand:
        known["operand"] = True
    return {
        "value": name,
        "weights": scheme.weights,
        "symmetric": scheme.symmetric,
        "scale_type": scheme.scales,
        "bits": scheme.format.bits,
        "dims": list(own.dims),
        "axis": own.axis,
        "block_size": own.block,
        "flat": own.flat,
        "scales": 0 if scheme.format.kind == "cast" else own.groups,
        **known,
        "bytes": scheme.num_bytes(math.prod(own.dims), own.groups),
    }


def layout_of(entry: Entry) -> Layout:
    """The layout that :func:`detail` wrote down."""
    d = entry.detail
    return Layout(tuple(d["dims"]), d["axis"], d["block_size"], d["flat"])


def scheme_of(entry: Entry) -> Scheme:
    """The scheme that :func:`detail` wrote down, its granularity being the layout's."""
    d = entry.detail
    return Scheme(
        weights=d["weights"],
        symmetric=d["symmetric"],
        scales=d["scale_type"],
        zeros=d.get("zeros", "integer"),
        codebook=tuple(d.get("codebook", ())),
        tensor_scale=d.get("tensor_scale", 0.0),
        operand=d.get("operand", False),
    )


# What an activation's entry says: it is carried out where the weights are that it meets in products.
FOLLOWS = {"follows": "weights"}


def weights_of_tokens(chosen: Sequence[Entry]) -> list[str]:
    """The weights that are multiplied with activations which get a scale per token."""
    stored = {entry.detail["value"] for entry in chosen if "value" in entry.detail}
    entries = [entry for entry in chosen if "token" in entry.detail]
    return [name for entry in entries for name in entry.detail["weights"] if name in stored]


def scales_of_tokens(chosen: Sequence[Entry]) -> str:
    """What those scales are for: a "token", or the whole "tensor"."""
    return next((e.detail["scales"] for e in chosen if "token" in e.detail), "token")


def scales_beside_biases(model: ir.Model, chosen: Sequence[Entry]) -> dict[str, Array]:
    """The scales of the weights whose biases become integers."""
    wanted = {entry.detail["weight"] for entry in chosen if "bias" in entry.detail}
    found = {}
    for entry in chosen:
        if entry.detail.get("value") in wanted:
            name, own, scheme = entry.detail["value"], layout_of(entry), scheme_of(entry)
            array = weights.array(model.graph.initializers[name])
            found[name] = parameters(array, own, scheme, entry.arrays)[0]
    return found


def parameters(
    array: Array, own: Layout, scheme: Scheme, solved: Mapping[str, Array]
) -> tuple[Array, Array]:
    """Scale and zero point of every group: what was searched for, else the formula."""
    if "scales" in solved:
        return solved["scales"], solved["zeros"]
    return rounding.ranges(array, own, scheme)


def quantized(array: Array, entry: Entry) -> Array:
    """What the weight of an applied entry is read as."""
    own, scheme = layout_of(entry), scheme_of(entry)
    scale, zero = parameters(array, own, scheme, entry.arrays)
    codes = solved_codes(entry, scheme)
    if codes is None:
        codes = rounding.codes(array, own, scheme, scale, zero)
    made = rounding.numbers(codes, own, scheme, scale, zero, np.float32)
    return np.asarray(made.astype(array.dtype))


def solved_codes(entry: Entry, scheme: Scheme) -> Array | None:
    """The codes that were solved for, if any were: of small floats they are kept as bytes."""
    held = entry.arrays.get("codes")
    return None if held is None else held.view(scheme.code_type)
