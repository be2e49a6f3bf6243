"""Activations as QuantizeLinear and DequantizeLinear pairs: the form in which models are interchanged.

    static    q = QuantizeLinear(x, scale, zero)            x' = DequantizeLinear(q, scale, zero)
    token     s = max |x| / largest along the last axis     q = QuantizeLinear(x, s, block_size=width)
    tensor    q, s, z = DynamicQuantizeLinear(x)            x' = DequantizeLinear(q, s, z)

A pair stands on what a product with a quantized weight reads. Static scales go further, so that a runtime
may compute whole stretches in integers: a convolution's output has a pair behind its bias and Relu, and
what sums, means, joins and moves make of such values has one as well, moves on the scale of what they
move. The bias of a convolution becomes int32 in units of both scales. A runtime that knows the pattern
runs integer kernels; any other gives the same numbers in float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.analysis import linear
from netlathe.ir import edit, provenance, weights
from netlathe.passes.quantize.number import NUMBERS
from netlathe.passes.quantize.token import SMALLEST

Array = npt.NDArray[Any]
CREATED_BY = "quantize"

_PRODUCTS = frozenset({"Conv", "ConvTranspose", "MatMul"})
# Of values on a grid these make one that gets a grid of its own; runtimes have integer kernels for them.
_ARITHMETIC = frozenset(
    {
        "Add",
        "AveragePool",
        "Concat",
        "GlobalAveragePool",
        "LeakyRelu",
        "Mul",
        "ReduceMean",
        "Sigmoid",
    }
)
_MOVES = frozenset(
    {"Flatten", "Identity", "MaxPool", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
)


@dataclass
class Places:
    """Where pairs go, in the order of the graph."""

    inputs: dict[ir.Value, list[ir.Node]] = field(default_factory=dict)  # the products that read it
    whole: dict[ir.Value, None] = field(default_factory=dict)  # every reader gets what is left
    moved: dict[ir.Value, ir.Value] = field(default_factory=dict)  # has the grid of another
    biases: dict[ir.Node, ir.Value] = field(default_factory=dict)  # of convolutions

    @property
    def values(self) -> list[ir.Value]:
        """All of them."""
        return list(dict.fromkeys((*self.inputs, *self.whole)))

    def grid_of(self, value: ir.Value) -> ir.Value:
        """The value whose grid it has."""
        while value in self.moved:
            value = self.moved[value]
        return value


def products(graph: ir.Graph, names: Iterable[str]) -> Iterator[tuple[ir.Node, ir.Value, ir.Value]]:
    """Products of float32 with a weight called so, what they read, and the weight."""
    wanted = set(names)
    for node in graph:
        if node.op_type in _PRODUCTS and not node.domain:
            x, weight = node.inputs[0], node.inputs[1]
            behind = _origin(weight)
            if x is None or behind is None or x.dtype != ir.DataType.FLOAT:
                continue
            if behind.name in wanted and not weights.is_weight(x):
                yield node, x, behind


def _origin(value: ir.Value | None) -> ir.Value | None:
    """The initializer that a product's weight is a transposed form of."""
    while value is not None and (maker := value.producer()) is not None:
        if maker.op_type != "Transpose" or maker.domain:
            return None
        value = maker.inputs[0]
    return value


def places(model: ir.Model, names: Iterable[str], *, static: bool) -> Places:
    """Where pairs go if the weights called ``names`` are quantized; ``static`` scales go beyond inputs."""
    made, graph = Places(), model.graph
    found = {node: x for node, x, _ in products(graph, names)}
    for node, x in found.items():
        made.inputs.setdefault(x, []).append(node)
    if static:
        _beyond(made, graph, found)
    return made


