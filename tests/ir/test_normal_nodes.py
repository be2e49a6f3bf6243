"""The ONNX project's own node tests, normalised: results stay what ONNX Runtime made before.

All run twice: as they are, and with every input but the first as an initializer, so that operands
are literals and weights. Where ONNX Runtime cannot run the original there is no judge.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnx_ir as ir
import pytest
from onnx.backend.test.case.test_case import TestCase
from onnx.backend.test.loader import load_model_tests

from netlathe.diagnostics import NetLatheError
from netlathe.execute import compare, ort
from netlathe.frontends.onnx_opset import NEWEST, OLDEST, raise_opset
from netlathe.ir import normal
from netlathe.ir.printing import show_model

_NOT_REPEATABLE = ("bernoulli", "dropout", "random", "multinomial", "training")
# Gemm as MatMul + Add rounds once more, in float16 too; all else is bit for bit the same.
_TOLERANCE = {"float16": 2.0**-8, "bfloat16": 2.0**-5}


@cache
def _cases() -> list[TestCase]:
    with warnings.catch_warnings():  # numpy, while onnx computes the expected overflows
        warnings.simplefilter("ignore", RuntimeWarning)
        return load_model_tests(kind="node")


def _load(case: TestCase, literal: bool) -> tuple[ir.Model, dict[str, np.ndarray]] | None:
    """The model and its feeds; None where an input is no numeric tensor or the opset is not read."""
    assert case.model is not None and case.data_sets is not None
    proto = onnx.ModelProto.FromString(case.model.SerializeToString())
    version = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 0)
    if not OLDEST <= version <= NEWEST or case.name == "test_scan_sum":  # Scan of opset 8
        return None
    feeds: dict[str, np.ndarray] = {}
    for number, (value, data) in enumerate(
        zip(list(proto.graph.input), case.data_sets[0][0], strict=True)
    ):
        element = value.type.tensor_type.elem_type
        if not value.type.HasField("tensor_type") or element == onnx.TensorProto.STRING:
            return None
        if isinstance(data, onnx.TensorProto):
            data = onnx.numpy_helper.to_array(data)
        array = np.asarray(data)
        if literal and number > 0:
            tensor = ir.Tensor(array, dtype=ir.DataType(element), name=value.name)
            proto.graph.initializer.append(ir.serde.serialize_tensor(tensor))
            proto.graph.input.remove(value)
        else:
            feeds[value.name] = array
    model = ir.from_proto(proto)
    raise_opset(model)
    return model, feeds


def _run(model: ir.Model, feeds: dict[str, np.ndarray]) -> dict[str, Any] | None:
    try:
        return dict(ort.run(model, feeds))
    except NetLatheError:
        return None


def _difference(case: TestCase, literal: bool) -> str | None:
    """What normalising changed; an empty text for nothing, None where nobody can judge."""
    original, loaded = _load(case, literal), _load(case, literal)
    if original is None or loaded is None or any(word in case.name for word in _NOT_REPEATABLE):
        return None
    expected = _run(*original)
    if expected is None:
        return None
    model, feeds = loaded
    normal.normalize(model)
    text = show_model(model)
    normal.normalize(model)
    if show_model(model) != text:
        return "a second call changes it"
    try:
        actual = ort.run(model, feeds)
    except NetLatheError as error:
        return error.diagnostics[0].message[:200]
    if list(actual) != list(expected):
        return f"outputs {list(actual)}"
    for name, value in expected.items():
        pairs = [(actual[name], value)]
        if isinstance(value, list):  # a sequence
            if len(actual[name]) != len(value):
                return f"{name} has {len(actual[name])} elements"
            pairs = list(zip(actual[name], value, strict=True))
        if not all(_same(np.asarray(a), np.asarray(e)) for a, e in pairs):
            return f"{name} differs"
    return ""


def _same(actual: np.ndarray, expected: np.ndarray) -> bool:
    if expected.dtype.kind in "OUS":
        return np.array_equal(actual, expected)
    tolerance = _TOLERANCE.get(expected.dtype.name, 2.0**-18)
    return compare.relative_error(actual, expected) <= tolerance


@pytest.mark.slow
@pytest.mark.parametrize("literal", [False, True], ids=["inputs", "literals"])
def test_every_node_test_stays_the_same_function(literal: bool) -> None:
    found = {case.name: _difference(case, literal) for case in _cases()}
    assert {name: text for name, text in found.items() if text} == {}
    assert sum(text is not None for text in found.values()) > 1000
