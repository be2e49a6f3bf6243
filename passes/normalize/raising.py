"""Raises decomposed operators to the IR's ops wherever that is the same function, and keeps a ledger.

Every family names its candidates (anchors) and proposes a replacement or says why not; a proposal goes
into the graph only after ONNX Runtime found the matched nodes and the replacement to be the same function
(:mod:`netlathe.passes.normalize.check`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import onnx_ir as ir

from netlathe.ir import edit
from netlathe.ir.provenance import module_path
from netlathe.passes.normalize.attention_form import AttentionForms
from netlathe.passes.normalize.check import TOLERANCE, Judge
from netlathe.passes.normalize.match import NoMatch
from netlathe.passes.normalize.raise_activation import ACTIVATIONS
from netlathe.passes.normalize.raise_attention import Attentions
from netlathe.passes.normalize.raise_norm import GroupNorms, Norms
from netlathe.passes.normalize.raise_rope import Ropes
from netlathe.passes.normalize.raise_rows import Rows
from netlathe.passes.normalize.raise_view import Views
from netlathe.passes.normalize.rewrite import Proposal, put_in_place
from netlathe.pipeline.ledger import Entry


class Family(Protocol):
    """One kind of construct."""

    def anchors(self, graph: ir.Graph) -> Iterable[ir.Node]:
        """The nodes around which the construct may stand: every one gets an entry."""
        ...

    def propose(self, anchor: ir.Node) -> Proposal:
        """What to put in place of the construct; raises NoMatch where it is not one."""
        ...


FAMILIES: tuple[Family, ...] = (
    Rows(),
    *ACTIVATIONS,
    Norms(),
    GroupNorms(),
    Ropes(),
    Attentions(),
    AttentionForms(),
    Views(),
)


def raise_operators(model: ir.Model) -> list[Entry]:
    """Raise what is decomposed in ``model``, in place.

    Before: the model is in normal form and typed. After: raised values keep the names of those they
    replace, nothing that became dead stays, nodes stay sorted; shape arithmetic of replaced nodes may be
    left to the next normalization. Returns one entry per candidate: applied, with the measured error, or
    refused, with the reason.
    """
    graph, judge, taken = model.graph, Judge(), edit.names_in(model.graph)
    entries: list[Entry] = []
    for family in FAMILIES:
        for anchor in list(family.anchors(graph)):
            if anchor.graph is graph:  # not replaced by an earlier raise
                entries.append(_raise(graph, judge, family, anchor, taken))
    return entries


def _raise(
    graph: ir.Graph, judge: Judge, family: Family, anchor: ir.Node, taken: set[str]
) -> Entry:
    where = module_path(anchor)
    name = anchor.outputs[0].name or ""
    try:
        proposal = family.propose(anchor)
        root = next(iter(proposal.outputs))
        error = judge.error(proposal.outputs, trial=proposal.trial)
    except NoMatch as refusal:
        at = (
            ""
            if refusal.node is None
            else f" (at {refusal.node.op_type} {refusal.node.outputs[0].name})"
        )
        return Entry(name, "refused", f"{refusal.reason}{at}", where)
    if error > TOLERANCE:
        reason = f"{proposal.says}: differs by {error:.1e} of the RMS, more than {TOLERANCE:g}"
        return Entry(name, "refused", reason, where, {"op": proposal.op_type, "error": error})
    name = root.name or ""
    put_in_place(graph, proposal, taken)
    detail = {"op": proposal.op_type, "error": error, **proposal.detail}
    return Entry(name, "applied", proposal.says, where, detail)
