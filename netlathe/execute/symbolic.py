"""Checks that a model works for every size of its dynamic dims, by running it on symbolic shapes.

The executor's own calls run under ``FakeTensorMode``: tensors have shapes and no data, dynamic dims are
symbols. A literal that was baked in at capture (a batch of 2 in a Reshape) then either does not fit,
or fits only if a symbol equals a number. torch would note that as a guard and go on; here it is an
error that names the node.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import onnx_ir as ir
import sympy
import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    GuardOnDataDependentSymNode,
    ShapeEnv,
    StatelessSymbolicContext,
)

from netlathe.diagnostics import Diagnostic, NetLatheError, VerifyError
from netlathe.execute.executor import Executor, failure
from netlathe.execute.plan import Slot, Step
from netlathe.execute.torch_ops import storage
from netlathe.ir import dims
from netlathe.ir.printing import show_node
from netlathe.ir.provenance import location

_DATA_DEPENDENT = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    GuardOnDataDependentSymNode,
)


# Small, because a tiny model may have room for few positions only.
_FIRST_PRIMES = (3, 11)


class _DependsOnData:
    """Stands for a value whose shape depends on data: whatever reads it cannot be checked."""


_UNKNOWN = _DependsOnData()


def check_symbolic(model: ir.Model, sizes: Mapping[str, int] | None = None) -> list[Diagnostic]:
    """Run ``model`` with symbolic input dims; return notes on what could not be decided.

    ``sizes`` gives a valid size of at least 2 for dims that need one (an image's height); others get
    small distinct primes. torch asks about those where it cannot decide for all sizes (whether a
    batch of 3 equals 3 heads), so a failure counts only if it also fails with other primes. Two kinds
    of notes come back: nodes whose shapes depend on data and were not checked, and dims that the
    model takes as equal though they are named differently.

    Raises:
        VerifyError: a node fails, or fixes a dynamic dim to a number; it is named.
        LowerError: a node has no row in the table.
    """
    errors = []
    for first_prime in _FIRST_PRIMES:
        runner = _SymbolicRunner(model, first_prime)
        try:
            with torch.no_grad():
                runner.check(sizes or {})
        except VerifyError as error:
            errors.append(error)
        else:
            return runner.notes
    raise errors[0]


class _SymbolicRunner(Executor):
    """The executor, with fake tensors for feeds and weights and a look at the guards after each step."""

    def __init__(self, model: ir.Model, first_prime: int) -> None:
        super().__init__(model)
        self.first_prime = first_prime
        self.environment = ShapeEnv(duck_shape=False)
        self.mode = FakeTensorMode(shape_env=self.environment, allow_non_fake_inputs=True)
        self.notes: list[Diagnostic] = []
        self.names: dict[str, str] = {}  # torch's symbol -> the dim's name
        self.seen = 0

    def check(self, sizes: Mapping[str, int]) -> None:
        """Run the main graph once."""
        inputs = {value.name: value for value in self.model.graph.inputs}
        symbols = self._symbols(sizes)
        # The Python dispatcher has shape-polymorphic versions of ops whose C++ ones want numbers.
        with self.mode, enable_python_dispatcher():
            values: dict[Slot, Any] = {}
            for slot in self._program.inputs:
                value = inputs[slot.name]
                if value.shape is None or value.dtype is None:
                    self.notes.append(_note(f"input {slot.name} has no recorded type", None))
                    values[slot] = _UNKNOWN
                    continue
                shape = [
                    symbols[f"{slot.name}.{axis}"] if dim is None else _evaluate(dim, symbols)
                    for axis, dim in enumerate(dims.from_ir(d) for d in value.shape)
                ]
                values[slot] = torch.empty(shape, dtype=storage.TORCH_DTYPE[value.dtype])
            self.seen = len(self.environment.guards)
            self._run(self._program, values, tuple(self._program.outputs))

    def _symbols(self, sizes: Mapping[str, int]) -> dict[str, torch.SymInt]:
        """A symbolic size for every named dim of the inputs, and for every unnamed one."""
        names: dict[str, None] = {}
        for value in self.model.graph.inputs:
            for axis, dim in enumerate(value.shape or ()):
                size = dims.from_ir(dim)
                if size is None:
                    names[f"{value.name}.{axis}"] = None
                elif not isinstance(size, int):
                    names.update({symbol.name: None for symbol in _free(size)})
        if not names:
            return {}
        primes = (prime for prime in _primes() if prime >= self.first_prime)
        hints = [sizes.get(name, prime) for name, prime in zip(names, primes, strict=False)]
        carrier = self.mode.from_tensor(
            torch.empty(hints, device="meta"),
            source=ConstantSource("dims"),
            symbolic_context=StatelessSymbolicContext(
                dynamic_sizes=[DimDynamic.DYNAMIC] * len(hints),
                constraint_sizes=[None] * len(hints),
            ),
        )
        sizes_made: Any = carrier.shape  # SymInts, which torch types as int
        made: dict[str, torch.SymInt] = dict(zip(names, sizes_made, strict=True))
        self.names = {str(size.node.expr): name for name, size in made.items()}
        return made

    # -- how the executor's steps differ here -----------------------------------------------------

    def _load(self, tensor: ir.TensorProtocol) -> torch.Tensor:
        shape = tensor.shape.numpy()
        return torch.empty(shape, dtype=storage.TORCH_DTYPE[tensor.dtype])

    def _on_device(self, value: Any) -> torch.Tensor:
        return value  # type: ignore[no-any-return]  # nothing is handed out

    def _call(self, step: Step, args: list[Any], kwargs: dict[str, Any]) -> Any:
        unknown: Any = (_UNKNOWN,) * len(step.outputs) if step.returns_tuple else _UNKNOWN
        if any(value is _UNKNOWN for value in (*args, *kwargs.values())):
            return unknown
        try:
            result = step.function(*args, **kwargs)
        except _DATA_DEPENDENT:
            self.notes.append(_note("its shape depends on data: not checked from here on", step))
            return unknown
        except NetLatheError:
            raise
        except Exception as error:
            raise VerifyError(failure(step, "symbolic.shape", error)) from error
        self._judge(step)
        return result

    def _judge(self, step: Step) -> None:
        """Look at the guards that the step has added."""
        new = self.environment.guards[self.seen :]
        self.seen = len(self.environment.guards)
        for guard in new:
            if not isinstance(guard.expr, sympy.Eq):
                continue  # bounds (a table of 512 positions) and inequalities fix nothing
            text = self._spell(guard.expr)
            if _fixes_a_dim(guard.expr):
                raise VerifyError(
                    Diagnostic(
                        "symbolic.baked",
                        f"the node works only where {text}",
                        at=show_node(step.node),
                        where=location(step.node),
                        help="a size was baked in as a literal; derive it from the input's shape",
                    )
                )
            self.notes.append(_note(f"the node takes it that {text}", step))

    def _spell(self, equation: Any) -> str:
        shown = {s: sympy.Symbol(self.names.get(str(s), str(s))) for s in equation.free_symbols}
        renamed = equation.xreplace(shown)
        return f"{renamed.lhs} = {renamed.rhs}"


def _fixes_a_dim(equation: Any) -> bool:
    """Whether the equation leaves less freedom than naming one dim by the others would.

    ``a = b`` and ``total = past + new`` relate dims; ``a = 2`` and ``a * b = 32`` fix them.
    """
    difference = sympy.expand(equation.lhs - equation.rhs)
    symbols = difference.free_symbols
    if len(symbols) < 2:
        return True
    if not difference.is_polynomial(*symbols):
        return True
    linear = sympy.Poly(difference, *symbols).total_degree() == 1
    return not linear or difference.subs(dict.fromkeys(symbols, 0)) != 0


def _evaluate(dim: dims.Dim, symbols: Mapping[str, torch.SymInt]) -> Any:
    """A dim's expression in terms of the symbolic sizes."""
    if isinstance(dim, int) or dim is None:
        return dim
    names = sorted(symbol.name for symbol in _free(dim))
    # Dim names need not be Python names: the arguments are numbered.
    numbered = [sympy.Symbol(f"d{i}") for i in range(len(names))]
    renamed = dim.xreplace(dict(zip([dims.symbol(n) for n in names], numbered, strict=True)))
    function = sympy.lambdify(numbered, renamed, modules=[{"floor": torch.sym_int}, "math"])
    return function(*(symbols[name] for name in names))


def _free(dim: Any) -> list[sympy.Symbol]:
    return sorted(dim.free_symbols, key=lambda symbol: symbol.name)


def _primes() -> Iterator[int]:
    """3, 5, 7, ...: distinct, so that no two dims are taken for each other; never 0 or 1."""
    for n in itertools.count(3, 2):
        if all(n % d for d in range(3, int(n**0.5) + 1, 2)):
            yield n


def _note(message: str, step: Step | None) -> Diagnostic:
    return Diagnostic(
        "symbolic.note",
        message,
        at="" if step is None else show_node(step.node),
        where="" if step is None else location(step.node),
    )
