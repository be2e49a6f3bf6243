"""The TVM backend as its users meet it: schedules, gaps, the artifact and its loader, bad input."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from netlathe.backends.tvm import machine as machines
from netlathe.backends.tvm import runtime, toolchain
from netlathe.backends.tvm.backend import TvmBackend
from netlathe.cli import main
from netlathe.diagnostics import InputError, LowerError, MissingExtraError, OptionError
from netlathe.execute import ort
from netlathe.execute.compare import relative_error
from netlathe.pipeline.interfaces import Target
from tests import zoo_ir

pytest.importorskip("tvm", reason="the tvm extra is not installed")

from tvm import tirx

from netlathe.backends.tvm.artifact import TvmArtifact
from netlathe.backends.tvm.kernel import SCHEDULE
from netlathe.backends.tvm.kernels.general import SMALL
from netlathe.backends.tvm.lowering import Lowering
from tests.backends.tvm.in_process import InProcess
from tests.ir.onnx_text import normal_model

Array = npt.NDArray[Any]
BACKEND = TvmBackend()
(TARGET,) = BACKEND.targets()
# max|difference| as a share of the RMS in float32: another order of sums, other polynomials for exp,
# erf and tanh (a few ulp of 2**-24 each), through a handful of operators.
BOUND = 1e-5


def mlp() -> ir.Model:
    rng = np.random.default_rng(0)
    return normal_model(
        """<ir_version: 10, opset_import: ["" : 25]>
        mlp (float[rows, 40] x, float[40, 70] w, float[70] b, float[70, 9] v) => (float[rows, 9] y) {
            h = MatMul(x, w)
            c = Add(h, b)
            g = Gelu(c)
            y = MatMul(g, v)
        }""",
        w=rng.normal(size=(40, 70)).astype(np.float32),
        b=rng.normal(size=70).astype(np.float32),
        v=rng.normal(size=(70, 9)).astype(np.float32),
    )


def kernels(model: ir.Model) -> dict[str, Any]:
    """The PrimFuncs of a lowered model, by name."""
    module = Lowering(model, machines.machine("avx2")).run().module
    return {
        variable.name_hint: function
        for variable, function in module.functions.items()
        if isinstance(function, tirx.PrimFunc)
    }


def in_turn(part: Any, times: int | None = 1) -> Iterator[tuple[Any, int | None]]:
    """The statements that no parallel loop is around, and how often each of them runs, if that is known."""
    if isinstance(part, tirx.For):
        if tirx.ForKind(int(part.kind)) == tirx.ForKind.PARALLEL:
            return
        length = int(part.extent) if isinstance(part.extent, tirx.IntImm) else None
        known = None if times is None or length is None else times * length
        yield from in_turn(part.body, known)
    elif isinstance(part, tirx.SeqStmt):
        for item in part.seq:
            yield from in_turn(item, times)
    elif isinstance(part, tirx.IfThenElse):
        yield from in_turn(part.then_case, times)
        if part.else_case is not None:
            yield from in_turn(part.else_case, times)
    elif isinstance(part, tirx.AttrStmt):
        yield from in_turn(part.body, times)
    elif not isinstance(part, tirx.DeclBuffer):  # a name, and no work
        yield part, times


def check_schedule(kernel: str, function: Any) -> None:
    """The kernel is named after its schedule, and all that it does is in parallel, or little.

    Little is what a schedule for small sizes does, whose loops are as long as they will ever be. Numbers
    bound in front of the loops run once.
    """
    schedule = str(function.attrs[SCHEDULE])
    assert kernel.startswith(schedule.replace(".", "_"))
    for statement, times in in_turn(function.body):
        if schedule.endswith(".small"):
            assert times is not None and times <= SMALL, (kernel, times)
        else:
            assert isinstance(statement, tirx.Bind) and times == 1, (kernel, statement)


class TestSchedules:
    """What no schedule covers cannot be reached: there is no lowering that leaves the loops to TVM."""

    @pytest.mark.parametrize("name", zoo_ir.some("llama", "resnet"))
    def test_every_kernel_names_its_schedule_and_follows_it(self, name: str) -> None:
        found = kernels(zoo_ir.captured(name))
        assert found
        for kernel, function in found.items():
            check_schedule(kernel, function)

    @pytest.mark.parametrize("size", [1, SMALL, SMALL + 1])
    def test_what_is_small_is_not_spread(self, size: int) -> None:
        """And one element more is."""
        text = f"""<ir_version: 10, opset_import: ["" : 25]>
        small (float[{size}] x) => (float[{size}] y, float[1] z) {{
            y = Relu(x)
            z = ReduceMax(x)
        }}"""
        found = kernels(normal_model(text))
        assert len(found) == 2
        for kernel, function in found.items():
            check_schedule(kernel, function)
            assert str(function.attrs[SCHEDULE]).endswith(".small") == (size <= SMALL)

    def test_nothing_is_left_for_tvm_to_legalize(self) -> None:
        """Calls of the Relax function are to our kernels, or only look at shapes."""
        module = Lowering(zoo_ir.captured("llama"), machines.machine("avx2")).run().module
        text = module["main"].script()
        operators = {word.split("(")[0] for word in text.split() if word.startswith("R.")}
        calls = {word for word in operators if word.split(".")[1].split("(")[0].islower()}
        assert calls <= {
            "R.call_tir",
            "R.reshape",
            "R.shape",
            "R.func_attr",
            "R.match_cast",
            "R.function",
        }

    def test_identical_layers_are_compiled_once(self) -> None:
        lines = "\n".join(
            f"m{i} = MatMul({'x' if i == 0 else f'r{i - 1}'}, w{i})\nr{i} = Relu(m{i})"
            for i in range(4)
        )
        names = ", ".join(f"float[32, 32] w{i}" for i in range(4))
        text = f"""<ir_version: 10, opset_import: ["" : 25]>
        deep (float[rows, 32] x, {names}) => (float[rows, 32] r3) {{ {lines} }}"""
        rng = np.random.default_rng(0)
        weights = {f"w{i}": rng.normal(size=(32, 32)).astype(np.float32) for i in range(4)}
        assert len(kernels(normal_model(text, **weights))) == 1

    def test_bias_activation_and_residual_run_inside_the_product(self) -> None:
        text = """<ir_version: 10, opset_import: ["" : 25]>
        block (float[rows, 32] x, float[32, 32] w, float[32] b) => (float[rows, 32] y) {
            m = MatMul(x, w)
            c = Add(m, b)
            g = Gelu(c)
            y = Add(g, x)
        }"""
        rng = np.random.default_rng(0)
        w = rng.normal(size=(32, 32)).astype(np.float32)
        assert list(kernels(normal_model(text, w=w, b=w[0]))) == ["gemm_packed_0"]


@pytest.mark.parametrize("level", ["avx2", "avx512"])
@pytest.mark.parametrize("rows", [1, 3, 5, 8, 13, 130])
def test_any_number_of_rows_and_columns(level: str, rows: int) -> None:
    if not runtime.cpu_features().issuperset(machines.LEVELS[level][1]):
        pytest.skip(f"this CPU lacks {level}")
    model = mlp()
    artifact = _compiled(level)
    x = np.random.default_rng(rows).normal(size=(rows, 40)).astype(np.float32)
    expected = ort.run(model, {"x": x})["y"]
    assert relative_error(artifact.run({"x": x})["y"], expected) < BOUND


_ARTIFACTS: dict[str, Any] = {}


def _compiled(level: str) -> Any:
    if level not in _ARTIFACTS:
        _ARTIFACTS[level] = InProcess(mlp(), level)
    return _ARTIFACTS[level]


class TestGaps:
    def test_all_are_listed_with_their_module_paths(self) -> None:
        model = normal_model(
            """<ir_version: 10, opset_import: ["" : 25]>
            odd (float[2, 3] x, int64[1] k) => (float[a] y, float[3, 3] d) {
                u = Relu(x)
                y = Unique<sorted=1>(u)
                s = MatMul(x, x)
                d = Relu(s)
            }""".replace("MatMul(x, x)", "Det(x)").replace("float[3, 3] d", "float d"),
        )
        for node in model.graph:
            node.metadata_props["netlathe.module"] = f"odd.{node.op_type.lower()}"
        found = BACKEND.unsupported(model, TARGET)
        assert [d.code for d in found] == ["tvm.unsupported"] * 2
        assert [d.where for d in found] == ["odd.unique", "odd.det"]
        with pytest.raises(LowerError) as caught:
            BACKEND.compile(model, TARGET)
        assert caught.value.diagnostics == tuple(found)

    def test_a_supported_model_has_none(self) -> None:
        assert BACKEND.unsupported(mlp(), TARGET) == []


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "advice"),
        [
            ({"features": "avx512vni"}, "did you mean avx512vnni, avx512 or avx2"),
            ({"features": "avx3"}, "did you mean avx2"),
            ({"features": "sse9"}, "known: avx2, avx512, avx512vnni, native"),
            ({"features": 3}, ""),
            ({"feature": "avx2"}, "did you mean features"),
            ({"threads": 2}, "features"),
        ],
        ids=str,
    )
    def test_refused_with_what_is_near(self, settings: dict[str, Any], advice: str) -> None:
        target = Target(TARGET.name, TARGET.backend, "", settings=settings)
        for use in (BACKEND.check, lambda target: BACKEND.unsupported(mlp(), target)):
            with pytest.raises(OptionError) as caught:
                use(target)
            assert advice in caught.value.diagnostics[0].help

    @pytest.mark.parametrize(
        ("words", "code", "advice"),
        [
            (["--target", "tvm-x68"], "target.unknown", "did you mean tvm-x86"),
            (["--target", "tvm-x86", "--set", "features=avx512vnn"], "tvm.features", "avx512vnni"),
            (["--target", "tvm-x86", "--set", "feature=avx2"], "target.setting", "features"),
        ],
    )
    def test_refused_on_the_command_line_before_any_pass_runs(
        self,
        words: list[str],
        code: str,
        advice: str,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        ir.save(mlp(), tmp_path / "model.onnx")
        command = ["compile", str(tmp_path / "model.onnx"), "--passes", "cleanup", *words]
        assert main([*command, "-o", str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err
        assert f"error[{code}]" in said and advice in said
        assert not (tmp_path / "out").exists()


class TestToolchain:
    def test_a_crashing_ffi_is_refused_before_anything_loads(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        versions = {"apache-tvm": toolchain.TVM_VERSION, "apache-tvm-ffi": "0.1.15.post2"}
        monkeypatch.setattr(metadata, "version", versions.__getitem__)
        with pytest.raises(LowerError, match=r"apache-tvm-ffi 0\.1\.15\.post2 crashes"):
            BACKEND.unsupported(mlp(), TARGET)

    @pytest.mark.parametrize(
        ("version", "works"),
        [
            ("0.1.14.post0", True),
            ("0.1.14.post1", True),
            ("0.1.14", False),
            ("0.1.13.post4", False),
            ("0.1.15", False),
            ("0.2.0", False),
            ("1.0rc1", False),
        ],
    )
    def test_which_versions_work(
        self, version: str, works: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        versions = {"apache-tvm": toolchain.TVM_VERSION, "apache-tvm-ffi": version}
        monkeypatch.setattr(metadata, "version", versions.__getitem__)
        if works:
            toolchain.check()
        else:
            with pytest.raises(LowerError):
                toolchain.check()

    def test_absent(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def version(name: str) -> str:
            raise metadata.PackageNotFoundError(name)

        monkeypatch.setattr(metadata, "version", version)
        with pytest.raises(MissingExtraError, match="tvm"):
            toolchain.check()

    def test_importing_the_backend_loads_no_tvm(self) -> None:
        code = "import sys, netlathe.backends.tvm.backend as b; b.TvmBackend.targets();"
        code += "sys.exit('tvm' in sys.modules or 'tvm_ffi' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- the artifact ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def artifact() -> TvmArtifact:
    return BACKEND.compile(mlp(), TARGET)


@pytest.fixture(scope="module")
def saved(artifact: TvmArtifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact")
    artifact.stamp("0123")
    files = artifact.save(folder)
    assert sorted(files) == sorted(folder.iterdir())
    report = artifact.report()
    assert report["error"] <= report["bound"]
    return folder


def copy_of(saved: Path, folder: Path) -> Path:
    shutil.copytree(saved, folder / "copy")
    return folder / "copy"


class TestArtifact:
    def test_what_it_says_of_itself(self, saved: Path) -> None:
        meta = json.loads((saved / "meta.json").read_text())
        assert meta["inputs"] == [
            {"name": "x", "dtype": "float32", "stored": "float32", "shape": ["rows", 40]}
        ]
        assert meta["manifest"] == "0123"
        assert meta["versions"]["apache-tvm"] == toolchain.TVM_VERSION
        assert all(record["offset"] % 64 == 0 for record in meta["parameters"])

    def test_constants_are_outside_of_the_library(self, saved: Path) -> None:
        weights = 4 * (40 * 70 + 70 + 70 * 9)
        assert (saved / "params.bin").stat().st_size >= weights

    def test_runs_without_netlathe_torch_onnx_and_the_compiler(self, saved: Path) -> None:
        """The loader beside the model, with those imports forbidden."""
        code = """
