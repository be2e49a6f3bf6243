"""Every kind of kernel, compiled for every architecture without a GPU: what is embedded, what it takes."""

from __future__ import annotations

import json
import os
import re
import shlex
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("tvm", reason="the tvm extra is not installed")

from benchmarks import bench_cuda
from netlathe.backends.tvm.cuda import toolkit
from netlathe.backends.tvm.cuda.artifact import CudaArtifact
from netlathe.backends.tvm.cuda.machine import gpu
from netlathe.backends.tvm.cuda.toolkit import Resources
from netlathe.diagnostics import LowerError
from netlathe.ir import normal


def _has_nvcc() -> bool:
    try:
        toolkit.nvcc()
    except LowerError:
        return False
    return True


pytestmark = pytest.mark.skipif(not _has_nvcc(), reason="nvcc is not installed")

FAMILIES = [("sm_80", "sm_89"), ("sm_90a",)]
_FATBIN = 0xBA55ED50


def everything() -> ir.Model:
    """Products in halves and of int4, convolutions, attention, norm, softmax, reduction, scan."""
    model = ir.from_onnx_text(
        """
        <ir_version: 11, opset_import: ["" : 25]>
        g (bfloat16[40, 256] x, bfloat16[4, 256] few, bfloat16[300, 256] many, bfloat16[b, 4, s, 64] q,
            float16[2, 24, h, v] image) => (bfloat16[40, 128] y, bfloat16[4, 128] nu, bfloat16[4, 128] ne,
            bfloat16[b, 4, s, 64] z, float[40, 256] p, float[40] r, float[40, 256] c, bfloat16[4, 128] u,
            bfloat16[4, 128] e, float[40, 128] v, float16[2, 72, h, v] seen, bfloat16[300, 128] l,
            bfloat16[b, 4, s, 64] both, bfloat16[40, 128] k)
        {
            a = MatMul (x, w)
            h = Add (a, bias)
            y = Relu (h)
            l = MatMul (many, w)
            d = DequantizeLinear <axis = 0, block_size = 128> (four, scale)
            u = MatMul (few, d)
            e = MatMul (few, w)
            first = RMSNormalization (few, own)
            nu = MatMul (first, d)
            second = RMSNormalization (few, own)
            ne = MatMul (second, w)
            z = Attention <is_causal = 1> (q, q, q)
            f = Cast <to = 1> (x)
            t = RMSNormalization (f, gain)
            p = Softmax (t)
            r = ReduceSum <keepdims = 0> (p, last)
            c = CumSum (p, one)
            v = MatMul (f, single)
            window = Conv <pads = [1, 1, 1, 1]> (image, taps)
            seen = Conv (window, mixed)
            keys = Transpose <perm = [0, 1, 3, 2]> (q)
            scores = MatMul (q, keys)
            both = MatMul (scores, q)
            k = MatMul (x, d)
        }
        """
    )
    rng = np.random.default_rng(0)
    half = lambda *shape: ir.Tensor(  # noqa: E731
        (rng.standard_normal(shape) / 16).astype(ir.DataType.BFLOAT16.numpy())
    )
    four = rng.integers(-8, 8, (256, 128)).astype(ir.DataType.INT4.numpy())
    constants = {
        "w": half(256, 128),
        "bias": half(128),
        "four": ir.Tensor(four, dtype=ir.DataType.INT4),
        "scale": half(2, 128),
        "own": half(256),
        "gain": ir.Tensor(rng.random(256, dtype=np.float32)),
        "last": ir.Tensor(np.array([1])),
        "one": ir.Tensor(np.array(1)),
        "single": ir.Tensor(rng.random((256, 128), dtype=np.float32)),
        "taps": ir.Tensor(rng.random((40, 24, 3, 3)).astype(np.float16)),
        "mixed": ir.Tensor(rng.random((72, 40, 1, 1)).astype(np.float16)),
    }
    values = {v.name: v for node in model.graph for v in node.inputs if v is not None}
    for name, tensor in constants.items():
        value = values[name]
        value.const_value = tensor
        value.dtype, value.shape = tensor.dtype, ir.Shape(tensor.shape)
        model.graph.register_initializer(value)
    normal.normalize(model)
    return model


def product(half: str, kind: str, inner: int, columns: int, group: int) -> ir.Model:
    """Any number of rows by a constant that is not there; ``uint4`` has zero points."""
    sizes = f"{inner // group}, {columns}" if group else f"{columns}"
    zeros = f", {kind}[{sizes}] z" if kind == "uint4" else ""
    how = f"axis = 0, block_size = {group}" if group else "axis = 1"
    model = ir.from_onnx_text(
        f"""
        <ir_version: 12, opset_import: ["" : 25]>
        g ({half}[n, {inner}] x, {kind}[{inner}, {columns}] q, {half}[{sizes}] s{zeros})
            => ({half}[n, {columns}] y)
        {{
            d = DequantizeLinear <{how}> (q, s{", z" if zeros else ""})
            y = MatMul (x, d)
        }}
        """
    )
    for value in list(model.graph.inputs)[1:]:
        dtype, shape, name = value.dtype, value.shape, value.name
        assert dtype is not None and shape is not None and name is not None
        value.const_value = ir.ExternalTensor("", 0, 0, dtype, shape=shape, name=name)
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    normal.normalize(model)  # else the weight is expanded
    return model


