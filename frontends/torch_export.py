"""From a module and example inputs to a raw ONNX graph whose every name is ours to know.

The module is wrapped so that what `torch.export` sees is flat: a tuple of tensors in, a tuple of
tensors out, both in the order of their names. The wrapper's own prefix is taken off every module
path and weight name again, so a user meets only names from their own model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import sympy
import torch
from torch.utils import _pytree as pytree

from netlathe.diagnostics import CaptureError, Diagnostic, InputError
from netlathe.frontends.exporter_metadata import condense
from netlathe.pipeline.ledger import Entry
from netlathe.pipeline.pass_ import Feeds

OPSET = 25
Arrays = dict[str, npt.NDArray[Any]]
DynamicDims = Mapping[str, Mapping[int, str] | Sequence[str | None]]

_WRAPPED = "module"  # attribute of _Flat that holds the user's module
_log = logging.getLogger(__name__)


@dataclass
class Exported:
    """A raw export: names and dims are final, operators and constants are the exporter's.

    ``example`` are the example inputs by graph input name. ``run`` calls the original module on
    feeds; ``disturbed`` does the same while every leaf module's output carries a rounding error,
    which shows how far rounding alone can move the result. ``intermediates`` interprets the program
    that the graph was translated from: its node names are the names of the graph's values, which is
    what bisection goes by.
    """

    model: ir.Model
    example: dict[str, npt.NDArray[Any]]
    dynamic: dict[str, int]  # name of the dim -> size in the example
    bounds: dict[str, tuple[int, int]]  # name of the dim -> sizes the export allows
    run: Callable[[Feeds], Arrays]
    disturbed: Callable[[Feeds], Arrays]
    intermediates: Callable[[Feeds], Arrays]
    entries: list[Entry] = field(default_factory=list)


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
        children = zip(value._fields, value, strict=True)
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


class _Flat(torch.nn.Module):
    """The user's module behind a flat signature: tensors by position in, named tensors out."""

    def __init__(
        self, module: torch.nn.Module, spec: pytree.TreeSpec, leaves: Sequence[Any]
    ) -> None:
        super().__init__()
        self.add_module(_WRAPPED, module)
        self._spec = spec
        self._fixed = [None if isinstance(x, torch.Tensor) else x for x in leaves]
        self._slots = [i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor)]
        self.output_names: tuple[str, ...] = ()

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves = list(self._fixed)
        for slot, tensor in zip(self._slots, tensors, strict=True):
            leaves[slot] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        output = self.get_submodule(_WRAPPED)(*args, **kwargs)
        named = [(n, leaf) for n, leaf in named_leaves(output, "output") if torch.is_tensor(leaf)]
        self.output_names = tuple(n for n, _ in named)
        return tuple(leaf for _, leaf in named)


