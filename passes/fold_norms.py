"""Makes pre-norm LayerNormalization RMSNormalization, and moves scales and biases of norms into weights.

A LayerNormalization of a value whose mean over the channels is zero is an RMSNormalization of it
(arXiv 2305.14858). The values of a residual stream have mean zero when all that is added to it
has: the writers' weights and biases, with C = I - 11'/d, become

    x = ... + h W + b           x = ... + h (W C) + (b C)

which takes from x its mean, and that no LayerNormalization sees. What normalizes then hands its scale and
bias on to the layers that read it (SliceGPT, arXiv 2401.15024, sec. 3.2):

    (r * g + s) W + b           r (diag(g) W) + (s W + b)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from netlathe.analysis import channels, linear, streams
from netlathe.analysis.linear import Array, Vector, Weight
from netlathe.analysis.operators import TELL_SIZES
from netlathe.analysis.streams import Stream
from netlathe.ir import edit, weights
from netlathe.ir.provenance import module_path
from netlathe.pipeline.ledger import Entry, Status
from netlathe.pipeline.pass_ import Context, Equivalent, Pass, Result, option, options

CREATED_BY = "fold_norms"
_ULP = {
    ir.DataType.DOUBLE: 2.0**-52,
    ir.DataType.FLOAT: 2.0**-23,
    ir.DataType.FLOAT16: 2.0**-10,
    ir.DataType.BFLOAT16: 2.0**-7,
}
# In float32: every weight is rounded once more, and sums run in another order. Either is like one of the
# roundings that a model makes at every node: a sum of n terms is off by 0.2 sqrt(n) ulp of its RMS, the
# largest of 10^5 such by 4.5 times that, which for n = 8192 is 84 ulp. Where a deep model makes more of
# its roundings, the pipeline measures how much.
TOLERANCE = 84 * 2.0**-23


@options
class FoldNorms(Pass):
    """Make pre-norm LayerNormalization RMSNormalization, and fold scales and biases into weights.

    A residual stream is centred where everything that reads it normalizes it. Where a writer's weights
    cannot be centred (a tied embedding, an activation), its value is, by ReduceMean and Sub, if that
    saves more norms than it costs. A norm's scale and bias are folded where only linear layers read it.
    """

    name = "fold_norms"
    exactness = Equivalent(TOLERANCE)

    untie: bool = option(
        default=False, help="give a tied embedding and head a weight each where one of them changes"
    )

    def cannot_follow(self, earlier: Pass) -> str:
        """Codes take in no scale; blocks that share weights have norms and thus scales of their own."""
        if earlier.name == "quantize":
            return "weights are codes by then, which take in no scale"
        if earlier.name == "sparsify":
            return (
                "a mean taken from weights that write to a LayerNormalization's stream fills zeros"
            )
        if self.untie and earlier.name == "tie_blocks":
            return "norms would be folded into a copy of the shared weights for each block"
        return ""

    def run(self, model: ir.Model, ctx: Context) -> Result:
        """Decide about all norms, then centre, then fold."""
        result = Result(changed=False)
        work = _Work(model.graph, edit.names_in(model.graph), result)
        norms = [n for n in model.graph.all_nodes() if not n.domain and n.op_type in streams.NORMS]
        if not norms:
            reason = "the model has no LayerNormalization and no RMSNormalization"
            result.entries.append(Entry("(the model)", "skipped", reason))
            return result
        sites = [_site(norm, model.graph, self.untie) for norm in norms]
        for stream, centring in _plan(sites, self.untie):
            work.centre(stream, centring)
        for site in sites:
            work.finish(site)
        result.changed = any(entry.status == "applied" for entry in result.entries)
        result.statistics["parameters_added"] = work.untied
        return result


# -- one norm -----------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Site:
    """A norm over the last axis, what it multiplies by and adds, and what can be done about it."""

    node: ir.Node
    scale: Vector = field(default_factory=lambda: np.ones(1))
    shift: Vector = field(default_factory=lambda: np.zeros(1))
    layers: Sequence[Weight] = ()  # the linear layers that read it
    kept: str = ""  # why they do not take in scale and shift
    kept_status: Status = "refused"
    not_centred: str = ""  # why its residual stream is not centred
    is_centred: bool = False

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.node.op_type} {self.node.outputs[0].name}"

    @property
    def is_layer_norm(self) -> bool:
        """Whether its input must be centred before it can be an RMSNormalization."""
        return self.node.op_type == "LayerNormalization"

    @property
    def can_be_rms(self) -> bool:
        """Whether an RMSNormalization can say what would be left of it: no bias."""
        return not self.kept or (len(self.shift) > 1 and not self.shift.any())


def _site(node: ir.Node, graph: ir.Graph, untie: bool) -> _Site:
    site, last = _Site(node), (channels.rank(node.inputs[0]) or 0) - 1
    width = channels.width(node.inputs[0], last)
    constants = node.inputs[1:]
    if node.graph is not graph:
        site.kept = "it stands in a subgraph"
    elif len(node.outputs) > 1:
        site.kept = "its mean or deviation is read"
    elif width is None or node.attributes.get_int("axis", -1) not in (last, -1):
        site.kept = "it normalizes over more than the last axis, or over one of unknown size"
    elif not all(_is_vector(value, width) for value in constants):
        site.kept = "its scale or bias is not a constant of the width of its input"
    if site.kept:
        return site
    arrays = [weights.array(v).astype(np.float64).reshape(-1) for v in constants if v is not None]
    site.scale = arrays[0]
    site.shift = arrays[1] if len(arrays) > 1 else np.zeros_like(arrays[0])
    found = linear.readers(node.outputs[0], last)
    if isinstance(found, str):
        site.kept = _post_norm(node) or found
    else:
        site.layers = found
        _judge_layers(site, untie)
    return site


def _is_vector(value: ir.Value | None, width: int) -> bool:
    tensor = value.const_value if value is not None and weights.is_weight(value) else None
    return tensor is not None and tensor.size == width


def _post_norm(node: ir.Node) -> str:
    """The reason where the norm's output is added to: a residual stream starts from it, or goes on."""
    for reader, _ in node.outputs[0].uses():
        if reader.op_type == "Add" and not any(map(weights.is_weight, reader.inputs)):
            maker = node.inputs[0].producer() if node.inputs[0] is not None else None
            post = "post-norm: " if maker is not None and maker.op_type == "Add" else ""
            return f"{post}Add {reader.outputs[0].name} takes its output into a residual stream"
    return ""