def _beyond(made: Places, graph: ir.Graph, found: Mapping[ir.Node, ir.Value]) -> None:
    possible: dict[ir.Value, None] = {}  # values that integer kernels could make
    moves: list[ir.Node] = []
    for node in graph:
        output = node.outputs[0]
        if node in found:
            output = _behind(node)
            possible[output] = None
            if node.op_type != "MatMul" and not output.is_graph_output():
                made.whole[output] = None
        elif node.domain or output.dtype != ir.DataType.FLOAT or len(node.outputs) != 1:
            continue
        elif node.op_type in _ARITHMETIC:
            read = [v for v in _floats(node) if v is not None]
            if read and all(v in possible for v in read):
                output = _through(output)
                made.whole |= dict.fromkeys((*read, output))
                possible[output] = None
        elif node.op_type in _MOVES and node.inputs[0] in possible:
            moves.append(node)
            possible[output] = None
    # What a product reads is on a grid whoever reads it, if integer kernels make it.
    made.whole |= {v: None for v in made.inputs if v in possible}
    for node in reversed(moves):
        source, output = node.inputs[0], node.outputs[0]
        if output in made.whole and source is not None:
            made.whole[source] = None
            made.moved[output] = source
    for node in found:
        bias = node.inputs[2] if node.op_type == "Conv" and len(node.inputs) > 2 else None
        if bias is not None and weights.is_weight(bias) and len(bias.uses()) == 1:
            made.biases[node] = bias
    order = {v: at for at, v in enumerate(_all_values(graph))}
    made.whole = dict.fromkeys(sorted(made.whole, key=lambda v: order[v]))


def _floats(node: ir.Node) -> list[ir.Value | None]:
    """The operands that hold numbers; a constant is one of them."""
    return list(node.inputs[:1]) if node.op_type == "ReduceMean" else list(node.inputs)


def _all_values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    for node in graph:
        yield from node.outputs


def _behind(node: ir.Node) -> ir.Value:
    """What a product makes once its bias and Relu are done."""
    output = node.outputs[0]
    weight = node.inputs[1]
    if node.op_type == "MatMul" and weight is not None and weight.shape is not None:
        width = weight.shape[-1]
        held = linear.bias_of(node, width) if isinstance(width, int) else None
        output = held.node.outputs[0] if held is not None else output
    return _through(output)


