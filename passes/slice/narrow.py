"""The edit: weights take in the bases of their segments, and the directions that are not kept go.

With the kept columns Q of a segment's basis, ``[d, k]``, a weight that reads the stream becomes Q'W, one
that writes to it W Q, an adapter between two segments Q'Q_next. All else (norms, attributes, literals) is
what :func:`netlathe.analysis.axes.delete` does for d - k positions of the channels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.analysis.axes import Stretch, delete
from netlathe.analysis.axes.algebra import Axis, find
from netlathe.analysis.axes.basis import along
from netlathe.ir import weights
from netlathe.passes.slice.bases import Basis
from netlathe.passes.slice.segments import Layout

Array = npt.NDArray[Any]
Turn = tuple[int, Axis, Axis, Basis]  # a dim, its axis, the atom in it that turns, and by what


def narrow(layout: Layout, bases: Sequence[tuple[Stretch, Basis]], device: str = "cpu") -> None:
    """Turn each stretch by a square basis or its first columns; ``layout`` is stale afterwards.

    Weights become recipes: float64 products on ``device`` whenever they are read.
    """
    turns: dict[ir.Value, list[Turn]] = {}
    for stretch, basis in bases:
        for value, dim in stretch.weights:
            axis = layout.axes.related.axes[value][dim]
            turns.setdefault(value, []).append((dim, axis, stretch.group.atom, basis))
    before = {value: value.const_value for value in turns}
    gone = {
        stretch.group: range(basis.shape[1], stretch.group.size)
        for stretch, basis in bases
        if basis.shape[1] < stretch.group.size
    }
    if gone:
        delete(layout.axes, gone)
    for value, wanted in turns.items():
        base, narrowed = before[value], value.const_value
        assert base is not None and narrowed is not None
        recipe = _recipe(wanted, base.dtype, device)
        shape = narrowed.shape.numpy()
        value.const_value = weights.derived(base, recipe, base.dtype, shape, value.name or "")


def _recipe(turns: Sequence[Turn], dtype: ir.DataType, device: str) -> Callable[[Array], Array]:
    on_device = device != "cpu" and all(find(axis) is atom for _, axis, atom, _ in turns)

    def change(array: Array) -> Array:
        if on_device:
            return _on_device(array, turns, device)
        wide = array.astype(np.float64)
        for dim, axis, atom, basis in turns:
            wide = along(wide, dim, axis, atom, partial(_contracted, basis=basis))
        return wide.astype(dtype.numpy())

    return change


def _contracted(array: Array, dim: int, basis: Basis) -> Array:
    """A dim with a basis."""
    turned = np.moveaxis(array, dim, -1) @ basis.astype(np.float64)
    return np.moveaxis(turned, -1, dim)


def _on_device(array: Array, turns: Sequence[Turn], device: str) -> Array:
    """The same where every dim is the channels themselves; the float64 copies are on the device."""
    import torch

    from netlathe.execute.torch_ops.storage import from_numpy

    given = from_numpy(array, device)
    wide = given.to(torch.float64)
    for dim, _, _, basis in turns:
        matrix = from_numpy(basis, device).to(torch.float64)
        wide = torch.movedim(torch.movedim(wide, dim, -1) @ matrix, -1, dim)
    made: Array = wide.to(given.dtype).contiguous().cpu().numpy()
    return made


def sizes(layout: Layout, kept: Mapping[str, int], names: Mapping[str, Stretch]) -> int:
    """Parameters of the model when each named stretch keeps so many directions, adapters included."""
    from netlathe.analysis.axes import Selection
    from netlathe.analysis.cost import is_parameter

    wanted = {names[name].group.atom: np.arange(count) for name, count in kept.items()}
    selection = Selection(wanted)
    read: dict[ir.Value | None, set[int]] = defaultdict(
        set
    )  # sizes that a shared vector is needed in
    for (node, index), (axis,) in layout.axes.related.copies.items():
        read[node.inputs[index]].add(int(selection.size(axis)))
    total = 0
    for value in layout.model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or not is_parameter(value):
            continue
        axes = layout.axes.related.axes.get(value)
        if axes is None:
            total += sum(read[value]) if value in read else tensor.size
            continue
        count = 1
        for axis in axes:
            count *= int(selection.size(axis))
        total += count
    return total
