"""From a module and example inputs to a raw ONNX graph; the exporter's noise and failures caught.

Capture is `torch.export` (non-strict), then `torch.onnx.export` at opset 25 without its optimizer.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt
import onnx_ir as ir
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from netlathe.diagnostics import CaptureError, Diagnostic, InputError
from netlathe.execute.compare import relative_error
from netlathe.execute.torch_ops import storage
from netlathe.frontends.exporter_metadata import condense
from netlathe.frontends.torch_signature import (
    DynamicDims,
    FlatModule,
    bind_arguments,
    name_dims,
    name_values,
    named_dims,
    refuse_singletons,
)
from netlathe.pipeline.ledger import Entry
from netlathe.pipeline.pass_ import Feeds

OPSET = 25
Arrays = dict[str, npt.NDArray[Any]]

_log = logging.getLogger(__name__)


@dataclass
class Exported:
    """A raw export: names and dims are final, operators and constants are the exporter's.

    ``example`` are the example inputs by graph input name. ``run`` calls the original module on
    feeds; ``moved`` says how far its outputs move, of their RMS, when what every leaf module gives, or
    every operator, carries a rounding error. ``intermediates`` interprets the program that the graph
    was translated from: its node names are the names of the graph's values, which is what bisection
    goes by.
    """

    model: ir.Model
    example: dict[str, npt.NDArray[Any]]
    dynamic: dict[str, int]  # name of the dim -> size in the example
    bounds: dict[str, tuple[int, int]]  # name of the dim -> sizes the export allows
    run: Callable[[Feeds], Arrays]
    moved: Callable[[Feeds], dict[str, float]]
    intermediates: Callable[[Feeds], Arrays]
    entries: list[Entry] = field(default_factory=list)


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


def _path_of(stack: Sequence[torch.nn.Module], root: FlatModule) -> str:
    paths = {id(m): name for name, m in root.named_modules()}
    for module in reversed(stack):
        if id(module) in paths:
            return root.strip(paths[id(module)])
    return ""


def _last_line(error: BaseException) -> str:
    """The last line with content of the innermost cause: what the exporter itself says is wrong."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Hints on how to debug the exporter come last; the reason is the first line then.
    reasons = [x for x in lines if not re.match(r"(For more|The error above|See )", x)]
    return f"{type(error).__name__}: {(reasons or [''])[0]}"


# -- export ---------------------------------------------------------------------------------------


def export(
    module: torch.nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    dynamic: DynamicDims | None,
    *,
    what: str,
    inside: str = "",
) -> Exported:
    """Export ``module`` (non-strict, eval mode, opset 25, not optimised).

    ``dynamic`` names dynamic dims per input; None lets the exporter infer them. ``what`` names the
    model in messages; ``inside`` is the path of the user's own module where ``module`` wraps it.

    Raises:
        InputError: the example inputs or dynamic dims do not fit the module.
        CaptureError: the exporter cannot express the module.
    """
    named, spec = bind_arguments(module, args, kwargs)
    names = [n for n, leaf in named if isinstance(leaf, torch.Tensor)]
    tensors = [leaf for _, leaf in named if isinstance(leaf, torch.Tensor)]
    flat = FlatModule(module, spec, [leaf for _, leaf in named], inside)

    entries = [
        Entry(n, "applied", f"argument fixed to {leaf!r} in the graph")
        for n, leaf in named
        if not isinstance(leaf, torch.Tensor) and leaf is not None
    ]
    table = None
    if dynamic is not None:
        table = named_dims(names, tensors, dynamic)
        refuse_singletons(table, tensors)

    outputs = _outputs(flat, tensors, what)
    with in_eval(flat), listening() as noise:
        program = _export_program(flat, tensors, table, what, entries, noise)
    reason = f"captured with torch {torch.__version__}, opset {OPSET}, non-strict"
    entries.append(
        Entry("torch.export", "applied", reason, detail={"messages": sorted(set(noise))})
    )
    return _graph_of(program, flat, names, tensors, outputs, table, entries, what)


def translate(
    program: torch.export.ExportedProgram,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    what: str,
) -> Exported:
    """The ONNX graph (opset 25, not optimised) of a program that was exported before.

    Its dynamic dims stay so. ``program`` is left as it was, and its weights are bound, not copied.

    Raises:
        InputError: the example inputs do not fit the program, or it was exported to be trained.
        CaptureError: the exporter cannot express the program.
    """
    module = program.module(check_guards=False)
    named, spec = bind_arguments(module, args, kwargs)
    names = [n for n, leaf in named if isinstance(leaf, torch.Tensor)]
    tensors = [leaf for _, leaf in named if isinstance(leaf, torch.Tensor)]
    flat = FlatModule(module, spec, [leaf for _, leaf in named], "")
    outputs = _outputs(flat, tensors, what)
    entries = [Entry("torch.export", "applied", f"a program of before, opset {OPSET}")]
    return _graph_of(_copy(program), flat, names, tensors, outputs, None, entries, what)


