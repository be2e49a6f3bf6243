"""Residual branches: what a model adds to a stream of activations, and what goes if it does not.

    for branch in residual_branches(model):
        print(branch.kind, branch.module_path, branch.reason or "can be removed")

A stream is split, one copy goes through a branch, and an Add joins the two: ``y = x + f(x)``. Which
operand is the stream is decided by the flow alone: it is the one that the other is computed from. So
every spelling is found, on any graph:

    pre-norm     y = x + f(norm(x))                post-norm    y = norm(x + f(x))
    parallel     y = x + f(norm(x)) + g(norm(x))   scaled       y = a * x + b * f(x)

A branch does work: it contracts with weights, attends, pools, or loops. What is computed element by
element (a GELU written out), a bias, a positional embedding that does not come from the stream, and the
sum of two streams that both go on are no branches. A sum inside a branch stays whole (experts and a
shared expert), but an attention and an FFN that run in parallel are two branches of one block.

What a branch reads besides the stream does not depend on the stream (masks, rotary tables, an encoder's
states, past keys), and what is made on its way may be read elsewhere too. Removing it is always the
same: the rest of the sum takes the sum's place, and what nothing needs any more goes. Inputs and outputs
of the model stay, but for the key-value cache of an attention that is gone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import onnx_ir as ir

from netlathe.analysis import operators
from netlathe.analysis.blocks import number_blocks
from netlathe.analysis.cores import Caches, Core, find_caches, find_cores
from netlathe.analysis.flow import Flow
from netlathe.analysis.removal import Operand, Removal, remove
from netlathe.ir import dims, weights
from netlathe.ir.printing import show_type
from netlathe.ir.provenance import module_path

Kind = Literal["attention", "ffn", "conv", "other"]


@dataclass(frozen=True, eq=False)
class Branch:
    """One term of a sum on a residual stream. Without ``reason`` it can be removed.

    ``nodes`` and ``weights`` are what goes if this branch alone is removed; :func:`removal` tells it for
    several at once, which is more where they share something, and which caches go.
    """

    kind: Kind  # "attention" attends; "ffn" multiplies by weights; "conv" only convolves
    term: Operand  # which operand of which Add the branch's value is
    split: ir.Value  # the stream, where the branch leaves it
    skip: ir.Value  # the stream, where it enters the sum: split, or split scaled or reshaped
    total: ir.Value  # the stream after the sum; the join's output unless branches are parallel
    norm: ir.Node | None  # post-norm only: the norm that alone reads total. It stays.
    region: tuple[ir.Node, ...]  # all nodes from split to value, in order
    nodes: tuple[ir.Node, ...]  # what nothing else needs, in order
    weights: tuple[ir.Value, ...]  # initializers that only these nodes read
    cache_inputs: tuple[ir.Value, ...]  # past keys and values that it reads
    cache_outputs: tuple[ir.Value, ...]  # present keys and values that it reads
    crosses: bool  # attends to something that is not computed from the stream
    module_path: str  # of what does the work: "model.layers.3.mlp"
    block: int = -1  # branches with the same number belong together
    reason: str = ""  # why it cannot be removed

    @property
    def join(self) -> ir.Node:
        """The Add that takes the branch in."""
        return self.term.node

    @property
    def value(self) -> ir.Value:
        """What the branch adds."""
        return self.term.value

    @property
    def rest(self) -> ir.Value:
        """The join's other operand: it takes the place of the sum if the branch is removed."""
        return self.term.other.value

    @property
    def is_parallel(self) -> bool:
        """Whether the sum has terms besides the stream and this branch."""
        return self.rest is not self.skip or self.total is not self.join.outputs[0]

    @property
    def channel_axis(self) -> int:
        """Which axis of the stream holds the channels: 1 of feature maps, else the last."""
        alike = {self.split}
        for node in self.region:
            if node.inputs[0] not in alike:
                continue
            if node.op_type in operators.CHANNELS_FIRST:
                return 1
            if node.op_type in operators.ELEMENTWISE:
                alike.update(node.outputs)
        return -1


def residual_branches(model: ir.Model) -> list[Branch]:
    """Every residual branch of the main graph, in the order of the sums that they enter.

    ``model`` is typed and in normal form. Branches may nest: the join of one lies in the region of
    another, which then is of kind "other" unless what it holds only convolves.
    """
    flow = Flow(model.graph)
    absorbed: set[ir.Node] = set()
    found: list[Branch] = []
    for node in reversed(flow.nodes):  # a sum's last Add comes first, and takes its inner ones
        if _is_add(node) and node not in absorbed:
            found += reversed(list(_of_sum(flow, node, absorbed)))
    found = _settle_nested(list(reversed(found)))
    splits = {branch.split for branch in found}
    found = [replace(branch, norm=_post_norm(branch, splits)) for branch in found]
    numbers = number_blocks(found)
    return [replace(b, block=number) for b, number in zip(found, numbers, strict=True)]


