"""Which weights have their zeros in a pattern: a record that backends read, and that is never out of date.

    found = sparsity_of(matmul.inputs[1])  # Sparsity("2:4", axis=0, rows=1, density=0.5), or None

A weight is seen as matrices ``[rows, axis]``, one for each position of its other dims. ``axis`` is the
axis that products sum over, ``rows`` one that they keep:

    unstructured    zeros anywhere
    N:M             of every M elements in a row along ``axis`` at most N are not zero
    RxC             zeros fill tiles of R elements along ``rows`` and C along ``axis``

The record lies in the metadata of the value that products read: an initializer, or what is dequantized
from codes. It travels with the ONNX file. The zeros are looked at before it is told, and after every
pass of a pipeline: a pass that fills them, or moves them out of their pattern, drops the record by that.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.ir import fold, weights

Array = npt.NDArray[Any]
_KEY = "netlathe.sparsity"
_SEEN = "netlathe.sparsity_seen"  # in the meta of a tensor: the record that its zeros keep
_AT_ONCE = 1 << 22  # elements looked at at a time

_N_OF_M = re.compile(r"(\d+):(\d+)")
_TILES = re.compile(r"(\d+)x(\d+)")


@dataclass(frozen=True)
class Pattern:
    """Where zeros may be: all but ``n`` of ``m`` in a row, tiles of ``m`` rows by ``n``, or anywhere."""

    kind: str  # "unstructured", "n:m" or "tiles"
    n: int = 1
    m: int = 1

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """The pattern of ``unstructured``, ``2:4`` or ``4x4``.

        Raises:
            ValueError: it is none, or leaves nothing out.
        """
        if text == "unstructured":
            return cls("unstructured")
        if found := _N_OF_M.fullmatch(text):
            n, m = map(int, found.groups())
            if not 0 < n < m:
                raise ValueError(
                    f"{text} keeps {n} of every {m} elements: N must be from 1 to M - 1"
                )
            return cls("n:m", n, m)
        if found := _TILES.fullmatch(text):
            rows, columns = map(int, found.groups())
            if rows * columns < 2:
                raise ValueError(
                    f"{text} is a tile of {rows * columns} elements: it needs two or more"
                )
            return cls("tiles", columns, rows)
        raise ValueError(
            f"{text!r} is no pattern: give unstructured, N:M such as 2:4, or RxC such as 4x4"
        )

    @property
    def row_multiple(self) -> int:
        """What the number of rows must be a multiple of."""
        return self.m if self.kind == "tiles" else 1

    @property
    def column_multiple(self) -> int:
        """What the length of a row must be a multiple of."""
        return {"unstructured": 1, "n:m": self.m, "tiles": self.n}[self.kind]

    def __str__(self) -> str:
        if self.kind == "n:m":
            return f"{self.n}:{self.m}"
        return f"{self.m}x{self.n}" if self.kind == "tiles" else self.kind


@dataclass(frozen=True)
class Sparsity:
    """What is known of a weight's zeros; ``density`` is the share of elements that are not zero."""

    pattern: str
    axis: int
    rows: int
    density: float

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return dataclasses.asdict(self)


def record(value: ir.Value, pattern: str, axis: int, rows: int) -> Sparsity:
    """Write down that the zeros of a constant are in a pattern, which they must be.

    Raises:
        ValueError: they are not.
    """
    found = _look(value, pattern, axis, rows)
    if found is None:
        raise ValueError(f"the zeros of {value.name} are not {pattern} along axis {axis}")
    _write(value, found)
    return found


def sparsity_of(value: ir.Value | None) -> Sparsity | None:
    """What was recorded of a weight and is still so; None of what has no record, or has lost it."""
    if value is None or (text := value.metadata_props.get(_KEY)) is None:
        return None
    held = Sparsity(**json.loads(text))
    if value.const_value is not None and value.const_value.meta.get(_SEEN) == text:
        return held
    found = _look(value, held.pattern, held.axis, held.rows)
    if found == held and value.const_value is not None:
        value.const_value.meta[_SEEN] = text
    return found


def forget(value: ir.Value) -> None:
    """Drop the record of a value."""
    value.metadata_props.pop(_KEY, None)


