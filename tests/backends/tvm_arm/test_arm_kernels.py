"""The products of each core under qemu, ragged and prime, against float64 and integer arithmetic of numpy."""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("tvm", reason="the tvm extra is not installed")

from netlathe.backends.tvm.arm.artifact import BareArtifact
from netlathe.backends.tvm.arm.cores import CORES
from tests.backends.tvm_arm.arm import Array, kernels_of, model_of, need_emulator

# (rows, K, N): whole tiles, tails of rows, of K and of columns, one row, fewer rows than a tile.
SHAPES = [(16, 64, 16), (13, 37, 21), (1, 77, 40), (5, 32, 9), (4, 16, 8), (3, 7, 3), (2, 130, 8)]
SHAPES += [(9, 14, 11), (6, 8, 6)]  # less than a register of bytes
QUICK = [(13, 37, 21), (1, 77, 40)]

NUMPY = {"float": np.float32, "float16": np.float16, "int8": np.int8, "uint8": np.uint8}


class Products:
    """One model with a product for every shape and kind, so that it is compiled once."""

    def __init__(self, shapes: list[tuple[int, int, int]]) -> None:
        self.rng = np.random.default_rng(0)
        self.inputs: list[str] = []
        self.outputs: list[str] = []
        self.nodes: list[str] = []
        self.constants: dict[str, Array] = {}
        self.feeds: dict[str, Array] = {}
        self.expected: dict[str, tuple[Array, float]] = {}
        for number, (m, k, n) in enumerate(shapes):
            self.floats(f"f{number}", "float", m, k, n, 2e-6)
            # Sums of 64 in float16: 8 ulp of 2**-11 at most, of random signs.
            self.floats(f"h{number}", "float16", m, k, n, 8 * 2**-11)
            for kind in ("int8", "uint8"):
                self.bytes(f"b{number}{kind}", kind, m, k, n)
            self.codes(f"q{number}", "int4", m, k, n, 16, zero=False)
            self.codes(f"z{number}", "uint4", m, k, n, 16, zero=True)
            self.codes(f"c{number}", "int8", m, k, n, 0, zero=False)
            self.codes(f"u{number}", "uint8", m, k, n, 32, zero=True)

    def model(self) -> ir.Model:
        """All of it."""
        text = f"g ({', '.join(self.inputs)}) => ({', '.join(self.outputs)}) {{ {' '.join(self.nodes)} }}"
        return model_of(text, **self.constants)

    def _feed(self, name: str, kind: str, array: Array) -> None:
        self.inputs.append(f"{kind}[{array.shape[0]}, {array.shape[1]}] {name}")
        self.feeds[name] = array

    def _constant(self, name: str, kind: str, array: Array) -> None:
        self.inputs.append(f"{kind}[{', '.join(map(str, array.shape))}] {name}")
        self.constants[name] = array

    def _output(self, name: str, kind: str, expected: Array, bound: float) -> None:
        self.outputs.append(f"{kind}[{expected.shape[0]}, {expected.shape[1]}] {name}")
        self.expected[name] = (expected, bound)

    def floats(self, name: str, kind: str, m: int, k: int, n: int, bound: float) -> None:
        x = self.rng.normal(size=(m, k)).astype(NUMPY[kind])
        w = self.rng.normal(size=(k, n)).astype(NUMPY[kind])
        self._feed(f"{name}x", kind, x)
        self._constant(f"{name}w", kind, w)
        self._output(f"{name}y", kind, x.astype(np.float64) @ w.astype(np.float64), bound)
        self.nodes.append(f"{name}y = MatMul({name}x, {name}w)")

    def bytes(self, name: str, kind: str, m: int, k: int, n: int) -> None:
        info = np.iinfo(NUMPY[kind])
        x = self.rng.integers(info.min, info.max + 1, (m, k)).astype(NUMPY[kind])
        w = self.rng.integers(-128, 128, (k, n)).astype(np.int8)
        self._feed(f"{name}x", kind, x)
        self._constant(f"{name}w", "int8", w)
        zero = np.array(77, NUMPY[kind])
        self.constants[f"{name}z"] = zero
        self.inputs.append(f"{kind} {name}z")
        expected = (x.astype(np.int64) - 77) @ w.astype(np.int64)
        self._output(f"{name}y", "int32", expected, 0.0)
        self.nodes.append(f"{name}y = MatMulInteger({name}x, {name}w, {name}z)")

    def codes(
        self, name: str, kind: str, m: int, k: int, n: int, block: int, *, zero: bool
    ) -> None:
        low, high = {"int4": (-8, 8), "uint4": (0, 16), "int8": (-128, 128), "uint8": (0, 256)}[
            kind
        ]
        dtype = getattr(ml_dtypes, kind, None) or np.dtype(kind)
        size = block or k
        blocks = -(-k // size)
        x = self.rng.normal(size=(m, k)).astype(np.float32)
        w = self.rng.integers(low, high, (k, n))
        s = self.rng.uniform(0.01, 0.02, (blocks, n)).astype(np.float32)
        z = self.rng.integers(low, high, (blocks, n)) if zero else np.zeros((blocks, n), np.int64)
        whole = np.repeat(s.astype(np.float64), size, 0)[:k] * (w - np.repeat(z, size, 0)[:k])
        self._feed(f"{name}x", "float", x)
        self._constant(f"{name}w", kind, w.astype(dtype))
        self._constant(f"{name}s", "float", s if block else s[0])
        if zero:
            self._constant(f"{name}z", kind, z.astype(dtype))
        attributes = f"axis = 0, block_size = {block}" if block else "axis = 1"
        more = f", {name}z" if zero else ""
        self.nodes.append(f"{name}d = DequantizeLinear<{attributes}>({name}w, {name}s{more})")
        # Codes of 4 bits are 17 times as large while they are summed.
        self._output(f"{name}y", "float", x.astype(np.float64) @ whole, 2e-5)
        self.nodes.append(f"{name}y = MatMul({name}x, {name}d)")


@lru_cache(maxsize=4)
def built(core: str, whole: bool) -> tuple[Products, BareArtifact]:
    """Products of few shapes or of all, compiled for a core."""
    products = Products(SHAPES if whole else QUICK)
    return products, BareArtifact(products.model(), CORES[core], "products")


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("core", "whole"),
    [
        ("neoverse-v1", False),
        pytest.param("neoverse-v1", True, marks=SLOW),
        pytest.param("neoverse-n1", True, marks=SLOW),
        pytest.param("cortex-a72", True, marks=SLOW),
    ],
)
def test_products(core: str, whole: bool) -> None:
    need_emulator()
    products, artifact = built(core, whole)
    actual = artifact.run(products.feeds)
    for name, (expected, bound) in products.expected.items():
        error = np.abs(actual[name].astype(np.float64) - expected).max()
        assert error <= bound * np.sqrt(np.mean(np.square(expected.astype(np.float64)))), name


