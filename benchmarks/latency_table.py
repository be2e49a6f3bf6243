"""Measure how long a model takes at other widths: the table that `prune(latency=...)` reads.

    python benchmarks/latency_table.py MODEL -o times.csv --scope ffn heads --dims batch=1,sequence=128
    python benchmarks/latency_table.py MODEL -o times.csv --drop joint --dims batch=1,sequence=128

Every candidate is pruned by itself, at a few widths, and the whole model is timed in ONNX Runtime against the
unpruned one, in turn. A row says what the model takes with that candidate at that width and all others at
theirs, less what the others take: the unpruned model's time is shared out evenly, so that the rows of all
candidates at full width add up to it. With `--drop` it is the table that `drop(latency=...)` reads: every
candidate of that kind has the width 1, and 0 where the model is timed without it.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import get_args

import onnx_ir as ir

import netlathe
from netlathe.analysis.axes import analyse, delete
from netlathe.execute import ort
from netlathe.execute.compare import inputs_of
from netlathe.execute.timing import in_turn
from netlathe.ir import normal
from netlathe.passes.drop import candidates as dropping
from netlathe.passes.drop.editing import remove_caches, take_out
from netlathe.passes.prune.candidates import SCOPES, Candidate, find_candidates
from netlathe.pipeline.interfaces import Captured

# Candidate -> the model with it at each width, the full one among them; made when it is measured.
Models = Iterator[tuple[str, dict[int, ir.Model]]]


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description="Measure a model at other widths.")
    parser.add_argument("model", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--scope", nargs="+", choices=SCOPES, default=["ffn"])
    parser.add_argument("--drop", choices=get_args(dropping.Kind), help="what to drop, instead")
    parser.add_argument("--widths", type=int, default=3, help="widths that are measured of each")
    parser.add_argument("--multiple", type=int, default=1, help="as round_to of prune")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--dims", default="", help="sizes of dynamic dims: batch=1,sequence=128")
    given = parser.parse_args()
    captured = netlathe.capture(given.model)
    pairs = (pair.split("=") for pair in given.dims.split(",") if pair)
    sizes = {**captured.dynamic, **{name: int(size) for name, size in pairs}}
    if given.drop:
        found = dropping.find_candidates(captured.model, given.drop)
        count, models = len(found), without(captured.model, found)
    else:
        every = find_candidates(analyse(captured.model), multiple=given.multiple)
        free = [c for c in every if c.scope in given.scope and not c.pins and len(c.widths()) > 1]
        count, models = len(free), narrower(captured.model, free, given.widths)
    with given.out.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(("candidate", "width", "ms"))
        for name, variants in models:
            times = measure(captured, variants, sizes, given.rounds)
            full = times[max(times)]
            for width, ms in sorted(times.items()):
                table.writerow((name, width, f"{ms - full + full / count:.6f}"))
    print(f"{given.out}: {count} candidates")


def without(model: ir.Model, found: list[dropping.Candidate]) -> Models:
    """The model with and without every candidate that can go."""
    for candidate in found:
        variants = {1: model}
        if not candidate.reason:
            variants[0] = gone = model.clone()
            leaving = dropping.go_together(model, [candidate], 1).leaving
            caches = candidate.detail(None, leaving)
            take_out(gone.graph, candidate.places)
            remove_caches(gone.graph, caches["cache_inputs"], caches["cache_outputs"])
            normal.normalize(gone)
        yield candidate.name, variants


def narrower(model: ir.Model, free: list[Candidate], count: int) -> Models:
    """The model with every candidate at ``count`` of its widths."""
    for candidate in free:
        variants = {candidate.size: model}
        for width in some(candidate.widths(), count):
            if width < candidate.size:
                variants[width] = made = model.clone()
                axes = analyse(made)
                group = next(g for g in axes.groups if g.name == candidate.group.name)
                delete(axes, {group: range(width, group.size)})
        yield candidate.name, variants


def some(widths: list[int], count: int) -> list[int]:
    """``count`` of the widths, evenly spread, the least and the largest among them."""
    count = min(max(count, 2), len(widths))
    return [widths[i * (len(widths) - 1) // (count - 1)] for i in range(count)]


def measure(
    captured: Captured, variants: Mapping[int, ir.Model], sizes: Mapping[str, int], rounds: int
) -> dict[int, float]:
    """Milliseconds of each model at its width, in turn."""
    feeds = captured.sample(sizes, 0)
    runs = {}
    for width, model in variants.items():
        session, fitting = ort.Session(model, optimize=True), inputs_of(model, feeds)
        runs[str(width)] = lambda session=session, fitting=fitting: session.run(fitting)
    return {int(name): timing.median_ms for name, timing in in_turn(runs, rounds=rounds).items()}


if __name__ == "__main__":
    main()
