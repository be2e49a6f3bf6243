"""Compiles and runs a model in this process, without linking: for tests of many small models."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import tvm
from tvm import relax

from netlathe.backends.tvm import build, packing
from netlathe.backends.tvm.lowering import Lowering
from netlathe.backends.tvm.machine import machine
from netlathe.backends.tvm.runtime import check_feeds, restored
from netlathe.pipeline.pass_ import Feeds


class InProcess:
    """A model lowered, compiled and held in memory."""

    def __init__(self, model: ir.Model, level: str = "native") -> None:
        chosen = machine(level)
        lowered = Lowering(model, chosen).run()
        constants = packing.constants(model)
        made = [parameter.recipe.make(constants) for parameter in lowered.parameters]
        self._outputs = packing.records(model.graph.outputs)
        self._inputs = packing.records(v for v in model.graph.inputs if not v.is_initializer())
        self._parameters = [tvm.runtime.tensor(array) for array in made]
        virtual: Any = relax.VirtualMachine  # its annotation names another Device
        self._main = virtual(build.executable(lowered, chosen), tvm.cpu())["main"]

    def run(self, feeds: Feeds) -> dict[str, npt.NDArray[Any]]:
        """Outputs by name."""
        arrays = check_feeds(self._inputs, feeds)
        given = [tvm.runtime.tensor(np.require(array, requirements="C")) for array in arrays]
        results = self._main(*given, *self._parameters)
        return {
            record["name"]: restored(result.numpy(), record["dtype"])
            for record, result in zip(self._outputs, results, strict=True)
        }
