"""Calls recorded as CUDA graphs: what holds their memory, what is refused, and what they compute on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("tvm", reason="the tvm extra is not installed")

from netlathe.backends.tvm import runtime
from netlathe.backends.tvm.artifact import TvmArtifact
from netlathe.backends.tvm.cuda.artifact import CudaArtifact
from netlathe.backends.tvm.cuda.machine import ARCHITECTURES, gpu
from netlathe.backends.tvm.machine import machine
from netlathe.ir import normal

HERE = [arch for arch in ARCHITECTURES if not runtime.gpu_lack([arch])]


def model() -> ir.Model:
    """Two products with a softmax between, so that something lies between inputs and outputs."""
    made = ir.from_onnx_text(
        """
        <ir_version: 11, opset_import: ["" : 25]>
        g (float[b, 32] x, float[b, 32] w) => (float[b, b] y)
        {
            z = Softmax (x)
            t = Transpose <perm = [1, 0]> (w)
            y = MatMul (z, t)
        }
        """
    )
    normal.normalize(made)
    return made


def feeds(rows: int, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal((rows, 32)).astype(np.float32) for name in "xw"}


def wanted(given: dict[str, Any]) -> Any:
    powers = np.exp(given["x"].astype(np.float64))
    return powers / powers.sum(1, keepdims=True) @ given["w"].T.astype(np.float64)


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> runtime.Model:
    folder = tmp_path_factory.mktemp("artifact")
    TvmArtifact(model(), machine("avx2")).save(folder)
    return runtime.load(folder)


def test_a_call_that_holds_its_memory_shares_none_with_others(on_cpu: runtime.Model) -> None:
    """Later calls, of the same program or of another one, leave its results and its scratch memory alone."""
    held: list[Any] = []
    run = on_cpu._holding(held)
    first = feeds(5, 0)
    (result,) = run(on_cpu.place(first))
    count = len(held)
    assert count >= 1
    kept = np.array(np.from_dlpack(result))
    for seed in range(1, 4):
        (other,) = on_cpu.invoke(on_cpu.place(feeds(5, seed)))
        assert np.from_dlpack(other).ctypes.data != np.from_dlpack(result).ctypes.data
    assert len(held) == count  # the program that was there before holds nothing
    assert np.array_equal(np.from_dlpack(result), kept)
    assert np.abs(kept - wanted(first)).max() <= 1e-5


def test_the_next_program_allocates_as_before(on_cpu: runtime.Model) -> None:
    held: list[Any] = []
    on_cpu._holding(held)
    given = feeds(3, 7)
    (result,) = on_cpu._started()(*on_cpu.place(given), *on_cpu._parameters)
    assert held == [] and np.abs(np.from_dlpack(result) - wanted(given)).max() <= 1e-5


def test_a_cpu_records_nothing(on_cpu: runtime.Model) -> None:
    with pytest.raises(runtime.ArtifactError, match="recorded on a GPU"):
        on_cpu.record(feeds(2, 0))


@pytest.mark.skipif(not HERE, reason="no GPU that there are kernels for")
def test_what_is_replayed_is_what_runs(tmp_path: Path) -> None:
    CudaArtifact(model(), gpu(HERE[-1:])).save(tmp_path)
    loaded = runtime.load(tmp_path)
    recording = loaded.record(feeds(5, 0))
    for seed in range(3):
        given = feeds(5, seed)
        found = recording(**given)["y"]
        assert np.array_equal(found, loaded.run(given)["y"])
        assert np.abs(found - wanted(given)).max() <= 1e-4
    with pytest.raises(runtime.ArtifactError, match="record another"):
        recording.write(feeds(6, 0))
