"""Names for everything at a module's edge: arguments, outputs, weights and dynamic dims.

The module is wrapped so that what `torch.export` sees is flat: a tuple of tensors in, a tuple of
tensors out, both in the order of their names. The wrapper's own prefix is taken off every module
path and weight name again, so a user meets only names from their own model.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import sympy
import torch
from torch.utils import _pytree as pytree

from netlathe.diagnostics import CaptureError, Diagnostic, InputError
from netlathe.pipeline.ledger import Entry

DynamicDims = Mapping[str, Mapping[int, str] | Sequence[str | None]]

_WRAPPED = "module"  # attribute of FlatModule that holds the user's module


# -- named leaves ---------------------------------------------------------------------------------


def named_leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The leaves of nested dicts, sequences, dataclasses and pytree nodes with dotted names.

    A lone leaf is called ``name``; the entries of a top-level mapping or dataclass go by their own
    names, those of a top-level sequence by ``name_0``, ``name_1``, ...; deeper levels add ``.key``.
    """
    for path, leaf in _leaves(value):
        if not path:
            yield name, leaf
        elif path[0].isdigit():
            yield ".".join((f"{name}_{path[0]}", *path[1:])), leaf
        else:
            yield ".".join(path), leaf


def _leaves(value: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, Mapping):
        children: Iterator[tuple[str, Any]] = ((str(k), v) for k, v in value.items())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        children = ((f.name, getattr(value, f.name)) for f in fields)
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        children = zip(value._fields, value, strict=True)  # pyright: ignore[reportAttributeAccessIssue]  # a named tuple
    elif isinstance(value, list | tuple):
        children = ((str(i), v) for i, v in enumerate(value))
    elif type(value) in pytree.SUPPORTED_NODES:
        flat, _ = pytree.tree_flatten(value)
        children = ((str(i), v) for i, v in enumerate(flat))
    else:
        yield (), value
        return
    for key, child in children:
        for path, leaf in _leaves(child):
            yield (key, *path), leaf


class FlatModule(torch.nn.Module):
    """The user's module behind a flat signature: tensors by position in, named tensors out.

    ``inside`` is the path, within ``module``, of the module whose names the user knows.
    """

    def __init__(
        self, module: torch.nn.Module, spec: pytree.TreeSpec, leaves: Sequence[Any], inside: str
    ) -> None:
        super().__init__()
        self.add_module(_WRAPPED, module)
        self._spec = spec
        self._fixed = [None if isinstance(x, torch.Tensor) else x for x in leaves]
        self._slots = [i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor)]
        self.output_names: tuple[str, ...] = ()
        self._prefix = ".".join((_WRAPPED, inside) if inside else (_WRAPPED,))

    def strip(self, path: str) -> str:
        """A module path or weight name as the user knows it, without the wrappers' prefix."""
        for prefix in (self._prefix, _WRAPPED):
            if path == prefix:
                return ""
            if path.startswith(f"{prefix}."):
                return path.removeprefix(f"{prefix}.")
        return path

    def canonical_names(self) -> dict[str, str]:
        """Every parameter name, tied ones included -> the first name of the same parameter."""
        first: dict[int, str] = {}
        names: dict[str, str] = {}
        for name, parameter in self.named_parameters(remove_duplicate=False):
            names[name] = self.strip(first.setdefault(id(parameter), name))
        return names

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves = list(self._fixed)
        for slot, tensor in zip(self._slots, tensors, strict=True):
            leaves[slot] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        output = self.get_submodule(_WRAPPED)(*args, **kwargs)
        named = [(n, leaf) for n, leaf in named_leaves(output, "output") if torch.is_tensor(leaf)]
        self.output_names = tuple(n for n, _ in named)
        return tuple(leaf for _, leaf in named)


