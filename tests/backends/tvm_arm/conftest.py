"""Programs are compiled in the process that tests, which has loaded TVM already, if nothing else is said."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import pytest

from netlathe.backends.tvm import process
from netlathe.backends.tvm.arm import cross
from netlathe.backends.tvm.machine import Machine
from netlathe.diagnostics import LowerError


@pytest.fixture(autouse=True)
def _compiler() -> None:
    try:
        cross.compiler()
    except LowerError as error:
        pytest.skip(f"nothing was compiled for ARM: {error.diagnostics[0].help}")


@pytest.fixture(autouse=True)
def _in_this_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("own_process") is not None:
        return

    def compiled(model: ir.Model, machine: Machine, prefix: str, *, only_plan: bool = False) -> Any:
        from netlathe.backends.tvm.arm import bare

        return bare.program(model, machine, prefix, only_plan=only_plan)

    monkeypatch.setattr(process, "bare", compiled)