def _outputs(flat: FlatModule, tensors: Sequence[torch.Tensor], what: str) -> tuple[str, ...]:
    """The names of what the module gives on the example inputs."""
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
    if not flat.output_names:
        raise CaptureError(Diagnostic("torch.outputs", f"{what} returns no tensors"))
    return flat.output_names


def _graph_of(
    program: torch.export.ExportedProgram,
    flat: FlatModule,
    names: Sequence[str],
    tensors: Sequence[torch.Tensor],
    outputs: Sequence[str],
    table: Sequence[Mapping[int, str]] | None,
    entries: list[Entry],
    what: str,
) -> Exported:
    """The graph of ``program``, which is edited, with the names that ``flat`` knows."""
    with in_eval(flat), listening() as noise:
        _settle_attention(program)
        translated = _translate(program, flat, what, noise)
    model = translated.model
    condense(model, flat.strip)
    name_values(model, flat, names, outputs)
    sizes, bounds = name_dims(model, program, tensors, names, table, entries)

    def tensors_of(feeds: Feeds) -> list[torch.Tensor]:
        return [storage.from_numpy(feeds[n]) for n in names]

    def run(feeds: Feeds) -> Arrays:
        with in_eval(flat):
            got = flat(*tensors_of(feeds))
        return {n: storage.to_numpy(t) for n, t in zip(outputs, got, strict=True)}

    def moved(feeds: Feeds) -> dict[str, float]:
        exact = run(feeds)
        with _rounding_errors(flat):
            rounded = run(feeds)
        return {name: relative_error(rounded[name], array) for name, array in exact.items()}

    def intermediates(feeds: Feeds) -> Arrays:
        decomposed = translated.exported_program
        assert decomposed is not None  # it was translated from one
        return _interpret(decomposed, tensors_of(feeds))

    return Exported(
        model=model,
        example={n: storage.to_numpy(t) for n, t in zip(names, tensors, strict=True)},
        dynamic=sizes,
        bounds=bounds,
        run=run,
        moved=moved,
        intermediates=intermediates,
        entries=entries,
    )


def rounded_off(value: Any, rng: torch.Generator) -> Any:
    """``value`` with a rounding error in each element, if it is a float tensor."""
    if not torch.is_tensor(value) or not value.is_floating_point():
        return value
    noise = torch.rand(value.shape, generator=rng) * 2 - 1
    return (value * (1 + torch.finfo(value.dtype).eps * noise)).to(value.dtype)