import sys
class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("netlathe", "torch", "onnx", "onnx_ir", "onnxruntime"):
            raise ImportError(name)
sys.meta_path.insert(0, Forbidden())
import numpy, runtime
model = runtime.load(".", threads=1)
print(numpy.abs(model(x=numpy.ones((3, 40), "float32"))["y"]).sum())
sys.exit("tvm" in sys.modules)
"""
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=saved,
            env={**os.environ, "PYTHONPATH": str(saved)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        x = np.ones((3, 40), np.float32)
        expected = np.abs(ort.run(mlp(), {"x": x})["y"]).sum()
        assert abs(float(done.stdout) / expected - 1) < BOUND

    def test_outputs_do_not_change_when_it_runs_again(self, saved: Path) -> None:
        model = runtime.load(saved)
        first = model(x=np.ones((2, 40), np.float32))["y"]
        kept = first.copy()
        model(x=np.zeros((2, 40), np.float32))
        assert np.array_equal(first, kept)

    def test_inputs_anywhere_in_memory(self, saved: Path) -> None:
        """Strided, read-only, and at an address that no vector load would take."""
        room = np.zeros(2 * 40 * 4 * 2 + 4, np.uint8)[4:].view(np.float32)
        x = room.reshape(2, 80)[:, ::2]
        x[...] = np.random.default_rng(0).normal(size=(2, 40))
        x.flags.writeable = False
        expected = ort.run(mlp(), {"x": np.ascontiguousarray(x)})["y"]
        assert relative_error(runtime.load(saved)(x=x)["y"], expected) < BOUND


def test_a_cache_that_is_empty(tmp_path: Path) -> None:
    """No element, in the middle of the shape."""
    model = normal_model(
        """<ir_version: 10, opset_import: ["" : 25]>
        grow (float[2, past, 4] cache, float[2, new, 4] x) => (float[2, all, 4] y) {
            y = Concat<axis=1>(cache, x)
        }"""
    )
    x = np.arange(8, dtype=np.float32).reshape(2, 1, 4)
    empty = np.zeros((2, 0, 4), np.float32)
    artifact = BACKEND.compile(model, TARGET)
    assert np.array_equal(artifact.run({"cache": empty, "x": x})["y"], x)


class TestWrongInputs:
    @pytest.mark.parametrize(
        ("feeds", "message"),
        [
            ({}, "input 'x' is missing"),
            ({"x": np.ones((2, 40), np.float32), "z": np.ones(1)}, "no input named 'z'"),
            ({"x": np.ones((2, 40))}, "input 'x' is float64, not float32"),
            ({"x": np.ones(40, np.float32)}, "has 1 dims, not 2"),
            ({"x": np.ones((2, 41), np.float32)}, "axis 1 of input 'x' is 41, not 40"),
        ],
    )
    def test_are_named(
        self, artifact: TvmArtifact, saved: Path, feeds: dict[str, Array], message: str
    ) -> None:
        with pytest.raises(runtime.ArtifactError, match=message):
            runtime.load(saved).run(feeds)
        with pytest.raises(InputError, match=message):
            artifact.run(feeds)

    def test_sizes_that_must_agree(self) -> None:
        inputs = [
            {"name": "a", "dtype": "float32", "stored": "float32", "shape": ["n", "n + 1"]},
            {"name": "b", "dtype": "float32", "stored": "float32", "shape": ["n"]},
        ]
        good = {"a": np.ones((2, 3), np.float32), "b": np.ones(2, np.float32)}
        assert len(runtime.check_feeds(inputs, good)) == 2
        with pytest.raises(runtime.ArtifactError, match="both are 'n'"):
            runtime.check_feeds(inputs, good | {"b": np.ones(3, np.float32)})
        with pytest.raises(runtime.ArtifactError, match=r"is 4, not n \+ 1 = 3"):
            runtime.check_feeds(inputs, good | {"a": np.ones((2, 4), np.float32)})


THREADS = """
import os, sys
sys.modules["torch"] = None
import numpy, runtime
cpus = os.sched_getaffinity(0)
model = runtime.load(".", threads=int(sys.argv[1]) if sys.argv[1] != "-" else None)
model(x=numpy.ones((600, 40), "float32"))
assert os.sched_getaffinity(0) == cpus
print(len(os.listdir("/proc/self/task")))
runtime.set_threads(5)
model(x=numpy.ones((600, 40), "float32"))
assert len(os.listdir("/proc/self/task")) == 5
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts in /proc")
def test_as_many_threads_as_asked_for(saved: Path) -> None:
    """And more when more are, and nobody's thread is bound to a core."""

    def count(word: str, **variables: str) -> int:
        # The interpreter with numpy alone has one thread then.
        own = {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(saved), **variables}
        command = [sys.executable, "-c", THREADS, word]
        return int(subprocess.check_output(command, cwd=saved, env={**os.environ, **own}))

    assert count("1", OMP_NUM_THREADS="3") == 1
    assert count("3", OMP_NUM_THREADS="1") == 3
    assert count("-", OMP_NUM_THREADS="2", TVM_NUM_THREADS="") == 2
    assert count("-", OMP_NUM_THREADS="1", TVM_NUM_THREADS="4") == 4


