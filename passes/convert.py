"""Computes in float16 or bfloat16 where that is safe: weights and activations take half the bytes.

    y = MatMul(x: f32, w: f32)        ->   h = MatMul(Cast(x): f16, w: f16)
    z = Softmax(y)                         z = Softmax(Cast(h): f32)

:mod:`netlathe.analysis.precision` says what stays in float32 and why. Casts stand only where half and
float32 meet. Inputs and outputs of the graph keep their types.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.analysis import precision
from netlathe.analysis.precision import FLOAT, Verdict
from netlathe.diagnostics import Diagnostic, PassError, did_you_mean
from netlathe.ir import edit, fold, normal, provenance, weights
from netlathe.ir.provenance import module_path
from netlathe.pipeline.ledger import Entry, Status
from netlathe.pipeline.pass_ import (
    ChoosingPass,
    Context,
    Lossy,
    Reference,
    Result,
    option,
    options,
)

Array = npt.NDArray[Any]

# Edit and reference round the same float32 numbers at the same places, and the judge computes what
# is in half precision in float32. Only where a kernel adds in another order may a number fall on the other
# side of a rounding: by one unit in the last place, of a few numbers among many.
TOLERANCE = {"float16": 2.0**-10, "bfloat16": 2.0**-7}
_DTYPE = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
_MOST_NAMED = 3  # operators that a reason names


@options
class Convert(ChoosingPass):
    """Compute in float16 or bfloat16 where that is safe, and in float32 where it is not."""

    name = "convert"
    exactness = Lossy()

    dtype: Literal["float16", "bfloat16"] = option(
        default="float16", help="the half-precision format"
    )
    keep: tuple[str, ...] = option(
        default=(),
        help='what stays in float32: module paths, operators or values, with wildcards: "lm_head", "Gelu"',
    )

    def choose(self, model: ir.Model, ctx: Context) -> list[Entry]:
        """Decide about every node that reads or makes float32; entries are for nodes of one module.

        Raises:
            PassError: a pattern of ``keep`` matches nothing.
        """
        self._check_patterns(model.graph)
        nodes = model.graph.num_nodes()
        found = precision.survey(model.graph, _DTYPE[self.dtype], self._kept)
        groups: dict[tuple[str, str], list[Verdict]] = {}
        for verdict in ctx.progress.track(found, "looking at nodes", nodes):
            groups.setdefault((module_path(verdict.node), verdict.reason), []).append(verdict)
        seen: set[str] = set()
        return [self._entry(path, group, seen) for (path, _), group in groups.items()]

    def edit(self, model: ir.Model, chosen: Sequence[Entry], ctx: Context) -> Result:
        """Change the types of all that was chosen, and put Casts where types meet."""
        plan = _Plan.of(model.graph, chosen)
        if not plan.nodes:
            return Result(False, list(chosen))
        before = weights.num_bytes(model)
        _Editor(model.graph, _DTYPE[self.dtype], plan).run()
        normal.normalize(model)  # casts of booleans become one, small constants are computed
        statistics: dict[str, float] = {
            "nodes": len(plan.nodes),
            "nodes_in_float32": sum(len(e.detail["nodes"]) for e in chosen if not _applies(e)),
            "bytes_saved": before - weights.num_bytes(model),
        }
        return Result(True, list(chosen), {}, statistics)

    def simulate(self, before: ir.Model, chosen: Sequence[Entry]) -> Reference:
        """The float32 model in which all that a converted node reads or makes is rounded."""
        rounding = _ROUNDINGS[self.dtype]
        reference = _Reference(before.graph, _DTYPE[self.dtype], rounding)
        for entry in chosen:
            if _applies(entry):
                reference.round(entry.detail["nodes"], set(entry.detail["saturated"]))
        before.graph.sort()
        return Reference(before, TOLERANCE[self.dtype])

    # -- choosing ---------------------------------------------------------------------------------

    def _kept(self, node: ir.Node) -> str:
        pattern = next((p for p in self.keep if _matches(node, p)), None)
        return "" if pattern is None else f"kept: it matches {pattern!r}"

    def _check_patterns(self, graph: ir.Graph) -> None:
        known = {name for node in graph for name in (node.op_type, module_path(node)) if name}
        problems = [
            Diagnostic(
                "convert.keep",
                f"keep={pattern!r} matches no module, operator or value of the model",
                help=did_you_mean(pattern, sorted(known)),
            )
            for pattern in self.keep
            if not any(_matches(node, pattern) for node in graph)
        ]
        if problems:
            raise PassError(problems)

    def _entry(self, path: str, group: Sequence[Verdict], seen: set[str]) -> Entry:
        """One entry for nodes of a module that have one fate; ``seen`` are the weights named so far."""
        counts = Counter(verdict.node.op_type for verdict in group)
        names = [op for op, _ in counts.most_common()]
        listed = ", ".join(names[:_MOST_NAMED]) + (", ..." if len(names) > _MOST_NAMED else "")
        number = f"{len(group)} node{'s' if len(group) > 1 else ''}"
        first = group[0]
        candidate = _name(first.node)
        if first.reason:
            status: Status = "skipped" if first.by_request else "refused"
            reason = f"{number} in float32 ({listed}): {first.reason}"
            nodes = [_name(verdict.node) for verdict in group]
            return Entry(candidate, status, reason, path, {"nodes": nodes}, first.by_request)
        read = {
            name: value
            for verdict in group
            for at in verdict.inputs
            if weights.is_weight(value := verdict.node.inputs[at]) and value is not None
            if (name := value.name) is not None
        }
        new = {name: value for name, value in read.items() if name not in seen}
        seen.update(new)
        saturated = sorted({name for verdict in group for name in verdict.saturated})
        reason = f"{number} in {self.dtype} ({listed})"
        if new:
            reason += f", with {len(new)} weight{'s' if len(new) > 1 else ''}"
        if saturated:
            reason += (
                f"; what stands for infinity in {', '.join(saturated)} becomes the largest number"
            )
        detail = {
            "dtype": self.dtype,
            "nodes": [
                {"node": _name(v.node), "inputs": list(v.inputs), "outputs": list(v.outputs)}
                for v in group
            ],
            "saturated": saturated,
        }
        return Entry(candidate, "applied", reason, path, detail)


def _applies(entry: Entry) -> bool:
    return entry.status == "applied"


def _name(node: ir.Node) -> str:
    """The name of its first output that has one; unique in the graph."""
    return next((value.name for value in node.outputs if value.name), "")


def _matches(node: ir.Node, pattern: str) -> bool:
    if pattern == node.op_type or provenance.matches(module_path(node), pattern):
        return True
    return any(fnmatch.fnmatchcase(value.name or "", pattern) for value in node.outputs)


# -- editing --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """The chosen nodes, with the inputs and outputs that change their type."""

    nodes: Mapping[ir.Node, Mapping[str, Sequence[int]]]
    saturated: frozenset[str]

    @staticmethod
    def of(graph: ir.Graph, chosen: Sequence[Entry]) -> _Plan:
        by_name = {_name(node): node for node in graph}
        applied = [entry for entry in chosen if _applies(entry)]
        nodes = {by_name[item["node"]]: item for e in applied for item in e.detail["nodes"]}
        return _Plan(nodes, frozenset(name for e in applied for name in e.detail["saturated"]))


class _Editor:
    """Goes through the graph once; a value then exists in half precision, in float32, or in both."""

    def __init__(self, graph: ir.Graph, dtype: ir.DataType, plan: _Plan) -> None:
        self._graph = graph
        self._dtype = dtype
        self._plan = plan
        self._taken = edit.names_in(graph)
        self._halves: dict[ir.Value, ir.Value] = {}  # float32 value -> the same in half precision
        self._floats: dict[ir.Value, ir.Value] = {}  # and the other way round
        self._made: set[ir.Value] = set()  # by converted nodes, so in half precision

    def run(self) -> None:
        """Convert what was chosen, then the outputs of the graph back."""
        for node in list(self._graph):
            if node in self._plan.nodes:
                self._convert(node)
            elif node.op_type not in precision.READS_ANY:
                self._keep(node)
        for at, value in enumerate(self._graph.outputs):
            if value in self._made:
                self._restore_output(at, value)
        for old, new in self._halves.items():
            if old.is_initializer() and not old.uses() and new.is_initializer():
                name = old.name
                edit.drop_if_unread(old)
                if name not in self._graph.initializers:
                    new.name = name

    def _convert(self, node: ir.Node) -> None:
        detail = self._plan.nodes[node]
        for at in detail["inputs"]:
            value = node.inputs[at]
            assert value is not None
            if value not in self._made:
                node.replace_input_with(at, self._half(value, node))
        for at in detail["outputs"]:
            node.outputs[at].type = ir.TensorType(self._dtype)
            self._made.add(node.outputs[at])
        if node.op_type == "Attention":
            node.attributes["softmax_precision"] = ir.AttrInt64("softmax_precision", FLOAT.value)
        if node.op_type == "ConstantOfShape":
            number = precision.fill(node)
            largest = precision.LARGEST[self._dtype]
            array = (
                np.clip(number, -largest, largest)
                if abs(number[0]) >= precision.ENDLESS
                else number
            )
            tensor = ir.tensor(array.astype(self._dtype.numpy()))
            node.attributes["value"] = ir.AttrTensor("value", tensor)

    def _keep(self, node: ir.Node) -> None:
        """Let a node, and what is inside it, read float32 where it read float32 before."""
        for reader in (node, *precision.inside(node)):
            for at, value in enumerate(reader.inputs):
                if value is not None and value in self._made:
                    reader.replace_input_with(at, self._float(value, node))
        for attribute in node.attributes.values():
            for body in _bodies(attribute):
                for at, value in enumerate(body.outputs):
                    if value in self._made:
                        body.outputs[at] = self._float(value, node)

    def _half(self, value: ir.Value, reader: ir.Node) -> ir.Value:
        if value not in self._halves:
            if weights.is_weight(value) and self._has_half(value):
                self._halves[value] = self._half_weight(value)
            else:
                self._halves[value] = self._cast(value, self._dtype, reader)
        return self._halves[value]

    def _float(self, value: ir.Value, reader: ir.Node) -> ir.Value:
        if value not in self._floats:
            self._floats[value] = self._cast(value, FLOAT, reader)
        return self._floats[value]

    def _cast(self, value: ir.Value, to: ir.DataType, reader: ir.Node) -> ir.Value:
        name = edit.unique_name(self._graph, f"{value.name}_{to.name.lower()}", self._taken)
        attributes = {"to": to.value, "saturate": 1, "round_mode": "up"}
        node = edit.node(
            "Cast",
            [value],
            attributes,
            name=name,
            dtype=to,
            shape=value.shape,
            like=value.producer() or reader,
            created_by=Convert.name,
        )
        self._graph.insert_before(reader, node)
        return node.outputs[0]

    def _has_half(self, weight: ir.Value) -> bool:
        """Whether a weight is stored in half precision; one that float32 reads as well is cast."""
        plan = self._plan.nodes
        alone = all(node in plan and at in plan[node]["inputs"] for node, at in weight.uses())
        return alone or weight.name in self._plan.saturated

    def _half_weight(self, weight: ir.Value) -> ir.Value:
        base = weight.const_value
        assert base is not None
        function = self._halved(weight.name)
        name = f"{weight.name}_{self._dtype.name.lower()}"
        dims = base.shape.numpy()
        tensor: ir.TensorProtocol = weights.derived(base, function, self._dtype, dims, name)
        if tensor.nbytes <= fold.LAZY_BYTES:
            tensor = ir.Tensor(tensor.numpy(), dtype=self._dtype, name=name)
        return edit.constant(self._graph, tensor, name, self._taken)

    def _halved(self, name: str | None) -> Callable[[Array], Array]:
        """What makes half precision of the constant called ``name``."""
        to, largest = self._dtype.numpy(), precision.LARGEST[self._dtype]
        if name in self._plan.saturated:
            return lambda array: np.clip(array, -largest, largest).astype(to)
        return lambda array: array.astype(to)

    def _restore_output(self, at: int, value: ir.Value) -> None:
        name = value.name
        if value not in self._floats:
            maker = value.producer()
            assert maker is not None
            made = edit.node(
                "Cast", [value], {"to": FLOAT.value, "saturate": 1, "round_mode": "up"}
            )
            made.outputs[0].type, made.outputs[0].shape = ir.TensorType(FLOAT), value.shape
            self._graph.append(provenance.mark(made, like=maker, created_by=Convert.name))
            self._floats[value] = made.outputs[0]
        self._graph.outputs[at] = self._floats[value]
        stem = f"{name}_{self._dtype.name.lower()}"
        value.name = edit.unique_name(self._graph, stem, self._taken)
        self._floats[value].name = name


def _bodies(attribute: ir.Attr) -> Iterator[ir.Graph]:
    if attribute.type == ir.AttributeType.GRAPH:
        body = attribute.as_graph()
        yield body
        yield from body.subgraphs()


# -- the reference --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rounding:
    """A binary format: fraction bits, exponent of the smallest normal number, largest number."""

    bits: int
    least_exponent: int
    largest: float

    def __call__(self, array: Array, *, saturate: bool) -> Array:
        """The nearest numbers of the format, ties to even, as float32."""
        flat = array.reshape(-1)
        made = np.empty(flat.shape, np.float32)
        for start in range(0, flat.size, 1 << 21):
            w = flat[start : start + (1 << 21)].astype(np.float64)
            _, exponent = np.frexp(w)  # |w| in [2**(exponent - 1), 2**exponent)
            step = np.ldexp(1.0, np.maximum(exponent - 1, self.least_exponent) - self.bits)
            r = np.where(np.isfinite(w), np.around(w / step) * step, w)
            over = np.abs(r) > self.largest
            r[over] = np.sign(r[over]) * (self.largest if saturate else np.inf)
            made[start : start + (1 << 21)] = r
        return made.reshape(array.shape)


_ROUNDINGS = {
    "float16": _Rounding(10, -14, 65504.0),
    "bfloat16": _Rounding(7, -126, 255 * 2.0**120),
}


class _Reference:
    """Puts roundings (a Cast there and back) around nodes of a float32 graph."""

    def __init__(self, graph: ir.Graph, dtype: ir.DataType, rounding: _Rounding) -> None:
        self._graph = graph
        self._dtype = dtype
        self._rounding = rounding
        self._nodes = {_name(node): node for node in graph}
        self._taken = edit.names_in(graph)
        self._rounded: dict[tuple[ir.Value, bool], ir.Value] = {}
        self._results: set[ir.Value] = set()  # rounded already

    def round(self, items: Sequence[Mapping[str, Any]], saturated: set[str]) -> None:
        """Round what the nodes of ``items`` read, and what they make."""
        for item in items:
            node = self._nodes[item["node"]]
            for at in item["inputs"]:
                value = node.inputs[at]
                if value is not None and value not in self._results:
                    node.replace_input_with(at, self._read(value, node, value.name in saturated))
            if node.op_type == "ConstantOfShape":
                saturate = node.outputs[0].name in saturated
                fill = self._rounding(precision.fill(node), saturate=saturate)
                node.attributes["value"] = ir.AttrTensor("value", ir.tensor(fill))
            else:
                for at in item["outputs"]:
                    self._make(node, node.outputs[at])

    def _read(self, value: ir.Value, node: ir.Node, saturate: bool) -> ir.Value:
        key = (value, saturate)
        if key not in self._rounded:
            base = value.const_value if weights.is_weight(value) else None
            if base is not None:
                name, dims = f"{value.name}_rounded", base.shape.numpy()
                tensor = weights.derived(base, self._rounder(saturate), FLOAT, dims, name)
                self._rounded[key] = edit.constant(self._graph, tensor, name, self._taken)
            else:
                pair = self._pair(value)
                self._graph.insert_before(node, pair)
                self._rounded[key] = pair[-1].outputs[0]
        return self._rounded[key]

    def _rounder(self, saturate: bool) -> Callable[[Array], Array]:
        return lambda array: self._rounding(array, saturate=saturate)

    def _make(self, node: ir.Node, value: ir.Value) -> None:
        readers = list(value.uses())
        places = [at for at, output in enumerate(self._graph.outputs) if output is value]
        pair = self._pair(value)
        self._graph.insert_after(node, pair)
        result = pair[-1].outputs[0]
        self._results.add(result)
        for reader, at in readers:
            reader.replace_input_with(at, result)
        for at in places:
            self._graph.outputs[at] = result
        if places:
            name = value.name
            value.name = edit.unique_name(self._graph, f"{name}_exact", self._taken)
            result.name = name

    def _pair(self, value: ir.Value) -> list[ir.Node]:
        there = ir.node("Cast", [value], {"to": self._dtype.value})
        back = ir.node("Cast", there.outputs, {"to": FLOAT.value})
        for node, dtype in ((there, self._dtype), (back, FLOAT)):
            name = f"{value.name}_{dtype.name.lower()}"
            node.outputs[0].name = edit.unique_name(self._graph, name, self._taken)
            node.outputs[0].type, node.outputs[0].shape = ir.TensorType(dtype), value.shape
        return [there, back]
