"""The bare artifact as its users meet it: the plan, the C, what it refuses, and bad settings."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("tvm", reason="the tvm extra is not installed")

from netlathe.backends.tvm import runtime
from netlathe.backends.tvm.arm import cross, emulator
from netlathe.backends.tvm.arm.artifact import BareArtifact, build_program
from netlathe.backends.tvm.arm.backend import ArmBackend
from netlathe.backends.tvm.arm.cores import CORES
from netlathe.backends.tvm.arm.plan import Span, aligned, place
from netlathe.cli import main
from netlathe.diagnostics import InputError, LowerError, OptionError
from netlathe.execute import ort
from netlathe.pipeline.interfaces import Target
from tests.backends.tvm_arm.arm import model_of, need_emulator

BACKEND = ArmBackend()
TARGETS = {target.name: target for target in BACKEND.targets()}
RNG = np.random.default_rng(0)


def target(core: str = "neoverse-n1", **settings_: Any) -> Target:
    return dataclasses.replace(TARGETS[f"arm-{core}"], settings=settings_)


def odd() -> ir.Model:
    """An input that is an output, an output in two shapes, one that others read, a name that is C's."""
    rng = np.random.default_rng(1)
    return model_of(
        """g (float[batch, 6] x, int64[2] int, float[6, 10] w, float[10] b)
            => (float[batch, 10] y, float[n] flat, float[batch, 6] same, float[batch, 10] z) {
            h = MatMul(x, w)
            y = Add(h, b)
            minus = Constant <value = int64[1] {-1}> ()
            flat = Reshape(y, minus)
            same = Identity(x)
            s = Softmax<axis = 1>(y)
            c = ReduceSum<keepdims = 0>(int)
            f = Cast<to = 1>(c)
            z = Mul(s, f)
        }""",
        w=rng.normal(size=(6, 10)).astype(np.float32),
        b=rng.normal(size=10).astype(np.float32),
    )


@lru_cache(maxsize=1)
def artifact() -> BareArtifact:
    made = BACKEND.compile(odd(), target(form="bare", dims="batch=3", prefix="odd"))
    assert isinstance(made, BareArtifact)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tmp_path_factory.mktemp("bare")
    return made


@pytest.fixture
def saved(folder: Path) -> Path:
    if not any(folder.iterdir()):
        artifact().save(folder)
    return folder


@pytest.mark.parametrize("core", CORES)
def test_programs_run_on_the_core_and_no_larger_one(core: str, tmp_path: Path) -> None:
    """Of the features that Linux names, the emulated CPU has those of the core and no others."""
    need_emulator()
    command = emulator.command(CORES[core])
    if not command or command[-1] != core:
        pytest.skip(
            f"code for {core} was not checked on that core: it ran on {' '.join(command or ('this CPU',))}"
        )
    (tmp_path / "main.c").write_text(
        "#include <stdio.h>\n#include <sys/auxv.h>\n"
        'int main(void) { printf("%lu %lu", getauxval(16), getauxval(26)); }\n'
    )
    program = str(tmp_path / "main")
    subprocess.run([*cross.compiler(), "-static", tmp_path / "main.c", "-o", program], check=True)
    words = emulator.run(CORES[core], [program]).stdout.split()
    held: dict[int, int] = dict(zip((16, 26), map(int, words), strict=True))
    found = {name for name, (entry, bit) in runtime.HWCAPS.items() if held[entry] >> bit & 1}
    assert found == set(CORES[core].features)


FEEDS = {"x": RNG.normal(size=(3, 6)).astype(np.float32), "int": np.array([2, 3])}


