"""The ONNX project's own node tests, lowered, compiled and run by the TVM backend.

The scope is that of the executor's tests. What fails stands in node_tests_excluded.toml with its
reason, and must go on failing to stay there.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.backend.test.case.test_case import TestCase

from netlathe.frontends import onnx_opset
from netlathe.ir import normal, types
from tests.execute.test_node_backend import CASES, _array

pytest.importorskip("tvm", reason="the tvm extra is not installed")

from tests.backends.tvm.in_process import InProcess

STATED = tomllib.loads((Path(__file__).parent / "node_tests_excluded.toml").read_text())
EXCLUDED: dict[str, str] = STATED["excluded"]
QUICK = 24  # of every so many tests that pass, one is quick


def _parameters() -> list[Any]:
    parameters = []
    for number, case in enumerate(CASES):
        marks = [] if number % QUICK == 0 else [pytest.mark.slow]
        if case.name in EXCLUDED:
            marks.append(pytest.mark.xfail(strict=True, reason=EXCLUDED[case.name]))
        parameters.append(pytest.param(case, id=case.name, marks=marks))
    return parameters


def _prepared(model: ir.Model) -> ir.Model:
    """The model in normal form at the IR's opset; newer ones, which have no normal form, typed only."""
    version = model.opset_imports.get("", 0)
    if onnx_opset.OLDEST <= version <= onnx_opset.NEWEST:
        onnx_opset.raise_opset(model)
    if version <= onnx_opset.NEWEST:
        normal.normalize(model)
    else:
        types.annotate(model)
    return model


@pytest.mark.parametrize("case", _parameters())
def test_node(case: TestCase) -> None:
    assert case.model is not None and case.data_sets is not None
    model = _prepared(ir.serde.deserialize_model(case.model))
    artifact = InProcess(model)
    for inputs, expected in case.data_sets:
        names = [value.name or "" for value in model.graph.inputs]
        results = artifact.run(dict(zip(names, map(_array, inputs), strict=True)))
        for value, wanted in zip(model.graph.outputs, map(_array, expected), strict=True):
            actual = results[value.name or ""]
            assert actual.dtype == wanted.dtype
            assert actual.shape == wanted.shape
            if actual.dtype.kind not in "biufc":  # numpy compares its own types only
                actual, wanted = actual.astype(np.float32), wanted.astype(np.float32)
            np.testing.assert_allclose(actual, wanted, rtol=case.rtol, atol=case.atol)


@pytest.mark.skipif(
    onnx.__version__ != STATED["onnx"], reason=f"the counts are those of onnx {STATED['onnx']}"
)
class TestTheList:
    """The exclusion file tells the truth about the suite."""

    def test_every_excluded_test_is_in_scope(self) -> None:
        assert EXCLUDED.keys() <= {case.name for case in CASES}

    def test_at_least_92_percent_pass(self) -> None:
        assert len(CASES) - len(EXCLUDED) >= 0.92 * len(CASES)
