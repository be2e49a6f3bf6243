"""Quantized models in ONNX Runtime against float32, and which of its kernels ran.

    python benchmarks/bench_ort_quantized.py [--threads 1] [--cases llama-decode ...] [--folder DIR]

A LLaMA of 12 layers, 768 wide (random weights), MiniLM (the real one), ResNet-50 and MobileNet-V2 (random
weights) are compiled by several pipelines; each file then runs in turn with float32, in sessions with
default settings. The ratio is that of the medians. From ONNX Runtime's own profile: the operators that took
most of the time, and the share of all time that integer kernels took. `cosine` is that of the outputs to
float32's. Bars: every row that asks for integer kernels has them; the best row of every case is faster than
float32.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from bench_tvm import CASES, directory

import netlathe
from netlathe.execute.timing import in_turn

# Kernels that multiply integers. MatMulNBits does at accuracy level 4.
INTEGER = (
    "DynamicQuantizeMatMul",
    "MatMulIntegerToFloat",
    "MatMulInteger",
    "ConvInteger",
    "QGemm",
    "QLinearConv",
    "QLinearMatMul",
    "MatMulNBits",
)


@dataclass(frozen=True)
class Variant:
    """A pipeline and what it is written for; ``kernel`` is the one that must have run."""

    name: str
    passes: str
    target: str = "onnx-ort"
    level: int = 4
    kernel: str = "MatMulNBits"

    @property
    def settings(self) -> dict[str, Any]:
        """Of the target."""
        return {"accuracy_level": self.level} if self.target == "onnx-ort" else {}


_INT4 = 'quantize(weights="int4", group_size=32)'
TEXT = (
    Variant("int4 g32, level 4", _INT4),
    Variant("int4 g32, level 1", _INT4, level=1),
    Variant("int4 g32, standard ONNX", _INT4, target="onnx"),
    Variant("int8, level 4", "quantize"),
    Variant(
        "w8a8 by tensor",
        'quantize(activations="uint8", activation_scales="tensor", embeddings=False)',
        kernel="DynamicQuantizeMatMul",
    ),
    Variant(
        "w8a8 by token",
        'quantize(activations="int8", activation_scales="token", embeddings=False)',
        kernel="MatMulInteger",
    ),
    Variant(
        "w8a8 static pairs",
        'quantize(activations="uint8", activation_form="qdq", embeddings=False)',
        kernel="MatMulIntegerToFloat",
    ),
)
IMAGE = (
    Variant(
        "w8a8 static pairs, uint8",
        'quantize(activations="uint8", activation_form="qdq")',
        kernel="QLinearConv",
    ),
    Variant(
        "w8a8 static pairs, int8",
        'quantize(activations="int8", activation_form="qdq")',
        kernel="QLinearConv",
    ),
    Variant("w8a8 integer-only", 'quantize(activations="int8")', "onnx", kernel="ConvInteger"),
)
VARIANTS = {"llama": TEXT, "minilm": TEXT, "resnet": IMAGE, "mobilenet": IMAGE}
DEFAULT = ("llama-decode", "llama-prefill", "minilm-128", "resnet-50", "mobilenet-v2")


def feeds(session: onnxruntime.InferenceSession, dims: Mapping[str, int]) -> dict[str, Any]:
    """Inputs of a case: ids within any vocabulary, masks of ones, caches and pixels of small numbers."""
    rng, made = np.random.default_rng(0), {}
    for value in session.get_inputs():
        shape = [d if isinstance(d, int) else int(eval(d, {}, dict(dims))) for d in value.shape]
        if value.name == "input_ids":
            made[value.name] = rng.integers(1000, 30000, shape)
        elif value.type == "tensor(int64)":
            made[value.name] = np.ones(shape, np.int64)
        else:
            made[value.name] = 0.1 * rng.normal(size=shape).astype(np.float32)
    return made


def calibration(captured: netlathe.Captured, dims: Mapping[str, int]) -> list[Any]:
    """Four samples of the captured model's own kind."""
    sizes = (
        {**captured.dynamic, "sequence": 32} if "sequence" in captured.dynamic else captured.dynamic
    )
    return [captured.sample(sizes, seed) for seed in range(4)]


