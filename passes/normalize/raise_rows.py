"""Raises what is computed of rows, laid out for it and back, to the operator along the last dim.

Before opset 13 a Softmax took all dims from its axis on as one. Where a file does not tell how many these
are, it comes in with its rows written out:

    Reshape(Softmax(Flatten(x, axis=3), axis=-1), Shape(x))      -> Softmax(x, axis=-1), x being [b,h,s,t]
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from netlathe.passes.normalize.match import NoMatch, node_of, operands, used_elsewhere
from netlathe.passes.normalize.rewrite import Builder, Proposal, dims_of

_OF_ROWS = ("Hardmax", "LogSoftmax", "Softmax")


class Rows:
    """Softmax and its kin of the rows of a value."""

    def anchors(self, graph: ir.Graph) -> Iterable[ir.Node]:
        """What gives rows their shape back, which were laid out as such."""
        return (n for n in graph if n.domain == "" and n.op_type == "Reshape" and _of_rows(n))

    def propose(self, anchor: ir.Node) -> Proposal:
        """The operator on the value as it lies; that it is the same function, the judge finds.

        Raises:
            NoMatch: the rows are not the last dim, or something else reads them.
        """
        nodes = _of_rows(anchor)
        assert nodes is not None  # an anchor is one
        flatten, softmax = nodes
        rows, root = flatten.outputs[0], anchor.outputs[0]
        if reader := used_elsewhere(softmax.outputs[0], anchor):
            raise NoMatch(f"{reader} reads the rows too", anchor)
        source = operands(flatten)[0]
        dims = dims_of(source)
        if not dims or dims != dims_of(root) or dims[-1] != dims_of(rows, 2)[-1]:
            raise NoMatch("rows are not what lies along the last dim", anchor)
        build = Builder()
        made = build.op(softmax.op_type, source, shape=dims, axis=-1)
        says = f"{softmax.op_type} along the last dim from 3 nodes"
        return Proposal(softmax.op_type, {root: made}, build, says, trial="wide")


def _of_rows(reshape: ir.Node) -> tuple[ir.Node, ir.Node] | None:
    """What lays out rows for the operator that a Reshape reads, and that operator."""
    softmax = node_of(reshape.inputs[0], *_OF_ROWS)
    flatten = node_of(softmax.inputs[0], "Flatten", "Reshape") if softmax is not None else None
    return (flatten, softmax) if softmax is not None and flatten is not None else None
