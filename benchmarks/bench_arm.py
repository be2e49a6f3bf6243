"""The ARM kernels against the ports of each core, and their dynamic instruction counts.

    python benchmarks/bench_arm.py [--cores neoverse-n1 ...] [--kernels dot ...] [--report FILE] [--count]

Every kernel is lowered and compiled as a model is, and goes through llvm-mca 19 or newer two times:

* loop: the loop with the most multiplications, loads and loop control included, in a steady state;
* whole: a small kernel with ragged dims, as qemu executes it: packing, loops, tails of k, of rows and of
  columns, epilogues, borders.

For both there is, as a share of the cycles taken,

* mca: llvm-mca's "Block RThroughput", the cycles that each group of units by itself needs at least;
* ports: likewise, also of all vector units together, all of memory, and all of integers;
* peak: the cycles that the multiplications alone need.

Bar: ports at least 85 % everywhere. The loops of float weights and bytes are expected there by peak
too; those that unpack codes do more than they multiply. Neoverse cores need llvm-mca 19: 14 falls back to
the model of another core without a word, so the names of the units are checked.

--count runs whole kernels in qemu's user mode with a plugin of a few lines, which needs a C compiler, and
shows instructions for each multiply-add, beside what the inner loops of XNNPACK's micro-kernels of the same
kind take by their shapes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from arm_kernels import KERNELS
from arm_tools import Measured, Tools, count, executed, inner_loop, measured

from netlathe.backends.tvm.arm.cores import CORES, Core

BAR = 0.85
TURNS = 400  # of a loop, to its steady state


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cores", nargs="+", choices=CORES, default=list(CORES))
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument(
        "--report", type=Path, help="write the loops and what llvm-mca says of them"
    )
    parser.add_argument("--count", action="store_true", help="count instructions of whole kernels")
    arguments = parser.parse_args()
    tools = Tools.find()
    reports: list[str] = []
    worst = 1.0
    row = "{:24} {:12} {:6} {:>12} {:>8} {:>6} {:>6} {:>6}"
    print(row.format("kernel", "core", "part", "instructions", "cycles", "mca", "ports", "peak"))
    for name in arguments.kernels:
        for core in _cores(name, arguments.cores):
            for part, found, text in _parts(tools, name, core):
                reports.append(f"=== {name}, {core.name}, {part}\n{text}{found.said}")
                shares = [each / found.cycles for each in (found.mca, found.ports, found.peak)]
                numbers = (found.instructions, f"{found.cycles:.1f}", *(f"{x:.1%}" for x in shares))
                print(row.format(name, core.name, part, *numbers), flush=True)
                worst = min(worst, found.ports / found.cycles)
    if arguments.report is not None:
        arguments.report.write_text("\n".join(reports), "utf-8")
    if arguments.count:
        _counts(arguments.kernels, arguments.cores)
    print(f"least share of the port-bound peak: {worst:.1%} (bar {BAR:.0%})")
    return int(worst < BAR)


def _cores(name: str, chosen: Sequence[str]) -> list[Core]:
    return [CORES[core] for core in chosen if core in KERNELS[name].cores]


def _parts(tools: Tools, name: str, core: Core) -> list[tuple[str, Measured, str]]:
    """The loop, where one without branches multiplies, with its text, and the whole of a ragged kernel."""
    kernel = KERNELS[name]
    made = []
    if loop := inner_loop(tools, kernel.build(), core):
        made.append(("loop", measured(tools, core, loop, TURNS), "\n".join(loop) + "\n"))
    whole = executed(tools, kernel.ragged(), core)
    return [*made, ("whole", measured(tools, core, whole, 1), "")]


def _counts(names: Sequence[str], cores: Sequence[str]) -> None:
    """Print instructions for each multiply-add of whole kernels, epilogues and tails included."""
    print(f"\n{'kernel':24} {'core':12} {'instructions per multiply-add':>30}")
    for name in names:
        kernel = KERNELS[name]
        for core in _cores(name, cores):
            each = count(kernel.build(), core) / kernel.work
            print(f"{name:24} {core.name:12} {each:30.4f}", flush=True)
        for peer, each in kernel.peers.items():
            print(f"{'':24} {peer + ' (its inner loop)':42} {each:.4f}")


if __name__ == "__main__":
    sys.exit(main())
