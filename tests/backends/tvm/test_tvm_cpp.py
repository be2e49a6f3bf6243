"""The C++ example, compiled as its comment says, against the judge."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

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


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_the_example_runs_an_artifact(tmp_path: Path) -> None:
    model = ir.from_onnx_text(MODEL)
    normal.normalize(model)
    backend = TvmBackend()
    (tmp_path / "artifact").mkdir()
    backend.compile(model, backend.targets()[0]).save(tmp_path / "artifact")

    def config(flag: str) -> list[str]:
        command = [sys.executable, "-m", "tvm_ffi.config", flag]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()

    (ffi,) = config("--libdir")
    library = Path(str(tvm.__file__)).parent / "lib"
    program = tmp_path / "tvm_run"
    links = [f"-L{ffi}", f"-L{library}", "-Wl,--no-as-needed", "-ltvm_runtime", "-ltvm_ffi"]
    links.append(f"-Wl,-rpath,{ffi}:{library}")
    command = ["g++", str(SOURCE), *config("--cxxflags"), *links, "-o", str(program)]
    subprocess.run(command, check=True)

    done = subprocess.run(
        [program, tmp_path / "artifact", "batch=3", "width=21"],
        check=True,
        capture_output=True,
        text=True,
    )
    expected = ort.run(model, {"x": np.ones((3, 21), np.float32)})
    lines = done.stdout.splitlines()
    assert [line.split(" ", 1)[0] for line in lines] == list(expected)
    for line, (name, array) in zip(lines, expected.items(), strict=True):
        shape, total = line.removeprefix(name).split()
        assert shape == str(list(array.shape)).replace(" ", "")
        assert abs(float(total) / array.sum() - 1) < BOUND
