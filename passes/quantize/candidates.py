"""The weights that may be quantized, who reads them, and why some cannot be.

Candidates are the initializers of two dims or more that hold parameters, or that a product or a lookup
reads; biases and scales of normalizations, which are vectors, are none.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.analysis.cost import is_parameter
from netlathe.analysis.products import Use, uses_of
from netlathe.diagnostics import Diagnostic, PassError, did_you_mean
from netlathe.ir import provenance, weights
from netlathe.ir.provenance import module_path

Array = npt.NDArray[Any]

FLOATS = frozenset(
    {ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
)
AT_ONCE = 1 << 18  # elements of a weight that are looked at at a time
# With magnitudes up to here, neither a scale nor its multiples leave the range of float32.
LARGEST_WEIGHT = 2.0**127


@dataclass(frozen=True)
class Candidate:
    """A weight matrix and the products and lookups among its readers, products first.

    ``is_operand``: an integer operator may read it as it is.
    """

    value: ir.Value
    uses: Sequence[Use]
    is_operand: bool = False

    @property
    def name(self) -> str:
        """The weight's name."""
        return self.value.name or ""

    @property
    def dims(self) -> tuple[int, ...]:
        """The weight's shape."""
        return dims_of(self.value)

    @property
    def names(self) -> set[str]:
        """What a pattern may match: the weight, and the modules that read it."""
        readers = [*self.value.consumers(), *(use.node for use in self.uses)]
        return {name for name in (self.name, *map(module_path, readers)) if name}

    def matches(self, pattern: str) -> bool:
        """Whether ``ignore=pattern`` or an override is about this weight."""
        return any(provenance.matches(name, pattern) for name in self.names)

    @property
    def input(self) -> Input | None:
        """What the one kind of product that reads a matrix multiplies it with; None for any other.

        Several products may read the same value; a table that is looked up as well stands for itself.
        """
        products = [use for use in self.uses if not use.is_lookup]
        found = {_input(use, self.value) for use in products}
        return found.pop() if len(found) == 1 and len(self.dims) == 2 else None


@dataclass(frozen=True)
class Input:
    """A value of the main graph that a weight is multiplied with, and the axis summed over."""

    value: ir.Value
    axis: int


def find(model: ir.Model, operands: Container[str] = ()) -> list[Candidate]:
    """All candidates, in the order of the graphs' initializers; integer operators may read ``operands``."""
    found = (Candidate(v, uses_of(v), v.name in operands) for v in _matrices(model))
    return [c for c in found if c.uses or is_parameter(c.value)]


def vectors(model: ir.Model) -> list[ir.Value]:
    """Parameters of one dim in float32 or float64: biases, and scales of normalizations."""
    wide = (ir.DataType.FLOAT, ir.DataType.DOUBLE)
    held = (v for graph in model.graphs() for v in graph.initializers.values())
    return [v for v in held if v.dtype in wide and is_parameter(v) and len(dims_of(v)) == 1]


def by_name(model: ir.Model) -> dict[str, ir.Value]:
    """All initializers; names are unique across subgraphs."""
    return {v.name or "": v for graph in model.graphs() for v in graph.initializers.values()}


def dims_of(value: ir.Value) -> tuple[int, ...]:
    """The shape of an initializer."""
    assert value.const_value is not None
    return tuple(value.const_value.shape.numpy())


def _matrices(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None or len(tensor.shape) < 2:
                continue
            if tensor.dtype not in FLOATS or is_parameter(value):  # else scales of quantized data
                yield value


def _input(use: Use, weight: ir.Value) -> Input | None:
    node = use.node
    if node.op_type != "MatMul" or node.domain or not isinstance(node.graph, ir.Graph):
        return None
    behind = [_origin(value) is weight for value in node.inputs]
    if behind == [False, True]:
        other, axis = node.inputs[0], -1
    elif behind == [True, False]:
        other, axis = node.inputs[1], -2
    else:
        return None
    return None if other is None or node.graph is not weight.graph else Input(other, axis)


def _origin(value: ir.Value | None) -> ir.Value | None:
    """The value that ``value`` is a moved form of."""
    while value is not None and (maker := value.producer()) is not None:
        if maker.op_type not in _MOVES or maker.domain:
            break
        value = maker.inputs[0]
    return value


_MOVES = frozenset({"Cast", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})


# -- what options say of them ---------------------------------------------------------------------


def check_patterns(
    name: str, found: Sequence[Candidate], ignore: Iterable[str], overrides: Iterable[str]
) -> None:
    """Return if each pattern of the pass ``name`` is about some weight.

    Raises:
        PassError: one matches none; all are listed.
    """
    given = [("ignore", p) for p in ignore] + [("overrides", p) for p in overrides]
    problems = [
        Diagnostic(
            f"{name}.{option_}",
            f"{option_}={pattern!r} matches no weight of the model",
            help=did_you_mean(pattern, sorted({n for c in found for n in c.names})),
        )
        for option_, pattern in given
        if not any(c.matches(pattern) for c in found)
    ]
    if problems:
        raise PassError(problems)


def left_out(candidate: Candidate, ignore: Iterable[str], min_size: int) -> str:
    """Which option leaves a weight as it is; empty if none does."""
    for pattern in ignore:
        if candidate.matches(pattern):
            return f"ignored: it matches {pattern!r}"
    size = math.prod(candidate.dims)
    return f"{size} elements, fewer than min_size={min_size}" if size < min_size else ""


# -- refusals -------------------------------------------------------------------------------------


def refusal(candidate: Candidate) -> str:
    """Why a weight cannot be quantized, as far as that shows without reading it."""
    value = candidate.value
    if not weights.is_weight(value):
        return "a graph input: a caller may override it"
    if value.is_graph_output():
        return "it is itself an output of the graph"
    assert value.dtype is not None
    if value.dtype in FLOATS:
        return ""
    if is_parameter(value):
        return f"{value.dtype.name}: quantized already"
    return f"{value.dtype.name}: no floating-point numbers"


def unfit(value: ir.Value, largest: float = LARGEST_WEIGHT) -> str:
    """Why the contents of a weight cannot be quantized; reads it."""
    assert value.const_value is not None
    array = weights.numbers(value.const_value)
    most = max(map(largest_magnitude, _parts(array)), default=0.0)
    weights.give_back_tensor(value.const_value)
    if not math.isfinite(most):
        return "it holds NaN or infinity"
    return "" if most <= largest else f"it holds {most:.2g}, too much for its scale"


def largest_magnitude(array: Array) -> float:
    """The largest magnitude in an array of a floating-point type; infinity where it holds that or NaN.

    Without its sign, the bits of such a number order as the number does, infinity and NaN at the end.
    """
    if not array.size:
        return 0.0
    bits = array.view(f"u{array.dtype.itemsize}")
    sign = bits.dtype.type(1 << (8 * array.dtype.itemsize - 1))
    top = np.max(bits & ~sign).reshape(1)
    found = float(top.view(array.dtype)[0])
    return found if math.isfinite(found) else math.inf


def _parts(array: Array) -> Iterator[Array]:
    """The array, some slices of its longest-strided axis at a time."""
    first = int(np.argmax(array.strides))
    array = np.moveaxis(array, first, 0)
    rows = max(1, AT_ONCE // max(1, math.prod(array.shape[1:])))
    for start in range(0, array.shape[0], rows):
        yield array[start : start + rows]
