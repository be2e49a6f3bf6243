"""Turns what products read by orthogonal matrices, so that no channel stands out (QuaRot, arXiv 2404.00456).

* the residual streams, whose writers and readers take the matrix in (sec. 4, stage 1a); norms must be
  RMSNormalizations without a scale of their own: run ``fold_norms`` before;
* the values of every attention head, between the weights that make and read them (stage 1b, offline part);
* asked for by ``online``: what products read and nothing else turns, such as the input of a down
  projection, by a Hadamard transform in the graph.

The function stays what it was. Streams are found as :mod:`netlathe.passes.slice` finds them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir

from netlathe.analysis.axes import Axes, Stretch, analyse, to_rotate
from netlathe.analysis.layers import find_layers
from netlathe.diagnostics import Diagnostic, PassError, missing_extra
from netlathe.ir import types
from netlathe.ir.provenance import module_path
from netlathe.passes.rotate import online
from netlathe.passes.rotate.hadamard import Basis, random_hadamard, random_orthogonal
from netlathe.passes.slice import bases
from netlathe.passes.slice.narrow import narrow
from netlathe.passes.slice.segments import Edge, Layout, Segment, insert, lay_out, stretch_at
from netlathe.pipeline.ledger import Entry
from netlathe.pipeline.pass_ import (
    ChoosingPass,
    Context,
    Equivalent,
    Exactness,
    Pass,
    Result,
    option,
    options,
)

# Every weight is rounded once more in another basis, and sums run in another order: either is like one of
# the roundings of a sum, of n = 8192 terms 84 ulp of its RMS at the largest of 10^5 (as in fold_norms).
TOLERANCE = 84 * 2.0**-23


@options
class Rotate(ChoosingPass):
    """Turn residual streams, heads' values and inputs of products to bases without outliers (QuaRot)."""

    name: ClassVar[str] = "rotate"
    keeps_operators: ClassVar[bool] = True
    exactness: ClassVar[Exactness] = Equivalent(TOLERANCE)

    basis: Literal["hadamard", "random", "pca"] = option(
        default="hadamard",
        help="of streams and heads; hadamard: with random signs; random: any rotation; pca: principal axes"
        " of the streams, from data",
    )
    heads: bool = option(default=True, help="turn the values of attention heads as well")
    online: bool = option(
        default=False,
        help="put a Hadamard transform in front of products whose input nothing else turns",
    )

    def cannot_follow(self, earlier: Pass) -> str:
        """Codes and zeros do not stay what they are in another basis."""
        reasons = {
            "quantize": "weights are codes by then",
            "sparsify": "zeros of weights would be turned into other numbers",
            "quantize_cache": "what the cache holds would round to other codes",
        }
        return reasons.get(earlier.name, "")

    def needs_data(self) -> str:
        """Principal axes are those of data."""
        return "basis='pca'" if self.basis == "pca" else ""

    def choose(self, model: ir.Model, ctx: Context) -> list[Entry]:
        """Find what can turn, and a basis for each.

        Raises:
            PassError: ``basis="pca"`` and there is no calibration data.
        """
        layout = lay_out(model, cut=False)
        entries = self._streams(layout, ctx)
        turned = {str(v.name) for s in layout.segments for v, _ in s.stretch.exponents}
        axes = analyse(model)
        for node in model.graph:
            if node.op_type == "Attention" and not node.domain:
                entry, reached = self._head(node, axes, ctx)
                entries.append(entry)
                turned |= reached
        behind = {(edge.reader, edge.operand) for edge in layout.edges}
        for (x, where), readers in inputs(model).items():
            edge = any((node.outputs[0].name, 0) in behind for node in readers)
            if x.name not in turned and not edge:
                entries.append(self._input(x, where, readers, model))
        return entries or [Entry("(the model)", "skipped", "no product reads a computed value")]

    def edit(self, model: ir.Model, chosen: Sequence[Entry], ctx: Context) -> Result:
        """Let weights take the bases in, and put the online transforms in."""
        applied = [entry for entry in chosen if entry.status == "applied"]
        if not applied:
            return Result(False, list(chosen))
        sites = {str(x.name): (x, readers) for (x, _), readers in inputs(model).items()}
        by_kind = {
            kind: [entry for entry in applied if entry.detail["kind"] == kind]
            for kind in ("stream", "head", "online")
        }
        edges = [Edge(*pair) for e in by_kind["stream"] for pair in e.detail["adapters"]]
        insert(model, edges)
        axes = analyse(model)
        values = {v.name: v for node in model.graph for v in node.outputs}
        turns = [
            (_stretch(axes, values[entry.detail["value"]], kind == "head"), entry.arrays["basis"])
            for kind in ("stream", "head")
            for entry in by_kind[kind]
        ]
        changed = {str(v.name) for stretch, _ in turns for v, _ in stretch.exponents}
        narrow(Layout(model, axes, edges), turns, ctx.device)
        transforms = online.Transforms(model.graph)
        for entry in by_kind["online"]:
            found = online.site(*sites[entry.candidate])
            assert not isinstance(found, str)  # as it was chosen
            transforms.add(found)
        types.annotate(model)
        renamed: dict[str, str | None] = dict.fromkeys(sorted(changed & values.keys()))
        return Result(True, list(chosen), renamed)

    # -- choosing ---------------------------------------------------------------------------------

    def _streams(self, layout: Layout, ctx: Context) -> list[Entry]:
        streams = {segment.points[0]: segment for segment in layout.segments}
        found = self._bases(layout, streams, ctx)
        edges = [[edge.reader, edge.operand] for edge in layout.edges]
        entries = []
        for name, segment in streams.items():
            reason = f"{segment.group.size} channels in a {self.basis} basis, read at"
            reason += f" {len(segment.points)} places"
            if edges:
                reason += f"; {len(edges)} matrices stand where the streams end"
            detail = {"kind": "stream", "value": name, "norms": segment.norms, "adapters": edges}
            arrays = {"basis": found[name]}
            entries.append(Entry(name, "applied", reason, segment.where, detail, arrays=arrays))
            edges = []  # once for all
        entries += [Entry(name, "refused", why, where) for name, why, where in layout.refused]
        return entries

    def _bases(
        self, layout: Layout, streams: Mapping[str, Segment], ctx: Context
    ) -> Mapping[str, Basis]:
        if self.basis != "pca" or not streams:
            values = {v.name: v for node in layout.model.graph for v in node.outputs}
            return {
                name: self._drawn(segment.group.size, values[name], ctx)
                for name, segment in streams.items()
            }
        try:
            import torch  # noqa: F401  # statistics are collected by it

            from netlathe.passes.slice import statistics
        except ModuleNotFoundError as error:
            raise missing_extra("torch", "torch", f"{self} by calibration data") from error

        def principal(_: str, moment: Basis, __: int) -> Basis:
            return bases.principal(moment, ctx.device)

        places = {name: segment.points for name, segment in streams.items()}
        whole = {name: segment.group.size for name, segment in streams.items()}
        return statistics.solve(layout.model, places, ctx, principal, whole, str(self))

    def _drawn(self, size: int, value: ir.Value, ctx: Context) -> Basis:
        """A random basis, in the precision of the weights that take it in."""
        draw = random_orthogonal if self.basis == "random" else random_hadamard
        precision = np.float64 if value.dtype == ir.DataType.DOUBLE else np.float32
        made: Any = draw(size, ctx.rng("rotate", value.name or "")).astype(precision)
        return made  # type: ignore[no-any-return]  # float32 is enough where weights are

    def _head(self, node: ir.Node, axes: Axes, ctx: Context) -> tuple[Entry, set[str]]:
        """The entry for the values of an attention, and the names of what turns with them."""
        value = node.inputs[2]
        assert value is not None
        name, where = value.name or "", module_path(node)
        if not self.heads:
            reason = "values of heads stay: heads=False"
            return Entry(name, "skipped", reason, where, left_out=True), set()
        try:
            stretch = _stretch(axes, value, True)
        except PassError as error:
            return Entry(name, "refused", error.diagnostics[0].message, where), set()
        size = stretch.group.size
        weights = ", ".join(str(weight.name) for weight, _ in stretch.weights)
        reason = f"{size} positions of every head's values turned, in {weights}"
        arrays = {"basis": self._drawn(size, value, ctx)}
        detail = {"kind": "head", "value": name}
        entry = Entry(name, "applied", reason, where, detail, arrays=arrays)
        return entry, {str(v.name) for v, _ in stretch.exponents}

    def _input(self, x: ir.Value, where: str, readers: Sequence[ir.Node], model: ir.Model) -> Entry:
        name = x.name or ""
        if any(node.graph is not model.graph for node in readers):
            return Entry(name, "refused", "it stands in a subgraph", where)
        found = online.site(x, readers)
        if isinstance(found, str):
            return Entry(name, "refused", found, where)
        if not self.online:
            reason = "only a transform in the graph could turn it: online=True"
            return Entry(name, "skipped", reason, where, left_out=True)
        a, b = found.orders
        names = ", ".join(str(layer.value.name) for layer in found.layers)
        reason = f"{found.width} channels turned in the graph by H{a} x H{b}, undone in {names}"
        return Entry(name, "applied", reason, where, {"kind": "online", "orders": [a, b]})


def inputs(model: ir.Model) -> dict[tuple[ir.Value, str], list[ir.Node]]:
    """What products with weights read, with the module that does first, and the products."""
    found: dict[ir.Value, list[ir.Node]] = {}
    for layer in find_layers(model):
        found.setdefault(layer.x, []).append(layer.node)
    return {(x, module_path(readers[0])): readers for x, readers in found.items()}


def _stretch(axes: Axes, value: ir.Value, is_head: bool) -> Stretch:
    """What turns with the channels of a stream, or with the positions of each head of a value."""
    last = len(value.shape or ()) - 1
    if not is_head:
        return stretch_at(axes, value, last)
    groups = axes.of(value, last)
    if not groups:  # channel attention (DaViT): a head is as wide as there are tokens
        message = f"no weight has the positions of a head: {axes.term(value, last)}"
        raise PassError(Diagnostic("rotate.head", message))
    return to_rotate(axes, groups[-1], value, last)
