"""Speed of the CUDA backend's products on a GPU, against torch's and against a copy of memory.

    python benchmarks/bench_cuda.py build DIR          # where nvcc and NetLathe are; no GPU needed
    python DIR/bench_cuda.py run DIR                   # where the GPU is; torch, tvm_ffi and TVM's runtime

``build`` compiles one library for each weight shape and format and puts this file and the loader beside them;
no weights are stored, ``run`` makes random ones. Products with many rows are timed in turn with torch.matmul,
torch._int_mm of int8 to int32, and torch._scaled_mm of 8-bit floats to bfloat16, a scale for each operand;
all are checked against float64. Products with few rows are launches in one CUDA graph that walks over copies
of the weight that no cache holds; their share is of what copying a gigabyte moves, counted in bytes of
weights, scales, inputs and results. What torch's copies of as many bytes, read and written, reach in such a
graph is shown beside them; not in turn, as what they have written leaves the cache while the next graph runs.
From 17 to 1024 rows such graphs are replayed in turn with those of torch's products, and those of int8 and
int4 weights with those of bfloat16; so are products of two inputs, the right one as it lies and turned. Times
are medians of CUDA events.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import shutil
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# (K, N) of 7B and 70B models of the LLaMA family, and the square ones.
LARGE = {
    (4096, 4096): (2048, 4096),
    (4096, 8192): (8192,),
    (4096, 11008): (2048,),
    (11008, 4096): (2048,),
}
SMALL = [(4096, 4096), (4096, 11008), (11008, 4096), (8192, 8192), (8192, 28672), (28672, 8192)]
HELD = {"bf16": "uint16", "f16": "float16", "int8x8": "int8"}  # numpy's names of what is multiplied
MANY = ("bf16", "f16", "int8x8", "e4m3", "e5m2")  # kinds of products with many rows
INTEGERS = ("int8", "int4")  # weights by which halves are multiplied
ROWS = (1, 4, 16)
AMID = [(4096, 4096), (4096, 11008), (11008, 4096), (8192, 28672)]
BETWEEN = (17, 64, 128, 129, 180, 200, 256, 300, 400, 512, 600, 768, 900, 1024)  # rows
# Products of two inputs: how many, rows, columns, K.
PAIRS = [
    (32, 2048, 2048, 128),
    (32, 2048, 128, 2048),
    (1, 4096, 4096, 4096),
    (16, 512, 512, 64),
    (16, 512, 64, 512),
    (128, 512, 512, 64),
    (768, 197, 197, 64),
    (768, 197, 64, 197),
]
GROUP = 128
ROUNDS, INSIDE = 7, 10
BEYOND_CACHE = 600_000_000  # bytes of weights that one graph reads


# -- building --------------------------------------------------------------------------------------


def build(folder: Path, archs: str) -> None:
    """Compile every library."""
    from netlathe.backends.tvm import process, runtime, toolchain
    from netlathe.backends.tvm.cuda.machine import gpu

    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(__file__, folder / "bench_cuda.py")
    shutil.copyfile(runtime.__file__, folder / "runtime.py")
    machine = gpu(archs.split(","))
    jobs = [(shape, kind, "f16" if kind == "f16" else "bf16") for shape in LARGE for kind in MANY]
    jobs += [(shape, kind, "bf16") for shape in SMALL for kind in ("bf16", *INTEGERS)]
    amid = ("bf16", "e4m3", "int8x8", *INTEGERS)
    jobs += [(shape, kind, "bf16") for shape in AMID for kind in amid]

    def one(job: tuple[tuple[int, int], str, str]) -> None:
        (inner, columns), kind, half = job
        name = f"{kind}-{inner}-{columns}"
        model = linear(inner, columns, kind, half)
        library = folder / f"{name}.so"
        built = process.build(model, machine, library, (toolchain.compiler(),))
        facts = {
            "inner": inner,
            "columns": columns,
            "kind": kind,
            "parameters": [(p.dtype, p.shape) for p in built.parameters],
        }
        (folder / f"{name}.json").write_text(json.dumps(facts))
        print(name, flush=True)

    def two(job: tuple[tuple[int, int, int, int], bool]) -> None:
        library = folder / f"{paired(*job)}.so"
        process.build(pair(*job), machine, library, (toolchain.compiler(),))
        print(library.stem, flush=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # each waits for a process of its own
        list(pool.map(one, dict.fromkeys(jobs)))
        list(pool.map(two, [(sizes, turned) for sizes in PAIRS for turned in (False, True)]))


def paired(sizes: tuple[int, int, int, int], turned: bool) -> str:
    """The name of a library."""
    return "-".join(["turned" if turned else "pair", *map(str, sizes)])


def pair(sizes: tuple[int, int, int, int], turned: bool) -> Any:
    """A MatMul of two inputs of bfloat16; the right one is [columns, K] where it is turned."""
    import onnx_ir as ir

    count, rows, columns, inner = sizes
    right, name = (f"{columns}, {inner}", "t") if turned else (f"{inner}, {columns}", "b")
    return ir.from_onnx_text(
        f"""<ir_version: 12, opset_import: ["" : 25]>
        g (bfloat16[{count}, {rows}, {inner}] a, bfloat16[{count}, {right}] b)
            => (bfloat16[{count}, {rows}, {columns}] y)
        {{ {"t = Transpose <perm = [0, 2, 1]> (b)" if turned else ""} y = MatMul (a, {name}) }}"""
    )


def linear(inner: int, columns: int, kind: str, half: str) -> Any:
    """A MatMul of [n, inner] with a constant that has a shape and no contents."""
    import onnx_ir as ir

    dtypes = {"bf16": ir.DataType.BFLOAT16, "f16": ir.DataType.FLOAT16}
    floats = {"e4m3": ir.DataType.FLOAT8E4M3FN, "e5m2": ir.DataType.FLOAT8E5M2}
    dtype = dtypes[half]
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 25}, name="linear")

    def constant(name: str, dtype: ir.DataType, shape: list[int]) -> ir.Value:
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        size = int(math.prod(shape) * dtype.itemsize)
        value.const_value = ir.ExternalTensor("", 0, size, dtype, shape=ir.Shape(shape), name=name)
        graph.register_initializer(value)
        return value

    def node(
        kind: str,
        inputs: list[ir.Value],
        shape: list[int | str],
        dtype: ir.DataType = dtype,
        **attributes: int,
    ) -> ir.Value:
        made = ir.Node("", kind, inputs, [ir.AttrInt64(k, v) for k, v in attributes.items()])
        (output,) = made.outputs
        output.name = f"{kind}{len(graph)}"
        output.type, output.shape = ir.TensorType(dtype), ir.Shape(shape)
        graph.append(made)
        return output

    given = ir.DataType.INT8 if kind == "int8x8" else floats.get(kind, dtype)
    x = ir.Value(name="x", type=ir.TensorType(given), shape=ir.Shape(["n", inner]))
    graph.inputs.append(x)
    if kind == "int8x8":
        weight = constant("w", ir.DataType.INT8, [inner, columns])
        made = node("MatMulInteger", [x, weight], ["n", columns], ir.DataType.INT32)
        graph.outputs.append(made)
        return ir.Model(graph, ir_version=12)
    if kind in dtypes:
        weight = constant("w", dtype, [inner, columns])
    elif kind in floats:
        x = node("DequantizeLinear", [x, constant("t", dtype, [])], ["n", inner])
        parts = [constant("w", floats[kind], [inner, columns]), constant("s", dtype, [])]
        weight = node("DequantizeLinear", parts, [inner, columns])
    elif kind == "int8":
        parts = [constant("w", ir.DataType.INT8, [inner, columns]), constant("s", dtype, [columns])]
        weight = node("DequantizeLinear", parts, [inner, columns], axis=1)
    else:
        scales = constant("s", dtype, [inner // GROUP, columns])
        parts = [constant("w", ir.DataType.INT4, [inner, columns]), scales]
        weight = node("DequantizeLinear", parts, [inner, columns], axis=0, block_size=GROUP)
    graph.outputs.append(node("MatMul", [x, weight], ["n", columns]))
    return ir.Model(graph, ir_version=12)


# -- measuring -------------------------------------------------------------------------------------


class Bench:
    """The libraries in a folder on the first GPU."""

    def __init__(self, folder: Path) -> None:
        sys.path.insert(0, os.fspath(folder))
        self.torch: Any = importlib.import_module("torch")
        runtime: Any = importlib.import_module("runtime")
        self.ffi: Any = runtime._runtime(folder)
        runtime._cuda_runtime(folder)
        self.folder = folder
        self.one = self.torch.ones((), device="cuda")
        self.results: dict[str, Any] = {"gpu": self.torch.cuda.get_device_name(0)}

    def milliseconds(self, run: Callable[[], object], count: int) -> float:
        """The time of ``count`` calls, for one of them."""
        first, last = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(count):
            run()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / count

    def copy_rate(self) -> float:
        """Bytes a millisecond of copying a gigabyte, read and written."""
        source = self.torch.empty(1 << 30, dtype=self.torch.uint8, device="cuda")
        target = self.torch.empty_like(source)
        for _ in range(3):
            target.copy_(source)
        times = [self.milliseconds(lambda: target.copy_(source), 5) for _ in range(ROUNDS)]
        return float(2 * source.numel() / statistics.median(times))

    def load(self, name: str) -> tuple[Callable[..., Any], dict[str, Any]]:
        """The library's program, and what it takes."""
        return self.program(name), json.loads((self.folder / f"{name}.json").read_text())

    def program(self, name: str) -> Callable[..., Any]:
        """The library's program."""
        module = self.ffi.load_module(os.fspath(self.folder / f"{name}.so"))
        machine = module["vm_load_executable"]()
        machine["vm_initialization"](2, 0, 2, 1, 0, 2)  # the GPU and the CPU, memory from pools
        main: Callable[..., Any] = machine["main"]
        return main

    def tensor(self, dtype: str, shape: tuple[int, ...], scale: float) -> tuple[Any, Any]:
        """Random contents: torch's tensor, and the same as the program takes it."""
        torch = self.torch
        if dtype == "int8":
            made = torch.randint(-128, 128, shape, dtype=torch.int8, device="cuda")
            return made, self.ffi.from_dlpack(made)
        if dtype in ("e4m3", "e5m2"):
            made = torch.randn(shape, device="cuda") * scale
            made = made.to(torch.float8_e4m3fn if dtype == "e4m3" else torch.float8_e5m2)
            return made, self.ffi.from_dlpack(made.view(torch.uint8))
        half = torch.bfloat16 if dtype == "uint16" else torch.float16
        made = (torch.randn(shape, device="cuda") * scale).to(half)
        bits = made.view(torch.uint16) if dtype == "uint16" else made
        return made, self.ffi.from_dlpack(bits)

    def weight(self, facts: dict[str, Any]) -> tuple[Any, list[Any]]:
        """A random weight [columns, inner]: torch's, and the program's parameters, whose scales are one."""
        torch, kind = self.torch, str(facts["kind"])
        spread = 1.0 if kind in ("e4m3", "e5m2") else float(facts["inner"]) ** -0.5
        given, weight = [], None
        for _, shape in facts["parameters"]:
            if shape:
                weight, own = self.tensor(HELD.get(kind, kind), tuple(shape), spread)
            else:
                own = self.ffi.from_dlpack(
                    torch.ones((), device="cuda").bfloat16().view(torch.uint16)
                )
            given.append(own)
        return weight, given

    def theirs(self, kind: str, x: Any, weight: Any) -> Any:
        """torch's product."""
        torch = self.torch
        if kind == "int8x8":
            return torch._int_mm(x, weight.t())
        if kind == "e4m3":
            return torch._scaled_mm(x, weight.t(), self.one, self.one, out_dtype=torch.bfloat16)
        return torch.matmul(x, weight.t())

    def error(self, kind: str, found: Any, x: Any, weight: Any) -> float:
        """Of a result of the program's."""
        torch = self.torch
        result = {"f16": torch.float16, "int8x8": torch.int32}.get(kind, torch.bfloat16)
        wanted = x.double() @ weight.double().t()
        found = torch.from_dlpack(found).view(result).double()
        return float((found - wanted).norm() / wanted.norm())

    def large(self, name: str, rows: int) -> None:
        """Against torch, in turn."""
        main, facts = self.load(name)
        inner, columns, kind = facts["inner"], facts["columns"], str(facts["kind"])
        x, own_x = self.tensor(HELD.get(kind, kind), (rows, inner), 1.0)
        weight, given = self.weight(facts)
        error = self.error(kind, main(own_x, *given)[0], x, weight)
        sides = [lambda: main(own_x, *given)]
        if kind != "e5m2":  # cuBLAS has no product of two of these
            sides.append(lambda: self.theirs(kind, x, weight))
        for side in sides:
            self.milliseconds(side, INSIDE)
        times = [[self.milliseconds(side, INSIDE) for side in sides] for _ in range(ROUNDS)]
        medians = [statistics.median(column) for column in zip(*times, strict=True)]
        work = 2 * rows * inner * columns / 1e9
        self.results[f"{name} rows {rows}"] = {"ms": medians, "error": error}
        rates = [work / time for time in medians]
        against = f", torch {rates[1]:5.0f}, share {rates[0] / rates[1]:.3f}" if rates[1:] else ""
        print(
            f"{name:18s} {rows:5d} rows: {rates[0]:5.0f} T/s{against}, error {error:.1e}",
            flush=True,
        )

    def few(self, name: str, rate: float) -> None:
        """Against the rate of a copy."""
        torch = self.torch
        main, facts = self.load(name)
        sizes = [
            int(torch.Size(shape).numel()) * (1 if dtype == "int8" else 2)
            for dtype, shape in facts["parameters"]
        ]
        copies = max(3, BEYOND_CACHE // sum(sizes) + 1)
        weights = [
            [self.tensor(dtype, tuple(shape), 0.03)[1] for dtype, shape in facts["parameters"]]
            for _ in range(copies)
        ]
        for rows in ROWS:
            _, x = self.tensor("uint16", (rows, facts["inner"]), 1.0)
            moved = sum(sizes) + 2 * rows * (facts["inner"] + facts["columns"])
            half = moved // 2 // 1024 * 1024  # torch copies whole vectors faster
            pairs = [torch.empty(2, half, dtype=torch.uint8, device="cuda") for _ in weights]
            graphs = [
                self.replayed(lambda weight, x=x: main(x, *weight), weights),
                self.replayed(lambda pair: pair[0].copy_(pair[1]), pairs),
            ]
            # One after the other: what copies have written leaves the cache while the next graph runs.
            times = [
                [self.milliseconds(graph.replay, INSIDE) / copies for _ in range(ROUNDS)]
                for graph in graphs
            ]
            time, copying = map(statistics.median, times)
            self.results[f"{name} rows {rows}"] = {"ms": [time, copying], "bytes": moved}
            print(
                f"{name:18s} {rows:5d} rows: {time * 1e3:6.1f} us, {moved / time / 1e6:5.0f} GB/s,"
                f" share {moved / time / rate:.3f}, copies {2 * half / copying / rate:.3f}",
                flush=True,
            )

    def between(self, name: str) -> None:
        """Weights that no cache holds, against torch, in turn."""
        main, facts = self.load(name)
        inner, columns, kind = facts["inner"], facts["columns"], str(facts["kind"])
        size = inner * columns * (2 if kind == "bf16" else 1)
        weights = [self.weight(facts) for _ in range(max(3, BEYOND_CACHE // size + 1))]
        for rows in BETWEEN:
            x, own_x = self.tensor(HELD.get(kind, kind), (rows, inner), 1.0)
            error = self.error(kind, main(own_x, *weights[0][1])[0], x, weights[0][0])
            graphs = [
                self.replayed(lambda pair, x=own_x: main(x, *pair[1]), weights),
                self.replayed(lambda pair, x=x: self.theirs(kind, x, pair[0]), weights),
            ]
            times = [
                [self.milliseconds(graph.replay, 1) / len(weights) for graph in graphs]
                for _ in range(ROUNDS)
            ]
            ours, theirs = (statistics.median(column) for column in zip(*times, strict=True))
            self.results[f"{name} rows {rows}"] = {"ms": [ours, theirs], "error": error}
            print(
                f"{name:18s} {rows:5d} rows: {ours * 1e3:6.1f} us, torch {theirs * 1e3:6.1f},"
                f" share {theirs / ours:.3f}, error {error:.1e}",
                flush=True,
            )

    def integers(self, inner: int, columns: int) -> None:
        """Integer weights that no cache holds, and those of halves, in turn."""
        sides = []
        for kind in ("bf16", *INTEGERS):
            main, facts = self.load(f"{kind}-{inner}-{columns}")
            shapes = [(dtype, tuple(shape)) for dtype, shape in facts["parameters"]]
            size = sum(math.prod(shape) * (1 if dtype == "int8" else 2) for dtype, shape in shapes)
            copies = max(3, BEYOND_CACHE // size + 1)
            weights = [[self.tensor(*each, 0.03)[1] for each in shapes] for _ in range(copies)]
            sides.append((main, weights))
        for rows in BETWEEN:
            _, x = self.tensor("uint16", (rows, inner), 1.0)
            graphs = [
                self.replayed(lambda weight, main=main, x=x: main(x, *weight), weights)
                for main, weights in sides
            ]
            times = [
                [
                    self.milliseconds(graph.replay, 1) / len(weights)
                    for graph, (_, weights) in zip(graphs, sides, strict=True)
                ]
                for _ in range(ROUNDS)
            ]
            medians = [statistics.median(column) for column in zip(*times, strict=True)]
            self.results[f"integers-{inner}-{columns} rows {rows}"] = {"ms": medians}
            shown = ", ".join(f"{time * 1e3:6.1f}" for time in medians)
            print(f"bf16, int8, int4 {inner}-{columns} {rows:5d} rows: {shown} us", flush=True)

    def pair(self, sizes: tuple[int, int, int, int], turned: bool) -> None:
        """Two inputs, those of several calls more than a cache holds, against torch, in turn."""
        torch, main = self.torch, self.program(paired(sizes, turned))
        count, rows, columns, inner = sizes
        moved = 2 * count * (rows * inner + inner * columns + rows * columns)
        right = (columns, inner) if turned else (inner, columns)
        shapes = ((count, rows, inner), (count, *right))
        given = [
            [self.tensor("uint16", shape, 1.0) for shape in shapes]
            for _ in range(min(8, BEYOND_CACHE // moved) or 1)
        ]

        def theirs(operands: list[Any]) -> Any:
            (a, _), (b, _) = operands
            return torch.matmul(a, b.mT if turned else b)

        def ours(operands: list[Any]) -> Any:
            return main(*(own for _, own in operands))

        found = torch.from_dlpack(ours(given[0])[0]).view(torch.bfloat16)
        a, b = (x.double() for x, _ in given[0])
        wanted = a @ (b.mT if turned else b)
        error = float((found.double() - wanted).norm() / wanted.norm())
        del found, a, b, wanted
        graphs = [self.replayed(call, given) for call in (ours, theirs)]
        times = [
            [self.milliseconds(graph.replay, INSIDE) / len(given) for graph in graphs]
            for _ in range(ROUNDS)
        ]
        medians = [statistics.median(column) for column in zip(*times, strict=True)]
        rates = [2 * math.prod(sizes) / time / 1e9 for time in medians]
        name = paired(sizes, turned)
        self.results[name] = {"ms": medians, "error": error}
        print(
            f"{name:26s}: {medians[0] * 1e3:6.1f} us, {rates[0]:4.0f} T/s, torch {rates[1]:4.0f},"
            f" share {rates[0] / rates[1]:.3f}, error {error:.1e}",
            flush=True,
        )

    def replayed(self, call: Callable[[Any], object], given: list[Any]) -> Any:
        """A CUDA graph of a call for each of ``given``."""
        kept = [call(each) for each in given]  # memory for the graph to take
        del kept
        graph = self.torch.cuda.CUDAGraph()
        with self.ffi.use_torch_stream(self.torch.cuda.graph(graph)):
            for each in given:
                call(each)
        self.milliseconds(graph.replay, INSIDE)
        return graph


def run(folder: Path, write: Path | None) -> None:
    """Measure every library of the folder."""
    bench = Bench(folder.resolve())
    rate = bench.copy_rate()
    bench.results["copy_GB_per_s"] = rate / 1e6
    print(f"{bench.results['gpu']}: copies {rate / 1e6:.0f} GB/s")
    for (inner, columns), many in LARGE.items():
        for kind in MANY:
            for rows in many:
                bench.large(f"{kind}-{inner}-{columns}", rows)
    for inner, columns in SMALL:
        for kind in ("bf16", *INTEGERS):
            bench.few(f"{kind}-{inner}-{columns}", rate)
    for inner, columns in AMID:
        for kind in ("bf16", "e4m3", "int8x8"):
            bench.between(f"{kind}-{inner}-{columns}")
        bench.integers(inner, columns)
    for sizes in PAIRS:
        for turned in (False, True):
            bench.pair(sizes, turned)
    if write is not None:
        write.write_text(json.dumps(bench.results, indent=1) + "\n")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=["build", "run"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--archs", default="sm_90a", help="build: architectures, with commas")
    parser.add_argument("--json", type=Path, help="run: write the numbers here too")
    given = parser.parse_args()
    if given.what == "build":
        build(given.folder, given.archs)
    else:
        run(given.folder, given.json)


if __name__ == "__main__":
    main()