def test_impossible_numbers_of_threads() -> None:
    with pytest.raises(runtime.ArtifactError, match="at least 1, got 0"):
        runtime.set_threads(0)


class TestDamagedArtifacts:
    def test_another_cpu(
        self, artifact: TvmArtifact, saved: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(runtime, "cpu_features", lambda: frozenset({"sse2"}))
        with pytest.raises(runtime.ArtifactError, match=r"this CPU lacks .*avx2"):
            runtime.load(saved)
        with pytest.raises(LowerError, match=r"this CPU lacks .*avx2"):
            artifact.run({"x": np.ones((1, 40), np.float32)})

    def test_a_feature_that_no_cpu_has(self, saved: Path, tmp_path: Path) -> None:
        folder = copy_of(saved, tmp_path)
        meta = json.loads((folder / "meta.json").read_text())
        meta["cpu_features"] += ["avx1024", "amx_fp4"]
        (folder / "meta.json").write_text(json.dumps(meta))
        with pytest.raises(runtime.ArtifactError, match="this CPU lacks amx_fp4, avx1024:"):
            runtime.load(folder)

    @pytest.mark.parametrize("name", ["model.so", "params.bin", "meta.json"])
    def test_a_file_is_missing(self, saved: Path, tmp_path: Path, name: str) -> None:
        folder = copy_of(saved, tmp_path)
        (folder / name).unlink()
        with pytest.raises(runtime.ArtifactError, match=re.escape(f"it has no {name}")):
            runtime.load(folder)

    def test_constants_are_cut_off(self, saved: Path, tmp_path: Path) -> None:
        folder = copy_of(saved, tmp_path)
        data = (folder / "params.bin").read_bytes()
        (folder / "params.bin").write_bytes(data[:-1])
        with pytest.raises(runtime.ArtifactError, match="cut off"):
            runtime.load(folder)

    @pytest.mark.parametrize(
        ("change", "message"),
        [({"format": 99}, "format 99"), ({"architecture": "aarch64"}, "is for aarch64")],
    )
    def test_another_version_or_architecture(
        self, saved: Path, tmp_path: Path, change: dict[str, Any], message: str
    ) -> None:
        folder = copy_of(saved, tmp_path)
        meta = json.loads((folder / "meta.json").read_text()) | change
        (folder / "meta.json").write_text(json.dumps(meta))
        with pytest.raises(runtime.ArtifactError, match=message):
            runtime.load(folder)

    @pytest.mark.parametrize("cut", [0, 100, -1])
    def test_the_library_is_cut_off(self, saved: Path, tmp_path: Path, cut: int) -> None:
        """Not one byte of it runs."""
        folder = copy_of(saved, tmp_path)
        data = (folder / "model.so").read_bytes()
        (folder / "model.so").write_bytes(data[:cut])
        with pytest.raises(runtime.ArtifactError, match=r"model\.so is damaged"):
            runtime.load(folder)

    @pytest.mark.parametrize("name", ["model.so", "params.bin"])
    def test_a_changed_byte_is_found(self, saved: Path, tmp_path: Path, name: str) -> None:
        folder = copy_of(saved, tmp_path)
        runtime.check_files(folder)
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)
        with pytest.raises(runtime.ArtifactError, match=f"{name} is damaged"):
            runtime.check_files(folder)

    def test_no_runtime(self, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "tvm_ffi", None)
        with pytest.raises(runtime.ArtifactError, match="install apache-tvm-ffi"):
            runtime.load(saved)

    @pytest.mark.parametrize("package", ["apache-tvm", "apache-tvm-ffi"])
    def test_another_runtime(self, saved: Path, tmp_path: Path, package: str) -> None:
        folder = copy_of(saved, tmp_path)
        meta = json.loads((folder / "meta.json").read_text())
        meta["versions"][package] = "0.9.1"
        (folder / "meta.json").write_text(json.dumps(meta))
        with pytest.raises(runtime.ArtifactError, match=rf"built with {package} 0\.9\.1, and"):
            runtime.load(folder)

    @pytest.mark.parametrize("key", ["inputs", "parameters", "sha256"])
    def test_meta_lacks_something(self, saved: Path, tmp_path: Path, key: str) -> None:
        folder = copy_of(saved, tmp_path)
        meta = json.loads((folder / "meta.json").read_text())
        del meta[key]
        (folder / "meta.json").write_text(json.dumps(meta))
        with pytest.raises(runtime.ArtifactError, match=f"it has no {key}"):
            runtime.load(folder)

    def test_a_constant_outside_of_the_file(self, saved: Path, tmp_path: Path) -> None:
        folder = copy_of(saved, tmp_path)
        meta = json.loads((folder / "meta.json").read_text())
        meta["parameters"][0]["offset"] += 1 << 20
        (folder / "meta.json").write_text(json.dumps(meta))
        with pytest.raises(runtime.ArtifactError, match="does not fit its place"):
            runtime.load(folder)

    def test_meta_is_no_json(self, saved: Path, tmp_path: Path) -> None:
        folder = copy_of(saved, tmp_path)
        (folder / "meta.json").write_text("{")
        with pytest.raises(runtime.ArtifactError, match="damaged"):
            runtime.load(folder)


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(LowerError, match="needs a C\\+\\+ compiler") as caught:
        BACKEND.check(TARGET)
    assert "apt-get install g++" in caught.value.diagnostics[0].help


