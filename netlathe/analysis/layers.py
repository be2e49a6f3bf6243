"""Products of a computed value with a weight, wherever they stand: matrix products and convolutions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from netlathe.ir import weights

_LOOKUPS = frozenset({"Gather", "GatherND"})
_MOVES = _LOOKUPS | frozenset(
    "Cast Expand Identity Reshape Slice Split Squeeze Transpose Unsqueeze".split()
)


@dataclass(frozen=True)
class Layer:
    """A node that multiplies ``x``, along its dim ``dim``, with a weight.

    The weight may be moved before it is read, or looked up in a stack of them.
    """

    node: ir.Node
    x: ir.Value
    dim: int  # negative where the rank of x is unknown
    weight: ir.Value  # the initializer


def find_layers(model: ir.Model) -> Iterator[Layer]:
    """All of a model, those in subgraphs too, in the order of their nodes."""
    for node in model.graph.all_nodes():
        if node.domain or node.op_type not in ("Conv", "ConvTranspose", "MatMul"):
            continue
        sources = [_source(value) for value in node.inputs[:2]]
        if node.op_type != "MatMul":  # the kernel of a convolution is its second operand
            sources[0] = None
        elif None not in sources:  # what is looked up in a table is as good as computed
            sources = [None if found and found[1] else found for found in sources]
        held = [at for at, found in enumerate(sources) if found is not None]
        if len(held) != 1:
            continue
        (at,) = held
        x, source = node.inputs[1 - at], sources[at]
        assert source is not None
        if x is None or not is_matrix(source[0]):
            continue
        dim = 1 if node.op_type != "MatMul" else (-1 if at == 1 else -2)
        yield Layer(node, x, dim % len(x.shape) if x.shape else dim, source[0])


def _source(value: ir.Value | None) -> tuple[ir.Value, bool] | None:
    """The weight that an operand is, perhaps moved, and whether it is looked up in it."""
    looked_up = False
    while value is not None and not weights.is_weight(value):
        maker = value.producer()
        if maker is None or maker.domain or maker.op_type not in _MOVES:
            return None
        looked_up |= maker.op_type in _LOOKUPS
        value = maker.inputs[0]
    if value is None or value.dtype is None or not value.dtype.is_floating_point():
        return None
    return value, looked_up


def is_matrix(value: ir.Value) -> bool:
    """Whether a weight runs along more than one axis, as scales and biases do not."""
    return sum(size != 1 for size in value.shape or ()) > 1
