"""A language model shaped as LLaMA-7B on a GPU, end to end: decoding and prefill against torch.compile.

    python benchmarks/cuda_llama.py build DIR          # where nvcc and NetLathe are; no GPU needed
    python DIR/cuda_llama.py run DIR                   # where the GPU is; torch, tvm_ffi and TVM's runtime

The model has the full width, 4096, 32 heads of 128, 11008 between gate and down, 32000 words, and 32 layers;
8 of them where it is compared with torch, which takes minutes to compile. Weights are random, made on the
GPU. A step reads a cache with room for 1024 tokens of which 512 are there and writes the next, in place; it
runs from a CUDA graph on both sides. torch's side is the same model in torch under torch.compile, decoding
with ``mode="max-autotune-no-cudagraphs"``: its own graphs would leave out a cache that is written in place,
so that the graph is recorded around it here. Times are medians of CUDA events; logits are compared as
||ours - theirs|| / ||theirs||, both in bfloat16.

Models 30 % smaller are the dense one of 8 layers with 22 of 32 heads and 7680 of 11008 neurons left, with a
residual stream of 2880 of 4096, and with 6 of 8 layers (25 %).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bench_cuda import GROUP, INSIDE, ROUNDS, Bench

ROOM, THERE, PROMPT = 1024, 512, 2048
SOME, FULL = 8, 32  # layers
EPSILON = 1e-5


@dataclass(frozen=True)
class Size:
    """Widths of a model."""

    layers: int
    width: int = 4096
    heads: int = 32
    depth: int = 128
    inner: int = 11008
    words: int = 32000


# What is built: name -> (size, format of the layers' weights, and of the head after a dash if not bf16).
MODELS = {
    f"bf16-{SOME}": (Size(SOME), "bf16"),
    **{f"{kind}-{FULL}": (Size(FULL), kind) for kind in ("bf16", "int8", "int4")},
    f"int4-{FULL}-head": (Size(FULL), "int4-head"),
    "pruned-8": (Size(SOME, heads=22, inner=7680), "bf16"),
    "sliced-8": (Size(SOME, width=2880), "bf16"),
    "dropped-8": (Size(6), "bf16"),
}


# -- building --------------------------------------------------------------------------------------


def graph(size: Size, kind: str) -> Any:
    """The model as IR whose constants have shapes and no contents."""
    import onnx_ir as ir

    from netlathe.ir import normal

    kind, _, whole = kind.partition("-")
    side = size.heads * size.depth
    inputs = ["int64[1, s] ids", "int64[1, s] at", "int64[1] first", "int64[1] total"]
    outputs = [f"bfloat16[1, s, {size.words}] logits"]
    body = ["x0 = Gather <axis = 0> (embed, ids)"]
    constants: dict[str, tuple[str, list[int]]] = {
        "embed": ("BFLOAT16", [size.words, size.width]),
        "cos": ("BFLOAT16", [2 * PROMPT, size.depth // 2]),
        "sin": ("BFLOAT16", [2 * PROMPT, size.depth // 2]),
        "gain": ("BFLOAT16", [size.width]),
    }

    def product(out: str, x: str, name: str, inner: int, columns: int, kind: str = kind) -> None:
        if kind == "bf16":
            constants[name] = ("BFLOAT16", [inner, columns])
            body.append(f"{out} = MatMul ({x}, {name})")
            return
        constants[f"{name}q"] = (kind.upper(), [inner, columns])
        blocks, how = [inner // GROUP], f"axis = 0, block_size = {GROUP}"
        if kind == "int8":
            blocks, how = [], "axis = 1"
        constants[f"{name}s"] = ("BFLOAT16", [*blocks, columns])
        body.append(f"{name} = DequantizeLinear <{how}> ({name}q, {name}s)")
        body.append(f"{out} = MatMul ({x}, {name})")

    body.append(f"heads = Constant <value_ints = [1, -1, {size.heads}, {size.depth}]> ()")
    body.append(f"flat = Constant <value_ints = [1, -1, {side}]> ()")
    normed = f"RMSNormalization <axis = -1, epsilon = {EPSILON}>"
    for i in range(size.layers):
        cache = f"bfloat16[1, {size.heads}, t, {size.depth}]"
        inputs += [f"{cache} k{i}", f"{cache} v{i}"]
        outputs += [f"{cache} nk{i}", f"{cache} nv{i}"]
        constants[f"g{i}"], constants[f"h{i}"] = constants["gain"], constants["gain"]
        body.append(f"n{i} = {normed} (x{i}, g{i})")
        for part in "qkv":
            product(f"p{part}{i}", f"n{i}", f"w{part}{i}", size.width, side)
            body.append(f"r{part}{i} = Reshape (p{part}{i}, heads)")
            body.append(f"t{part}{i} = Transpose <perm = [0, 2, 1, 3]> (r{part}{i})")
        for part in "qk":
            body.append(f"e{part}{i} = RotaryEmbedding (t{part}{i}, cos, sin, at)")
        body.append(f"nk{i} = TensorScatter <axis = 2> (k{i}, ek{i}, first)")
        body.append(f"nv{i} = TensorScatter <axis = 2> (v{i}, tv{i}, first)")
        body.append(f"a{i} = Attention <is_causal = 1> (eq{i}, nk{i}, nv{i}, , , , total)")
        body.append(f"b{i} = Transpose <perm = [0, 2, 1, 3]> (a{i})")
        body.append(f"c{i} = Reshape (b{i}, flat)")
        product(f"d{i}", f"c{i}", f"wo{i}", side, size.width)
        body.append(f"y{i} = Add (x{i}, d{i})")
        body.append(f"m{i} = {normed} (y{i}, h{i})")
        product(f"gate{i}", f"m{i}", f"wgate{i}", size.width, size.inner)
        product(f"up{i}", f"m{i}", f"wup{i}", size.width, size.inner)
        body.append(f"s{i} = Swish (gate{i})")
        body.append(f"f{i} = Mul (s{i}, up{i})")
        product(f"z{i}", f"f{i}", f"wdown{i}", size.inner, size.width)
        body.append(f"x{i + 1} = Add (y{i}, z{i})")
    body.append(f"last = {normed} (x{size.layers}, gain)")
    product(
        "logits",
        "last",
        "head" if not whole else "word",
        size.width,
        size.words,
        kind if whole else "bf16",
    )
    text = ", ".join(inputs), ", ".join(outputs), "\n".join(body)
    model = ir.from_onnx_text(
        '<ir_version: 12, opset_import: ["" : 25]> g ({}) => ({}) {{ {} }}'.format(*text)
    )
    used = {v.name: v for node in model.graph for v in node.inputs if v is not None}
    rng = np.random.default_rng(0)
    for name, (code, shape) in constants.items():
        value, dtype = used[name], ir.DataType[code]
        # One column, seen as all of them: it takes no memory, and no two constants are equal.
        column = rng.integers(-8, 8, (shape[0],) + (1,) * (len(shape) - 1))
        every = np.broadcast_to(column.astype(dtype.numpy()), shape)
        value.const_value = ir.Tensor(every, dtype=dtype, name=name)
        value.dtype, value.shape = dtype, ir.Shape(shape)
        model.graph.register_initializer(value)
    normal.normalize(model)
    return model


def build(folder: Path, archs: str) -> None:
    """Compile every model."""
    from netlathe.backends.tvm import process, runtime, toolchain
    from netlathe.backends.tvm.cuda.machine import gpu

    folder.mkdir(parents=True, exist_ok=True)
    here = Path(__file__)
    for file in (here, here.with_name("bench_cuda.py"), Path(runtime.__file__)):
        shutil.copyfile(file, folder / file.name)

    def one(name: str) -> None:
        size, kind = MODELS[name]
        library = folder / f"{name}.so"
        model = graph(size, kind)
        built = process.build(model, gpu(archs.split(",")), library, (toolchain.compiler(),))
        facts = {
            "size": asdict(size),
            "kind": kind,
            "parameters": [
                (p.recipe.sources, getattr(p.recipe.function, "in_turn", False), p.dtype, p.shape)
                for p in built.parameters
            ],
        }
        (folder / f"{name}.json").write_text(json.dumps(facts))
        print(name, flush=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # each waits for a process of its own
        list(pool.map(one, MODELS))


# -- measuring -------------------------------------------------------------------------------------


class Llama:
    """A model on the GPU: ours, and torch's with the same weights where those are bfloat16."""

    def __init__(self, bench: Bench, name: str) -> None:
        self.bench, self.torch = bench, bench.torch
        self.main, facts = bench.load(name)
        self.size, self.kind = Size(**facts["size"]), facts["kind"]
        self.weights: dict[str, Any] = {}
        self.given: list[Any] = []
        for sources, in_turn, dtype, shape in facts["parameters"]:
            made, own = self._parameter(sources[0], dtype, tuple(shape))
            self.given.append(own)
            count = len(sources)  # weights of products that are one kernel
            if in_turn:
                parts = [made[i::count].contiguous() for i in range(count)]
            else:
                parts = made.tensor_split(count)
            self.weights.update(zip(sources, parts, strict=True))

    def _parameter(self, name: str, dtype: str, shape: tuple[int, ...]) -> tuple[Any, Any]:
        torch = self.torch
        if dtype != "uint16":
            return self.bench.tensor(dtype, shape, 1.0)
        if name in ("cos", "sin"):
            powers = torch.arange(shape[1], device="cuda") / shape[1]
            angles = torch.arange(shape[0], device="cuda")[:, None] * 10000.0**-powers
            made = getattr(torch, name)(angles)
        elif len(shape) == 1:
            made = 1 + 0.1 * torch.randn(shape, device="cuda")
        elif name.endswith("s") and self.kind != "bf16":
            made = torch.rand(shape, device="cuda") / (
                256 if self.kind.startswith("int4") else 4096
            )
        else:
            made = torch.randn(shape, device="cuda") * shape[1] ** -0.5
        made = made.to(torch.bfloat16)
        return made, self.bench.ffi.from_dlpack(made.view(torch.uint16))

    def inputs(self, queries: int, room: int, past: int) -> tuple[list[Any], list[Any]]:
        """(ids, positions, first place, length), and a cache of random vectors."""
        torch = self.torch
        ids = torch.randint(0, self.size.words, (1, queries), device="cuda")
        at = torch.arange(past, past + queries, device="cuda")[None]
        ends = [torch.tensor([n], device="cuda") for n in (past, past + queries)]
        shape = (1, self.size.heads, room, self.size.depth)
        caches = [
            torch.randn(shape, device="cuda").to(torch.bfloat16)
            for _ in range(2 * self.size.layers)
        ]
        return [ids, at, *ends], caches

    def ours(self, inputs: list[Any], caches: list[Any]) -> Callable[[], Any]:
        """A call of our program."""
        torch, ffi = self.torch, self.bench.ffi
        given = [ffi.from_dlpack(x) for x in inputs]
        given += [ffi.from_dlpack(x.view(torch.uint16)) for x in caches]
        return lambda: self.main(*given, *self.given)

    def theirs(self, inputs: list[Any], caches: list[Any]) -> Callable[[], Any]:
        """The same in torch, as it is written there: the cache is changed in place."""
        torch, weights, size = self.torch, self.weights, self.size
        ids, at = inputs[:2]
        functional = torch.nn.functional
        half = size.depth // 2
        room = caches[0].shape[2]

        def turned(x: Any, at: Any) -> Any:
            cos, sin = weights["cos"][at[0]], weights["sin"][at[0]]
            low, high = x[..., :half], x[..., half:]
            return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)

        def forward(ids: Any, at: Any, caches: list[Any]) -> Any:
            x = weights["embed"][ids]
            queries = ids.shape[1]
            mask = torch.arange(room, device="cuda")[None, :] <= at[0][:, None]
            for i in range(size.layers):
                n = functional.rms_norm(x, (size.width,), weights[f"g{i}"], EPSILON)
                q, k, v = (
                    (n @ weights[f"w{part}{i}"].t())
                    .view(1, queries, size.heads, size.depth)
                    .transpose(1, 2)
                    for part in "qkv"
                )
                q, k = turned(q, at), turned(k, at)
                keys, values = caches[2 * i : 2 * i + 2]
                keys.index_copy_(2, at[0], k)
                values.index_copy_(2, at[0], v)
                if queries == room:
                    a = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
                else:
                    a = functional.scaled_dot_product_attention(q, keys, values, mask)
                a = a.transpose(1, 2).reshape(1, queries, -1)
                x = x + a @ weights[f"wo{i}"].t()
                m = functional.rms_norm(x, (size.width,), weights[f"h{i}"], EPSILON)
                gate, up = m @ weights[f"wgate{i}"].t(), m @ weights[f"wup{i}"].t()
                x = x + (functional.silu(gate) * up) @ weights[f"wdown{i}"].t()
            return (
                functional.rms_norm(x, (size.width,), weights["gain"], EPSILON)
                @ weights["head"].t()
            )

        mode = "max-autotune-no-cudagraphs" if ids.shape[1] == 1 else "default"
        compiled = torch.compile(forward, mode=mode, fullgraph=True, dynamic=False)
        return lambda: compiled(ids, at, caches)

    def bytes(self) -> int:
        """Weights that a step reads: all but the embedding."""
        kept = [w for name, w in self.weights.items() if name not in ("embed", "cos", "sin")]
        return sum(w.numel() * w.element_size() for w in kept)


