"""What share of the roofline each class of kernels for x86 CPUs reaches, on one thread.

    python benchmarks/bench_tvm_kernels.py [--rows "gemm, float32" ...] [--rounds 15]

Each row is a model of one operator at a size that models have, or at one that no cache holds where memory is
the bound. It is compiled in this process, and the kernels of the schedule that the row is about are timed
alone, by the clock of the thread. In turn with them run the four loops that they are held against:

multiply   multiply-adds of float32 between registers
dots       dot products of bytes between registers (where the CPU has them)
read       the largest element of 256 MiB
copy       numpy's copy of 128 MiB to another 128 MiB

The least time of a row is that of its products at the first or second rate, or of its bytes: those it reads
beyond what it writes at the rate of reading, the others at that of copying. The share is that time by the
median of the measured ones. Above 1 it says that fewer products are done (Winograd), or that caches gave some
of the bytes. Exit code 2: a row has no kernel of its schedule.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import tvm_ffi

Array = npt.NDArray[Any]
_REGISTERS = 12  # sums kept apart: more than two starts a cycle times the latency
_STEPS = 2_000_000
_POOL = "y = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>"


@dataclass(frozen=True)
class Row:
    """One operator: ``body`` from ``inputs`` to ``outputs`` in ONNX text, with constants of these shapes.

    ``schedule`` begins the names of the kernels that are timed. They do ``products``, multiply-adds, of
    ``kind``, read ``read`` bytes and write ``written``.
    """

    schedule: str
    inputs: str
    outputs: str
    body: str
    constants: Mapping[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    products: float = 0.0
    kind: str = "multiply"
    read: float = 0.0
    written: float = 0.0


def product(rows: int, inner: int, columns: int) -> Row:
    """A product of floats by a constant."""
    return Row(
        "gemm_packed",
        f"float[{rows}, {inner}] x",
        f"float[{rows}, {columns}] y",
        "y = MatMul(x, w)",
        {"w": ("float", (inner, columns))},
        products=rows * inner * columns,
        read=4.0 * (inner * columns + rows * inner),
        written=4.0 * rows * columns,
    )


def weight_only(rows: int, inner: int, columns: int, dtype: str) -> Row:
    """A product of floats by integers in blocks of 64 rows that share a scale."""
    blocks = inner // 64
    bits = 4 if dtype == "int4" else 8
    return Row(
        "gemm_packed",
        f"float[{rows}, {inner}] x",
        f"float[{rows}, {columns}] y",
        "d = DequantizeLinear<axis = 0, block_size = 64>(w, s) y = MatMul(x, d)",
        {"w": (dtype, (inner, columns)), "s": ("float", (blocks, columns))},
        products=rows * inner * columns,
        read=columns * (inner * bits / 8 + 4 * blocks) + 4.0 * rows * inner,
        written=4.0 * rows * columns,
    )


def window(
    size: int,
    inputs: int,
    outputs: int,
    taps: int,
    stride: int = 1,
    groups: int = 1,
    batch: int = 1,
) -> Row:
    """A convolution of floats over a plane of ``size`` by ``size``, same padding, bias and ReLU.

    A pool reads the result, so that it is written channels last, as within a network.
    """
    out = size // stride
    pads = ", ".join([str(taps // 2)] * 4)
    plane = batch * out * out * outputs
    weight = outputs * (inputs // groups) * taps * taps
    depthwise, plain = groups > 1, taps == 1 and stride == 1
    return Row(
        "conv_depthwise" if depthwise else "gemm_packed" if plain else "conv_",
        f"float[{batch}, {inputs}, {size}, {size}] x",
        f"float[{batch}, {outputs}, {out // 2}, {out // 2}] y",
        f"c = Conv<kernel_shape = [{taps}, {taps}], strides = [{stride}, {stride}], pads = [{pads}],"
        f" group = {groups}>(x, w, b) r = Relu(c) {_POOL}(r)",
        {"w": ("float", (outputs, inputs // groups, taps, taps)), "b": ("float", (outputs,))},
        products=plane * (inputs // groups) * taps * taps,
        read=4.0 * (batch * inputs * size * size + weight),
        written=4.0 * plane,
    )


def of_bytes(size: int, inputs: int, outputs: int, taps: int, residual: bool = False) -> Row:
    """The same of static pairs: bytes in, bytes out, perhaps with a residual added."""
    pads = ", ".join([str(taps // 2)] * 4)
    plane = size * size * outputs
    weight = outputs * inputs * taps * taps
    # What is added comes from a convolution of 3 x 3, whose kernel has another name.
    added = """h = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(f, k) m = QuantizeLinear(h, t, z)
        p = DequantizeLinear(m, t, z) o = QuantizeLinear(c, t, z) n = DequantizeLinear(o, t, z)
        a = Add(n, p)"""
    return Row(
        "gemm_dots" if taps == 1 else "conv_dots",
        f"uint8[1, {inputs}, {size}, {size}] x",
        f"uint8[1, {outputs}, {size // 2}, {size // 2}] y",
        f"""f = DequantizeLinear(x, s, z) g = DequantizeLinear(w, s) k = DequantizeLinear(v, s)
        c = Conv<kernel_shape = [{taps}, {taps}], pads = [{pads}]>(f, g, b)
        {added if residual else "a = Identity(c)"} r = Relu(a) q = QuantizeLinear(r, t, z) {_POOL}(q)""",
        {
            "w": ("int8", (outputs, inputs, taps, taps)),
            "v": ("int8", (outputs, inputs, 3, 3)),
            "b": ("float", (outputs,)),
            "s": ("float", ()),
            "t": ("float", ()),
            "z": ("uint8", ()),
        },
        products=plane * inputs * taps * taps,
        kind="dots",
        read=float(size * size * inputs + weight + plane * residual),
        written=float(plane),
    )


def attention(heads: int, groups: int, queries: int, keys: int) -> Row:
    """Softmax attention of 64 channels a head, ``heads / groups`` of which share keys and values."""
    cache = f"float[1, {groups}, {keys}, 64]"
    return Row(
        "attention_fused",
        f"float[1, {heads}, {queries}, 64] q, {cache} k, {cache} v",
        f"float[1, {heads}, {queries}, 64] y",
        "y = Attention(q, k, v)",
        products=2.0 * heads * queries * keys * 64,
        read=4.0 * 64 * (2 * groups * keys + heads * queries),
        written=4.0 * 64 * heads * queries,
    )


def through(schedule: str, shape: tuple[int, ...], body: str, out: str = "", read: int = 1) -> Row:
    """``read`` tensors of ``shape``, x and z, to one of shape ``out``, or the same."""
    sizes = ", ".join(map(str, shape))
    names = ("x", "z")[:read]
    count = float(np.prod(shape))
    return Row(
        schedule,
        ", ".join(f"float[{sizes}] {name}" for name in names),
        f"float[{out or sizes}] y",
        body,
        {"g": ("float", shape[-1:]), "e": ("float", shape[-1:])},
        read=4 * count * read,
        written=4 * float(np.prod([int(n) for n in out.split(",")] if out else shape)),
    )


ROWS: Mapping[str, Row] = {
    "gemm, float32": product(512, 768, 3072),
    "gemm, float32, prime sizes": product(509, 769, 3067),
    "gemm, bytes": Row(
        "gemm_dots",
        "uint8[512, 768] x",
        "int32[512, 3072] y",
        "y = MatMulInteger(x, w)",
        {"w": ("int8", (768, 3072))},
        products=512 * 768 * 3072,
        kind="dots",
    ),
    "gemm of 128 rows, int4 weights": weight_only(128, 2048, 4096, "int4"),
    "gemm of 128 rows, int8 weights": weight_only(128, 2048, 4096, "int8"),
    "8 rows, float32": product(8, 4096, 8192),
    "gemv, float32": product(1, 4096, 8192),
    "gemv, int8 weights": weight_only(1, 2048, 32768, "int8"),
    "gemv, int4 weights": weight_only(1, 2048, 65536, "int4"),
    "conv 3 x 3, 128 channels of 28 x 28": window(28, 128, 128, 3),
    "conv 3 x 3, stride 2": window(28, 128, 128, 3, stride=2),
    "conv 1 x 1, 256 to 64 channels": window(56, 256, 64, 1),
    "conv 3 x 3, bytes": of_bytes(28, 128, 128, 3),
    "conv 1 x 1, bytes, 256 to 64 channels": of_bytes(56, 256, 64, 1),
    "conv 1 x 1, bytes, 64 to 256 channels": of_bytes(56, 64, 256, 1),
    "the same, a residual added": of_bytes(56, 64, 256, 1, residual=True),
    "depthwise 3 x 3": window(112, 96, 96, 3, groups=96, batch=8),
    "max pool 3 x 3, stride 2": Row(
        "pool",
        "float[16, 8, 112, 112] x",
        "float[16, 8, 56, 56] y",
        """c = Conv<kernel_shape = [1, 1]>(x, w)
        p = MaxPool<kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]>(c)
        y = Conv<kernel_shape = [1, 1]>(p, v)""",
        {"w": ("float", (64, 8, 1, 1)), "v": ("float", (8, 64, 1, 1))},
        read=4.0 * 16 * 64 * 112 * 112,
        written=4.0 * 16 * 64 * 56 * 56,
    ),
    "attention, 512 queries": attention(12, 12, 512, 512),
    "attention, 1 query, 4 heads a group": attention(32, 8, 1, 16384),
    "layer norm": through(
        "rows_layer_norm", (32768, 512), "y = LayerNormalization<axis = -1>(x, g, e)"
    ),
    "RMS norm": through("rows_rms_norm", (32768, 512), "y = RMSNormalization<axis = -1>(x, g)"),
    "softmax": through("rows_softmax", (32768, 512), "y = Softmax<axis = -1>(x)"),
    "elementwise: sum of two": through("general", (4096, 4096), "y = Add(x, z)", read=2),
    "elementwise: GELU": through("general", (4096, 4096), "y = Gelu(x)"),
    "reduction of rows": through(
        "reduce", (8192, 4096), "y = ReduceSum<keepdims = 0>(x, last)", "8192"
    ),
    "reduction of columns": through(
        "reduce", (8192, 4096), "y = ReduceSum<keepdims = 0>(x, first)", "4096"
    ),
    "movement: transpose": through(
        "general", (4096, 4096), "y = Transpose<perm = [1, 0]>(x)", "4096, 4096"
    ),
    "movement: heads": through(
        "general", (16, 256, 32, 64), "y = Transpose<perm = [0, 2, 1, 3]>(x)", "16, 32, 256, 64"
    ),
    "movement: concat": through(
        "general", (2048, 4096), "y = Concat<axis = 1>(x, z)", "2048, 8192", read=2
    ),
}


class Timed:
    """A row's model in memory; :meth:`__call__` gives the seconds of its kernels."""

    def __init__(self, row: Row) -> None:
        from tvm import cpu, relax

        from netlathe.backends.tvm import build, packing
        from netlathe.backends.tvm.lowering import Lowering
        from netlathe.backends.tvm.machine import machine

        self.row, self.spent, self.started, self.seen = row, 0, 0, 0
        model, chosen = made(row), machine("native")
        lowered = Lowering(model, chosen).run()
        known = packing.constants(model)
        weights = [parameter.recipe.make(known) for parameter in lowered.parameters]
        records = packing.records(v for v in model.graph.inputs if not v.is_initializer())
        feeds = [numbers(record["dtype"], tuple(record["shape"])) for record in records]
        self.arguments = [tvm_ffi.from_dlpack(huge(array)) for array in (*feeds, *weights)]
        virtual: Any = relax.VirtualMachine
        self.machine = virtual(build.executable(lowered, chosen), cpu())
        self.machine.set_instrument(self._look)

    def _look(self, _function: Any, name: Any, before: bool, *_rest: Any) -> int:
        if str(name).startswith(self.row.schedule):
            if before:
                self.started = time.thread_time_ns()
            else:
                self.spent += time.thread_time_ns() - self.started
                self.seen += 1
        return 0

    def __call__(self) -> float:
        self.spent = 0
        self.machine["main"](*self.arguments)
        return 1e-9 * self.spent


