"""What can be deleted from a graph, found without signatures: position by position, by trying.

Every dim of every value gets a mask of its positions, fully written out. Operators that move elements
are run on arrays of element numbers, which says for each element of their output where it comes from:
an element must be gone on both sides or on neither. Other operators tie whole masks together. A
deletion is consistent if every tensor that is left is a block (an element is gone exactly if one of its
positions is), no dim is empty, of a grouped convolution groups go or channels of each but not both, and
nothing pinned is touched. `minimal` finds the smallest consistent deletions that contain a position; they
are what the axis analysis calls a position of a group.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import sympy

from netlathe.analysis.axes import algebra
from netlathe.analysis.axes.algebra import Axis
from netlathe.analysis.axes.groups import Axes, Group
from netlathe.execute import ort
from netlathe.ir import edit, types
from tests.analysis.axes.deletions import Deletions, Pairs

Array = npt.NDArray[Any]
Var = int  # a mask
Deletion = frozenset[tuple[str, int, int]]  # (value, dim, position)

# Elements come out as they went in: only their places are new.
MOVES = frozenset(
    "Concat DepthToSpace Expand Flatten Identity Pad Reshape Slice SpaceToDepth Split Squeeze Tile"
    " Transpose Unsqueeze".split()
)
LISTS = {  # inputs that list sizes or positions
    "Expand": (1,),
    "Pad": (1, 2, 3),
    "Reshape": (1,),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Squeeze": (1,),
    "Tile": (1,),
    "Unsqueeze": (1,),
    "Clip": (1, 2),
    "CumSum": (1,),
    "Range": (0, 1, 2),
    "Resize": (1, 2, 3),
    "TopK": (1,),
    "ConstantOfShape": (0,),
}
ELEMENTWISE = frozenset(
    "Abs Add And Cast Clip Cos Div Equal Erf Exp Gelu Greater GreaterOrEqual HardSigmoid HardSwish Less"
    " LessOrEqual Log Max Min Mod Mul Neg Not Or Pow Relu Sigmoid Sin Softmax Sqrt Sub Swish Tanh Where"
    " CumSum".split()
)


@dataclass
class Tie:
    """Elements of the right block are those of the left blocks at ``source`` (-1: new ones)."""

    left: list[tuple[Var, ...]]
    right: tuple[Var, ...]
    source: Array  # shaped like the right block


class Oracle:
    """The masks and ties of a graph, at the sizes of some feeds."""

    def __init__(
        self,
        model: ir.Model,
        feeds: Mapping[str, Array],
        boundary: bool = True,
    ) -> None:
        self.model = model.clone()
        graph = self.model.graph
        self.own = _give_own_constants(graph)
        names = [
            value.name or "" for node in graph for value in node.outputs if value.shape is not None
        ]
        self.arrays: dict[str, Array] = dict(ort.run(self.model, feeds, names)) | dict(feeds)
        for value in graph.initializers.values():
            assert value.const_value is not None
            self.arrays[value.name or ""] = value.const_value.numpy()
        self.parent: list[Var] = []
        self.size: list[int] = []
        self.pinned: set[Var] = set()
        self.vars: dict[str, tuple[Var, ...]] = {}
        self.ties: list[Tie] = []
        self.apart: list[tuple[Var, Var]] = []  # a deletion takes positions of one of them
        self.positions: dict[str, Var] = {}  # integers that are positions of a mask
        for value in (*graph.inputs, *graph.initializers.values()):
            self._add(value)
        for node in graph:
            for value in node.outputs:
                if value.name in self.arrays:
                    self._add(value)
            _RULES.get(node.op_type, _pin)(self, node)
            self._follow_positions(node)
        if boundary:
            self._pin_boundary()
        self._index()

    # -- masks ------------------------------------------------------------------------------------

    def new(self, size: int) -> Var:
        """Another mask."""
        self.parent.append(len(self.parent))
        self.size.append(size)
        return len(self.parent) - 1

    def _add(self, value: ir.Value) -> None:
        name = value.name or ""
        self.vars[name] = tuple(self.new(size) for size in self.arrays[name].shape)
        for var, dim in zip(self.vars[name], types.recorded(value).shape or (), strict=True):
            if isinstance(dim, sympy.Expr) and dim.as_coeff_Mul()[0] == 1:
                self.pinned.add(var)  # its size is the caller's

    def find(self, var: Var) -> Var:
        """The mask that stands for this one."""
        while self.parent[var] != var:
            self.parent[var] = self.parent[self.parent[var]]
            var = self.parent[var]
        return var

    def same(self, *of: Var) -> None:
        """Let masks be one."""
        roots = {self.find(var) for var in of}
        first, *rest = sorted(roots)
        for var in rest:
            assert self.size[var] == self.size[first], "masks of different sizes"
            self.parent[var] = first
            if var in self.pinned:
                self.pinned.add(first)

    def pin(self, *of: Var) -> None:
        """Nothing of these may go."""
        self.pinned.update(map(self.find, of))

    def of(self, value: ir.Value | None) -> tuple[Var, ...]:
        """The masks of a value's dims."""
        return () if value is None else self.vars[value.name or ""]

    def pin_value(self, value: ir.Value | None) -> None:
        """Pin all dims of a value, and the mask whose positions it holds."""
        self.pin(*self.of(value))
        if value is not None and value.name in self.positions:
            self.pin(self.positions[value.name])

    def broadcast(self, *operands: Sequence[Var]) -> None:
        """Dims aligned at their end are one mask, but for those of size 1."""
        for column in range(1, max(map(len, operands)) + 1):
            dims = [operand[-column] for operand in operands if len(operand) >= column]
            wide = [var for var in dims if self.size[var] != 1]
            if wide:
                self.same(*wide)

    def merged(self, whole: Var, factors: Sequence[Var]) -> None:
        """A dim that is the row-major product of others."""
        shape = [self.size[var] for var in factors]
        self.ties.append(Tie([tuple(factors)], (whole,), np.arange(math.prod(shape))))

    def split(self, whole: Var, *sizes: int) -> list[Var]:
        """New masks of which a dim is the product."""
        factors = [self.new(size) for size in sizes]
        self.merged(whole, factors)
        return factors

    # -- boundary ---------------------------------------------------------------------------------

    def _pin_boundary(self) -> None:
        graph = self.model.graph
        state: set[ir.Value] = set()
        for value in graph.inputs:  # a cache: the output that is the input and more
            readers = [node for node in value.consumers() if node.op_type != "Shape"]
            if len(readers) == 1 and readers[0].op_type == "Concat":
                if readers[0].outputs[0].is_graph_output() and readers[0].inputs[0] is value:
                    state |= {value, readers[0].outputs[0]}
        for value in {*graph.inputs, *graph.outputs} - state:
            self.pin_value(value)

    def _follow_positions(self, node: ir.Node) -> None:
        """Positions stay positions while they are only moved; a computation with them pins."""
        held = [
            value for value in node.inputs if value is not None and value.name in self.positions
        ]
        if node.op_type in MOVES or (node.op_type == "Cast" and node.outputs[0].dtype in _INTEGERS):
            for value in node.outputs if held else ():
                self.positions[value.name or ""] = self.positions[held[0].name or ""]
            for value in held[1:]:
                self.same(self.positions[held[0].name or ""], self.positions[value.name or ""])
            return
        if node.op_type == "Clip" and held == [node.inputs[0]]:
            low, high = (self.arrays[value.name or ""] for value in node.inputs[1:] if value)
            axis = self.positions[held[0].name or ""]
            if low <= 0 and high >= self.size[axis] - 1:  # it changes none of them
                self.positions[node.outputs[0].name or ""] = axis
                return
        understood = {
            "Gather": (1,),
            "GatherElements": (1,),
            "GatherND": (1,),
            "ScatterElements": (1,),
            "OneHot": (0,),
        }.get(node.op_type, ())
        for index, value in enumerate(node.inputs):
            if value in held and index not in understood:
                self.pin(self.positions[value.name or ""])  # type: ignore[union-attr]  # it is held

    # -- search -----------------------------------------------------------------------------------

    def _index(self) -> None:
        """Number the positions of all masks, and say which elements are equal by them."""
        roots = sorted({self.find(var) for var in range(len(self.parent))})
        starts = np.cumsum([0, *(self.size[var] for var in roots)])
        self.start = dict(zip(roots, starts.tolist(), strict=False))
        stays = np.zeros(starts[-1], np.bool_)
        for var in {self.find(var) for var in self.pinned}:
            stays[self.start[var] : self.start[var] + self.size[var]] = True
        self.dims: dict[Var, list[tuple[str, int]]] = defaultdict(list)
        for name, found in self.vars.items():
            for dim, var in enumerate(found if name not in self.own else ()):
                self.dims[self.find(var)].append((name, dim))
        self.var_at = np.repeat(roots, [self.size[var] for var in roots])
        pairs = (pair for tie in self.ties for pair in self._pairs(tie, stays))
        number = {var: index for index, var in enumerate(roots)}
        apart = [(number[self.find(a)], number[self.find(b)]) for a, b in self.apart]
        self.deletions = Deletions(starts.tolist(), stays, pairs, apart)

    def _pairs(self, tie: Tie, stays: Array) -> Iterator[Pairs]:
        """The places of equal elements, in dims that are not known to stay as a whole."""
        source, start = tie.source.reshape(-1), 0
        for block in tie.left:
            count = math.prod(self.size[var] for var in block)
            elements = np.flatnonzero((source >= start) & (source < start + count))
            if block and tie.right and len(elements):  # a scalar is never gone
                left = self._places(block, source[elements] - start, stays)
                yield left, self._places(tie.right, elements, stays)
            start += count

    def _places(self, block: tuple[Var, ...], elements: Array, stays: Array) -> Array:
        """The places of elements in the dims of a block that do not stay as a whole."""
        found = []
        vars = [self.find(var) for var in block]
        shape = [self.size[var] for var in vars]
        for dim, var in enumerate(vars):
            if not stays[self.start[var] : self.start[var] + self.size[var]].all():
                inner = math.prod(shape[dim + 1 :])
                found.append(elements // inner % shape[dim] + self.start[var])
        return np.stack(found, axis=1) if found else np.zeros((len(elements), 0), np.int64)

    def minimal(self, name: str, dim: int, position: int) -> list[Deletion]:
        """The smallest consistent deletions that delete this position."""
        found = self.deletions.minimal(self._place(name, dim, position))
        return [self._shown(solution) for solution in found]

    def _place(self, name: str, dim: int, position: int) -> int:
        return self.start[self.find(self.vars[name][dim])] + position

    def _shown(self, places: Array) -> Deletion:
        return frozenset(
            (name, dim, place - self.start[var])
            for place, var in zip(places.tolist(), self.var_at[places].tolist(), strict=True)
            for name, dim in self.dims[var]
        )


def _give_own_constants(graph: ir.Graph) -> set[str]:
    """Let readers of a shared vector of equal elements each have their own; the names of these."""
    made: set[str] = set()
    for value in list(graph.initializers.values()):
        uses = list(value.uses())
        if value.const_value is None or value.dtype != ir.DataType.FLOAT or len(uses) < 2:
            continue
        array = value.const_value.numpy()
        if array.ndim == 1 and array.size > 1 and np.ptp(array) == 0:
            for number, (node, index) in enumerate(uses):
                own = edit.constant(graph, array.copy(), f"{value.name}_of_{number}")
                node.replace_input_with(index, own)
                made.add(own.name or "")
            edit.drop_if_unread(value)
    return made


_INTEGERS = frozenset({ir.DataType.INT64, ir.DataType.INT32})


# -- what operators tie together ------------------------------------------------------------------------

Rule = Callable[[Oracle, ir.Node], None]


def _pin(o: Oracle, node: ir.Node) -> None:
    for value in (*node.inputs, *node.outputs):
        if value is not None and value.name in o.vars:
            o.pin_value(value)


def _pin_lists(o: Oracle, node: ir.Node) -> list[ir.Value | None]:
    """Pin the inputs that are lists; the others."""
    lists = LISTS.get(node.op_type, ())
    for index in lists:
        if index < len(node.inputs):
            o.pin(*o.of(node.inputs[index]))
    return [value for index, value in enumerate(node.inputs) if index not in lists]


def _elementwise(o: Oracle, node: ir.Node) -> None:
    o.broadcast(*map(o.of, _pin_lists(o, node)), o.of(node.outputs[0]))


def _moves(o: Oracle, node: ir.Node) -> None:
    """Run the operator on the numbers of the elements it reads."""
    data = [value for value in _pin_lists(o, node) if value is not None]
    if node.op_type == "Slice" and any(value.producer() for value in node.inputs[1:] if value):
        o.pin(*o.of(data[0]), *o.of(node.outputs[0]))  # another length may take other positions
    blocks, numbers, start = [], [], 0
    for value in data:
        shape = o.arrays[value.name or ""].shape
        count = math.prod(shape)
        blocks.append(o.of(value))
        numbers.append(np.arange(start, start + count).reshape(shape) + 1)
        start += count
    if node.op_type in ("Expand", "Tile"):
        _repeats(o, node, blocks[0])
        return
    if node.op_type in ("DepthToSpace", "SpaceToDepth"):  # whole blocks of one size
        size = node.attributes.get_int("blocksize", 0)
        fine = o.of(node.outputs[0] if node.op_type == "DepthToSpace" else data[0])
        for var in fine[2:]:
            _, inside = o.split(var, o.size[var] // size, size)
            o.pin(inside)
    for value, source in zip(node.outputs, _run(o, node, data, numbers), strict=True):
        o.ties.append(Tie(blocks, o.of(value), source.astype(np.int64) - 1))


def _repeats(o: Oracle, node: ir.Node, data: tuple[Var, ...]) -> None:
    """What is repeated has a mask of its own for the repetition."""
    out = o.of(node.outputs[0])
    padded = [None] * (len(out) - len(data)) + list(data)
    for given, made in zip(padded, out, strict=True):
        if given is None or o.size[given] == 1:
            continue
        if o.size[given] == o.size[made]:
            o.same(given, made)
        else:
            o.merged(made, [o.new(o.size[made] // o.size[given]), given])


def _run(
    o: Oracle, node: ir.Node, data: Sequence[ir.Value], numbers: Sequence[Array]
) -> list[Array]:
    """The outputs of a node for other data; the operands that are lists stay."""
    fed = {
        value.name: number.astype(np.float32) for value, number in zip(data, numbers, strict=True)
    }
    inputs: list[ir.Value | None] = []
    made: dict[str, ir.Value] = {}
    for value in node.inputs:
        if value is None:
            inputs.append(None)
            continue
        name = value.name or ""
        array = fed.get(name, o.arrays[name])
        if name not in made:
            made[name] = ir.Value(
                name=name,
                type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
                shape=ir.Shape(array.shape),
                const_value=ir.tensor(array),
            )
        inputs.append(made[name])
    if node.op_type == "Pad":
        inputs = [*inputs[:2], None, *inputs[3:]]  # new elements are 0: they come from nowhere
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    copy = ir.node(node.op_type, inputs, attributes, num_outputs=len(node.outputs))
    for index, value in enumerate(copy.outputs):
        value.name = f"{node.outputs[index].name}_numbers"
    read = {value.name or "": value for value in inputs if value is not None}
    graph = ir.Graph(
        [], copy.outputs, nodes=[copy], initializers=list(read.values()), opset_imports={"": 25}
    )
    found = ort.run(ir.Model(graph, ir_version=10), {})
    return [found[value.name or ""] for value in copy.outputs]


def _gather(o: Oracle, node: ir.Node) -> None:
    data, index = node.inputs
    assert data is not None and index is not None
    axis = node.attributes.get_int("axis", 0) % len(o.of(data))
    _look_up(o, node, data, index, axis, o.of(index))


def _gather_nd(o: Oracle, node: ir.Node) -> None:
    data, index = node.inputs
    assert data is not None and index is not None
    batch = node.attributes.get_int("batch_dims", 0)
    depth = o.arrays[index.name or ""].shape[-1]
    o.pin(o.of(index)[-1])
    if depth == 1 and not batch:
        _look_up(o, node, data, index, 0, o.of(index)[:-1])
        return
    out = o.of(node.outputs[0])
    rows = o.of(index)[:-1]
    o.broadcast(out, (*rows, *o.of(data)[batch + depth :]))
    o.broadcast(rows[:batch], o.of(data)[:batch]) if batch else None
    o.pin(*o.of(data)[batch : batch + depth])


def _look_up(
    o: Oracle,
    node: ir.Node,
    data: ir.Value,
    index: ir.Value,
    axis: int,
    rows: tuple[Var, ...],
) -> None:
    constant = index.const_value is not None and not index.is_graph_input()
    if constant and len(rows) <= 1 and index.name not in o.positions:
        shape = o.arrays[data.name or ""].shape
        numbers = np.arange(math.prod(shape)).reshape(shape) + 1
        (source,) = _run(o, node, [data], [numbers])
        o.pin(*o.of(index))
        if not rows:  # one position, which must stay
            fixed = o.new(1)
            o.pinned.add(fixed)
            out = (*o.of(node.outputs[0])[:axis], fixed, *o.of(node.outputs[0])[axis:])
        else:
            out = o.of(node.outputs[0])
        shape = [o.size[var] for var in out]
        o.ties.append(Tie([o.of(data)], out, source.astype(np.int64).reshape(shape) - 1))
        return
    table = o.of(data)
    o.broadcast(o.of(node.outputs[0]), (*table[:axis], *rows, *table[axis + 1 :]))
    if index.name in o.positions:
        o.same(o.positions[index.name], table[axis])
    else:
        o.pin(table[axis])


def _gather_elements(o: Oracle, node: ir.Node) -> None:
    data, index = node.inputs
    assert data is not None and index is not None
    axis = node.attributes.get_int("axis", 0) % len(o.of(data))
    o.broadcast(o.of(index), o.of(node.outputs[0]))
    for dim, (a, b) in enumerate(zip(o.of(data), o.of(index), strict=True)):
        if dim == axis:
            continue
        if o.size[a] == o.size[b]:
            o.same(a, b)
        else:
            o.pin(a, b)
    if index.name in o.positions:
        o.same(o.positions[index.name], o.of(data)[axis])
    else:
        o.pin(o.of(data)[axis])


def _reduce(o: Oracle, node: ir.Node) -> None:
    data = o.of(node.inputs[0])
    axes = {int(axis) % len(data) for axis in o.arrays[node.inputs[1].name or ""]}  # type: ignore[union-attr]  # normal form
    o.pin(*o.of(node.inputs[1]))
    left = [var for dim, var in enumerate(data) if dim not in axes]
    out = [var for var in o.of(node.outputs[0])]
    if node.attributes.get_int("keepdims", 1):
        out = [var for dim, var in enumerate(out) if dim not in axes]
    for a, b in zip(left, out, strict=True):
        o.same(a, b)


def _top_k(o: Oracle, node: ir.Node) -> None:
    data = o.of(node.inputs[0])
    axis = node.attributes.get_int("axis", -1) % len(data)
    o.pin(*o.of(node.inputs[1]))
    for value in node.outputs:
        for dim, (a, b) in enumerate(zip(data, o.of(value), strict=True)):
            o.pin(b) if dim == axis else o.same(a, b)
    o.positions[node.outputs[1].name or ""] = data[axis]
    k = o.arrays[node.outputs[0].name or ""].shape[axis]
    assert k < o.size[data[axis]], "every deletion would leave too few"


def _matmul(o: Oracle, node: ir.Node) -> None:
    a, b, out = o.of(node.inputs[0]), o.of(node.inputs[1]), o.of(node.outputs[0])
    assert len(a) >= 2 and len(b) >= 2
    o.same(a[-1], b[-2])
    o.same(a[-2], out[-2])
    o.same(b[-1], out[-1])
    if len(out) > 2:
        o.broadcast(a[:-2] or (), b[:-2] or (), out[:-2])


def _conv(o: Oracle, node: ir.Node) -> None:
    x, w, y = o.of(node.inputs[0]), o.of(node.inputs[1]), o.of(node.outputs[0])
    groups = node.attributes.get_int("group", 1)
    o.pin(*x[2:], *w[2:], *y[2:])
    o.same(x[0], y[0])
    o.same(w[0], y[1])
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        o.same(y[1], *o.of(node.inputs[2]))
    if groups == 1:
        o.same(x[1], w[1])
        return
    g, i = o.split(x[1], groups, o.size[x[1]] // groups)
    made = o.new(o.size[w[0]] // groups)
    o.same(i, w[1])
    o.merged(w[0], [g, made])
    o.apart += [(g, i), (g, made)]  # groups go, or channels of each


def _conv_transpose(o: Oracle, node: ir.Node) -> None:
    x, w, y = o.of(node.inputs[0]), o.of(node.inputs[1]), o.of(node.outputs[0])
    assert node.attributes.get_int("group", 1) == 1
    o.pin(*x[2:], *w[2:], *y[2:])
    o.same(x[0], y[0])
    o.same(x[1], w[0])
    o.same(w[1], y[1], *(var for value in node.inputs[2:] for var in o.of(value)))


def _channels(o: Oracle, node: ir.Node) -> None:
    """Batch normalization: everything but input 0 has its dim 1."""
    x = o.of(node.inputs[0])
    o.same(x[1], *(var for value in node.inputs[1:] for var in o.of(value)))
    for a, b in zip(x, o.of(node.outputs[0]), strict=True):
        o.same(a, b)


def _group_norm(o: Oracle, node: ir.Node) -> None:
    _channels(o, node)
    x = o.of(node.inputs[0])
    groups = node.attributes.get_int("num_groups", 0)
    o.split(x[1], groups, o.size[x[1]] // groups)
    o.pin(*x[2:])


def _pool(o: Oracle, node: ir.Node) -> None:
    x, y = o.of(node.inputs[0]), o.of(node.outputs[0])
    o.same(x[0], y[0])
    o.same(x[1], y[1])
    o.pin(*x[2:], *y[2:])


def _resize(o: Oracle, node: ir.Node) -> None:
    _pin_lists(o, node)
    for a, b in zip(o.of(node.inputs[0]), o.of(node.outputs[0]), strict=True):
        o.same(a, b) if o.size[a] == o.size[b] else o.pin(a, b)


def _layer_norm(o: Oracle, node: ir.Node) -> None:
    o.broadcast(*map(o.of, node.inputs), o.of(node.outputs[0]))


def _attention(o: Oracle, node: ir.Node) -> None:
    q, k, v, y = (o.of(value) for value in (*node.inputs[:3], node.outputs[0]))
    assert len(q) == 4
    o.same(q[0], k[0], v[0], y[0])
    o.same(k[1], v[1])
    heads = o.size[k[1]]
    n, _ = o.split(q[1], heads, o.size[q[1]] // heads)
    if heads > 1:
        o.same(n, k[1])
    else:  # the one head of the keys stays
        o.pin(n)
    o.same(q[1], y[1])
    o.same(q[3], k[3])
    o.same(v[3], y[3])
    o.same(q[2], y[2])
    o.same(k[2], v[2])
    o.pin(q[2], k[2])
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        mask = o.of(node.inputs[3])
        o.broadcast(mask, (q[0], q[1], q[2], k[2]))
    assert len(node.inputs) <= 4


def _rotary(o: Oracle, node: ir.Node) -> None:
    x, c, s, y = (o.of(value) for value in (*node.inputs[:3], node.outputs[0]))
    assert len(x) == 4 and len(node.inputs) == 3
    o.same(x[0], c[0], s[0], y[0])
    o.same(x[1], y[1])
    o.same(x[2], c[1], s[1], y[2])
    o.same(x[3], y[3])
    turned = 2 * o.size[c[2]]
    head = o.size[x[3]]
    two, pairs = o.new(2), o.new(o.size[c[2]])
    o.pinned.add(two)
    o.same(pairs, c[2], s[2])
    order = (pairs, two) if node.attributes.get_int("interleaved", 0) else (two, pairs)
    numbers = np.arange(head)
    if turned == head:
        o.ties.append(Tie([order], (x[3],), numbers))
    else:
        o.ties.append(Tie([order, (o.new(head - turned),)], (x[3],), numbers))


def _range(o: Oracle, node: ir.Node) -> None:
    _pin_lists(o, node)
    o.pin(*o.of(node.outputs[0]))


def _shape(o: Oracle, node: ir.Node) -> None:
    o.pin(*o.of(node.outputs[0]))


def _constant_of_shape(o: Oracle, node: ir.Node) -> None:
    _pin_lists(o, node)


_RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(MOVES, _moves),
    **dict.fromkeys(("AveragePool", "GlobalAveragePool", "MaxPool"), _pool),
    **dict.fromkeys(("ReduceMean", "ReduceSum"), _reduce),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), _layer_norm),
    "Attention": _attention,
    "BatchNormalization": _channels,
    "ConstantOfShape": _constant_of_shape,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "GroupNormalization": _group_norm,
    "MatMul": _matmul,
    "Range": _range,
    "Resize": _resize,
    "RotaryEmbedding": _rotary,
    "Shape": _shape,
    "TopK": _top_k,
}


# -- what the axis analysis says --------------------------------------------------------------------------


def claimed(axes: Axes) -> dict[Group, list[Deletion]]:
    """For every deletable group, what goes with each of its positions."""
    found: dict[Axis, list[set[tuple[str, int, int]]]] = {
        group.atom: [set() for _ in range(group.size)]
        for group in axes.groups
        if group.allows("delete")
    }
    known: dict[Axis, list[tuple[Axis, int, int]]] = {}
    for value, dims in axes.related.axes.items():
        for dim, axis in enumerate(dims):
            for atom, at, position in _places(axis, known):
                if atom in found:
                    found[atom][at].add((value.name or "", dim, position))
    return {axes.by_atom[atom]: list(map(frozenset, each)) for atom, each in found.items()}


def _places(
    axis: Axis, known: dict[Axis, list[tuple[Axis, int, int]]]
) -> list[tuple[Axis, int, int]]:
    """(atom, position of it, position of the axis that has it)."""
    axis = algebra.find(axis)
    if axis in known:
        return known[axis]
    if not isinstance(axis.size, int):
        found = []
    elif axis.form is None:
        found = [(axis, at, at) for at in range(axis.size)]
    elif isinstance(axis.form, algebra.Product):
        found = []
        inner = axis.size
        for factor in axis.form.factors:
            count = int(factor.size)
            inner //= count
            rows = axis.size // (inner * count)
            found += [
                (atom, at, (row * count + place) * inner + column)
                for atom, at, place in _places(factor, known)
                for row in range(rows)
                for column in range(inner)
            ]
    else:
        found, start = [], 0
        for part in axis.form.parts:
            found += [(atom, at, start + place) for atom, at, place in _places(part, known)]
            start += int(part.size)
    known[axis] = found
    return found
