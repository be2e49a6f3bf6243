"""What can be equalized: the inputs of products with constant weights, and what is scaled with each.

A value x that products read may be multiplied by factors, channel by channel, if their weights are divided
by them and what makes x takes the factors in: the scale of a norm, the layer before, the up projection of a
gated FFN, the values of an attention. The axis analysis finds both sides.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.analysis.axes import analyse
from netlathe.analysis.axes.joint import Joint, to_scale_jointly
from netlathe.analysis.layers import Layer, find_layers, is_matrix
from netlathe.ir import provenance
from netlathe.ir.provenance import module_path
from netlathe.pipeline.ledger import Entry

Vector = npt.NDArray[np.float64]


@dataclass
class Candidate:
    """What is scaled together, and the products that read it."""

    name: str
    joint: Joint
    products: list[Layer] = field(default_factory=list)

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
    return [value for value, found in held if found == exponent and is_matrix(value)]


def find(model: ir.Model) -> tuple[list[Candidate], list[Entry]]:
    """The candidates in the order of the graph, and entries for what cannot be scaled."""
    found: dict[frozenset[tuple[ir.Value, int]], Candidate] = {}
    refused: list[Entry] = []
    grouped: dict[tuple[ir.Value, int], list[Layer]] = {}
    for product in find_layers(model):
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