@contextlib.contextmanager
def _rounding_errors(flat: FlatModule) -> Iterator[None]:
    """While this is open, what every leaf module gives carries a rounding error.

    A graph module calls no modules: there it is what every operator gives.
    """
    rng = torch.Generator().manual_seed(0)

    def round_off(value: Any) -> Any:
        return rounded_off(value, rng)

    class OfOperators(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            made = func(*args, **(kwargs or {}))
            aliased = func.is_view or func._schema.is_mutable  # another tensor would break the tie
            return made if aliased else pytree.tree_map(round_off, made)

    graphs = [m.graph for m in flat.modules() if isinstance(m, torch.fx.GraphModule)]
    if graphs:
        # torch has no rule for branches and loops under such a mode: programs with them count as exact.
        called = [node.target for graph in graphs for node in graph.nodes]
        exact = any(isinstance(target, torch._ops.HigherOrderOperator) for target in called)
        with contextlib.nullcontext() if exact else OfOperators():  # type: ignore[no-untyped-call]  # torch's
            yield
        return
    leaves = [m for m in flat.modules() if next(m.children(), None) is None]
    handles = [m.register_forward_hook(lambda _m, _x, made: round_off(made)) for m in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _copy(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The same program over the same weights, with a graph of its own that may be edited."""
    graph = copy.deepcopy(program.graph)
    for ours, theirs in zip(graph.nodes, program.graph.nodes, strict=True):
        ours.name = theirs.name  # a copy renames what Python has a meaning for, such as `input`
    return torch.export.ExportedProgram(
        root=program.graph_module,
        graph=graph,
        graph_signature=copy.deepcopy(program.graph_signature),
        state_dict=program.state_dict,
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=program.verifiers,
    )


_UNPROVEN = "Constraints violated"  # how torch begins what it says of named dims


def _export_program(
    flat: FlatModule,
    tensors: Sequence[torch.Tensor],
    table: Sequence[Mapping[int, str]] | None,
    what: str,
    entries: list[Entry],
    noise: Sequence[str],
) -> torch.export.ExportedProgram:
    """`torch.export`; where the module bounds a named dim (a table's length), once more with it.

    Where torch cannot prove a condition on named dims, it is tried once more with the condition left
    to run time: torch 2.11 does not see that min(16*s, 32*s) is 16*s, which a LLaMA with grouped heads
    asks it, and a GPT-Neo has a table that is cut to s unless s is its length. A dim that the module
    fixes is an error in both ways.
    """

    def attempt(
        ranges: Mapping[str, tuple[int | None, int | None]], *, deferred: bool = False
    ) -> torch.export.ExportedProgram:
        if table is None:
            auto = torch.export.Dim.AUTO
            shapes: Any = tuple(dict.fromkeys(range(t.ndim), auto) for t in tensors)
        else:
            dims = {
                name: torch.export.Dim(name, min=low, max=high)
                for at in table
                for name in at.values()
                for low, high in [ranges.get(name, (None, None))]
            }
            shapes = tuple({axis: dims[name] for axis, name in at.items()} for at in table)
        return torch.export.export(
            flat,
            tuple(tensors),
            dynamic_shapes=(shapes,),
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=deferred,
        )

    with _module_stack() as stack:
        try:
            return attempt({})
        except Exception as error:
            failure, where = error, _path_of(stack, flat)
        ranges = _suggested_ranges(str(failure))
        bounded = [
            Entry(name, "applied", f"the module bounds it: {low or 0} to {high or 'any size'}")
            for name, (low, high) in ranges.items()
        ]
        if ranges:
            stack.clear()
            try:
                program = attempt(ranges)
            except Exception as error:
                failure, where = error, _path_of(stack, flat)
            else:
                entries += bounded
                return program
        if table is not None and _UNPROVEN in str(failure):
            stack.clear()
            with contextlib.suppress(Exception):  # the first failure is the one to report
                program = attempt(ranges, deferred=True)
                reason = (
                    "torch.export could not prove a condition on the dims; compared at two sizes"
                )
                entries += [*bounded, Entry("dims", "applied", reason)]
                return program
    raise CaptureError(
        Diagnostic(
            "torch.export",
            f"torch.export cannot capture {what}: {_last_line(failure)}",
            where=where,
            notes=_notes(failure, noise),
            help=_export_help(str(failure)),
        )
    ) from failure


def _fixes(message: str) -> list[str]:
    """The exporter's own suggestions about dims, one a line."""
    _, found, rest = message.partition("Suggested fixes:")
    block = rest.strip().split("\n\n")[0] if found else ""
    return [line.strip() for line in block.splitlines() if "=" in line]


def _suggested_ranges(message: str) -> dict[str, tuple[int | None, int | None]]:
    """Ranges the exporter asks for, by dim; empty where it asks for anything else as well."""
    ranges: dict[str, tuple[int | None, int | None]] = {}
    for fix in _fixes(message):
        found = re.fullmatch(r"(\w+) = Dim\('\w+'(?:, min=(\d+))?(?:, max=(\d+))?\).*", fix)
        if found is None:
            return {}
        name, low, high = found.groups()
        ranges[name] = (int(low) if low else None, int(high) if high else None)
    return ranges


def _export_help(message: str) -> str:
    if "Suggested fixes:" in message or "Constraint" in message:
        return "the module fixes a dim that was declared dynamic: leave that dim out of dynamic="
    if "data-dependent" in message or "GuardOnDataDependent" in message:
        return (
            f"control flow depends on tensor values: use torch.where / torch.cond there; {_EXPERTS}"
        )
    return "an eager attention implementation often exports where a fused one does not"


_EXPERTS = "load a mixture of experts of transformers with experts_implementation='batched_mm'"


def _translation_help(message: str) -> str:
    if "grouped_mm" in message:
        return f"which rows belong to an expert is only known when it runs: {_EXPERTS}"
    return "replace the operation, or load a Hugging Face model with another attn_implementation"


def _notes(error: BaseException, noise: Sequence[str]) -> tuple[str, ...]:
    return (*_fixes(str(error)), *(f"exporter: {line}" for line in list(noise)[-2:]))


def _settle_attention(program: torch.export.ExportedProgram) -> None:
    """Bring attention into the form that the exporter knows: four dims, and as many keys as queries.

    torch takes any leading dims (the windows of Twins and Hiera), and broadcasts keys and values over them as
    in any product (the heads of MobileNetV4). What is in another form still, with a mask beside other than
    four dims, or two dynamic ones among them, the exporter refuses.
    """
    for node in list(program.graph.nodes):
        if node.target is not torch.ops.aten.scaled_dot_product_attention.default:
            continue
        if not node.kwargs.get("enable_gqa"):
            _spread_shared(node)
        if _can_fold(node):
            result = _fold_leading(node)
            node.replace_all_uses_with(result)
            program.graph_signature.replace_all_uses(node.name, result.name)
            program.graph.erase_node(node)


def _spread_shared(node: torch.fx.Node) -> None:
    """Write out over which leading dims of the query its keys and values are broadcast."""
    query, *shared = _operands(node)
    leading = query.meta["val"].shape[:-2]
    for value in dict.fromkeys(shared):
        given = value.meta["val"].shape[:-2]
        pairs = list(zip(leading, given, strict=False))
        sizes = [new if isinstance(new, int) and old == 1 != new else -1 for new, old in pairs]
        if len(given) == len(leading) and any(size != -1 for size in sizes):
            wide = _before(node, torch.ops.aten.expand.default, value, [*sizes, -1, -1])
            node.replace_input_with(value, wide)


def _can_fold(node: torch.fx.Node) -> bool:
    """Whether attention has no mask, and four dims where those before the heads are one."""
    shapes = [value.meta["val"].shape for value in _operands(node)]
    ranks = {len(shape) for shape in shapes}
    alike = len({tuple(map(str, shape[:-3])) for shape in shapes}) == 1
    static = all(isinstance(size, int) for size in node.meta["val"].shape[1:-3])
    return len(node.args) == 3 and len(ranks) == 1 and ranks != {4} and alike and static


def _fold_leading(node: torch.fx.Node) -> torch.fx.Node:
    """The result of attention in whose place all leading dims but the last are one, or there are two."""
    aten, values = torch.ops.aten, []
    outer, rank = node.meta["val"].shape[:-3], len(node.meta["val"].shape)
    for value in _operands(node):
        for _ in range(rank, 4):
            value = _before(node, aten.unsqueeze.default, value, 0)
        if rank > 4:
            value = _before(node, aten.flatten.using_ints, value, 0, rank - 4)
        values.append(value)
    result = _before(node, node.target, *values, like=node)
    for _ in range(rank, 4):
        result = _before(node, aten.squeeze.dim, result, 0)
    if rank > 4:
        result = _before(node, aten.unflatten.int, result, 0, [-1, *outer[1:]])
    return result


def _operands(node: torch.fx.Node) -> list[torch.fx.Node]:
    """The query, the keys and the values of attention."""
    return [value for value in node.args[:3] if isinstance(value, torch.fx.Node)]


def _before(
    node: torch.fx.Node, operator: Any, *args: Any, like: torch.fx.Node | None = None
) -> torch.fx.Node:
    """A call in front of a node, in the same module as ``like``, else as its first argument."""
    like = like or args[0]
    with node.graph.inserting_before(node):
        made = node.graph.call_function(operator, args, dict(like.kwargs) if like is node else {})
    values = [arg.meta["val"] if isinstance(arg, torch.fx.Node) else arg for arg in args]
    made.meta = dict(like.meta) | {"val": operator(*values, **made.kwargs)}
    return made


def _translate(
    program: torch.export.ExportedProgram, flat: FlatModule, what: str, noise: Sequence[str]
) -> torch.onnx.ONNXProgram:
    try:
        made = torch.onnx.export(
            program, dynamo=True, opset_version=OPSET, optimize=False, verbose=False
        )
    except Exception as error:
        at, where = _blamed(error, program, flat)
        raise CaptureError(
            Diagnostic(
                "torch.onnx",
                f"{what} has an operation without ONNX form: {_last_line(error)}",
                at=at,
                where=where,
                notes=_notes(error, noise),
                help=_translation_help(str(error)),
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


def _blamed(
    error: BaseException, program: torch.export.ExportedProgram, flat: FlatModule
) -> tuple[str, str]:
    """The program node that a translation error talks about, and its module path."""
    seen: BaseException | None = error
    text = ""
    while seen is not None:
        text += str(seen)
        seen = seen.__cause__
    for node in program.graph.nodes:
        if re.search(rf"%{re.escape(node.name)}\b", text):
            scopes = list((node.meta.get("nn_module_stack") or {}).values())
            path = flat.strip(scopes[-1][0]) if scopes else ""
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
            self.seen[n.name] = storage.to_numpy(result.clone())
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