def made(row: Row) -> ir.Model:
    """The model of a row, in normal form."""
    from netlathe.ir import normal

    kinds = dict(row.constants) | {"last": ("int64", (1,)), "first": ("int64", (1,))}
    words = set(re.findall(r"\w+", row.body))
    found = {name: kind for name, kind in kinds.items() if name in words}
    texts = [row.inputs]
    texts += [
        f"{kind}[{', '.join(map(str, shape))}] {name}" for name, (kind, shape) in found.items()
    ]
    model = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 25]>
        one ({", ".join(text.replace("[] ", " ") for text in texts)}) => ({row.outputs}) {{ {row.body} }}"""
    )
    for name, (kind, shape) in found.items():
        value = next(v for v in model.graph.inputs if v.name == name)
        model.graph.inputs.remove(value)
        array = (
            np.array([{"last": 1, "first": 0}[name]]) if kind == "int64" else numbers(kind, shape)
        )
        value.const_value = ir.tensor(array, name=name, dtype=value.dtype)
        model.graph.register_initializer(value)
    normal.normalize(model)
    return model


def numbers(kind: str, shape: tuple[int, ...]) -> Array:
    """Random numbers; a single one is a scale or a zero point."""
    import ml_dtypes

    if not shape:
        return np.array(128, kind) if kind == "uint8" else np.array(0.05, np.float32)
    rng = np.random.default_rng(0)
    if kind in ("float", "float32"):
        return rng.random(shape, np.float32) - np.float32(0.5)
    if kind == "int4":
        return rng.integers(-8, 8, shape, np.int8).astype(ml_dtypes.int4)
    limits = np.iinfo(kind)
    return rng.integers(limits.min, limits.max + 1, shape, kind)


def huge(array: Array) -> Array:
    """A copy where large arrays lie in huge pages, as an artifact's weights do."""
    copy = np.empty_like(array, order="C")
    copy[...] = array
    return copy