def _through(value: ir.Value) -> ir.Value:
    """Behind a Relu or a Clip at zero that alone reads ``value``."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output():
        return value
    node = uses[0][0]
    low = edit.const_array(node.inputs[1]) if len(node.inputs) > 1 else None
    is_clip = node.op_type == "Clip" and low is not None and low.size == 1 and float(low) == 0.0
    return node.outputs[0] if not node.domain and (node.op_type == "Relu" or is_clip) else value


# -- the edit -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """What the ledger says of one value: its number type, and its grid unless that is found as it comes."""

    number: str
    scales: str  # "static", "token", "tensor"
    scale: float = 1.0
    zero: int = 0


class Rewriter:
    """Puts pairs on values; ``biases`` maps convolutions to units of their bias: [channels]."""

    def __init__(self, model: ir.Model, places_: Places, pairs: Mapping[str, Pair]) -> None:
        self.graph, self.places, self.pairs = model.graph, places_, pairs
        self.taken = edit.names_in(model.graph)
        self._like: ir.Node | None = None
        self._nodes: list[ir.Node] = []

    def run(self, steps: Mapping[str, Array]) -> None:
        """Write every pair; ``steps`` gives the units of biases that become int32, by their name."""
        for value in self.places.values:
            pair = self.pairs.get(value.name or "")
            if pair is not None:
                self._pair(value, pair)
        for node, bias in self.places.biases.items():
            if (step := steps.get(bias.name or "")) is not None:
                self._bias(node, bias, step)

    def _pair(self, value: ir.Value, pair: Pair) -> None:
        whole = value in self.places.whole
        readers = self.places.inputs.get(value, [])
        uses = [(n, i) for n, i in value.uses() if whole or (n in readers and i == 0)]
        is_output = value.is_graph_output() and whole
        maker = value.producer()
        self._like, self._nodes = maker or (uses[0][0] if uses else None), []
        name = value.name or "x"
        result = getattr(self, f"_{pair.scales}")(value, pair, name)
        for node in self._nodes:
            provenance.mark(node, created_by=CREATED_BY, like=self._like)
        if maker is not None:
            self.graph.insert_after(maker, self._nodes)
        else:
            self.graph.insert_before(self.graph[0], self._nodes)
        for reader, index in uses:
            reader.replace_input_with(index, result)
        if is_output:
            outputs = self.graph.outputs
            outputs[list(outputs).index(value)] = result
            value.name = edit.unique_name(self.graph, f"{name}_float", self.taken)
            result.name = name

    def _static(self, value: ir.Value, pair: Pair, name: str) -> ir.Value:
        scale, number = (
            self._constant(np.float32(pair.scale), f"{name}_scale"),
            NUMBERS[pair.number],
        )
        if number.is_float:
            # Not by a zero point: ONNX Runtime 1.32 takes a Relu away in front of one that is 0.
            codes = self._quantize(
                [value, scale], name, pair.number, axis=1, block_size=0, to=number.dtype.value
            )
            return self._dequantize([codes, scale], name, axis=1, block_size=0)
        zero = edit.constant(
            self.graph, number.zero_point(pair.zero), f"{name}_zero_point", self.taken
        )
        codes = self._quantize([value, scale, zero], name, pair.number, axis=1, block_size=0)
        return self._dequantize([codes, scale, zero], name, axis=1, block_size=0)

    def _token(self, value: ir.Value, pair: Pair, name: str) -> ir.Value:
        number = NUMBERS[pair.number]
        assert value.shape is not None
        last, width = len(value.shape) - 1, value.shape[-1]
        assert isinstance(width, int)  # a product with a weight sums over it
        axes = self._constant(np.array([last]), f"{name}_axes")
        size = self._make("Abs", [value], f"{name}_size")
        most = self._make(
            "ReduceMax", [size, axes], f"{name}_most", keepdims=1, noop_with_empty_axes=0
        )
        largest = self._constant(np.float32(number.highest), f"{name}_largest")
        step = self._make("Div", [most, largest], f"{name}_step")
        scale = self._make(
            "Max", [step, self._constant(SMALLEST, f"{name}_least")], f"{name}_scale"
        )
        codes = self._quantize(
            [value, scale], name, pair.number, axis=last, block_size=width, to=number.dtype.value
        )
        return self._dequantize([codes, scale], name, axis=last, block_size=width)

    def _tensor(self, value: ir.Value, pair: Pair, name: str) -> ir.Value:
        node = ir.node("DynamicQuantizeLinear", [value], num_outputs=3)
        for output, what in zip(node.outputs, (pair.number, "scale", "zero_point"), strict=True):
            output.name = edit.unique_name(self.graph, f"{name}_{what}", self.taken)
        self._nodes.append(node)
        return self._dequantize(list(node.outputs), name, axis=1, block_size=0)

    def _bias(self, node: ir.Node, bias: ir.Value, step: Array) -> None:
        """int32 in units of both scales: DequantizeLinear(codes, step, axis=0)."""
        name = bias.name or "bias"
        codes = bias_codes(weights.array(bias), step)
        inputs = [self._constant(codes, f"{name}_int32"), self._constant(step, f"{name}_scale")]
        self._nodes, self._like = [], node
        result = self._dequantize(inputs, name, axis=0, block_size=0)
        provenance.mark(self._nodes[0], created_by=CREATED_BY, like=node)
        self.graph.insert_before(node, self._nodes)
        node.replace_input_with(2, result)
        edit.drop_if_unread(bias)

    # -- pieces -------------------------------------------------------------------------------------

    def _quantize(
        self,
        inputs: Sequence[ir.Value],
        name: str,
        what: str,
        *,
        axis: int,
        block_size: int,
        to: int = 0,
    ) -> ir.Value:
        return self._make(
            "QuantizeLinear",
            inputs,
            f"{name}_{what}",
            axis=axis,
            block_size=block_size,
            output_dtype=to,
            precision=0,
            saturate=1,
        )

    def _dequantize(
        self, inputs: Sequence[ir.Value], name: str, *, axis: int, block_size: int
    ) -> ir.Value:
        return self._make(
            "DequantizeLinear",
            inputs,
            f"{name}_dequantized",
            axis=axis,
            block_size=block_size,
            output_dtype=0,
        )

    def _make(self, op_type: str, inputs: Sequence[ir.Value], name: str, **attrs: Any) -> ir.Value:
        free = edit.unique_name(self.graph, name, self.taken)
        self._nodes.append(edit.node(op_type, inputs, attrs, name=free))
        return self._nodes[-1].outputs[0]

    def _constant(self, array: Any, name: str) -> ir.Value:
        return edit.constant(self.graph, np.asarray(array), name, self.taken)


def bias_codes(bias: Array, step: Array) -> Array:
    """A bias in units of ``step``, int32."""
    units = np.rint(bias.astype(np.float64).reshape(-1) / step.astype(np.float64))
    return np.clip(units, -(2**31), 2**31 - 1).astype(np.int32)
