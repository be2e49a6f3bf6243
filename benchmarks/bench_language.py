"""What pipelines of passes cost a language model: parameters, perplexity, KL and top-1 agreement.

    python benchmarks/bench_language.py MODEL CALIBRATION VALIDATION [--set drop] [--setting "drop(count=2)"]

MODEL is a Hugging Face directory or an ONNX file of a language model; see ``language.py`` for the texts and
the protocol. One row a pipeline; the first is the dense model. ``--windows N`` is a quick look: N windows
for calibration, every second of N for validation.
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

from language import Judge, feeds, texts

from netlathe.analysis.cost import cost
from netlathe.api import capture
from netlathe.ir import normal, verify
from netlathe.pipeline.pass_ import Context
from netlathe.pipeline.text import parse

FOLD = "fold_norms(untie=True)"
DROP = "drop(kind='joint', params={}, score='kl', search='greedy')"
SLICE = "slice(parameters={}, basis='loss', refit=True)"
PRUNE = "prune(scope=('ffn', 'heads'), params={})"
SETS = {
    # One step of a kind each, and two or three steps that each take their part of the same budget.
    "compose": [
        pipeline
        for share in (0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
        for pipeline in (
            DROP.format(share),
            PRUNE.format(share),
            f"{FOLD}, {SLICE.format(round(1 - share, 3))}",
            f"{DROP.format(round(share**0.5, 3))}, {PRUNE.format(round(share**0.5, 3))}",
            f"{PRUNE.format(round(share**0.5, 3))}, {FOLD}, {SLICE.format(round(1 - share**0.5, 3))}",
            f"{DROP.format(round(share ** (1 / 3), 3))}, {PRUNE.format(round(share ** (1 / 3), 3))},"
            f" {FOLD}, {SLICE.format(round(1 - share ** (1 / 3), 3))}",
        )
    ],
    "drop": [
        f"drop(kind='{kind}', count={count}{how})"
        for kind, counts in (("attention", (2, 4, 6)), ("ffn", (1, 2, 3)), ("block", (1, 2, 3)))
        for count in counts
        for how in (
            ", score='uniform'",
            "",
            ", score='angular'",
            ", score='mse'",
            ", score='kl'",
            ", score='perplexity', search='greedy'",
            ", score='mse', search='greedy'",
            ", score='kl', search='greedy'",
        )
    ]
    + [
        "drop(kind='joint', count=4, score='kl', search='greedy')",
        "drop(kind='joint', params=0.9, score='kl')",
        "drop(kind='joint', params=0.9, score='kl', search='greedy')",
    ],
}


def main() -> None:
    """Print the table, row by row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("model", type=Path, help="a Hugging Face directory, or an ONNX file")
    parser.add_argument("calibration", type=Path, help="text, text.xz or ids.npy")
    parser.add_argument("validation", type=Path, help="text, text.xz or ids.npy")
    parser.add_argument("--set", choices=sorted(SETS), default="drop", help="which settings")
    parser.add_argument("--setting", action="append", help="a pipeline in text form, instead")
    parser.add_argument("--windows", type=int, help="a quick look with this many windows")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    calibration, validation = texts(args.model, args.calibration, args.validation, args.windows)
    dense = capture(args.model).model
    judge = Judge(dense, validation, args.device)
    print(f"{len(calibration)} calibration and {len(validation)} validation windows")
    print("| pipeline | params | ppl | KL | top-1 | s | peak RSS MiB |")
    print("|---|---|---|---|---|---|---|")
    for setting in ["", *(args.setting or SETS[args.set])]:
        model, start = dense.clone(), time.perf_counter()
        for pass_ in parse(setting) if setting else ():
            ctx = Context(calibration=feeds(model, calibration), device=args.device)
            pass_.run(model, ctx)
            normal.normalize(model)
            verify.check(model)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(
            f"| `{setting or 'dense'}` | {cost(model).params / 1e6:.2f}M | {judge.of(model)}"
            f" | {seconds:.1f} | {peak:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