def bind_arguments(
    module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[list[tuple[str, Any]], pytree.TreeSpec]:
    """Every argument leaf with the name its graph input will have, and how to put them together."""
    signature = inspect.signature(module.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(
            Diagnostic(
                "torch.arguments",
                f"the example inputs do not fit {type(module).__name__}.forward: {error}",
                notes=(f"signature: forward{signature}",),
                help="give args=(...) and kwargs={...} as you would call the module",
            )
        ) from None
    flat, spec = pytree.tree_flatten_with_path((tuple(args), dict(kwargs)))
    parameters = list(signature.parameters.values())
    named: list[tuple[str, Any]] = []
    for path, leaf in flat:
        side, first, *rest = (str(_key(step)) for step in path)
        if side == "1":
            name = first
        else:
            parameter = parameters[min(int(first), len(parameters) - 1)]
            name = parameter.name
            if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
                name += f"_{int(first) - parameters.index(parameter)}"
        named.append((".".join((name, *rest)), leaf))
    return named, spec


def _key(step: Any) -> Any:
    """The bare key of one step of a pytree path."""
    for attribute in ("idx", "key", "name"):
        if hasattr(step, attribute):
            return getattr(step, attribute)
    return step


# -- dynamic dims ---------------------------------------------------------------------------------


def named_dims(
    names: Sequence[str], tensors: Sequence[torch.Tensor], dynamic: DynamicDims
) -> list[dict[int, str]]:
    """Per input: axis -> name of its dynamic dim; checks that the user's table fits the inputs."""
    wrong = [
        Diagnostic(
            "torch.dynamic",
            f"dynamic dims are given for {key!r}, which is not a tensor input",
            help="tensor inputs: " + ", ".join(names),
        )
        for key in dynamic
        if key not in names
    ]
    table: list[dict[int, str]] = []
    sizes: dict[str, tuple[int, str]] = {}
    for name, tensor in zip(names, tensors, strict=True):
        given = dynamic.get(name, {})
        pairs = given.items() if isinstance(given, Mapping) else enumerate(given)
        dims: dict[int, str] = {}
        for axis, dim in pairs:
            if dim is None:
                continue
            if not -tensor.ndim <= axis < tensor.ndim:
                wrong.append(
                    Diagnostic(
                        "torch.dynamic",
                        f"input {name!r} has {tensor.ndim} dims; axis {axis} ({dim!r}) is not one",
                    )
                )
                continue
            axis %= tensor.ndim
            dims[axis] = dim
            size, first = sizes.setdefault(dim, (tensor.shape[axis], name))
            if size != tensor.shape[axis]:
                wrong.append(
                    Diagnostic(
                        "torch.dynamic",
                        f"dim {dim!r} is {size} in {first!r} but {tensor.shape[axis]} in {name!r}",
                        help="give the dims different names, or example inputs that agree",
                    )
                )
        table.append(dims)
    if wrong:
        raise InputError(wrong)
    return table


def refuse_singletons(table: Sequence[Mapping[int, str]], tensors: Sequence[torch.Tensor]) -> None:
    """Refuse example sizes 0 and 1 in dynamic dims: the exporter takes them for constants."""
    small = {
        dim
        for dims, tensor in zip(table, tensors, strict=True)
        for axis, dim in dims.items()
        if tensor.shape[axis] < 2
    }
    if small:
        raise InputError(
            Diagnostic(
                "torch.dynamic",
                f"dynamic dim {', '.join(sorted(small))} has size below 2 in the example inputs",
                notes=("an exporter cannot tell a size of 1 from a broadcast",),
                help="give example inputs whose dynamic dims are 2 or more",
            )
        )


# -- names ----------------------------------------------------------------------------------------


def name_values(
    model: ir.Model, flat: FlatModule, inputs: Sequence[str], outputs: Sequence[str]
) -> None:
    """Give graph inputs, outputs and initializers the names a user knows them by."""
    graph = model.graph
    canonical = flat.canonical_names()
    for value in list(graph.initializers.values()):
        name = canonical.get(str(value.name)) or flat.strip(str(value.name))
        if name != value.name and name not in graph.initializers:
            del graph.initializers[str(value.name)]
            value.name = name
            if value.const_value is not None:
                value.const_value.name = name
            graph.initializers[name] = value
    taken = set(inputs) | set(outputs)
    for node in graph:
        for value in node.outputs:
            if value.name in taken:
                value.name = f"{value.name}_value"
    if len(graph.inputs) != len(inputs):
        raise CaptureError(
            Diagnostic(
                "torch.inputs",
                f"the exporter kept {len(graph.inputs)} of {len(inputs)} inputs",
                notes=("inputs: " + ", ".join(inputs),),
            )
        )
    for value, name in zip(graph.inputs, inputs, strict=True):
        value.name = name
    seen: set[ir.Value] = set(graph.inputs) | set(graph.initializers.values())
    for i, (value, name) in enumerate(zip(list(graph.outputs), outputs, strict=True)):
        if value in seen:  # an input, a weight or an earlier output again: needs a name of its own
            node = ir.node("Identity", [value])
            copy = node.outputs[0]
            copy.type, copy.shape = value.type, value.shape
            graph.append(node)
            graph.outputs[i] = value = copy
        value.name = name
        seen.add(value)


def name_dims(
    model: ir.Model,
    program: torch.export.ExportedProgram,
    tensors: Sequence[torch.Tensor],
    names: Sequence[str],
    table: Sequence[Mapping[int, str]] | None,
    entries: list[Entry],
) -> tuple[dict[str, int], dict[str, tuple[int, int]]]:
    """Write the dims' names over the exporter's symbols; example sizes and bounds by name."""
    inputs = list(model.graph.inputs)
    symbols: dict[str, str] = {}  # exporter's symbol -> our name
    sizes: dict[str, int] = {}
    for position, (value, tensor) in enumerate(zip(inputs, tensors, strict=True)):
        assert value.shape is not None
        # A dim that the module turned out to fix is written as a symbol all the same: "8".
        value.shape = ir.Shape([int(str(d)) if str(d).isdigit() else d for d in value.shape])
        for axis, dim in enumerate(value.shape):
            given = table[position].get(axis) if table is not None else None
            if isinstance(dim, int):
                if given is not None:
                    raise CaptureError(
                        Diagnostic(
                            "torch.dynamic",
                            f"dim {given!r} of input {names[position]!r} is fixed to {dim} by the"
                            " module",
                            help=f"leave {given!r} out of dynamic=",
                        )
                    )
                continue
            symbol = str(dim)
            if not symbol.isidentifier():
                continue  # a relation such as 2*s0: follows from the dims it is made of
            if symbol not in symbols:
                default = "batch" if axis == 0 and position == 0 else f"{names[position]}_dim{axis}"
                symbols[symbol] = given or default
                if table is None:
                    reason = f"inferred as dynamic (size {tensor.shape[axis]} in the example)"
                    entries.append(Entry(symbols[symbol], "applied", reason))
            sizes.setdefault(symbols[symbol], tensor.shape[axis])
    for value in (*inputs, *model.graph.outputs):
        if value.shape is None:
            continue
        value.shape = ir.Shape(
            [d if isinstance(d, int) else _rename(d, symbols) for d in value.shape]
        )
    bounds: dict[str, tuple[int, int]] = {}
    for key, allowed in program.range_constraints.items():
        name = symbols.get(str(key))
        if name is not None:
            low, high = allowed.lower, allowed.upper  # sympy's Integer, or an infinity
            bounds[name] = (
                int(low) if isinstance(low, sympy.Integer) else 0,
                int(high) if isinstance(high, sympy.Integer) else 1 << 31,
            )
    return sizes, bounds


def _rename(dim: ir.SymbolicDim, symbols: Mapping[str, str]) -> str:
    return re.sub(r"[A-Za-z_]\w*", lambda m: symbols.get(m[0], m[0]), str(dim))
