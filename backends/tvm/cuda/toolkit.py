"""The CUDA toolkit: finding it, and compiling device code where there may be no GPU and no driver."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from netlathe.backends.tvm import toolchain
from netlathe.diagnostics import Diagnostic, LowerError

# What libtvm_runtime_cuda.so and our loader want of the driver. Compiling calls none of them.
_DRIVER_FUNCTIONS = (
    "cuInit",
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDeviceGetName",
    "cuFuncSetAttribute",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuLaunchKernelEx",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuTensorMapEncodeTiled",
)
PLACES = ("/usr/local/cuda/bin",)  # where nvcc may be besides PATH
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
_SHOWN = 12  # first lines of what nvcc printed when it failed


@dataclass(frozen=True)
class Resources:
    """What ptxas says one kernel takes on one architecture. Spills are bytes a thread moves for them."""

    kernel: str
    arch: str
    registers: int
    shared_bytes: int  # static; what is asked for at the launch is not in it
    stack_bytes: int
    spill_bytes: int


def nvcc() -> Path:
    """The compiler.

    Raises:
        LowerError: there is none.
    """
    places = [os.environ.get("PATH", ""), *PLACES]
    if (found := shutil.which("nvcc", path=os.pathsep.join(places))) is not None:
        return Path(found)
    raise LowerError(
        Diagnostic(
            "cuda.nvcc",
            "compiling for CUDA needs nvcc, and none is installed",
            notes=("looked on PATH and in " + ", ".join(PLACES),),
            help="install the CUDA toolkit, release 13 (cuda-nvcc and cuda-cudart from NVIDIA)",
        )
    )


def version() -> str:
    """The release that nvcc belongs to, such as ``13.0``.

    Raises:
        LowerError: there is no nvcc, or it does not run.
    """
    told = _told("--version")
    match = re.search(r"release ([\d.]+)", told)
    return match[1] if match else " ".join(told.split()[-1:])


def _told(question: str) -> str:
    """What nvcc answers.

    Raises:
        LowerError: there is none, or it does not run.
    """
    command = [os.fspath(nvcc()), question]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not done.returncode:
            return done.stdout
        lines = (done.stdout + done.stderr).strip().splitlines()
        why = f"exit code {done.returncode}" + "".join(f"; {line}" for line in lines[:1])
    except OSError as error:
        why = error.strerror or str(error)
    raise LowerError(
        Diagnostic(
            "cuda.nvcc",
            f"{' '.join(command)} failed: {why}",
            help="install the CUDA toolkit, release 13, anew, or put another nvcc first on PATH",
        )
    )


def check_archs(archs: Sequence[str]) -> None:
    """Return if nvcc knows the architectures.

    Raises:
        LowerError: it does not, or there is none, or it does not run.
    """
    known = {"sm_" + line.removeprefix("compute_") for line in _told("--list-gpu-arch").split()}
    for arch in archs:
        if arch.rstrip("a") not in known:
            raise LowerError(
                Diagnostic(
                    "cuda.arch",
                    f"nvcc {version()} does not know architecture {arch}",
                    notes=("it knows " + ", ".join(sorted(known)),),
                    help="install a newer CUDA toolkit, or leave the architecture out of archs",
                )
            )


def cudart() -> Path:
    """The runtime library that TVM's CUDA part is linked to.

    Raises:
        LowerError: it is not installed.
    """
    folders = [nvcc().resolve().parent.parent / "lib64", Path("/usr/local/cuda/lib64")]
    for folder in folders:
        if (folder / "libcudart.so.13").is_file():
            return folder / "libcudart.so.13"
    raise LowerError(
        Diagnostic(
            "cuda.cudart",
            "libcudart.so.13, which TVM's CUDA runtime is linked to, was not found",
            notes=tuple(f"looked in {folder}" for folder in folders),
            help="install cuda-cudart of CUDA 13",
        )
    )


def load() -> None:
    """Let TVM find its CUDA part; call it before TVM is imported, in a process that runs no kernels.

    Without a driver a stand-in takes its name, so that TVM embeds what we compile instead of source.

    Raises:
        LowerError: the C++ compiler does not work.
    """
    try:
        ctypes.CDLL("libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
    except OSError:
        with tempfile.TemporaryDirectory(prefix="netlathe-") as name:
            source, library = Path(name) / "driver.c", Path(name) / "libcuda.so.1"
            source.write_text(
                "".join(f"int {f}(void) {{ return {_NO_DEVICE}; }}\n" for f in _DRIVER_FUNCTIONS)
            )
            command = [toolchain.compiler(), "-x", "c", "-shared", "-fPIC"]
            command += ["-Wl,-soname,libcuda.so.1", "-o", str(library), str(source)]
            toolchain.run(command)
            ctypes.CDLL(os.fspath(library), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(os.fspath(cudart()), mode=ctypes.RTLD_GLOBAL)


def compile_fatbin(source: str, archs: Sequence[str]) -> tuple[bytes, tuple[Resources, ...]]:
    """Machine code of ``source`` for every architecture, and what each kernel takes.

    Raises:
        LowerError: nvcc refused it.
    """
    with tempfile.TemporaryDirectory(prefix="netlathe-") as name:
        folder = Path(name)
        (folder / "kernels.cu").write_text(source)
        command = [os.fspath(nvcc()), "-fatbin", "-O3", "-std=c++17", "-diag-suppress=177"]
        command += ["--threads", "0", "--resource-usage", "-o", "kernels.fatbin", "kernels.cu"]
        for arch in archs:
            command += ["-gencode", f"arch={arch.replace('sm', 'compute')},code={arch}"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.splitlines()[:_SHOWN] or [
                f"nothing; is there room in {folder.parent}?"
            ]
            raise LowerError(
                Diagnostic(
                    "cuda.nvcc",
                    f"nvcc failed (exit code {done.returncode})",
                    notes=tuple(f"it printed: {line}" for line in said),
                    help="report this with the model; target onnx does not use CUDA",
                )
            )
        binary = (folder / "kernels.fatbin").read_bytes()
    return binary, _resources(done.stdout + done.stderr)


def _resources(text: str) -> tuple[Resources, ...]:
    pattern = re.compile(
        r"Compiling entry function '(\w+)' for '(\w+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers([^\n]*)",
        re.DOTALL,
    )
    found = []
    for kernel, arch, stack, stores, loads, registers, rest in pattern.findall(text):
        shared = re.search(r"(\d+) bytes smem", rest)
        found.append(
            Resources(
                kernel,
                arch,
                int(registers),
                int(shared[1]) if shared else 0,
                int(stack),
                int(stores) + int(loads),
            )
        )
    return tuple(found)
