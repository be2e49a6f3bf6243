"""Derived types against the ONNX project's own node tests: their data is an oracle we did not write.

Every test runs three times: with inputs as they are; with every input as a constant, so that contents
decide shapes; with a symbol of its own for every input dim, whose expressions must come out right when
the actual sizes are put in. Then single dims of the inputs are changed and ONNX Runtime is asked: what
it computes must have the derived shape, what it refuses may have been refused by us.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, Literal

import numpy as np
import onnx
import onnx.numpy_helper
import onnx_ir as ir
import onnxruntime
import pytest
import sympy
from onnx.backend.test.case.test_case import TestCase
from onnx.backend.test.loader import load_model_tests

from netlathe.frontends.onnx_opset import NEWEST, OLDEST, raise_opset
from netlathe.ir import dims, types
from netlathe.ir.shapes import RULES

Mode = Literal["inputs", "constants", "symbols"]

# Operators whose outputs have no derived type: not tensors, or of no concern to a compiled model.
_NO_RULE = {
    *("ConcatFromSequence", "SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceErase"),
    *("SequenceInsert", "SequenceLength", "SequenceMap", "SplitToSequence"),
    *("Optional", "OptionalGetElement", "OptionalHasElement"),
    *("Scatter", "Upsample"),  # gone from opset 25
}
# Where only the data, or the rank of a constant that became symbolic, decides the shape.
_DATA_DECIDES = {
    *("Compress", "ImageDecoder", "Loop", "NonMaxSuppression", "NonZero", "Range", "Resize"),
    *("StringNormalizer", "StringSplit", "Unique", "Scan"),
}


@cache
def cases() -> list[TestCase]:
    """All node tests that the installed onnx makes."""
    with warnings.catch_warnings():  # numpy, while onnx computes the expected overflows
        warnings.simplefilter("ignore", RuntimeWarning)
        return load_model_tests(kind="node")


def array(data: Any) -> Any:
    """A tensor as numpy array; what is no tensor as it is."""
    if isinstance(data, onnx.TensorProto):
        return onnx.numpy_helper.to_array(data)
    return np.asarray(data) if isinstance(data, np.generic) else data


REFUSED = {"test_scan_sum"}  # Scan of opset 8 has no equal in 25


def _opset(case: TestCase) -> int:
    assert case.model is not None
    return next((o.version for o in case.model.opset_import if not o.domain), NEWEST)


def _load(case: TestCase, mode: Mode) -> tuple[ir.Model, dict[sympy.Symbol, int]] | None:
    """The model at opset 25 or later, and the sizes of its symbols; None where it is not read."""
    assert case.model is not None and case.data_sets is not None
    if _opset(case) < OLDEST or case.name in REFUSED:
        return None
    model = ir.from_proto(case.model)
    if _opset(case) < NEWEST:
        raise_opset(model)
    sizes: dict[sympy.Symbol, int] = {}
    for value, data in zip(list(model.graph.inputs), case.data_sets[0][0], strict=True):
        found = array(data)
        if not isinstance(value.type, ir.TensorType) or not isinstance(found, np.ndarray):
            continue
        shape_like = found.dtype.kind in "iub" and found.size <= 64 and found.ndim <= 1
        if value.dtype != ir.DataType.STRING and (
            mode == "constants" or (mode == "symbols" and shape_like)
        ):
            _make_constant(model, value, found)
        elif mode == "symbols":
            names = [f"{value.name}_{axis}" for axis in range(found.ndim)]
            value.shape = ir.Shape(names)
            symbols = map(dims.symbol, names)
            sizes.update(zip(symbols, map(int, found.shape), strict=True))
        else:
            value.shape = ir.Shape(found.shape)
    return model, sizes


def _make_constant(model: ir.Model, value: ir.Value, data: np.ndarray[Any, Any]) -> None:
    value.const_value = ir.Tensor(data, dtype=value.dtype, name=value.name)
    model.graph.inputs.remove(value)
    model.graph.initializers[value.name or ""] = value


@pytest.mark.parametrize("mode", ["inputs", "constants", "symbols"])
def test_types_are_those_of_the_data(mode: Mode) -> None:
    wrong: list[str] = []
    fresh: Counter[str] = Counter()
    compared = 0
    for case in cases():
        loaded = _load(case, mode)
        if loaded is None:
            continue
        model, sizes = loaded
        found = types.infer(model)
        wrong += [f"{case.name}: {problem.message}" for problem in found.problems]
        assert case.model is not None and case.data_sets is not None
        declared = case.model.graph.output
        for output, value, data in zip(
            model.graph.outputs, declared, map(array, case.data_sets[0][1]), strict=True
        ):
            if not isinstance(data, np.ndarray):
                continue
            type_ = found.type(output)
            if type_.dtype is None or type_.shape is None:
                if not _may_be_untyped(model, mode):
                    wrong.append(f"{case.name}: {output.name} is untyped")
                continue
            if type_.dtype != value.type.tensor_type.elem_type:
                wrong.append(f"{case.name}: {type_.dtype} is not the declared dtype")
            evaluated = _evaluated(type_.shape, sizes)
            if _contradicts(evaluated, data.shape):
                wrong.append(f"{case.name}: derived {dims.show(type_.shape)}, is {data.shape}")
            if None in evaluated:
                fresh.update(node.op_type for node in model.graph)
            compared += 1
    assert not wrong, "\n".join(wrong)
    assert compared > 2100  # of about 2,300 outputs
    if mode == "constants":
        # With all contents known, only these operators have dims that nothing tells in advance.
        single = {name for name in fresh if name in RULES} & _single_op_names(fresh)
        assert single <= _DATA_DECIDES, single - _DATA_DECIDES


def _single_op_names(fresh: Mapping[str, int]) -> set[str]:
    """Those of the operators that are the whole model of some node test with a fresh dim."""
    names: set[str] = set()
    for case in cases():
        assert case.model is not None
        if len(case.model.graph.node) == 1 and case.model.graph.node[0].op_type in fresh:
            loaded = _load(case, "constants")
            if loaded is None:
                continue
            found = types.infer(loaded[0])
            shapes = [found.type(value).shape for value in loaded[0].graph.outputs]
            if any(not isinstance(dim, int) for shape in shapes for dim in shape or ()):
                names.add(case.model.graph.node[0].op_type)
    return names


def _may_be_untyped(model: ir.Model, mode: Mode) -> bool:
    nodes = list(model.graph.all_nodes())
    if any(node.domain != "" or node.op_type in _NO_RULE for node in nodes):
        return True
    # A symbol for the length of an index leaves the rank of what it selects open.
    return mode == "symbols" and {node.op_type for node in nodes} == {"GatherND"}


def _evaluated(shape: dims.Shape, sizes: Mapping[sympy.Symbol, int]) -> list[int | None]:
    """The shape for these sizes; None where a dim depends on the data."""
    found: list[int | None] = []
    for dim in shape:
        if isinstance(dim, int) or dim is None:
            found.append(dim)
            continue
        size = dim.subs(list(sizes.items()))
        found.append(None if size.free_symbols else int(size))
    return found


def _contradicts(evaluated: list[int | None], actual: tuple[int, ...]) -> bool:
    return len(evaluated) != len(actual) or any(
        a is not None and a != b for a, b in zip(evaluated, actual, strict=True)
    )


# -- perturbed inputs, judged by ONNX Runtime -------------------------------------------------------

# Where ONNX Runtime computes something although the standard forbids the arguments.
_LAX: Mapping[str, str] = {
    "Attention": "with a window it runs the standard's expansion, which broadcasts",
    "CenterCropPad": "surplus axes are ignored",
    "GatherND": "batch dims are not compared",
    "RotaryEmbedding": "an odd last position is left as it is",
    "SoftmaxCrossEntropyLoss": "surplus class weights are ignored",
}


def _perturbed(case: TestCase) -> Iterator[list[np.ndarray[Any, Any]]]:
    """The inputs with one dim of one of them longer or shorter by one."""
    assert case.data_sets is not None
    inputs = [array(data) for data in case.data_sets[0][0]]
    if not all(isinstance(x, np.ndarray) and x.dtype.kind in "fiub" for x in inputs):
        return
    for index, data in enumerate(inputs):
        for axis in range(data.ndim if data.size else 0):
            for size in (data.shape[axis] - 1, data.shape[axis] + 1):
                if size > 0:
                    changed = np.take(data, range(size), axis=axis, mode="wrap")
                    yield [*inputs[:index], changed, *inputs[index + 1 :]]


def _judge(proto: onnx.ModelProto, feeds: Mapping[str, Any]) -> list[Any] | None:
    """What ONNX Runtime computes; None where it refuses or has no kernel."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(
            proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        results: list[Any] = list(session.run(None, dict(feeds)))
    except Exception:  # its errors share no base class; a refusal is an answer
        return None
    return results


