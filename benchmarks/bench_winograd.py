"""Convolutions 3 x 3 by Winograd's transforms beside the direct kernel, layer by layer.

    python benchmarks/bench_winograd.py [--threads 2] [--features avx2] [--layers resnet vgg espcn]

Each layer is a model of its own, with bias and ReLU, compiled with the direct kernel and with F(2 x 2, 3 x 3)
and F(4 x 4, 3 x 3) as they are planned for it. They take turns, and before each run 256 MB are read, so
that weights come from memory as in a network. Printed are the median of the direct kernel, the ratios of
the others to it and, after a slash, what the model of cost makes of them; an asterisk is what it chooses.
The errors are RMS against float64, of N(0, 1) weights and of N(0, 1) inputs after a ReLU, over the RMS of the
result.
For one thread its own time is counted, for more that of the wall.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from unittest import mock

import numpy as np
import onnx_ir as ir
import tvm
from tvm import relax

from netlathe.backends.tvm import build, packing, runtime
from netlathe.backends.tvm.kernels import winograd, winograd_plan
from netlathe.backends.tvm.kernels.conv import Geometry
from netlathe.backends.tvm.lowering import Lowering
from netlathe.backends.tvm.machine import Machine, machine
from netlathe.execute.timing import in_turn
from netlathe.ir import normal

# Rows, columns, channels in and out.
LAYERS: Mapping[str, Sequence[tuple[int, int, int, int]]] = {
    "resnet": [(56, 56, 64, 64), (28, 28, 128, 128), (14, 14, 256, 256), (7, 7, 512, 512)],
    "vgg": [(112, 112, 64, 128), (56, 56, 256, 256), (28, 28, 512, 512), (14, 14, 512, 512)],
    "espcn": [(128, 128, 64, 32), (128, 128, 32, 12)],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--features", default="native")
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    runtime.set_threads(given.threads)
    here = machine(given.features)
    row = "{:>20} {:>10}" + " {:>13}" * 2 + " {:>9}" * 3
    print(row.format("layer", "direct ms", "F(2x2)", "F(4x4)", "error", "F(2x2)", "F(4x4)"))
    for name in given.layers:
        for layer in LAYERS[name]:
            direct, ratios, errors = measured(layer, here, given.threads, given.rounds)
            print(row.format("x".join(map(str, layer)), f"{direct:.3f}", *ratios, *errors))


def measured(
    layer: tuple[int, int, int, int], here: Machine, threads: int, rounds: int
) -> tuple[float, list[str], list[str]]:
    """The direct kernel's median in ms; ratios and estimates; errors of all three."""
    h, w, inputs, outputs = layer
    geometry = Geometry(1, inputs, outputs, (3, 3), (1, 1), (1, 1))
    estimates = winograd_plan.estimates(here, geometry, 1, (h, w))
    chosen = winograd_plan.plan(here, geometry, 1, (h, w))
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(outputs, inputs, 3, 3)).astype(np.float32)
    x = np.maximum(rng.normal(size=(1, h, w, inputs)), 0).astype(np.float32)
    plans = {"direct": None, **{str(m): made for m, (_, made) in estimates.items()}}
    runs = {name: compiled(layer, weight, x, here, made) for name, made in plans.items()}
    exact = reference(x, weight)
    errors = [np.square(run() - exact).mean() / np.square(exact).mean() for run in runs.values()]
    memory = np.ones(1 << 26, np.float32)
    turns: dict[str, Callable[[], object]] = {
        "read": memory.max
    }  # in either direction, before each
    for name, run in runs.items():
        turns |= {name: run, f"read {name}": memory.max}
    clock = time.thread_time if threads == 1 else time.perf_counter
    found = in_turn(turns, rounds=rounds, clock=clock, rest_s=0.0 if threads == 1 else 0.2)
    direct = found["direct"].median_ms
    ratios = [
        f"{found[str(m)].median_ms / direct:.2f} / {ratio:.2f}{'*' if made == chosen else ' '}"
        for m, (ratio, made) in estimates.items()
    ]
    return direct, ratios, [f"{np.sqrt(error):.1e}" for error in errors]


def compiled(
    layer: tuple[int, int, int, int],
    weight: np.ndarray[Any, Any],
    x: np.ndarray[Any, Any],
    here: Machine,
    chosen: winograd_plan.Plan | None,
) -> Callable[[], np.ndarray[Any, Any]]:
    """A run of the layer on ``x``, channels last as in the middle of a network, by the plan given."""
    h, w, inputs, outputs = layer
    model = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 25]>
        layer (float[1, {h}, {w}, {inputs}] x, float[{outputs}, {inputs}, 3, 3] k, float[{outputs}] b)
            => (float[1, {h}, {w}, {outputs}] y) {{
            t = Transpose<perm=[0, 3, 1, 2]>(x)
            c = Conv<pads=[1, 1, 1, 1]>(t, k, b)
            r = Relu(c)
            y = Transpose<perm=[0, 2, 3, 1]>(r)
        }}"""
    )
    for name, array in (("k", weight), ("b", np.zeros(outputs, np.float32))):
        value = next(v for v in model.graph.inputs if v.name == name)
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(array, name=name)
        model.graph.register_initializer(value)
    normal.normalize(model)
    with mock.patch.object(winograd, "plan", lambda *_: chosen):
        lowered = Lowering(model, here).run()
    constants = packing.constants(model)
    made = [parameter.recipe.make(constants) for parameter in lowered.parameters]
    machine_: Any = relax.VirtualMachine  # its annotation names another Device
    main_ = machine_(build.executable(lowered, here), tvm.cpu())["main"]
    given = [tvm.runtime.tensor(array) for array in (x, *made)]
    return lambda: main_(*given)[0].numpy()


def reference(x: np.ndarray[Any, Any], weight: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The layer in float64."""
    _, h, w, _ = x.shape
    whole = np.pad(x[0].astype(np.float64), ((1, 1), (1, 1), (0, 0)))
    sums = sum(
        whole[i : i + h, j : j + w] @ weight[:, :, i, j].astype(np.float64).T
        for i in range(3)
        for j in range(3)
    )
    return np.maximum(sums, 0)[None]


if __name__ == "__main__":
    main()
