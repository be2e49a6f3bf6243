"""What the CUDA backend and its loader refuse, before anything runs."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

pytest.importorskip("tvm", reason="the tvm extra is not installed")

from netlathe.backends.tvm import runtime
from netlathe.backends.tvm.cuda import toolkit
from netlathe.backends.tvm.cuda.backend import CudaBackend
from netlathe.backends.tvm.cuda.machine import gpu
from netlathe.diagnostics import LowerError, OptionError
from netlathe.pipeline import registry

BACKEND = CudaBackend()


def test_targets() -> None:
    names = [target.name for target in BACKEND.targets()]
    assert names == ["cuda-sm80", "cuda-sm86", "cuda-sm89", "cuda-sm90"]
    _, target = registry.find_target("cuda-sm80", archs="sm_89, sm_80")
    assert target.settings["archs"] == "sm_89, sm_80"


def test_an_unknown_architecture_is_named() -> None:
    with pytest.raises(OptionError, match="no kernels for architecture 'sm_75'"):
        gpu(["sm_75"])
    with pytest.raises(OptionError, match="no architecture"):
        gpu([])


def test_kernels_use_what_all_architectures_have() -> None:
    assert gpu(["sm_90a"]).has_wgmma and not gpu(["sm_90a", "sm_80"]).has_wgmma
    assert gpu(["sm_80", "sm_89"]).shared_bytes == 99 << 10


def test_without_nvcc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(toolkit, "PLACES", (str(tmp_path),))
    with pytest.raises(LowerError, match="needs nvcc") as caught:
        toolkit.nvcc()
    assert "CUDA toolkit" in str(caught.value)


def test_an_architecture_that_nvcc_does_not_know(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    old = tmp_path / "nvcc"
    old.write_text(
        "#!/bin/sh\nif [ $1 = --version ]; then echo release 11.0,; else echo compute_80; fi"
    )
    old.chmod(0o755)
    monkeypatch.setattr(toolkit, "PLACES", (str(tmp_path),))
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    toolkit.check_archs(["sm_80"])
    with pytest.raises(LowerError, match=r"nvcc 11.0 does not know architecture sm_90a"):
        toolkit.check_archs(["sm_80", "sm_90a"])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("#!/bin/sh\necho no licence >&2; exit 3", "exit code 3; no licence"),
        ("#!/nowhere/sh", "No such file or directory"),
    ],
)
def test_an_nvcc_that_does_not_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, why: str
) -> None:
    (tmp_path / "nvcc").write_text(text)
    (tmp_path / "nvcc").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for ask in (toolkit.version, lambda: toolkit.check_archs(["sm_80"])):
        with pytest.raises(LowerError, match=f"{tmp_path}/nvcc --.* failed: {why}"):
            ask()


@pytest.mark.parametrize(
    ("said", "note"),
    [("echo no such instruction >&2; ", "no such instruction"), ("", "nothing; is there room in")],
)
def test_an_nvcc_that_refuses_a_kernel(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: str, note: str
) -> None:
    """The error is ours, and no RuntimeError of TVM, through which it goes."""
    try:
        toolkit.cudart()
    except LowerError:
        pytest.skip("CUDA's runtime library is not installed")
    asked = "case $1 in --version) echo release 13.0,;; --list-gpu-arch) echo compute_80;;"
    (tmp_path / "nvcc").write_text(f"#!/bin/sh\n{asked} *) {said}exit 255;; esac")
    (tmp_path / "nvcc").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 25]> one (float[n] x) => (float[n] y) { y = Exp(x) }'
    )
    _, target = registry.find_target("cuda-sm80")
    with pytest.raises(LowerError, match=r"nvcc failed \(exit code 255\)") as caught:
        BACKEND.compile(model, target)
    assert note in str(caught.value)


class Driver:
    """What libcuda.so.1 says on a machine with one GPU of some capability."""

    def __init__(self, major: int, minor: int) -> None:
        self.capability = {75: major, 76: minor}

    def cuInit(self, flags: int) -> int:
        return 0

    def cuDeviceGet(self, device: Any, number: int) -> int:
        return 0

    def cuDeviceGetAttribute(self, number: Any, attribute: int, device: Any) -> int:
        number._obj.value = self.capability[attribute]
        return 0


def library(driver: Driver | None) -> Callable[..., Driver]:
    def load(name: str, **_: Any) -> Driver:
        if driver is None:
            raise OSError(name)
        return driver

    return load


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        (["sm_80"], (8, 6), True),  # a later minor version
        (["sm_86"], (8, 0), False),
        (["sm_80"], (9, 0), False),  # another major version
        (["sm_90a"], (9, 0), True),
        (["sm_90a"], (10, 0), False),
        (["sm_80", "sm_89"], (8, 9), True),
    ],
)
def test_gpus_of_other_architectures(
    monkeypatch: pytest.MonkeyPatch, archs: list[str], capability: tuple[int, int], runs: bool
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", library(Driver(*capability)))
    if runs:
        runtime.check_gpu(archs)
        return
    here = "sm_{}{}".format(*capability)
    with pytest.raises(runtime.ArtifactError, match=f"this GPU is {here}") as caught:
        runtime.check_gpu(archs)
    assert archs[0] in str(caught.value)


def test_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", library(None))
    with pytest.raises(runtime.ArtifactError, match=r"no NVIDIA driver \(libcuda.so.1\)"):
        runtime.check_gpu(["sm_90a"])


def test_constants_larger_than_the_free_memory() -> None:
    class Cudart:
        @staticmethod
        def cudaMemGetInfo(free: Any, total: Any) -> int:
            free._obj.value, total._obj.value = 1000, 2000
            return 0

    runtime._check_room(Cudart, 1000)
    with pytest.raises(
        runtime.ArtifactError, match=r"take 1001 bytes .* and 1000 of 2000 are free"
    ):
        runtime._check_room(Cudart, 1001)


def test_a_full_memory_is_named_with_its_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_cuda_runtime", lambda _: None)
    monkeypatch.setattr(runtime, "_room", lambda _: (1000, 2000))
    full = RuntimeError("CUDA Runtime Error: cudaErrorMemoryAllocation (2): out of memory")
    with pytest.raises(runtime.ArtifactError, match="takes 1001 bytes, and 1000 of 2000 bytes"):
        runtime._refuse_full_memory(full, "an input takes 1001 bytes")
    runtime._refuse_full_memory(RuntimeError("another"), "an input takes 1001 bytes")