def _judge_layers(site: _Site, untie: bool) -> None:
    """Decide whether the layers behind a norm can take in its scale and shift."""
    if not site.layers:
        site.kept = "nothing reads it"
    for weight in site.layers:
        why = linear.shift_refused(weight) if site.shift.any() else ""
        if why:
            site.kept = f"its bias: {weight.node.op_type} {weight.node.outputs[0].name}: {why}"
            return
        if weight.is_alone:
            continue
        shared = f"{weight.value.name} with {weight.other_reader()}"
        if not weight.is_transposed_only:
            site.kept = f"the layer behind it shares {shared}"
            return
        if not untie:
            size = weight.tensor.size
            site.kept = f"the layer behind it shares {shared}: untie=True adds {size} parameters"
            site.kept_status = "skipped"
            return


# -- residual streams ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Writer:
    """Something that is added to a stream, and how its mean is taken from it; if it has one at all."""

    value: ir.Value
    axis: int
    weights: Sequence[Weight] = ()  # to be centred: a weight and a bias, or a constant
    for_all: bool = False  # everything that reads them is in the stream
    why: str = ""  # why the value itself must be centred


def _plan(sites: Sequence[_Site], untie: bool) -> list[tuple[Stream, list[_Writer]]]:
    """The streams to centre; the sites are told which of them stand on one."""
    by_node = {site.node: site for site in sites}
    planned: list[tuple[Stream, list[_Writer]]] = []
    seen: set[ir.Node] = set()
    for site in sites:
        source = site.node.inputs[0]
        last = (channels.rank(source) or 0) - 1
        if not site.is_layer_norm or site.node in seen or source is None or last < 0:
            continue
        stream = streams.grow(source, last)
        if stream is None:
            continue
        on_it = [by_node[use.node] for use in stream.norms if use.node in by_node]
        seen.update(other.node for other in on_it)
        on_it = [other for other in on_it if other.is_layer_norm]
        saved = [other for other in on_it if other.can_be_rms]
        writers = _writers(stream, untie)
        mixed = any(use.node.op_type == "RMSNormalization" for use in stream.norms)
        done = mixed and not stream.others and all(map(_has_no_mean, writers))
        why = "" if done else _not_centred(stream, writers, len(saved or on_it))
        if saved and not why and not done:
            planned.append((stream, writers))
        for other in on_it:
            other.is_centred, other.not_centred = not why, why
    return planned


