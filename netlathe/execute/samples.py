"""Valid inputs for a model whose author left none: ids inside their table, masks with a padded tail.

Lengths say the same as masks: how much of each row is no padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
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
    """The free dims of the graph inputs by name, each with a default size (batch 2, others 16).

    A batch is what is called so, and the first dim of an input whose other dims are all fixed.
    """
    names = dict.fromkeys(name for value in model.graph.inputs for name in free_dims(value))
    leading = {name for v in model.graph.inputs if _only_first_is_free(v) for name in free_dims(v)}
    return {
        name: _DEFAULT_BATCH if "batch" in name or name in leading else _DEFAULT_SIZE
        for name in names
    }


def _only_first_is_free(value: ir.Value) -> bool:
    dims_behind = (value.shape or ())[1:]
    return bool(dims_behind) and all(isinstance(dim, int) for dim in dims_behind)


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
    names: list[str] = []
    for dim in value.shape or ():
        parsed = dims.from_ir(dim)
        if isinstance(parsed, sympy.Expr):
            names += sorted(map(str, parsed.free_symbols))
    return list(dict.fromkeys(names))


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
    return {v.name: _make(v, full, rng) for v in model.graph.inputs if v.name}


def _make(value: ir.Value, sizes: Mapping[str, int], rng: np.random.Generator) -> npt.NDArray[Any]:
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
    if "length" in name and len(shape) == 1:
        own = free_dims(value)
        if others := [size for dim, size in sizes.items() if dim not in own]:
            return np.maximum(1, min(others) - np.arange(shape[0])).astype(dtype)
    bounds = list(_table_rows(value))
    top = max(1, min([*bounds, np.iinfo(dtype).max])) if bounds else 2
    return _ids(top, shape, rng).astype(dtype)


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
