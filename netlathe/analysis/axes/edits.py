"""Deletes or reorders positions of axis groups, everywhere at once.

Weights become recipes over the ones they were, literals and attributes get the new sizes, constant
positions are renumbered, and every value is typed anew. What stays computes what it computed:

* RMSNormalization and its kin divide by a root mean square over d positions. Where d' are left,
  those that went counted as zeros: the scale is multiplied by sqrt(d / d'), epsilon by d / d'
  (x / sqrt(S/d + e) = sqrt(d/d') x / sqrt(S/d' + e d/d') for a sum of squares S).
* The scale of an Attention is written out in normal form and stays.
* Ids that the caller gives stay what they were: a map of them to the positions that are left stands in
  front of what is looked up by them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.analysis.axes.algebra import Axis, find
from netlathe.analysis.axes.bind import Relation
from netlathe.analysis.axes.groups import Axes, Group
from netlathe.analysis.axes.relate import Edit, Use
from netlathe.analysis.axes.selection import Positions, Selection
from netlathe.analysis.axes.signature import taken
from netlathe.diagnostics import Diagnostic, PassError
from netlathe.ir import edit, types, weights

Array = npt.NDArray[Any]


def delete(
    axes: Axes,
    positions: Mapping[Group, Sequence[int]],
    stand_ins: Mapping[Group, Positions] | None = None,
) -> None:
    """Remove positions of groups from the model that was analysed; ``axes`` is stale afterwards.

    Groups whose positions the caller numbers, in ids that he gives and outputs that he gets, lose some
    only with ``stand_ins``: for every position the one that is looked up for it, itself where it stays.
    He goes on giving the ids there were; what comes out is numbered anew.

    Raises:
        PassError: a group is pinned, or a dim would be left without a position.
    """
    kept: dict[Group, Positions] = {}
    stand_ins = stand_ins or {}
    for group, removed in positions.items():
        _check_allowed(group, "delete", by_caller=group in stand_ins)
        keep = np.setdiff1d(np.arange(group.size), np.asarray(removed, np.int64))
        if len(keep) + len(set(removed)) != group.size:
            raise ValueError(f"{group.name} has no such position among {sorted(set(removed))}")
        if len(keep) < group.least:
            raise PassError(
                Diagnostic(
                    "axes.empty",
                    f"{len(keep)} of {group.size} positions of {group.name} would be left,"
                    f" {group.least} must stay",
                    at=_members(group),
                )
            )
        if len(keep) < group.size:
            kept[group] = keep
    _map_ids(axes, kept, stand_ins)
    _select(axes, kept)


def permute(axes: Axes, order: Mapping[Group, Sequence[int]]) -> None:
    """Reorder positions of groups: the one at ``order[i]`` comes to stand at i.

    Raises:
        PassError: a group is pinned.
    """
    for group, wanted in order.items():
        _check_allowed(group, "permute")
        if sorted(wanted) != list(range(group.size)):
            raise ValueError(f"not an order of the {group.size} positions of {group.name}")
    _select(axes, {group: np.asarray(wanted, np.int64) for group, wanted in order.items()})


def _check_allowed(group: Group, kind: Edit, *, by_caller: bool = False) -> None:
    pins = [pin for pin in group.forbidding(kind) if not (pin.caller and by_caller)]
    if pins:
        raise PassError(
            Diagnostic(
                "axes.pinned",
                f"{kind} is not possible: {pins[0].reason}",
                at=_members(group),
                where=pins[0].where,
                notes=tuple(pin.reason for pin in pins[1:4]),
            )
        )


def _members(group: Group) -> str:
    shown = [f"{member.value.name}:{member.dim}" for member in group.members[:3]]
    more = len(group.members) - len(shown)
    return f"{group.name} = " + ", ".join(shown) + (f" and {more} more" if more else "")


# -- the edit -------------------------------------------------------------------------------------------


def _select(axes: Axes, order: Mapping[Group, Positions]) -> None:
    """Let every axis have the wanted positions of its groups, in the wanted order."""
    related, model = axes.related, axes.model
    kept = Selection({group.atom: positions for group, positions in order.items()})
    _check_dims(axes, kept)
    for value in list(model.graph.initializers.values()):
        if value in related.axes and value.const_value is not None:
            _select_weight(value, related.axes[value], kept)
    _select_copies(related.copies, kept)
    _correct_norms([each for each in related.relations if each.signature.normalizes], kept)
    literals: dict[tuple[ir.Node, int], dict[int, int]] = defaultdict(dict)
    for use in related.uses:
        if kept.of(use.axis) is not None:
            _set_use(use, int(kept.size(use.axis)), literals)
    for (node, operand), numbers in literals.items():
        listed = node.inputs[operand]
        assert listed is not None
        _replace(node, operand, _with_numbers(listed, numbers))
    for listing in related.listings:
        positions = kept.of(listing.axis)
        if positions is not None:
            _renumber(
                listing.node, listing.operand, positions, listing.axis, kept.of(listing.order)
            )
    for past, _ in related.caches:
        _set_shape(past, [kept.size(axis) for axis in related.axes[past]])
    types.annotate(model)


def _check_dims(axes: Axes, kept: Selection) -> None:
    for value, dims in axes.related.axes.items():
        for dim, axis in enumerate(dims):
            if kept.size(axis) == 0 and axis.size != 0:
                raise PassError(
                    Diagnostic(
                        "axes.empty",
                        f"dim {dim} of {value.name} would be left without a position",
                        at=f"{value.name}: {axes.term(value, dim)}",
                    )
                )


def _select_weight(value: ir.Value, axes: Sequence[Axis], kept: Selection) -> None:
    wanted = {dim: at for dim, axis in enumerate(axes) if (at := kept.of(axis)) is not None}
    if not wanted:
        return
    base = value.const_value
    assert base is not None
    shape = [int(kept.size(axis)) for axis in axes]

    def select(array: Array) -> Array:
        for dim, positions in wanted.items():
            array = np.take(array, positions, axis=dim)
        return array

    value.const_value = weights.derived(base, select, base.dtype, shape, value.name or "")
    _set_shape(value, shape)


def _select_copies(copies: Mapping[tuple[ir.Node, int], Sequence[Axis]], kept: Selection) -> None:
    """Give every reader of a shared vector of equal elements one of the size it needs now."""
    made: dict[tuple[ir.Value, int], ir.Value] = {}
    for (node, index), (axis,) in copies.items():
        positions, value = kept.of(axis), node.inputs[index]
        if positions is None or value is None or len(positions) == axis.size:
            continue
        key = value, len(positions)
        if key not in made:
            made[key] = _constant_like(value, weights.array(value)[: len(positions)])
        _replace(node, index, made[key])


def _set_shape(value: ir.Value, shape: Sequence[Any]) -> None:
    assert value.shape is not None
    value.shape = ir.Shape(
        [new if isinstance(new, int) else old for old, new in zip(value.shape, shape, strict=True)]
    )


# -- attributes and literals ----------------------------------------------------------------------------


def _set_use(use: Use, size: int, literals: dict[tuple[ir.Node, int], dict[int, int]]) -> None:
    if isinstance(use.spot, str):
        use.node.attributes[use.spot] = ir.AttrInt64(use.spot, size)
    else:
        operand, element = use.spot
        literals[use.node, operand][element] = size


def _with_numbers(value: ir.Value, numbers: Mapping[int, int]) -> ir.Value:
    """A value that is ``value`` but for some elements, which stand in constants inside it.

    Others may read the same constant and mean another axis by it, so nothing is changed in place.
    """
    held = edit.const_array(value)
    if held is not None:
        flat = held.reshape(-1).copy()
        for element, number in numbers.items():
            flat[element] = number
        return _constant_like(value, flat.reshape(held.shape))
    node = value.producer()
    assert node is not None
    inputs = list(node.inputs)
    if node.op_type == "Concat":
        start = 0
        for index, part in enumerate(node.inputs):
            assert part is not None and part.shape is not None
            count = part.shape[0]
            assert isinstance(count, int)  # origin() came through here
            end = start + count
            inside = {at - start: number for at, number in numbers.items() if start <= at < end}
            inputs[index] = _with_numbers(part, inside) if inside else part
            start = end
    else:
        assert inputs[0] is not None
        if node.op_type in ("Gather", "Slice"):
            places = {taken(node, element): number for element, number in numbers.items()}
            numbers = {at: number for at, number in places.items() if at is not None}
        inputs[0] = _with_numbers(inputs[0], numbers)
    graph = _graph(node)
    made = edit.node(
        node.op_type,
        inputs,
        {name: attribute.value for name, attribute in node.attributes.items()},
        name=edit.unique_name(graph, value.name or "sizes"),
        dtype=value.dtype,
        shape=value.shape,
        like=node,
    )
    graph.insert_after(node, made)
    return made.outputs[0]


def _constant_like(value: ir.Value, array: Array) -> ir.Value:
    """A constant with other contents; one that holds them already is shared."""
    graph = value.graph
    assert isinstance(graph, ir.Graph)
    return edit.constant(graph, array, value.name or "literal")


def _replace(node: ir.Node, operand: int, value: ir.Value) -> None:
    """Let a node read another list of sizes; the one before goes if nobody reads it now."""
    before = node.inputs[operand]
    node.replace_input_with(operand, value)
    if before is None:
        return
    maker = before.producer()
    if maker is not None:
        edit.remove_dead(_graph(maker), [maker])
    edit.drop_if_unread(before)


def _renumber(
    node: ir.Node, operand: int, kept: Positions, axis: Axis, order: Positions | None
) -> None:
    """Constant positions of an axis, of which those that are left have moved."""
    value = node.inputs[operand]
    held = edit.const_array(value)
    assert held is not None and value is not None
    flat = held.reshape(-1) % axis.size
    if order is not None:
        flat = flat[order]
    moved = np.full(int(axis.size), -1, np.int64)
    moved[kept] = np.arange(len(kept))
    column = held.ndim == 2  # GatherND lists its positions one a row
    shape = (-1, 1) if column else (() if held.ndim == 0 else (-1,))
    _replace(node, operand, _constant_like(value, moved[flat].astype(held.dtype).reshape(shape)))


def _map_ids(
    axes: Axes, kept: Mapping[Group, Positions], stand_ins: Mapping[Group, Positions]
) -> None:
    """Let lookups of groups read ids through a map: old position to the new one of its stand-in."""
    maps: dict[bytes, ir.Value] = {}
    mapped: dict[tuple[ir.Value, ir.Value], ir.Value] = {}
    for lookup in axes.related.lookups:
        group = axes.by_atom.get(find(lookup.axis))
        if group is None or group not in kept:
            continue
        new = np.full(group.size, -1, np.int64)
        new[kept[group]] = np.arange(len(kept[group]))
        array = new[stand_ins[group]]
        if array.min() < 0:
            raise ValueError(f"a position of {group.name} that is removed stands in for another")
        node, ids = lookup.node, lookup.node.inputs[1]
        assert ids is not None
        if (key := array.tobytes()) not in maps:
            maps[key] = edit.constant(_graph(node), array, f"{lookup.ids.name}/map")
        if (at := (maps[key], ids)) not in mapped:
            name = edit.unique_name(_graph(node), f"{ids.name}/mapped")
            made = edit.node(
                "Gather", at, name=name, dtype=ir.DataType.INT64, shape=ids.shape, like=node
            )
            _graph(node).insert_before(node, made)
            mapped[at] = made.outputs[0]
        node.replace_input_with(1, mapped[at])


def _graph(node: ir.Node) -> ir.Graph:
    assert isinstance(node.graph, ir.Graph)
    return node.graph


# -- normalizations -------------------------------------------------------------------------------------


def _correct_norms(relations: Sequence[Relation], kept: Selection) -> None:
    """Let every normalization over an edited axis count the positions that went as zeros."""
    factors: dict[ir.Value, dict[ir.Node, float]] = defaultdict(dict)
    for relation in relations:
        ratio = 1.0
        for letter in relation.letters(relation.signature.normalizes):
            axis = relation.axes[letter]
            ratio *= float(axis.size / kept.size(axis))  # a dynamic part is in both
        if ratio != 1.0:
            node, scale = relation.node, relation.node.inputs[1]
            assert scale is not None
            epsilon = node.attributes.get_float("epsilon", 1e-5)
            node.attributes["epsilon"] = ir.AttrFloat32("epsilon", epsilon * ratio)
            factors[scale][node] = math.sqrt(ratio)
    for scale, wanted in factors.items():
        _scale(scale, wanted)


def _scale(value: ir.Value, wanted: Mapping[ir.Node, float]) -> None:
    """Multiply what nodes read as their scale (input 1), each by its factor."""
    same = len(set(wanted.values())) == 1
    if weights.is_weight(value) and same and len(wanted) == len(value.uses()):
        value.const_value = _multiplied(value, next(iter(wanted.values())))
        return
    for node, factor in wanted.items():
        graph, name = _graph(node), f"{value.name}_scaled"
        if weights.is_weight(value):
            scaled = edit.constant(graph, _multiplied(value, factor), name)
        else:
            assert value.dtype is not None
            number = edit.constant(graph, np.array(factor, value.dtype.numpy()), f"{name}_by")
            made = edit.node("Mul", [value, number], name=edit.unique_name(graph, name), like=node)
            graph.insert_before(node, made)
            scaled = made.outputs[0]
        node.replace_input_with(1, scaled)
    edit.drop_if_unread(value)


def _multiplied(value: ir.Value, factor: float) -> ir.LazyTensor:
    base = value.const_value
    assert base is not None

    def multiply(array: Array) -> Array:
        return (array.astype(np.float64) * factor).astype(array.dtype)

    return weights.derived(base, multiply, base.dtype, base.shape.numpy(), value.name or "")
