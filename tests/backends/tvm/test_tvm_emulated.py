"""Artifacts on a CPU with AVX2 and nothing later, played by qemu: they run to the same bits, or are refused.

The emulator traps on an instruction that the CPU lacks, as the CPU does; that it does is tested first.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from netlathe.backends.tvm import machine as machines
from netlathe.backends.tvm import process, runtime
from netlathe.backends.tvm.backend import TvmBackend
from netlathe.execute.compare import inputs_of
from netlathe.ir import normal
from netlathe.pipeline.interfaces import Target
from tests.published import networks

pytest.importorskip("tvm", reason="the tvm extra is not installed")

EMULATOR = shutil.which("qemu-x86_64") or shutil.which("qemu-x86_64-static")
pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="artifacts for x86-64"),
    pytest.mark.skipif(
        EMULATOR is None,
        reason="qemu-x86_64 is not installed (apt-get install qemu-user): whether artifacts run on"
        " a CPU without AVX-512, and are refused where they cannot, was not checked",
    ),
]
Array = npt.NDArray[Any]
BACKEND = TvmBackend()
(TARGET,) = BACKEND.targets()
CPU = "Haswell"  # x86-64-v3 and no more
LACKS = "avx512_vnni, avx512bw, avx512cd, avx512dq, avx512f, avx512vl"

RUN = """
import sys
sys.modules["torch"] = None  # tvm_ffi imports it where it is; emulated, that takes a minute
import numpy, runtime
try:
    model = runtime.load(".", threads=1)
except runtime.ArtifactError as error:
    sys.exit(str(error))
feeds = dict(numpy.load(sys.argv[1]))
numpy.savez(sys.argv[2], **model.run(feeds))
"""


def emulated(folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """``python -c RUN`` in an artifact's folder, on that CPU."""
    assert EMULATOR is not None
    command = [EMULATOR, "-cpu", CPU, sys.executable, "-c", RUN, *map(str, words)]
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def saved(model: ir.Model, level: str, folder: Path) -> Path:
    """The artifact for a feature level."""
    folder.mkdir()
    target = Target(TARGET.name, TARGET.backend, "", settings={"features": level})
    BACKEND.compile(model, target).save(folder)
    return folder


def block() -> ir.Model:
    """Convolutions, direct and by Winograd, a normalization, attention, products of bytes and of 4 bits."""
    rng = np.random.default_rng(0)
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 25]>
        net (float[n, 3, 12, 12] x, float[16, 3, 3, 3] w, float[16, 16, 3, 3] w2, float[16] g,
             int8[16, 32] v, float vs, uint8 vz, int4[32, 24] u, float[24] us) => (float[n, 144, 24] y) {
            c1 = Conv<pads=[1, 1, 1, 1]>(x, w)
            c = Conv<pads=[1, 1, 1, 1]>(c1, w2)
            shape = Constant<value = int64[3] {0, 16, 144}>()
            f = Reshape(c, shape)
            t = Transpose<perm=[0, 2, 1]>(f)
            l = LayerNormalization(t, g)
            e = Gelu(l)
            a = Attention<q_num_heads=2, kv_num_heads=2>(e, e, e)
            q = QuantizeLinear(a, vs, vz)
            d = DequantizeLinear(q, vs, vz)
            vd = DequantizeLinear(v, vs)
            m = MatMul(d, vd)
            ud = DequantizeLinear<axis=1>(u, us)
            y = MatMul(m, ud)
        }"""
    )
    constants: dict[str, ir.TensorProtocol] = {
        "w": ir.tensor(rng.normal(size=(16, 3, 3, 3)).astype(np.float32)),
        "w2": ir.tensor(rng.normal(size=(16, 16, 3, 3)).astype(np.float32)),
        "g": ir.tensor(rng.normal(size=16).astype(np.float32)),
        "v": ir.tensor(rng.integers(-127, 128, (16, 32)).astype(np.int8)),
        "vs": ir.tensor(np.asarray(0.02, np.float32)),
        "vz": ir.tensor(np.asarray(120, np.uint8)),
        "u": ir.tensor(rng.integers(-8, 8, (32, 24)).astype(ir.DataType.INT4.numpy())),
        "us": ir.tensor(rng.uniform(0.1, 0.2, 24).astype(np.float32)),
    }
    for name, tensor in constants.items():
        value = next(v for v in model.graph.inputs if v.name == name)
        model.graph.inputs.remove(value)
        value.const_value = tensor
        model.graph.register_initializer(value)
    normal.normalize(model)
    return model


def test_the_emulated_cpu_has_avx2_and_no_more() -> None:
    """Whatever /proc/cpuinfo says, which is that of the machine around the emulator."""
    code = "import sys; sys.modules['torch'] = None; from netlathe.backends.tvm import machine"
    assert EMULATOR is not None
    command = [EMULATOR, "-cpu", CPU, sys.executable, "-c", f"{code}; print(machine.native())"]
    assert subprocess.check_output(command, text=True).strip() == "avx2"


def test_an_artifact_for_more_is_refused_and_does_not_trap(tmp_path: Path) -> None:
    relu = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 25]>
        net (float[n] x) => (float[n] y) { y = Relu(x) }"""
    )
    normal.normalize(relu)
    done = emulated(saved(relu, "avx512vnni", tmp_path / "made"), "never", "read")
    assert (
        f"this CPU lacks {LACKS}: the artifact was built for features='avx512vnni'" in done.stderr
    )
    assert done.returncode == 1


def run_on_both(model: ir.Model, feeds: dict[str, Array], folder: Path) -> None:
    """The outputs of the artifact for AVX2, emulated and not, are the same bits."""
    made = saved(model, "avx2", folder / "made")
    np.savez(folder / "feeds.npz", **feeds)  # type: ignore[arg-type]  # numpy's stub takes bools only
    done = emulated(made, folder / "feeds.npz", folder / "results.npz")
    assert done.returncode == 0, done.stderr
    here = process.run(made, feeds)
    with np.load(folder / "results.npz") as there:
        assert there.files == list(here)
        for name, array in here.items():
            assert np.array_equal(there[name], array)


needs_avx2 = pytest.mark.skipif(
    not runtime.cpu_features().issuperset(machines.LEVELS["avx2"][1]),
    reason="this CPU itself lacks AVX2",
)


@needs_avx2
def test_an_artifact_for_avx2_gives_the_same_bits(tmp_path: Path) -> None:
    x = np.random.default_rng(1).normal(size=(2, 3, 12, 12)).astype(np.float32)
    run_on_both(block(), {"x": x}, tmp_path)


@needs_avx2
@pytest.mark.slow
def test_a_sentence_encoder_for_avx2_gives_the_same_bits(tmp_path: Path) -> None:
    model = networks.captured("minilm")
    run_on_both(model, inputs_of(model, networks.feeds("minilm")[0]), tmp_path)
