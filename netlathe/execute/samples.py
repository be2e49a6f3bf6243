"""Valid inputs for a model whose author left none: ids inside their table, masks with a padded tail.

Lengths say the same as masks: how much of each row is no padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import sympy

from netlathe.diagnostics import Diagnostic, InputError, OptionError, did_you_mean
from netlathe.ir import dims

Arrays = dict[str, npt.NDArray[Any]]

_DEFAULT_BATCH = 2
_DEFAULT_SIZE = 16
# Through these an id reaches the table it is looked up in with its value unchanged.
_KEEP_VALUE = frozenset(
    {
        "Cast",
        "Reshape",
        "Unsqueeze",
        "Squeeze",
        "Transpose",
        "Slice",
        "Expand",
        "Flatten",
        "Identity",
    }
)


def dynamic_dims(model: ir.Model) -> dict[str, int]:
    """The free dims of the graph inputs by name, each with a default size (batch 2, others 16)."""
    names = dict.fromkeys(name for value in model.graph.inputs for name in free_dims(value))
    batches = _batches(model.graph.inputs)
    return {
        name: _DEFAULT_BATCH if "batch" in name or name in batches else _DEFAULT_SIZE
        for name in names
    }


def _batches(inputs: Sequence[ir.Value]) -> set[str]:
    """The names of first dims that are a batch: behind them all dims of an input are fixed.

    A name that is a later dim elsewhere is no batch: tables of positions are [sequence, width]. Of first
    dims that nobody named, all are the batch if one is: they are likely to be equal, which no name says.
    """
    later = {name for v in inputs for dim in (v.shape or ())[1:] for name in _names(dim)}
    found = {n for v in inputs if _only_first_is_free(v) for n in free_dims(v)} - later
    unnamed = {unnamed_dim(v, 0) for v in inputs}
    return found | unnamed if found & unnamed else found


def _only_first_is_free(value: ir.Value) -> bool:
    behind = (value.shape or ())[1:]
    return bool(behind) and all(isinstance(dim, int) for dim in behind)


def unnamed_dim(value: ir.Value, axis: int) -> str:
    """What a dim of a graph input is called that has no name in its file."""
    return f"{value.name}_dim{axis}"


def check_dims(named: Iterable[str], known: Iterable[str], at: str = "") -> None:
    """Check that all that are ``named`` are ``known`` dynamic dims.

    Raises:
        OptionError: one is not.
    """
    there = list(known)
    for name in named:
        if name not in there:
            raise OptionError(
                Diagnostic(
                    "dims.unknown",
                    f"the model has no dynamic dim {name!r}",
                    at=at,
                    help=did_you_mean(name, there) if there else "all of its sizes are fixed",
                )
            )


def free_dims(value: ir.Value) -> list[str]:
    """The names that the dims of ``value`` are made of, in order: ``2*n`` is made of ``n``."""
    return list(dict.fromkeys(name for dim in value.shape or () for name in _names(dim)))


def _names(dim: int | ir.SymbolicDim) -> list[str]:
    parsed = dims.from_ir(dim)
    return sorted(map(str, parsed.free_symbols)) if isinstance(parsed, sympy.Expr) else []


def shape_of(value: ir.Value, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of a graph input at the given sizes; an unnamed dim counts as 1.

    Raises:
        InputError: the input has no rank.
    """
    if value.shape is None:
        raise InputError(
            Diagnostic("samples.rank", f"input {value.name!r} has no shape, so no data can be made")
        )
    known = [(dims.symbol(name), size) for name, size in sizes.items()]
    shape = []
    for dim in map(dims.from_ir, value.shape):
        size: Any = dim.subs(known) if isinstance(dim, sympy.Expr) else dim
        shape.append(1 if size is None else int(size))
    return tuple(shape)


