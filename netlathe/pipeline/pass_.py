"""The pass protocol: a frozen dataclass whose fields are its options, and what running it yields.

    @options
    class Drop(ChoosingPass):
        \"\"\"Remove whole residual branches (LLM-Drop, arXiv 2406.15786).\"\"\"
        name = "drop"
        count: int = option(default=1, ge=0, help="how many branches to remove")

The same fields are the options in Python, in the text form ``drop(count=1)``, in a YAML recipe and in
the manifest. Every pass is also an ``onnx_ir`` pass: ``ir.passes.Sequential(Drop().bind(ctx))`` works.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Literal,
    Protocol,
    TypeVar,
    dataclass_transform,
    get_args,
    get_origin,
)

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pydantic
import pydantic.dataclasses

from netlathe.diagnostics import Diagnostic, OptionError, PassError
from netlathe.pipeline.ledger import Entry
from netlathe.pipeline.validation import explain

if TYPE_CHECKING:
    from netlathe.execute.statistics import Statistic, StatisticResult
    from netlathe.pipeline.interfaces import Target

T = TypeVar("T")
Array = npt.NDArray[Any]
# Graph input name -> array. Beside them may be, under a name that no input has, what the model should
# have answered: integers of the shape of its output's rows, such as a classifier's [b].
Feeds = Mapping[str, Array]
LABELS = "labels"
NO_DATA = "calibration.missing"  # the code of an error


# -- what a pass promises -------------------------------------------------------------------------


@dataclass(frozen=True)
class Exact:
    """Outputs stay bit-equal, up to the order of floating-point sums the runtime chooses."""


@dataclass(frozen=True)
class Equivalent:
    """The same function in exact arithmetic: outputs move by rounding only.

    ``tolerance`` bounds max|after - before| as a share of the output's RMS; the pass derives it.
    """

    tolerance: float


@dataclass(frozen=True)
class Lossy:
    """The function changes on purpose: checked against the pass' simulated reference instead."""


Exactness = Exact | Equivalent | Lossy


@dataclass(frozen=True)
class Reference:
    """What a lossy pass must equal: built from the model before it, without the edit code.

    ``tolerance`` bounds max|after - reference| as a share of the output's RMS; it is derived from the
    number formats involved, not tuned. ``reordered`` says that the edited model does its arithmetic in
    another order than the reference: then an ill-conditioned model may move further, as far as
    roundings move it.
    """

    model: ir.Model
    tolerance: float
    reordered: bool = False


@dataclass
class Result:
    """What a pass did. ``renamed`` maps old value names to new ones, or to None where removed."""

    changed: bool
    entries: list[Entry] = field(default_factory=list)
    renamed: dict[str, str | None] = field(default_factory=dict)
    statistics: dict[str, float] = field(default_factory=dict)


# -- what a pass is given -------------------------------------------------------------------------


class Progress(Protocol):
    """Where long work reports; the CLI draws bars, a library caller may pass its own."""

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """Yield ``items`` while showing how many are done."""
        ...


class SilentProgress:
    """Reports nothing."""

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """Yield ``items`` unchanged."""
        yield from items


class Pieces(Protocol):
    """Where pieces of work are kept."""

    def once(self, name: str, compute: Callable[[], Mapping[str, Array]]) -> Mapping[str, Array]:
        """See :meth:`Context.once`."""
        ...


