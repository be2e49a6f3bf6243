"""Whether what is built for can hold a scheme, asked of a small model before any work is done."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import onnx_ir as ir

from netlathe.diagnostics import Diagnostic
from netlathe.ir import edit, types
from netlathe.passes.quantize.scheme import Scheme
from netlathe.pipeline import registry
from netlathe.pipeline.interfaces import Target

_OUTPUTS = 256  # any group size there is divides them


def problems(
    target: Target, schemes: Iterable[Scheme], quantize: Callable[[ir.Model, Scheme], None]
) -> list[Diagnostic]:
    """What the target lacks for each scheme; ``quantize`` puts one into a model."""
    backend, target = registry.find_target(target.name, **target.settings)
    found = []
    for scheme in dict.fromkeys(schemes):
        plain, model = _product(scheme), _product(scheme)
        quantize(model, scheme)
        types.annotate(model)
        gaps = {gap.message: gap for gap in backend.unsupported(model, target)}
        before = {gap.message for gap in backend.unsupported(plain, target)} if gaps else set()
        for message, gap in gaps.items():
            if message not in before:
                text = f"the target {target.name} cannot hold {scheme}: {message}"
                found.append(Diagnostic("quantize.target", text, help=gap.help))
    return found


def _product(scheme: Scheme) -> ir.Model:
    """y = x w, with as many columns of w as a group needs."""
    size = max(scheme.group, 32)
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 25}, name="product")
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["b", size]))
    graph.inputs.append(x)
    numbers = np.linspace(-1, 1, size * _OUTPUTS, dtype=np.float32).reshape(size, _OUTPUTS)
    node = edit.node("MatMul", [x, edit.constant(graph, numbers, "w")], {}, name="y")
    graph.append(node)
    graph.outputs.append(node.outputs[0])
    model = ir.Model(graph, ir_version=13)
    types.annotate(model)
    return model
