"""Weights as recipes: bytes are made when asked for, handed out, and not kept.

An initializer's tensor is an ``ir.ExternalTensor`` (mapped from a file), a plain tensor, or the lazy
recipe that :func:`derived` or :func:`joined` makes from other tensors. Recipes compose, so a transposed
and quantized weight still costs nothing until it is written, and its memory is given back after.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[Any]

_TILE = 128  # rows and columns; of 64 to 256 all are about as fast

# Keys in a lazy tensor's ``meta``.
_BASES = "netlathe.bases"  # the tensors that a recipe reads
_TRANSPOSE = "netlathe.transpose"  # (tensor, perm) it was made from
_KIND = "netlathe.kind"  # what it makes of them, where that has a name
_HOLDER = "netlathe.holder"  # what keeps its file in its place
_DIGEST = "netlathe.digest"  # its digest, once it was taken


def derived(
    base: ir.TensorProtocol,
    function: Callable[[Array], Array],
    dtype: ir.DataType,
    shape: Sequence[int],
    name: str,
) -> ir.LazyTensor:
    """The tensor ``function(base)``, computed anew whenever its bytes are read.

    ``function`` must be pure: the pipeline may call it several times. What it returns must have
    ``shape`` and the numpy dtype of ``dtype``; anything else is a ValueError when it is read. Elements of 4
    bits may also be bytes, one each.
    """
    return _recipe([base], lambda: function(base.numpy()), dtype, shape, name)


def packed(array: Array) -> npt.NDArray[np.uint8]:
    """Two elements of 4 bits to a byte, the first one low, of bytes that hold one each."""
    flat = array.reshape(-1).view(np.uint8)
    made = np.zeros(-(-flat.size // 2), np.uint8)
    np.bitwise_and(flat[0::2], 15, out=made)
    made[: flat.size // 2] |= flat[1::2] << 4
    return made


def joined(parts: Sequence[ir.TensorProtocol], shape: Sequence[int], name: str) -> ir.LazyTensor:
    """The elements of ``parts``, all of one dtype, one after the other in a tensor of ``shape``."""

    def join() -> Array:
        return np.concatenate([part.numpy().reshape(-1) for part in parts]).reshape(shape)

    made = _recipe(parts, join, parts[0].dtype, shape, name)
    made.meta[_KIND] = "join"
    return made


def converted(base: ir.TensorProtocol, dtype: ir.DataType, name: str) -> ir.LazyTensor:
    """``base`` as another dtype, each element rounded to nearest even."""
    made = derived(base, lambda array: array.astype(dtype.numpy()), dtype, base.shape.numpy(), name)
    made.meta[_KIND] = "convert"
    return made


def _recipe(
    bases: Sequence[ir.TensorProtocol],
    make: Callable[[], Array],
    dtype: ir.DataType,
    shape: Sequence[int],
    name: str,
) -> ir.LazyTensor:
    def evaluate() -> ir.TensorProtocol:
        array = make()
        if array.shape != tuple(shape):
            raise ValueError(f"{name}: recipe gave shape {array.shape}, promised {tuple(shape)}")
        array = _laid_out(array).reshape(shape)  # a scalar stays one
        if dtype.bitwidth == 4 and array.dtype in (np.int8, np.uint8):
            return ir.PackedTensor(packed(array), dtype, shape=shape, name=name)
        return ir.Tensor(array, dtype=dtype, name=name)

    made = ir.LazyTensor(evaluate, dtype=dtype, shape=ir.Shape(shape), cache=False, name=name)
    made.meta[_BASES] = tuple(bases)
    return made


def _laid_out(array: Array) -> Array:
    """``array`` in C order; a transposed matrix tile by tile, which takes a third of the time.

    Along a row of it numpy would touch a line of memory for every element, and none would stay in cache.
    """
    if array.ndim != 2 or array.flags.c_contiguous or not array.flags.f_contiguous:
        return np.ascontiguousarray(array)
    made = np.empty_like(array, order="C")
    rows, columns = array.shape
    for row in range(0, rows, _TILE):
        for column in range(0, columns, _TILE):
            tile = np.s_[row : row + _TILE, column : column + _TILE]
            made[tile] = array[tile]
    return made


def is_recipe(tensor: ir.TensorProtocol) -> bool:
    """Whether :func:`derived` or :func:`joined` made this tensor: reading it computes."""
    return isinstance(tensor, ir.LazyTensor) and _BASES in tensor.meta


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


def known_recipe(
    tensor: ir.TensorProtocol,
) -> tuple[str, tuple[int, ...], tuple[ir.TensorProtocol, ...]] | None:
    """``transpose`` with its permutation, ``join`` or ``convert``, and the tensors it reads.

    None for a tensor that no such function has made.
    """
    if isinstance(tensor, ir.LazyTensor) and _TRANSPOSE in tensor.meta:
        base, perm = tensor.meta[_TRANSPOSE]
        return "transpose", perm, (base,)
    if isinstance(tensor, ir.LazyTensor) and _KIND in tensor.meta:
        return tensor.meta[_KIND], (), tensor.meta[_BASES]
    return None


def as_held(tensor: ir.TensorProtocol) -> tuple[ir.TensorProtocol, tuple[int, ...]]:
    """The tensor that holds the numbers of ``tensor``, and the order in which its axes must be put.

    Transposes and conversions to a wider type change no number: they are looked through, so that a weight is
    read where it lies and as narrow as it is.
    """
    perm = tuple(range(len(tensor.shape)))
    while (known := known_recipe(tensor)) is not None:
        kind, first, bases = known
        if kind == "transpose":
            perm = tuple(first[axis] for axis in perm)
        elif kind != "convert" or bases[0].dtype not in _WIDENED.get(tensor.dtype, ()):
            break
        tensor = bases[0]
    return tensor, perm


_WIDENED = {
    ir.DataType.FLOAT: (ir.DataType.FLOAT16, ir.DataType.BFLOAT16),
    ir.DataType.DOUBLE: (ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT),
}


def numbers(tensor: ir.TensorProtocol) -> Array:
    """The contents of a tensor in its shape, perhaps of a narrower type and strided: read, not copied."""
    held, perm = as_held(tensor)
    return np.transpose(held.numpy(), perm)


def held_by(tensor: ir.TensorProtocol, holder: object) -> None:
    """Let ``holder``, which keeps the file of a tensor in its place, live as long as the tensor."""
    tensor.meta[_HOLDER] = holder


def recall_digest(tensor: ir.TensorProtocol, known: str) -> None:
    """Say what the digest of a tensor is that cannot change, so that it is not taken again."""
    tensor.meta[_DIGEST] = known


def num_bytes(model: ir.Model) -> int:
    """Bytes of all initializers; a tied weight is one initializer and counts once."""
    return sum(
        value.const_value.nbytes
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None
    )


def files(model: ir.Model) -> set[Path]:
    """The files that initializers are mapped from, by way of recipes too.

    A file that a tensor holds on to itself (:func:`held_by`) is nobody's source, and is left out.
    """
    found = set()
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                found |= {
                    Path(t.path)
                    for t in _read(value.const_value)
                    if isinstance(t, ir.ExternalTensor) and _HOLDER not in t.meta
                }
    return found


def give_back_array(array: Array) -> None:
    """Give back the memory that an array mapped from a file takes by having been read; else do nothing."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    mapped = base.obj if isinstance(base, memoryview) else base
    if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def give_back(model: ir.Model) -> None:
    """Give back the memory that weights mapped from files take by having been read.

    They stay as valid as they were: what is read again comes from the file again.
    """
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                give_back_tensor(value.const_value)


