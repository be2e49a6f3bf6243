"""What the tests of the IR share: models from text, judged by ONNX Runtime without optimizations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import onnx_ir as ir

from netlathe.execute import compare, ort
from netlathe.ir import normal

SIZES = ({"b": 2, "s": 5}, {"b": 3, "s": 8})  # for the dynamic dims of a text model


def normal_model(text: str, **constants: Any) -> ir.Model:
    """A model in normal form from ONNX text; ``constants`` become initializers in place of inputs."""
    made = ir.from_onnx_text(text)
    for name, array in constants.items():
        value = next(v for v in made.graph.inputs if v.name == name)
        made.graph.inputs.remove(value)
        value.const_value = ir.tensor(array, name=name)
        made.graph.register_initializer(value)
    normal.normalize(made)
    return made


def model(inputs: str, outputs: str, body: str, **weights: Any) -> ir.Model:
    """A model of opset 25; ``weights`` become initializers (lists of ints int64, else float32)."""
    text = f'<ir_version: 10, opset_import: ["": 25]> g ({inputs}) => ({outputs}) {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    for name, value in weights.items():
        array = value if isinstance(value, np.ndarray) else np.array(value)
        if not isinstance(value, np.ndarray):
            array = array.astype(np.int64 if isinstance(value, list) else np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    for output in proto.graph.output:
        output.type.tensor_type.ClearField("shape")  # the text `float y` says it is a scalar
    return ir.from_proto(proto)


def matrix(*shape: int, seed: int = 0) -> np.ndarray:
    """Float32 standard normal numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def ops(graph_or_model: ir.Model | ir.Graph) -> Counter[str]:
    """How often every op occurs in the main graph."""
    graph = graph_or_model.graph if isinstance(graph_or_model, ir.Model) else graph_or_model
    return Counter(node.op_type for node in graph)


def node(made: ir.Model, op_type: str) -> ir.Node:
    """The only node of a type."""
    (found,) = [node for node in made.graph if node.op_type == op_type]
    return found


def ints(value: ir.Value | None) -> list[int]:
    """The elements of an integer constant."""
    assert value is not None and value.const_value is not None
    items: list[int] = value.const_value.numpy().tolist()
    return items


def copy(made: ir.Model) -> ir.Model:
    """An independent copy, as a file would give it."""
    return ir.from_proto(ir.to_proto(made))


def feeds(made: ir.Model, sizes: Mapping[str, int], seed: int = 0) -> dict[str, np.ndarray]:
    """Random data for every input."""
    rng = np.random.default_rng(seed)
    fed = {}
    for value in made.graph.inputs:
        assert value.shape is not None and value.dtype is not None and value.name is not None
        shape = [sizes[str(d)] if isinstance(d, ir.SymbolicDim) else d for d in value.shape]
        if value.dtype == ir.DataType.BOOL:
            fed[value.name] = np.asarray(rng.random(shape) < 0.5)
        elif value.dtype.is_integer():
            fed[value.name] = rng.integers(0, 4, shape).astype(value.dtype.numpy())
        else:
            fed[value.name] = rng.standard_normal(shape).astype(value.dtype.numpy())
    return fed


def assert_same(
    before: ir.Model,
    after: ir.Model,
    tolerance: float = 0.0,
    sizes: Sequence[Mapping[str, int]] = SIZES,
) -> None:
    """Same outputs, by name, at all sizes."""
    assert [v.name for v in before.graph.inputs] == [v.name for v in after.graph.inputs]
    assert [v.name for v in before.graph.outputs] == [v.name for v in after.graph.outputs]
    for seed, one in enumerate(sizes):
        fed = feeds(before, one, seed)
        expected, actual = ort.run(before, fed), ort.run(after, fed)
        for name in expected:
            error = compare.relative_error(actual[name], expected[name])
            assert error <= tolerance, f"{name} at {dict(one)}: {error}"