# The registers of a loop are zero at first, and stay it: what is multiplied takes the same time.
_LOOP = """
#define EACH(X) {each}
#define CLEAR(N) "vpxor %%ymm" #N ", %%ymm" #N ", %%ymm" #N "\\n"
#define MULTIPLY(N) "vfmadd231ps %%{v}14, %%{v}15, %%{v}" #N "\\n"
#define DOTS(N) "vpdpbusd %%{v}14, %%{v}15, %%{v}" #N "\\n"
#define LOOP(NAME, STEP) extern "C" void NAME(long steps) {{ \\
    asm volatile(EACH(CLEAR) CLEAR(14) CLEAR(15) "1: " EACH(STEP) "dec %0\\n jnz 1b\\n" \\
                 : "+r"(steps) : : "memory", "cc", {clobbered}); }}
LOOP(multiply, MULTIPLY)
{dots}
"""


def rates() -> dict[str, Callable[[], float]]:
    """What measures products a second of each kind, and bytes a second read and copied."""
    from netlathe.backends.tvm import toolchain
    from netlathe.backends.tvm.machine import machine

    chosen = machine("native")
    wide = "zmm" if chosen.vector_bytes == 64 else "ymm"
    text = _LOOP.format(
        each=" ".join(f"X({n})" for n in range(_REGISTERS)),
        v=wide,
        clobbered=", ".join(f'"xmm{n}"' for n in range(16)),
        dots="LOOP(dots, DOTS)" if chosen.dot_bytes else "",
    )
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "loops.cc"), Path(folder, "loops.so")
        source.write_text(text, "utf-8")
        subprocess.run(
            [toolchain.compiler(), "-O2", "-shared", "-fPIC", str(source), "-o", str(library)],
            check=True,
        )
        loops = ctypes.CDLL(str(library))
    whole, target = np.ones(1 << 26, np.float32), np.ones(1 << 25, np.float32)
    lanes = chosen.vector_bytes // 4

    def timed(run: Callable[[], object], count: float) -> Callable[[], float]:
        def rate() -> float:
            start = time.thread_time()
            run()
            return count / (time.thread_time() - start)

        return rate

    found = {
        "multiply": timed(
            lambda: loops.multiply(ctypes.c_long(_STEPS)), _STEPS * _REGISTERS * lanes
        ),
        "read": timed(whole.max, whole.nbytes),
        "copy": timed(lambda: np.copyto(target, whole[: target.size]), target.nbytes),
    }
    if chosen.dot_bytes:
        found["dots"] = timed(
            lambda: loops.dots(ctypes.c_long(_STEPS)), 4 * _STEPS * _REGISTERS * lanes
        )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    measured = rates()
    models = {name: Timed(ROWS[name]) for name in arguments.rows}
    speeds: dict[str, list[float]] = {name: [] for name in measured}
    taken: dict[str, list[float]] = {name: [] for name in models}
    for run in models.values():
        run()
    if missing := [name for name, run in models.items() if not run.seen]:
        print(f"no kernel of its schedule: {', '.join(missing)}")
        return 2
    for _ in range(arguments.rounds):
        for name, rate in measured.items():
            speeds[name].append(rate())
        for name, run in models.items():
            taken[name].append(run())
    peak = {name: statistics.median(values) for name, values in speeds.items()}
    print(
        f"float32 {2e-9 * peak['multiply']:.0f} GFLOP/s,"
        f" bytes {2e-9 * peak.get('dots', 0.0):.0f} Gop/s,"
        f" read {1e-9 * peak['read']:.1f} GB/s, copied {1e-9 * peak['copy']:.1f} GB/s (written)"
    )
    print(f"{'row':>40} {'ms':>8} {'Gop/s':>7} {'GB/s':>6} {'share':>6}  bound by")
    for name, times in taken.items():
        row, median = ROWS[name], statistics.median(times)
        products = row.products / peak[row.kind] if row.products else 0.0
        memory = (
            max(row.read - row.written, 0) / peak["read"]
            + min(row.read, row.written) / peak["copy"]
        )
        print(
            f"{name:>40} {1e3 * median:8.3f} {2e-9 * row.products / median:7.1f}"
            f" {1e-9 * (row.read + row.written) / median:6.1f} {max(products, memory) / median:6.2f}"
            f"  {'products' if products > memory else 'memory'}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
