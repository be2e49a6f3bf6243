"""Libraries on the device: TVM's own aarch64 runtime in qemu, driven by the C++ example and by the loader.

Dynamic dims get their sizes when the library runs. Floats are compared with ONNX Runtime, int8 with x86, bit
for bit.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("tvm", reason="the tvm extra is not installed")

from netlathe.backends.tvm.arm import cross, emulator
from netlathe.backends.tvm.arm.backend import ArmBackend
from netlathe.backends.tvm.arm.cores import CORES
from netlathe.execute import ort
from netlathe.execute.compare import relative_error
from netlathe.pipeline.pass_ import Feeds
from tests.backends.tvm.in_process import InProcess
from tests.backends.tvm_arm.arm import Array, model_of, need_emulator
from tests.backends.tvm_arm.models import BOUND, model_at

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[3]
CROSS = "aarch64-linux-gnu-g++"
LOADER = """
import sys
import numpy as np
sys.path.insert(0, sys.argv[1])
import runtime
np.savez(sys.argv[3], **runtime.load(sys.argv[1])(**np.load(sys.argv[2])))
"""
BACKEND = ArmBackend()
TARGETS = {target.name.removeprefix("arm-"): target for target in BACKEND.targets()}
RNG = np.random.default_rng(0)


@dataclass(frozen=True)
class Device:
    """An aarch64 Python with numpy and TVM's runtime, and the example as a program of its system."""

    folder: Path

    def _run(self, core: str, words: Sequence[object]) -> subprocess.CompletedProcess[str]:
        before = emulator.command(CORES[core])
        assert before is not None
        site = f"PYTHONPATH={self.folder / 'site'}"
        command = [*before, "-L", self.folder / "root", "-E", site, *words]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)

    def example(self, core: str, folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
        """The C++ example."""
        program = self.folder / "tvm_run"
        if not program.exists():
            if shutil.which(CROSS) is None:
                pytest.skip(f"no library was loaded from C++: {CROSS} is not installed")
            site = self.folder / "site"
            command = [CROSS, "-std=c++17", "-O1", str(ROOT / "examples" / "tvm_run.cc")]
            command.append(f"-I{site}/tvm_ffi/include")
            for library in ("tvm", "tvm_ffi"):
                command += [f"{flag}{site}/{library}/lib" for flag in ("-L", "-Wl,-rpath,")]
            command += ["-Wl,--no-as-needed", "-ltvm_runtime", "-ltvm_ffi", "-o", str(program)]
            subprocess.run(command, check=True)
        return self._run(core, [program, folder, *words])

    def loader(self, core: str, *words: object) -> subprocess.CompletedProcess[str]:
        """:func:`runtime.load` of the artifact's own copy, in Python."""
        return self._run(core, [self.folder / "root/usr/bin/python3", "-c", LOADER, *words])

    def outputs(self, core: str, artifact: Path, feeds: Feeds, files: Path) -> dict[str, Array]:
        """What the artifact makes of ``feeds``, which give the dims their sizes: the same from both."""
        meta = json.loads((artifact / "meta.json").read_text())
        sizes: dict[str, int] = {}
        for record in meta["inputs"]:
            array = np.asarray(feeds[record["name"]])
            array.astype(record["stored"]).tofile(files / record["name"])
            shape = zip(record["shape"], array.shape, strict=True)
            sizes |= {dim: size for dim, size in shape if isinstance(dim, str)}
        words = [f"{dim}={size}" for dim, size in sizes.items() if dim in meta["dims"]]
        done = self.example(core, artifact, "--files", files, *words)
        assert done.returncode == 0, done.stderr
        np.savez(files / "in.npz", **feeds)  # type: ignore[arg-type]  # none is named allow_pickle
        loaded = self.loader(core, artifact, files / "in.npz", files / "out.npz")
        assert loaded.returncode == 0, loaded.stderr
        made = dict(np.load(files / "out.npz"))
        for record in meta["outputs"]:
            whole = np.fromfile(files / record["name"], record["stored"])
            assert np.array_equal(whole, made[record["name"]].reshape(-1), equal_nan=True)
        return made


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Device:
    need_emulator()
    folder: Path = tmp_path_factory.mktemp("device")
    script = ROOT / "scripts" / "arm-python.sh"
    env = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run([script, folder], env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip()[-200:]
        pytest.skip(f"no library was loaded: an aarch64 Python is not to be had: {reason}")
    return Device(folder)


def saved(model: ir.Model, core: str, folder: Path) -> Path:
    folder.mkdir()
    BACKEND.compile(model, TARGETS[core]).save(folder)
    return folder


def convolutions() -> tuple[ir.Model, dict[str, Array]]:
    """What ARM has tiles for and what common schedules take, of planes whose sizes come when it runs."""
    cases = {  # weights, attributes
        "plain": ((20, 8, 3, 3), "pads = [1, 1, 1, 1]"),
        "stride": ((17, 8, 3, 3), "pads = [1, 1, 1, 1], strides = [2, 2]"),
        "point": ((21, 8, 1, 1), "group = 1"),
        "grouped": ((12, 4, 2, 3), "pads = [1, 0, 0, 2], group = 2"),
        "odd": ((4, 2, 3, 3), "group = 4, dilations = [2, 2], pads = [2, 2, 2, 2]"),
        "depth": ((8, 1, 3, 3), "pads = [1, 1, 1, 1], group = 8"),
    }
    inputs, outputs, nodes, constants = [], [], [], {}
    for name, (shape, attributes) in cases.items():
        for kind in ("float", "float16", "int8"):
            weight = f"{name}_{kind}"
            inputs.append(f"{kind}{list(shape)} {weight}")
            conv = "ConvInteger" if kind == "int8" else "Conv"
            nodes.append(f"y_{weight} = {conv}<{attributes}>(x_{kind}, {weight})")
            result = "int32" if kind == "int8" else kind
            outputs.append(f"{result}[batch, {shape[0]}, h_{name}, w_{name}] y_{weight}")
            constants[weight] = (
                RNG.integers(-128, 128, shape).astype(np.int8)
                if kind == "int8"
                else RNG.normal(size=shape).astype({"float": np.float32}.get(kind, np.float16))
            )
    given = [f"{kind}[batch, 8, height, width] x_{kind}" for kind in ("float", "float16", "int8")]
    # The given filter is no constant: its schedule is that of every machine.
    given.append("float[5, 8, 3, 3] w")
    nodes.append("y_given = Conv(x_float, w)")
    outputs.append("float[batch, 5, h_given, w_given] y_given")
    text = f"g ({', '.join([*given, *inputs])}) => ({', '.join(outputs)}) {{ {' '.join(nodes)} }}"
    return model_of(text, **constants), {"w": RNG.normal(size=(5, 8, 3, 3)).astype(np.float32)}


@pytest.mark.parametrize("core", CORES)
def test_convolutions_of_dynamic_planes(core: str, device: Device, tmp_path: Path) -> None:
    model, given = convolutions()
    folder = saved(model, core, tmp_path / "artifact")
    for batch, height, width in ((1, 7, 13), (2, 5, 3), (1, 20, 9)):
        shape = (batch, 8, height, width)
        x = RNG.normal(size=shape)
        feeds: dict[str, Array] = {
            "x_float": x.astype(np.float32),
            "x_float16": x.astype(np.float16),
            "x_int8": RNG.integers(-128, 128, shape).astype(np.int8),
            **given,
        }
        actual = device.outputs(core, folder, feeds, tmp_path)
        for name, expected in ort.run(model, feeds).items():
            if expected.dtype == np.int32:
                np.testing.assert_array_equal(actual[name], expected, name)
                continue
            bound = 1e-5 if expected.dtype == np.float32 else 16 * 2**-11
            assert relative_error(actual[name], expected) < bound, name


@pytest.mark.parametrize(
    ("name", "precision", "core"),
    [
        ("minilm", "int8", "neoverse-n1"),
        ("mobilenet_v2", "int8", "neoverse-v1"),
        ("mobilenet_v2", "float32", "cortex-a72"),
        ("llama", "int4", "neoverse-n1"),
    ],
)
def test_models(name: str, precision: str, core: str, device: Device, tmp_path: Path) -> None:
    """At both sizes of the zoo, by one library."""
    model, fed = model_at(name, precision)
    folder = saved(model, core, tmp_path / "artifact")
    x86 = InProcess(model) if precision == "int8" else None
    for feeds in fed:
        actual = device.outputs(core, folder, feeds, tmp_path)
        for output, array in (x86.run(feeds) if x86 else ort.run(model, feeds)).items():
            if x86 is not None:
                assert np.array_equal(actual[output], array), output
            else:
                assert relative_error(actual[output], array) < BOUND, output


def test_a_lesser_core_is_refused_and_does_not_trap(device: Device, tmp_path: Path) -> None:
    text = "g (float[batch, 6] x) => (float[batch, 6] y) { y = Softmax<axis = 1>(x) }"
    folder = saved(model_of(text), "neoverse-n1", tmp_path / "artifact")
    np.savez(tmp_path / "in.npz", x=np.ones((2, 6), np.float32))
    files = (tmp_path / "in.npz", tmp_path / "out.npz")
    done, loaded = (
        device.example("cortex-a72", folder, "batch=2"),
        device.loader("cortex-a72", folder, *files),
    )
    assert done.returncode == 2 and loaded.returncode == 1
    for told in (done.stderr, loaded.stderr):
        assert "this CPU lacks" in told and "asimddp" in told
    assert device.example("neoverse-n1", folder, "batch=2").returncode == 0


@pytest.mark.skipif(
    importlib.util.find_spec("ziglang") is None,
    reason="zig linked nothing: it is not installed (pip install 'netlathe[arm]')",
)
def test_zig_links_both_forms(
    device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where GCC's cross compiler is not found."""
    found = shutil.which
    text = "g (float[batch, 6] x) => (float[batch, 6] y) { y = Softmax<axis = 1>(x) }"
    feeds = {"x": RNG.normal(size=(2, 6)).astype(np.float32)}
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "which", lambda name: None if "aarch64-" in name else found(name))
        assert "zig" in cross.compiler()[0] and "zig" in cross.archiver()[0]
        folder = saved(model_of(text), "neoverse-n1", tmp_path / "artifact")
        settings = {"form": "bare", "dims": "batch=2"}
        target = dataclasses.replace(TARGETS["neoverse-n1"], settings=settings)
        bare = BACKEND.compile(model_of(text), target).run(feeds)
    expected = ort.run(model_of(text), feeds)["y"]
    for actual in (bare, device.outputs("neoverse-n1", folder, feeds, tmp_path)):
        np.testing.assert_allclose(actual["y"], expected, rtol=1e-6)