def opened(file: Path, threads: int, profile: str = "") -> onnxruntime.InferenceSession:
    """A session with default settings."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, profile
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def profile(file: Path, fed: Mapping[str, Any], threads: int) -> dict[str, float]:
    """Operator -> share of the time that all kernels took, in three runs after one to warm up."""
    session = opened(file, threads, str(file.parent / "profile"))
    for _ in range(4):
        session.run(None, dict(fed))
    record = Path(session.end_profiling())
    took: collections.Counter[str] = collections.Counter()
    for event in json.loads(record.read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            took[event["args"]["op_name"]] += event["dur"]
    record.unlink()
    return {op: time / sum(took.values()) for op, time in took.most_common()}


def cosine(a: Any, b: Any) -> float:
    """Of two arrays as vectors."""
    a, b = np.asarray(a, np.float64).reshape(-1), np.asarray(b, np.float64).reshape(-1)
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def build(model: str, folder: Path) -> None:
    """Write float32 and every variant, unless they are there."""
    settings: dict[str, Any] = {"cache": True} if model == "llama" else {}
    captured = netlathe.capture(directory(model, folder), **settings)
    first = "cleanup, fold_batch_norm"
    jobs = [("float32", "", "onnx", {})]
    jobs += [(v.name, v.passes, v.target, v.settings) for v in VARIANTS[model]]
    for name, passes, target, own in jobs:
        if (folder / name).exists():
            continue
        data = calibration(captured, {}) if "activations" in passes else []
        compiled = netlathe.compile(
            captured, f"{first}, {passes}" if passes else first, calibration=data, verify=False
        )
        compiled.save(folder / name, target=target, **own)


def rows(
    case: str, folder: Path, threads: int, rounds: int
) -> Iterator[tuple[Variant, float, float, float]]:
    """Print a line for every variant of a case, and yield it with its times and the integer share."""
    model, dims = CASES[case].model, CASES[case].dims
    base = folder / model / "float32" / "model.onnx"
    dense = opened(base, threads)
    fed = feeds(dense, dims)
    wanted = dense.run(None, fed)[0]
    for variant in VARIANTS[model]:
        file = folder / model / variant.name / "model.onnx"
        session = opened(file, threads)
        close = cosine(session.run(None, fed)[0], wanted)
        runs = {
            "float32": lambda: dense.run(None, fed),
            "quantized": lambda session=session: session.run(None, fed),
        }
        times = in_turn(runs, rounds=rounds, warmup=2)
        f, q = times["float32"].median_ms, times["quantized"].median_ms
        shares = profile(file, fed, threads)
        integer = sum(share for op, share in shares.items() if op in INTEGER)
        if variant.level == 1:
            integer -= shares.get("MatMulNBits", 0.0)  # which then computes in float32
        size = sum(path.stat().st_size for path in file.parent.glob("model.onnx*")) / 1e6
        top = ", ".join(f"{op} {share:.0%}" for op, share in list(shares.items())[:4])
        print(
            f"{case:>14} {variant.name:<25} {size:7.1f} {f:8.1f} {q:8.1f} {f / q:6.2f} {close:8.5f}"
            f" {integer:6.0%}  {top}",
            flush=True,
        )
        yield variant, f, q, shares.get(variant.kernel, 0.0)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cases", nargs="+", choices=DEFAULT, default=list(DEFAULT))
    parser.add_argument("--folder", type=Path, help="keep what is built, and use it again")
    arguments = parser.parse_args()
    missed = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        for model in dict.fromkeys(CASES[case].model for case in arguments.cases):
            build(model, folder / model)
        print(
            f"{'case':>14} {'weights':<25} {'MB':>7} {'f32 ms':>8} {'ms':>8} {'times':>6} {'cosine':>8}"
            f" {'integer':>6}  kernels"
        )
        for case in arguments.cases:
            found = list(rows(case, folder, arguments.threads, arguments.rounds))
            missed += [
                f"{case}: {v.name} ran no {v.kernel}"
                for v, _, _, ran in found
                if not ran and v.target != "onnx"
            ]
            if min(q / f for _, f, q, _ in found) >= 1:
                missed.append(f"{case}: nothing is faster than float32")
    print("bars: " + ("; ".join(missed) if missed else "met"))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
