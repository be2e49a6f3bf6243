"""Wrong rewrites: plausible mistakes, each made in what a pass has just edited.

A mutation names its site, so that it can be made again in any other run of the same pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.ir import edit, types, weights

Array = npt.NDArray[Any]
Apply = Callable[[ir.Model], None]


@dataclass(frozen=True)
class Mutation:
    """One mistake."""

    kind: str
    site: str  # the value or weight it is made at
    what: str
    apply: Apply = field(compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.kind} at {self.site}: {self.what}"


@dataclass(frozen=True)
class Scene:
    """A model before and after a pass: what the pass edited is where mistakes are made."""

    before: ir.Model
    after: ir.Model

    @cached_property
    def nodes(self) -> list[ir.Node]:
        """Nodes that the pass made or changed, and their neighbours, in that order."""
        known = {_signature(node) for node in self.before.graph}
        changed = [node for node in self.after.graph if _signature(node) not in known]
        read = [node for value in self._changed_weights for node, _ in value.uses()]
        first = dict.fromkeys([*changed, *read])
        near = dict.fromkeys(
            neighbour
            for node in first
            for value in (*node.inputs, *node.outputs)
            if value is not None
            for neighbour in (value.producer(), *value.consumers())
            if neighbour is not None and neighbour.graph is self.after.graph
        )
        return list(first | near)

    @cached_property
    def weights(self) -> list[ir.Value]:
        """Floats and bytes that the pass made or changed, and what its nodes read, in that order."""
        read = [value for node in self.nodes for value in node.inputs]
        held = [value for value in read if value is not None and weights.is_weight(value)]
        found = dict.fromkeys([*self._changed_weights, *held])
        return [value for value in found if value.dtype in _NUMBERS and _array(value).size > 1]

    @cached_property
    def _changed_weights(self) -> list[ir.Value]:
        old = self.before.graph.initializers
        return [
            value
            for name, value in self.after.graph.initializers.items()
            if name not in old or old[name].const_value is not value.const_value
        ]

    @cached_property
    def values(self) -> list[ir.Value]:
        """All values that nodes make, in order."""
        return [value for node in self.after.graph for value in node.outputs]


_NUMBERS = frozenset(
    {
        ir.DataType.FLOAT,
        ir.DataType.FLOAT16,
        ir.DataType.BFLOAT16,
        ir.DataType.INT8,
        ir.DataType.UINT8,
    }
)


def _signature(node: ir.Node) -> tuple[object, ...]:
    read = tuple(None if value is None else value.name for value in node.inputs)
    made = tuple((value.name, value.dtype) for value in node.outputs)
    attributes = tuple(sorted((name, str(a.value)) for name, a in node.attributes.items()))
    return (node.op_type, read, made, attributes)


# -- finding sites again, and editing them ------------------------------------------------------------


def _node(model: ir.Model, output: str) -> ir.Node:
    for node in model.graph:
        if any(value.name == output for value in node.outputs):
            return node
    raise KeyError(output)


def _value(model: ir.Model, name: str) -> ir.Value:
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        if value.name == name:
            return value
    return next(value for value in _node(model, name).outputs if value.name == name)


def _array(value: ir.Value) -> Array:
    return weights.array(value)


def _set(value: ir.Value, array: Array) -> None:
    """Give a constant other contents; the ones it had stay as they are."""
    tensor = value.const_value
    assert tensor is not None
    made = np.ascontiguousarray(array.astype(tensor.numpy().dtype)).reshape(array.shape)
    value.const_value = ir.Tensor(made, dtype=tensor.dtype, name=value.name)
    value.shape = ir.Shape(array.shape)


def _on_weight(name: str, function: Callable[[Array], Array]) -> Apply:
    def apply(model: ir.Model) -> None:
        value = model.graph.initializers[name]
        _set(value, function(_array(value).copy()))

    return apply


def _on_node(output: str, function: Callable[[ir.Model, ir.Node], None]) -> Apply:
    def apply(model: ir.Model) -> None:
        function(model, _node(model, output))

    return apply


def _operand(output: str, index: int, array: Array) -> Apply:
    """Let one operand be another constant, for its node only."""

    def function(model: ir.Model, node: ir.Node) -> None:
        held = node.inputs[index]
        assert held is not None and held.const_value is not None
        tensor = ir.Tensor(np.ascontiguousarray(array), dtype=held.const_value.dtype)
        node.replace_input_with(index, edit.constant(model.graph, tensor, f"{held.name}_wrong"))

    return _on_node(output, function)


def _bypass(output: str, index: int = 0) -> Apply:
    """Let an operand stand for the node's output."""

    def function(model: ir.Model, node: ir.Node) -> None:
        source = node.inputs[index]
        assert source is not None
        edit.redirect(node.outputs[0], source)
        edit.remove_dead(model.graph, [node])

    return _on_node(output, function)


