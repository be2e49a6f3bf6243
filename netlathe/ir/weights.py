"""Weights as recipes: bytes are made when asked for, handed out, and not kept.

An initializer's tensor is an ``ir.ExternalTensor`` (mapped from a file), a plain tensor, or the lazy
recipe that :func:`derived` makes from another tensor. Recipes compose, so a transposed and quantized
weight still costs nothing until it is written, and its memory is given back after.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[Any]

# Keys in a lazy tensor's ``meta``.
_BASE = "netlathe.base"  # the tensor that a recipe reads
_TRANSPOSE = "netlathe.transpose"  # (tensor, perm) it was made from


def derived(
    base: ir.TensorProtocol,
    function: Callable[[Array], Array],
    dtype: ir.DataType,
    shape: Sequence[int],
    name: str,
) -> ir.LazyTensor:
    """The tensor ``function(base)``, computed anew whenever its bytes are read.

    ``function`` must be pure: the pipeline may call it several times. What it returns must have
    ``shape`` and the numpy dtype of ``dtype``; anything else is a ValueError when it is read.
    """

    def evaluate() -> ir.TensorProtocol:
        array = function(base.numpy())
        if array.shape != tuple(shape):
            raise ValueError(f"{name}: recipe gave shape {array.shape}, promised {tuple(shape)}")
        return ir.Tensor(np.ascontiguousarray(array), dtype=dtype, name=name)

    made = ir.LazyTensor(evaluate, dtype=dtype, shape=ir.Shape(shape), cache=False, name=name)
    made.meta[_BASE] = base
    return made


def is_recipe(tensor: ir.TensorProtocol) -> bool:
    """Whether :func:`derived` made this tensor: reading it computes."""
    return isinstance(tensor, ir.LazyTensor) and _BASE in tensor.meta


def transposed(base: ir.TensorProtocol, perm: Sequence[int], name: str = "") -> ir.TensorProtocol:
    """``base`` with its axes in the order ``perm``, lazily.

    Transposing a transposed tensor starts from the first one again, so repeated transposes neither
    pile up nor cost more than one; where they cancel, the first tensor itself comes back.
    """
    perm = tuple(perm)
    if isinstance(base, ir.LazyTensor) and _TRANSPOSE in base.meta:
        base, first = base.meta[_TRANSPOSE]
        perm = tuple(first[axis] for axis in perm)
    if perm == tuple(range(len(perm))):
        return base
    dims = base.shape.numpy()
    made = derived(
        base,
        lambda array: np.transpose(array, perm),
        base.dtype,
        [dims[axis] for axis in perm],
        name or base.name or "transposed",
    )
    made.meta[_TRANSPOSE] = (base, perm)
    return made


def array(value: ir.Value) -> Array:
    """The contents of a constant, materialized.

    Raises:
        ValueError: ``value`` is not a constant.
    """
    if value.const_value is None:
        raise ValueError(f"{value.name} is not a constant")
    return value.const_value.numpy()


def is_weight(value: ir.Value | None) -> bool:
    """Whether ``value`` is an initializer that no caller can override."""
    return (
        value is not None
        and value.const_value is not None
        and value.is_initializer()
        and not value.is_graph_input()
    )


def num_bytes(model: ir.Model) -> int:
    """Bytes of all initializers; a tied weight is one initializer and counts once."""
    return sum(
        value.const_value.nbytes
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None
    )


def files(model: ir.Model) -> set[Path]:
    """The files that initializers are mapped from, by way of recipes too."""
    found = set()
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            while isinstance(tensor, ir.LazyTensor) and _BASE in tensor.meta:
                tensor = tensor.meta[_BASE]
            if isinstance(tensor, ir.ExternalTensor):
                found.add(Path(tensor.path))
    return found


def digest(tensor: ir.TensorProtocol) -> str:
    """SHA-256 over dtype, shape and bytes, as hex."""
    state = hashlib.sha256(f"{tensor.dtype.name}{list(tensor.shape)}".encode())
    if tensor.dtype == ir.DataType.STRING or tensor.dtype.itemsize < 1:
        state.update(tensor.tobytes())  # strings, and elements packed into bytes
    else:
        # Hashed where it lies: no copy of a mapped weight is made.
        state.update(np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8).data)
    return state.hexdigest()