def _bind(
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


# -- eval mode, noise, blame ----------------------------------------------------------------------


@contextlib.contextmanager
def in_eval(module: torch.nn.Module) -> Iterator[None]:
    """Put ``module`` in eval mode without gradients, and every submodule back as it was after."""
    training = [m for m in module.modules() if m.training]
    for submodule in training:
        submodule.training = False  # not .eval(): modules of exported programs refuse that call
    try:
        with torch.no_grad():
            yield
    finally:
        for submodule in training:
            submodule.training = True


@contextlib.contextmanager
def listening() -> Iterator[list[str]]:
    """Collect what exporters print, log and warn, instead of letting it reach a terminal."""
    lines: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    collect, printed = Collect(), io.StringIO()
    loggers = [logging.getLogger(n) for n in ("torch", "torch.onnx", "torch.export", "onnxscript")]
    before = [(log, log.handlers[:], log.propagate) for log in loggers]
    for log in loggers:
        log.handlers, log.propagate = [collect], False
    try:
        with (
            warnings.catch_warnings(record=True) as warned,
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
        ):
            warnings.simplefilter("always")
            yield lines
        lines += [str(w.message) for w in warned]
    finally:
        for log, handlers, propagate in before:
            log.handlers, log.propagate = handlers, propagate
        lines += printed.getvalue().splitlines()


@contextlib.contextmanager
def _module_stack() -> Iterator[list[torch.nn.Module]]:
    """The modules being called, outermost first; after an exception, where it came from."""
    stack: list[torch.nn.Module] = []

    def enter(module: torch.nn.Module, _inputs: Any) -> None:
        stack.append(module)

    def leave(_module: torch.nn.Module, _inputs: Any, _output: Any) -> None:
        stack.pop()

    hooks = (
        torch.nn.modules.module.register_module_forward_pre_hook(enter),
        torch.nn.modules.module.register_module_forward_hook(leave),
    )
    try:
        yield stack
    finally:
        for hook in hooks:
            hook.remove()


def _path_of(stack: Sequence[torch.nn.Module], root: torch.nn.Module) -> str:
    paths = {id(m): name for name, m in root.named_modules()}
    for module in reversed(stack):
        if id(module) in paths:
            return strip_wrapper(paths[id(module)])
    return ""


def strip_wrapper(path: str) -> str:
    """A module path or weight name without the wrapper's prefix."""
    return path.removeprefix(_WRAPPED).removeprefix(".")


def _last_line(error: BaseException) -> str:
    """The last line with content of the innermost cause: what the exporter itself says is wrong."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Hints on how to debug the exporter come last; the reason is the first line then.
    reasons = [x for x in lines if not re.match(r"(For more|The error above|See )", x)]
    return f"{type(error).__name__}: {(reasons or [''])[0]}"


# -- dynamic dims ---------------------------------------------------------------------------------


def _named_dims(
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


def _no_singletons(table: Sequence[Mapping[int, str]], tensors: Sequence[torch.Tensor]) -> None:
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


# -- export ---------------------------------------------------------------------------------------


def export(
    module: torch.nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    dynamic: DynamicDims | None,
    *,
    what: str,
) -> Exported:
    """Export ``module`` (non-strict, eval mode, opset 25, not optimised).

    ``dynamic`` names dynamic dims per input; None lets the exporter infer them. ``what`` names the
    model in messages.

    Raises:
        InputError: the example inputs or dynamic dims do not fit the module.
        CaptureError: the exporter cannot express the module.
    """
    named, spec = _bind(module, args, kwargs)
    names = [n for n, leaf in named if isinstance(leaf, torch.Tensor)]
    tensors = [leaf for _, leaf in named if isinstance(leaf, torch.Tensor)]
    flat = _Flat(module, spec, [leaf for _, leaf in named])
    flat.train(module.training)

    entries = [
        Entry(n, "applied", f"argument fixed to {leaf!r} in the graph")
        for n, leaf in named
        if not isinstance(leaf, torch.Tensor) and leaf is not None
    ]
    if dynamic is None:
        table = None
        shapes: Any = tuple(dict.fromkeys(range(t.ndim), torch.export.Dim.AUTO) for t in tensors)
    else:
        table = _named_dims(names, tensors, dynamic)
        _no_singletons(table, tensors)
        dims = {d: torch.export.Dim(d) for at in table for d in at.values()}
        shapes = tuple({axis: dims[d] for axis, d in at.items()} for at in table)

    with in_eval(flat):
        try:
            flat(*tensors)
        except Exception as error:
            raise InputError(
                Diagnostic(
                    "torch.example",
                    f"{what} fails on the example inputs: {type(error).__name__}: {error}",
                    help="capture needs inputs that the module itself accepts",
                )
            ) from error
        outputs = flat.output_names
        if not outputs:
            raise CaptureError(Diagnostic("torch.outputs", f"{what} returns no tensors"))
        with listening() as noise:
            program = _export_program(flat, tensors, shapes, what, entries, noise)
            translated = _translate(program, what, noise)
    model = translated.model
    entries.append(
        Entry(
            "torch.export",
            "applied",
            f"captured with torch {torch.__version__}, opset {OPSET}, non-strict",
            detail={"messages": sorted(set(noise))},
        )
    )
    condense(model, strip_wrapper)
    _name_values(model, names, outputs)
    named_dims, bounds = _name_dims(model, program, tensors, names, table, entries)

    def tensors_of(feeds: Feeds) -> list[torch.Tensor]:
        return [torch.from_numpy(np.ascontiguousarray(feeds[n])) for n in names]

    def run(feeds: Feeds) -> Arrays:
        with in_eval(flat):
            got = flat(*tensors_of(feeds))
        return {n: t.detach().numpy() for n, t in zip(outputs, got, strict=True)}

    def disturbed(feeds: Feeds) -> Arrays:
        rng = torch.Generator().manual_seed(0)

        def round_off(module: torch.nn.Module, _inputs: Any, output: Any) -> Any:
            if not torch.is_tensor(output) or not output.is_floating_point():
                return output
            noise = torch.rand(output.shape, generator=rng) * 2 - 1
            return output * (1 + torch.finfo(output.dtype).eps * noise)

        leaves = [m for m in flat.modules() if next(m.children(), None) is None]
        handles = [m.register_forward_hook(round_off) for m in leaves]
        try:
            return run(feeds)
        finally:
            for handle in handles:
                handle.remove()

    def intermediates(feeds: Feeds) -> Arrays:
        return _interpret(translated.exported_program, tensors_of(feeds))

    return Exported(
        model=model,
        example={n: t.detach().numpy() for n, t in zip(names, tensors, strict=True)},
        dynamic=named_dims,
        bounds=bounds,
        run=run,
        disturbed=disturbed,
        intermediates=intermediates,
        entries=entries,
    )


def _export_program(
    flat: _Flat,
    tensors: Sequence[torch.Tensor],
    shapes: Any,
    what: str,
    entries: list[Entry],
    noise: Sequence[str],
) -> torch.export.ExportedProgram:
    """`torch.export`; where the module bounds a named dim (a table's length), once more with it."""

    def attempt(dynamic_shapes: Any) -> torch.export.ExportedProgram:
        return torch.export.export(
            flat, tuple(tensors), dynamic_shapes=(dynamic_shapes,), strict=False
        )

    with _module_stack() as stack:
        try:
            return attempt(shapes)
        except Exception as error:
            first, where = error, _path_of(stack, flat)
        if "Suggested fixes:" in str(first):
            fixes = str(first).split("Suggested fixes:")[1].strip().splitlines()
            ranges = [f.strip() for f in fixes if re.search(r"= Dim\(", f)]
            if len(ranges) == len([f for f in fixes if "=" in f]):  # only ranges, no constants
                refined = torch.export.dynamic_shapes.refine_dynamic_shapes_from_suggested_fixes(
                    str(first), (shapes,)
                )
                assert isinstance(refined, tuple)
                stack.clear()
                try:
                    program = attempt(refined[0])
                except Exception as error:
                    first, where = error, _path_of(stack, flat)
                else:
                    entries += [
                        Entry(f.split(" =")[0], "applied", f"the module itself bounds it: {f}")
                        for f in ranges
                    ]
                    return program
    raise CaptureError(
        Diagnostic(
            "torch.export",
            f"torch.export cannot capture {what}: {_last_line(first)}",
            where=where,
            notes=_notes(first, noise),
            help=_export_help(str(first)),
        )
    ) from first


def _export_help(message: str) -> str:
    if "Suggested fixes:" in message or "Constraint" in message:
        return "the module fixes a dim that was declared dynamic: leave that dim out of dynamic="
    if "data-dependent" in message or "GuardOnDataDependent" in message:
        return (
            "control flow depends on tensor values: use torch.where / torch.cond there, or for a"
            " mixture of experts the `batched_mm` implementation"
        )
    return "an eager attention implementation often exports where a fused one does not"


def _notes(error: BaseException, noise: Sequence[str]) -> tuple[str, ...]:
    fixes = str(error).split("Suggested fixes:")
    notes = [line.strip() for line in fixes[1].splitlines() if line.strip()] if fixes[1:] else []
    notes += [f"exporter: {line}" for line in list(noise)[-2:]]
    return tuple(notes)


def _translate(
    program: torch.export.ExportedProgram, what: str, noise: Sequence[str]
) -> torch.onnx.ONNXProgram:
    try:
        made = torch.onnx.export(
            program, dynamo=True, opset_version=OPSET, optimize=False, verbose=False
        )
    except Exception as error:
        at, where = _blamed(error, program)
        raise CaptureError(
            Diagnostic(
                "torch.onnx",
                f"{what} has an operation without ONNX form: {_last_line(error)}",
                at=at,
                where=where,
                notes=_notes(error, noise),
                help="replace the operation, or for a Hugging Face model choose another"
                " attention or experts implementation",
            )
        ) from error
    assert made is not None  # only export to a file of the older exporter returns None
    version = made.model.opset_imports.get("")
    if version != OPSET:
        raise CaptureError(
            Diagnostic(
                "torch.opset",
                f"the exporter made opset {version} where {OPSET} was asked for",
                help="upgrade torch and onnxscript",
            )
        )
    return made


def _blamed(error: BaseException, program: torch.export.ExportedProgram) -> tuple[str, str]:
    """The program node that a translation error talks about, and its module path."""
    seen: BaseException | None = error
    text = ""
    while seen is not None:
        text += str(seen)
        seen = seen.__cause__
    for node in program.graph.nodes:
        if re.search(rf"%{re.escape(node.name)}\b", text):
            scopes = list((node.meta.get("nn_module_stack") or {}).values())
            path = strip_wrapper(scopes[-1][0]) if scopes else ""
            return f"{node.name} = {node.target}", path
    return "", ""


class _Recorder(torch.fx.Interpreter):
    """Interprets a program and keeps every tensor by the name of the node that made it."""

    def __init__(self, program: torch.fx.GraphModule) -> None:
        super().__init__(program)
        self.seen: Arrays = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_function" and torch.is_tensor(result):
            self.seen[n.name] = result.detach().clone().numpy()
        return result


def _interpret(program: torch.export.ExportedProgram, tensors: Sequence[torch.Tensor]) -> Arrays:
    """Every value of the program on these inputs, by name."""
    weights = {**program.state_dict, **program.constants}
    signature = program.graph_signature
    given = iter(tensors)
    arguments: list[Any] = []
    for spec in signature.input_specs:
        weight = weights.get(spec.target) if spec.target is not None else None
        arguments.append(next(given) if weight is None else weight)
    recorder = _Recorder(program.graph_module)
    with torch.no_grad():
        recorder.run(*arguments)
    return recorder.seen


# -- names ----------------------------------------------------------------------------------------


def _name_values(model: ir.Model, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Give graph inputs, outputs and initializers the names a user knows them by."""
    graph = model.graph
    for value in list(graph.initializers.values()):
        name = strip_wrapper(str(value.name))
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


def _name_dims(
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