def _set_attribute(output: str, name: str, value: Any) -> Apply:
    def function(_: ir.Model, node: ir.Node) -> None:
        node.attributes[name] = ir.convenience.convert_attribute(name, value)

    return _on_node(output, function)


def _name(node: ir.Node) -> str:
    return node.outputs[0].name or ""


# -- literals and indices -----------------------------------------------------------------------------

_WITH_LITERALS = frozenset(
    "Expand Pad ReduceMean ReduceSum Reshape Slice Split Squeeze Tile Unsqueeze".split()
)


def stale_literals(scene: Scene, rng: np.random.Generator) -> Iterator[Mutation]:
    """A shape, size or position that is not what it should be any more."""
    for node in scene.nodes:
        for index, value in enumerate(node.inputs):
            held = edit.const_array(value) if node.op_type in _WITH_LITERALS and index else None
            if held is None or held.dtype != np.int64 or held.ndim != 1 or not held.size:
                continue
            for wrong in _wrong_literals(held, node):
                what = f"input {index} of {node.op_type} {held.tolist()} became {wrong.tolist()}"
                apply = _operand(_name(node), index, wrong)
                yield Mutation("stale literal", _name(node), what, apply)


def _wrong_literals(held: Array, node: ir.Node) -> Iterator[Array]:
    for at in range(len(held)):
        wrong = held.copy()
        if held[at] == 0 and node.op_type == "Reshape":
            wrong[at] = 2  # the batch of the sample, baked in
        elif held[at] % 2 == 0 and held[at] > 2 and node.op_type == "Reshape":
            wrong[at] = held[at] // 2
        else:
            wrong[at] = held[at] + 1 if held[at] < 2**62 else -1
        yield wrong
    for at in range(len(held) - 1):
        if held[at] != held[at + 1]:
            wrong = held.copy()
            wrong[at], wrong[at + 1] = held[at + 1], held[at]
            yield wrong


def shifted_indices(scene: Scene, rng: np.random.Generator) -> Iterator[Mutation]:
    """What is looked up is the neighbour."""
    for node in scene.nodes:
        if node.op_type not in ("Gather", "GatherND", "GatherElements"):
            continue
        index, data = edit.const_array(node.inputs[1]), node.inputs[0]
        if index is None or data is None or data.shape is None or not index.size:
            continue
        axis = node.attributes.get_int("axis", 0)
        rows = data.shape[axis]
        if isinstance(rows, int) and rows > 1:
            wrong = np.where(index < 0, (index % rows + 1) % rows, (index + 1) % rows)
            what = f"indices of {node.op_type} moved by one"
            yield Mutation("shifted index", _name(node), what, _operand(_name(node), 1, wrong))


# -- weights ------------------------------------------------------------------------------------------


