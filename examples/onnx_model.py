"""Compile a plain ONNX file: no PyTorch is needed, in or out.

    python examples/onnx_model.py                # writes a small network of opset 13 first
    python examples/onnx_model.py model.onnx     # any ONNX file of opset 7 to 25

Does what `netlathe compile model.onnx --passes "..." -o DIR` does, in Python: look at the plan, which
touches nothing, compile, and write for an older opset than the newest.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import netlathe

PASSES = 'cleanup, fold_batch_norm, quantize(weights="int8")'


def write_network(file: Path, *, seed: int = 0) -> None:
    """Two convolutions with batch norms, a pool and a classifier, as an older exporter would write them."""
    rng = np.random.default_rng(seed)
    weights: dict[str, np.ndarray] = {}
    nodes = []
    x, channels = "image", 3
    for i, width in enumerate((32, 64)):
        fan_in = 9 * channels
        weights[f"conv{i}.weight"] = rng.normal(0, fan_in**-0.5, (width, channels, 3, 3))
        weights[f"bn{i}.weight"] = rng.uniform(0.5, 1.5, width)
        weights[f"bn{i}.bias"] = rng.normal(0, 0.1, width)
        weights[f"bn{i}.mean"] = rng.normal(0, 0.1, width)
        weights[f"bn{i}.var"] = rng.uniform(0.5, 1.5, width)
        nodes += [
            helper.make_node(
                "Conv", [x, f"conv{i}.weight"], [f"c{i}"], pads=[1] * 4, strides=[2, 2]
            ),
            helper.make_node(
                "BatchNormalization",
                [f"c{i}", *(f"bn{i}.{part}" for part in ("weight", "bias", "mean", "var"))],
                [f"b{i}"],
            ),
            helper.make_node("Relu", [f"b{i}"], [f"r{i}"]),
        ]
        x, channels = f"r{i}", width
    weights["head.weight"] = rng.normal(0, channels**-0.5, (10, channels))
    weights["head.bias"] = rng.normal(0, 0.1, 10)
    nodes += [
        helper.make_node("GlobalAveragePool", [x], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Gemm", ["flat", "head.weight", "head.bias"], ["logits"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 32, 32])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 10])],
        [numpy_helper.from_array(w.astype(np.float32), name) for name, w in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    file.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, file)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, nargs="?", default=Path("out/network.onnx"))
    parser.add_argument("--output", type=Path, default=Path("out/onnx-model"))
    arguments = parser.parse_args()
    if not arguments.model.exists():
        write_network(arguments.model)

    captured = netlathe.capture(arguments.model)
    print("the plan:")
    for step in netlathe.plan(captured, PASSES):
        for entry in step.entries:
            print(f"  {step.pass_.name:16} {entry.status:8} {entry.candidate}: {entry.reason}")

    compiled = netlathe.compile(captured, PASSES)
    print("\nverified:")
    for step in compiled.steps:
        print(f"  {step.pass_.name:16} {step.check}")

    compiled.save(arguments.output, opset=17, overwrite=True)
    before, after = (netlathe.cost(m).bytes for m in (compiled.dense, compiled.model))
    print(f"\n{before:,} bytes of weights became {after:,}; written to {arguments.output}")


if __name__ == "__main__":
    main()
