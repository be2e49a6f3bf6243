"""Takes weights back that were tuned outside: the module of a compiled model, trained with plain PyTorch.

A tuned model is captured anew. Its graph is the compiled one, its weights are the given ones, and the
module is the original that it is compared with, as in every capture. What it was compiled from, and how,
is told in its ledger; that its weights are good is not claimed, as nobody here has trained it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from netlathe.diagnostics import Diagnostic, InputError, VerifyError, did_you_mean
from netlathe.execute.compare import inputs_of, relative_error
from netlathe.execute.executor import Executor
from netlathe.execute.fx import to_fx, weights_of
from netlathe.execute.torch_ops import storage
from netlathe.frontends.compare import Arrays, Original, check_same
from netlathe.frontends.finite import check_finite
from netlathe.frontends.torch_export import rounded_off
from netlathe.ir import interface, weights
from netlathe.ir.verify import verify
from netlathe.pipeline import manifest
from netlathe.pipeline.fingerprint import weights_digest
from netlathe.pipeline.interfaces import Captured
from netlathe.pipeline.ledger import Entry
from netlathe.pipeline.pass_ import Context, Feeds
from netlathe.pipeline.run import Compiled
from netlathe.pipeline.save import travelling

FRONTEND = "tuned"

State = Mapping[str, torch.Tensor]


def with_weights(compiled: Compiled, tuned: nn.Module | State) -> Compiled:
    """``compiled`` with the weights of its tuned module; see :meth:`Compiled.with_weights`."""
    state: State = tuned.state_dict() if isinstance(tuned, nn.Module) else tuned
    behind = weights_of(compiled.model)
    _check_form(state, behind)
    changed = _changed(compiled.model, state, behind)
    model = compiled.model.clone()
    entries = _put(model, changed)
    if problems := verify(model):
        raise VerifyError(problems)
    entries.append(_origin(compiled, model, len(changed)))
    known = {value.name for value in _inputs(model)}
    source = compiled.captured
    interface.start_over(model)

    def fitting(feeds: Feeds) -> Feeds:
        fit = inputs_of(compiled.model, feeds)
        return {name: array for name, array in fit.items() if name in known}

    def sample(sizes: Mapping[str, int], seed: int) -> Feeds:
        return fitting(source.sample(sizes, seed))

    original = _original(compiled.model, model, state)
    entry, _ = check_same(model, original, source.dynamic, sample, what="the tuned module")
    entries.append(entry)
    tokenize = source.tokenize
    captured = Captured(
        model,
        source.source,
        FRONTEND,
        source.dynamic,
        sample,
        entries,
        travelling(compiled),
        None if tokenize is None else lambda texts: fitting(tokenize(texts)),
    )
    context = Context(target=compiled.context.target, seed=compiled.context.seed)
    return Compiled(captured, model, [], context)


def _check_form(state: State, behind: Mapping[str, ir.TensorProtocol]) -> None:
    """Names, shapes and dtypes are those of the module; all that is wrong is listed."""
    problems = [
        Diagnostic(
            "tuned.unknown",
            f"the model has no weight named {name!r}",
            help=did_you_mean(name, list(behind)) if behind else "it has no weights",
        )
        for name in state
        if name not in behind
    ]
    for name, tensor in behind.items():
        if name not in state:
            problems.append(
                Diagnostic(
                    "tuned.missing",
                    f"weight {name!r} is missing",
                    help="give the whole state_dict() of the module that was tuned",
                )
            )
            continue
        given, shape = state[name], list(tensor.shape.numpy())
        dtype = storage.TORCH_DTYPE[tensor.dtype]
        if list(given.shape) != shape:
            message = f"weight {name!r} has the shape {list(given.shape)}, not {shape}"
            help = "tune the module of this compilation: another one has other widths"
            problems.append(Diagnostic("tuned.shape", message, help=help))
        elif given.dtype != dtype:
            message = f"weight {name!r} is {given.dtype}, not {dtype}"
            help = "bring the module back to its dtypes, for instance with module.to(dtype)"
            problems.append(Diagnostic("tuned.dtype", message, help=help))
    if problems:
        raise InputError(problems)


def _changed(
    model: ir.Model, state: State, behind: Mapping[str, ir.TensorProtocol]
) -> dict[int, ir.TensorProtocol]:
    """The new tensors, by the id of the tensor in whose place they go; one at a time is compared.

    Raises:
        InputError: a name of a tied weight says something else than another; a constant or an integer is
            not what it was; a weight is not finite. All that is wrong is listed.
    """
    free = {id(value.const_value) for value in _weights(model)}
    names: dict[int, list[str]] = {}
    for name, tensor in behind.items():
        names.setdefault(id(tensor), []).append(name)
    found: dict[int, ir.TensorProtocol] = {}
    problems: list[Diagnostic] = []
    for name, *others in names.values():
        old, given = behind[name], state[name].detach().cpu().contiguous()
        for other in others:
            if not _same_bits(given, state[other].detach().cpu().contiguous()):
                message = f"{name!r} and {other!r} are one weight and differ"
                help = "tune the module as it is: its tied weights are one parameter"
                problems.append(Diagnostic("tuned.tie", message, help=help))
        if _same_bits(given, storage.load(old)):
            continue
        if id(old) not in free or not given.is_floating_point():
            message = f"{name!r} is a constant of the graph and has other contents"
            help = "only weights in floating point can be tuned"
            problems.append(Diagnostic("tuned.constant", message, help=help))
            continue
        array = storage.to_numpy(given, old.dtype).copy()  # the module may be trained on
        try:
            check_finite([(name, array)], "the tuned module")
        except InputError as error:
            problems += error.diagnostics
        found[id(old)] = ir.Tensor(array, dtype=old.dtype, name=old.name)
    if problems:
        raise InputError(problems)
    return found


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def _weights(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value


def _put(model: ir.Model, changed: Mapping[int, ir.TensorProtocol]) -> list[Entry]:
    """Give every weight its new tensor; the ledger says for each what it was and is."""
    entries = []
    for value in _weights(model):
        old = value.const_value
        assert old is not None
        name, new = value.name or "", changed.get(id(old))
        if new is None:
            entries.append(Entry(name, "skipped", "as it was", left_out=True))
            continue
        digests = {"before": weights.digest(old), "after": weights.digest(new)}
        value.const_value = new
        entries.append(Entry(name, "applied", "tuned outside", detail=digests))
    return entries


def _origin(compiled: Compiled, model: ir.Model, count: int) -> Entry:
    """What the weights are now, and the compilation that they were tuned after."""
    return Entry(
        "weights",
        "applied",
        f"{count} tensors were tuned outside NetLathe, which has not seen how: losses from here on are"
        " measured to the tuned model",
        detail={
            "weights": weights_digest(model),
            "compilation": manifest.build(compiled)["compilation"],
        },
    )


def _inputs(model: ir.Model) -> list[ir.Value]:
    return [value for value in model.graph.inputs if not value.is_initializer()]


def _original(before: ir.Model, model: ir.Model, state: State) -> Original:
    """The module as it was handed out, with the tuned weights: what ``model`` must equal."""
    module = to_fx(before)
    module.load_state_dict(dict(state))
    names = [value.name or "" for value in _inputs(before)]
    dtypes = {value.name or "": value.dtype for value in before.graph.outputs}

    def call(function: Any, feeds: Feeds) -> Arrays:
        with torch.no_grad():
            made = function(*(storage.from_numpy(feeds[name]) for name in names))
        return {name: storage.to_numpy(made[name], dtype) for name, dtype in dtypes.items()}

    def inner(feeds: Feeds) -> Arrays:
        wanted = [v.name for node in model.graph for v in node.outputs if v.name]
        types = {v.name: v.dtype for node in model.graph for v in node.outputs}
        made = Executor(model).run(feeds, wanted)
        return {name: storage.to_numpy(tensor, types[name]) for name, tensor in made.items()}

    def moved(feeds: Feeds) -> dict[str, float]:
        exact, rounded = call(module, feeds), call(_Disturbed(module).run, feeds)
        return {name: relative_error(rounded[name], array) for name, array in exact.items()}

    return Original(run=lambda feeds: call(module, feeds), moved=moved, intermediates=inner)


class _Disturbed(torch.fx.Interpreter):
    """Runs a module while the result of every call carries a rounding error."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module)
        self._rng = torch.Generator().manual_seed(0)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """As torch does it, rounded once more."""
        return rounded_off(super().call_function(target, args, kwargs), self._rng)