def transposed_weights(scene: Scene, rng: np.random.Generator) -> Iterator[Mutation]:
    """A weight handled on the wrong axis: transposed, moved by one, or off by a position."""
    for value in scene.weights:
        name, array = value.name or "", _array(value)
        if array.ndim >= 2 and array.shape[-1] > 1 and array.shape[-2] > 1:
            shape = array.shape
            yield Mutation(
                "weight transposed",
                name,
                f"its last two axes {shape[-2:]} swapped",
                _on_weight(name, lambda a: np.swapaxes(a, -1, -2).reshape(a.shape)),
            )
        for axis in range(array.ndim):
            if array.shape[axis] > 1:
                yield Mutation(
                    "weight off by one",
                    name,
                    f"moved by one along axis {axis}",
                    _on_weight(name, lambda a, axis=axis: np.roll(a, 1, axis)),
                )


def stale_weights(scene: Scene, rng: np.random.Generator) -> Iterator[Mutation]:
    """A weight that was not edited, or got what belongs to another."""
    old, new = scene.before.graph.initializers, scene.after.graph.initializers
    for value in scene.weights:
        name, array = value.name or "", _array(value)
        if name in old and old[name].const_value is not value.const_value:
            was = _array(old[name])
            if was.shape == array.shape and was.dtype == array.dtype:
                yield Mutation(
                    "stale weight",
                    name,
                    "has what it had before the pass",
                    _on_weight(name, lambda _, was=was: was),
                )
        for other in new.values():
            if other is value or other.dtype != value.dtype or not weights.is_weight(other):
                continue
            theirs = _array(other)
            if theirs.shape == array.shape:
                what = f"has what belongs to {other.name}"
                apply = _on_weight(name, lambda _, theirs=theirs: theirs)
                yield Mutation("another's weight", name, what, apply)
                break


def perturbed_elements(scene: Scene, rng: np.random.Generator) -> Iterator[Mutation]:
    """One number of a weight is a few percent off, or has the wrong sign."""
    for value in scene.weights:
        name, array = value.name or "", _array(value)
        sizes = np.abs(array.astype(np.float64)).reshape(-1)
        large = np.flatnonzero(sizes >= np.median(sizes[sizes > 0])) if sizes.any() else ()
        if not len(large):
            continue
        at = int(rng.choice(large))
        integer = array.dtype.kind in "iu"
        for what, factor in (("3 percent off", 1.03), ("of the wrong sign", -1.0)):

            def function(
                a: Array, at: int = at, factor: float = factor, integer: bool = integer
            ) -> Array:
                flat = a.reshape(-1)
                moved = float(flat[at]) * factor
                if integer:  # at least one step
                    info = np.iinfo(a.dtype)
                    moved = np.clip(
                        moved if factor < 0 else flat[at] + np.sign(float(flat[at]) or 1) * 3,
                        info.min,
                        info.max,
                    )
                flat[at] = a.dtype.type(moved)
                return flat.reshape(a.shape)

            index = [int(i) for i in np.unravel_index(at, array.shape)]
            yield Mutation(
                "element perturbed", name, f"{index} is {what}", _on_weight(name, function)
            )


def swapped_entries(scene: Scene, rng: np.random.Generator) -> Iterator[Mutation]:
    """Two entries of a scale or bias have changed places, or all have moved to the neighbour."""
    for value in scene.weights:
        name, array = value.name or "", _array(value)
        flat = array.astype(np.float64).reshape(-1)
        if array.ndim == 0 or array.size != max(array.shape) or flat.min() == flat.max():
            continue
        a, b = int(flat.argmin()), int(flat.argmax())

        def swap(array: Array, a: int = a, b: int = b) -> Array:
            flat = array.reshape(-1)
            flat[[a, b]] = flat[[b, a]]
            return flat.reshape(array.shape)

        yield Mutation("scales swapped", name, f"entries {a} and {b}", _on_weight(name, swap))


