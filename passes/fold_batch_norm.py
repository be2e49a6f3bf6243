"""Folds BatchNormalization of inference into the linear layer before or behind it.

With a = scale / sqrt(variance + epsilon) and c = bias - a * mean, per channel:

    a * (w x + b) + c    =  (a w) x + (a b + c)         the layer before it: Conv, ConvTranspose, MatMul
    w (a x + c) + b      =  (w a) x + (w c + b)         the layers behind it; a Conv only without padding,
                                                        whose zeros stand for x = 0, not for a x + c = 0
    m (a x + c) + k      =  (m a) x + (m c + k)         products and sums that follow, one a channel
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from netlathe.analysis import channels, linear
from netlathe.ir import edit, weights
from netlathe.ir.provenance import module_path
from netlathe.pipeline.ledger import Entry, Status
from netlathe.pipeline.pass_ import Context, Equivalent, Pass, Result, options

CREATED_BY = "fold_batch_norm"
# In float32: every weight is rounded once more, and sums run in another order. Either is like one of the
# roundings that a model makes at every node: a sum of n terms is off by 0.2 sqrt(n) ulp of its RMS, the
# largest of 10^5 such by 4.5 times that, which for n = 8192 is 84 ulp. Where a deep model makes more of
# its roundings, the pipeline measures how much.
TOLERANCE = 84 * 2.0**-23


@options
class FoldBatchNorm(Pass):
    """Fold every BatchNormalization of inference into the linear layer before or behind it.

    Products and sums with constants that follow it are taken in first. A layer whose weight something
    else reads is left alone, unless all its uses are followed by the same normalization. What has no such
    neighbour stays: one BatchNormalization is one kernel, Mul and Add would be two.
    """

    name = "fold_batch_norm"
    exactness = Equivalent(TOLERANCE)

    def cannot_follow(self, earlier: Pass) -> str:
        """Codes take in no factor."""
        return "weights are codes by then" if earlier.name == "quantize" else ""

    def run(self, model: ir.Model, ctx: Context) -> Result:
        """Fold what can be folded, in the order of the graph."""
        graph = model.graph
        result = Result(changed=False)
        norms = [
            n for n in graph.all_nodes() if n.domain == "" and n.op_type == "BatchNormalization"
        ]
        work = _Work(graph, norms, edit.names_in(graph), result)
        for norm in norms:
            if norm.graph is not None:  # not folded together with an earlier one
                work.fold(norm)
        if not norms:
            reason = "the model has no BatchNormalization"
            result.entries.append(Entry("(the model)", "skipped", reason))
        result.changed = any(entry.status == "applied" for entry in result.entries)
        return result


@dataclass(frozen=True)
class _Affine:
    """What a BatchNormalization does to a channel."""

    factor: linear.Vector
    shift: linear.Vector

    def of_bias(self, array: linear.Array, axis: int) -> linear.Array:
        """A bias of the layer before, as it is behind the normalization."""
        sizes = [1] * array.ndim
        sizes[axis] = -1
        return array * self.factor.reshape(sizes) + self.shift.reshape(sizes)


@dataclass(frozen=True)
class _Before:
    """The layer whose output a BatchNormalization reads, and the constants that it adds to it."""

    weight: linear.Weight
    biases: Sequence[linear.Weight]


@dataclass
class _Work:
    graph: ir.Graph
    norms: Sequence[ir.Node]
    taken: set[str]
    result: Result

    def fold(self, norm: ir.Node) -> None:
        """Fold one BatchNormalization and write its ledger entry."""
        affine = _affine(norm)
        if norm.graph is not self.graph:
            affine = "it stands in a subgraph"
        if isinstance(affine, str):
            self._note(norm, "refused", affine)
            return
        absorbed = self._absorb(norm)
        affine = _affine(norm)
        assert not isinstance(affine, str)
        before = self._before_all(norm)
        if not isinstance(before, str):
            self._fold_before(before, affine)
            return
        behind = _behind(norm, affine)
        if not isinstance(behind, str):
            self._fold_behind(norm, behind, affine)
            return
        why = f"the layer before: {before}; behind: {behind}"
        if absorbed:
            self._note(norm, "applied", f"took in {absorbed} behind it; stays, {why}")
        else:
            self._note(norm, "skipped", why)

    def _note(self, norm: ir.Node, status: Status, reason: str, **detail: Any) -> None:
        name = norm.outputs[0].name or ""
        self.result.entries.append(Entry(name, status, reason, module_path(norm), detail))

    def _absorb(self, norm: ir.Node) -> str:
        """Take products and sums with constants, one a channel, into scale and bias; says which."""
        said: list[str] = []
        while (found := _constant_behind(norm)) is not None:
            node, vector = found
            times = node.op_type == "Mul"
            change = _Affine(vector, vector * 0) if times else _Affine(vector * 0 + 1, vector)
            parameters = [linear.constant(norm, index, 0) for index in ((1, 2) if times else (2,))]
            if not all(p is not None and _stays_finite(p, change) for p in parameters):
                break
            for parameter in parameters:
                assert parameter is not None
                name = f"{parameter.value.name}_folded"
                linear.change(self.graph, parameter, change.of_bias, name, self.taken)
            said.append(node.op_type)
            old, output = node.outputs[0], norm.outputs[0]
            name = output.name or ""
            self.result.renamed[name] = None
            output.name = edit.unique_name(self.graph, f"{name}_folded", self.taken)
            if not old.is_graph_output():
                output.name, old.name = old.name, None
            edit.redirect(old, output)
            edit.remove_dead(self.graph, [node])
        return " and ".join(said)

    # -- into the layer before ------------------------------------------------------------------------

    def _before_all(self, norm: ir.Node) -> dict[ir.Node, _Before] | str:
        """The layer before ``norm``; with it, where they share its weight, those before its equals."""
        before = _before(norm)
        if isinstance(before, str) or before.weight.is_alone:
            return before if isinstance(before, str) else {norm: before}
        weight = before.weight
        found = {other: _before(other) for other in self.norms if other.graph is not None}
        twins = {
            other: layer
            for other, layer in found.items()
            if isinstance(layer, _Before)
            and layer.weight.value is weight.value
            and layer.weight.node.op_type == "Conv"
            and [b.value for b in layer.biases] == [b.value for b in before.biases]
            and all(b.node is layer.weight.node for b in layer.biases)
            and _parameters(other) == _parameters(norm)
        }
        if len(twins) != len(weight.value.uses()) or weight.value.is_graph_output():
            return f"{weight.other_reader()} reads its weight {weight.value.name} too"
        return twins

    def _fold_before(self, layers: Mapping[ir.Node, _Before], affine: _Affine) -> None:
        made: ir.Value | None = None
        for number, (norm, layer) in enumerate(layers.items()):
            weight = layer.weight
            name = linear.bias_name(weight.value)
            if number == 0:
                change = linear.scaled(weight, affine.factor)
                linear.change(self.graph, weight, change, "", self.taken, for_all=True)
                made = self._shift(layer, affine, name)
            else:
                weight.node.resize_inputs(3)
                weight.node.replace_input_with(2, made)
            self._note(
                norm,
                "applied",
                f"folded into {weight.value.name} of the {weight.node.op_type} before it",
                weight=weight.value.name,
                bias=made.name if made is not None else None,
                channels=len(affine.factor),
            )
            self._take_out(norm, weight.node)

    def _shift(self, layer: _Before, affine: _Affine, name: str) -> ir.Value:
        """Bring the layer's biases behind the normalization; the one that carries its shift."""
        weight = layer.weight
        if not layer.biases:
            return linear.add_to_output(
                self.graph,
                weight.node,
                len(affine.shift),
                lambda: affine.shift,
                name,
                self.taken,
                CREATED_BY,
            )
        first, *rest = layer.biases
        for bias in rest:
            change = linear.scaled(bias, affine.factor)
            linear.change(self.graph, bias, change, bias.value.name or name, self.taken)
        return linear.change(self.graph, first, affine.of_bias, name, self.taken)

    def _take_out(self, norm: ir.Node, layer: ir.Node) -> None:
        """Let what ``norm`` reads stand for its output; nothing on the way has the value it had."""
        old, source = norm.outputs[0], norm.inputs[0]
        assert source is not None
        value: ir.Value | None = source
        while value is not None:
            name, maker = value.name or "value", value.producer()
            self.result.renamed[name] = None
            value.name = edit.unique_name(self.graph, f"{name}_folded", self.taken)
            value = maker.inputs[0] if maker is not None and maker is not layer else None
        if not old.is_graph_output():
            source.name, old.name = old.name, None
        edit.redirect(old, source)
        edit.remove_dead(self.graph, [norm])

    # -- into the layers behind -----------------------------------------------------------------------

    def _fold_behind(self, norm: ir.Node, layers: Sequence[linear.Weight], affine: _Affine) -> None:
        for weight in layers:
            if affine.shift.any():
                linear.add_to_output(
                    self.graph,
                    weight.node,
                    linear.num_outputs(weight),
                    linear.shifted(weight, affine.shift),
                    linear.bias_name(weight.value),
                    self.taken,
                    CREATED_BY,
                )
            linear.change(self.graph, weight, linear.scaled(weight, affine.factor), "", self.taken)
        names = [weight.value.name for weight in layers]
        self._note(
            norm,
            "applied",
            f"folded into {', '.join(map(str, names))} behind it",
            weights=names,
            channels=len(affine.factor),
        )
        source = norm.inputs[0]
        assert source is not None
        self.result.renamed[norm.outputs[0].name or ""] = None
        edit.redirect(norm.outputs[0], source)
        edit.remove_dead(self.graph, [norm])


