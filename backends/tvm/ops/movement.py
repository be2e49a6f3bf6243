"""Operators that move, select, repeat and place elements: an index in, an index out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import onnx_ir as ir
from tvm import tirx

from netlathe.backends.tvm import packing, storage
from netlathe.backends.tvm.cuda import masks
from netlathe.backends.tvm.cuda.machine import Gpu
from netlathe.backends.tvm.kernel import Kernel
from netlathe.backends.tvm.kernels import general
from netlathe.backends.tvm.lowering import Lowering
from netlathe.backends.tvm.ops.op import (
    D,
    Op,
    Rule,
    broadcast_index,
    cost_of,
    is_cheap,
    is_flat,
    moved,
)
from netlathe.backends.tvm.packing import Recipe
from netlathe.backends.tvm.tir import (
    NAMED,
    Code,
    Expr,
    Index,
    cast,
    const,
    dtype_of,
    i64,
    known,
    select,
    total,
)
from netlathe.backends.tvm.values import (
    ChannelsLast,
    Known,
    Lazy,
    Pending,
    Ready,
    Scalar,
    Store,
    Value,
    from_last,
    to_last,
    turned,
)
from netlathe.ir import dims
from netlathe.ir.dims import Dim, Shape

_END = 2**62  # beyond it a slice means "to the end"


# -- shape ------------------------------------------------------------------------------------------


def view(op: Op, value: Value, shape: Shape) -> Value:
    """The elements of ``value`` in order under another shape: free where it is in memory."""
    if isinstance(value, Scalar):
        return Scalar(value.dtype, shape, value.value)
    if isinstance(value, Known) and len(shape) <= 1:
        return Known(value.dtype, shape, value.contents)
    if not isinstance(value, Ready):
        mapped = _unit_dims(value.shape, shape)
        if mapped is not None:
            return _with_unit_dims(op, value, shape, mapped)
        if isinstance(value, Pending) and not isinstance(op.low.machine, Gpu):
            groups = _merged(value.shape, shape)
            if groups is not None:
                return _with_merged_dims(value, shape, groups)
    return op.low.force(value).viewed(shape)


def _unit_dims(before: Shape, after: Shape) -> list[int | None] | None:
    """For each axis before, the axis after it became (None: it was 1), if only 1s come and go."""
    mapped: list[int | None] = []
    position = 0
    for dim in before:
        if dim == 1 and (position >= len(after) or after[position] != 1):
            mapped.append(None)
            continue
        while position < len(after) and after[position] == 1 and dim != 1:
            position += 1
        if position >= len(after) or dims.same(after[position], dim) is not True:
            return None
        mapped.append(position)
        position += 1
    return mapped if all(dim == 1 for dim in after[position:]) else None


def _merged(before: Shape, after: Shape) -> list[list[Dim]] | None:
    """The dims before that became each dim after, if these are products; all but the first of each known."""
    groups: list[list[Dim]] = []
    start = 0
    for dim in after:
        group = list(before[start : start + 1])
        while dims.same(dims.product(group), dim) is not True:
            inner = before[start + len(group) : start + len(group) + 1]
            if not inner or not isinstance(inner[0], int):
                return None
            group.append(inner[0])
        groups.append(group)
        start += len(group)
    return groups if start == len(before) and all(groups) else None


def _with_merged_dims(value: Pending, shape: Shape, groups: Sequence[Sequence[Dim]]) -> Value:
    def forward(index: Index) -> Index:
        result, start = list[Expr](), 0
        for _, *inner in groups:
            at = index[start]
            for dim in inner:
                start += 1
                at = at * i64(dim) + index[start]
            result.append(at)
            start += 1
        return result

    return value.then(lambda code, index, e: e, value.dtype, shape, forward)


def _with_unit_dims(op: Op, value: Value, shape: Shape, mapped: list[int | None]) -> Value:
    if isinstance(value, ChannelsLast):
        value = value.usual()
    if isinstance(value, Pending):

        def forward(index: Index) -> Index:
            result: list[Expr] = [i64(0)] * len(shape)
            for axis, target in enumerate(mapped):
                if target is not None:
                    result[target] = index[axis]
            return result

        return value.then(lambda code, index, e: e, value.dtype, shape, forward)
    source = value

    def element(code: Code, index: Index) -> Expr:
        if len(index) == 1 and len(shape) != 1:  # by element number, which does not change
            return source.at(code, index if source.rank != 0 else [])
        return source.at(code, [i64(0) if t is None else index[t] for t in mapped])

    return Lazy(
        value.dtype,
        shape,
        element,
        flat=is_flat(value),
        cheap=is_cheap(value),
        unit=isinstance(value, Lazy)
        and value.unit
        and bool(mapped)
        and mapped[-1] == len(shape) - 1,
        cost=cost_of(value),
    )


def _reshape(op: Op) -> Sequence[Value]:
    value = op.value(0)

    def size(code: Code, axis: int) -> Expr:
        target = op.operand(1)
        items = [
            cast(target.at(code, [i64(i)]), "int64") for i in range(len(op.type().shape or ()))
        ]
        source = code.kernel.shape(value.shape)
        if not op.integer("allowzero"):
            items = [
                select(item == i64(0), source[i], item) if i < len(source) else item
                for i, item in enumerate(items)
            ]
        rest = total(source)
        stated = i64(1)
        for item in items:
            stated = stated * select(item == i64(-1), i64(1), item)
        whole = tirx.floordiv(rest, tirx.max(stated, i64(1)))
        return select(items[axis] == i64(-1), whole, items[axis])

    return [view(op, value, op.decided(size))]


def _as_output(op: Op) -> Sequence[Value]:
    """Flatten, Squeeze, Unsqueeze: the derived shape says it all, unless the data decides the axes."""
    value = op.value(0)
    added = op.node.op_type == "Unsqueeze"

    def size(code: Code, axis: int) -> Expr:
        source = code.kernel.shape(value.shape)
        rank = len(op.type().shape or ()) if added else value.rank
        count = _count(op, 1)
        flags = []
        for at in range(rank):
            flag = const(False, "bool")
            for k in range(count):
                given = element_at(code, op, 1, k)
                flag = tirx.Or(flag, select(given < i64(0), given + i64(rank), given) == i64(at))
            flags.append(select(flag, i64(1), i64(0)))
        if added:
            before = sum_of(i64(1) - flag for flag in flags[:axis])
            result = i64(1)
            for at, dim in enumerate(source):
                result = select(before == i64(at), dim, result)
            return select(flags[axis] == i64(1), i64(1), result)
        result = i64(1)
        for at, dim in enumerate(source):
            before = sum_of(i64(1) - flag for flag in flags[:at])
            here = tirx.And(flags[at] == i64(0), before == i64(axis))
            result = select(here, dim, result)
        return result

    return [view(op, value, op.decided(size))]


def sum_of(parts: Iterable[Expr]) -> Expr:
    """The sum of sizes."""
    whole = i64(0)
    for part in parts:
        whole = whole + part
    return whole


def transposed(op: Op, value: Value, perm: Sequence[int]) -> Value:
    """``value`` with its axes in the order ``perm``."""
    shape = tuple(value.shape[axis] for axis in perm)
    if isinstance(value, Scalar):
        return Scalar(value.dtype, shape, value.value)
    if isinstance(value, ChannelsLast) and list(perm) == to_last(range(value.rank)):
        return value.last
    if value.rank == 4 and list(perm) == from_last(range(4)):
        return ChannelsLast(value.dtype, shape, value)
    last = not perm or perm[-1] == len(perm) - 1
    if isinstance(value, Pending) and last:
        return value.then(
            lambda code, index, e: e, value.dtype, shape, lambda index: [index[a] for a in perm]
        )
    inverse = [perm.index(axis) for axis in range(len(perm))]
    source = op.low.operand(value)
    made = moved(source, shape, lambda code, index: [index[a] for a in inverse], unit=last)
    if isinstance(source, Ready):
        made.along = None if last else perm.index(len(perm) - 1)
    if found := turned(source):
        made.turned = found[0], tuple(found[1][axis] for axis in perm)
    return made


def _transpose(op: Op) -> Sequence[Value]:
    value = op.value(0)
    perm = op.integers("perm")
    return [transposed(op, value, list(perm if perm else range(value.rank - 1, -1, -1)))]


def _expand(op: Op) -> Sequence[Value]:
    source = op.operand(0)

    def size(code: Code, axis: int) -> Expr:
        shape, target = op.type().shape or (), op.operand(1)
        own = axis - (len(shape) - source.rank)
        length = op.low.found.type(op.node.inputs[1]).shape
        given = axis - (len(shape) - int(length[0])) if length else -1  # type: ignore[arg-type]
        wanted = cast(target.at(code, [i64(given)]), "int64") if given >= 0 else i64(1)
        return tirx.max(wanted, code.kernel.size(source.shape[own]) if own >= 0 else i64(1))

    shape = op.decided(size)
    if isinstance(source, Scalar):
        return [repeated(source, shape)]
    return [moved(source, shape, lambda code, index: broadcast_index(code, source, index, shape))]


def repeated(source: Value, shape: Shape) -> Value:
    """One element everywhere in ``shape``."""
    if isinstance(source, Scalar) and all(dim == 1 for dim in shape):
        return Scalar(source.dtype, shape, source.value)
    zeros = [i64(0)] * source.rank
    return Lazy(
        source.dtype,
        shape,
        lambda code, index: source.at(code, zeros),
        flat=True,
        cheap=is_cheap(source),
    )


def _tile(op: Op) -> Sequence[Value]:
    source = op.operand(0)
    shape = op.decided(
        lambda code, axis: (
            code.kernel.size(source.shape[axis])
            * cast(op.operand(1).at(code, [i64(axis)]), "int64")
        )
    )

    def index(code: Code, at: Index) -> Index:
        sizes = code.kernel.shape(source.shape)
        return [
            item if source.shape[axis] == shape[axis] else tirx.floormod(item, sizes[axis])
            for axis, item in enumerate(at)
        ]

    return [moved(source, shape, index)]


# -- select -----------------------------------------------------------------------------------------


def element_at(code: Code, op: Op, index: int, position: int) -> Expr:
    """An element of a small integer operand, as a size if it is known, else read."""
    sizes = op.sizes(index)
    if sizes is not None and op.low.is_bound(sizes[position]):
        return code.kernel.size(sizes[position])
    operand = op.operand(index)
    return cast(operand.at(code, [i64(position)] if operand.rank else []), "int64")


def _count(op: Op, index: int) -> int:
    shape = op.low.found.type(op.node.inputs[index]).shape
    if shape is None or (shape and not isinstance(shape[0], int)):
        raise op.gap(f"operand {index} has no fixed length")
    return int(shape[0]) if shape else 1  # type: ignore[arg-type]


def _slice(op: Op) -> Sequence[Value]:
    source = op.operand(0)
    count = _count(op, 1)
    axes = op.ints(3) if op.has(3) else tuple(range(count))
    steps = op.ints(4) if op.has(4) else (1,) * count
    if axes is None or steps is None:
        return [_slice_by_data(op, source, count)]
    place = {axis % source.rank: at for at, axis in enumerate(axes)}

    def start(code: Code, axis: int) -> Expr:
        at, size = place[axis], code.kernel.size(source.shape[axis])
        first = element_at(code, op, 1, at)
        first = select(first < i64(0), first + size, first) if known(first) != 0 else first
        if known(first) == 0:
            return first
        high = size if steps[at] > 0 else size - i64(1)
        return tirx.max(tirx.min(first, high), i64(0))

    def length(code: Code, axis: int) -> Expr:
        size = code.kernel.size(source.shape[axis])
        if axis not in place:
            return size
        at = place[axis]
        step = steps[at]
        end = element_at(code, op, 2, at)
        end = select(end < i64(0), end + size, end)
        end = tirx.max(tirx.min(end, size), i64(0 if step > 0 else -1))
        extent = end - start(code, axis) if step > 0 else start(code, axis) - end
        return tirx.max(tirx.floordiv(extent + i64(abs(step) - 1), i64(abs(step))), i64(0))

    shape = op.decided(length)

    def index(code: Code, at: Index) -> Index:
        return [
            start(code, axis) + item * i64(steps[place[axis]]) if axis in place else item
            for axis, item in enumerate(at)
        ]

    last = source.rank - 1
    return [moved(source, shape, index, unit=last not in place or steps[place[last]] == 1)]


def _slice_by_data(op: Op, source: Value, count: int) -> Value:
    """A slice whose axes or steps are known when the model runs."""
    rank = source.rank

    def bounds(code: Code, axis: int) -> tuple[Expr, Expr, Expr]:
        """(start, length, step) along an axis."""
        size = code.kernel.size(source.shape[axis])
        start, length, step = i64(0), size, i64(1)
        for at in range(count):
            given = element_at(code, op, 3, at) if op.has(3) else i64(at)
            given = select(given < i64(0), given + i64(rank), given)
            by = code.bind(element_at(code, op, 4, at) if op.has(4) else i64(1), NAMED)
            first, last = element_at(code, op, 1, at), element_at(code, op, 2, at)
            first = select(first < i64(0), first + size, first)
            last = select(last < i64(0), last + size, last)
            up = by > i64(0)
            first = tirx.max(tirx.min(first, select(up, size, size - i64(1))), i64(0))
            last = tirx.max(tirx.min(last, size), select(up, i64(0), i64(-1)))
            first, last = code.bind(first, NAMED), code.bind(last, NAMED)
            span = select(up, last - first, first - last)
            width = code.bind(tirx.abs(by), NAMED)
            whole = tirx.max(tirx.floordiv(span + width - i64(1), width), i64(0))
            here = given == i64(axis)
            start, length = select(here, first, start), select(here, whole, length)
            step = select(here, by, step)
        return start, length, step

    shape = op.decided(lambda code, axis: bounds(code, axis)[1])

    def index(code: Code, at: Index) -> Index:
        parts = [bounds(code, axis) for axis in range(rank)]
        return [start + item * step for (start, _, step), item in zip(parts, at, strict=True)]

    result = moved(source, shape, index)
    result.cheap, result.cost = False, result.cost + 4
    return result


def _split(op: Op) -> Sequence[Value]:
    source = op.operand(0)
    axis = op.axis(source.rank)
    results: list[Value] = []
    begin: Dim = 0
    parts = [op.type(output).shape for output in range(len(op.node.outputs))]
    sizes = [None if part is None else part[axis] for part in parts]
    if op.has(1) and not all(size is not None and op.low.is_bound(size) for size in sizes):
        op.low.size_from_data(op.value(1), sizes)
    for output in range(len(op.node.outputs)):
        shape = op.shape(output)
        results.append(_part(source, shape, axis, begin))
        begin = dims.add(begin, shape[axis])
    return results


def _part(source: Value, shape: Shape, axis: int, begin: Dim) -> Value:
    def index(code: Code, at: Index) -> Index:
        return [item + code.kernel.size(begin) if a == axis else item for a, item in enumerate(at)]

    return moved(source, shape, index, unit=True)


def _concat(op: Op) -> Sequence[Value]:
    parts = [op.operand(i) for i in range(len(op.node.inputs))]
    shape = op.shape()
    axis = op.axis(len(shape))
    cost = 1 + sum(cost_of(part) for part in parts)
    static = all(isinstance(part.shape[axis], int) and part.shape[axis] for part in parts)
    total_size = dims.product(shape)
    small = isinstance(total_size, int) and total_size <= 64
    # Along a short axis a choice is cheap: coordinates for GatherND, the halves of a rotation.
    short = len(parts) <= 4 and shape[axis] == len(parts)
    if static and (small or short or is_apart(op.low, op.node.outputs[0])):
        return [Lazy(op.dtype(), shape, _choose(parts, axis), cost=cost)]
    return [concatenated(op.low, op.dtype(), parts, shape, axis)]


def is_apart(low: Lowering, codes: ir.Value | None) -> bool:
    """Whether these are halves of bytes, which no kernel of a GPU writes: attention reads the bytes."""
    apart = codes is not None and masks.halves(codes) is not None
    return apart and isinstance(low.machine, Gpu)


def _choose(parts: Sequence[Value], axis: int) -> Callable[[Code, Index], Expr]:
    widths = [int(part.shape[axis]) for part in parts]  # type: ignore[arg-type]
    begins = [sum(widths[:i]) for i in range(len(widths))]

    def element(code: Code, index: Index) -> Expr:
        position = index[axis]
        number = known(position)
        result = None
        for part, begin, width in reversed(list(zip(parts, begins, widths, strict=True))):
            if number is not None and not begin <= number < begin + width:
                continue
            at = i64(0) if width == 1 else position - i64(begin)
            if number is None and width > 1:
                at = tirx.max(tirx.min(at, i64(width - 1)), i64(0))
            item = part.at(code, [*index[:axis], at, *index[axis + 1 :]])
            result = item if result is None else select(position < i64(begin + width), item, result)
        return result

    return element


def concatenated(low: Lowering, dtype: D, parts: Sequence[Value], shape: Shape, axis: int) -> Ready:
    """Each part is copied by loops of its own, so no element is looked for."""
    kernel = Kernel(low)
    out = kernel.write(dtype, shape)
    store = general.into(out, dtype, kernel.shape(shape))
    begin = i64(0)
    schedule = ""
    for part in parts:
        if isinstance(part, Ready) and not isinstance(low.machine, Gpu):
            schedule = _stretches(kernel, part, shape, axis, begin, store)
        else:
            offset = begin

            def place(code: Code, index: Index, element: Expr, offset: Expr = offset) -> None:
                store(code, [*index[:axis], index[axis] + offset, *index[axis + 1 :]], element)

            schedule = general.elementwise(kernel, _by_dims(part), place)
        begin = begin + kernel.size(part.shape[axis])
    return kernel.finish(schedule)[0]


def _stretches(
    kernel: Kernel, part: Ready, shape: Shape, axis: int, begin: Expr, store: Store
) -> str:
    """Copy what lies in memory: from ``axis`` on its elements are neighbours, there and in the result."""
    count = kernel.size(dims.product(shape[:axis]))
    length = kernel.size(dims.product(part.shape[axis:]))
    whole = kernel.size(dims.product(shape[axis:]))
    first = begin * kernel.size(dims.product(shape[axis + 1 :]))

    def move(code: Code, number: Expr, at: Expr) -> None:
        element = part.at(code, [number * length + at])
        store(code, [number * whole + first + at], element)

    return general.stretches(kernel, count, length, move)


def _by_dims(value: Value) -> Value:
    """``value`` under a wrapper that is indexed dim by dim only."""
    return Lazy(value.dtype, value.shape, lambda code, index: value.at(code, index))


def wrapped(position: Expr, size: Expr) -> Expr:
    """An index that may count from the end, as one from the front within the bounds."""
    position = cast(position, "int64")
    position = select(position < i64(0), position + size, position)
    # Indices out of range are an error in ONNX; reading elsewhere than in the tensor never is.
    return tirx.max(tirx.min(position, size - i64(1)), i64(0))


def _gather(op: Op) -> Sequence[Value]:
    data, indices = op.operand(0), op.operand(1)
    if not is_cheap(data):
        data = op.low.force(data)
    axis = op.axis(data.rank)
    shape = op.shape()

    def index(code: Code, at: Index) -> Index:
        inner = at[axis : axis + indices.rank]
        size = code.kernel.size(data.shape[axis])
        picked = code.bind(wrapped(indices.at(code, inner), size))
        return [*at[:axis], picked, *at[axis + indices.rank :]]

    result = moved(data, shape, index, unit=axis < data.rank - 1)
    result.cheap = False
    result.cost += cost_of(indices) + 1
    return [result]


def _gather_elements(op: Op) -> Sequence[Value]:
    data, indices = op.operand(0), op.operand(1)
    axis = op.axis(data.rank)

    def index(code: Code, at: Index) -> Index:
        picked = wrapped(indices.at(code, at), code.kernel.size(data.shape[axis]))
        return [picked if a == axis else item for a, item in enumerate(at)]

    result = moved(data, op.shape(), index)
    result.cheap = False
    result.cost += cost_of(indices) + 1
    return [result]


def _gather_nd(op: Op) -> Sequence[Value]:
    data, indices = op.operand(0), op.operand(1)
    batch = op.integer("batch_dims")
    depth = indices.shape[-1]
    if not isinstance(depth, int):
        raise op.gap("indices of unknown depth")

    def index(code: Code, at: Index) -> Index:
        own = at[: indices.rank - 1]
        sizes = code.kernel.shape(data.shape)
        picked = [wrapped(indices.at(code, [*own, i64(i)]), sizes[batch + i]) for i in range(depth)]
        return [*at[:batch], *picked, *at[indices.rank - 1 :]]

    result = moved(data, op.shape(), index)
    result.cheap = False
    result.cost += cost_of(indices) + depth
    return [result]


def _reverse_sequence(op: Op) -> Sequence[Value]:
    source, lengths = op.operand(0), op.operand(1)
    batch, time = op.integer("batch_axis", 1), op.integer("time_axis", 0)

    def index(code: Code, at: Index) -> Index:
        length = cast(lengths.at(code, [at[batch]]), "int64")
        step = at[time]
        turned = select(step < length, length - i64(1) - step, step)
        return [turned if a == time else item for a, item in enumerate(at)]

    return [moved(source, op.shape(), index)]


def _pad(op: Op) -> Sequence[Value]:
    source = op.operand(0)
    count = _count(op, 1) // 2
    axes = op.ints(3) if op.has(3) else tuple(range(count))
    if axes is None:
        raise op.gap("axes that are decided by data")
    place = {axis % source.rank: at for at, axis in enumerate(axes)}
    mode = op.text("mode", "constant")
    filling = op.operand(2) if op.has(2) else None
    shape = op.decided(
        lambda code, axis: (
            code.kernel.size(source.shape[axis])
            + (
                element_at(code, op, 1, place[axis]) + element_at(code, op, 1, place[axis] + count)
                if axis in place
                else i64(0)
            )
        )
    )

    def element(code: Code, at: Index) -> Expr:
        sizes = code.kernel.shape(source.shape)
        inside = const(True, "bool")
        where = []
        for axis, item in enumerate(at):
            if axis not in place:
                where.append(item)
                continue
            begin = element_at(code, op, 1, place[axis])
            end = element_at(code, op, 1, place[axis] + count)
            position, size = item - begin, sizes[axis]
            if mode == "constant":
                within = tirx.And(position >= i64(0), position < size)
                inside = within if known(inside) == 1 else tirx.And(inside, within)
                where.append(tirx.max(tirx.min(position, size - i64(1)), i64(0)))
            else:
                where.append(_padded(position, size, begin, end, mode))
        item = source.at(code, where)
        if mode != "constant":
            return item
        fill = (
            filling.at(code, [i64(0)] * filling.rank)
            if filling is not None
            else const(0, dtype_of(item))
        )
        return select(inside, item, fill)

    return [Lazy(source.dtype, shape, element, cost=2 + cost_of(source))]


def _padded(position: Expr, size: Expr, begin: Expr, end: Expr, mode: str) -> Expr:
    """Where a position outside of a (perhaps cropped) axis reads from."""
    first = tirx.max(i64(0) - begin, i64(0))
    size = size - first - tirx.max(i64(0) - end, i64(0))
    position = position - first
    if mode == "edge":
        inner = tirx.max(tirx.min(position, size - i64(1)), i64(0))
    elif mode == "wrap":
        inner = tirx.floormod(position, size)
    else:
        period = tirx.max((size - i64(1)) * i64(2), i64(1))
        inner = tirx.floormod(position, period)
        inner = tirx.min(inner, period - inner)
    return inner + first


def _center_crop_pad(op: Op) -> Sequence[Value]:
    source = op.operand(0)
    axes = list(op.integers("axes") or range(source.rank))
    axes = [axis % source.rank for axis in axes]
    shape = op.decided(
        lambda code, axis: (
            element_at(code, op, 1, axes.index(axis))
            if axis in axes
            else code.kernel.size(source.shape[axis])
        )
    )

    def element(code: Code, at: Index) -> Expr:
        inside = const(True, "bool")
        where = []
        for axis, item in enumerate(at):
            size = code.kernel.size(source.shape[axis])
            extra = code.kernel.size(shape[axis]) - size
            begin = select(
                extra >= i64(0),
                tirx.floordiv(extra, i64(2)),
                i64(0) - tirx.floordiv(i64(0) - extra, i64(2)),
            )
            position = item - begin
            inside = tirx.And(inside, tirx.And(position >= i64(0), position < size))
            where.append(tirx.max(tirx.min(position, size - i64(1)), i64(0)))
        item = source.at(code, where)
        return select(inside, item, const(0, dtype_of(item)))

    return [Lazy(source.dtype, shape, element, cost=2 + cost_of(source))]


def _trilu(op: Op) -> Sequence[Value]:
    source = op.operand(0)
    upper = op.integer("upper", 1)

    def element(code: Code, at: Index) -> Expr:
        diagonal = element_at(code, op, 1, 0) if op.has(1) else i64(0)
        offset = at[-1] - at[-2]
        item = source.at(code, at)
        keep = offset >= diagonal if upper else offset <= diagonal
        return select(keep, item, const(0, dtype_of(item)))

    return [Lazy(source.dtype, op.shape(), element, cost=1 + cost_of(source))]


def _depth_to_space(op: Op) -> Sequence[Value]:
    source = op.operand(0)
    block = op.integer("blocksize")
    shape = op.shape()
    channel_first = op.text("mode", "DCR") == "CRD"

    def index(code: Code, at: Index) -> Index:
        n, c, h, w = at
        inner = tirx.floormod(h, i64(block)) * i64(block) + tirx.floormod(w, i64(block))
        if channel_first:
            depth = c * i64(block * block) + inner
        else:
            depth = inner * code.kernel.size(shape[1]) + c
        return [n, depth, tirx.floordiv(h, i64(block)), tirx.floordiv(w, i64(block))]

    return [moved(source, shape, index)]


def _space_to_depth(op: Op) -> Sequence[Value]:
    source = op.operand(0)
    block = op.integer("blocksize")
    channel_first = op.text("mode", "DCR") == "CRD"

    def index(code: Code, at: Index) -> Index:
        n, depth, h, w = at
        channels = code.kernel.size(source.shape[1])
        if channel_first:
            c, inner = tirx.floordiv(depth, i64(block**2)), tirx.floormod(depth, i64(block**2))
        else:
            c, inner = tirx.floormod(depth, channels), tirx.floordiv(depth, channels)
        row, column = tirx.floordiv(inner, i64(block)), tirx.floormod(inner, i64(block))
        return [n, c, h * i64(block) + row, w * i64(block) + column]

    return [moved(source, op.shape(), index)]


# -- make -------------------------------------------------------------------------------------------


def _constant(op: Op) -> Sequence[Value]:
    tensor = ir.convenience.get_const_tensor(op.node.outputs[0], propagate_shape_type=False)
    if tensor is None:
        raise op.gap("a constant that is not a dense tensor")
    return [op.low.constant(op.node.outputs[0], tensor)]


def _shape(op: Op) -> Sequence[Value]:
    value = op.value(0)
    start, end = op.integer("start"), op.integer("end", value.rank)
    part = value.shape[slice(start, end)]
    return [Known(D.INT64, (len(part),), part)] if part else [_empty(op)]


def _empty(op: Op) -> Value:
    return op.low.parameter("empty", D.INT64, (0,), Recipe(packing.empty), ("empty", D.INT64))


def _size(op: Op) -> Sequence[Value]:
    return [Known(D.INT64, (), (dims.product(op.value(0).shape),))]


def _constant_of_shape(op: Op) -> Sequence[Value]:
    tensor = op.node.attributes.get_tensor("value") if "value" in op.node.attributes else None
    dtype = D.FLOAT if tensor is None else tensor.dtype
    value = 0.0 if tensor is None else tensor.numpy().reshape(-1)[0].item()
    shape = op.decided(lambda code, axis: element_at(code, op, 0, axis))
    return [repeated(Scalar(dtype, (), value), shape)]


def _range(op: Op) -> Sequence[Value]:
    start, delta = op.operand(0), op.operand(2)
    limit = op.operand(1)

    def length(code: Code, axis: int) -> Expr:
        first, last, step = (
            cast(v.at(code, [i64(0)] * v.rank), "float64") for v in (start, limit, delta)
        )
        count = tirx.ceil((last - first) / step)
        return tirx.max(cast(count, "int64"), i64(0))

    shape = op.decided(length)

    def element(code: Code, at: Index) -> Expr:
        first, step = (v.at(code, [i64(0)] * v.rank) for v in (start, delta))
        return first + step * cast(at[0], dtype_of(first))

    return [Lazy(start.dtype, shape, element, cheap=True)]


def _eye_like(op: Op) -> Sequence[Value]:
    dtype, k = op.dtype(), op.integer("k")

    def element(code: Code, at: Index) -> Expr:
        computed = storage.computed(dtype)
        return select(at[1] - at[0] == i64(k), const(1, computed), const(0, computed))

    return [Lazy(dtype, op.shape(), element)]


def _one_hot(op: Op) -> Sequence[Value]:
    indices, values = op.operand(0), op.operand(2)
    depth = op.operand(1)
    rank = indices.rank + 1
    axis = op.axis(rank, -1)

    def size(code: Code, at: int) -> Expr:
        if at == axis:
            return cast(depth.at(code, [i64(0)] * depth.rank), "int64")
        return code.kernel.size(indices.shape[at if at < axis else at - 1])

    shape = op.decided(size)

    def element(code: Code, at: Index) -> Expr:
        item = indices.at(code, [*at[:axis], *at[axis + 1 :]])
        item = cast(item, "int64")
        item = select(item < i64(0), item + code.kernel.size(shape[axis]), item)
        off, on = (values.at(code, [i64(i)]) for i in range(2))
        return select(item == at[axis], on, off)

    return [Lazy(values.dtype, shape, element, cost=2)]


ROWS: dict[str, Rule] = {
    "Reshape": _reshape,
    "Flatten": _as_output,
    "Squeeze": _as_output,
    "Unsqueeze": _as_output,
    "Transpose": _transpose,
    "Expand": _expand,
    "Tile": _tile,
    "Slice": _slice,
    "Split": _split,
    "Concat": _concat,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "ReverseSequence": _reverse_sequence,
    "Pad": _pad,
    "CenterCropPad": _center_crop_pad,
    "Trilu": _trilu,
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth,
    "Constant": _constant,
    "Shape": _shape,
    "Size": _size,
    "ConstantOfShape": _constant_of_shape,
    "Range": _range,
    "EyeLike": _eye_like,
    "OneHot": _one_hot,
}
