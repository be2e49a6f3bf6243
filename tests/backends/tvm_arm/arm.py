"""What tests of ARM code share: models from text, programs in qemu, and what is said where there is none."""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import lru_cache
from typing import Any

import numpy.typing as npt
import onnx_ir as ir
import pytest

from netlathe.backends.tvm.arm import emulator
from netlathe.backends.tvm.arm.artifact import BareArtifact
from netlathe.backends.tvm.arm.cores import CORES
from tests.ir.onnx_text import normal_model

Array = npt.NDArray[Any]


@lru_cache(maxsize=1)
def _installed() -> str:
    """Empty once an emulator is there, else why there is none. Root on Debian gets it installed."""
    if emulator.command(CORES["neoverse-n1"]) is not None:
        return ""
    if shutil.which("apt-get") is None:
        return "qemu-aarch64 is not installed, and there is no apt-get"
    install = ["apt-get", "install", "-y", "--no-install-recommends", "qemu-user"]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    if done.returncode or emulator.command(CORES["neoverse-n1"]) is None:
        return f"qemu-user could not be installed: {done.stderr.strip()[-200:]}"
    return ""


def need_emulator() -> None:
    """Skip the test where nothing runs aarch64 programs, saying what stays unchecked."""
    if reason := _installed():
        pytest.skip(f"no number of this kernel or model was checked: {reason}")


def model_of(text: str, **constants: Array) -> ir.Model:
    """A model of opset 25 in normal form from ONNX text; ``constants`` become initializers."""
    return normal_model(f'<ir_version: 10, opset_import: ["" : 25]> {text}', **constants)


def kernels_of(artifact: BareArtifact) -> set[str]:
    """The schedules that its calls name."""
    return {
        re.sub(r"_\d+$", "", step.kernel.removeprefix(artifact.name + "_"))
        for step in artifact._program.steps
    }