def broken_ties(scene: Scene, rng: np.random.Generator) -> Iterator[Mutation]:
    """One of several readers of a weight reads what it was before, or a copy gone its own way."""
    old = scene.before.graph.initializers
    for value in scene.weights:
        name, uses = value.name or "", list(value.uses())
        if len(uses) < 2 or _array(value).dtype.kind in "iu":
            continue
        array = _array(value)
        was = _array(old[name]) if name in old else array
        stale = was.shape == array.shape and not np.array_equal(was, array)
        copied = was if stale else (array.astype(np.float64) * 1.02).astype(array.dtype)
        for node, index in uses:
            if node.graph is not scene.after.graph:
                continue
            what = f"{node.op_type} {_name(node)} reads {'the old one' if stale else 'a copy'}"
            yield Mutation("tie broken", name, what, _operand(_name(node), index, copied))


# -- nodes --------------------------------------------------------------------------------------------


def lost_biases(scene: Scene, rng: np.random.Generator) -> Iterator[Mutation]:
    """A constant that was added is added no more."""
    for node in scene.nodes:
        if node.op_type == "Add" and weights.is_weight(node.inputs[1]):
            what = f"Add {node.inputs[1] and node.inputs[1].name} is gone"
            if _same_type(node.inputs[0], node.outputs[0]):
                yield Mutation("bias lost", _name(node), what, _bypass(_name(node)))
        position = {"Conv": 2, "ConvTranspose": 2, "LayerNormalization": 2}.get(node.op_type)
        if position is not None and len(node.inputs) > position and node.inputs[position]:
            apply = _on_node(_name(node), lambda _, n, p=position: n.resize_inputs(p))
            yield Mutation("bias lost", _name(node), f"that of {node.op_type}", apply)


def stale_attributes(scene: Scene, rng: np.random.Generator) -> Iterator[Mutation]:
    """An attribute has another value than the edit called for."""
    for node in scene.nodes:
        for name, attribute in node.attributes.items():
            if attribute.is_ref():
                continue
            for wrong in _wrong_attributes(node, name, attribute.value):
                what = f"{name} of {node.op_type} {attribute.value} became {wrong}"
                apply = _set_attribute(_name(node), name, wrong)
                yield Mutation("stale attribute", _name(node), what, apply)


def _wrong_attributes(node: ir.Node, name: str, value: Any) -> Iterator[Any]:
    rank = (
        len(node.inputs[0].shape) if node.inputs and node.inputs[0] and node.inputs[0].shape else 0
    )
    if name == "axis":
        yield from (axis for axis in (value - 1, value + 1) if 0 <= axis < rank)
    elif name == "epsilon":
        yield from (wrong for wrong in (value * 100, 1e-5) if abs(wrong / value - 1) > 0.5)
    elif name in ("scale", "alpha") and isinstance(value, float):
        yield value * float(np.sqrt(2))
    elif name == "softcap":
        yield 5.0
    elif name in ("is_causal", "interleaved", "keepdims", "count_include_pad"):
        yield 1 - int(value)
    elif name == "group" and value > 1:
        yield 1
    elif name == "perm":
        for at in range(len(value) - 1):
            wrong = list(value)
            wrong[at], wrong[at + 1] = wrong[at + 1], wrong[at]
            yield wrong
    elif name == "pads":
        for at in range(len(value)):
            wrong = list(value)
            wrong[at] += 1 if wrong[at] == 0 else -1
            yield wrong
    elif name in ("strides", "dilations") and set(value) != {1}:
        yield [1] * len(value)
    elif name == "block_size" and value:
        yield value // 2
    elif name == "to":
        floats = [int(t) for t in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)]
        if int(value) in floats:
            yield from (other for other in floats if other != int(value))