def read_only(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Views of ``arrays`` that cannot be written to."""
    views = {name: np.asarray(array).view() for name, array in arrays.items()}
    for view in views.values():
        view.flags.writeable = False
    return views


def no_data(needed_by: str, option: str = "") -> Diagnostic:
    """What is said where ``needed_by``, for what its option asks, needs calibration data and has none."""
    return Diagnostic(
        NO_DATA,
        f"{needed_by} needs calibration data{option and f' for {option}'}",
        help="give --calibration FILE (.npz of named arrays, or .txt for a Hugging Face model), or"
        " calibration= from Python",
    )


@dataclass(frozen=True)
class Context:
    """Everything a pass may look at besides the model.

    ``calibration`` holds feeds in graph-input terms; it is empty where the user gave none. ``device``
    is where the executor runs calibration ("cpu", "cuda").
    """

    calibration: Sequence[Feeds] = ()
    target: Target | None = None
    seed: int = 0
    device: str = "cpu"
    progress: Progress = field(default_factory=SilentProgress)
    pieces: Pieces | None = field(default=None, repr=False, compare=False)  # set by the pipeline

    def rng(self, *scope: str) -> np.random.Generator:
        """A generator that depends on the seed and the scope's names only, never on global state."""
        key = [self.seed, *(int.from_bytes(name.encode(), "little") for name in scope)]
        return np.random.default_rng(np.random.SeedSequence(key))

    def once(self, name: str, compute: Callable[[], Mapping[str, Array]]) -> Mapping[str, Array]:
        """What ``compute`` solves for, such as one layer's basis; the arrays are read-only.

        Long work is cut into such pieces: with a cache, a run that was killed takes up those it had
        finished, and they are mapped from its files. ``name`` tells the piece from others of the pass; what
        it holds may depend on the model that the pass is given, on its options and on this context, and
        on nothing else.
        """
        if self.pieces is None:
            return read_only(compute())
        return self.pieces.once(name, compute)

    def collect(
        self,
        model: ir.Model,
        wanted: Sequence[Statistic],
        *,
        needed_by: str,
        settle: Callable[[StatisticResult], None] | None = None,
    ) -> list[StatisticResult]:
        """Run the calibration data through ``model`` and return one result per wanted statistic.

        ``settle`` is given each result before any sample goes on behind it; see the sweep.

        Raises:
            PassError: no calibration data was given.
        """
        if not self.calibration:
            raise PassError(no_data(needed_by))
        from netlathe.execute.calibration import sweep  # torch is an extra

        return sweep(
            model,
            self.calibration,
            wanted,
            device=self.device,
            progress=self.progress,
            settle=settle,
        )


# -- options --------------------------------------------------------------------------------------


def option(default: Any = ..., *, help: str, **constraints: Any) -> Any:
    """A pass option: its default, one help sentence, and pydantic constraints (ge, lt, ...).

    Write ``default=``: type checkers take an option without the word for a required one.
    """
    return pydantic.Field(default, description=help, **constraints)


C = TypeVar("C", bound=type)


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(option,))
def options(cls: C) -> C:
    """Class decorator that turns annotated fields into validated, keyword-only, frozen options.

    Making such a pass with an unknown, missing or impossible option raises OptionError. Where names are
    taken, a ``tuple[str, ...]`` or one of literals, a single one may be given as it is.
    """
    _take_single_names(cls)
    config = pydantic.ConfigDict(extra="forbid", strict=False)
    made: Any = pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=config)(cls)
    validate = made.__init__

    @functools.wraps(validate)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if args:  # pydantic takes them, whatever kw_only says
            message = f"options of {self.name} are given by name"
            raise OptionError(Diagnostic("option.positional", message))
        try:
            validate(self, **kwargs)
        except pydantic.ValidationError as error:
            raise OptionError(explain(type(self), error)) from error

    made.__init__ = __init__
    return made  # type: ignore[no-any-return]  # pydantic's decorator loses the class type


def _take_single_names(cls: type) -> None:
    """Let options that are tuples of names take a name as a tuple of one."""
    hints = inspect.get_annotations(cls)
    for name, hint in hints.items():
        if not isinstance(cls.__dict__.get(name), pydantic.fields.FieldInfo):
            continue  # no option
        if isinstance(hint, str):
            hint = eval(hint, vars(sys.modules[cls.__module__]), dict(vars(cls)))
        item, *rest = get_args(hint) or (None,)
        names = item is str or (
            get_origin(item) is Literal and all(isinstance(one, str) for one in get_args(item))
        )
        origin: Any = get_origin(hint)
        if origin is tuple and rest == [...] and names:
            single = pydantic.BeforeValidator(_several, json_schema_input_type=hint | item)
            hints[name] = Annotated[hint, single]
    cls.__annotations__ = hints


def _several(given: Any) -> Any:
    """A tuple of what is given; JSON, which is taken strictly, has lists for tuples."""
    if isinstance(given, str):
        return (given,)
    return tuple(given) if isinstance(given, list) else given


# -- the protocol ---------------------------------------------------------------------------------


