"""Whole models on every core under qemu: MiniLM, MobileNetV2, LLaMA; float32, int8 and int4.

Floats are compared with ONNX Runtime on the IR without optimizations, int8 with x86, bit for bit.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("tvm", reason="the tvm extra is not installed")

from netlathe.backends.tvm.arm.artifact import BareArtifact
from netlathe.backends.tvm.arm.cores import CORES
from netlathe.execute import ort
from netlathe.execute.compare import relative_error
from netlathe.ir import normal
from netlathe.passes.fold_batch_norm import FoldBatchNorm
from netlathe.passes.quantize import Quantize
from netlathe.pipeline.pass_ import Context, Feeds
from tests import zoo_ir
from tests.backends.tvm.in_process import InProcess
from tests.backends.tvm_arm.arm import need_emulator

BOUND = 1e-4  # the project's, of the RMS
MODELS = ("minilm", "mobilenet_v2", "llama")
PRECISIONS = {
    "float32": None,
    "int8": Quantize(activations="int8", min_size=0),
    "int4": Quantize(weights="int4", group_size=32, min_size=0),
}


@lru_cache(maxsize=2)
def model_at(name: str, precision: str) -> tuple[ir.Model, Feeds]:
    """The model with all sizes given, and inputs of these sizes."""
    model = zoo_ir.captured(name)
    names = [value.name or "" for value in model.graph.inputs if not value.is_initializer()]
    fed = [{key: feeds[key] for key in names} for feeds in zoo_ir.feeds(name)]
    FoldBatchNorm().run(model, Context())
    normal.normalize(model)
    pass_ = PRECISIONS[precision]
    if pass_ is not None:
        pass_.run(model, Context(calibration=fed))
        normal.normalize(model)
    for value in model.graph.inputs:
        if not value.is_initializer():
            value.shape = ir.Shape(np.shape(fed[0][value.name or ""]))
    normal.normalize(model)
    return model, fed[0]


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
    model, feeds = model_at(name, precision)
    actual = BareArtifact(model, CORES[core], "model").run(feeds)
    if precision == "int8":  # kernels sum in the same order everywhere
        for output, array in InProcess(model).run(feeds).items():
            assert np.array_equal(actual[output], array), output
        return
    for output, array in ort.run(model, feeds).items():
        assert relative_error(actual[output], array) < BOUND, output