def wrong_zero_points(scene: Scene, rng: np.random.Generator) -> Iterator[Mutation]:
    """Integers that mean another number."""
    for node in scene.nodes:
        if node.op_type != "DequantizeLinear":
            continue

        def function(model: ir.Model, node: ir.Node) -> None:
            data, scale = node.inputs[0], node.inputs[1]
            assert data is not None and scale is not None and data.dtype is not None
            held = edit.const_array(scale)
            if held is None:  # looked up: a zero point of the same shape is made from the scale
                one = edit.node("Sub", [scale, scale], dtype=scale.dtype)
                cast = edit.node(
                    "Cast", [one.outputs[0]], {"to": int(data.dtype)}, dtype=data.dtype
                )
                ones = edit.constant(model.graph, np.ones((), data.dtype.numpy()), "one")
                add = edit.node("Add", [cast.outputs[0], ones], dtype=data.dtype)
                for number, made in enumerate((one, cast, add)):
                    made.outputs[0].name = f"{_name(node)}_zero_{number}"
                    model.graph.insert_before(node, made)
                zero = add.outputs[0]
            else:
                ones = np.ones(held.shape, data.dtype.numpy())
                zero = edit.constant(model.graph, ones, f"{_name(node)}_zero")
            node.resize_inputs(3)
            node.replace_input_with(2, zero)

        apply = _on_node(_name(node), function)
        yield Mutation("wrong zero point", _name(node), "1 in place of 0", apply)


def missing_casts(scene: Scene, rng: np.random.Generator) -> Iterator[Mutation]:
    """A conversion is not there."""
    for node in scene.nodes:
        if node.op_type == "Cast":
            what = f"Cast of {node.inputs[0] and node.inputs[0].name} is gone"
            yield Mutation("missing cast", _name(node), what, _bypass(_name(node)))


def bypassed_nodes(scene: Scene, rng: np.random.Generator) -> Iterator[Mutation]:
    """A node is skipped that computes something."""
    for node in scene.nodes:
        if node.op_type in ("Cast", "Identity") or not node.inputs or len(node.outputs) != 1:
            continue
        for index, value in enumerate(node.inputs[:2]):
            if value is None or weights.is_weight(value):
                continue
            if _same_type(value, node.outputs[0]):
                what = f"input {index} of {node.op_type} stands for what it makes"
                apply = _bypass(_name(node), index)
                yield Mutation("node bypassed", _name(node), what, apply)


def neighbour_values(scene: Scene, rng: np.random.Generator) -> Iterator[Mutation]:
    """A node reads a value of another layer: of the same type, made earlier."""
    order = {value: at for at, value in enumerate(scene.values)}
    for node in scene.nodes:
        limit = order.get(node.outputs[0], 0)
        for index, value in enumerate(node.inputs):
            if value is None or weights.is_weight(value):
                continue
            alike = [
                other
                for other in (*scene.after.graph.inputs, *scene.values[:limit])
                if other is not value and other not in node.outputs and _same_type(other, value)
            ]
            if not alike:
                continue
            other = alike[int(rng.integers(len(alike)))]

            def function(
                model: ir.Model, n: ir.Node, i: int = index, o: str = other.name or ""
            ) -> None:
                n.replace_input_with(i, _value(model, o))

            what = f"input {index} of {node.op_type} is {other.name}, not {value.name}"
            apply = _on_node(_name(node), function)
            yield Mutation("neighbour's value", _name(node), what, apply)


_ORDERED = {
    "Attention": (1, 2),
    "BatchNormalization": (1, 2),
    "Concat": (0, 1),
    "Div": (0, 1),
    "LayerNormalization": (1, 2),
    "Less": (0, 1),
    "MatMul": (0, 1),
    "Pow": (0, 1),
    "RotaryEmbedding": (1, 2),
    "Sub": (0, 1),
    "Where": (1, 2),
}


def swapped_operands(scene: Scene, rng: np.random.Generator) -> Iterator[Mutation]:
    """Two operands have changed places."""
    for node in scene.nodes:
        pair = _ORDERED.get(node.op_type)
        if pair is None or len(node.inputs) <= pair[1]:
            continue
        a, b = (node.inputs[at] for at in pair)
        if a is None or b is None or a is b:
            continue

        def function(_: ir.Model, n: ir.Node, pair: tuple[int, int] = pair) -> None:
            first, second = (n.inputs[at] for at in pair)
            n.replace_input_with(pair[0], second)
            n.replace_input_with(pair[1], first)

        what = f"inputs {pair[0]} and {pair[1]} of {node.op_type}"
        yield Mutation("operands swapped", _name(node), what, _on_node(_name(node), function))


