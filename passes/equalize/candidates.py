"""What can be equalized: the inputs of products with constant weights, and what is scaled with each.

A value x that products read may be multiplied by factors, channel by channel, if their weights are divided
by them and what makes x takes the factors in: the scale of a norm, the layer before, the up projection of a
gated FFN, the values of an attention. The axis analysis finds both sides.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.analysis.axes import analyse
from netlathe.analysis.axes.joint import Joint, to_scale_jointly
from netlathe.ir import provenance, weights
from netlathe.ir.provenance import module_path
from netlathe.pipeline.ledger import Entry

Vector = npt.NDArray[np.float64]
_LOOKUPS = frozenset({"Gather", "GatherND"})
_MOVES = _LOOKUPS | frozenset(
    "Cast Expand Identity Reshape Slice Split Squeeze Transpose Unsqueeze".split()
)


@dataclass(frozen=True)
class Product:
    """A node that multiplies ``x``, along its dim ``dim``, with a weight."""

    node: ir.Node
    x: ir.Value
    dim: int
    weight: ir.Value  # the initializer, perhaps moved before it is read


@dataclass
class Candidate:
    """What is scaled together, and the products that read it."""

    name: str
    joint: Joint
    products: list[Product] = field(default_factory=list)

    @property
    def inputs(self) -> list[tuple[ir.Value, int]]:
        """The values that products read, each with its dim of channels."""
        return list(dict.fromkeys((product.x, product.dim) for product in self.products))

    @property
    def consumers(self) -> list[ir.Value]:
        """The weights of products that are divided by the factors."""
        return _matrices(self.joint, -1)

    @property
    def makers(self) -> list[ir.Value]:
        """The weights of products that are multiplied by the factors."""
        return _matrices(self.joint, 1)

    @property
    def taken_in_by(self) -> list[str]:
        """The names of all that is multiplied by the factors."""
        return [str(v.name) for v, exponent in self.joint.weights.items() if exponent > 0]

    def names(self) -> set[str]:
        """What a pattern may match: the value, the weights, and the modules of the products."""
        paths = {module_path(product.node) for product in self.products}
        held = {str(value.name) for value in self.joint.weights}
        return {name for name in (self.name, *paths, *held) if name}

    def matches(self, pattern: str) -> bool:
        """Whether ``ignore=pattern`` is about it."""
        return any(provenance.matches(name, pattern) for name in self.names())


def _matrices(joint: Joint, exponent: int) -> list[ir.Value]:
    held = joint.weights.items()
    return [value for value, found in held if found == exponent and _is_matrix(value)]


def find(model: ir.Model) -> tuple[list[Candidate], list[Entry]]:
    """The candidates in the order of the graph, and entries for what cannot be scaled."""
    found: dict[frozenset[tuple[ir.Value, int]], Candidate] = {}
    refused: list[Entry] = []
    grouped: dict[tuple[ir.Value, int], list[Product]] = {}
    for product in _products(model):
        if product.node.graph is not model.graph or not product.x.shape:
            name, where = product.x.name or "", module_path(product.node)
            why = "its rank is unknown" if not product.x.shape else "it stands in a subgraph"
            refused.append(Entry(name, "refused", why, where))
            continue
        grouped.setdefault((product.x, product.dim), []).append(product)
    axes = analyse(model)
    for (x, dim), products in grouped.items():
        keep = [product.node.outputs[0] for product in products]
        segments = to_scale_jointly(axes, x, dim, keep=keep)
        for number, joint in enumerate(segments):
            name = x.name or ""
            name += f"[{number}]" if len(segments) > 1 else ""
            if isinstance(joint, str):
                refused.append(Entry(name, "refused", joint, module_path(products[0].node)))
                continue
            key = frozenset(joint.weights.items())
            found.setdefault(key, Candidate(name, joint)).products += products
    return list(found.values()), refused


def _products(model: ir.Model) -> Iterator[Product]:
    """All products of a computed value with a weight, in the order of their nodes."""
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
        if x is None or not _is_matrix(source[0]):
            continue
        dim = 1 if node.op_type != "MatMul" else (-1 if at == 1 else -2)
        yield Product(node, x, dim % len(x.shape) if x.shape else dim, source[0])


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


def _is_matrix(value: ir.Value) -> bool:
    """Whether a weight runs along more than one axis, as scales and biases do not."""
    return sum(size != 1 for size in value.shape or ()) > 1
