"""One row of the table: the torch function of an ONNX op, and how its inputs are handed over.

A row's function takes the node's inputs positionally, under ONNX's names, and its attributes by name;
an input left out is None. What an older opset gave as an attribute and a newer one as an input is one
parameter, so both forms arrive at the same place.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import onnx_ir as ir
import torch
from torch import Tensor

from .storage import ONNX_DTYPE

# What the planner can tell a function about its node beyond inputs and attributes.
Fact = Literal["output_count", "opset", "input_dtypes"]

# An integer input that says something about shapes: a tensor, or (on the host) a list or a number.
Ints = Tensor | Sequence[int] | int


@dataclass(frozen=True)
class Row:
    """``function`` computes on tensors.

    ``host`` names the inputs it reads on the host (shapes, axes, sizes): those may be lists or numbers,
    and a function that reads nothing else makes its result on the CPU.
    ``on_host`` computes the same op when all inputs are shape values (lists of integers, possibly
    symbolic); None where shape values must become tensors first. ``facts`` are passed by name.
    """

    function: Callable[..., Any]
    host: frozenset[str] = frozenset()
    on_host: Callable[..., Any] | None = None
    facts: tuple[Fact, ...] = ()

    @cached_property
    def parameters(self) -> list[inspect.Parameter]:
        """The function's parameters, in order; torch's builtins show none, and take their inputs."""
        try:
            return list(inspect.signature(self.function).parameters.values())
        except ValueError:
            return [inspect.Parameter("inputs", inspect.Parameter.VAR_POSITIONAL)]

    @cached_property
    def returns_tuple(self) -> bool:
        """Whether the function returns a tuple, be it of one."""
        return returns_tuple(self.function)

    def input_name(self, position: int) -> str:
        """The parameter that the input at ``position`` binds to."""
        for index, parameter in enumerate(self.parameters):
            if parameter.kind is inspect.Parameter.VAR_POSITIONAL or index == position:
                return parameter.name
        raise IndexError(position)

    def max_inputs(self) -> int | None:
        """How many inputs the function takes; None if any number."""
        if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in self.parameters):
            return None
        return sum(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in self.parameters)

    def takes(self, attribute: str) -> bool:
        """Whether ``attribute`` is a parameter by name."""
        by_name = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        return any(p.name == attribute and p.kind in by_name for p in self.parameters)


def row(
    function: Callable[..., Any],
    *host: str,
    on_host: Callable[..., Any] | None = None,
    facts: tuple[Fact, ...] = (),
) -> Row:
    """A :class:`Row`, written shortly."""
    return Row(function, frozenset(host), on_host, facts)


def ints(value: Ints | None) -> list[int]:
    """A shape-like input as a list; empty for None. A tensor on an accelerator is waited for."""
    if value is None:
        return []
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, Sequence):
        return list(value)
    return [value]


def number(value: Any) -> Any:
    """A one-element input as a Python (or symbolic) number."""
    if isinstance(value, Tensor):
        return value.item()
    if isinstance(value, Sequence):
        (value,) = value
    return value


def axes_of(axes: Ints | None, rank: int) -> list[int]:
    """``axes`` made non-negative; all axes for None."""
    if axes is None:
        return list(range(rank))
    return [axis % rank if rank else 0 for axis in ints(axes)]


def along(values: Tensor, axis: int, rank: int) -> Tensor:
    """A 1-D tensor shaped to broadcast along ``axis`` of a tensor with ``rank`` dims."""
    return values.reshape([-1 if i == axis % rank else 1 for i in range(rank)])


def work_dtype(x: Tensor) -> torch.dtype:
    """The type to accumulate in: float32 for the half types, else the tensor's own."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def returns_tuple(function: Callable[..., Any]) -> bool:
    """Whether ``function`` is annotated to return a tuple; torch's builtins in the table do not."""
    annotation = getattr(inspect.unwrap(function), "__annotations__", {}).get("return", "")
    return str(annotation).startswith("tuple")


def onnx_dtype(x: Tensor, recorded: ir.DataType | None) -> ir.DataType:
    """The ONNX type of ``x``: what the graph records, else what torch's own type means."""
    return ONNX_DTYPE[x.dtype] if recorded is None else recorded
