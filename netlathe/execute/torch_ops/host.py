"""Shape values: int64 and bool tensors of rank 0 and 1 held on the host, as numbers and lists.

What ``Shape`` returns, and what is computed from it, is a Python list whose items may be symbolic
(torch.SymInt). So a shape never travels to an accelerator and back, and under a ShapeEnv a computed
``Reshape`` stays symbolic. The functions here are the rows of the table for such values.

A value of rank 0 is a number, of rank 1 a list. The planner knows the rank of each (``RANK``) and
leaves an op whose result would have a higher one to the tensor row.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from .row import ints, number

# SymInt and SymBool behave as numbers; they are not subclasses, so precise types would say too much.
Scalar = Any
HostValue = Any  # Scalar | list[Scalar]


def to_tensor(value: HostValue, like: Tensor | None = None) -> Tensor:
    """A shape value as an int64 or bool tensor, on the device of ``like`` (default: the CPU)."""
    device = "cpu" if like is None else like.device
    items = value if isinstance(value, list) else [value]
    if any(isinstance(item, (torch.SymInt, torch.SymBool)) for item in items):
        # torch.tensor would demand concrete numbers.
        scalars = [torch.scalar_tensor(item, dtype=torch.int64, device=device) for item in items]
        return torch.stack(scalars) if isinstance(value, list) else scalars[0]
    boolean = bool(items) and all(isinstance(item, bool) for item in items)
    return torch.tensor(value, dtype=torch.bool if boolean else torch.int64, device=device)


def place(x: Tensor, like: Tensor) -> Tensor:
    """A tensor computed from shape values alone, brought to the device of what it meets."""
    return x.to(like.device, non_blocking=True)


# -- the rows -------------------------------------------------------------------------------------


def _elementwise(function: Callable[..., Scalar], name: str) -> Callable[..., HostValue]:
    """``function`` over scalars and lists, broadcast."""

    def compute(*values: HostValue, **_: Any) -> HostValue:
        lists = [value for value in values if isinstance(value, list)]
        if not lists:
            return function(*values)
        length = max((len(v) for v in lists), default=1)
        if any(len(v) == 0 for v in lists):
            length = 0

        def item(value: HostValue, index: int) -> Scalar:
            if not isinstance(value, list):
                return value
            return value[0 if len(value) == 1 else index]

        return [function(*(item(value, i) for value in values)) for i in range(length)]

    compute.__name__ = compute.__qualname__ = name
    return compute


def _truncated(a: Scalar, b: Scalar) -> Scalar:
    # Shapes are not negative, and the floor of a SymInt quotient needs no guard on the sign.
    if isinstance(a, int) and isinstance(b, int) and (a < 0) != (b < 0):
        return -(abs(a) // abs(b))
    return a // b


def _where(condition: Scalar, x: Scalar, y: Scalar) -> Scalar:
    return x if condition else y


def _extreme(function: Callable[[Scalar, Scalar], Scalar]) -> Callable[..., Scalar]:
    # torch's own, because Python's max would decide which is larger, and note a guard.
    return lambda *items: functools.reduce(function, items)


add = _elementwise(operator.add, "add")
sub = _elementwise(operator.sub, "sub")
mul = _elementwise(operator.mul, "mul")
div = _elementwise(_truncated, "div")
neg = _elementwise(operator.neg, "neg")
absolute = _elementwise(abs, "absolute")
maximum = _elementwise(_extreme(torch.sym_max), "maximum")
minimum = _elementwise(_extreme(torch.sym_min), "minimum")
equal = _elementwise(operator.eq, "equal")
less = _elementwise(operator.lt, "less")
less_or_equal = _elementwise(operator.le, "less_or_equal")
greater = _elementwise(operator.gt, "greater")
greater_or_equal = _elementwise(operator.ge, "greater_or_equal")
where = _elementwise(_where, "where")
logical_and = _elementwise(lambda a, b: bool(a) and bool(b), "logical_and")
logical_or = _elementwise(lambda a, b: bool(a) or bool(b), "logical_or")
logical_not = _elementwise(lambda a: not a, "logical_not")


def mod(a: HostValue, b: HostValue, *, fmod: int = 0) -> HostValue:
    """Mod."""
    return _elementwise(math.fmod if fmod else operator.mod, "mod")(a, b)


def shape(data: Tensor | HostValue, *, start: int = 0, end: int | None = None) -> list[Scalar]:
    """Shape: of a tensor, or of a shape value."""
    if isinstance(data, Tensor):
        return list(data.shape)[start:end]
    return ([len(data)] if isinstance(data, list) else [])[start:end]


def size(data: Tensor | HostValue) -> Scalar:
    """Size: the number of elements."""
    return math.prod(shape(data))


def identity(x: HostValue) -> HostValue:
    """Identity."""
    return x


def cast(input: HostValue, *, to: int, **_: Any) -> HostValue:
    """Cast to int64 or bool, which the planner has checked."""
    convert = bool if to == ir.DataType.BOOL else _to_int
    return [convert(i) for i in input] if isinstance(input, list) else convert(input)


def _to_int(item: Scalar) -> Scalar:
    return int(item) if isinstance(item, (bool, float)) else item


def gather(data: list[Scalar], indices: HostValue, *, axis: int = 0) -> HostValue:
    """Gather from a list."""
    return [data[i] for i in indices] if isinstance(indices, list) else data[indices]


def concat(*inputs: list[Scalar], axis: int = 0) -> list[Scalar]:
    """Concat of lists."""
    return [item for values in inputs for item in values]


def slice_(
    data: list[Scalar],
    starts: HostValue,
    ends: HostValue,
    axes: HostValue | None = None,
    steps: HostValue | None = None,
) -> list[Scalar]:
    """Slice of a list."""
    start, end = number(starts), number(ends)
    step = 1 if steps is None else number(steps)
    if step < 0 and end < -len(data):
        return data[start::step]  # ONNX's "past the beginning"
    return data[start:end:step]


def split(
    input: list[Scalar],
    split: HostValue | None = None,
    *,
    axis: int = 0,
    num_outputs: int | None = None,
    output_count: int,
) -> tuple[list[Scalar], ...]:
    """Split of a list; without sizes into equal parts, the last smaller."""
    part = -(-len(input) // output_count)
    sizes = [part] * output_count if split is None else ints(split)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(input[s : s + n] for s, n in zip(starts, sizes, strict=True))


def unsqueeze(data: Scalar, axes: HostValue | None = None) -> list[Scalar]:
    """Unsqueeze of a number to a list."""
    return [data]


def squeeze(data: HostValue, axes: HostValue | None = None) -> Scalar:
    """Squeeze of a one-element list to a number."""
    return number(data)


def reshape(data: HostValue, shape: HostValue, *, allowzero: int = 0) -> HostValue:
    """Reshape between a number and a one-element list, or of a list to itself."""
    items = data if isinstance(data, list) else [data]
    return items if len(ints(shape)) == 1 else number(items)


def _reduce(function: Callable[[Sequence[Scalar]], Scalar], name: str) -> Callable[..., HostValue]:
    def compute(
        data: HostValue,
        axes: HostValue | None = None,
        *,
        keepdims: int = 1,
        noop_with_empty_axes: int = 0,
    ) -> HostValue:
        if not isinstance(data, list) or (axes in (None, []) and noop_with_empty_axes):
            return data
        result = function(data)
        return [result] if keepdims else result

    compute.__name__ = compute.__qualname__ = name
    return compute


reduce_prod = _reduce(math.prod, "reduce_prod")
reduce_sum = _reduce(sum, "reduce_sum")
reduce_max = _reduce(lambda items: _extreme(torch.sym_max)(*items), "reduce_max")
reduce_min = _reduce(lambda items: _extreme(torch.sym_min)(*items), "reduce_min")


_COMPARISONS = [equal, less, less_or_equal, greater, greater_or_equal]
_LOGIC = [logical_and, logical_or, logical_not]
_ARITHMETIC: list[Callable[..., HostValue]] = [
    add,
    sub,
    mul,
    div,
    mod,
    neg,
    absolute,
    maximum,
    minimum,
]
GIVE_BOOL = (*_COMPARISONS, *_LOGIC)


# -- the rank of the result -----------------------------------------------------------------------

# A constant operand is given as its contents, anything else as None.
Known = Sequence[HostValue | None]
RankRule = Callable[[Sequence[int], Known, dict[str, Any]], int | None]


def _broadcast(ranks: Sequence[int], known: Known, attributes: dict[str, Any]) -> int | None:
    return max(ranks)


def _cast(ranks: Sequence[int], known: Known, attributes: dict[str, Any]) -> int | None:
    # Other integer types would be forgotten on the way; floats would lose their rounding.
    to = ir.DataType(attributes["to"])
    return ranks[0] if to in (ir.DataType.INT64, ir.DataType.BOOL) else None


def _reshape(ranks: Sequence[int], known: Known, attributes: dict[str, Any]) -> int | None:
    target = known[1]
    return len(target) if isinstance(target, list) and len(target) <= 1 else None


def _reduced(ranks: Sequence[int], known: Known, attributes: dict[str, Any]) -> int | None:
    return ranks[0] if attributes.get("keepdims", 1) else 0


RANK: dict[Callable[..., Any], RankRule] = {
    **dict.fromkeys([*_ARITHMETIC, *_COMPARISONS, *_LOGIC, where, identity], _broadcast),
    cast: _cast,
    shape: lambda ranks, known, attributes: 1,
    size: lambda ranks, known, attributes: 0,
    gather: lambda ranks, known, attributes: ranks[1] if ranks[0] == 1 else None,
    concat: lambda ranks, known, attributes: 1,
    slice_: lambda ranks, known, attributes: 1,
    split: lambda ranks, known, attributes: 1,
    unsqueeze: lambda ranks, known, attributes: 1 if ranks[0] == 0 else None,
    squeeze: lambda ranks, known, attributes: 0 if ranks[0] == 1 else None,
    reshape: _reshape,
    **dict.fromkeys([reduce_prod, reduce_sum, reduce_max, reduce_min], _reduced),
}
