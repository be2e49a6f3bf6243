"""How many wrong rewrites the pipeline's checks find: mutants of every pass, killed and survived.

    python benchmarks/bench_mutants.py [--count 30] [--only quantize]

Every mutant is a mistake made in what a pass has just edited; it is run through the pipeline as any pass
is. Bar: of at least 500, 98 % stop the pipeline with an error that names the right pass.
"""

from __future__ import annotations

import argparse
import sys
import time

from tests.mutants.harness import Score, campaign
from tests.mutants.subjects import subjects


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=30, help="mutants of each pass on each model")
    parser.add_argument("--only", default="", help="passes and models whose name contains this")
    given = parser.parse_args()
    chosen = [subject for subject in subjects() if given.only in str(subject)]
    start = time.perf_counter()
    outcomes = []
    for outcome in campaign(chosen, given.count):
        outcomes.append(outcome)
        if sys.stderr.isatty():
            print(f"\r{len(outcomes)} {outcome.subject!s:50.50}", end="", file=sys.stderr)
    score = Score(outcomes)
    print(score.table())
    print(f"{time.perf_counter() - start:.0f} s")
    enough = score.counted >= 500 or given.only
    good = score.killed >= 0.98 and not score.of("blamed another", "crashed")
    return 0 if enough and good else 1


if __name__ == "__main__":
    sys.exit(main())
