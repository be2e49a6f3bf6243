"""``netlathe inspect``: what is in a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from netlathe.cli import options, render
from netlathe.cli.request import capture

if TYPE_CHECKING:
    import onnx_ir as ir

    from netlathe.analysis.axes import Row
    from netlathe.analysis.cost import Cost
    from netlathe.pipeline.interfaces import Captured

_MOST_MODULES = 24  # rows of the table of modules that was not asked for in full


@click.command()
@options.model()
@click.option("--ir", "show_ir", is_flag=True, help="Print the graph itself, node by node.")
@click.option(
    "--axes", "show_axes", is_flag=True, help="Show what must change together, and what pins it."
)
@options.cache()
@options.sizes()
@options.as_json()
@click.option("-v", "--verbose", is_flag=True, help="Show every module and capture entry.")
def inspect(
    model: Path,
    show_ir: bool,
    show_axes: bool,
    kv_cache: bool,
    dims: options.Dims,
    as_json: bool,
    verbose: bool,
) -> None:
    """Show what MODEL is made of.

    Inputs and outputs, operators, weights, and what every module costs. The model is captured
    first, so what is shown is what passes see: in normal form, with decomposed attention and
    normalization raised to single operators.

    \b
    netlathe inspect model.onnx
    netlathe inspect my-llama/ --kv-cache --dims batch=1,sequence=1,past_sequence=1024
    netlathe inspect model.onnx --ir | less
    netlathe inspect model.onnx --axes
    """
    from netlathe.analysis.cost import cost
    from netlathe.ir.printing import show_model

    captured = capture(model, kv_cache=kv_cache, dims=dims)
    costs = cost(captured.model, captured.dynamic)
    if as_json:
        described = _describe(captured, costs)
        if show_ir:
            described["ir"] = show_model(captured.model)
        if show_axes:
            described["axes"] = [row.to_json() for row in _axes(captured.model)]
        render.print_json(described)
    elif show_ir:
        print(show_model(captured.model))
    elif show_axes:
        _show_axes(_axes(captured.model), verbose=verbose)
    else:
        _show(captured, costs, verbose=verbose)


def _describe(captured: Captured, costs: Cost) -> dict[str, object]:
    graph = captured.model.graph
    return {
        "model": captured.source,
        "frontend": captured.frontend,
        "dims": captured.dynamic,
        "inputs": [_value(value) for value in graph.inputs],
        "outputs": [_value(value) for value in graph.outputs],
        "nodes": sum(1 for _ in graph.all_nodes()),
        "ops": dict(_ops(captured.model).most_common()),
        "weights": _by_dtype(captured.model),
        "params": costs.params,
        "bytes": costs.bytes,
        "macs": costs.macs,
        "macs_unknown": list(costs.unknown),
        "modules": {path: vars(share) for path, share in costs.by_module.items()},
        "capture": [entry.to_json() for entry in captured.entries],
        "files": sorted(captured.files),
        "tokenizer": captured.tokenize is not None,
    }


def _show(captured: Captured, costs: Cost, *, verbose: bool) -> None:
    model = captured.model
    render.line(f"{captured.source}  ({captured.frontend})")
    params, num_bytes, macs = render.cost_cells(costs)
    at = render.sizes(captured.dynamic)
    render.line(f"{params} parameters, {num_bytes} of weights, {macs} MACs at {at}")
    for text in costs.unknown:
        render.line(f"MACs not known of {text}")
    render.line()
    values = [("input", v) for v in model.graph.inputs] + [
        ("output", v) for v in model.graph.outputs
    ]
    rows = [(kind, *_value(value).values()) for kind, value in values]
    render.table("", ("", "name", "dtype", "shape"), rows)
    render.line()
    render.table("", ("operator", "#nodes"), _ops(model).most_common())
    render.line()
    render.table(
        "",
        ("weights", "#tensors", "#bytes"),
        (
            (dtype, row["tensors"], render.size(row["bytes"]))
            for dtype, row in _by_dtype(model).items()
        ),
    )
    render.line()
    modules = _grouped(costs, _MOST_MODULES if not verbose else None)
    render.table(
        "",
        ("module", "#parameters", "#weights", "#MACs"),
        ((path or "(no path)", *cells) for path, cells in modules.items()),
    )
    render.line()
    entries = [entry for entry in captured.entries if verbose or entry.candidate == "capture"]
    for entry in entries:
        render.line(f"{entry.status}  {entry.candidate}: {entry.reason}")
    if hidden := len(captured.entries) - len(entries):
        entries_ = "entry" if hidden == 1 else "entries"
        render.line(f"... and {hidden} more {entries_} of the capture (-v shows them)")


def _axes(model: ir.Model) -> list[Row]:
    """The axis groups, with the scopes of `prune` that they are in."""
    from netlathe.analysis.axes import analyse, report
    from netlathe.passes.prune.candidates import find_candidates

    axes = analyse(model)
    return report(axes, {found.group: found.scope for found in find_candidates(axes)})


def _show_axes(rows: Sequence[Row], *, verbose: bool) -> None:
    """Every axis group: its size and scope, where it is, what it is of, what may be done, what pins it."""
    shown = []
    for row in rows:
        members = row.members if verbose else row.members[:1]
        more = len(row.members) - len(members)
        made_of = "\n".join(members) + (f" and {more} more" if more else "")
        pinned = "\n".join(row.pinned if verbose else row.pinned[:1])
        allowed = row.allowed or "-"
        shown.append((row.group, row.size, row.scope, row.where, made_of, allowed, pinned))
    head = ("group", "#size", "scope", "module", "weight:dim", "may be", "pinned by")
    render.table("", head, shown)


def _value(value: ir.Value) -> dict[str, str]:
    from netlathe.ir import dims

    dtype = "?" if value.dtype is None else value.dtype.name.lower()
    shape = None if value.shape is None else [dims.from_ir(dim) for dim in value.shape]
    return {"name": value.name or "", "dtype": dtype, "shape": dims.show(shape)}


def _ops(model: ir.Model) -> Counter[str]:
    return Counter(
        f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        for node in model.graph.all_nodes()
    )


def _by_dtype(model: ir.Model) -> dict[str, dict[str, int]]:
    """Number and bytes of the initializers of every dtype, the heaviest first."""
    found: dict[str, dict[str, int]] = {}
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                row = found.setdefault(
                    value.const_value.dtype.name.lower(), {"tensors": 0, "bytes": 0}
                )
                row["tensors"] += 1
                row["bytes"] += value.const_value.nbytes
    return dict(sorted(found.items(), key=lambda item: -item[1]["bytes"]))


def _grouped(costs: Cost, most: int | None) -> Mapping[str, tuple[str, str, str]]:
    """The cost of modules, summed at the deepest level that has at most ``most`` of them."""
    paths = list(costs.by_module)
    depth = max((path.count(".") + 1 for path in paths), default=1)
    while most is not None and depth > 1 and len({_upto(path, depth) for path in paths}) > most:
        depth -= 1
    sums: dict[str, list[float | None]] = {}
    for path, share in costs.by_module.items():
        row = sums.setdefault(_upto(path, depth), [0, 0, 0])
        for at, number in enumerate((share.params, share.bytes, share.macs)):
            known = row[at]
            row[at] = None if known is None or number is None else known + number
    return {
        path: (render.count(row[0]), render.size(row[1] or 0), render.count(row[2]))
        for path, row in sums.items()
    }


def _upto(path: str, depth: int) -> str:
    return ".".join(path.split(".")[:depth])