def removal(model: ir.Model, branches: Iterable[Branch]) -> Removal:
    """What goes if all ``branches`` of ``model`` are removed together."""
    branches = list(branches)
    inputs = dict.fromkeys(value for branch in branches for value in branch.cache_inputs)
    outputs = dict.fromkeys(value for branch in branches for value in branch.cache_outputs)
    terms = [branch.term for branch in branches]
    return remove(Flow(model.graph), terms, Caches(tuple(inputs), tuple(outputs)))


# -- sums -----------------------------------------------------------------------------------------


@dataclass
class _Sum:
    """A stream, the terms added to it, and the Adds that do it."""

    stream: Operand
    terms: list[Operand]
    adds: list[ir.Node] = field(default_factory=list)


def _operands(node: ir.Node) -> tuple[Operand, Operand]:
    return Operand(node, 0), Operand(node, 1)


def _is_add(node: ir.Node) -> bool:
    """Whether a node adds two activations. A bias, which is constant, belongs to its other operand."""
    dtype = node.outputs[0].dtype if node.outputs else None
    return (
        node.op_type == "Add"
        and node.domain == ""
        and not any(weights.is_weight(value) for value in node.inputs)
        and (dtype is None or dtype.is_floating_point())
    )


def _readers(value: ir.Value) -> list[ir.Node]:
    """The nodes that read ``value`` itself, once per operand; its shape does not count."""
    return [use.node for use in value.uses() if use.node.op_type not in operators.TELL_SIZES]


def _inner(value: ir.Value) -> ir.Node | None:
    """The Add that makes ``value``, if only the sum that it is part of reads it."""
    maker = value.producer()
    if maker is None or not _is_add(maker) or value.is_graph_output():
        return None
    return maker if len(_readers(value)) == 1 else None


def _sum(flow: Flow, last: ir.Node) -> _Sum | None:
    """The sum on a stream that ends in ``last``, if it is one.

    The stream is an operand that the other is computed from, else the stream of an inner sum (as in
    ``(x + f(x)) + g(x)``) if the other operand is computed from that.
    """
    for stream, term in (_operands(last), _operands(last)[::-1]):
        if _from_stream(flow, term.value, stream):
            terms, adds = _by_kind(flow, term, stream)
            return _Sum(stream, terms, [last, *adds])
    for use, other in (_operands(last), _operands(last)[::-1]):
        node = _inner(use.value)
        inner = _sum(flow, node) if node is not None else None
        if inner is not None and _from_stream(flow, other.value, inner.stream):
            terms, adds = _by_kind(flow, other, inner.stream)
            return _Sum(inner.stream, inner.terms + terms, [last, *inner.adds, *adds])
    return None


def _by_kind(flow: Flow, term: Operand, stream: Operand) -> tuple[list[Operand], list[ir.Node]]:
    """``term``, or the terms of the inner sum that it is if they are of two kinds; and that sum."""
    inner = _inner(term.value)
    if inner is None:
        return [term], []
    regions = [_from_stream(flow, use.value, stream) for use in _operands(inner)]
    kinds = [_kind(flow, region) for region in regions if region]
    if len(kinds) < 2 or kinds[0] == kinds[1]:
        return [term], []
    both = [_by_kind(flow, use, stream) for use in _operands(inner)]
    return both[0][0] + both[1][0], [inner, *both[0][1], *both[1][1]]


def _from_stream(flow: Flow, value: ir.Value, stream: Operand) -> tuple[ir.Node, ...]:
    """The region from ``stream`` to ``value``; empty where there is none that does work."""
    _, region = _way(flow, stream, value)
    return region if _kind(flow, region) is not None else ()


def _way(flow: Flow, stream: Operand, value: ir.Value) -> tuple[ir.Value, tuple[ir.Node, ...]]:
    """Where ``value`` leaves the stream (before it is reshaped or scaled, if need be), and the way."""
    for split in _same_data(stream.value):
        region = flow.between(split, value)
        if region:
            return split, region
    return stream.value, ()


def _same_data(value: ir.Value) -> Iterator[ir.Value]:
    """``value`` and what it is a reshaped or scaled copy of, nearest first."""
    while True:
        yield value
        maker = value.producer()
        if maker is None or maker.inputs[0] is None:
            return
        if maker.op_type not in operators.RESHAPES and not operators.is_scaling(maker):
            return
        value = maker.inputs[0]


# -- branches -------------------------------------------------------------------------------------


def _of_sum(flow: Flow, last: ir.Node, absorbed: set[ir.Node]) -> Iterator[Branch]:
    found = _sum(flow, last)
    if found is None:
        yield from _with_projection(flow, last)
        return
    absorbed.update(found.adds)
    for term in sorted(found.terms, key=lambda use: flow.position(use.value)):
        # What others read as well is a stream that goes on: a sum of two streams.
        if all(len(_readers(value)) == 1 for value in _same_data(term.value)):
            split, region = _way(flow, found.stream, term.value)
            reason = _type_reason(term)
            yield _branch(flow, term, split, region, found.stream.value, last.outputs[0], reason)