def synthesize(model: ir.Model, sizes: Mapping[str, int], seed: int) -> Arrays:
    """Inputs for ``model``: float32 normal noise, ids below the smallest table they index, masks.

    Ids repeat only after every row of their table has come up once. Rows of a mask end in 0, 1, 2, ...
    zeros (never only zeros); positions count up. ``sizes`` may leave out dims, which then take their
    default of :func:`dynamic_dims`.

    Raises:
        OptionError: a size names no dim of the model.
        InputError: an input has no rank.
    """
    defaults = dynamic_dims(model)
    check_dims(sizes, defaults)
    full = {**defaults, **sizes}
    rng = np.random.default_rng(seed)
    inputs = model.graph.inputs
    return {v.name: _make(v, inputs, full, rng) for v in inputs if v.name}


def _make(
    value: ir.Value,
    inputs: Sequence[ir.Value],
    sizes: Mapping[str, int],
    rng: np.random.Generator,
) -> npt.NDArray[Any]:
    shape = shape_of(value, sizes)
    dtype = (value.dtype or ir.DataType.FLOAT).numpy()
    kind = np.dtype(dtype).kind
    name = (value.name or "").lower()
    if kind not in "iub":
        return rng.standard_normal(shape, dtype=np.float32).astype(dtype)
    if kind == "b" or "mask" in name:
        return _mask(shape).astype(dtype)
    if "position" in name and shape:
        return np.broadcast_to(np.arange(shape[-1]), shape).astype(dtype)
    if _holds_lengths(value):
        longest = _longest_row(value, inputs, sizes)
        return np.maximum(1, longest - np.arange(shape[0])).astype(dtype)
    bounds = list(_table_rows(value))
    top = max(1, min([*bounds, np.iinfo(dtype).max])) if bounds else 2
    return _ids(top, shape, rng).astype(dtype)


def _holds_lengths(value: ir.Value) -> bool:
    return "length" in (value.name or "").lower() and len(value.shape or ()) == 1


def _longest_row(value: ir.Value, inputs: Sequence[ir.Value], sizes: Mapping[str, int]) -> int:
    """A length that no row is shorter than, whichever dims are rows: the least that may be one.

    That is a free dim behind the first of an input, or where there is none, a fixed one.
    """
    own = set(free_dims(value))
    free: list[int] = []
    fixed: list[int] = []
    for other in inputs:
        rows = list(zip(other.shape or (), shape_of(other, sizes), strict=True))
        if _holds_lengths(other):
            continue
        for dim, size in rows[1:] or rows:  # a stream of tokens is a row by itself
            names = _names(dim)
            if names and own.isdisjoint(names):
                free.append(size)
            elif isinstance(dim, int) and size > 1:
                fixed.append(size)
    return min(free or fixed or [1])


def _ids(top: int, shape: tuple[int, ...], rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Numbers below ``top``, each as often as the others to within one."""
    size = int(np.prod(shape, dtype=np.int64))
    if size <= top:
        return rng.choice(top, size, replace=False).astype(np.int64).reshape(shape)
    rounds = [rng.permutation(top) for _ in range(-(-size // top))]
    return np.concatenate(rounds)[:size].astype(np.int64).reshape(shape)


def _mask(shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    """Row i of the first axis keeps all but its last i positions, and always the first."""
    mask = np.ones(shape, np.bool_)
    if len(shape) >= 2:
        for row in range(shape[0]):
            keep = max(1, shape[-1] - row)
            mask[row, ..., keep:] = False
    return mask


def _table_rows(value: ir.Value) -> Iterator[int]:
    """How many rows the tables have that ``value`` indexes."""
    stack, seen = [value], {value}
    while stack:
        current = stack.pop()
        for node, position in current.uses():
            if node.op_type == "Gather" and position == 1:
                table = node.inputs[0]
                axis = node.attributes.get("axis")
                at = axis.as_int() if axis is not None else 0
                if table is not None and table.shape is not None:
                    rows = table.shape[at]
                    if isinstance(rows, int):
                        yield rows
            elif node.op_type in _KEEP_VALUE and position == 0:
                stack += [out for out in node.outputs if out not in seen]
                seen.update(node.outputs)
