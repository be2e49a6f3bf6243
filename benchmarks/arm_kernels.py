"""The products and convolutions that :mod:`bench_arm` measures, and what XNNPACK's micro-kernels take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from netlathe.backends.tvm.arm.cores import CORES
from netlathe.ir import normal

_RNG = np.random.default_rng(0)
_DTYPES: Mapping[str, Any] = {
    "float": np.float32,
    "float16": np.float16,
    "int8": np.int8,
    "int4": ml_dtypes.int4,
}


def _model(text: str, **constants: np.ndarray) -> ir.Model:
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 25]> product {text}')
    for name, array in constants.items():
        value = next(v for v in model.graph.inputs if v.name == name)
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(array, name=name, dtype=value.dtype)
        model.graph.register_initializer(value)
    normal.normalize(model)
    return model


@dataclass(frozen=True)
class Product:
    """A product of [rows, inner] with a constant [inner, columns]."""

    rows: int = 64
    inner: int = 512
    columns: int = 256

    @property
    def work(self) -> int:
        """Multiply-adds."""
        return self.rows * self.inner * self.columns

    def floats(self, kind: str) -> ir.Model:
        """A MatMul of floats."""
        text = (
            f"({kind}[{self.rows}, {self.inner}] x, {kind}[{self.inner}, {self.columns}] w)"
            f" => ({kind}[{self.rows}, {self.columns}] y) {{ y = MatMul(x, w) }}"
        )
        return _model(text, w=_RNG.normal(size=(self.inner, self.columns)).astype(_DTYPES[kind]))

    def bytes_(self) -> ir.Model:
        """A MatMulInteger of signed bytes."""
        text = (
            f"(int8[{self.rows}, {self.inner}] x, int8[{self.inner}, {self.columns}] w)"
            f" => (int32[{self.rows}, {self.columns}] y) {{ y = MatMulInteger(x, w) }}"
        )
        return _model(text, w=_RNG.integers(-127, 128, (self.inner, self.columns)).astype(np.int8))

    def codes(self, kind: str) -> ir.Model:
        """A MatMul of floats with codes in groups of 32."""
        blocks = -(-self.inner // 32)
        text = (
            f"(float[{self.rows}, {self.inner}] x, {kind}[{self.inner}, {self.columns}] w,"
            f" float[{blocks}, {self.columns}] s) => (float[{self.rows}, {self.columns}] y)"
            " { d = DequantizeLinear<axis = 0, block_size = 32>(w, s) y = MatMul(x, d) }"
        )
        low, high = {"int4": (-8, 8), "int8": (-128, 128)}[kind]
        return _model(
            text,
            w=_RNG.integers(low, high, (self.inner, self.columns)).astype(_DTYPES[kind]),
            s=_RNG.uniform(0.01, 0.02, (blocks, self.columns)).astype(np.float32),
        )


@dataclass(frozen=True)
class Convolution:
    """A square window over a plane of ``plane`` x ``plane``, channels last, as inside of models."""

    inputs: int
    outputs: int
    window: int
    plane: int
    stride: int = 1
    groups: int = 1

    @property
    def out(self) -> int:
        """Rows and columns of the result."""
        return (self.plane + 2 * (self.window // 2) - self.window) // self.stride + 1

    @property
    def work(self) -> int:
        """Multiply-adds."""
        return self.out**2 * self.outputs * self.inputs // self.groups * self.window**2

    def model(self, kind: str) -> ir.Model:
        """A Conv of floats, or, of int8, of quantized pairs."""
        p, k = self.window // 2, self.window
        size = (self.outputs, self.inputs // self.groups, k, k)
        conv = (
            f"Conv<pads = [{p}, {p}, {p}, {p}], strides = [{self.stride}, {self.stride}],"
            f" group = {self.groups}>"
        )
        given = f"{kind}[1, {self.plane}, {self.plane}, {self.inputs}] x, {kind}{list(size)} w"
        result = f"[1, {self.out}, {self.out}, {self.outputs}] y"
        turn = "t = Transpose<perm = [0, 3, 1, 2]>(x)"
        back = "y = Transpose<perm = [0, 2, 3, 1]>(c)"
        if kind != "int8":
            text = f"({given}) => ({kind}{result}) {{ {turn} c = {conv}(t, w) {back} }}"
            return _model(text, w=_RNG.normal(size=size).astype(_DTYPES[kind]))
        text = (
            f"({given}, float sx, float[{self.outputs}] sw) => (float{result}) {{ {turn}"
            f" d = DequantizeLinear(t, sx) e = DequantizeLinear<axis = 0>(w, sw) c = {conv}(d, e) {back} }}"
        )
        return _model(
            text,
            w=_RNG.integers(-127, 128, size).astype(np.int8),
            sx=np.array(0.1, np.float32),
            sw=np.full(self.outputs, 0.1, np.float32),
        )

    def ragged(self) -> Convolution:
        """A small one of the kind that no tile, register or panel divides."""
        plane, inputs = min(self.plane, 11 * self.stride), 14 if self.window > 1 else 46
        if self.groups > 1:
            return replace(self, plane=plane, inputs=22, outputs=22, groups=22)
        return replace(self, plane=plane, inputs=min(self.inputs, inputs), outputs=29)


CONVOLUTIONS: Mapping[str, Convolution] = {
    "3x3": Convolution(64, 64, 3, 28),
    "3x3-7": Convolution(64, 64, 3, 7),
    "1x1": Convolution(64, 128, 1, 28),
    "stem": Convolution(3, 32, 3, 56, stride=2),
    "depthwise": Convolution(128, 128, 3, 28, groups=128),
}


@dataclass(frozen=True)
class Kernel:
    """A product or convolution, the cores that have it, and micro-kernels of XNNPACK's that do the same."""

    build: Callable[[], ir.Model]
    ragged: Callable[[], ir.Model]  # a small one, every dim of which has a tail
    work: int  # multiply-adds of the first
    cores: Sequence[str]
    peers: Mapping[str, float]  # name -> instructions of its inner loop for each multiply-add


