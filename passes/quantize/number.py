"""The 8-bit numbers that activations become: int8 and uint8 with a zero point, float8e4m3fn without."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.passes.quantize.scheme import to_float

Float64 = npt.NDArray[np.float64]
NumberName = Literal["int8", "uint8", "float8e4m3fn"]


@dataclass(frozen=True)
class Number:
    """A code q stands for (q - zero) scale."""

    name: NumberName
    dtype: ir.DataType
    lowest: int
    highest: int
    is_float: bool = False

    def grid(self, low: float, high: float) -> tuple[float, int]:
        """Scale (a float32 number) and zero point for a range, widened to contain zero."""
        low, high = min(low, 0.0), max(high, 0.0)
        if self.is_float:
            return float(np.float32(max(-low, high) / self.highest)) or 1.0, 0
        scale = float(np.float32((high - low) / (self.highest - self.lowest))) or 1.0
        zero = np.rint(-low / scale) + self.lowest
        return scale, int(np.clip(zero, self.lowest, self.highest))

    def rounded(self, x: Float64, scale: float, zero: int) -> Float64:
        """The nearest numbers that codes stand for."""
        if self.is_float:
            return np.asarray(to_float(x / scale, self.dtype).astype(np.float64) * scale)
        ends = self.lowest - zero, self.highest - zero
        return np.asarray(np.clip(np.rint(x / scale), *ends) * scale)

    def zero_point(self, zero: int) -> ir.TensorProtocol:
        """The zero point as QuantizeLinear wants it, which takes the type of the codes from it."""
        array: Any = np.array(zero).astype(self.dtype.numpy())
        return ir.Tensor(array, dtype=self.dtype)


NUMBERS: dict[str, Number] = {
    n.name: n
    for n in (
        Number("int8", ir.DataType.INT8, -128, 127),
        Number("uint8", ir.DataType.UINT8, 0, 255),
        Number("float8e4m3fn", ir.DataType.FLOAT8E4M3FN, -448, 448, is_float=True),
    )
}