def give_back_tensor(tensor: ir.TensorProtocol) -> None:
    """The same for one tensor."""
    if not hasattr(mmap, "MADV_DONTNEED"):  # Windows: the system decides
        return
    for held in _read(tensor):
        if isinstance(held, ir.ExternalTensor) and held.raw is not None:
            held.raw.madvise(mmap.MADV_DONTNEED)


def _read(tensor: ir.TensorProtocol) -> Iterator[ir.TensorProtocol]:
    """The tensors that hold the bytes which ``tensor`` is made from."""
    if isinstance(tensor, ir.LazyTensor) and _BASES in tensor.meta:
        for base in tensor.meta[_BASES]:
            yield from _read(base)
    else:
        yield tensor


def digest(tensor: ir.TensorProtocol) -> str:
    """SHA-256 over dtype, shape and bytes, as hex.

    It is taken once of what cannot change: a tensor that is mapped from a file, or made from such.
    """
    if (known := tensor.meta.get(_DIGEST)) is not None:
        return str(known)
    found = _digest(tensor)
    give_back_tensor(tensor)  # whoever digests a whole model would have all of it in memory
    if all(isinstance(read, ir.ExternalTensor) for read in _read(tensor)):
        tensor.meta[_DIGEST] = found
    return found


def digest_prefix(tensor: ir.TensorProtocol) -> str:
    """What goes into :func:`digest` in front of the bytes."""
    return f"{tensor.dtype.name}{list(tensor.shape)}"


def _digest(tensor: ir.TensorProtocol) -> str:
    state = hashlib.sha256(digest_prefix(tensor).encode())
    if tensor.dtype == ir.DataType.STRING or tensor.dtype.itemsize < 1:
        state.update(tensor.tobytes())  # strings, and elements packed into bytes
    else:
        # Hashed where it lies: no copy of a mapped weight is made.
        state.update(np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8).data)
    return state.hexdigest()
