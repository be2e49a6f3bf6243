"""The ONNX project's own node tests, lowered, compiled and run by the TVM backend.

The scope is that of the executor's tests. What fails stands in node_tests_excluded.toml: what is refused with
the words of the refusal, what differs with the tolerance that it keeps. Both must go on to stay there.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.backend.test.case.test_case import TestCase

from netlathe.backends.tvm.machine import machine
from netlathe.diagnostics import InputError, LowerError
from netlathe.frontends import onnx_opset
from netlathe.ir import normal, types
from tests.execute.test_node_backend import CASES, _array

pytest.importorskip("tvm", reason="the tvm extra is not installed")

from netlathe.backends.tvm.lowering import Lowering
from tests.backends.tvm.in_process import InProcess

STATED = tomllib.loads((Path(__file__).parent / "node_tests_excluded.toml").read_text())
REFUSED: Mapping[str, str] = STATED["refused"]
DIFFERS: Mapping[str, Mapping[str, Any]] = STATED["differs"]
EXCLUDED = REFUSED.keys() | DIFFERS.keys()
QUICK, QUICK_REFUSALS = 24, 4  # one of every so many is quick
# Not among the 1,789 tests of the project's plan, which counts those of the default domain, and takes
# ReverseSequence for an operator on sequences.
BEYOND_THE_PLAN = re.compile(r"test_(ai_onnx_ml|image_decoder|reversesequence)_")


def _parameters(refused: bool) -> list[Any]:
    chosen = [case for case in CASES if (case.name in REFUSED) == refused]
    every = QUICK_REFUSALS if refused else QUICK
    return [
        pytest.param(case, id=case.name, marks=[] if at % every == 0 else [pytest.mark.slow])
        for at, case in enumerate(chosen)
    ]


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


def _results(case: TestCase) -> Iterator[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """Every output of every data set, and what the test expects; half types as float32."""
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
            yield actual, wanted


@pytest.mark.parametrize("case", _parameters(refused=False))
def test_node(case: TestCase) -> None:
    stated = DIFFERS.get(case.name)
    agrees = True
    for actual, wanted in _results(case):
        if stated is not None:
            agrees &= np.allclose(actual, wanted, case.rtol, case.atol, equal_nan=True)
        rtol, atol = (stated["rtol"], stated["atol"]) if stated else (case.rtol, case.atol)
        np.testing.assert_allclose(actual, wanted, rtol=rtol, atol=atol)
    if stated is not None:
        assert not agrees, "it passes: take it off the list"


@pytest.mark.parametrize("case", _parameters(refused=True))
def test_refused_by_name(case: TestCase) -> None:
    assert case.model is not None
    model = ir.serde.deserialize_model(case.model)
    with pytest.raises((LowerError, InputError)) as caught:
        Lowering(_prepared(model), machine("avx2")).run()
    assert caught.value.diagnostics[0].message == REFUSED[case.name]


@pytest.mark.skipif(
    onnx.__version__ != STATED["onnx"], reason=f"the counts are those of onnx {STATED['onnx']}"
)
class TestTheList:
    """The exclusion file tells the truth about the suite."""

    def test_every_test_on_it_is_in_scope_and_on_it_once(self) -> None:
        assert EXCLUDED <= {case.name for case in CASES}
        assert not REFUSED.keys() & DIFFERS.keys()

    def test_counts(self) -> None:
        """As docs/tvm.md states them."""
        names = {case.name for case in CASES}
        planned = {name for name in names if BEYOND_THE_PLAN.match(name) is None}
        assert (len(names), len(names - EXCLUDED)) == tuple(STATED["all"])
        assert (len(planned), len(planned - EXCLUDED)) == tuple(STATED["planned"])
        assert len(planned - EXCLUDED) >= 0.92 * len(planned)