def replayed(bench: Bench, run: Callable[[], Any]) -> Callable[[], Any]:
    """A call as a CUDA graph."""
    torch = bench.torch
    kept = [run() for _ in range(2)]
    del kept
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with bench.ffi.use_torch_stream(torch.cuda.graph(graph)):
        held = run()

    def replay(_held: Any = held) -> None:
        graph.replay()

    return replay


def median(bench: Bench, run: Callable[[], Any]) -> float:
    """Milliseconds of a call."""
    bench.milliseconds(run, INSIDE)
    return statistics.median(bench.milliseconds(run, INSIDE) for _ in range(ROUNDS))


def run(folder: Path, write: Path | None, peer: bool) -> None:
    """Measure every model of the folder; with ``peer`` torch's too."""
    bench = Bench(folder.resolve())
    torch = bench.torch
    rate = bench.copy_rate()
    times: dict[str, float] = {"copy_GB_per_s": rate / 1e6}
    print(f"{bench.results['gpu']}: copies {rate / 1e6:.0f} GB/s", flush=True)

    def say(what: str, time: float, note: str = "") -> None:
        times[what] = time
        print(f"{what:34s} {time:8.3f} ms  {note}", flush=True)
        if write is not None:
            write.write_text(json.dumps(times, indent=1) + "\n")

    for name in sorted(MODELS, key=lambda name: (not name.startswith("bf16"), name)):
        model = Llama(bench, name)
        step, caches = model.inputs(1, ROOM, THERE)
        time = median(bench, replayed(bench, model.ours(step, caches)))
        share = model.bytes() / time / rate
        rates = f"{1000 / time:.0f} tokens/s, {model.bytes() / 2**20:.0f} MiB, share {share:.3f}"
        say(f"decode {name}", time, rates)
        prompt, empty = model.inputs(PROMPT, PROMPT, 0)
        say(f"prefill {name}", median(bench, replayed(bench, model.ours(prompt, empty))))
        if not peer or name != f"bf16-{SOME}":
            continue
        for kind, given, room in (("decode", step, caches), ("prefill", prompt, empty)):
            ours = torch.from_dlpack(model.ours(given, room)()[0]).view(torch.bfloat16).double()
            theirs = model.theirs(given, [cache.clone() for cache in room])
            wanted = theirs().double()
            error = float((ours - wanted).norm() / wanted.norm())
            del ours, wanted
            time = median(bench, replayed(bench, theirs))
            say(f"{kind} {name}, torch", time, f"logits differ by {error:.1e}")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=["build", "run"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--archs", default="sm_90a", help="build: architectures, with commas")
    parser.add_argument("--json", type=Path, help="run: write the numbers here too")
    parser.add_argument("--alone", action="store_true", help="run: without torch's side")
    given = parser.parse_args()
    if given.what == "build":
        build(given.folder, given.archs)
    else:
        run(given.folder, given.json, not given.alone)


if __name__ == "__main__":
    main()