SCHEDULES = {
    "cortex-a72": {"neon_float32", "neon_codes"},
    "neoverse-n1": {"neon_float32", "neon_float16", "neon_dot", "neon_codes"},
    "neoverse-v1": {"neon_float32", "neon_float16", "neon_matrix", "neon_codes"},
}
# Instructions that only these cores have, and those that must be there.
MULTIPLIES = {
    "cortex-a72": {"fmla"},
    "neoverse-n1": {"fmla", "sdot"},
    "neoverse-v1": {"fmla", "smmla"},
}
BEYOND = {
    "cortex-a72": ("sdot", "udot", "smmla", "usdot", "fcmla"),
    "neoverse-n1": ("smmla", "usmmla", "ummla", "usdot", "fcmla", "bfdot", "fmlal"),
    "neoverse-v1": (),
}
# What objdump accepts: an instruction beyond these is shown as <unknown>.
ATTRIBUTES = {
    "cortex-a72": "+v8a",
    "neoverse-n1": "+v8.2a,+fullfp16,+dotprod",
    "neoverse-v1": "+v8.2a,+fullfp16,+dotprod,+i8mm,+complxnum,+fp16fml",
}


def disassembled(artifact: BareArtifact, attributes: str, folder: Path) -> str:
    """The kernels as a CPU with these features reads them."""
    objdump = next((n for n in ("llvm-objdump-19", "llvm-objdump") if shutil.which(n)), None)
    if objdump is None:
        pytest.skip("no instruction was scanned: llvm-objdump is not installed")
    (folder / "kernels.o").write_bytes(artifact._program.object)
    command = [objdump, "-d", f"--mattr={attributes}", str(folder / "kernels.o")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    "core", ["neoverse-v1", pytest.param("neoverse-n1", marks=SLOW), "cortex-a72"]
)
def test_no_instruction_beyond_the_core(core: str, tmp_path: Path) -> None:
    """Each product has its own kernel, whose code the core can run; SVE is never among it."""
    _, artifact = built(core, False)
    assert SCHEDULES[core] <= kernels_of(artifact)
    text = disassembled(artifact, ATTRIBUTES[core], tmp_path)
    assert "<unknown>" not in text
    # Before LLVM 15 the four bytes of an instruction stand apart.
    line = r"^\s+[0-9a-f]+:\s+(?:[0-9a-f]{8}|(?:[0-9a-f]{2} ){3}[0-9a-f]{2})\s+(\w+)"
    words = {match[1] for match in re.finditer(line, text, re.M)}
    assert MULTIPLIES[core] <= words
    assert words.isdisjoint(BEYOND[core])


def test_the_scan_sees_what_is_beyond(tmp_path: Path) -> None:
    """Code for neoverse-v1, read as cortex-a72, has instructions that are unknown."""
    _, artifact = built("neoverse-v1", False)
    assert "<unknown>" in disassembled(artifact, ATTRIBUTES["cortex-a72"], tmp_path)