class TestQuantizedWeights:
    """A constant matrix of integers stays one: the kernel scales what it reads."""

    @pytest.mark.parametrize(
        ("scale", "zero", "attributes"),
        [
            ((), False, "axis=1"),
            ((), True, "axis=1"),
            ((70,), False, "axis=1"),
            ((70,), True, "axis=1"),
            ((40,), True, "axis=0"),
            ((5, 70), False, "axis=0, block_size=8"),
            ((3, 70), True, "axis=0, block_size=16"),  # the last block is shorter
            ((40, 7), True, "axis=1, block_size=10"),
        ],
    )
    def test_scaled_in_the_kernel(
        self, scale: tuple[int, ...], zero: bool, attributes: str
    ) -> None:
        rng = np.random.default_rng(0)
        shown = ", ".join(map(str, scale))
        inputs = (
            f"float[rows, 40] x, int8[40, 70] q, float[{shown}] s"
            if scale
            else ("float[rows, 40] x, int8[40, 70] q, float s")
        )
        constants: dict[str, Array] = {
            "q": rng.integers(-128, 128, (40, 70)).astype(np.int8),
            "s": rng.uniform(0.01, 0.02, scale).astype(np.float32),
        }
        if zero:
            inputs += f", int8[{shown}] z" if scale else ", int8 z"
            constants["z"] = rng.integers(-5, 6, scale).astype(np.int8)
        operands = "q, s, z" if zero else "q, s"
        model = normal_model(
            f"""<ir_version: 10, opset_import: ["" : 25]>
            q8 ({inputs}) => (float[rows, 70] y) {{
                w = DequantizeLinear<{attributes}>({operands})
                y = MatMul(x, w)
            }}""",
            **constants,
        )
        lowered = Lowering(model, machines.machine("avx2")).run()
        assert list(kernels(model)) == ["gemm_packed_0"]
        assert next(p.dtype for p in lowered.parameters if len(p.shape) == 3) == "int8"
        artifact = InProcess(model)
        for rows in (1, 5, 20):
            x = rng.normal(size=(rows, 40)).astype(np.float32)
            expected = ort.run(model, {"x": x})["y"]
            assert relative_error(artifact.run({"x": x})["y"], expected) < BOUND