def _not_centred(stream: Stream, writers: Sequence[_Writer], saved: int) -> str:
    """Why the stream stays as it is; empty if it can be centred, and should be."""
    for value, node in stream.others:
        reader = "the graph's output" if node is None else f"{node.op_type} {node.outputs[0].name}"
        return f"{reader} takes {value.name} of its residual stream without a norm"
    for use in stream.norms:
        if use.node.op_type == "RMSNormalization":
            return f"RMSNormalization {use.node.outputs[0].name} reads the same residual stream"
    by_nodes = [writer for writer in writers if writer.why]
    if len(by_nodes) >= saved:
        first, count = by_nodes[0], len(by_nodes)
        return f"its residual stream is not centred: {first.why} ({count} such for {saved} norms)"
    return ""


def _writers(stream: Stream, untie: bool) -> list[_Writer]:
    found = [_writer(stream, value, axis, untie) for value, axis in stream.writers.items()]
    # A weight that several writers share is theirs alone if there are no other readers.
    uses: dict[ir.Value, int] = {}
    for writer in found:
        for weight in writer.weights:
            uses[weight.value] = uses.get(weight.value, 0) + 1
    return [_settled(writer, uses, untie) for writer in found]


def _writer(stream: Stream, value: ir.Value, axis: int, untie: bool) -> _Writer:
    node, leaves = value.producer(), stream.leaves(value)
    if weights.is_weight(value):
        entries = stream.entries[value]
        held = tuple(Weight(use.node, use.index, value, axis) for use in entries)
        is_table = any(use.node.op_type.startswith("Gather") for use in entries)
        if leaves and is_table and not untie:
            reader = leaves[0].op_type if leaves[0] is not None else "the graph's output"
            return _Writer(value, axis, why=f"{value.name} is shared with {reader}")
        return _Writer(value, axis, held, for_all=not leaves)
    if node is None:
        return _Writer(value, axis, why=f"{value.name} comes from outside")
    if _is_centred(node, axis):
        return _Writer(value, axis)
    if node.op_type in streams.NORMS:
        return _Writer(value, axis, why=f"{node.op_type} {value.name} writes to it (post-norm)")
    weight = linear.production(node, axis)
    if weight is None:
        return _Writer(value, axis, why=f"{node.op_type} {value.name} has no constant weights")
    if weight.group > 1:
        return _Writer(value, axis, why=f"{node.op_type} {value.name} works in groups of channels")
    if leaves:
        reader = leaves[0].op_type if leaves[0] is not None else "the graph's output"
        return _Writer(value, axis, why=f"{reader} reads {value.name} as well")
    if node.op_type == "MatMul" or len(node.inputs) < 3:
        return _Writer(value, axis, (weight,))
    bias = linear.constant(node, 2, 0)
    if bias is None:
        return _Writer(value, axis, why=f"the bias of {node.op_type} {value.name} is computed")
    return _Writer(value, axis, (weight, bias))


def _is_centred(node: ir.Node, axis: int) -> bool:
    """Whether the node takes from a value its mean over the channels."""
    mean = node.inputs[1].producer() if node.op_type == "Sub" and node.inputs[1] else None
    if mean is None or mean.op_type != "ReduceMean" or mean.inputs[0] is not node.inputs[0]:
        return False
    axes = edit.const_array(mean.inputs[1]) if len(mean.inputs) > 1 else None
    kept = mean.attributes.get_int("keepdims", 1) == 1
    return kept and axes is not None and axes.reshape(-1).tolist() == [axis]


def _has_no_mean(writer: _Writer) -> bool:
    """Whether nothing is left to centre, up to one rounding: an earlier run has done it."""
    for weight in writer.weights:
        array = weight.tensor.numpy()
        mean = np.abs(array.astype(np.float64).mean(axis=weight.axis)).max()
        if mean > _ULP[weight.tensor.dtype] * float(np.abs(array).max()):
            return False
    return not writer.why


def _settled(writer: _Writer, uses: dict[ir.Value, int], untie: bool) -> _Writer:
    """The writer with ``for_all`` decided, or with the reason why its weight cannot be changed."""
    if writer.for_all or not writer.weights or weights.is_weight(writer.value):
        return writer
    weight = writer.weights[0]
    if weight.is_alone:
        return writer
    read_elsewhere = weight.value.is_graph_output() or (
        len(weight.value.uses()) != uses[weight.value]
    )
    if not weight.path and not read_elsewhere:
        return dataclasses.replace(writer, for_all=True)
    if untie and weight.is_transposed_only:
        return writer
    why = f"{weight.other_reader()} reads {weight.value.name} too"
    return _Writer(writer.value, writer.axis, why=why)


def _centred(array: Array, axis: int) -> Array:
    return np.asarray(array - array.mean(axis=axis, keepdims=True))


