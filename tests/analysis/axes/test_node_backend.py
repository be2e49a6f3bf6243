"""The ONNX project's own node tests: whatever a node looks like, what may be permuted comes out permuted.

Among them are the definitions of attention, rotary embeddings and normalizations in terms of primitive
operators, with constants, dead ends and empty tensors that no model of ours has.
"""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.numpy_helper
import onnx_ir as ir
import pytest
from onnx.backend.test.case.test_case import TestCase
from onnx.backend.test.loader import load_model_tests

from netlathe.analysis.axes import Axes, Selection, analyse, edits
from netlathe.execute import compare, ort
from netlathe.frontends.onnx_opset import NEWEST, OLDEST, raise_opset
from netlathe.ir import normal, types, verify

Array = npt.NDArray[Any]
# Of equal values the first (or last) is taken: a tie is broken by order.
TIED = (
    "test_argmax_keepdims_example_select_last_index",
    "test_argmax_negative_axis_keepdims_example",
    "test_argmax_no_keepdims_example",
    "test_argmin_keepdims_example_select_last_index",
    "test_argmin_no_keepdims_example_select_last_index",
    "test_top_k_same_values",
)
TOLERANCE = 1e-4  # float32 functions of a few dozen roundings; float16 is left out


def _model(case: TestCase) -> ir.Model | None:
    """The normal form with the test's data in the place of its inputs; None where data are no tensors."""
    assert case.model is not None and case.data_sets is not None
    proto = onnx.ModelProto.FromString(case.model.SerializeToString())
    version = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 0)
    if not OLDEST <= version <= NEWEST or not proto.graph.input:
        return None
    arrays = []
    for value, data in zip(list(proto.graph.input), case.data_sets[0][0], strict=True):
        element = value.type.tensor_type.elem_type
        if not value.type.HasField("tensor_type") or element == onnx.TensorProto.STRING:
            return None
        if isinstance(data, onnx.TensorProto):
            data = onnx.numpy_helper.to_array(data)
        array = np.asarray(data)
        if array.dtype.kind not in "fiub" or array.dtype == np.float16:
            return None
        arrays.append(array)
        if len(arrays) > 1:  # as in a model, where one value flows and the others are operands
            proto.graph.initializer.append(onnx.numpy_helper.from_array(array, value.name))
            proto.graph.input.remove(value)
    model = ir.from_proto(proto)
    raise_opset(model)
    normal.normalize(model)
    (first,) = model.graph.inputs
    model.graph.inputs.clear()
    first.const_value = ir.tensor(arrays[0], name=first.name)
    model.graph.register_initializer(first)
    types.annotate(model)
    return model


def _permuted(axes: Axes, rng: np.random.Generator) -> Selection | None:
    order = {g: rng.permutation(g.size) for g in axes.groups if g.allows("permute") and g.size > 1}
    if not order:
        return None
    edits.permute(axes, {group: list(at) for group, at in order.items()})
    return Selection({group.atom: at for group, at in order.items()})


@pytest.mark.slow
def test_what_may_be_permuted_comes_out_permuted() -> None:
    with warnings.catch_warnings():  # numpy, while onnx computes the expected overflows
        warnings.simplefilter("ignore", RuntimeWarning)
        cases = load_model_tests(kind="node")
    rng = np.random.default_rng(0)
    done: Counter[str] = Counter()
    wrong = []
    for case in cases:
        model = _model(case)
        if model is None:
            done["no data"] += 1
            continue
        try:
            expected = ort.run(model, {})
        except ort.RuntimeFailure:
            done["not run by ONNX Runtime"] += 1
            continue
        edited = model.clone()
        axes = analyse(edited, boundary=False)
        selection = _permuted(axes, rng)
        if selection is None:
            done["nothing to permute"] += 1
            continue
        verify.check(edited)
        actual = ort.run(edited, {})
        done["permuted"] += 1
        if not _same(axes, selection, expected, actual):
            wrong.append(case.name)
    assert [name for name in wrong if not name.startswith(TIED)] == []
    assert done["permuted"] > 900, done


def _same(axes: Axes, selection: Selection, expected: Any, actual: Any) -> bool:
    for value in axes.model.graph.outputs:
        name, wanted = value.name or "", expected[value.name or ""]
        for dim, axis in enumerate(axes.related.axes.get(value, ())):
            if (at := selection.of(axis)) is not None:
                wanted = np.take(wanted, at, axis=dim)
        if value in axes.related.positions:
            at = selection.of(axes.related.positions[value])
            wanted = wanted if at is None else np.argsort(at)[wanted]
        if not compare.relative_error(actual[name], wanted) <= TOLERANCE:
            return False
    return True
