"""Whole models on every core under qemu: MiniLM, MobileNetV2, LLaMA; float32, int8 and int4.

Floats are compared with ONNX Runtime on the IR without optimizations, int8 with x86, bit for bit.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("tvm", reason="the tvm extra is not installed")

from netlathe.backends.tvm.arm.artifact import BareArtifact
from netlathe.backends.tvm.arm.cores import CORES
from netlathe.execute import ort
from netlathe.execute.compare import relative_error
from netlathe.ir import normal
from netlathe.pipeline.pass_ import Feeds
from tests.backends.tvm.in_process import InProcess
from tests.backends.tvm_arm.arm import need_emulator
from tests.backends.tvm_arm.models import BOUND, MODELS, PRECISIONS, model_at


def sized(name: str, precision: str) -> tuple[ir.Model, Feeds]:
    """The model with all sizes given, and inputs of these sizes."""
    model, (feeds, *_) = model_at(name, precision)
    model = model.clone()
    for value in model.graph.inputs:
        if not value.is_initializer():
            value.shape = ir.Shape(np.shape(feeds[value.name or ""]))
    normal.normalize(model)
    return model, feeds


QUICK = {("llama", "int8", "neoverse-v1")}


@pytest.mark.parametrize(
    ("name", "precision", "core"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
        for case in [(n, p, c) for n in MODELS for p in PRECISIONS for c in CORES]
    ],
)
def test_agrees(name: str, precision: str, core: str) -> None:
    need_emulator()
    model, feeds = sized(name, precision)
    actual = BareArtifact(model, CORES[core], "model").run(feeds)
    if precision == "int8":  # kernels sum in the same order everywhere
        for output, array in InProcess(model).run(feeds).items():
            assert np.array_equal(actual[output], array), output
        return
    for output, array in ort.run(model, feeds).items():
        assert relative_error(actual[output], array) < BOUND, output