def _parameters(norm: ir.Node) -> tuple[object, ...]:
    return (*norm.inputs[1:], norm.attributes.get_float("epsilon"))


def _affine(norm: ir.Node) -> _Affine | str:
    """What ``norm`` does to every channel, or why that is not fixed."""
    if norm.attributes.get_int("training_mode", 0):
        return "it is in training mode: its statistics are those of the batch"
    given = norm.inputs[1:5]
    if computed := [value for value in given if not weights.is_weight(value)]:
        name = computed[0].name if computed[0] is not None else "an input"
        return f"its parameter {name} is not a constant"
    arrays = [weights.array(value).astype(np.float64) for value in given if value is not None]
    scale, bias, mean, variance = arrays
    epsilon = norm.attributes.get_float("epsilon", 1e-5) or 0.0
    with np.errstate(divide="ignore", invalid="ignore"):
        factor = scale / np.sqrt(variance + epsilon)
        shift = bias - factor * mean
    if not (np.isfinite(factor).all() and np.isfinite(shift).all()):
        return (
            "a variance of zero or less, or a parameter that is no number, gives no finite factor"
        )
    return _Affine(factor, shift)


def _stays_finite(parameter: linear.Weight, change: _Affine) -> bool:
    """Whether the changed parameter is within the range of its number format."""
    array = parameter.tensor.numpy()
    with np.errstate(over="ignore", invalid="ignore"):
        made = change.of_bias(array.astype(np.float64), 0).astype(array.dtype)
    return bool(np.isfinite(made.astype(np.float64)).all())


