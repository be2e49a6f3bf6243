"""What happens to the caller when the compiler crashes, is interrupted, or its caller dies."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from netlathe.backends.tvm import process
from netlathe.backends.tvm.backend import TvmBackend
from netlathe.diagnostics import InputError, LowerError
from netlathe.ir import normal

pytest.importorskip("tvm", reason="the tvm extra is not installed")

from tests.backends.tvm.in_process import InProcess
from tests.pipeline.small_disk import small_disk

BACKEND = TvmBackend()
(TARGET,) = BACKEND.targets()
DEADLINE = 60.0  # seconds that a loaded machine may take to start Python


def model() -> ir.Model:
    """Two constants that are too large to travel, one of them quantized and read by two kernels."""
    rng = np.random.default_rng(0)
    constants = {
        "w": rng.normal(size=(200, 130)).astype(np.float32),
        "q": rng.integers(-128, 128, (130, 600)).astype(np.int8),
        "s": np.float32(0.01).reshape(()),
    }
    made = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 25]>
        two (float[n, 200] x, float[200, 130] w, int8[130, 600] q, float s)
            => (float[n, 600] y, float[130, 600] z) {
            m = MatMul(x, w)
            r = Relu(m)
            d = DequantizeLinear(q, s)
            y = MatMul(r, d)
            z = Neg(d)
        }"""
    )
    for name, array in constants.items():
        value = next(v for v in made.graph.inputs if v.name == name)
        made.graph.inputs.remove(value)
        value.const_value = ir.tensor(array, name=name)
        made.graph.register_initializer(value)
    normal.normalize(made)
    return made


def stand_in(folder: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``import tvm`` run ``code`` in processes started from now on."""
    (folder / "tvm").mkdir()
    (folder / "tvm" / "__init__.py").write_text(textwrap.dedent(code))
    monkeypatch.syspath_prepend(folder)


def test_the_result_is_that_of_this_process() -> None:
    """Bit for bit; weights are packed here."""
    one = model()
    x = np.random.default_rng(1).normal(size=(11, 200)).astype(np.float32)
    here, there = InProcess(one).run({"x": x}), BACKEND.compile(one, TARGET).run({"x": x})
    for name in ("y", "z"):
        assert np.array_equal(here[name], there[name])


def test_compiling_loads_no_tvm_here(tmp_path: Path) -> None:
    ir.save(model(), tmp_path / "model.onnx")
    code = """
import sys, netlathe
netlathe.compile(netlathe.capture(sys.argv[1]), "").save(sys.argv[2], target="tvm-x86")
sys.exit("tvm" in sys.modules or "tvm_ffi" in sys.modules)
"""
    command = [sys.executable, "-c", code, tmp_path / "model.onnx", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("import ctypes; ctypes.string_at(0)", "SIGSEGV"),
        ("import os; print('no such pass', flush=True); os.abort()", "SIGABRT"),
    ],
)
def test_a_crash_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, name: str
) -> None:
    stand_in(tmp_path, code, monkeypatch)
    with pytest.raises(LowerError, match=f"compiling crashed with {name}") as caught:
        BACKEND.compile(model(), TARGET)
    if name == "SIGABRT":
        assert caught.value.diagnostics[0].notes == ("it printed: no such pass",)
    assert [d.code for d in BACKEND.unsupported(model(), TARGET)] == ["tvm.crash"]


def test_a_defect_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, "raise ZeroDivisionError('of ours')", monkeypatch)
    with pytest.raises(process.WorkerError, match=r"(?s)Traceback.*ZeroDivisionError: of ours"):
        BACKEND.compile(model(), TARGET)


def test_a_full_disk_for_temporary_files_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the worker that finds it full: what it is told has room, the library and the answer have not."""
    with small_disk(tmp_path / "temporary", kilobytes=40) as full:
        monkeypatch.setenv("TMPDIR", str(full))
        monkeypatch.setattr(tempfile, "tempdir", None)
        with pytest.raises(InputError, match=r"compiling found no room[^$]*TMPDIR") as caught:
            BACKEND.compile(model(), TARGET)
        assert caught.value.diagnostics[0].at == str(full)
        gc.collect()  # the artifact's folder goes before the disk does


def _started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[subprocess.Popen[str], int]:
    """The command, compiling with a TVM that never ends, and the number of its worker."""
    told = tmp_path / "worker"
    stand_in(
        tmp_path,
        f"""
        import os, time
        with open({str(told)!r} + ".new", "w") as file: file.write(str(os.getpid()))
        os.rename({str(told)!r} + ".new", {str(told)!r})
        time.sleep(1000)
        """,
        monkeypatch,
    )
    ir.save(model(), tmp_path / "model.onnx")
    words = ["compile", tmp_path / "model.onnx", "--passes", "", "--target", "tvm-x86"]
    command = [sys.executable, "-m", "netlathe", *words, "-o", tmp_path / "out"]
    running = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        # Jobs that a shell runs in the background ignore SIGINT, and so do their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + DEADLINE
    while not told.exists():
        assert time.monotonic() < deadline and running.poll() is None
        time.sleep(0.05)
    return running, int(told.read_text())


def _gone(number: int) -> bool:
    """Whether the process ends before the deadline."""
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":  # dead, and nobody has asked for its exit code yet
            return True
        time.sleep(0.05)
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
class TestSignals:
    def test_ctrl_c_ends_both(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A terminal sends SIGINT to both; the exit code is the command's own."""
        running, worker = _started(tmp_path, monkeypatch)
        os.killpg(running.pid, signal.SIGINT)
        _, errors = running.communicate(timeout=DEADLINE)
        assert running.returncode == 130 and "Traceback" not in errors
        assert _gone(worker)
        assert not (tmp_path / "out").exists()

    def test_a_killed_caller_leaves_no_worker(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        running, worker = _started(tmp_path, monkeypatch)
        running.kill()
        running.communicate(timeout=DEADLINE)
        assert _gone(worker)
