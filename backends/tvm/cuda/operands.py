"""What tensor cores multiply: the types of both operands, and in what their sums are kept."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

D = ir.DataType
HALVES = {D.BFLOAT16: "bf16", D.FLOAT16: "f16"}
_NAMES = {
    **HALVES,
    D.INT8: "s8",
    D.UINT8: "u8",
    D.FLOAT8E4M3FN: "e4m3",
    D.FLOAT8E5M2: "e5m2",
}
_WHOLE = ("s8", "u8")


@dataclass(frozen=True)
class Operands:
    """The types of a left and a right operand, by PTX's names."""

    a: str
    b: str

    @property
    def name(self) -> str:
        """One word that stands for both."""
        return self.a if self.a == self.b else f"{self.a}_{self.b}"

    @property
    def bytes(self) -> int:
        """Of an element of either."""
        return 2 if self.a in ("bf16", "f16") else 1

    @property
    def deep(self) -> int:
        """Elements of K that one instruction takes."""
        return 32 // self.bytes

    @property
    def sums(self) -> str:
        """The type that sums are kept in."""
        return "int32" if self.a in _WHOLE else "float32"

    @property
    def is_float8(self) -> bool:
        """Whether both have 8 bits and an exponent."""
        return self.bytes == 1 and self.sums == "float32"


def operands(name: str) -> Operands:
    """Those that :attr:`Operands.name` is the name of."""
    a, _, b = name.partition("_")
    return Operands(a, b or a)


def of_types(a: D | None, b: D | None) -> Operands | None:
    """Those of two types that may be multiplied with each other; None where no instruction does."""
    left, right = (_NAMES.get(dtype or D.UNDEFINED) for dtype in (a, b))
    if left is None or right is None:
        return None
    found = Operands(left, right)
    kinds = [{"bf16"}, {"f16"}, set(_WHOLE), {"e4m3", "e5m2"}]
    return found if any({found.a, found.b} <= kind for kind in kinds) else None