def test_outputs_that_are_inputs_or_constants_are_copies() -> None:
    model = normal_model(
        """<ir_version: 10, opset_import: ["" : 25]>
        plain (float[n] x, float[2, 3] w) => (float[n] same, float[6] flat) {
            same = Identity(x)
            shape = Constant<value = int64[1] {6}>()
            flat = Reshape(w, shape)
        }""",
        w=np.arange(6, dtype=np.float32).reshape(2, 3),
    )
    artifact = InProcess(model)
    x = np.arange(4, dtype=np.float32)
    outputs = artifact.run({"x": x})
    assert np.array_equal(outputs["same"], x)
    assert not np.shares_memory(outputs["same"], x)
    assert np.array_equal(outputs["flat"], np.arange(6))


DIGEST = """
import hashlib, sys
sys.modules["torch"] = None  # not needed, and slow to import
from netlathe.backends.tvm import packing
from netlathe.backends.tvm.lowering import Lowering
from netlathe.backends.tvm.machine import machine
from netlathe.frontends.onnx_file import OnnxFile
model = OnnxFile().capture(sys.argv[1]).model
lowered = Lowering(model, machine("avx2")).run()
print(hashlib.sha256(lowered.module.script().encode()).hexdigest())
constants = packing.constants(model)
for parameter in lowered.parameters:
    made = parameter.recipe.make(constants)
    print(parameter.name, made.shape, hashlib.sha256(made.tobytes()).hexdigest())
"""


def test_two_processes_make_the_same_kernels_and_weights(tmp_path: Path) -> None:
    """With other hashes of strings, and so another order of sets."""
    ir.save(zoo_ir.captured("llama"), tmp_path / "model.onnx")
    running = [
        subprocess.Popen(
            [sys.executable, "-c", DIGEST, tmp_path / "model.onnx"],
            env={**os.environ, "PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    texts = [one.communicate()[0] for one in running]
    assert [one.returncode for one in running] == [0, 0]
    assert len(texts[0].splitlines()) > 10
    assert texts[0] == texts[1]