class Pass(ir.passes.InPlacePass):
    """A graph transformation that states its exactness and accounts for every candidate.

    What a pass does follows from the model, its options and its context alone, and is the same every time:
    random numbers come from :meth:`Context.rng`, sets are sorted before they are walked through. A result
    may then be taken from a cache, where it is found by these and by the pass' name, version and code. A
    file that is read is named by :meth:`files`. A pass for which that does not hold, because it reads the
    time or the network, says so with ``repeatable = False``: it runs every time.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1  # raise it when the same options give another result
    repeatable: ClassVar[bool] = True
    # What a target has no kernels for is there afterwards too: gaps may be told before it runs.
    keeps_operators: ClassVar[bool] = False
    exactness: ClassVar[Exactness]

    @abc.abstractmethod
    def run(self, model: ir.Model, ctx: Context) -> Result:
        """Transform ``model`` in place and say what was done.

        Before: ``model`` is in normal form and verifies. After: the same. An exception may leave the
        model half edited: the pipeline works on a copy and throws it away.
        """

    def files(self) -> Sequence[Path]:
        """The files that it reads, as its options name them."""
        return ()

    def cannot_follow(self, earlier: Pass) -> str:
        """Why it cannot come behind ``earlier`` in a pipeline, at once or later; empty where it can.

        It is asked before anything runs, so that a plan refuses what would fail after hours.
        """
        return ""

    def needs_data(self) -> str:
        """The option that makes it run calibration data, such as ``score='kl'``; empty where none does.

        It is asked before anything runs, as :meth:`cannot_follow` is, and so without the model: that there
        may be nothing to do in it does not count.
        """
        return ""

    def option_values(self) -> dict[str, Any]:
        """Every option with its value, in field order."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]  # every concrete pass is a dataclass

    def __str__(self) -> str:
        """The canonical text form: options that differ from their default, in field order."""
        shown = []
        for f in dataclasses.fields(self):  # type: ignore[arg-type]  # every concrete pass is a dataclass
            default = f.default
            if isinstance(default, pydantic.fields.FieldInfo):
                default = default.get_default(call_default_factory=True)
            value = getattr(self, f.name)
            if value != default:
                shown.append(f"{f.name}={value!r}")
        return f"{self.name}({', '.join(shown)})" if shown else self.name

    def bind(self, ctx: Context) -> BoundPass:
        """This pass with its context, for use inside anyone's ``onnx_ir`` pipeline."""
        return BoundPass(self, ctx)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """The ``onnx_ir`` entry point: runs with a context that holds no calibration data."""
        return ir.passes.PassResult(model, self.run(model, Context()).changed)


class ChoosingPass(Pass):
    """A pass that first chooses (pure) and then edits; every lossy pass is one.

    The pipeline can show the choice without editing, and builds the simulated reference from it.
    """

    @abc.abstractmethod
    def choose(self, model: ir.Model, ctx: Context) -> list[Entry]:
        """Decide about every candidate, touching nothing."""

    @abc.abstractmethod
    def edit(self, model: ir.Model, chosen: Sequence[Entry], ctx: Context) -> Result:
        """Carry out the entries whose status is ``applied``, in place."""

    def simulate(self, before: ir.Model, chosen: Sequence[Entry]) -> Reference:
        """The model that the edited one must equal, made from ``before`` without :meth:`edit`.

        ``before`` may be consumed. Only lossy passes are asked.
        """
        raise PassError(Diagnostic("pass.reference", f"{self.name} states no simulated reference"))

    def run(self, model: ir.Model, ctx: Context) -> Result:
        """Choose, then edit."""
        return self.edit(model, self.choose(model, ctx), ctx)


class BoundPass(ir.passes.InPlacePass):
    """A pass and the context it runs with, as an ``onnx_ir`` pass; ``result`` is the last result."""

    def __init__(self, pass_: Pass, ctx: Context) -> None:
        self.pass_ = pass_
        self.ctx = ctx
        self.result: Result | None = None

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run the bound pass on ``model`` in place."""
        self.result = self.pass_.run(model, self.ctx)
        return ir.passes.PassResult(model, self.result.changed)


def summary(pass_type: type[Pass]) -> str:
    """The first line of a pass' docstring."""
    return (inspect.getdoc(pass_type) or "").split("\n", 1)[0]