_LISTENING = """#!/bin/sh
{nvcc} "$@" >{folder}/out 2>{folder}/err
status=$?
cat {folder}/out {folder}/err >>{folder}/said
cat {folder}/out
cat {folder}/err >&2
exit $status
"""


def most_registers(model: ir.Model, folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Of kernels for sm_90a, which spill nothing and let no warpgroup product wait for the one before.

    A worker compiles. So what the compiler says is written down by one in ``folder`` that calls it.
    """
    real = toolkit.nvcc().resolve()
    (folder / "bin").mkdir()
    (folder / "lib64").symlink_to(real.parent.parent / "lib64")
    listening = folder / "bin" / "nvcc"
    listening.write_text(
        _LISTENING.format(nvcc=shlex.quote(str(real)), folder=shlex.quote(str(folder)))
    )
    listening.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
    made = CudaArtifact(model, gpu(["sm_90a"]))
    said = (folder / "said").read_text()
    found = resources(made)
    assert found and all(f"Compiling entry function '{r.kernel}'" in said for r in found)
    assert all(r.kernel.startswith("gemm_warpgroups") for r in found), "nothing expands the weight"
    assert not re.findall("[^\n]*(?:serialized|C751[0-9])[^\n]*", said)
    assert not [r for r in found if r.spill_bytes or r.stack_bytes]
    return max(r.registers for r in found)


@pytest.fixture(scope="module", params=FAMILIES, ids=["mma", "wgmma"])
def artifact(request: pytest.FixtureRequest) -> CudaArtifact:
    return CudaArtifact(everything(), gpu(request.param))


def resources(artifact: CudaArtifact) -> tuple[Resources, ...]:
    found: tuple[Resources, ...] = artifact._built.resources  # type: ignore[attr-defined]
    return found


def embedded(library: bytes) -> Iterator[tuple[int, bytes]]:
    """(architecture, ELF file) of everything in every fatbin of a library."""
    start = -1
    while (start := library.find(struct.pack("<I", _FATBIN), start + 1)) >= 0:
        _, header, size = struct.unpack_from("<HHQ", library, start + 4)
        at = start + header
        while at < start + header + size:
            kind, _, entry, payload = struct.unpack_from("<HHIQ", library, at)
            (arch,) = struct.unpack_from("<I", library, at + 28)
            assert kind == 2  # machine code; 1 would be PTX
            yield arch, library[at + entry : at + entry + payload]
            at += entry + payload


def test_the_library_holds_machine_code_for_each(artifact: CudaArtifact, tmp_path: Path) -> None:
    artifact.save(tmp_path)
    found = list(embedded((tmp_path / "model.so").read_bytes()))
    numbers = [int(arch.strip("sm_a")) for arch in artifact.machine.archs]
    assert sorted(arch for arch, _ in found) == numbers
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["archs"] == list(artifact.machine.archs)
    report = artifact.report()
    assert report["spilling"] == [] and 0 < report["most_registers"] <= 255


def test_every_kernel_is_there_on_each(artifact: CudaArtifact) -> None:
    by_arch: dict[str, set[str]] = {}
    for r in resources(artifact):
        by_arch.setdefault(r.arch, set()).add(r.kernel)
    assert by_arch.keys() == set(artifact.machine.archs)
    assert len({frozenset(kernels) for kernels in by_arch.values()}) == 1
    (kernels, *_) = by_arch.values()
    stems = {name.rpartition("_kernel")[0].rstrip("0123456789").rstrip("_") for name in kernels}
    kind = "warpgroups" if artifact.machine.has_wgmma else "warps"
    wanted = {
        f"gemm_{kind}",
        "attention_flash",
        f"conv_{kind}",
        "rows_rms_norm",
        "rows_softmax",
        "reduce_rows",
        "scan_rows",
    }
    assert stems >= wanted | {"gemm_blocks"}


def test_nothing_spills_and_nothing_is_indexed_in_local_memory(artifact: CudaArtifact) -> None:
    for r in resources(artifact):
        assert r.spill_bytes == 0 and r.stack_bytes == 0, r


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
@pytest.mark.parametrize(("inner", "columns"), bench_cuda.SMALL)
def test_nothing_spills_where_products_of_few_rows_are_measured(
    kind: str, inner: int, columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = bench_cuda.linear(inner, columns, kind, "bf16")
    normal.normalize(model)
    assert most_registers(model, tmp_path, monkeypatch) <= 224


def test_blocks_fit_a_multiprocessor(artifact: CudaArtifact) -> None:
    """65536 registers: blocks have 256 threads, those of wgmma 384, those that stream weights 544."""
    for r in resources(artifact):
        few = r.kernel.startswith(("gemm_warpgroups_2", "gemm_warpgroups_3"))
        many = r.kernel.startswith(("gemm_warpgroups_0", "gemm_warpgroups_1", "conv_warpgroups"))
        assert r.registers * (544 if few else 384 if many else 256) <= 65536