def _constant_behind(norm: ir.Node) -> tuple[ir.Node, linear.Vector] | None:
    """A Mul or Add of a constant a channel that alone reads what ``norm`` makes, and the constant."""
    output, width = norm.outputs[0], channels.width(norm.inputs[1], 0)
    if output.is_graph_output() or len(output.uses()) != 1:
        return None
    ((node, index),) = output.uses()
    if node.domain or node.op_type not in ("Add", "Mul") or index or node.graph is not norm.graph:
        return None
    axis = channels.aligned(node.inputs[1], output, 1)
    array = edit.const_array(node.inputs[1])
    if array is None or width is None or (channels.rank(output) or 0) < array.ndim:
        return None
    if array.size == 1:
        return node, np.full(width, array.reshape(()).astype(np.float64))
    if axis is None or axis < 0 or array.shape[axis] != width or array.size != width:
        return None
    return node, array.reshape(-1).astype(np.float64)


def _before(norm: ir.Node) -> _Before | str:
    """The linear layer whose output ``norm`` reads, possibly moved or with a bias added, or why none."""
    value, axis, width = norm.inputs[0], 1, channels.width(norm.inputs[1], 0)
    assert value is not None
    biases: list[linear.Weight] = []
    reader = norm
    while True:
        maker = value.producer()
        if maker is None or maker.graph is not norm.graph:
            return f"there is none, {value.name} comes from outside"
        if value.is_graph_output():
            return f"{value.name} is also an output of the graph"
        if others := [node for node, _ in value.uses() if node is not reader]:
            return f"{others[0].op_type} {others[0].outputs[0].name} reads {value.name} too"
        weight = linear.production(maker, axis)
        if weight is not None:
            if maker.op_type != "MatMul" and len(maker.inputs) > 2:
                bias = linear.constant(maker, 2, 0)
                if bias is None:
                    return f"the bias of {maker.op_type} {value.name} is not a constant"
                biases.append(bias)
            return _Before(weight, biases)
        at = channels.aligned(maker.inputs[1], value, axis) if maker.op_type == "Add" else None
        added = linear.constant(maker, 1, at) if at is not None and at >= 0 else None
        sources = [a for a, b in channels.moved(maker).items() if b == axis]
        if added is not None and channels.width(added.value, added.axis) == width:
            biases.append(added)
        elif sources and len(maker.outputs) == 1:
            (axis,) = sources
        else:
            return f"{maker.op_type} {value.name} is not linear with a constant weight"
        reader, value = maker, maker.inputs[0]
        assert value is not None


def _behind(norm: ir.Node, affine: _Affine) -> list[linear.Weight] | str:
    """The linear layers that read ``norm``'s output, if they can take it in, or why not."""
    found = linear.readers(norm.outputs[0], 1)
    if isinstance(found, str) or not found:
        return found or "nothing reads it"
    for weight in found:
        if not weight.is_alone:
            return f"{weight.other_reader()} reads {weight.value.name} too"
        why = linear.shift_refused(weight) if affine.shift.any() else ""
        if why:
            return f"{weight.node.op_type} {weight.node.outputs[0].name}: {why}"
    return found
