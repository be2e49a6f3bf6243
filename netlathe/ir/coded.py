"""Inputs and outputs of a model that hold codes instead of floats: a quantized key-value cache.

A float tensor [..., d] is stored as codes and, for every vector of its last axis, a scale:

    int8    q = round(x / s), s = max |x| / 127                       codes int8 [..., d]
    int4    q = round(x / s) + z, s = (high - low) / 15, 0 in range   codes uint8 [..., d / 2], zero points
            z = round(-low / s)                                       uint8 [..., 1]

Of int4, byte i holds code i in its lower half and code i + d / 2 in its upper one. Scales are [..., 1]. Which
tensors are coded is recorded in the model, and travels with the ONNX file: feeds of the model as it was
captured are encoded to fit, and what comes out is decoded to be compared.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[Any]
Number = Literal["int8", "int4"]
_KEY = "netlathe.coded"
# The smallest scale: 0 would leave nothing to divide by.
LEAST = {"float32": 2.0**-120, "float16": 2.0**-24}


@dataclass(frozen=True)
class Coding:
    """How one tensor is stored, and the names of the tensors beside it; int8 has no zero points."""

    number: Number
    scale_type: Literal["float32", "float16"]
    scale: str
    zero: str = ""

    @property
    def names(self) -> list[str]:
        """What stands beside the codes."""
        return [self.scale, self.zero] if self.zero else [self.scale]


def coded(model: ir.Model) -> dict[str, Coding]:
    """The inputs and outputs that hold codes, by name."""
    held = json.loads(model.metadata_props.get(_KEY, "{}"))
    return {name: Coding(**how) for name, how in held.items()}


def record(model: ir.Model, name: str, how: Coding) -> None:
    """Write down that an input or output holds codes."""
    held = coded(model)
    held[name] = how
    data = {name: asdict(how) for name, how in held.items()}
    model.metadata_props[_KEY] = json.dumps(data, sort_keys=True)


def encoded(model: ir.Model, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """``feeds`` with codes and scales where the model wants them; codes stay as they are."""
    made = dict(feeds)
    for name, how in coded(model).items():
        array = made.get(name)
        if array is not None and array.dtype.kind == "f":
            made[name], *beside = encode(array, how)
            made.update(zip(how.names, beside, strict=True))
    return made


def decoded(model: ir.Model, outputs: Mapping[str, Array]) -> dict[str, Array]:
    """``outputs`` with floats where the model gives codes and scales."""
    made = dict(outputs)
    for name, how in coded(model).items():
        if name in made and all(beside in made for beside in how.names):
            beside = [made.pop(other) for other in how.names]
            made[name] = decode(made[name], *beside)
    return made


def encode(x: Array, how: Coding) -> list[Array]:
    """Codes, scales and, of int4, zero points of float32 ``x`` [..., d]."""
    x = x.astype(np.float32)
    if how.number == "int8":
        scale, wide = _scales(np.abs(x).max(-1, keepdims=True) / np.float32(127), how)
        return [np.clip(np.rint(x / wide), -128, 127).astype(np.int8), scale]
    low = np.minimum(x.min(-1, keepdims=True), np.float32(0))
    high = np.maximum(x.max(-1, keepdims=True), np.float32(0))
    scale, wide = _scales((high - low) / np.float32(15), how)
    zero = np.clip(np.rint(-low / wide), 0, 15)
    codes = np.clip(np.rint(x / wide) + zero, 0, 15).astype(np.uint8)
    half = codes.shape[-1] // 2
    packed = codes[..., :half] | codes[..., half:] << np.uint8(4)
    return [packed, scale, zero.astype(np.uint8)]


def decode(codes: Array, scale: Array, zero: Array | None = None) -> Array:
    """The float32 numbers that :func:`encode` stored."""
    wide = scale.astype(np.float32)
    if zero is None:
        return np.asarray(codes.astype(np.float32) * wide)
    apart = np.concatenate([codes & np.uint8(15), codes >> np.uint8(4)], -1)
    return np.asarray((apart.astype(np.float32) - zero.astype(np.float32)) * wide)


def _scales(share: Array, how: Coding) -> tuple[Array, Array]:
    """Scales as they are stored, and in float32."""
    held = np.maximum(share, np.float32(LEAST[how.scale_type])).astype(how.scale_type)
    return held, held.astype(np.float32)
