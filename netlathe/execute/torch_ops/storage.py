"""How an ONNX element type is stored in a torch tensor, and the way in from and out to numpy.

Most types are torch's own. The rule for the rest:

* ``uint16``, ``uint32``, ``uint64`` are torch dtypes without arithmetic: :func:`widened` computes in
  int64 and casts back, which wraps around exactly as ONNX asks. A comparison, a division or a maximum
  of uint64 values from 2**63 on is the one thing this gets wrong.
* 4-bit and 2-bit integers are stored one per element, sign-extended, in int8 or uint8.
* ``float4e2m1`` is stored as float8e4m3fn, which represents all its sixteen values exactly.

Which ONNX type a tensor holds is known to the graph, not to the tensor: rows that must tell an int4
from an int8 are given the ONNX types of their inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from netlathe.ir import weights

TORCH_DTYPE: dict[ir.DataType, torch.dtype] = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.INT8: torch.int8,
    ir.DataType.INT16: torch.int16,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT64: torch.int64,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.UINT16: torch.uint16,
    ir.DataType.UINT32: torch.uint32,
    ir.DataType.UINT64: torch.uint64,
    ir.DataType.BOOL: torch.bool,
    ir.DataType.COMPLEX64: torch.complex64,
    ir.DataType.COMPLEX128: torch.complex128,
    ir.DataType.FLOAT8E4M3FN: torch.float8_e4m3fn,
    ir.DataType.FLOAT8E4M3FNUZ: torch.float8_e4m3fnuz,
    ir.DataType.FLOAT8E5M2: torch.float8_e5m2,
    ir.DataType.FLOAT8E5M2FNUZ: torch.float8_e5m2fnuz,
    ir.DataType.FLOAT8E8M0: torch.float8_e8m0fnu,
    ir.DataType.INT4: torch.int8,
    ir.DataType.UINT4: torch.uint8,
    ir.DataType.INT2: torch.int8,
    ir.DataType.UINT2: torch.uint8,
    ir.DataType.FLOAT4E2M1: torch.float8_e4m3fn,
}
ONNX_DTYPE: dict[torch.dtype, ir.DataType] = {}
for _onnx, _torch in TORCH_DTYPE.items():
    ONNX_DTYPE.setdefault(_torch, _onnx)  # the first is the type that torch means

FLOAT8 = (
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
)
UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
# Bits of the integer types that share a wider storage type.
NARROW_BITS = {
    ir.DataType.INT4: 4,
    ir.DataType.UINT4: 4,
    ir.DataType.INT2: 2,
    ir.DataType.UINT2: 2,
}
# numpy extension types that travel to torch bit by bit, and through which integer.
_AS_BITS: dict[Any, tuple[Any, torch.dtype]] = {
    ml_dtypes.bfloat16: (np.int16, torch.bfloat16),
    ml_dtypes.float8_e4m3fn: (np.uint8, torch.float8_e4m3fn),
    ml_dtypes.float8_e4m3fnuz: (np.uint8, torch.float8_e4m3fnuz),
    ml_dtypes.float8_e5m2: (np.uint8, torch.float8_e5m2),
    ml_dtypes.float8_e5m2fnuz: (np.uint8, torch.float8_e5m2fnuz),
    ml_dtypes.float8_e8m0fnu: (np.uint8, torch.float8_e8m0fnu),
}
_NARROW: dict[Any, Any] = {
    ml_dtypes.int4: np.int8,
    ml_dtypes.uint4: np.uint8,
    ml_dtypes.int2: np.int8,
    ml_dtypes.uint2: np.uint8,
    ml_dtypes.float4_e2m1fn: ml_dtypes.float8_e4m3fn,
}


def from_numpy(array: npt.NDArray[Any], device: torch.device | str = "cpu") -> torch.Tensor:
    """A copy of ``array`` as a tensor in its storage type.

    A copy, because torch's own memory is aligned and numpy's or a mapped file's is not: kernels round
    differently by alignment, and the same input must give the same bits.

    Raises:
        TypeError: the array holds strings or objects.
    """
    if array.dtype.type in _NARROW:
        array = array.astype(_NARROW[array.dtype.type])
    if array.dtype.type in _AS_BITS:
        integer, dtype = _AS_BITS[array.dtype.type]
        return _copied(array.view(integer)).view(dtype).to(device)
    return _copied(array).to(device)


def _copied(array: npt.NDArray[Any]) -> torch.Tensor:
    # A sample of one element knows the torch dtype; from_numpy on the array would share or warn.
    dtype = torch.from_numpy(np.zeros(1, array.dtype)).dtype
    tensor = torch.empty(array.shape, dtype=dtype)
    tensor.numpy()[...] = array
    return tensor


def to_numpy(tensor: torch.Tensor, dtype: ir.DataType | None = None) -> npt.NDArray[Any]:
    """``tensor`` as a numpy array of the ONNX type ``dtype`` (default: what torch means)."""
    dtype = ONNX_DTYPE[tensor.dtype] if dtype is None else dtype
    tensor = tensor.detach().cpu().contiguous()
    wanted = dtype.numpy()
    array: npt.NDArray[Any]
    for extension, (integer, stored) in _AS_BITS.items():
        if tensor.dtype == stored:
            bits = torch.int16 if integer is np.int16 else torch.uint8
            array = tensor.view(bits).numpy().view(extension)
            break
    else:
        array = tensor.numpy()
    return array if array.dtype == wanted else array.astype(wanted)


def load(tensor: ir.TensorProtocol, device: torch.device | str = "cpu") -> torch.Tensor:
    """The contents of an IR tensor on ``device``; nothing else keeps them alive.

    They cross over as they are held, and are widened and transposed there.
    """
    device = torch.device(device)
    if device.type == "cpu" or not weights.is_recipe(tensor):
        return from_numpy(tensor.numpy(), device)
    held, perm = weights.as_held(tensor)
    moved = from_numpy(held.numpy(), device).permute(perm)
    return moved.to(TORCH_DTYPE[tensor.dtype]).contiguous()


def widened(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` for tensors of uint16, uint32 and uint64 too: computed in int64, cast back.

    Results that are not int64 (comparisons, indices of another type) stay as they are.
    """

    @functools.wraps(function)
    def compute(*inputs: Any, **attributes: Any) -> Any:
        narrow = next(
            (x.dtype for x in inputs if isinstance(x, torch.Tensor) and x.dtype in UNSIGNED), None
        )
        if narrow is None:
            return function(*inputs, **attributes)
        wide = [
            x.to(torch.int64) if isinstance(x, torch.Tensor) and x.dtype in UNSIGNED else x
            for x in inputs
        ]
        result = function(*wide, **attributes)
        if isinstance(result, tuple):
            return tuple(_back(x, narrow) for x in result)
        return _back(result, narrow)

    return compute