@pytest.mark.parametrize(
    "part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, 5))]
)
def test_perturbed_inputs(part: int) -> None:
    wrong: list[str] = []
    ran = refused = missed = 0
    for case in cases()[part::5]:
        assert case.model is not None
        if not OLDEST <= _opset(case) <= NEWEST or case.name.endswith("_expanded"):
            continue
        for arrays in _perturbed(case):
            proto = onnx.ModelProto.FromString(case.model.SerializeToString())
            for value, data in zip(proto.graph.input, arrays, strict=True):
                value.type.tensor_type.shape.Clear()
                for size in data.shape:
                    value.type.tensor_type.shape.dim.add().dim_value = size
            for value in proto.graph.output:
                value.type.tensor_type.ClearField("shape")
            names = [value.name for value in proto.graph.input]
            results = _judge(proto, dict(zip(names, arrays, strict=True)))
            model = ir.from_proto(proto)
            if _opset(case) < NEWEST:
                raise_opset(model)
            for value, data in zip(list(model.graph.inputs), arrays, strict=True):
                if data.dtype.kind in "ib" and data.size <= 64 and data.ndim <= 1:
                    _make_constant(model, value, data)
            found = types.infer(model)
            if results is None:
                refused += bool(found.problems)
                missed += not found.problems
                continue
            ran += 1
            if found.problems:
                if found.problems[0].node.op_type not in _LAX:
                    wrong.append(f"{case.name} {names}: false alarm {found.problems[0].message}")
                continue
            for output, data in zip(model.graph.outputs, results, strict=True):
                shape = found.type(output).shape
                if shape is None or not isinstance(data, np.ndarray):
                    continue
                if _contradicts(_evaluated(shape, {}), data.shape):
                    wrong.append(f"{case.name}: derived {dims.show(shape)}, is {data.shape}")
    assert not wrong, "\n".join(wrong)
    assert ran > 500
    # What is left is decided by data (an index out of range) or is a kernel that does not exist.
    assert refused > 10 * missed