class TestPlan:
    @settings(max_examples=200, deadline=None)
    @given(
        st.lists(
            st.tuples(st.integers(0, 5000), st.integers(0, 12), st.integers(0, 6)), max_size=24
        )
    )
    def test_nothing_that_lives_together_overlaps(self, drawn: list[tuple[int, int, int]]) -> None:
        spans = [Span(size, first, first + length) for size, first, length in drawn]
        whole = place(spans)
        for i, a in enumerate(spans):
            assert a.offset % 64 == 0 and a.end <= whole
            for b in spans[:i]:
                apart = a.last < b.first or b.last < a.first
                assert apart or a.end <= b.offset or b.end <= a.offset
        steps = range(20)
        needed = [sum(aligned(s.size) for s in spans if s.first <= t <= s.last) for t in steps]
        assert whole >= max(needed)

    def test_a_chain_takes_two_places(self) -> None:
        assert place([Span(1000, at, at + 1) for at in range(50)]) == 2 * aligned(1000)


def test_it_equals_onnx_runtime() -> None:
    need_emulator()
    actual = artifact().run(FEEDS)
    for name, expected in ort.run(artifact()._model, FEEDS).items():
        np.testing.assert_allclose(actual[name], expected, rtol=1e-5, atol=1e-6)


def test_what_is_saved(saved: Path) -> None:
    names = {"odd.h", "libodd.a", "odd.weights", "odd.c", "main.c", "meta.json"}
    assert {file.name for file in saved.iterdir()} == names
    meta = json.loads((saved / "meta.json").read_text())
    assert meta["core"] == "neoverse-n1" and meta["cpu_features"] == [
        *CORES["neoverse-n1"].features
    ]
    report = artifact().report()
    if emulator.command(CORES["neoverse-n1"]) is not None:
        assert report["error"] <= report["bound"]
    assert report["arena_bytes"] <= sum(aligned(s) for s in (report["tensor_bytes"], 64 * 8))


def test_the_same_model_gives_the_same_files(saved: Path, tmp_path: Path) -> None:
    again = BACKEND.compile(odd(), target(form="bare", dims="batch=3", prefix="odd"))
    again.save(tmp_path)
    for file in saved.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name


def test_no_runtime_is_asked_for(saved: Path) -> None:
    """Undefined symbols are the C library's."""
    nm = shutil.which("llvm-nm-19") or shutil.which("aarch64-linux-gnu-nm")
    if nm is None:
        pytest.skip("the symbols were not looked at: no nm for aarch64 is installed")
    command = [nm, "--undefined-only", str(saved / "libodd.a")]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    words = {line.split()[1] for line in text.splitlines() if line.split()[:1] == ["U"]}
    known = {"memcpy", "memset", "memcmp", "getauxval", "strcat", "strcpy", "strlen"}
    assert {word for word in words if not word.startswith("odd_")} <= known


def test_the_c_has_no_warnings(saved: Path, tmp_path: Path) -> None:
    command = [*cross.compiler(), "-Wall", "-Wextra", "-Werror", "-std=c11", "-D_GNU_SOURCE", "-c"]
    for name in ("odd.c", "main.c"):
        subprocess.run([*command, saved / name, "-o", tmp_path / "out.o"], check=True)