# -- the edits ----------------------------------------------------------------------------------------


@dataclass
class _Work:
    graph: ir.Graph
    taken: set[str]
    result: Result
    untied: int = 0

    def centre(self, stream: Stream, writers: Sequence[_Writer]) -> None:
        """Take the mean from everything that is added to ``stream``."""
        made = (value for node in self.graph for value in node.outputs)
        first = next((value for value in made if value in stream.members), writers[0].value)
        name = first.name or ""
        before = self.untied
        changed: set[ir.Value] = set()
        kept: set[ir.Value] = set()
        for writer in writers:
            if writer.why:
                kept |= self._subtract_mean(stream, writer)
            elif not writer.weights:
                kept.add(writer.value)
            elif writer.value.producer() is None:
                self._centre_constant(writer)
            else:
                self._centre_weights(writer, changed)
        values = [v for v in (*stream.members, *stream.writers) if v.producer() and v not in kept]
        for value in values:
            self._rename(value, "centred")
        by_nodes = [writer.value.name for writer in writers if writer.why]
        norms = [use.node.outputs[0].name for use in stream.norms]
        reason = (
            f"residual stream of {stream.width} channels, read by {len(norms)} norms: mean taken from"
            f" {len(writers) - len(by_nodes)} weights and constants"
        )
        if by_nodes:
            reason += f", and by ReduceMean and Sub from {', '.join(map(str, by_nodes))}"
        detail = {
            "width": stream.width,
            "norms": norms,
            "writers": [w.value.name for w in writers],
            "by_nodes": by_nodes,
            "parameters_added": self.untied - before,
        }
        self._note(name, "applied", reason, module_path(first), detail)

    def _centre_weights(self, writer: _Writer, changed: set[ir.Value]) -> None:
        for weight in writer.weights:
            if weight.value in changed and writer.for_all:
                continue
            changed.add(weight.value)
            is_bias = len(weight.tensor.shape) == 1
            name = linear.bias_name(writer.weights[0].value) if is_bias else _untied_name(weight)
            alone = weight.is_alone or (writer.for_all and not is_bias)
            self.untied += 0 if alone else weight.tensor.size
            linear.change(self.graph, weight, _centred, name, self.taken, for_all=alone)

    def _centre_constant(self, writer: _Writer) -> None:
        first, *rest = writer.weights
        if not writer.for_all:
            self.untied += first.tensor.size
        name = _untied_name(first)
        made = linear.change(self.graph, first, _centred, name, self.taken, for_all=writer.for_all)
        for weight in rest:
            weight.node.replace_input_with(weight.operand, made)
        edit.drop_if_unread(writer.value)

    def _subtract_mean(self, stream: Stream, writer: _Writer) -> set[ir.Value]:
        """Centre a value, or what is looked up in a table, by nodes; the values that stay as they are."""
        places: dict[ir.Value, tuple[int, list[tuple[ir.Node, int]]]] = {}
        if weights.is_weight(writer.value):
            for use in stream.entries[writer.value]:
                looked_up = use.node.outputs[0]
                places[looked_up] = (stream.members[looked_up], list(looked_up.uses()))
        else:
            entries = stream.entries[writer.value]
            places[writer.value] = (writer.axis, [(use.node, use.index) for use in entries])
        for value, (axis, uses) in places.items():
            axes = edit.constant(
                self.graph, np.array([axis], np.int64), f"{value.name}_mean_axes", self.taken
            )
            shape = ir.Shape([1 if i == axis else dim for i, dim in enumerate(value.shape or ())])
            maker = value.producer()
            mean = edit.node(
                "ReduceMean",
                [value, axes],
                {"keepdims": 1, "noop_with_empty_axes": 0},
                name=edit.unique_name(self.graph, f"{value.name}_mean", self.taken),
                dtype=value.dtype,
                shape=shape,
                like=maker,
                created_by=CREATED_BY,
            )
            centred = edit.node(
                "Sub",
                [value, mean.outputs[0]],
                name=edit.unique_name(self.graph, f"{value.name}_centred", self.taken),
                dtype=value.dtype,
                shape=value.shape,
                like=maker,
                created_by=CREATED_BY,
            )
            if maker is not None:
                self.graph.insert_after(maker, [mean, centred])
            else:
                self.graph.insert_before(self.graph[0], [mean, centred])
            for node, index in uses:
                node.replace_input_with(index, centred.outputs[0])
        return set(places)

    # -- norms ----------------------------------------------------------------------------------------

    def finish(self, site: _Site) -> None:
        """Do what can be done about one norm, and say so."""
        node = site.node
        name, where = node.outputs[0].name or "", module_path(node)
        becomes_rms = site.is_layer_norm and site.is_centred and site.can_be_rms
        if site.is_layer_norm and not becomes_rms:
            why = site.not_centred or site.kept
            status: Status = "refused" if site.not_centred else site.kept_status
            self._note(name, status, f"stays LayerNormalization: {why}", where)
            return
        folds = not site.kept and not (_is_one(site.scale) and not site.shift.any())
        if not becomes_rms and not folds:
            why = f"keeps its scale: {site.kept}" if site.kept else "its scale is one already"
            self._note(name, site.kept_status if site.kept else "skipped", why, where)
            return
        said = ["LayerNormalization became RMSNormalization"] if becomes_rms else []
        detail: dict[str, Any] = {"became_rms": becomes_rms}
        if folds:
            detail["layers"] = names = [weight.value.name for weight in site.layers]
            detail["parameters_added"] = added = self._fold(site)
            what = "scale and bias" if site.shift.any() else "scale"
            said.append(f"{what} folded into {', '.join(map(str, names))}")
            if added:
                said.append(f"{added} parameters more, for a weight that was shared")
        elif site.kept:
            said.append(f"it keeps its scale: {site.kept}")
        if becomes_rms:
            self._replace(site)
        self._note(name, "applied", "; ".join(said), where, detail)

    def _fold(self, site: _Site) -> int:
        """Move scale and shift into the layers; returns how many parameters untying adds."""
        before = self.untied
        for weight in site.layers:
            if site.shift.any():
                width = linear.num_outputs(weight)
                if weight.node.op_type == "MatMul" and linear.bias_of(weight.node, width):
                    # The sum behind it is as it was.
                    self._rename(weight.node.outputs[0], "unshifted")
                linear.add_to_output(
                    self.graph,
                    weight.node,
                    width,
                    linear.shifted(weight, site.shift),
                    linear.bias_name(weight.value),
                    self.taken,
                    CREATED_BY,
                )
            self.untied += 0 if weight.is_alone else weight.tensor.size
            change = linear.scaled(weight, site.scale)
            linear.change(self.graph, weight, change, _untied_name(weight), self.taken)
        self._set_to_one(site.node)
        ends = {weight.node for weight in site.layers}
        stack = [site.node.outputs[0]]
        while stack:  # what the layers read is without scale and shift from now on
            value = stack.pop()
            readers = (reader for reader, _ in value.uses() if reader not in ends)
            moves = [reader for reader in readers if reader.op_type not in TELL_SIZES]
            stack += [output for move in moves for output in move.outputs]
            self._rename(value, "unscaled")
        return self.untied - before

    def _set_to_one(self, node: ir.Node) -> None:
        scale = node.inputs[1]
        assert scale is not None and scale.const_value is not None
        tensor = scale.const_value
        ones = ir.tensor(np.ones(tensor.shape.numpy(), tensor.dtype.numpy()), name=scale.name)
        if len(scale.uses()) == 1:
            scale.const_value = ones
        else:
            made = edit.constant(self.graph, ones, f"{scale.name}_one", self.taken)
            node.replace_input_with(1, made)

    def _replace(self, site: _Site) -> None:
        """Put an RMSNormalization in the place of the LayerNormalization; its bias goes."""
        node = site.node
        output = node.outputs[0]
        attributes = {n: node.attributes[n] for n in ("axis", "epsilon", "stash_type")}
        made = edit.node(
            "RMSNormalization", node.inputs[:2], attributes, dtype=output.dtype, shape=output.shape
        )
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        edit.replace(node, [made], {output: made.outputs[0]}, CREATED_BY)
        if bias is not None:
            edit.drop_if_unread(bias)

    # -- notes ----------------------------------------------------------------------------------------

    def _rename(self, value: ir.Value, suffix: str) -> None:
        """A new name for a value that is another than it was."""
        before = value.name or "value"
        value.name = edit.unique_name(self.graph, f"{before}_{suffix}", self.taken)
        self.result.renamed[before] = None

    def _note(
        self,
        name: str,
        status: Status,
        reason: str,
        where: str,
        detail: dict[str, Any] | None = None,
    ) -> None:
        # A skip is one that untie=False asks for, or a norm with nothing left to do.
        left_out = status == "skipped"
        self.result.entries.append(Entry(name, status, reason, where, detail or {}, left_out))


def _is_one(scale: Vector) -> bool:
    return bool((scale == 1).all())


def _untied_name(weight: Weight) -> str:
    return f"{weight.value.name}_untied"
