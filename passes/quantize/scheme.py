"""What the numbers of a quantized weight are: a format, and which elements share a scale.

A weight is looked at as a matrix ``[rows, columns]``: a row is all that one output sums over, and a group
is ``group`` columns of a row that share a scale s and a zero point z (`layout` says how a tensor becomes
that matrix). An element w becomes a code c and is read as

    int2 .. int8, symmetric     w' = c s          c from -2^(b-1) to 2^(b-1) - 1   (int8: from -127 to 127)
    int2 .. int8, asymmetric    w' = (c - z) s    c and z from 0 to 2^b - 1; zeros="float": z a number
                                                  stored as scales are, c - z rounded to float32
    float8, float4              w' = c s          c a number of that format
    mxfp4                       w' = c s          s = 2^n in float8e8m0, one for 32 (OCP MX 1.0, sec. 6.3)
    nvfp4                       w' = c (s t)      s in float8e4m3fn, one for 16; t in float32, one for all
    nf4                         w' = T[c] s       c from 0 to 15, T of QLoRA (arXiv 2305.14314, app. E)
    codebook2 .. codebook4      w' = T[c] s       c from 0 to 2^b - 1, T given, or fitted (`fit`)
    float16, bfloat16           w' = c            no scale at all

Below 8 bits the symmetric range has one number more on the negative side. So as not to lose it the scale
takes a sign: the element of the largest magnitude becomes the lowest code (as in ggml's Q4_0). Not so where
integer operators read the codes (``operand``): what follows them multiplies by the scale as a number above
0. There the scale is the least that holds both ends of the range, max(high / (2^(b-1) - 1), -low / 2^(b-1)),
and a code takes a byte, as these operators read int8. Scales are rounded to their own type before codes are
chosen, and w' is rounded once, to float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]
Kind = Literal["integer", "float", "table", "cast"]
FormatName = Literal[
    "int8", "int6", "int5", "int4", "int3", "int2", "nf4", "codebook4", "codebook3", "codebook2",
    "float8e4m3fn", "float8e5m2", "float4e2m1", "mxfp4", "nvfp4", "float16", "bfloat16",
]  # fmt: skip
ScaleType = Literal["float32", "float16", "bfloat16"]
ZeroType = Literal["integer", "float"]
GroupAxis = Literal["input", "output"]

# Quantiles of the normal distribution, as bitsandbytes holds them in float32.
NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip


@dataclass(frozen=True)
class Format:
    """One stored number: its bits, its kind, and the ONNX type that holds it.

    ``dtype`` is None where ONNX has no such type: codes are then stored as bit planes. ``group`` and
    ``scale`` are how many elements share a scale, and its type, where the format says so.
    """

    name: str
    bits: int
    kind: Kind
    dtype: ir.DataType | None
    unsigned: ir.DataType | None = None  # of asymmetric codes
    group: int = 0
    scale: ir.DataType | None = None


FORMATS = {
    f.name: f
    for f in (
        Format("int8", 8, "integer", ir.DataType.INT8, ir.DataType.UINT8),
        Format("int6", 6, "integer", None),
        Format("int5", 5, "integer", None),
        Format("int4", 4, "integer", ir.DataType.INT4, ir.DataType.UINT4),
        Format("int3", 3, "integer", None),
        Format("int2", 2, "integer", None),
        Format("nf4", 4, "table", ir.DataType.UINT4),
        Format("codebook4", 4, "table", ir.DataType.UINT4),
        Format("codebook3", 3, "table", None),
        Format("codebook2", 2, "table", None),
        Format("float8e4m3fn", 8, "float", ir.DataType.FLOAT8E4M3FN),
        Format("float8e5m2", 8, "float", ir.DataType.FLOAT8E5M2),
        Format("float4e2m1", 4, "float", ir.DataType.FLOAT4E2M1),
        Format("mxfp4", 4, "float", ir.DataType.FLOAT4E2M1, group=32, scale=ir.DataType.FLOAT8E8M0),
        Format(
            "nvfp4", 4, "float", ir.DataType.FLOAT4E2M1, group=16, scale=ir.DataType.FLOAT8E4M3FN
        ),
        Format("float16", 16, "cast", ir.DataType.FLOAT16),
        Format("bfloat16", 16, "cast", ir.DataType.BFLOAT16),
    )
}


@dataclass(frozen=True)
class Scheme:
    """A format with its granularity: ``group_size`` elements share a scale, 0 stands for a whole row.

    ``group_axis`` is what groups run along: the columns of a row, or ("output") the rows of a column.
    ``codebook`` is T of the formats that have it free, ``tensor_scale`` t of nvfp4: both are known once a
    weight is looked at. ``operand`` says of symmetric integers below 8 bits that an integer operator reads
    the codes: scales are above 0, and codes stored as int8.
    """

    weights: FormatName = "int8"
    symmetric: bool = True
    group_size: int = 0
    per_tensor: bool = False
    scales: ScaleType = "float32"
    zeros: ZeroType = "integer"
    group_axis: GroupAxis = "input"
    codebook: tuple[float, ...] = ()
    tensor_scale: float = 0.0
    operand: bool = False

    @property
    def group(self) -> int:
        """How many elements share a scale, if not a whole row: as the format says, or as asked for."""
        return self.format.group or self.group_size

    @property
    def format(self) -> Format:
        """The format by its name."""
        return FORMATS[self.weights]

    @property
    def asymmetric(self) -> bool:
        """Whether there are zero points: of integers only."""
        return self.format.kind == "integer" and not self.symmetric

    @property
    def fractional(self) -> bool:
        """Whether zero points are numbers between codes."""
        return self.asymmetric and self.zeros == "float"

    @property
    def has_codebook(self) -> bool:
        """Whether T is not the format's own."""
        return self.format.kind == "table" and self.weights != "nf4"

    @property
    def is_fitted(self) -> bool:
        """Whether it has to know of a whole weight what it is for (`fit`)."""
        return self.weights == "nvfp4" or (self.has_codebook and not self.codebook)

    @property
    def table(self) -> Array:
        """T in float32, ascending."""
        return np.array(self.codebook, np.float32) if self.has_codebook else NF4

    @property
    def scale_type(self) -> ir.DataType:
        """The ONNX type of the scales."""
        if self.format.scale is not None:
            return self.format.scale
        return ir.DataType[{"float32": "FLOAT"}.get(self.scales, self.scales.upper())]

    @property
    def lowest(self) -> int:
        """The lowest code."""
        if self.asymmetric or self.format.kind == "table":
            return 0
        return -127 if self.format.bits == 8 else -(1 << (self.format.bits - 1))

    @property
    def highest(self) -> int:
        """The highest code."""
        if self.asymmetric or self.format.kind == "table":
            return (1 << self.format.bits) - 1
        return (1 << (self.format.bits - 1)) - 1

    @property
    def code_type(self) -> Any:
        """The numpy type of codes before they are stored: of integers one byte each."""
        if self.format.kind in ("float", "cast"):
            assert self.format.dtype is not None
            return self.format.dtype.numpy()
        return np.dtype(np.int8 if self.lowest < 0 else np.uint8)

    @property
    def zero_type(self) -> ir.DataType:
        """The ONNX type of stored zero points: of the codes, the narrowest that holds them, or of scales."""
        if self.fractional:
            return self.scale_type
        return self.format.unsigned or (
            ir.DataType.UINT4 if self.format.bits <= 4 else ir.DataType.UINT8
        )

    @property
    def largest_weight(self) -> float:
        """The largest magnitude of a weight whose scale, and its multiples, stay in their ranges."""
        if self.format.scale is not None:
            return 2.0**126
        if self.format.kind == "cast":
            assert self.format.dtype is not None
            return float(_finfo(self.format.dtype.numpy()).max)
        return min(2.0**127, float(_finfo(self.scale_type.numpy()).max))

    def problem(self) -> str:
        """Why there is no such scheme; empty if there is."""
        kind = self.format.kind
        if kind != "integer" and not self.symmetric:
            return f"{self.weights} has no zero points: symmetric=False is for integers"
        if self.zeros == "float" and self.symmetric:
            return "zeros='float' are zero points: give symmetric=False as well"
        if self.format.group and (
            self.group_size not in (0, self.format.group)
            or self.per_tensor
            or self.scales != "float32"
        ):
            return (
                f"{self.weights} has a {self.scale_type.name.lower()} scale for {self.format.group}"
                " elements: leave group_size, per_tensor and scales out"
            )
        if kind == "cast" and (self.group_size or self.per_tensor):
            return f"{self.weights} has no scales: leave group_size and per_tensor out"
        if self.group_size and self.per_tensor:
            return "per_tensor=True has no groups: leave group_size out"
        if self.group_size % 8:
            return f"group_size={self.group_size} is no multiple of 8"
        if self.group_axis == "output" and not self.group:
            return "group_axis='output' says how groups lie: give group_size as well"
        return self._problem_of_codebook() if self.codebook else ""

    def _problem_of_codebook(self) -> str:
        values, count = self.codebook, 1 << self.format.bits
        if not self.has_codebook:
            return f"{self.weights} has numbers of its own: codebook is for codebook2, 3 and 4"
        if len(values) != count:
            return f"{self.weights} has {count} numbers, and codebook={values!r} {len(values)}"
        held = [float(np.float32(value)) for value in values]
        if sorted(set(held)) != held or not -1 <= held[0] < held[-1] <= 1 or 0.0 not in held:
            return f"codebook={values!r} does not ascend from -1 or more over 0 to 1 or less"
        return ""

    def num_bytes(self, elements: int, groups: int) -> int:
        """Bytes on disk: codes, scales and zero points, each tensor filled up to whole bytes."""
        if self.format.kind == "cast":
            return 2 * elements
        zeros = -(-groups * self.zero_type.bitwidth // 8) if self.asymmetric else 0
        width = 8 if self.operand else self.format.bits
        planes = self.format.dtype is None and not self.operand
        codes = width * -(-elements // 8) if planes else -(-elements * width // 8)
        whole = 4 if self.weights == "nvfp4" else 4 << width if self.has_codebook else 0
        return codes + groups * self.scale_type.bitwidth // 8 + zeros + whole

    def __str__(self) -> str:
        if self.format.kind == "cast":
            return self.weights
        if self.operand:
            return f"{self.weights} in bytes"
        zeros = ", zero points between codes" if self.fractional else ", asymmetric"
        return self.weights + (zeros if self.asymmetric else "")


def _finfo(dtype: Any) -> Any:
    return ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]


# -- scales and zero points from a range --------------------------------------------------------------


def scales_for(groups: Float64, scheme: Scheme, shrink: float = 1.0) -> tuple[Float64, Float64]:
    """Scale and zero point of every row of ``groups`` [n, size] whose range is ``shrink`` of the data's.

    Scales are what their type holds; a group of zeros has the scale 1.
    """
    low, high = groups.min(1), groups.max(1)
    if scheme.asymmetric:
        low, high = np.minimum(low, 0) * shrink, np.maximum(high, 0) * shrink
        scale = round_scales((high - low) / scheme.highest, scheme)
        return scale, round_zeros(np.clip(-low / scale, 0, scheme.highest), scheme)
    most = np.maximum(high, -low) * shrink
    match scheme.format.kind:
        case "integer" if scheme.operand:
            least = np.maximum(high / scheme.highest, low / scheme.lowest) * shrink
            scale = round_scales(least, scheme)
        case "integer" if scheme.format.bits < 8:
            signed = np.where(high > -low, -most, most)
            scale = round_scales(signed / -scheme.lowest, scheme)
        case "integer":
            scale = round_scales(most / scheme.highest, scheme)
        case "table":
            scale = round_scales(most, scheme)
        case "float" if scheme.weights == "mxfp4":
            _, exponent = np.frexp(most)  # most < 2^exponent, and 6 = 1.5 2^2 is the largest number
            scale = round_scales(np.where(most > 0, np.exp2(exponent - 3.0), 0.0), scheme)
        case "float":
            assert scheme.format.dtype is not None
            scale = round_scales(most / float(_finfo(scheme.format.dtype.numpy()).max), scheme)
        case "cast":
            scale = np.ones(len(groups))
    return scale, np.zeros(len(groups))


def round_scales(scale: Float64, scheme: Scheme) -> Float64:
    """``scale`` as its type holds it; 0 becomes 1.

    Kernels may take subnormal float32 numbers for 0, so scales are kept above these. Those of float16
    are normal numbers once they are widened. Of mxfp4 scales are powers of two, of nvfp4 what the product
    with the scale of the tensor gives.
    """
    if scheme.weights == "mxfp4":
        nearest = np.exp2(np.clip(np.rint(np.log2(np.where(scale > 0, scale, 1.0))), -126, 127))
        return np.asarray(nearest)
    if scheme.weights == "nvfp4":
        held = to_float(scale / scheme.tensor_scale, ir.DataType.FLOAT8E4M3FN).astype(np.float64)
        held = np.where(scale == 0, 1.0, np.maximum(held, 2.0**-9))  # the smallest above 0
        return np.asarray((held * scheme.tensor_scale).astype(np.float32).astype(np.float64))
    dtype = scheme.scale_type.numpy()
    info = _finfo(dtype)
    least = float(info.smallest_subnormal if scheme.scales == "float16" else info.tiny)
    held = scale.astype(dtype).astype(np.float64)
    small = np.where(scale < 0, -least, least)
    held = np.where(np.abs(held) < least, small, held)
    return np.where(scale == 0, 1.0, held)


def round_zeros(zero: Float64, scheme: Scheme) -> Float64:
    """Zero points as their type holds them."""
    if scheme.fractional:
        return np.asarray(zero.astype(scheme.zero_type.numpy()).astype(np.float64))
    return np.rint(zero)


# -- codes --------------------------------------------------------------------------------------------


def encode(values: Float64, scale: Float64, zero: Float64, scheme: Scheme) -> Array:
    """The nearest codes; ``scale`` and ``zero`` broadcast against ``values``."""
    match scheme.format.kind:
        case "integer":
            at = np.rint(values / scale + zero if scheme.fractional else values / scale)
            codes = np.clip(at if scheme.fractional else at + zero, scheme.lowest, scheme.highest)
            return np.asarray(codes.astype(scheme.code_type))
        case "table":
            table = scheme.table.astype(np.float64)
            middles = (table[1:] + table[:-1]) / 2
            return np.searchsorted(middles, values / scale).astype(np.uint8)
        case "float" | "cast":
            assert scheme.format.dtype is not None
            return to_float(values / scale, scheme.format.dtype)


def to_float(values: Float64, dtype: ir.DataType) -> Array:
    """Numbers of a small floating-point type, with what is too large at its largest."""
    info = _finfo(dtype.numpy())
    made: Array = np.clip(values, float(info.min), float(info.max)).astype(dtype.numpy())
    return made


def decode(codes: Array, scale: Float64, zero: Float64, scheme: Scheme) -> Float64:
    """What codes stand for, rounded to float32 (with fractional zero points once before), in float64."""
    if scheme.format.kind == "table":
        values = scheme.table[codes].astype(np.float64)
    else:
        values = codes.astype(np.float64) - zero
        if scheme.fractional:
            values = values.astype(np.float32).astype(np.float64)
    return (values * scale).astype(np.float32).astype(np.float64)
