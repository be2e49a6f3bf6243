"""``netlathe diff``: what changed between two models."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from netlathe.cli import options, render
from netlathe.cli.request import capture_all

if TYPE_CHECKING:
    import onnx_ir as ir

    from netlathe.pipeline.interfaces import Captured

Change = dict[str, str]  # kind (added, removed, changed), name, and what it was and is


@click.command()
@options.model("a")
@options.model("b")
@options.cache()
@options.sizes()
@options.as_json()
@click.option("-v", "--verbose", is_flag=True, help="Show every node and weight.")
def diff(
    a: Path, b: Path, kv_cache: bool, dims: options.Dims, as_json: bool, verbose: bool
) -> None:
    """Show what changed from A to B.

    Nodes, weights, cost, and how far the outputs are apart. Nodes and weights are matched by name,
    and outputs compared on the same inputs. It is a report and not a check: the exit code is 0
    whatever it finds (`netlathe verify --against` is the check).

    \b
    netlathe diff model.onnx out
    netlathe diff dense-encoder/ out --json | jq .outputs
    """
    from netlathe.analysis.cost import cost

    before, after = capture_all([a, b], kv_cache=kv_cache, dims=dims)
    costs = [cost(one.model, one.dynamic) for one in (before, after)]
    nodes = _nodes(before.model, after.model)
    weights = _weights(before.model, after.model)
    outputs, apart = _outputs(before, after)
    if as_json:
        render.print_json(
            {
                "a": before.source,
                "b": after.source,
                "cost": [{n: getattr(c, n) for n in ("params", "bytes", "macs")} for c in costs],
                "nodes": nodes,
                "weights": weights,
                "outputs": outputs,
                "not_compared": apart,
            }
        )
        return
    rows = [
        (before.source, *render.cost_cells(costs[0])),
        (after.source, *render.cost_cells(costs[1])),
        ("b / a", *render.ratio_cells(costs[1], costs[0])),
    ]
    render.table("", ("", "#parameters", "#weights", "#MACs"), rows)
    render.line(f"(MACs at {render.sizes(before.dynamic)})\n")
    _show_ops(before.model, after.model)
    for what, changes in (("nodes", nodes), ("weights", weights)):
        _show_changes(what, changes, verbose=verbose)
    if apart:
        render.line(f"outputs were not compared: {apart}")
        return
    render.table(
        "",
        ("output", "#largest difference", "#RMS difference", "#cosine"),
        (
            (o["name"], f"{o['error']:.1e}", f"{o['relative_rms']:.1e}", f"{o['cosine']:.6f}")
            for o in outputs
        ),
    )


def _show_ops(a: ir.Model, b: ir.Model) -> None:
    ops = [Counter(node.op_type for node in one.graph.all_nodes()) for one in (a, b)]
    rows = [
        (op, ops[0][op], ops[1][op], f"{ops[1][op] - ops[0][op]:+d}")
        for op in sorted(ops[0] | ops[1])
        if ops[0][op] != ops[1][op]
    ]
    if rows:
        render.table("", ("operator", "#a", "#b", "#change"), rows)
        render.line()


def _show_changes(what: str, changes: list[Change], *, verbose: bool) -> None:
    kinds = Counter(change["kind"] for change in changes)
    shown = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    render.line(f"{what}: {shown or 'no change'}")
    if changes and verbose:
        columns = ("", "name", "a", "b")
        render.table("", columns, ((c["kind"], c["name"], c["a"], c["b"]) for c in changes))
    if changes:
        render.line()


# -- what changed ---------------------------------------------------------------------------------


def _nodes(a: ir.Model, b: ir.Model) -> list[Change]:
    """Nodes by the name of their first output; changed if operator, inputs or attributes are."""
    from netlathe.ir.printing import show_node

    made: list[dict[str, ir.Node]] = [
        {str(node.outputs[0].name): node for node in one.graph if node.outputs} for one in (a, b)
    ]
    return _changes(
        {name: show_node(node) for name, node in made[0].items()},
        {name: show_node(node) for name, node in made[1].items()},
        {name: _content(node) for name, node in made[0].items()},
        {name: _content(node) for name, node in made[1].items()},
    )


def _content(node: ir.Node) -> str:
    """What a node says by itself, without the types of what it reads."""
    inputs = [None if value is None else value.name for value in node.inputs]
    attributes = {name: str(attribute) for name, attribute in sorted(node.attributes.items())}
    return f"{node.domain} {node.op_type} {inputs} {attributes}"


def _weights(a: ir.Model, b: ir.Model) -> list[Change]:
    """Weights by name; changed if dtype, shape or a single bit is."""
    from netlathe.ir import weights
    from netlathe.ir.printing import show_type

    shown, contents = [], []
    for one in (a, b):
        found = {
            name: (value, value.const_value)
            for graph in one.graphs()
            for name, value in graph.initializers.items()
            if value.const_value is not None
        }
        shown.append({name: show_type(value) for name, (value, _) in found.items()})
        contents.append({name: weights.digest(tensor) for name, (_, tensor) in found.items()})
    return _changes(*shown, *contents)


def _changes(
    shown_a: dict[str, str], shown_b: dict[str, str], a: dict[str, str], b: dict[str, str]
) -> list[Change]:
    """Names that only one of ``a`` and ``b`` has, or that have other contents there."""
    changes = []
    for name in dict.fromkeys([*a, *b]):
        if a.get(name) == b.get(name):
            continue
        kind = "changed" if name in a and name in b else "removed" if name in a else "added"
        row = {"kind": kind, "name": name, "a": shown_a.get(name, ""), "b": shown_b.get(name, "")}
        if row["a"] == row["b"]:
            row["b"] = "other values"
        changes.append(row)
    return changes


def _outputs(a: Captured, b: Captured) -> tuple[list[dict[str, Any]], str]:
    """How far every shared output of ``b`` is from ``a``'s; and why nothing was compared, if so."""
    from netlathe.execute.compare import relative_error
    from netlathe.pipeline import loss, verification

    inputs = [{str(v.name) for v in one.model.graph.inputs} for one in (a, b)]
    if not inputs[1] <= inputs[0]:
        return [], "b has other inputs: " + ", ".join(sorted(inputs[1] - inputs[0]))
    bench = verification.Bench(a)
    found = bench.run(b.model)
    errors: dict[str, float] = {}
    for actual, expected in zip(found.outputs, bench.dense.outputs, strict=True):
        for name in actual.keys() & expected.keys():
            errors[name] = max(errors.get(name, 0.0), relative_error(actual[name], expected[name]))
    scale = loss.Scale.of((), [trial.feeds for trial in bench.trials], None, render.Bars())
    whole = scale.loss(
        loss.Subject(a.model, bench.dense.outputs), loss.Subject(b.model, found.outputs)
    )
    by_output = {} if whole is None else whole.by_output
    rows = []
    for name in (str(v.name) for v in b.model.graph.outputs):
        if name in errors:
            row: dict[str, Any] = {"name": name, "error": errors[name]}
            for field in ("relative_rms", "cosine", "kl", "top1"):
                row[field] = getattr(by_output.get(name), field, None)
            rows.append(row)
    return rows, "" if rows else "they share no output"
