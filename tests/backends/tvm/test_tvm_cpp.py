"""The C++ example, compiled as its comment says, against the judge."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from netlathe.backends.tvm import machine as machines
from netlathe.backends.tvm.backend import TvmBackend
from netlathe.execute import ort
from netlathe.ir import normal

tvm = pytest.importorskip("tvm", reason="the tvm extra is not installed")

SOURCE = Path(__file__).parents[3] / "examples" / "tvm_run.cc"
BOUND = 1e-5  # of the sum: float32 in another order

MODEL = """<ir_version: 10, opset_import: ["" : 25]>
two (float[batch, width] x) => (float[batch, width] y, float[1, width] top) {
    s = Softmax<axis=1>(x)
    one = Constant<value = float {2.5}>()
    y = Mul(s, one)
    zero = Constant<value = int64[1] {0}>()
    top = Gather<axis=0>(y, zero)
}"""


def model() -> ir.Model:
    made = ir.from_onnx_text(MODEL)
    normal.normalize(made)
    return made


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("artifact")
    backend = TvmBackend()
    backend.compile(model(), backend.targets()[0]).save(folder)
    return folder


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")

    def config(flag: str) -> list[str]:
        command = [sys.executable, "-m", "tvm_ffi.config", flag]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()

    (ffi,) = config("--libdir")
    library = Path(str(tvm.__file__)).parent / "lib"
    made: Path = tmp_path_factory.mktemp("program") / "tvm_run"
    links = [f"-L{ffi}", f"-L{library}", "-Wl,--no-as-needed", "-ltvm_runtime", "-ltvm_ffi"]
    links.append(f"-Wl,-rpath,{ffi}:{library}")
    command = ["g++", str(SOURCE), *config("--cxxflags"), *links, "-o", str(made)]
    subprocess.run(command, check=True)
    return made


def run(program: Path, *words: object) -> subprocess.CompletedProcess[str]:
    command = [str(program), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_example_runs_an_artifact(program: Path, artifact: Path) -> None:
    done = run(program, artifact, "batch=3", "width=21")
    assert done.returncode == 0, done.stderr
    expected = ort.run(model(), {"x": np.ones((3, 21), np.float32)})
    lines = done.stdout.splitlines()
    assert [line.split(" ", 1)[0] for line in lines] == list(expected)
    for line, (name, array) in zip(lines, expected.items(), strict=True):
        shape, total = line.removeprefix(name).split()
        assert shape == str(list(array.shape)).replace(" ", "")
        assert abs(float(total) / array.sum() - 1) < BOUND


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "another format"),
        ({"architecture": "aarch64"}, "is for aarch64"),
        ({"cpu_features": ["sse2", "avx1024"]}, "this CPU lacks avx1024"),
        ({"parameter_bytes": 12345}, "params.bin is cut off"),
        ({"archs": ["sm_80"]}, "is for a GPU"),
    ],
)
def test_what_it_refuses(
    program: Path, artifact: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(artifact, folder)
    meta = json.loads((folder / "meta.json").read_text()) | change
    (folder / "meta.json").write_text(json.dumps(meta))
    (folder / "model.so").write_bytes(b"not loaded")  # or the message would be another
    done = run(program, folder, "batch=3", "width=21")
    assert done.returncode == 2 and message in done.stderr


@pytest.mark.skipif(
    shutil.which("qemu-x86_64") is None,
    reason="qemu-x86_64 is not installed (apt-get install qemu-user): not checked on a lesser CPU",
)
def test_a_lesser_cpu_is_refused_and_does_not_trap(
    program: Path, artifact: Path, tmp_path: Path
) -> None:
    """/proc/cpuinfo is that of the machine around the emulator; the program asks the CPU too."""
    folder = tmp_path / "copy"
    shutil.copytree(artifact, folder)
    meta = json.loads((folder / "meta.json").read_text())
    meta["cpu_features"] = list(machines.LEVELS["avx512"][1])
    (folder / "meta.json").write_text(json.dumps(meta))
    command = ["qemu-x86_64", "-cpu", "Haswell", str(program), str(folder), "batch=3", "width=21"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "this CPU lacks avx512f avx512bw avx512cd avx512dq avx512vl" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["batch=3"], "give a size: width"),
        (["batch=3", "width=21", "depth=2"], "there is no dim depth"),
        (["batch=0", "width=21"], "batch must be at least 1"),
        (["batch=three", "width=21"], "no size: batch=three"),
    ],
)
def test_wrong_sizes(program: Path, artifact: Path, words: list[str], message: str) -> None:
    done = run(program, artifact, *words)
    assert done.returncode == 2 and message in done.stderr


def test_no_artifact(program: Path, tmp_path: Path) -> None:
    done = run(program, tmp_path)
    assert done.returncode == 2 and "it has no meta.json" in done.stderr