def _branch(
    flow: Flow,
    term: Operand,
    split: ir.Value,
    region: tuple[ir.Node, ...],
    skip: ir.Value,
    total: ir.Value,
    reason: str,
) -> Branch:
    kind = _kind(flow, region)
    assert kind is not None  # the region does work
    cores = find_cores(flow, region)
    caches = find_caches(flow, cores)
    gone = remove(flow, [term], caches)
    return Branch(
        kind=kind,
        term=term,
        split=split,
        skip=skip,
        total=total,
        norm=None,
        region=region,
        nodes=gone.nodes,
        weights=gone.weights,
        cache_inputs=caches.inputs,
        cache_outputs=caches.outputs,
        crosses=any(_crosses(core, region) for core in cores),
        module_path=_path(region, cores) or module_path(term.node),
        reason=reason or gone.reason,
    )


def _works(node: ir.Node) -> bool:
    """Whether a node does more than elementwise arithmetic, or what it does is not known."""
    return node.op_type in operators.WORKING or node.domain not in ("", "ai.onnx")


def _kind(flow: Flow, region: Sequence[ir.Node]) -> Kind | None:
    """What a region does; None if it does no work."""
    working = [node for node in region if _works(node)]
    if not working:
        return None
    if find_cores(flow, region):
        return "attention"
    if any(node.op_type in operators.SEQUENTIAL for node in working):
        return "other"
    weighted = {node.op_type for node in working if operators.has_weight(node)}
    if weighted & operators.PRODUCTS:
        return "ffn"
    return "conv" if weighted & operators.CONVOLUTIONS else "other"


def _crosses(core: Core, region: Iterable[ir.Node]) -> bool:
    """Whether no key or value is computed from the stream."""
    inside = set(region)
    return not any(value.producer() in inside for value in core.keys_values[-2:])


def _path(region: Sequence[ir.Node], cores: Sequence[Core]) -> str:
    """The module that holds all nodes that contract or attend."""
    working = {core.node for core in cores}
    working.update(n for n in region if _works(n) and operators.has_weight(n))
    paths = [path.split(".") for node in working if (path := module_path(node))]
    common = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def _type_reason(term: Operand) -> str:
    """Why the rest of a sum cannot take the place of the sum."""
    total, rest = term.node.outputs[0], term.other.value
    if total.shape is None or rest.shape is None or total.dtype is None:
        return "the shape of its stream is not known"
    a, b = ([dims.from_ir(dim) for dim in value.shape or ()] for value in (total, rest))
    if len(a) != len(b) or not all(dims.same(x, y) for x, y in zip(a, b, strict=True)):
        return f"without it the stream is {show_type(rest)} and not {show_type(total)}"
    return ""


# Operators of a shortcut that changes the stream but computes nothing that is not linear.
_LINEAR = operators.RESHAPES | {"AveragePool", "BatchNormalization", "Pad", "Slice"}


def _with_projection(flow: Flow, last: ir.Node) -> Iterator[Branch]:
    """The branch of ``y = p(x) + f(x)`` with a linear p, which cannot be removed.

    In the first block of a ResNet's stage p is a strided convolution.
    """
    split = flow.dominator(last)
    if split is None:
        return
    first, second = _operands(last)
    for shortcut, term in ((first, second), (second, first)):
        way = flow.between(split, shortcut.value)
        region = flow.between(split, term.value)
        projects = any(_works(node) for node in way)
        if projects and all(map(_is_linear, way)) and not all(map(_is_linear, region)):
            if _kind(flow, region) is None:
                continue
            done = ", ".join(dict.fromkeys(node.op_type for node in way))
            reason = f"its shortcut is not the stream itself ({done})"
            yield _branch(flow, term, split, region, shortcut.value, last.outputs[0], reason)
            return


def _is_linear(node: ir.Node) -> bool:
    if node.op_type in operators.PRODUCTS or node.op_type in operators.CONVOLUTIONS:
        return operators.has_weight(node)
    if node.op_type in ("Add", "Mul"):
        return weights.is_weight(node.inputs[1])
    return node.op_type in _LINEAR


# -- among branches -------------------------------------------------------------------------------


def _settle_nested(found: Sequence[Branch]) -> list[Branch]:
    """What holds an attention branch or several FFN branches (a stage, a network) is "other"."""
    kinds = {branch.join: branch.kind for branch in found}
    settled = []
    for branch in found:
        held = [kinds[node] for node in branch.region if node in kinds]
        stage = "attention" in held or held.count("ffn") > 1
        settled.append(replace(branch, kind="other") if stage else branch)
    return settled


def _post_norm(branch: Branch, splits: set[ir.Value]) -> ir.Node | None:
    readers = _readers(branch.total)
    if len(readers) != 1 or branch.total.is_graph_output():
        return None
    (norm,) = readers
    if norm.op_type not in operators.NORMS or norm.inputs[0] is not branch.total:
        return None
    # The final norm of a pre-norm model also alone reads the stream, but its branches start with one.
    entry = [node for node in branch.region if branch.split in node.inputs]
    starts = all(node.op_type in operators.NORMS for node in entry)
    return norm if norm.outputs[0] in splits or not starts else None
