"""Raises strided views of all of a value to the Reshape that they are.

PyTorch's exporter writes ``as_strided(x, sizes, strides)``, which adaptive pools leave behind, as a look-up
in the flat value of positions that it computes, one range for each dim:

    Gather(Reshape(x, [-1]), range(n) * 32 + [0 .. 31])      -> Reshape(x, [n, 32])
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from netlathe.ir.edit import const_array
from netlathe.passes.normalize.match import NoMatch, node_of, operands
from netlathe.passes.normalize.rewrite import Builder, Dims, Proposal, dims_of, text_of

_POSITIONS = frozenset({"Add", "Cast", "Expand", "Mul", "Range", "Reshape", "Unsqueeze"})


class Views:
    """Look-ups of computed positions in a flat value."""

    def anchors(self, graph: ir.Graph) -> Iterable[ir.Node]:
        """Gathers of a flat value."""
        return (n for n in graph if n.domain == "" and n.op_type == "Gather" and _flat(n))

    def propose(self, anchor: ir.Node) -> Proposal:
        """The Reshape in place of a look-up; that every element comes to its place, the judge finds.

        Raises:
            NoMatch: positions are data, or the sizes cannot be written as a Reshape's target.
        """
        _, positions = operands(anchor)
        ranges = _ranges(positions)
        if not ranges:
            raise NoMatch("looks up constant positions", anchor)
        source = _flat(anchor)
        assert source is not None
        root = anchor.outputs[0]
        dims, before = dims_of(root), dims_of(source)
        build = Builder()
        made = build.reshape(source, _target(before, dims, anchor), dims)
        nodes = 2 + ranges
        says = f"Reshape {text_of(before)} to {text_of(dims)} from {nodes} nodes"
        return Proposal("Reshape", {root: made}, build, says)


def _flat(gather: ir.Node) -> ir.Value | None:
    """The value that is looked up in, before it was made flat."""
    reshape = node_of(gather.inputs[0], "Reshape")
    if reshape is None or reshape.outputs[0].shape is None or len(reshape.outputs[0].shape) != 1:
        return None
    return reshape.inputs[0]


def _ranges(positions: ir.Value) -> int:
    """How many nodes compute positions from ranges and constants; 0 where nothing is computed.

    Raises:
        NoMatch: they come from something else.
    """
    found: set[ir.Node] = set()
    todo = [positions]
    while todo:
        value = todo.pop()
        node = value.producer()
        if const_array(value) is not None or (value.shape is not None and len(value.shape) == 0):
            continue  # a constant, or a size
        if node is None or node.domain != "" or node.op_type not in _POSITIONS:
            raise NoMatch(f"looks up positions that are data ({value.name})", node)
        found.add(node)
        sizes = node.op_type in ("Expand", "Reshape", "Unsqueeze", "Range")
        todo += [] if node.op_type == "Range" else operands(node)[: 1 if sizes else None]
    return len(found)


def _target(before: Dims, dims: Dims, node: ir.Node) -> list[int]:
    """The dims as a Reshape's literal: 0 copies a dim, one dynamic dim may be what is left."""
    target = []
    for at, dim in enumerate(dims):
        if isinstance(dim, int):
            target.append(dim)
        else:
            target.append(0 if at < len(before) and before[at] == dim else -1)
    if target.count(-1) > 1 or (0 in dims):
        raise NoMatch(f"has sizes that are not those of a Reshape, {text_of(dims)}", node)
    return target
