"""What can be pruned: axis groups sorted into scopes by structure, with the weights that know them.

A candidate is one axis group (:class:`netlathe.analysis.axes.Group`) whose positions can go: the channels
of a convolution, the neurons of an FFN, heads, experts. Its positions are numbered from 0 to ``size`` - 1,
whatever they are in a tensor: of 8 heads of 64, position 3 is rows 192 to 255 of a projection. ``Part``
holds, for every weight that has the axis, which of its rows belong to which position.

The scope is read off the operators that see the axis, and off nothing else:

``experts``    TopK picks positions of it
``kv_groups``  Attention has it as key/value heads that several query heads share
``heads``      Attention has it as its heads, or as the query heads of each key/value head; or it counts
               products of two activations
``vocab``      the caller numbers its positions: ids that are looked up, logits and classes that come out
``hidden``     residual branches are added along it
``channels``   a convolution makes it or sums over it
``ffn``        any other axis that one product of weights makes and another one sums over

The width of a head is in no scope: attention without some of it is no smaller number of heads.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.analysis.axes import Axes, Group, Pin
from netlathe.analysis.axes.algebra import Axis, Product, Size, atoms, find, parts, resized
from netlathe.analysis.axes.bind import Relation
from netlathe.analysis.axes.relate import linear_inputs, terms_of
from netlathe.analysis.branches import residual_branches
from netlathe.analysis.cost import Meter, is_parameter, trains
from netlathe.ir import weights
from netlathe.ir.provenance import module_path

Positions: TypeAlias = npt.NDArray[np.int64]
Scores: TypeAlias = npt.NDArray[np.float64]
Scope = Literal["channels", "ffn", "heads", "kv_groups", "experts", "hidden", "vocab"]
Role = Literal["writes", "reads", "acts", "holds"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
_CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})


@dataclass(frozen=True, eq=False)
class Part:
    """A dim of a weight along which positions of a candidate lie.

    ``role`` says what the weight is to the axis:

    ``writes``  a product or a lookup that makes it: its output has the axis, its other operand has not
    ``reads``   a product that sums over it: ``activation`` is what the weight is multiplied with, None
                where that is a weight too, and ``axis`` the dim of the activation that is summed over
    ``acts``    works on each position by itself: a bias, a gain, batch-norm statistics, a depthwise
                kernel, the groups of a grouped convolution
    ``holds``   a slice for each position: an expert's weights, a row of a table
    """

    value: ir.Value  # the initializer
    dim: int
    role: Role
    node: ir.Node  # the operator that computes with it; the weight may reach it through moves
    index: Positions  # [size of the dim]: the position that a row belongs to; -1: to none
    activation: ir.Value | None = None  # of "reads": the other operand
    axis: int = 0  # of "reads": the activation's dim that is summed over
    bias: ir.Value | None = None  # of "writes": the bias that the operator itself adds (Conv)

    def rows(self, position: int) -> Positions:
        """The rows of ``value`` along ``dim`` that belong to a position."""
        return np.flatnonzero(self.index == position)


@dataclass(frozen=True, eq=False)
class Candidate:
    """An axis group that may lose positions.

    ``least`` positions must stay, and what stays must be a multiple of ``multiple``. ``parameters`` and
    ``macs`` are those of one position while nothing else is pruned (all positions cost the same).
    """

    name: str  # unique in the model: "model.layers.0.mlp:ffn", "hidden"
    scope: Scope
    where: str  # module path that its weights have in common
    group: Group
    axes: Axes
    size: int
    least: int
    multiple: int
    parameters: int
    macs: int
    parts: tuple[Part, ...]
    factors: frozenset[Axis] = frozenset()  # what stands beside it in a product
    pins: tuple[Pin, ...] = ()  # why no position can go

    def with_role(self, role: Role) -> list[Part]:
        """The parts of one role, in the order in which the graph reads them."""
        return [part for part in self.parts if part.role == role]

    @property
    def writers(self) -> list[Part]:
        """Weights whose product makes the axis."""
        return self.with_role("writes")

    @property
    def readers(self) -> list[Part]:
        """Weights that sum over the axis."""
        return self.with_role("reads")

    @property
    def quantized(self) -> str:
        """The first weight that holds integers of a quantized operator; scores look at real numbers."""
        own = (part.value for part in self.parts if part.role != "acts")
        held = (v for v in own if v.dtype is not None and not v.dtype.is_floating_point())
        return next((value.name or "" for value in held), "")

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """The module paths of all that has the axis; ``ignore`` patterns look at these."""
        paths = [module_path(part.value) for part in self.parts]
        return tuple(dict.fromkeys(path for path in (self.where, *paths) if path))

    def index(self, value: ir.Value, dim: int) -> Positions:
        """For each row of a dim of any value of the model the position it belongs to; -1: to none.

        A statistic ``s`` over the channels of an activation becomes one per position by
        ``np.bincount(index[index >= 0], s[index >= 0], minlength=size)``.
        """
        return index_of(self.axes.related.axes[value][dim], self.group.atom)

    def widths(self) -> list[int]:
        """How many positions may stay, ascending; all of them is the last."""
        first = max(1, -(-self.least // self.multiple)) * self.multiple
        return [*range(first, self.size, self.multiple), self.size]

    def fit(self, count: float) -> int:
        """The width nearest to ``count`` that may stay; of two the wider one.

        0 where ``count`` is less than half of the least position: nothing would be left.
        """
        if count < 0.5:
            return 0
        step = self.multiple
        first = max(1, -(-self.least // step)) * step
        below = max(first, int(count // step) * step)
        near = [width for width in (below, below + step) if width < self.size]
        return min((*near, self.size), key=lambda width: (abs(width - count), -width))

    def best(self, scores: Scores, count: int) -> Positions:
        """The ``count`` positions of the highest scores, ascending; of equal ones the first."""
        order = np.argsort(-scores, kind="stable")
        return np.sort(order[:count]).astype(np.int64)


def find_candidates(
    axes: Axes, *, multiple: int = 1, sizes: Mapping[str, int] | None = None
) -> list[Candidate]:
    """All candidates of a model, in the order of its nodes; what cannot be pruned is among them.

    ``multiple`` is what every width should be a multiple of, ``sizes`` those of dynamic dims (for MACs).
    """
    return list(_Finder(axes, multiple, sizes).run())


def index_of(axis: Axis, atom: Axis) -> Positions:
    """For each position of an axis the position of the atom it has; -1 where it has none."""
    axis = find(axis)
    if axis is find(atom):
        return np.arange(int(axis.size), dtype=np.int64)
    if axis.form is None or all(one is not find(atom) for one in atoms(axis)):
        return np.full(int(axis.size), -1, np.int64)
    if isinstance(axis.form, Product):
        found = np.full(1, -1, np.int64)
        for factor in axis.form.factors:
            inner = index_of(factor, atom)
            found = np.maximum(found[:, None], inner[None, :]).reshape(-1)
        return found
    return np.concatenate([index_of(part, atom) for part in parts(axis)])


# -- finding them -----------------------------------------------------------------------------------


class _Finder:
    def __init__(self, axes: Axes, multiple: int, sizes: Mapping[str, int] | None) -> None:
        self.axes = axes
        self.multiple = multiple
        self.meter = Meter(axes.model, sizes)
        self.places: dict[tuple[ir.Value, int], list[tuple[Relation, str, int]]] = defaultdict(list)
        for relation in axes.related.relations:
            for letter, slots in relation.slots.items():
                for slot in slots:
                    if not slot.output:
                        at = slot.value(relation.node), slot.dim
                        self.places[at].append((relation, letter, slot.operand))
        self.residual = {
            group
            for branch in residual_branches(axes.model)
            if branch.skip in axes.related.axes
            for group in axes.of(branch.skip, branch.channel_axis)
        }
        # Atoms beside each other in a product, and the terms that each is a factor of.
        self.terms: dict[Axis, list[Axis]] = defaultdict(list)
        for group in axes.groups:
            for member in group.members:
                if member.value in axes.related.axes:
                    axis = find(axes.related.axes[member.value][member.dim])
                    self.terms[group.atom].append(axis)

    def run(self) -> Iterator[Candidate]:
        taken = Counter[str]()
        for group in self.axes.groups:
            if group.size < 2:
                continue  # one head that all queries share: it can only stay
            of = tuple(self._parts(group))
            scope = self._scope(group, of)
            if scope is None:
                continue
            where = _common([path for p in of if (path := module_path(p.value))])
            name = f"{where}:{scope}" if where else scope
            taken[name] += 1
            if taken[name] > 1:
                name += f".{taken[name]}"
            yield Candidate(
                name=name,
                scope=scope,
                where=where,
                group=group,
                axes=self.axes,
                size=group.size,
                least=max(group.least, 1),
                multiple=self._multiple(group),
                parameters=self._parameters(group),
                macs=self._macs(group),
                parts=of,
                factors=self._factors(group),
                pins=tuple(group.forbidding("delete")),
            )

    # -- parts --------------------------------------------------------------------------------------

    def _parts(self, group: Group) -> Iterator[Part]:
        for member in group.members:
            value = member.value
            if not weights.is_weight(value) or value not in self.axes.related.axes:
                continue
            found: set[Role] = set()
            for part in self._followed(group, value, member.dim):
                if part.role not in found:
                    found.add(part.role)
                    yield part

    def _followed(self, group: Group, weight: ir.Value, dim: int) -> Iterator[Part]:
        """What a dim of a weight comes to, through the nodes that move it."""
        index = index_of(self.axes.related.axes[weight][dim], group.atom)
        stack, seen = [(weight, dim)], {(weight, dim)}
        while stack:
            value, at = stack.pop()
            for relation, letter, operand in self.places[value, at]:
                if group.atom not in atoms(relation.axes[letter]):
                    continue
                outs = [slot for slot in relation.slots[letter] if slot.output]
                if self._moves(relation, operand):
                    more = [(slot.value(relation.node), slot.dim) for slot in outs]
                    stack += [place for place in more if place not in seen]
                    seen.update(more)
                    if not outs:
                        yield Part(weight, dim, "holds", relation.node, index)
                    continue
                yield _part(relation, letter, operand, weight, dim, index)

    def _moves(self, relation: Relation, operand: int) -> bool:
        """Whether a node hands an operand on as it is: an expert's weights, but no row of a table."""
        signature = relation.signature
        if relation.node.op_type == "DequantizeLinear":
            return operand == 0
        if not signature.moves or operand not in linear_inputs(signature.linear):
            return False
        known = self.axes.related.positions
        reads = [relation.node.inputs[index] for index in signature.reads]
        return all(value in known or _is_constant(value) for value in reads)

    # -- scopes -------------------------------------------------------------------------------------

    def _scope(self, group: Group, of: Sequence[Part]) -> Scope | None:
        letters = self.axes.letters[group.atom]
        seen = {(relation.node.op_type, letter) for relation, letter in letters}
        if ("TopK", "n") in seen and of:
            return "experts"
        writes = any(part.role == "writes" for part in of)
        reads = any(part.role == "reads" for part in of)
        if ("Attention", "n") in seen and writes:
            shared = any(_shares_heads(r) for r, letter in letters if letter == "n")
            return "kv_groups" if shared else "heads"
        if ("Attention", "r") in seen and writes:
            return "heads"
        if any(op == "Attention" for op, _ in seen):
            return None
        if self._is_vocab(group, of):
            return "vocab"
        if group in self.residual and (writes or reads):
            return "hidden"
        if writes and any(_counts_products(r, letter) for r, letter in letters):
            return "heads"
        if any(_inside_products(r, letter) for r, letter in letters):
            return None
        makers = {part.node.op_type for part in of if part.role in ("writes", "reads")}
        if makers & _CONVOLUTIONS and (writes or reads):
            return None if any(_is_window(r, letter) for r, letter in letters) else "channels"
        if writes and reads:
            return "ffn"
        acts = any(part.node.op_type in _CONVOLUTIONS and part.role == "acts" for part in of)
        return "channels" if acts else None

    def _is_vocab(self, group: Group, of: Sequence[Part]) -> bool:
        """Whether ids from the caller are looked up in it, or it comes out and nothing sums over it."""
        for part in of:
            if part.role != "holds" and part.node.op_type not in ("Gather", "GatherND"):
                continue
            source = part.node.inputs[1] if len(part.node.inputs) > 1 else None
            if part.role in ("holds", "acts") and source is not None and _from_outside(source):
                return True
        outputs = {v for v in self.axes.model.graph.outputs if v in self.axes.related.axes}
        comes_out = any(
            group in self.axes.of(value, dim)
            for value in outputs
            for dim in range(len(self.axes.related.axes[value]))
        )
        return comes_out and bool(of) and not any(part.role == "reads" for part in of)

    # -- what a position costs ----------------------------------------------------------------------

    def _multiple(self, group: Group) -> int:
        """How many positions make every width they are in a multiple of what is asked for."""
        needed = 1
        for axis in self.terms[group.atom]:
            rows = int(np.count_nonzero(index_of(axis, group.atom) == 0))
            needed = max(needed, self.multiple // math.gcd(self.multiple, max(rows, 1)))
        return needed

    def _factors(self, group: Group) -> frozenset[Axis]:
        """Atoms beside the group's in the products of its weights' dims."""
        found: set[Axis] = set()
        stack = list(self.terms[group.atom])
        while stack:
            axis = find(stack.pop())
            if axis.form is None:
                continue
            inner = axis.form.factors if isinstance(axis.form, Product) else axis.form.parts
            if isinstance(axis.form, Product) and group.atom in atoms(axis):
                found.update(atoms(axis))
            stack += inner
        return frozenset(found - {group.atom})

    def _parameters(self, group: Group) -> int:
        total = 0
        for member in group.members:
            tensor = member.value.const_value
            if tensor is None or not is_parameter(member.value):
                continue
            if member.value not in self.axes.related.axes:
                continue  # a vector of equal elements that others share: it is there as long as they are
            axis = self.axes.related.axes[member.value][member.dim]
            rows = int(np.count_nonzero(index_of(axis, group.atom) == 0))
            total += rows * (tensor.size // int(axis.size))
        return total

    def _macs(self, group: Group) -> int:
        nodes = {relation.node for relation, _ in self.axes.letters[group.atom]}
        widths = Widths(self.axes, {group.atom: group.size - 1})
        full = sum(self.meter.macs(node) or 0 for node in nodes)
        return full - sum(self.meter.macs(node, widths.shape) or 0 for node in nodes)


class Widths:
    """The shapes of all values of a model once some groups have fewer positions.

    ``extra`` is what vectors of equal elements that several nodes share then add: one is there for
    every size that a reader needs; and the map of the ids of a vocabulary that is narrower.
    """

    def __init__(self, axes: Axes, counts: Mapping[Axis, int]) -> None:
        self._axes = axes.related.axes
        self._copies = axes.related.copies
        self._known: dict[Axis, Size | None] = {find(atom): n for atom, n in counts.items()}
        looked_up = {find(lookup.axis) for lookup in axes.related.lookups}
        # One map for the tables of a vocabulary, which are those of one size.
        self._mapped = sum({int(atom.size) for atom in looked_up if atom in self._known})

    def shape(self, value: ir.Value) -> Sequence[Size | None] | None:
        """A size for every dim; None for one that stays as it is."""
        axes = self._axes.get(value)
        return None if axes is None else [resized(axis, self._known) for axis in axes]

    def extra(self) -> tuple[int, int]:
        """Parameters and bytes that shared vectors and maps have more than now (or fewer)."""
        needed: dict[ir.Value, dict[int, bool]] = defaultdict(dict)
        for (node, index), (axis,) in self._copies.items():
            value = node.inputs[index]
            assert value is not None
            size = resized(axis, self._known)
            size = int(axis.size if size is None else size)
            needed[value][size] = needed[value].get(size, False) or trains(node, index)
        parameters, size_in_bytes = 0, 8 * self._mapped
        for value, sizes in needed.items():
            tensor = value.const_value
            assert tensor is not None
            parameters += sum(size for size, trained in sizes.items() if trained)
            parameters -= tensor.size if is_parameter(value) else 0
            size_in_bytes += (sum(sizes) - tensor.size) * tensor.dtype.bitwidth // 8
        return parameters, size_in_bytes


def _part(
    relation: Relation, letter: str, operand: int, weight: ir.Value, dim: int, index: Positions
) -> Part:
    """What the node that computes with a weight does along a letter."""
    node, slots = relation.node, relation.slots[letter]
    comes_out = any(slot.output for slot in slots)
    others = {slot.operand: slot.dim for slot in slots if not slot.output}
    terms = [term for term in terms_of(relation.signature.linear) if operand in term]
    partners = [other for term in terms for other in term if other != operand]
    if not partners:
        looked_up = bool(relation.signature.reads) and operand == 0
        if looked_up:
            return Part(weight, dim, "writes" if comes_out else "holds", node, index)
        return Part(weight, dim, "acts", node, index)
    if not comes_out:
        activation = node.inputs[partners[0]]
        if is_weight_like(activation):  # DeBERTa's table of relative positions
            return Part(weight, dim, "reads", node, index)
        return Part(weight, dim, "reads", node, index, activation, others.get(partners[0], 0))
    if any(partner in others for partner in partners):
        return Part(weight, dim, "acts", node, index)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return Part(weight, dim, "writes", node, index, bias=bias)


def _shares_heads(relation: Relation) -> bool:
    axis = relation.axes.get("r")
    return relation.node.op_type == "Attention" and axis is not None and axis.size != 1


def _counts_products(relation: Relation, letter: str) -> bool:
    """Whether a node multiplies two activations for each position of a letter."""
    return _of_activations(relation) and letter not in ("m", "k", "n")


def _inside_products(relation: Relation, letter: str) -> bool:
    """Whether a letter is summed over, or made, in a product of two activations."""
    return _of_activations(relation) and letter in ("k", "n")


def _of_activations(relation: Relation) -> bool:
    node = relation.node
    if node.op_type != "MatMul":
        return False
    return all(value is not None and not is_weight_like(value) for value in node.inputs[:2])


def is_weight_like(value: ir.Value | None) -> bool:
    """Whether a value comes from weights alone, or is picked out of them."""
    while value is not None:
        node = value.producer()
        if node is None:
            return value.const_value is not None
        if not node.inputs or node.op_type not in _PICKS:
            return False
        value = node.inputs[0]
    return False


_PICKS = frozenset(
    "Cast DequantizeLinear Expand Gather GatherND Identity Reshape Slice Split Squeeze Transpose"
    " Unsqueeze".split()
)


def _is_window(relation: Relation, letter: str) -> bool:
    """Whether a letter is a dim of a kernel or of the space it slides over."""
    if relation.node.op_type not in _CONVOLUTIONS:
        return False
    return letter in relation.letters("s k t")


def _is_constant(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None


def _from_outside(value: ir.Value) -> bool:
    """Whether a value is a graph input, perhaps moved about."""
    while True:
        if value.is_graph_input():
            return True
        node = value.producer()
        if node is None or node.op_type not in _PICKS or node.inputs[0] is None:
            return False
        value = node.inputs[0]


def _common(paths: Sequence[str]) -> str:
    """The longest path that all start with."""
    shared: list[str] = []
    for steps in zip(*(path.split(".") for path in paths), strict=False):
        if len(set(steps)) > 1:
            break
        shared.append(steps[0])
    return ".".join(shared)