class TestRefusals:
    @pytest.fixture
    def program(self, saved: Path, tmp_path: Path) -> Path:
        need_emulator()
        return build_program(saved, "odd", tmp_path)

    def _run(self, program: Path, core: str, weights: Path, tmp_path: Path) -> Any:
        (tmp_path / "x").write_bytes(FEEDS["x"].tobytes())
        (tmp_path / "int").write_bytes(FEEDS["int"].tobytes())
        files = ["x", "int", "y", "flat", "same", "z"]
        words = [str(program), str(weights), *(str(tmp_path / file) for file in files)]
        return emulator.run(CORES[core], words)

    def test_a_core_without_the_features_is_told_which(
        self, program: Path, saved: Path, tmp_path: Path
    ) -> None:
        done = self._run(program, "cortex-a72", saved / "odd.weights", tmp_path)
        assert done.returncode == 2
        assert "this CPU lacks fphp asimdhp asimdrdm asimddp" in done.stderr

    def test_code_for_neoverse_v1_is_refused_by_n1(self, tmp_path: Path) -> None:
        need_emulator()
        made = BACKEND.compile(
            odd(), target("neoverse-v1", form="bare", dims="batch=3", prefix="odd")
        )
        made.save(tmp_path)
        program = build_program(tmp_path, "odd", tmp_path)
        done = self._run(program, "neoverse-n1", tmp_path / "odd.weights", tmp_path)
        assert done.returncode == 2 and "this CPU lacks fcma asimdfhm i8mm" in done.stderr

    def test_other_weights(self, program: Path, saved: Path, tmp_path: Path) -> None:
        data = bytearray((saved / "odd.weights").read_bytes())
        data[20] ^= 1
        (tmp_path / "w").write_bytes(data)
        done = self._run(program, "neoverse-n1", tmp_path / "w", tmp_path)
        assert done.returncode == 2 and "not the weights" in done.stderr

    def test_weights_that_are_cut_off(self, program: Path, saved: Path, tmp_path: Path) -> None:
        (tmp_path / "w").write_bytes((saved / "odd.weights").read_bytes()[:-8])
        done = self._run(program, "neoverse-n1", tmp_path / "w", tmp_path)
        assert done.returncode == 2 and "bytes, not" in done.stderr

    def test_feeds_of_another_size(self) -> None:
        need_emulator()
        with pytest.raises(InputError, match="axis 0 of input 'x' is 4, not 3"):
            artifact().run({**FEEDS, "x": np.zeros((4, 6), np.float32)})

    def test_sizes_that_data_decides(self) -> None:
        model = model_of("g (float[4] x) => (int64[1, n] y) { y = NonZero(x) }")
        found = BACKEND.unsupported(model, target(form="bare"))
        assert found and all("decided by data" in d.message for d in found)
        with pytest.raises(LowerError, match="decided by data"):
            BACKEND.compile(model, target(form="bare"))


@pytest.mark.parametrize(
    ("given_", "words"),
    [
        ({"form": "bar"}, "did you mean bare"),
        ({"from": "bare"}, "did you mean form"),
        ({"form": "bare", "dims": "batch"}, "NAME=SIZE"),
        ({"form": "bare", "dims": "batch=0"}, "positive size"),
        ({"form": "bare", "dims": "batch=1, batch=2"}, "batch twice"),
        ({"dims": "batch=1"}, "for form='bare'"),
        ({"form": "bare", "prefix": "Main-1"}, "cannot begin names in C"),
        ({"form": 3}, "must be text"),
    ],
)
def test_settings_that_make_no_sense(given_: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError) as caught:
        BACKEND.check(target(**given_))
    assert any(words in f"{d.message} {d.help}" for d in caught.value.diagnostics)


@pytest.mark.parametrize(
    ("dims", "words"), [("", "needs a size for batch"), ("batch=1, bach=2", "no dynamic dim bach")]
)
def test_dims_that_are_not_the_model_s(dims: str, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        BACKEND.compile(odd(), target(form="bare", dims=dims))


def test_a_missing_cross_compiler_is_told_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LowerError) as caught:
        BACKEND.check(target())
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code == "tvm.cross_compiler"
    assert "netlathe[arm]" in diagnostic.help and "gcc-aarch64-linux-gnu" in diagnostic.help


@pytest.mark.own_process
def test_from_the_command_line(tmp_path: Path) -> None:
    """The sample of the capture has other sizes than the artifact; one is made that fits."""
    ir.save(odd(), tmp_path / "odd.onnx")
    words = ["compile", str(tmp_path / "odd.onnx"), "--passes", "", "-o", str(tmp_path / "out")]
    words += ["--target", "arm-cortex-a72", "--set", "form=bare", "--set", "dims=batch=3"]
    assert main(words) == 0
    assert "float32[3, 10]" in (tmp_path / "out" / "model.h").read_text()