def _back(result: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return result.to(dtype) if result.dtype == torch.int64 else result


def in_order(x: torch.Tensor) -> torch.Tensor:
    """``x``, or for the unsigned types that torch cannot sort, int64 numbers in the same order."""
    if x.dtype == torch.uint64:
        return x.view(torch.int64) ^ torch.iinfo(torch.int64).min
    return x.to(torch.int64) if x.dtype in UNSIGNED else x


# Types without indexing, padding and the like in torch, and an integer of the same width that has it.
_BITS_OF = {
    **dict.fromkeys(FLOAT8, torch.uint8),
    torch.uint16: torch.int16,
    torch.uint32: torch.int32,
    torch.uint64: torch.int64,
}


def by_bits(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, which only moves elements, for types that torch cannot move: as integers."""

    @functools.wraps(function)
    def compute(*inputs: Any, **attributes: Any) -> Any:
        moved = next(
            (x.dtype for x in inputs if isinstance(x, torch.Tensor) and x.dtype in _BITS_OF), None
        )
        if moved is None:
            return function(*inputs, **attributes)
        bits = [
            x.view(_BITS_OF[moved]) if isinstance(x, torch.Tensor) and x.dtype == moved else x
            for x in inputs
        ]
        result = function(*bits, **attributes)
        if isinstance(result, tuple):
            return tuple(x.view(moved) for x in result)
        return result.view(moved)

    return compute
