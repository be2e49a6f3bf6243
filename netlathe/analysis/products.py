"""What reads a weight: the products and lookups, and which of its axes they sum over.

A reader may stand behind nodes that only move the weight (Transpose, Split, ...): a tied embedding is
looked up as it is and multiplied with after a Transpose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from netlathe.ir import edit
from netlathe.ir.provenance import module_path


@dataclass(frozen=True)
class Use:
    """A product or lookup that reads a weight, and the axes of the weight that it sums over.

    Of a table the axes are those that are summed over after the lookup, or the row it looks up.
    """

    node: ir.Node
    sums: frozenset[int]
    is_lookup: bool

    def __str__(self) -> str:
        path = module_path(self.node)
        return f"{self.node.op_type} in {path}" if path else f"{self.node.outputs[0].name}"


Axes = tuple[int | None, ...]  # for every axis of a value the axis of the weight that it is


def uses_of(weight: ir.Value) -> list[Use]:
    """The products and lookups that read an initializer, products first, in the order of its uses."""
    own: Axes = tuple(range(len(weight.shape or ())))
    found = []
    for node, position in weight.uses():
        if is_lookup(node, position):
            moved = _moved(node, position, own)
            inside = list(_products(node.outputs[0], moved)) if moved is not None else []
            sums = inside[0].sums if inside else frozenset({len(own) - 1})
            found.append(Use(node, sums, is_lookup=True))
        else:
            found += _read(node, position, own)
    return sorted(found, key=lambda use: use.is_lookup)


def is_lookup(node: ir.Node, position: int) -> bool:
    """Whether ``node`` looks rows up in its operand at ``position``, by its first axis."""
    if node.domain or position != 0:
        return False
    if node.op_type == "Gather":
        return node.attributes.get_int("axis", 0) == 0
    if node.op_type == "GatherND" and not node.attributes.get_int("batch_dims", 0):
        shape = None if node.inputs[1] is None else node.inputs[1].shape
        return shape is not None and len(shape) > 0 and shape[-1] == 1
    return False


def num_index_axes(lookup: ir.Node) -> int | None:
    """How many axes of its result a lookup puts in the place of the table's first; None if unknown."""
    indices = lookup.inputs[1]
    if indices is None or indices.shape is None:
        return None
    return len(indices.shape) - (lookup.op_type == "GatherND")


def _products(value: ir.Value, axes: Axes) -> Iterator[Use]:
    for node, position in value.uses():
        yield from _read(node, position, axes)


def _read(node: ir.Node, position: int, axes: Axes) -> Iterator[Use]:
    """The products that read an operand, through nodes that move it."""
    if node.domain:
        return
    rule = _PRODUCTS.get(node.op_type)
    if rule is not None:
        summed = rule(node, position, len(axes))
        sums = frozenset(axis for at in summed if (axis := axes[at]) is not None)
        if sums:
            yield Use(node, sums, is_lookup=False)
        return
    moved = _moved(node, position, axes)
    if moved is not None:
        for output in node.outputs:
            yield from _products(output, moved)


def _moved(node: ir.Node, position: int, axes: Axes) -> Axes | None:
    """The axes of the output of a node that only moves its first operand; None for any other."""
    rule = _MOVES.get(node.op_type) if position == 0 else None
    return None if rule is None else rule(node, axes)


def _transposed(node: ir.Node, axes: Axes) -> Axes | None:
    perm = node.attributes.get_ints("perm", tuple(reversed(range(len(axes)))))
    return tuple(axes[at] for at in perm or ())


def _gathered(node: ir.Node, axes: Axes) -> Axes | None:
    new, at = num_index_axes(node), node.attributes.get_int("axis", 0)
    if new is None or at is None or (node.op_type == "GatherND" and not is_lookup(node, 0)):
        return None
    return (*axes[:at], *(None,) * new, *axes[at + 1 :])


def _unsqueezed(node: ir.Node, axes: Axes) -> Axes | None:
    new = edit.const_array(node.inputs[1])
    if new is None:
        return None
    rank = len(axes) + new.size
    places = {int(axis) % rank for axis in new.reshape(-1)}
    rest = iter(axes)
    return tuple(None if at in places else next(rest) for at in range(rank))


def _squeezed(node: ir.Node, axes: Axes) -> Axes | None:
    gone = edit.const_array(node.inputs[1]) if len(node.inputs) > 1 else None
    if gone is None:
        return None
    places = {int(axis) % len(axes) for axis in gone.reshape(-1)}
    return tuple(axis for at, axis in enumerate(axes) if at not in places)


def _expanded(node: ir.Node, axes: Axes) -> Axes | None:
    shape = node.outputs[0].shape
    return None if shape is None else (*(None,) * (len(shape) - len(axes)), *axes)


_MOVES: Mapping[str, Callable[[ir.Node, Axes], Axes | None]] = {
    **dict.fromkeys(("Cast", "DequantizeLinear", "Identity"), lambda node, axes: axes),
    **dict.fromkeys(("Slice", "Split"), lambda node, axes: axes),
    "Expand": _expanded,
    "Gather": _gathered,
    "GatherND": _gathered,
    "Squeeze": _squeezed,
    "Transpose": _transposed,
    "Unsqueeze": _unsqueezed,
}

Summed = Callable[[ir.Node, int, int], frozenset[int]]  # (node, operand, its rank) -> its axes


def _matmul(node: ir.Node, position: int, rank: int) -> frozenset[int]:
    return frozenset({rank - 1 if position == 0 else max(rank - 2, 0)})


def _gemm(node: ir.Node, position: int, rank: int) -> frozenset[int]:
    if position > 1:
        return frozenset()
    swapped = bool(node.attributes.get_int("transB" if position else "transA", 0))
    return frozenset({int(swapped) if position else int(not swapped)})


def _conv(node: ir.Node, position: int, rank: int) -> frozenset[int]:
    return frozenset(range(1, rank)) if position == 1 else frozenset()  # [o, i/g, *k]


def _conv_transpose(node: ir.Node, position: int, rank: int) -> frozenset[int]:
    return frozenset(range(rank)) - {1} if position == 1 else frozenset()  # [i, o/g, *k]


def _recurrent(node: ir.Node, position: int, rank: int) -> frozenset[int]:
    return frozenset({2}) if position in (1, 2) else frozenset()  # [d, g h, i], [d, g h, h]


def _einsum(node: ir.Node, position: int, rank: int) -> frozenset[int]:
    equation = node.attributes.get_string("equation", "") or ""
    left, arrow, right = equation.replace(" ", "").partition("->")
    term = left.split(",")[position]
    if "..." in term:
        return frozenset()
    if not arrow:
        right = "".join(c for c in left if left.count(c) == 1)
    return frozenset(at for at, letter in enumerate(term) if letter not in right)


_PRODUCTS: Mapping[str, Summed] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "DeformConv": _conv,
    "Einsum": _einsum,
    "GRU": _recurrent,
    "Gemm": _gemm,
    "LSTM": _recurrent,
    "MatMul": _matmul,
    "RNN": _recurrent,
}
