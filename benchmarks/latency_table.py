"""Measure how long a model takes at other widths: the table that `prune(latency=...)` reads.

    python benchmarks/latency_table.py MODEL -o times.csv --scope ffn heads --dims batch=1,sequence=128

Every candidate is pruned by itself, at a few widths, and the whole model is timed in ONNX Runtime against the
unpruned one, in turn. A row says what the model takes with that candidate at that width and all others at
theirs, less what the others take: the unpruned model's time is shared out evenly, so that the rows of all
candidates at full width add up to it.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import netlathe
from netlathe.analysis.axes import analyse, delete
from netlathe.execute import ort
from netlathe.execute.compare import inputs_of
from netlathe.execute.timing import in_turn
from netlathe.passes.prune.candidates import SCOPES, Candidate, find_candidates
from netlathe.pipeline.interfaces import Captured


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description="Measure a model at other widths.")
    parser.add_argument("model", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--scope", nargs="+", choices=SCOPES, default=["ffn"])
    parser.add_argument("--widths", type=int, default=3, help="widths that are measured of each")
    parser.add_argument("--multiple", type=int, default=1, help="as round_to of prune")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--dims", default="", help="sizes of dynamic dims: batch=1,sequence=128")
    given = parser.parse_args()
    captured = netlathe.capture(given.model)
    pairs = (pair.split("=") for pair in given.dims.split(",") if pair)
    sizes = {**captured.dynamic, **{name: int(size) for name, size in pairs}}
    found = find_candidates(analyse(captured.model), multiple=given.multiple)
    free = [c for c in found if c.scope in given.scope and not c.pins and len(c.widths()) > 1]
    with given.out.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(("candidate", "width", "ms"))
        for candidate in free:
            widths = _some(candidate.widths(), given.widths)
            times = _measure(captured, candidate, widths, sizes, given.rounds)
            share = times[candidate.size] / len(free)
            for width in widths:
                ms = times[width] - times[candidate.size] + share
                table.writerow((candidate.name, width, f"{ms:.6f}"))
    print(f"{given.out}: {len(free)} candidates")


def _some(widths: list[int], count: int) -> list[int]:
    """``count`` of the widths, evenly spread, the least and the largest among them."""
    count = min(max(count, 2), len(widths))
    return [widths[i * (len(widths) - 1) // (count - 1)] for i in range(count)]


def _measure(
    captured: Captured,
    candidate: Candidate,
    widths: list[int],
    sizes: dict[str, int],
    rounds: int,
) -> dict[int, float]:
    """Milliseconds of the model at each width of a candidate."""
    feeds = captured.sample(sizes, 0)
    runs = {}
    for width in widths:
        model = captured.model.clone()
        axes = analyse(model)
        group = next(g for g in axes.groups if g.name == candidate.group.name)
        if width < group.size:
            delete(axes, {group: range(width, group.size)})
        session, fitting = ort.Session(model, optimize=True), inputs_of(model, feeds)
        runs[str(width)] = lambda session=session, fitting=fitting: session.run(fitting)
    return {int(name): timing.median_ms for name, timing in in_turn(runs, rounds=rounds).items()}


if __name__ == "__main__":
    main()
