"""Where attention happens in a region of the graph, and the key-value caches that belong to it.

An attention core is an `Attention` node (or one of its relatives from other domains), or a Softmax over
a product of two activations whose result weighs a third: what is left where raising declined.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import onnx_ir as ir

from netlathe.analysis import operators
from netlathe.analysis.flow import Flow

_SCORES = operators.ELEMENTWISE | operators.MOVEMENT
# Through these a key or value reaches its core from where the cache holds it.
_FROM_CACHE = operators.MOVEMENT | {"RotaryEmbedding"}
_APPENDS = frozenset({"Concat", "ScatterElements", "ScatterND", "TensorScatter"})
_PAST, _PRESENT = slice(4, 6), slice(1, 3)  # operands and results of Attention


@dataclass(frozen=True)
class Core:
    """One attention: the node (or the Softmax) and the keys and values it takes."""

    node: ir.Node
    keys_values: tuple[ir.Value, ...]


@dataclass(frozen=True)
class Caches:
    """Graph inputs that hold past keys and values, and graph outputs that hold present ones."""

    inputs: tuple[ir.Value, ...] = ()
    outputs: tuple[ir.Value, ...] = ()


def find_cores(flow: Flow, region: Collection[ir.Node]) -> list[Core]:
    """The attention cores among the nodes of ``region``."""
    inside = frozenset(region)
    return [core for node in region if (core := _core(flow, node, inside)) is not None]


def _core(flow: Flow, node: ir.Node, inside: frozenset[ir.Node]) -> Core | None:
    if node.op_type in operators.ATTENTION:
        return Core(node, tuple(v for v in node.inputs[1:3] if v is not None))
    if node.op_type != "Softmax":
        return None
    keys = [
        value
        for product in _backwards(node.inputs[0], inside)
        for value in product.inputs
        if value is not None
    ]
    values = list(_weighed(flow, node.outputs[0], inside))
    return Core(node, tuple(keys + values)) if keys and values else None


def _backwards(value: ir.Value | None, inside: frozenset[ir.Node]) -> Iterator[ir.Node]:
    """Products of two activations that the scores ``value`` come from."""
    stack, seen = [value], {value}
    while stack:
        current = stack.pop()
        maker = current.producer() if current is not None else None
        if maker is None or maker not in inside:
            continue
        if _multiplies_activations(maker):
            yield maker
        elif maker.op_type in _SCORES:
            stack += [v for v in maker.inputs if v not in seen]
            seen.update(maker.inputs)


def _weighed(flow: Flow, value: ir.Value, inside: frozenset[ir.Node]) -> Iterator[ir.Value]:
    """The other operands of the products that the probabilities ``value`` go into."""
    stack, seen = [value], {value}
    while stack:
        current = stack.pop()
        for node in flow.readers.get(current, ()):
            if node not in inside:
                continue
            if _multiplies_activations(node):
                yield from (v for v in node.inputs if v is not None and v is not current)
            elif node.op_type in _SCORES:
                stack += [v for v in node.outputs if v not in seen]
                seen.update(node.outputs)


def _multiplies_activations(node: ir.Node) -> bool:
    return node.op_type in ("Einsum", "MatMul") and not operators.has_weight(node)


# -- caches ---------------------------------------------------------------------------------------


def find_caches(flow: Flow, cores: Sequence[Core]) -> Caches:
    """The caches of these attentions, whoever else may read them too."""
    inputs: set[ir.Value] = set()
    outputs: set[ir.Value] = set()
    copies = partial(_copies, flow)
    for core in cores:
        attention = core.node.op_type == "Attention"
        held = list(_walk(core.keys_values, _made_from))
        present = core.node.outputs[_PRESENT] if attention else ()
        outputs.update(v for v in _walk((*held, *present), copies) if v.is_graph_output())
        past = [v for v in core.node.inputs[_PAST] if v is not None] if attention else []
        given = list(_walk(past, _made_from))
        # Past keys are appended to. Those of an encoder's states come in and go out as they are.
        given += [v for v in held if any(n.op_type in _APPENDS for n in flow.readers.get(v, ()))]
        given += [v for v in held if any(copy in outputs for copy in _walk([v], copies))]
        inputs.update(v for v in given if v.is_graph_input() and _is_floating(v))
    return Caches(
        tuple(v for v in flow.graph.inputs if v in inputs),
        tuple(v for v in flow.graph.outputs if v in outputs),
    )


def _walk(
    start: Sequence[ir.Value], step: Callable[[ir.Value], Iterator[ir.Value]]
) -> Iterator[ir.Value]:
    stack, seen = list(start), set(start)
    while stack:
        value = stack.pop()
        yield value
        for following in step(value):
            if following not in seen:
                seen.add(following)
                stack.append(following)


def _made_from(value: ir.Value) -> Iterator[ir.Value]:
    """What a key or value is put together from."""
    maker = value.producer()
    if maker is not None and maker.op_type in _FROM_CACHE:
        sources = maker.inputs if maker.op_type in _APPENDS else maker.inputs[:1]
        yield from (v for v in sources if v is not None)


def _copies(flow: Flow, value: ir.Value) -> Iterator[ir.Value]:
    """The same elements in another shape."""
    for node in flow.readers.get(value, ()):
        if node.op_type in operators.RESHAPES and node.inputs[0] is value:
            yield from node.outputs


def _is_floating(value: ir.Value) -> bool:
    return value.dtype is None or value.dtype.is_floating_point()
