"""What the tests of raising share: graphs written as text, run before and after."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import onnx.parser
import onnx_ir as ir
import onnxruntime

from netlathe.ir import normal
from netlathe.passes.normalize import raise_operators
from netlathe.pipeline.ledger import Entry

SIZES = ({"b": 2, "s": 5, "t": 7}, {"b": 3, "s": 4, "t": 6})


def graph(inputs: str, body: str, *, dtype: str = "float", **constants: Any) -> ir.Model:
    """A model with one output ``y`` of ``dtype``, in normal form. Dims ``b``, ``s``, ``t`` are dynamic.

    ``constants`` become initializers; numbers are float32 scalars, lists of ints int64.
    """
    text = f'<ir_version: 10, opset_import: ["": 25]> g ({inputs}) => ({dtype} y) {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    for name, value in constants.items():
        array = value if isinstance(value, np.ndarray) else np.array(value)
        if not isinstance(value, np.ndarray):
            array = array.astype(np.int64 if isinstance(value, list) else np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    proto.graph.output[0].type.tensor_type.ClearField("shape")  # `float y` says it is a scalar
    model = ir.from_proto(proto)
    normal.normalize(model)
    return model


def raised(model: ir.Model, tolerance: float = 1e-5) -> tuple[ir.Model, list[Entry]]:
    """A raised and normalized copy, with the ledger; the outputs are compared at two sizes."""
    after = ir.from_proto(ir.to_proto(model))
    normal.normalize(after)
    entries = raise_operators(after)
    normal.normalize(after)
    assert_same(model, after, tolerance)
    return after, entries


def ops(model: ir.Model) -> Counter[str]:
    """How often every op occurs."""
    return Counter(node.op_type for node in model.graph)


def node(model: ir.Model, op_type: str) -> ir.Node:
    """The only node of a type."""
    (found,) = [n for n in model.graph if n.op_type == op_type]
    return found


def refusals(entries: list[Entry]) -> str:
    """All reasons of refusal, one a line; fails where something was applied."""
    assert not [e for e in entries if e.status == "applied"], entries
    return "\n".join(e.reason for e in entries)


def run(model: ir.Model, feeds: Mapping[str, np.ndarray], opset: int = 25) -> list[np.ndarray]:
    """Outputs by ONNX Runtime with optimizations off.

    Opset 25 expands Attention by its definition in the standard, 24 takes ONNX Runtime's kernel (which
    wants more of a mask); ONNX Runtime 1.32 runs Swish at 24 only.
    """
    proto = ir.to_proto(model)
    proto.opset_import[0].version = opset
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    wanted = {i.name for i in session.get_inputs()}
    results: list[Any] = list(session.run(None, {k: v for k, v in feeds.items() if k in wanted}))
    return results


def feeds(model: ir.Model, sizes: Mapping[str, int], seed: int) -> dict[str, np.ndarray]:
    """Random data for every input."""
    rng = np.random.default_rng(seed)
    made = {}
    for value in model.graph.inputs:
        assert value.shape is not None and value.dtype is not None and value.name is not None
        shape = [sizes[str(d)] if isinstance(d, ir.SymbolicDim) else d for d in value.shape]
        if value.dtype == ir.DataType.BOOL:
            array = rng.random(shape) < 0.7
            array[..., 0] = True  # every query keeps a key
        elif value.dtype == ir.DataType.INT64:
            array = rng.integers(0, 4, shape)
        else:
            array = rng.standard_normal(shape).astype(value.dtype.numpy())
        made[value.name] = array
    return made


def assert_same(before: ir.Model, after: ir.Model, tolerance: float = 1e-5) -> None:
    """Outputs are equal within ``tolerance`` of their RMS, at two sizes, under the same names."""
    assert [v.name for v in before.graph.outputs] == [v.name for v in after.graph.outputs]
    for seed, sizes in enumerate(SIZES):
        fed = feeds(before, sizes, seed)
        expected = run(before, fed)
        for opset in (24,) if "Swish" in ops(after) else (24, 25):
            for x, y in zip(expected, run(after, fed, opset), strict=True):
                assert_close(y, x, tolerance)


def assert_close(actual: np.ndarray, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    """max|actual - expected| is at most ``tolerance`` of the RMS of ``expected``."""
    assert actual.shape == expected.shape
    rms = np.sqrt(np.mean(expected.astype(np.float64) ** 2))
    assert np.abs(actual.astype(np.float64) - expected).max() <= tolerance * rms
