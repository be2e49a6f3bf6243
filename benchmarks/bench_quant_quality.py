"""Fidelity of a quantized language model: bytes on disk, perplexity, KL and top-1 agreement with the dense.

    python benchmarks/bench_quant_quality.py MODEL CALIBRATION VALIDATION

MODEL is a Hugging Face directory or an ONNX file of a language model. A text is a file of plain text (also
.xz), cut by the model's tokenizer.json, or a .npy of token ids. Windows of 512 tokens do not overlap.
Calibration takes the first 128; validation every 4th of the first 200, in each of which tokens 1 to 511 are
predicted from the tokens before them; float32. ``--windows N`` is a quick look: N windows for calibration,
every second of N for validation. Bytes are those of the weights, scales included, and of the ONNX file with
its graph. The settings name the tables of a LLaMA.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from bench_prune_quality import (
    BATCH,
    CALIBRATION,
    EVERY,
    VALIDATION,
    Ids,
    as_feeds,
    batches,
    log_probabilities,
    windows,
)

from netlathe.api import capture
from netlathe.ir import normal, verify, weights
from netlathe.passes.quantize import Quantize
from netlathe.pipeline.pass_ import Context
from netlathe.pipeline.text import parse

HALF = "{'weights': 'float16', 'group_size': 0, 'symmetric': True}"
BYTE = "{'weights': 'int8', 'group_size': 0, 'symmetric': True}"
# Both tables in float16, as most tools leave them; one of them; both in int8.
TABLES = f"overrides={{'embed_tokens': {HALF}, 'lm_head': {HALF}}}"
EMBEDDING = f"overrides={{'embed_tokens': {HALF}}}"
BYTES = f"overrides={{'embed_tokens': {BYTE}, 'lm_head': {BYTE}}}"
SOLVED = "scales='float16', clip='mse', solver='gptq', sweeps=3"

SETTINGS = (
    f"quantize(weights='int8', scales='float16', {EMBEDDING})",
    f"quantize(weights='int4', group_size=64, scales='float16', {TABLES})",
    f"quantize(weights='int4', group_size=64, scales='float16', clip='mse', {TABLES})",
    f"quantize(weights='int4', group_size=64, scales='float16', clip='mse', solver='gptq', {TABLES})",
    f"quantize(weights='int4', group_size=64, {SOLVED}, {TABLES})",
    f"quantize(weights='int4', group_size=32, {SOLVED}, {TABLES})",
    f"quantize(weights='int4', group_size=128, {SOLVED}, {TABLES})",
    f"quantize(weights='int4', group_size=64, symmetric=False, {SOLVED}, {TABLES})",
    f"quantize(weights='int4', group_size=32, symmetric=False, {SOLVED}, {TABLES})",
    f"quantize(weights='int4', group_size=64, {SOLVED}, {EMBEDDING})",
    f"quantize(weights='int3', group_size=64, symmetric=False, {SOLVED}, {TABLES})",
    f"quantize(weights='int2', group_size=32, symmetric=False, {SOLVED}, {TABLES})",
    f"quantize(weights='int6', group_size=64, {SOLVED}, {BYTES})",
    f"quantize(weights='int5', group_size=64, {SOLVED}, {BYTES})",
    f"quantize(weights='int4', group_size=32, {SOLVED}, {BYTES})",
    "quantize(weights='int8', activations='int8', activation_scales='token')",
    "quantize(weights='int8', activations='int8')",
)


def main() -> None:
    """Print the table, row by row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("model", type=Path, help="a Hugging Face directory, or an ONNX file")
    parser.add_argument("calibration", type=Path, help="text, text.xz or ids.npy")
    parser.add_argument("validation", type=Path, help="text, text.xz or ids.npy")
    parser.add_argument("--windows", type=int, help="a quick look with this many windows")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--setting", action="append", help="a pass in text form, instead of all")
    args = parser.parse_args()
    calibration = windows(args.calibration, args.model, args.windows or CALIBRATION)
    count, every = (args.windows, 2) if args.windows else (VALIDATION, EVERY)
    validation = windows(args.validation, args.model, count)[::every]
    model = capture(args.model).model
    feeds = [as_feeds(model, ids) for ids in batches(calibration, BATCH)]
    ctx = Context(calibration=feeds, device=args.device)
    print(f"{len(calibration)} calibration and {len(validation)} validation windows, {args.device}")
    print("| setting | MB of weights | MB on disk | ppl | KL | top-1 | s | peak RSS MiB |")
    print("|---|---|---|---|---|---|---|---|")
    dense = list(log_probabilities(model, validation, args.device))
    row("dense (float32)", model, validation, dense, args.device, 0.0)
    for setting in args.setting or SETTINGS:
        (pass_,) = parse(setting)
        assert isinstance(pass_, Quantize)
        quantized, start = model.clone(), time.perf_counter()
        pass_.edit(quantized, pass_.choose(quantized, ctx), ctx)
        seconds = time.perf_counter() - start
        normal.normalize(quantized)
        verify.check(quantized)
        row(setting, quantized, validation, dense, args.device, seconds)


def row(
    name: str,
    model: ir.Model,
    ids: Ids,
    dense: Sequence[torch.Tensor],
    device: str,
    seconds: float,
) -> None:
    """One row of the table."""
    loss, kl, same, tokens = 0.0, 0.0, 0, 0
    found = log_probabilities(model, ids, device)
    for part, p, q in zip(batches(ids, BATCH), dense, found, strict=True):
        target = torch.from_numpy(part[:, 1:, None])
        loss -= float(q.gather(-1, target).double().sum())
        kl += float((p.exp() * (p - q)).sum(-1).double().sum())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        tokens += target.numel()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        ir.save(model, path)
        size = path.stat().st_size
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"| `{name}` | {weights.num_bytes(model) / 1e6:.2f} | {size / 1e6:.2f}"
        f" | {np.exp(loss / tokens):.3f} | {kl / tokens:.4f} | {100 * same / tokens:.2f}"
        f" | {seconds:.1f} | {peak:.0f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
