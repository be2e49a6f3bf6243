"""Stores the key-value cache of a model in 8 or 4 bits, at the inputs and outputs where it comes and goes.

    present = Concat(past, new)   ->   q, s = quantized new          one scale for a head of a token
                                       present = Concat(past, q)     int8, or uint8 with two codes each
                                       present.scale = Concat(past.scale, s)
                                       what read present reads DequantizeLinear(present, present.scale)

What a token left in the cache stays as it was stored: nothing is quantized twice, and prompts taken in
whole or by parts give the same. :mod:`netlathe.ir.coded` has the formulas (KIVI, arXiv 2402.02750, sec. 3.1,
eq. 1-2, by token for keys and values alike, as a cache grows by tokens). Whoever runs the model hands
``present.*`` back as ``past*.*``, codes, scales and zero points; an empty cache has 0 positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from netlathe.diagnostics import Diagnostic, PassError, did_you_mean
from netlathe.ir import coded, edit, provenance, types
from netlathe.ir.coded import Coding
from netlathe.ir.provenance import module_path
from netlathe.pipeline.ledger import Entry
from netlathe.pipeline.pass_ import (
    ChoosingPass,
    Context,
    Lossy,
    Pass,
    Reference,
    Result,
    option,
    options,
)

FLOAT, UINT8 = ir.DataType.FLOAT, ir.DataType.UINT8
# Both sides do the same float32 arithmetic; 4 ulp for a kernel that adds in another order.
TOLERANCE = 4 * 2.0**-23


@options
class QuantizeCache(ChoosingPass):
    """Keep the key-value cache in int8 or int4, with a scale for each head of each token."""

    name = "quantize_cache"
    keeps_operators = True
    exactness = Lossy()

    codes: Literal["int8", "int4"] = option(
        default="int8", help="int8: symmetric; int4: with zero points, two codes in a byte"
    )
    scales: Literal["float32", "float16"] = option(
        default="float16", help="the type in which scales are stored"
    )
    ignore: tuple[str, ...] = option(
        default=(), help="inputs to leave as they are, whole or in part, with wildcards"
    )

    def cannot_follow(self, earlier: Pass) -> str:
        """Behind a cast no input is recognised as a cache."""
        return "casts stand in front of the cache by then" if earlier.name == "convert" else ""

    def choose(self, model: ir.Model, ctx: Context) -> list[Entry]:
        """Decide about every floating-point input of three dims or more.

        Raises:
            PassError: a pattern matches none of them.
        """
        found = [v for v in model.graph.inputs if _is_candidate(v)]
        names = [v.name or "" for v in found]
        for pattern in self.ignore:
            if not any(provenance.matches(name, pattern) for name in names):
                raise PassError(
                    Diagnostic(
                        "quantize_cache.ignore",
                        f"ignore={pattern!r} matches no input that may be a cache",
                        help=did_you_mean(pattern, names),
                    )
                )
        return [self._entry(value) for value in found]

    def _entry(self, value: ir.Value) -> Entry:
        name, where = value.name or "", module_path(value)
        for pattern in self.ignore:
            if provenance.matches(name, pattern):
                return Entry(
                    name, "skipped", f"ignored: it matches {pattern!r}", where, left_out=True
                )
        join = _join(value)
        if join is None:
            reason = "no output is it with new positions behind it: no cache"
            return Entry(name, "skipped", reason, where, left_out=True)
        if problem := self._problem(value, join):
            return Entry(name, "refused", problem, where)
        output = join.outputs[0].name or ""
        width = value.shape[-1] if value.shape is not None else None
        assert isinstance(width, int)
        beside = 2 + 2 * (self.scales == "float32") + (self.codes == "int4")
        bits = 4 if self.codes == "int4" else 8
        before, after = 4 * width, width * bits // 8 + beside
        reason = (
            f"{self.codes}, a {self.scales} scale for {width} elements:"
            f" {after} bytes for {before}, here and in {output}"
        )
        detail = {"input": name, "output": output, "codes": self.codes, "scales": self.scales}
        return Entry(name, "applied", reason, where, detail)

    def _problem(self, value: ir.Value, join: ir.Node) -> str:
        if value.dtype != FLOAT:
            return (
                f"{value.dtype.name.lower() if value.dtype else 'its type'}: only float32 is taken"
            )
        width = value.shape[-1] if value.shape is not None else None
        if not isinstance(width, int):
            return "its last dim is not fixed"
        if self.codes == "int4" and width % 2:
            return f"{width} codes of 4 bits are no whole bytes"
        assert value.shape is not None
        rank = len(value.shape)
        if join.attributes.get_int("axis", 0) % rank == rank - 1:
            return "it grows along the axis that shares a scale"
        for node, _ in value.uses():
            if node is join:
                continue
            if node.op_type != "Shape":
                return f"{node.op_type} {node.outputs[0].name} reads it as well"
            end = node.attributes.get_int("end", rank)
            if self.codes == "int4" and (end > rank - 1 or end == 0):
                return f"{node.outputs[0].name} asks for its width, which halves"
        return ""

    def edit(self, model: ir.Model, chosen: Sequence[Entry], ctx: Context) -> Result:
        """Let every chosen cache hold codes."""
        applied = [entry for entry in chosen if entry.status == "applied"]
        taken = edit.names_in(model.graph)
        by_name = {value.name: value for value in model.graph.inputs}
        for entry in applied:
            _Rewriter(model, by_name[entry.detail["input"]], entry.detail, taken).run()
        types.annotate(model)
        return Result(bool(applied), list(chosen), {}, {"caches": len(applied)} if applied else {})

    def simulate(self, before: ir.Model, chosen: Sequence[Entry]) -> Reference:
        """The model with floats that are what the codes would be."""
        for entry in chosen:
            if entry.status == "applied":
                _emulate(before.graph, entry.detail)
        return Reference(before, TOLERANCE)


def _is_candidate(value: ir.Value) -> bool:
    floats = value.dtype is not None and value.dtype.is_floating_point()
    return floats and value.shape is not None and len(value.shape) >= 3


def _join(value: ir.Value) -> ir.Node | None:
    """The Concat that puts new positions behind ``value`` and whose result is an output."""
    for node, index in value.uses():
        if node.op_type == "Concat" and not node.domain and index == 0 and len(node.inputs) == 2:
            if node.outputs[0].is_graph_output():
                return node
    return None


# -- the edit -----------------------------------------------------------------------------------------


class _Rewriter:
    """Rewrites one cache."""

    def __init__(self, model: ir.Model, past: ir.Value, detail: Any, taken: set[str]) -> None:
        self.model, self.graph, self.past, self.taken = model, model.graph, past, taken
        self.number: Any = detail["codes"]
        self.scale_type: Any = detail["scales"]
        join = _join(past)
        assert join is not None and past.shape is not None
        self.join, self.last = join, len(past.shape) - 1
        width = past.shape[-1]
        assert isinstance(width, int)
        self.width = width
        self.nodes: list[ir.Node] = []

    def run(self) -> None:
        """Quantize what comes in new, join codes, dequantize what is read."""
        past, join = self.past, self.join
        new, present = join.inputs[1], join.outputs[0]
        assert new is not None and past.shape is not None
        name, output = past.name or "past", present.name or "present"
        axis = join.attributes.get_int("axis", 0)
        parts = self._quantized(new)
        inputs, outputs = [past], [present]
        for value, what in zip(parts[1:], ("scale", "zero_point"), strict=False):
            inputs.append(self._beside(past, f"{name}.{what}", value))
            outputs.append(self._beside(present, f"{output}.{what}", value))
        past.type = ir.TensorType(UINT8 if self.number == "int4" else ir.DataType.INT8)
        if self.number == "int4":
            past.shape = ir.Shape([*past.shape[:-1], self.width // 2])
        joined = [
            self("Concat", old, value, name=f"{output}_{what}", axis=axis)
            for old, value, what in zip(inputs, parts, ("codes", "scales", "zeros"), strict=False)
        ]
        read = self._dequantized(joined, output)
        for node in self.nodes:
            provenance.mark(node, created_by="quantize_cache", like=join)
        self.graph.insert_before(join, self.nodes)
        for reader, index in list(present.uses()):
            reader.replace_input_with(index, read)
        at = list(self.graph.outputs).index(present)
        place = list(self.graph.inputs).index(past)
        for made in reversed(inputs[1:]):
            self.graph.inputs.insert(place + 1, made)
        self.graph.outputs[at] = joined[0]
        for made in reversed(joined[1:]):
            self.graph.outputs.insert(at + 1, made)
        present.name = edit.unique_name(self.graph, f"{output}_float", self.taken)
        for made, wanted in zip(joined, outputs, strict=True):
            made.name = output if wanted is present else wanted.name
        edit.remove_dead(self.graph, [join])
        for stem in (name, output):
            zero = f"{stem}.zero_point" if self.number == "int4" else ""
            how = Coding(self.number, self.scale_type, f"{stem}.scale", zero)
            coded.record(self.model, stem, how)

    def _beside(self, value: ir.Value, name: str, like: ir.Value) -> ir.Value:
        """A tensor beside the codes: of one element where they have a vector."""
        assert value.shape is not None
        free = edit.unique_name(self.graph, name, self.taken)
        kind = ir.DataType[{"float32": "FLOAT"}.get(self.scale_type, "FLOAT16")]
        dtype = kind if name.endswith(".scale") else UINT8
        return ir.Value(
            name=free, type=ir.TensorType(dtype), shape=ir.Shape([*value.shape[:-1], 1])
        )

    def _quantized(self, x: ir.Value) -> list[ir.Value]:
        """Codes, scales and zero points of new positions."""
        name = x.name or "x"
        if self.number == "int8":
            most = self._extreme("ReduceMax", self("Abs", x, name=f"{name}_size"), f"{name}_most")
            share = self("Div", most, np.float32(127), name=f"{name}_share")
            scale, wide = self._scales(share, name)
            codes = self(
                "QuantizeLinear", x, wide, name=f"{name}_codes", axis=self.last,
                block_size=self.width, output_dtype=ir.DataType.INT8.value, precision=0, saturate=1,
            )  # fmt: skip
            return [codes, scale]
        none, top = np.float32(0), np.float32(15)
        low = self("Min", self._extreme("ReduceMin", x, f"{name}_low"), none, name=f"{name}_bottom")
        high = self("Max", self._extreme("ReduceMax", x, f"{name}_high"), none, name=f"{name}_top")
        span = self("Sub", high, low, name=f"{name}_span")
        scale, wide = self._scales(self("Div", span, top, name=f"{name}_share"), name)
        below = self("Div", self("Neg", low, name=f"{name}_below"), wide, name=f"{name}_offset")
        zero = self(
            "Clip", self("Round", below, name=f"{name}_near"), none, top, name=f"{name}_zero"
        )
        units = self("Round", self("Div", x, wide, name=f"{name}_units"), name=f"{name}_rounded")
        moved = self("Add", units, zero, name=f"{name}_moved")
        codes = self._cast(
            self("Clip", moved, none, top, name=f"{name}_held"), UINT8, f"{name}_int4"
        )
        low_half, high_half = self._halves(codes, name)
        raised = self("BitShift", high_half, np.uint8(4), name=f"{name}_raised", direction="LEFT")
        packed = self("BitwiseOr", low_half, raised, name=f"{name}_packed")
        return [packed, scale, self._cast(zero, UINT8, f"{name}_zero_point")]

    def _halves(self, codes: ir.Value, name: str) -> Sequence[ir.Value]:
        half = self.width // 2
        sizes = edit.constant(self.graph, np.array([half, half]), f"{name}_sizes", self.taken)
        node = ir.node("Split", [codes, sizes], {"axis": self.last}, num_outputs=2)
        for value, what in zip(node.outputs, ("low", "high"), strict=True):
            value.name = edit.unique_name(self.graph, f"{name}_{what}_half", self.taken)
        self.nodes.append(node)
        return node.outputs

    def _scales(self, share: ir.Value, name: str) -> tuple[ir.Value, ir.Value]:
        """Scales as they are stored, and in float32."""
        least = np.float32(coded.LEAST[self.scale_type])
        held = self("Max", share, least, name=f"{name}_scale")
        if self.scale_type == "float32":
            return held, held
        held = self._cast(held, ir.DataType.FLOAT16, f"{name}_scale_half")
        return held, self._cast(held, FLOAT, f"{name}_scale_wide")

    def _dequantized(self, joined: Sequence[ir.Value], name: str) -> ir.Value:
        """What stands in the cache, as float32."""
        codes, scale, *zero = joined
        if self.scale_type == "float16":
            scale = self._cast(scale, FLOAT, f"{name}_scale_wide")
        if self.number == "int4":
            low = self("BitwiseAnd", codes, np.uint8(15), name=f"{name}_low")
            high = self("BitShift", codes, np.uint8(4), name=f"{name}_high", direction="RIGHT")
            codes = self("Concat", low, high, name=f"{name}_apart", axis=self.last)
        return self(
            "DequantizeLinear", codes, scale, *zero, name=f"{name}_dequantized", axis=self.last,
            block_size=self.width, output_dtype=0,
        )  # fmt: skip

    def _extreme(self, op_type: str, x: ir.Value, name: str) -> ir.Value:
        return self(
            op_type, x, np.array([self.last]), name=name, keepdims=1, noop_with_empty_axes=0
        )

    def _cast(self, x: ir.Value, to: ir.DataType, name: str) -> ir.Value:
        return self("Cast", x, name=name, to=to.value, saturate=1, round_mode="up")

    def __call__(self, op_type: str, *inputs: Any, name: str, **attributes: Any) -> ir.Value:
        held = [
            x
            if isinstance(x, ir.Value)
            else edit.constant(self.graph, np.asarray(x), f"{name}_by", self.taken)
            for x in inputs
        ]
        free = edit.unique_name(self.graph, name, self.taken)
        self.nodes.append(edit.node(op_type, held, attributes, name=free))
        return self.nodes[-1].outputs[0]


# -- the reference --------------------------------------------------------------------------------------


def _emulate(graph: ir.Graph, detail: Any) -> None:
    """Round what comes in and what is added, in floats; names and types stay."""
    past = next(v for v in graph.inputs if v.name == detail["input"])
    join = next(n for n, i in past.uses() if n.op_type == "Concat" and i == 0)
    new, taken = join.inputs[1], edit.names_in(graph)
    assert new is not None
    nodes: list[ir.Node] = []

    def add(op_type: str, *inputs: Any, **attributes: Any) -> ir.Value:
        held = [
            x if isinstance(x, ir.Value) else edit.constant(graph, np.asarray(x), "kept", taken)
            for x in inputs
        ]
        name = edit.unique_name(graph, "kept", taken)
        nodes.append(edit.node(op_type, held, attributes, name=name))
        return nodes[-1].outputs[0]

    def stored(share: ir.Value) -> ir.Value:
        least = {"float32": 2.0**-120, "float16": 2.0**-24}[detail["scales"]]
        held = add("Max", share, np.float32(least))
        if detail["scales"] == "float16":
            held = add("Cast", held, to=ir.DataType.FLOAT16.value, saturate=1, round_mode="up")
            held = add("Cast", held, to=FLOAT.value, saturate=1, round_mode="up")
        return held

    ends: dict[str, Any] = {"keepdims": 1, "noop_with_empty_axes": 0}
    for position, x in enumerate((past, new)):
        high = add("ReduceMax", x, np.array([-1]), **ends)
        low = add("ReduceMin", x, np.array([-1]), **ends)
        if detail["codes"] == "int8":
            most = add("Max", high, add("Neg", low))
            s = stored(add("Div", most, np.float32(127)))
            units = add("Clip", add("Round", add("Div", x, s)), np.float32(-128), np.float32(127))
        else:
            top, bottom = add("Max", high, np.float32(0)), add("Min", low, np.float32(0))
            s = stored(add("Div", add("Sub", top, bottom), np.float32(15)))
            offset = add("Round", add("Div", add("Neg", bottom), s))
            z = add("Min", add("Max", offset, np.float32(0)), np.float32(15))
            moved = add("Add", add("Round", add("Div", x, s)), z)
            units = add("Sub", add("Clip", moved, np.float32(0), np.float32(15)), z)
        join.replace_input_with(position, add("Mul", units, s))
    graph.insert_before(join, nodes)
