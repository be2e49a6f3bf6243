"""What a key-value cache in 8 and 4 bits costs a language model, and the bytes a token takes in it.

    python benchmarks/bench_quantized_cache.py MODEL VALIDATION [--windows N] [--device cuda]

MODEL is a Hugging Face directory of a causal language model; see ``language.py`` for the text and the
protocol. Every position of a window is read back from the cache as it is stored. One row a setting.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import onnx_ir as ir
from language import EVERY, VALIDATION, Judge, windows

from netlathe.api import capture
from netlathe.ir import normal, verify
from netlathe.passes.quantize_cache import QuantizeCache
from netlathe.pipeline.pass_ import Context

SETTINGS = [
    QuantizeCache(codes=codes, scales=scales)
    for codes in ("int8", "int4")
    for scales in ("float32", "float16")
]


def bytes_a_token(model: ir.Model) -> int:
    """What one position takes in all caches, scales and zero points among it."""
    total = 0
    for value in model.graph.inputs:
        if value.name and value.name.startswith("past_key_values."):
            assert value.shape is not None and value.dtype is not None
            _, heads, _, width = (d if isinstance(d, int) else 1 for d in value.shape)
            total += heads * width * value.dtype.bitwidth // 8
    return total


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("validation", type=Path)
    parser.add_argument("--windows", type=int, help="a quick look: every second of so many")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    count, every = (args.windows, 2) if args.windows else (VALIDATION, EVERY)
    dense = capture(args.model, cache=True).model
    judge = Judge(dense, windows(args.validation, args.model, count)[::every], args.device)
    print("| cache | bytes a token | perplexity | KL | top-1 |\n|---|---|---|---|---|")
    print(f"| float32 | {bytes_a_token(dense)} | {judge.of(dense)} |", flush=True)
    for setting in SETTINGS:
        model = dense.clone()
        setting.run(model, Context())
        normal.normalize(model)
        verify.check(model)
        print(f"| `{setting}` | {bytes_a_token(model)} | {judge.of(model)} |", flush=True)


if __name__ == "__main__":
    main()
