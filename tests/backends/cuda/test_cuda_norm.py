"""RMSNormalization inside of the product behind it: where it is, and how many kernels a layer takes then."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("tvm", reason="the tvm extra is not installed")

from tvm import relax

from netlathe.backends.tvm.cuda import held, stream, toolkit
from netlathe.backends.tvm.cuda.artifact import CudaArtifact
from netlathe.backends.tvm.cuda.machine import gpu
from netlathe.backends.tvm.lowering import Lowered, Lowering
from netlathe.diagnostics import LowerError
from netlathe.ir import normal

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
ROOM = 227 << 10  # of a block's shared memory


def _has_nvcc() -> bool:
    try:
        toolkit.nvcc()
    except LowerError:
        return False
    return True


def lowered(body: str, outputs: str, arch: str = "sm_90a") -> Lowered:
    """A graph of x [1, n, 64], g [64] and weights [64, 32] of float16; other names are its own."""
    model = ir.from_onnx_text(
        f"""
        <ir_version: 12, opset_import: ["" : 25]>
        g (float16[1, n, 64] x, float16[64] other) => ({outputs})
        {{ heads = Constant <value_ints = [1, -1, 2, 16]> () {body} }}
        """
    )
    values = {v.name: v for node in model.graph for v in node.inputs if v is not None}
    for number, (name, shape) in enumerate(
        {"g": (64,), "b": (64,), "u": (64, 32), "v": (64, 32), "w": (64, 32)}.items()
    ):
        if name in values:
            tensor = ir.Tensor(np.full(shape, 1 + number, np.float16), name=name)
            values[name].const_value = tensor
            values[name].dtype, values[name].shape = tensor.dtype, ir.Shape(shape)
            model.graph.register_initializer(values[name])
    normal.normalize(model)
    return Lowering(model, gpu([arch])).run()


def norms(made: Lowered) -> int:
    """Kernels that normalize and nothing else."""
    names = [str(var.name_hint) for var in made.module.get_global_vars()]
    return sum(name.startswith(("rows_rms_norm", "rows_layer_norm")) for name in names)


NORM = "n = RMSNormalization <axis = -1> (x, g)"
MOVED = "".join(f"p{c} = MatMul (n, {c}) q{c} = Reshape (p{c}, heads) " for c in "uvw")
GATE = "a = MatMul (n, u) c = MatMul (n, v) s = Swish (a) y = Mul (s, c)"
Y = "float16[1, n, 32] y"
HEADS = ", ".join(f"float16[1, n, 2, 16] q{c}" for c in "uvw")


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        (f"{NORM} y = MatMul (n, w)", Y),
        (f"{NORM} a = MatMul (n, w) y = Relu (a)", Y),
        (f"{NORM} {GATE}", Y),
        (f"{NORM} {MOVED}", HEADS),
    ],
    ids=["one product", "what follows it", "a gate", "side by side"],
)
def test_products_normalize(body: str, outputs: str) -> None:
    assert norms(lowered(body, outputs)) == 0
    assert norms(lowered(body, outputs, "sm_89")) == 1  # where no weights stream


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        (f"{NORM} y = MatMul (n, w)", f"{Y}, float16[1, n, 64] n"),
        (f"{NORM} y = MatMul (n, w) r = Relu (n)", f"{Y}, float16[1, n, 64] r"),
        (f"{NORM} y = MatMul (n, w) {MOVED}", f"{Y}, {HEADS}"),
        ("n = RMSNormalization <axis = -1> (x, other) y = MatMul (n, w)", Y),
        ("n = LayerNormalization <axis = -1> (x, g, b) y = MatMul (n, w)", Y),
        ("r = Relu (x) n = RMSNormalization <axis = -1> (r, g) y = MatMul (n, w)", Y),
        (f"{NORM} t = Transpose <perm = [0, 2, 1]> (n) y = MatMul (x, t)", "float16[1, n, n] y"),
    ],
    ids=[
        "given out",
        "read by another operator",
        "two kernels of products",
        "a gain that is no constant",
        "a norm with a mean",
        "of what is in no memory",
        "the right operand",
    ],
)
def test_others_are_kernels_of_their_own(body: str, outputs: str) -> None:
    assert norms(lowered(body, outputs)) == 1


def called(made: Lowered) -> list[str]:
    """The kernels that a call of the program runs, one after the other."""
    names: list[str] = []

    def visit(expr: Any) -> None:
        if isinstance(expr, relax.Call) and str(getattr(expr.op, "name", "")).startswith(
            "relax.call_tir"
        ):
            kernel: Any = expr.args[0]
            names.append(str(kernel.name_hint))

    relax.analysis.post_order_visit(made.module["main"], visit)
    return names


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
def test_a_layer_of_a_llama_takes_seven_launches(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products (side by side, of the attention, with a gate, back), caches, attention and its merge."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    cuda_llama = importlib.import_module("cuda_llama")
    counts = []
    for layers in (2, 3):
        size = cuda_llama.Size(layers, width=256, heads=2, inner=384, words=512)
        counts.append(called(Lowering(cuda_llama.graph(size, kind), gpu(["sm_90a"])).run()))
    fewer, more = counts
    one = [name for name in set(more) for _ in range(more.count(name) - fewer.count(name))]
    assert sorted(name.rsplit("_", 1)[0] for name in one) == [
        "attention_flash",  # which is two launches
        *["gemm_warpgroups"] * 4,
        "grid_sections",
    ]


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("rows", held.ROWS)
@pytest.mark.parametrize("columns", [256, 4096, 22016])
def test_rows_and_their_sums_of_squares_fit_beside_the_stages(
    bits: int, rows: int, columns: int
) -> None:
    for inner in (256, 4096, 11008):
        shape = stream.chosen(bits, 1, columns, inner, 0, False, 8, rows, True)
        if shape is None:
            assert inner * rows > held.MOST
            continue
        assert shape.shared_bytes <= ROOM and shape.stages >= 4
        assert shape.kept_bytes >= 2 * rows * shape.share and shape.kept_bytes % 16 == 0
        # A sum of each warp for each row, read 16 bytes at a time.
        warps = shape.multiplying // 32
        assert warps % 4 == 0 and shape.held_bytes - shape.kept_bytes == 4 * warps * rows
        assert shape.held_bytes % 8 == 0  # barriers are behind


@pytest.mark.slow
@pytest.mark.skipif(not _has_nvcc(), reason="nvcc is not installed")
@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_long_rows_stay_in_registers(half: str) -> None:
    """Four rows of 4096 are the most that a block normalizes."""
    model = ir.from_onnx_text(
        f"""
        <ir_version: 12, opset_import: ["" : 25]>
        g ({half}[1, n, 4096] x) => ({half}[1, n, 64] y)
        {{ n = RMSNormalization <axis = -1> (x, g) y = MatMul (n, w) }}
        """
    )
    values = {v.name: v for node in model.graph for v in node.inputs if v is not None}
    for name, shape in {"g": (4096,), "w": (4096, 64)}.items():
        dtype = ir.DataType[half.upper()]
        tensor = ir.Tensor(np.ones(shape).astype(dtype.numpy()), dtype=dtype, name=name)
        values[name].const_value = tensor
        values[name].dtype, values[name].shape = dtype, ir.Shape(shape)
        model.graph.register_initializer(values[name])
    normal.normalize(model)
    assert CudaArtifact(model, gpu(["sm_90a"])).report()["spilling"] == []
