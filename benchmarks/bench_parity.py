"""How far captures and the executor are from eager PyTorch, for the twenty models of the zoo.

    python benchmarks/bench_parity.py [NAME ...]

Each model is captured by its frontend and run at two sizes of its dynamic dims, batch above 1. Shown are the
largest max|difference| / RMS over outputs and sizes: of the captured graph in ONNX Runtime (optimizations
off), and of the executor. Bar: 1e-5, float32.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
import torch

from netlathe.execute import ort
from netlathe.execute.compare import relative_error
from netlathe.execute.executor import Executor
from netlathe.frontends.torch_module import TorchModule
from tests import zoo

BAR = 1e-5


def measure(name: str) -> tuple[float, float, int]:
    """Largest errors of ONNX Runtime and of the executor on the capture, and its number of nodes."""
    model = zoo.build(name)
    captured = TorchModule(kwargs=model.kwargs, dynamic=model.dynamic).capture(model.module)
    executor = Executor(captured.model)
    in_runtime = in_executor = 0.0
    for seed, sizes in enumerate(model.sizes):
        kwargs = model.feeds(sizes, seed)
        with torch.no_grad():
            eager = model.module(**kwargs)
        known = {value.name for value in captured.model.graph.inputs}
        feeds = {k: v.numpy() for k, v in kwargs.items() if k in known}
        from_runtime, from_executor = ort.run(captured.model, feeds), executor.run(feeds)
        for output in from_runtime:
            expected = np.asarray(eager[output])
            in_runtime = max(in_runtime, relative_error(from_runtime[output], expected))
            actual = from_executor[output].numpy()
            in_executor = max(in_executor, relative_error(actual, expected))
    return in_runtime, in_executor, len(captured.model.graph)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=list(zoo.NAMES), metavar="NAME")
    failed = []
    print(f"{'model':14} {'nodes':>5} {'capture':>9} {'executor':>9}")
    for name in parser.parse_args().names:
        in_runtime, in_executor, nodes = measure(name)
        print(f"{name:14} {nodes:5} {in_runtime:9.1e} {in_executor:9.1e}", flush=True)
        if not max(in_runtime, in_executor) <= BAR:
            failed.append(name)
    print(f"bar {BAR:.0e}: " + (f"missed by {', '.join(failed)}" if failed else "met by all"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
