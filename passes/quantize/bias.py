"""Bias correction: what rounding adds to the mean of a layer's outputs is taken from its bias.

With W' the quantized weight and x' what the layer reads once all before it are quantized and corrected,

    b' = b + E[W x] - E[W' x']          for every output channel

(Nagel et al., arXiv 1906.04721, sec. 4.2, with means from data: appendix D). Means are those of the
calibration data, in float64. A layer without a bias gets one.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.analysis import linear
from netlathe.analysis.layers import Layer, find_layers
from netlathe.ir import edit, types, weights
from netlathe.ir.provenance import module_path
from netlathe.passes.quantize import ledger
from netlathe.pipeline.ledger import Entry
from netlathe.pipeline.pass_ import Context

Array = npt.NDArray[Any]
CREATED_BY = "quantize"


def correct(model: ir.Model, chosen: Sequence[Entry], ctx: Context) -> list[Entry]:
    """An entry with the correction of every layer whose weight is quantized, in the order of the graph.

    Raises:
        PassError: there is no calibration data.
    """
    from netlathe.execute.statistics import Mean  # torch is an extra
    from netlathe.execute.walk import Walk

    stored = _stored(chosen)
    layers = {layer.node.outputs[0].name or "": layer for layer in _layers(model, stored)}
    reasons = {name: _unfit(layer, model) for name, layer in layers.items()}
    fit = [name for name in layers if not reasons[name]]
    wanted = [Mean(name, _axis(layers[name])) for name in fit]
    results = ctx.collect(model, wanted, needed_by="quantize with correct_bias=True")
    exact = {name: result.array for name, result in zip(fit, results, strict=True)}
    copy = model.clone()
    shifts = {name: _probe(copy, name, layers[name]) for name in fit}
    types.annotate(copy)
    walk = Walk(copy, ctx.calibration, device=ctx.device, progress=ctx.progress)
    initializers = model.graph.initializers
    for name, entry in stored.items():
        if name in initializers:
            array = ledger.quantized(weights.array(initializers[name]), entry)
            walk.replace(name, ir.tensor(array))
    found: dict[str, Entry] = {}
    order = sorted(fit, key=walk.position)
    for name in ctx.progress.track(order, "correcting biases", len(order)):
        layer = layers[name]
        means = walk.collect([Mean(name, _axis(layer))])[0].array
        by = exact[name] - means
        walk.replace(shifts[name], ir.tensor(_shaped(by, layer).astype(_precision(layer))))
        size = float(np.sqrt(np.mean(exact[name] ** 2)))
        reason = f"mean of {len(by)} outputs corrected by {_share(by, size)} of their RMS"
        found[name] = Entry(
            f"{layer.weight.name}: {name}",
            "applied",
            reason,
            module_path(layer.node),
            {"corrects": name},
            arrays={"shift": by},
        )
    for name, reason in reasons.items():
        if reason:
            where = module_path(layers[name].node)
            found[name] = Entry(f"{layers[name].weight.name}: {name}", "refused", reason, where)
    return [found[name] for name in layers]


def add(model: ir.Model, chosen: Sequence[Entry]) -> None:
    """Let the biases of layers take their corrections in."""
    shifts = {e.detail["corrects"]: e.arrays["shift"] for e in chosen if "corrects" in e.detail}
    graph, taken = model.graph, edit.names_in(model.graph)
    for layer in list(find_layers(model)):
        by = shifts.get(layer.node.outputs[0].name or "")
        if by is not None:
            name, shift = linear.bias_name(layer.weight), functools.partial(np.asarray, by)
            linear.add_to_output(graph, layer.node, len(by), shift, name, taken, CREATED_BY)
    types.annotate(model)


def added(model: ir.Model, chosen: Sequence[Entry]) -> ir.Model:
    """A copy of the model with its corrections."""
    copy = model.clone()
    add(copy, [entry for entry in chosen if entry.status == "applied"])
    return copy


def _stored(chosen: Sequence[Entry]) -> dict[str, Entry]:
    return {
        entry.detail["value"]: entry
        for entry in chosen
        if entry.status == "applied" and "value" in entry.detail
    }


def _layers(model: ir.Model, stored: dict[str, Entry]) -> Iterator[Layer]:
    return (layer for layer in find_layers(model) if layer.weight.name in stored)


def _unfit(layer: Layer, model: ir.Model) -> str:
    node = layer.node
    if node.graph is not model.graph:
        return "it stands in a subgraph"
    if node.op_type == "ConvTranspose":
        return "the mean of a transposed convolution differs from position to position"
    if node.op_type == "MatMul" and layer.x is not node.inputs[0]:
        return "its outputs do not lie along the last axis"
    width = (node.outputs[0].shape or (None,))[_axis(layer)]
    return "" if isinstance(width, int) else "the number of its outputs is not known"


def _axis(layer: Layer) -> int:
    return 1 if layer.node.op_type == "Conv" else -1


def _shaped(by: Array, layer: Layer) -> Array:
    """A number for every output channel, as it is added to the outputs."""
    rank = len(layer.node.outputs[0].shape or ())
    return by.reshape(-1, *[1] * (rank - 2)) if layer.node.op_type == "Conv" else by


def _precision(layer: Layer) -> Any:
    dtype = layer.node.outputs[0].dtype
    assert dtype is not None
    return dtype.numpy()


def _probe(copy: ir.Model, name: str, layer: Layer) -> str:
    """Add zeros to the outputs of a layer in a copy of its model; the name of the zeros."""
    (value,) = (v for node in copy.graph for v in node.outputs if v.name == name)
    width = (value.shape or (0,))[_axis(layer)]
    assert isinstance(width, int)
    zeros = _shaped(np.zeros(width, _precision(layer)), layer)
    shift = ir.Value(
        name=edit.unique_name(copy.graph, f"{name}/shift"),
        type=ir.TensorType(value.dtype or ir.DataType.FLOAT),
        shape=ir.Shape(zeros.shape),
        const_value=ir.tensor(zeros),
    )
    copy.graph.register_initializer(shift)
    node = edit.node("Add", [value, shift], dtype=value.dtype, shape=value.shape)
    node.outputs[0].name = edit.unique_name(copy.graph, f"{name}/shifted")
    maker = value.producer()
    assert maker is not None
    uses = list(value.uses())
    copy.graph.insert_after(maker, node)
    for reader, index in uses:
        if reader is not node:
            reader.replace_input_with(index, node.outputs[0])
    if value.is_graph_output():
        copy.graph.outputs[list(copy.graph.outputs).index(value)] = node.outputs[0]
    return shift.name or ""


def _share(by: Array, size: float) -> str:
    largest = float(np.abs(by).max(initial=0.0))
    return f"up to {largest / size:.2g}" if size else f"up to {largest:.2g} absolutely"
