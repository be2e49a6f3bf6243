"""How fast a model can be at best: its products at the peak rate, or its weights read once.

The longer of the two is the least time of a run (S. Williams, A. Waterman, D. Patterson, "Roofline: an
insightful visual performance model", Comm. ACM 52 (2009), 65). Weights that stay in a cache may be read
faster than memory gives them: a small model can beat this bound, where memory makes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import onnx_ir as ir
import sympy

from netlathe.analysis.cost import macs_in_names
from netlathe.ir import dims, weights

_OF_BYTES = frozenset({"ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul"})
_PAIRS = frozenset({"Conv", "Gemm", "MatMul"})
_BYTES = (ir.DataType.INT8, ir.DataType.UINT8)


@dataclass(frozen=True)
class Ceilings:
    """What a machine does in a second: operations (2 a MAC) on float32 and on bytes, and bytes read."""

    float_ops: float
    byte_ops: float
    bytes: float


@dataclass(frozen=True)
class Work:
    """What one run takes at least.

    ``float_macs`` and ``byte_macs`` (8-bit activations with 8-bit weights) are numbers, or expressions in the
    names of the dynamic dims; ``bytes`` are those of the weights that are read whole.
    """

    float_macs: Any
    byte_macs: Any
    bytes: int

    def at(self, sizes: Mapping[str, int]) -> Work | None:
        """The same in numbers; None where a size is missing."""
        where = {dims.symbol(name): size for name, size in sizes.items()}
        float_macs, byte_macs = (
            dims.evaluate(macs, where) for macs in (self.float_macs, self.byte_macs)
        )
        if float_macs is None or byte_macs is None:
            return None
        return Work(float_macs, byte_macs, self.bytes)

    def least_ms(self, of: Ceilings) -> tuple[float, str]:
        """The least time in milliseconds, and which of "arithmetic" and "memory" makes it."""
        products = 2 * (self.float_macs / of.float_ops + self.byte_macs / of.byte_ops)
        memory = self.bytes / of.bytes
        return 1e3 * max(products, memory), "arithmetic" if products >= memory else "memory"

    def to_json(self) -> dict[str, Any]:
        """As JSON data; expressions as text."""
        return {
            "float_macs": str(self.float_macs),
            "byte_macs": str(self.byte_macs),
            "bytes": self.bytes,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Work:
        """What :meth:`to_json` wrote. It is read by the grammar of dims: a file's text is never evaluated."""
        return cls(
            dims.parse(data["float_macs"]), dims.parse(data["byte_macs"]), int(data["bytes"])
        )


def work(model: ir.Model) -> Work | None:
    """The work of ``model``; None where some of its products have sizes that are not known."""
    macs: dict[bool, Any] = {False: 0, True: 0}
    for node, count in macs_in_names(model).items():
        if count is None:
            return None
        macs[_is_of_bytes(node)] += count
    held = (value for value in model.graph.initializers.values() if not _is_table(value))
    size = sum(value.const_value.nbytes for value in held if value.const_value is not None)
    return Work(sympy.expand(macs[False]), sympy.expand(macs[True]), size)


def _is_of_bytes(node: ir.Node) -> bool:
    """Whether both factors are bytes, or dequantized from bytes."""
    if node.op_type in _OF_BYTES:
        return True
    return node.op_type in _PAIRS and all(_is_dequantized(value) for value in node.inputs[:2])


def _is_dequantized(value: ir.Value | None) -> bool:
    maker = value.producer() if value is not None else None
    if maker is None or maker.op_type != "DequantizeLinear" or maker.inputs[0] is None:
        return False
    return maker.inputs[0].dtype in _BYTES


def _is_table(value: ir.Value) -> bool:
    """Whether only rows of it are taken."""
    uses = list(value.uses())
    return bool(uses) and all(node.op_type == "Gather" and position == 0 for node, position in uses)


def tokens_of(model: ir.Model, feeds: Mapping[str, npt.NDArray[Any]]) -> int | None:
    """How many tokens ``feeds`` has: the size of the inputs that say which rows of a constant table to take.

    None where there is no such input, or several of different sizes: it is not a language model's, then.
    """
    sizes = {
        feeds[value.name or ""].size
        for value in model.graph.inputs
        if (value.name or "") in feeds and _is_of_tokens(value)
    }
    return int(sizes.pop()) if len(sizes) == 1 else None


def _is_of_tokens(value: ir.Value) -> bool:
    """Whether ``value`` [batch, sequence], or what a Cast makes of it, chooses rows of a constant matrix."""
    if value.shape is None or len(value.shape) != 2:
        return False
    for node, position in value.uses():
        if node.op_type == "Cast" and _is_of_tokens(node.outputs[0]):
            return True
        table = node.inputs[0] if node.op_type == "Gather" and position == 1 else None
        if table is not None and weights.is_weight(table) and len(table.shape or ()) == 2:
            return True
    return False