def _product(
    make: Callable[[Product], ir.Model],
    cores: Sequence[str],
    peers: Mapping[str, float],
    rows: int = 64,
) -> Kernel:
    whole, ragged = Product(rows), Product(29 if rows > 1 else 1, 133, 45)
    return Kernel(partial(make, whole), partial(make, ragged), whole.work, cores, peers)


def _convolution(conv: Convolution, kind: str, cores: Sequence[str]) -> Kernel:
    return Kernel(
        partial(conv.model, kind), partial(conv.ragged().model, kind), conv.work, cores, {}
    )


def _peer(multiplies: int, loads: int, control: int, macs: int) -> float:
    return (multiplies + loads + control) / macs


ALL = tuple(CORES)
# Instructions of a peer: multiplications, loads (a pair of registers is one), loop control.
KERNELS: Mapping[str, Kernel] = {
    "float32": _product(lambda p: p.floats("float"), ALL, {
        "f32-gemm 6x8 lane ld128": _peer(48, 6 + 4, 2, 6 * 8 * 4),
        "f32-gemm 4x8 lane ld128": _peer(32, 4 + 4, 2, 4 * 8 * 4),
        "f32-gemm 1x8 lane ld64": _peer(4, 1 + 2, 2, 1 * 8 * 2),
    }),
    "float16": _product(lambda p: p.floats("float16"), ALL[1:], {
        "f16-gemm 6x16 lane ld64": _peer(48, 6 + 4, 2, 6 * 16 * 4),
        "f16-gemm 1x16 lane ld64": _peer(8, 1 + 4, 2, 1 * 16 * 4),
    }),
    "dot": _product(Product.bytes_, ALL[1:2], {
        "qs8-gemm 4x16c4 lane ld128": _peer(64, 4 + 8, 2, 4 * 16 * 16),
        "qs8-gemm 4x16c4 lane ld64": _peer(32, 4 + 4, 2, 4 * 16 * 8),
    }),
    "matrix": _product(Product.bytes_, ALL[2:], {
        "qs8-gemm 4x16c8 i8mm": _peer(16, 4 + 2 + 8, 2, 4 * 16 * 8),
    }),
    "int4-tile": _product(lambda p: p.codes("int4"), ALL, {}),
    "int4-row": _product(lambda p: p.codes("int4"), ALL, {}, rows=1),
    "int8-row": _product(lambda p: p.codes("int8"), ALL, {}, rows=1),
    **{
        f"conv-{short}-{name}": _convolution(conv, kind, cores)
        for short, kind, cores in (
            ("float32", "float", ALL), ("float16", "float16", ALL[1:]), ("int8", "int8", ALL[1:])
        )
        for name, conv in CONVOLUTIONS.items()
    },
}  # fmt: skip