_OTHER_OPERATOR = {
    "Add": "Sub",
    "Max": "Min",
    "Min": "Max",
    "Mul": "Add",
    "Relu": "Abs",
    "Sub": "Add",
}


def wrong_operators(scene: Scene, rng: np.random.Generator) -> Iterator[Mutation]:
    """One operator in the place of another."""
    for node in scene.nodes:
        other = _OTHER_OPERATOR.get(node.op_type)
        if other is None or node.outputs[0].dtype == ir.DataType.BOOL:
            continue

        def function(model: ir.Model, n: ir.Node, other: str = other) -> None:
            output = n.outputs[0]
            made = edit.node(other, n.inputs, dtype=output.dtype, shape=output.shape)
            edit.replace(n, [made], {output: made.outputs[0]}, "")
            made.outputs[0].name = made.outputs[0].name or edit.unique_name(model.graph, "wrong")

        what = f"{node.op_type} became {other}"
        yield Mutation("wrong operator", _name(node), what, _on_node(_name(node), function))


# -- the interface ------------------------------------------------------------------------------------


def swapped_ends(scene: Scene, rng: np.random.Generator) -> Iterator[Mutation]:
    """Two inputs or outputs of one type (the caches of two layers) have changed places."""
    graph = scene.after.graph
    for kind, ends in (("outputs", graph.outputs), ("inputs", graph.inputs)):
        for at, first in enumerate(ends):
            for second in ends[at + 1 :]:
                if not _same_type(first, second):
                    continue

                def apply(
                    model: ir.Model,
                    kind: str = kind,
                    a: str = first.name or "",
                    b: str = second.name or "",
                ) -> None:
                    _swap_outputs(model, a, b) if kind == "outputs" else _swap_inputs(model, a, b)

                what = f"changed places with {second.name}"
                yield Mutation(f"{kind} swapped", first.name or "", what, apply)


def _swap_outputs(model: ir.Model, a: str, b: str) -> None:
    outputs = model.graph.outputs
    first, second = (next(v for v in outputs if v.name == name) for name in (a, b))
    i, j = (list(outputs).index(value) for value in (first, second))
    first.name = second.name = None
    outputs[i], outputs[j] = second, first
    first.name, second.name = b, a


def _swap_inputs(model: ir.Model, a: str, b: str) -> None:
    first, second = _value(model, a), _value(model, b)
    uses = [(first, list(second.uses())), (second, list(first.uses()))]
    for value, readers in uses:
        for node, index in readers:
            node.replace_input_with(index, value)


def _same_type(a: ir.Value | None, b: ir.Value | None) -> bool:
    if a is None or b is None or a.dtype is None or a.dtype != b.dtype:
        return False
    first, second = types.recorded(a).shape, types.recorded(b).shape
    return first is not None and first == second


KINDS: Sequence[Callable[[Scene, np.random.Generator], Iterator[Mutation]]] = (
    stale_literals,
    shifted_indices,
    transposed_weights,
    stale_weights,
    perturbed_elements,
    swapped_entries,
    broken_ties,
    lost_biases,
    stale_attributes,
    wrong_zero_points,
    missing_casts,
    bypassed_nodes,
    neighbour_values,
    swapped_operands,
    wrong_operators,
    swapped_ends,
)


def choose(scene: Scene, count: int, rng: np.random.Generator) -> list[Mutation]:
    """Up to ``count`` different mutations, as evenly over the kinds as there are sites."""
    pools = [list(dict.fromkeys(kind(scene, rng))) for kind in KINDS]
    for pool in pools:
        rng.shuffle(pool)  # type: ignore[arg-type]  # a list of anything is shuffled in place
    chosen: list[Mutation] = []
    while len(chosen) < count and any(pools):
        for pool in pools:
            if pool and len(chosen) < count:
                chosen.append(pool.pop())
    return chosen