def recorded(model: ir.Model) -> Iterator[ir.Value]:
    """The values that have a record, true or not."""
    for graph in model.graphs():
        for value in (*graph.initializers.values(), *(v for n in graph for v in n.outputs)):
            if _KEY in value.metadata_props:
                yield value


def table(model: ir.Model) -> list[dict[str, Any]]:
    """All weights that are sparse, as plain data by name: what a manifest tells."""
    found = [(value.name, sparsity_of(value)) for value in recorded(model)]
    return [{"weight": name, **held.to_json()} for name, held in found if held is not None]


def carry(before: ir.Model, after: ir.Model, renamed: Mapping[str, str | None]) -> None:
    """Bring the records of ``before`` up to date in ``after``, and drop those that are not true any more.

    What was made of a weight is found by its name, or by what ``renamed`` says that it is called.
    """
    old = {value.name or "": value.metadata_props[_KEY] for value in recorded(before)}
    if not old:
        return
    names = {renamed.get(name, name): text for name, text in old.items()}
    for graph in after.graphs():
        for value in (*graph.initializers.values(), *(v for n in graph for v in n.outputs)):
            text = value.metadata_props.get(_KEY) or names.get(value.name or "")
            if text is None:
                continue
            held = Sparsity(**json.loads(text))
            tensor = value.const_value
            if tensor is not None and tensor.meta.get(_SEEN) == text:
                value.metadata_props[_KEY] = text
                continue
            found = _look(value, held.pattern, held.axis, held.rows)
            forget(value)
            if found is not None:
                _write(value, found)


def density(array: Array) -> float:
    """The share of elements that are not zero."""
    return float(np.count_nonzero(array)) / max(1, array.size)


def keeps(array: Array, pattern: Pattern, axis: int, rows: int) -> bool:
    """Whether the zeros of an array are in a pattern; of tiles, that some are all zero."""
    if pattern.kind == "unstructured":
        return bool((array == 0).any())
    if array.shape[axis] % pattern.column_multiple or array.shape[rows] % pattern.row_multiple:
        return False
    view = as_matrices(array, axis, rows)
    if pattern.kind == "tiles":
        full = tiles(view != 0, pattern).any(axis=(-1, -2))
        # A zero outside of a zero tile is chance: a weight may be exactly zero.
        inside = (full.size - np.count_nonzero(full)) * pattern.m * pattern.n
        return bool(inside > 0 and 2 * inside >= np.count_nonzero(array == 0))
    flat = view.reshape(-1, pattern.m)
    step = max(1, _AT_ONCE // pattern.m)
    return all(
        int(np.count_nonzero(flat[at : at + step], axis=1).max(initial=0)) <= pattern.n
        for at in range(0, len(flat), step)
    )


def as_matrices(array: Array, axis: int, rows: int) -> Array:
    """A view ``[others..., rows, axis]``."""
    others = [at for at in range(array.ndim) if at not in (axis, rows)]
    return np.transpose(array, [*others, rows, axis])


def tiles(view: Array, pattern: Pattern) -> Array:
    """``[..., rows, columns]`` as ``[..., row of tiles, column of tiles, m, n]``."""
    *others, rows, columns = view.shape
    cut = view.reshape(*others, rows // pattern.m, pattern.m, columns // pattern.n, pattern.n)
    return np.swapaxes(cut, -3, -2)


def _look(value: ir.Value, pattern: str, axis: int, rows: int) -> Sparsity | None:
    """The record as it is now, from the contents; None where they do not keep the pattern."""
    array = contents(value)
    if array is None or max(axis, rows) >= array.ndim or math.prod(array.shape) == 0:
        return None
    if not keeps(array, Pattern.parse(pattern), axis, rows):
        return None
    return Sparsity(pattern, axis, rows, density(array))


def _write(value: ir.Value, found: Sparsity) -> None:
    text = json.dumps(found.to_json(), sort_keys=True)
    value.metadata_props[_KEY] = text
    if value.const_value is not None:
        value.const_value.meta[_SEEN] = text


def contents(value: ir.Value) -> Array | None:
    """What a constant holds, or what nodes make of constants, as a quantized weight is; else None."""
    if weights.is_weight(value):
        return weights.array(value)
    return fold.evaluate(value)
