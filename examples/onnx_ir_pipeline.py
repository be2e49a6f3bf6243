"""Run NetLathe's passes in one `onnx_ir` pipeline with those of onnxscript and of onnx_ir itself.

    python examples/onnx_ir_pipeline.py                # writes a small network of opset 13 first
    python examples/onnx_ir_pipeline.py model.onnx

Every NetLathe pass is an `onnx_ir` pass, so a build that has such a pipeline takes them in as they are.
`Pass.bind` gives one a context (calibration data, a seed, a target) and keeps its result, ledger included.
Passes run this way are not checked after each other, as `netlathe.compile` does; so the end is checked
here, in ONNX Runtime.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
import onnxruntime
from onnx_model import write_network
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.rules.common import flatten_to_reshape_rule, matmul_add_to_gemm_rule
from onnxscript.version_converter import ConvertVersionPass

from netlathe import Context
from netlathe.execute import samples
from netlathe.passes.cleanup import Cleanup
from netlathe.passes.fold_batch_norm import FoldBatchNorm
from netlathe.passes.quantize import Quantize

# The file is judged against the original: folding moves outputs by roundings, which at a few layers
# stay below 84 ulp of float32; 8-bit weights of a trained or random network keep directions to 1 %.
FOLDED, COSINE = 84 * 2.0**-23, 0.99


def run(file: Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The outputs of an ONNX file in ONNX Runtime."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return [np.asarray(output) for output in session.run(None, feeds)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, nargs="?", default=Path("out/onnx-ir/network.onnx"))
    parser.add_argument("--output", type=Path, default=Path("out/onnx-ir"))
    arguments = parser.parse_args()
    if not arguments.model.exists():
        write_network(arguments.model)
    arguments.output.mkdir(parents=True, exist_ok=True)
    folded, small = arguments.output / "folded.onnx", arguments.output / "small.onnx"

    model = ir.load(arguments.model)
    fold = FoldBatchNorm().bind(Context())
    ir.passes.Sequential(
        ConvertVersionPass(25),  # onnxscript's; NetLathe's passes expect opset 25
        RewritePass([flatten_to_reshape_rule]),
        Cleanup(),  # brings the model into NetLathe's normal form as well
        fold,
        common.CheckerPass(),
    )(model)
    ir.save(model, folded)
    assert fold.result is not None
    for entry in fold.result.entries:
        print(f"{fold.pass_}: {entry.status} {entry.candidate}: {entry.reason}")

    quantize = Quantize(weights="int8").bind(Context())
    ir.passes.Sequential(
        quantize,
        RewritePass([matmul_add_to_gemm_rule]),  # products of dequantized weights included
        common.RemoveUnusedNodesPass(),
        common.CheckerPass(),
    )(model)
    ir.save(model, small)
    assert quantize.result is not None
    for entry in quantize.result.entries:
        print(f"{quantize.pass_}: {entry.status} {entry.candidate}: {entry.reason}")

    for batch in (1, 3):
        start = ir.load(arguments.model)
        feeds = samples.synthesize(start, dict.fromkeys(samples.dynamic_dims(start), batch), 0)
        for expected, same, close in zip(
            run(arguments.model, feeds), run(folded, feeds), run(small, feeds), strict=True
        ):
            error = np.abs(same - expected).max() / np.sqrt(np.mean(expected**2))
            a, b = expected.ravel().astype(np.float64), close.ravel().astype(np.float64)
            cosine = a @ b / np.sqrt((a @ a) * (b @ b))
            print(f"batch {batch}: folded is off by {error:.1e}, small has cosine {cosine:.5f}")
            if not error <= FOLDED or not cosine >= COSINE:
                raise SystemExit("the result is not the model it was made from")
    sizes = [file.stat().st_size for file in (arguments.model, folded, small)]
    print(f"{sizes[0]:,} bytes became {sizes[1]:,} and {sizes[2]:,}")


if __name__ == "__main__":
    main()
