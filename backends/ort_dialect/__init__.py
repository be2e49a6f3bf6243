"""ONNX Runtime's own operators for quantized weights, in the place of what standard ONNX spells out.

    y = MatMul(x, DequantizeLinear(codes, scales))   ->   y = MatMulNBits(x, packed, scales)
    y = Gather(DequantizeLinear(codes, scales), i)   ->   y = GatherBlockQuantized(packed, i, scales)

Both read the codes as they are stored, 2, 4 or 8 bits each. The numbers stay what they were; how x is
rounded is the product's ``accuracy_level``. What has no such form stays standard ONNX, and
:class:`Written` says why. Activations of 8 bits stay standard too, as uint8: these are what its optimizer
turns into integer kernels (`pairs`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from netlathe.ir import edit

from . import lookups, pairs, products, stored

DOMAIN = "com.microsoft"
ACCURACY_LEVELS = (0, 1, 4)  # as the operator's schema numbers them: unset, float32, int8


@dataclass
class Written:
    """How many operators of each kind were written, and the weights that stayed as they were.

    ``unsigned`` counts the int8 activations that became uint8.
    """

    operators: dict[str, int] = field(default_factory=dict)
    unsigned: int = 0
    left: dict[str, str] = field(default_factory=dict)  # weight -> why


def rewrite(model: ir.Model, accuracy_level: int) -> Written:
    """Rewrite ``model``, in the IR's opset and normal form, in place; weights stay recipes.

    What is written is typed as it is made: there are no shape rules for ONNX Runtime's operators, and
    deriving all types anew would lose those of every value behind one.
    """
    written = Written()
    taken = edit.names_in(model.graph)
    written.unsigned = pairs.unsign(model.graph, taken)
    for weight in stored.find(model.graph):
        reason = weight.problem or products.problem(weight, accuracy_level)
        reason = reason or lookups.problem(weight)
        if reason:
            written.left[weight.name] = reason
            continue
        packed = stored.Packed(model.graph, weight, taken)
        made = products.write(packed, accuracy_level) + lookups.write(packed)
        for node in made:
            written.operators[node.op_type] = written.operators.get(node.op_type, 0) + 1
    if written.operators:
        model.graph.opset_imports[DOMAIN] = 1
        edit.remove_dead(model.graph)
    return written


def at_level(model: ir.Model, accuracy_level: int) -> ir.Model:
    """A copy of ``model`` whose products round their inputs as ``accuracy_level`` says."""
    made = model.clone()
    for node in made.graph.all_nodes():
        if node.op_type == "MatMulNBits" and node.domain == DOMAIN:
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", accuracy_level)
    return made
