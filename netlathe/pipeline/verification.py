"""Holds the model after a pass against what it must equal, and names the first value that does not.

An exact or equivalent pass must leave the outputs as they were; a lossy one must yield those of its
simulated reference. Models run in ONNX Runtime with optimizations off, on sample inputs at two sizes
of every dynamic dim, a batch above 1 among them. Every model runs once: what it gave is what the
next pass is held against.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.diagnostics import Diagnostic, VerifyError
from netlathe.execute import ort
from netlathe.execute.compare import Difference, differences, inputs_of, pairs, relative_error
from netlathe.ir import coded, edit, interface, weights
from netlathe.ir.printing import show_node
from netlathe.ir.provenance import location
from netlathe.pipeline.interfaces import Captured
from netlathe.pipeline.pass_ import Equivalent, Exact, Feeds, Lossy, Pass, Reference, Result

Arrays = dict[str, npt.NDArray[Any]]

_ULP = {
    ir.DataType.DOUBLE: 2.0**-52,
    ir.DataType.FLOAT: 2.0**-23,
    ir.DataType.FLOAT16: 2.0**-10,
    ir.DataType.BFLOAT16: 2.0**-7,
}
# An exact pass may let the runtime sum in another order. A sum of n terms that is rounded n times
# is off by 0.29 ulp / sqrt(2) * sqrt(n) = 0.2 sqrt(n) ulp of its RMS; the largest of 10^5 elements
# is 4.5 times that. n = 8192, the widest contraction of the models we know: 84 ulp, 1e-5 in float32.
_ORDER_ULPS = 84
# In half precision products are summed in float32, and what counts is that every value is rounded:
# 0.29 ulp a node, over a path of 200 nodes 0.29 * sqrt(200) = 4 ulp, times 4 for the largest.
_HALF_ULPS = 16
# Where one rounding error in every value that is computed in another way moves an output that far, so may
# a pass with several.
ROUNDINGS = 8.0
# No error beyond this share of an output's RMS is taken for rounding. Ten times ROUNDINGS would allow a usual
# model of 24 layers in float16 1.1, where a layer that is missing makes 0.6.
MOST_MOVED = 0.5
_PLAIN = (
    int,
    float,
    str,
    list,
    tuple,
)  # contents of attributes that are told apart by what they say
_MOST_COMPARED = 64  # elements of a constant that is told from others by what it holds
# Values inside the model cancel more than outputs do.
_INNER_SLACK = 10.0
# Sessions over weights up to this size may live on: making one reads and converts every weight.
_SESSION_BYTES = 128 << 20
# Operators that hand values on as they are, so that nothing is rounded in them.
_MOVES = frozenset(
    "Cast Concat Expand Flatten Gather GatherElements GatherND Identity Pad Reshape Slice Split"
    " Squeeze Tile Transpose Unsqueeze Where".split()
)
_JOINS = frozenset({"Concat", "Where"})  # those of several values
# What is said of an output that its last bits excuse, where what the Sigmoid reads cannot be compared.
NOT_TOLD = (
    "{} was not told apart: what differs is below the last bits of 1, which its Sigmoid rounds to"
)
# What they make of values that are off is off by no more.
_NO_FARTHER = frozenset({"ReduceMax", "ReduceMean", "ReduceMin"})


@dataclass(frozen=True)
class Check:
    """What the model after a pass was held against, and how far it was from it.

    ``error`` is the largest max|after - against| over the outputs, as a share of the output's RMS;
    ``output`` is where it was found. With ``against`` "nothing", ``reason`` says why.
    """

    against: Literal["input model", "simulated reference", "nothing"]
    error: float | None = None
    tolerance: float | None = None
    output: str = ""
    sizes: tuple[str, ...] = ()  # "batch=2, sequence=16": what it was compared at
    reason: str = ""

    def __str__(self) -> str:
        if self.error is None:
            return f"not compared: {self.reason}"
        text = (
            f"equals the {self.against}: {self.error:.1e} of the RMS, at most {self.tolerance:.1e}"
        )
        return f"{text} ({self.reason})" if self.reason else text


@dataclass(frozen=True)
class Trial:
    """Inputs to run models on, and the sizes they have."""

    label: str
    feeds: Feeds


@dataclass
class Outcome:
    """A model and what it makes of every trial.

    ``session`` is kept for whoever runs the model again, where the weights it may hold are few.
    """

    model: ir.Model
    outputs: list[Arrays]
    session: ort.Session | None = None


# -- running --------------------------------------------------------------------------------------


class Bench:
    """The sample inputs on which one captured model and all that is made of it are compared."""

    def __init__(self, captured: Captured) -> None:
        """Choose the inputs and run the captured model on them.

        Raises:
            RuntimeFailure: ONNX Runtime cannot run the captured model.
        """
        self.trials: list[Trial] = []
        session = ort.Session(captured.model)
        outputs = []
        for seed, choices in enumerate(_sizes(captured.dynamic)):
            trial, output = _first_that_runs(captured, session, choices, seed)
            self.trials.append(trial)
            outputs.append(output)
        self.dense = Outcome(captured.model, outputs, _small(captured.model, session))

    @property
    def sizes(self) -> tuple[str, ...]:
        """The sizes that are compared."""
        return tuple(trial.label for trial in self.trials)

    def run(self, model: ir.Model) -> Outcome:
        """Run ``model`` on every trial.

        Raises:
            RuntimeFailure: ONNX Runtime cannot run it.
        """
        session = ort.Session(model)
        outputs = [
            coded.decoded(model, session.run(inputs_of(model, trial.feeds)))
            for trial in self.trials
        ]
        return Outcome(model, outputs, _small(model, session))

    # -- judging ----------------------------------------------------------------------------------

    def same(self, pass_: Pass, before: Outcome, after: Outcome, result: Result) -> Check:
        """Check that an exact or equivalent pass moved no output by more than it may.

        Raises:
            VerifyError: it did; the first value that differs is named.
        """
        assert not isinstance(pass_.exactness, Lossy)
        bound = tolerance(pass_.exactness, before.model, after.model)
        return self._judge(pass_, after, before, bound, ROUNDINGS, result, "input model")

    def simulated(
        self, pass_: Pass, before: Outcome, after: Outcome, reference: Reference, result: Result
    ) -> Check:
        """Check that a lossy pass gave what its simulated reference gives.

        Raises:
            VerifyError: it did not, or an output that was finite no longer is.
        """
        self._finite(pass_, before, after, result)
        against = self.run(reference.model)
        bound, slack = reference.tolerance, ROUNDINGS * reference.reordered
        return self._judge(pass_, after, against, bound, slack, result, "simulated reference")

    def _judge(
        self,
        pass_: Pass,
        after: Outcome,
        against: Outcome,
        bound: float,
        roundings: float,
        result: Result,
        what: Literal["input model", "simulated reference"],
    ) -> Check:
        worst, where, allowed, reason = 0.0, "", bound, ""
        untold: dict[str, str] = {}
        left, had = interface.kept(after.model), interface.kept(against.model)
        for number, trial in enumerate(self.trials):
            given = against.outputs[number]
            expected = {name: interface.fit(a, name, left, had) for name, a in given.items()}
            errors = {
                name: relative_error(array, expected[name]) if name in expected else float("inf")
                for name, array in after.outputs[number].items()
            }
            wrong = {name: error for name, error in errors.items() if not error <= bound}
            if wrong:
                moved: Mapping[str, float] = {}
                if roundings:
                    alike = computed_alike(against.model, after.model)
                    moved = moved_by_rounding(against.model, given, trial.feeds, alike)
                bits = last_bits_of_sigmoids(against.model, expected)
                for name, error in wrong.items():
                    rounded, last = roundings * moved.get(name, 0.0), bits.get(name, 0.0)
                    limit = max(rounded, last)
                    if error <= limit and name in bits:
                        before = _before_sigmoid(after.model, against.model, name, trial, roundings)
                        if before is None and error > rounded:
                            untold[name] = NOT_TOLD.format(name)
                        if before is not None and not before.error <= max(bound, before.limit):
                            limit = 0.0
                    if not error <= limit:
                        problem = _Problem(pass_, what, name, error, max(bound, limit), trial)
                        raise VerifyError(problem.explain(after.model, against.model, result))
                    if limit > allowed:
                        allowed = limit
                        reason = (
                            f"one rounding error a value moves {name} by {moved[name]:.1e}"
                            if rounded > last
                            else f"the last bits of 1, which a Sigmoid rounds to, are {last:.1e} of {name}"
                        )
            for name, error in errors.items():
                if error >= worst:
                    worst, where = error, name
        reason = "; ".join(part for part in (reason, *untold.values()) if part)
        return Check(what, worst, allowed, where, self.sizes, reason)

    def _finite(self, pass_: Pass, before: Outcome, after: Outcome, result: Result) -> None:
        """Check that what was finite still is, whatever the reference says."""
        for trial, old, new in zip(self.trials, before.outputs, after.outputs, strict=True):
            for name, array in new.items():
                if name in old and lost_finite(array, old[name]):
                    problem = _Problem(pass_, "", name, float("inf"), 0.0, trial)
                    raise VerifyError(_not_finite(problem, before.model, after.model, result))


def _small(model: ir.Model, session: ort.Session) -> ort.Session | None:
    return session if weights.num_bytes(model) <= _SESSION_BYTES else None


def tolerance(exactness: Exact | Equivalent, *models: ir.Model) -> float:
    """How far a pass of that exactness may move an output, as a share of its RMS.

    Half precision anywhere in the models sets the bound: every value in it is rounded anew.
    """
    if isinstance(exactness, Exact):
        bound = _ORDER_ULPS * _ULP[ir.DataType.FLOAT]
    else:
        bound = exactness.tolerance
    computed = {
        value.dtype
        for model in models
        for node in model.graph.all_nodes()
        if node.op_type not in _MOVES
        for value in node.outputs
    }
    halves = [_ULP[t] for t in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16) if t in computed]
    return max([bound, *(_HALF_ULPS * ulp for ulp in halves)])


# -- sizes ----------------------------------------------------------------------------------------


def _sizes(dynamic: Mapping[str, int]) -> Iterator[list[dict[str, int]]]:
    """For each of the two trials the sizes to try, in order: a model may not take all."""
    given = {name: max(size, 2) for name, size in dynamic.items()}
    yield [given, dict(dynamic)]
    yield [
        {name: size + size // 2 + 1 for name, size in given.items()},
        {name: 2 * size for name, size in given.items()},  # an even size, a multiple of a patch
        {name: size - 1 if size > 2 else size + 1 for name, size in given.items()},  # a full table
        dict(dynamic),
    ]


def _first_that_runs(
    captured: Captured, session: ort.Session, choices: Sequence[Mapping[str, int]], seed: int
) -> tuple[Trial, Arrays]:
    *others, last = choices
    for sizes in others:
        with contextlib.suppress(ort.RuntimeFailure):
            return _run_at(captured, session, sizes, seed)
    return _run_at(captured, session, last, seed)


def _run_at(
    captured: Captured, session: ort.Session, sizes: Mapping[str, int], seed: int
) -> tuple[Trial, Arrays]:
    label = ", ".join(f"{name}={size}" for name, size in sizes.items()) or "fixed shapes"
    feeds = captured.sample(sizes, seed)
    outputs = session.run(inputs_of(captured.model, feeds))
    return Trial(label, feeds), coded.decoded(captured.model, outputs)


# -- conditioning ---------------------------------------------------------------------------------


def bounds(
    model: ir.Model,
    errors: Mapping[str, float],
    expected: Mapping[str, npt.NDArray[Any]],
    feeds: Feeds,
    bound: float,
    *,
    slack: float,
    alike: Collection[str] = (),
) -> dict[str, float]:
    """How far each output of ``model`` may be from ``expected``, what the model makes of ``feeds``.

    Where an error is more than rounding explains in a usual model, which is ``bound``, it is asked how far
    this one moves by rounding, and ``slack`` times that is allowed: an ill-conditioned model is not wrong.
    No more than ``MOST_MOVED`` is, by which a layer that is missing would be told; but a Sigmoid that ends
    the model may always be off by its last bits: of what is compiled, nothing but outputs is known.
    """
    if all(error <= bound for error in errors.values()):
        return dict.fromkeys(errors, bound)
    moved = moved_by_rounding(model, {name: expected[name] for name in errors}, feeds, alike)
    allowed = {name: slack * moved[name] for name in errors}
    bits = last_bits_of_sigmoids(model, expected)
    return {
        name: max(bound, min(far, MOST_MOVED) if np.isfinite(far) else 0.0, bits.get(name, 0.0))
        for name, far in allowed.items()
    }


def last_bits_of_sigmoids(
    model: ir.Model, outputs: Mapping[str, npt.NDArray[Any]]
) -> dict[str, float]:
    """Two ulps of 1 as a share of the RMS of each output that is a Sigmoid's, or a mean of it.

    Kernels add 1/2 to an odd function, so that all results have the last bit of 1, those near 0 too: an
    output that says "no" everywhere is off by several times its RMS.
    """
    shares: dict[str, float] = {}
    for value in model.graph.outputs:
        name = value.name or ""
        if last_sigmoid(value) is not None and name in outputs:
            rms = float(np.sqrt(np.mean(np.square(outputs[name], dtype=np.float64))))
            if rms > 2.0**-1000:  # of nothing but zeros there is no share
                shares[name] = 2.0**-22 / rms
    return shares


def last_sigmoid(value: ir.Value) -> ir.Node | None:
    """The Sigmoid that a value is made by, with nothing behind it but moves and means."""
    node = value.producer()
    while node is not None and node.op_type in (_MOVES - _JOINS) | _NO_FARTHER:
        source = node.inputs[0]
        node = source.producer() if source is not None else None
    return node if node is not None and node.op_type == "Sigmoid" else None


@dataclass(frozen=True)
class _Operand:
    """How far what an output's Sigmoid reads is from what it must be, and what rounding explains of it."""

    error: float
    limit: float


def _before_sigmoid(
    after: ir.Model, against: ir.Model, name: str, trial: Trial, roundings: float
) -> _Operand | None:
    """What the Sigmoid of an output reads, which tells apart what is all below the last bit of 1.

    None where the two models do not both end in one.
    """
    bare, wanted = _without_sigmoid(after, name), _without_sigmoid(against, name)
    if bare is None or wanted is None:
        return None
    made, given = (_output(model, name, trial.feeds) for model in (bare, wanted))
    expected = interface.fit(given, name, interface.kept(after), interface.kept(against))
    limit = 0.0
    if roundings:
        alike = computed_alike(wanted, bare)
        limit = roundings * moved_by_rounding(wanted, {name: given}, trial.feeds, alike)[name]
    return _Operand(relative_error(made, expected), limit)


def _without_sigmoid(model: ir.Model, name: str) -> ir.Model | None:
    """A copy in which an output is made of what its Sigmoid reads, moved as it was; None without one."""
    copy = model.clone()
    node = next((last_sigmoid(v) for v in copy.graph.outputs if v.name == name), None)
    if node is None:
        return None
    node.op_type = "Identity"
    return copy


def _output(model: ir.Model, name: str, feeds: Feeds) -> npt.NDArray[Any]:
    return coded.decoded(model, ort.run(model, inputs_of(model, feeds)))[name]


def moved_by_rounding(
    model: ir.Model, outputs: Arrays, feeds: Feeds, alike: Collection[str] = ()
) -> dict[str, float]:
    """How far each of ``outputs`` moves when every value that is computed is off by up to one ulp.

    Values named in ``alike`` are not off. It matters: a float that becomes an index, or chooses an expert,
    may move an output without bound.
    """
    moved = disturbed_outputs(model, feeds, alike=alike)
    return {name: relative_error(moved[name], array) for name, array in outputs.items()}


def disturbed_outputs(
    model: ir.Model, feeds: Feeds, ulps: int = 1, alike: Collection[str] = ()
) -> Arrays:
    """The outputs when every value that is computed, but ``alike``, is off by up to ``ulps``."""
    disturbed = _disturbed(model, alike, ulps)
    return ort.run(disturbed, inputs_of(disturbed, feeds))


def computed_alike(a: ir.Model, b: ir.Model, apart: Collection[str] = ()) -> set[str]:
    """Values of ``a`` that ``b`` computes as well: by the same operators, all the way from the inputs.

    Operators that are ``apart`` are computed by one of the two in another way.
    """
    numbers: dict[Hashable, int] = {}
    known = set(_numbered(b, numbers, apart).values())
    return {v.name for v, n in _numbered(a, numbers, apart).items() if n in known and v.name}


def _numbered(
    model: ir.Model, numbers: dict[Hashable, int], apart: Collection[str]
) -> dict[ir.Value, int]:
    """A number for every value that nodes of the main graph make; equal ones are computed alike."""
    graph = model.graph
    at: dict[ir.Value | None, int] = {None: -1}
    for value in graph.inputs:
        at[value] = numbers.setdefault(("input", value.name), len(numbers))
    for value in graph.initializers.values():
        if value not in at:
            at[value] = numbers.setdefault(_contents(value), len(numbers))
    made: dict[ir.Value, int] = {}
    for node in graph:
        attributes = tuple(sorted((name, _setting(a)) for name, a in node.attributes.items()))
        read = tuple(at.get(value, -2) for value in node.inputs)
        own = id(node) if node.op_type in apart else 0
        key = (node.domain, node.op_type, attributes, read, len(node.outputs), own)
        for position, value in enumerate(node.outputs):
            at[value] = made[value] = numbers.setdefault((key, position), len(numbers))
    return made


def _contents(value: ir.Value) -> Hashable:
    """What a constant holds: of a weight, which tensor; of a small number, which number."""
    tensor = value.const_value
    if tensor is None or tensor.size > _MOST_COMPARED or tensor.dtype == ir.DataType.STRING:
        return ("weight", id(tensor))
    return ("number", tensor.dtype, tuple(tensor.shape), tensor.tobytes())


def _setting(attribute: ir.Attr) -> str:
    """What an attribute says; a subgraph or a tensor is like itself only."""
    value = attribute.value
    return f"{attribute.type} {value if isinstance(value, _PLAIN) else id(value)}"


def _disturbed(model: ir.Model, alike: Collection[str] = (), ulps: int = 1) -> ir.Model:
    """``model`` with a factor of 1 - ulps, 1 or 1 + ulps behind everything that rounds, but ``alike``."""
    model = model.clone()
    graph, rng, taken = model.graph, np.random.default_rng(0), edit.names_in(model.graph)
    for node in list(graph):
        for value in node.outputs:
            ulp = _ULP.get(value.dtype or ir.DataType.UNDEFINED)
            if node.op_type in _MOVES or ulp is None or value.dtype is None or not value.uses():
                continue
            if value.name in alike:
                continue
            width = value.shape[-1] if value.shape else 1
            width = width if isinstance(width, int) else 1
            shape = (width,) if value.shape else ()
            off = (1 + ulps * ulp * rng.integers(-1, 2, shape)).astype(value.dtype.numpy())
            readers = list(value.uses())
            factor = edit.constant(graph, np.asarray(off), f"{value.name}_off", taken)
            name = edit.unique_name(graph, f"{value.name}_rounded", taken)
            times = edit.node(
                "Mul", [value, factor], name=name, dtype=value.dtype, shape=value.shape
            )
            for reader, position in readers:
                reader.replace_input_with(position, times.outputs[0])
            graph.insert_after(node, times)
    return model


# -- blaming --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Problem:
    """An output that is not what it must be."""

    pass_: Pass
    what: str
    output: str
    error: float
    bound: float
    trial: Trial

    def explain(self, after: ir.Model, against: ir.Model, result: Result) -> Diagnostic:
        """The diagnostic, with the first value that differs."""
        kind = type(self.pass_.exactness).__name__.lower()
        message = (
            f"{self.pass_} is wrong: output {self.output!r} is off by {self.error:.2g} of the RMS of"
            f" the {self.what}'s at {self.trial.label} (a {kind} pass may be by {self.bound:.2g})"
        )
        first = self._first(after, against, result)
        if first is None:
            note = "no value inside the model is shared with what it is held against"
            return Diagnostic("verify.differs", message, notes=(note,))
        node = first.value.producer()
        assert node is not None  # differences() takes the outputs of nodes
        was = f", {first.other} before the pass" if first.other != first.name else ""
        return Diagnostic(
            "verify.differs",
            message,
            at=show_node(node),
            where=location(node),
            notes=(f"the first value that differs: {first.name}{was}, by {first.error:.2g}",),
            help=f"leave {self.pass_.name} out, and report this to whoever wrote it",
        )

    def _first(self, after: ir.Model, against: ir.Model, result: Result) -> Difference | None:
        names = shared_names(after, against, result.renamed)
        found = {d.name: d for d in differences(after, against, self.trial.feeds, names)}
        wrong = {n for n, d in found.items() if not d.error <= _INNER_SLACK * self.bound}
        wrong.add(self.output)
        output = next(v for v in after.graph.outputs if v.name == self.output)
        return found.get(_culprit(output, found, wrong))


def _culprit(output: ir.Value, found: Mapping[str, Difference], wrong: set[str]) -> str:
    """The first wrong value behind ``output``: wrong itself, while all it was made from is right.

    A value may be another on purpose (a scale that moved to its consumer). Such a one is not to
    blame where something right lies between it and the output.
    """
    seen: set[ir.Value] = set()
    while True:
        behind = [v for v in _compared_behind(output, found, seen) if v.name in wrong]
        if not behind:
            return output.name or ""
        output = behind[0]


def _compared_behind(
    value: ir.Value, found: Mapping[str, Difference], seen: set[ir.Value]
) -> Iterator[ir.Value]:
    """The nearest values behind ``value`` that were compared."""
    node = value.producer()
    stack = [v for v in (node.inputs if node is not None else ()) if v is not None]
    while stack:
        current = stack.pop(0)
        if current in seen:
            continue
        seen.add(current)
        if current.name in found:
            yield current
        elif (maker := current.producer()) is not None:
            stack += [v for v in maker.inputs if v is not None]


def shared_names(
    after: ir.Model, before: ir.Model, renamed: Mapping[str, str | None]
) -> dict[str, str]:
    """Values of ``after`` that mean the same as one of ``before``: new name to old.

    A pass that moves a meaning to another name says so in ``renamed``. Values whose recorded types
    differ are left out: a narrower value is not wrong.
    """
    old = {v.name: v for node in before.graph for v in node.outputs if v.name}
    origin = {new: name for name, new in renamed.items() if new is not None}
    names = {}
    for node in after.graph:
        for value in node.outputs:
            if not value.name:
                continue
            name = origin.get(value.name, "" if value.name in renamed else value.name)
            if name in old and _same_type(value, old[name]):
                names[value.name] = name
    return names


def _same_type(a: ir.Value, b: ir.Value) -> bool:
    if not isinstance(a.type, ir.TensorType) or a.dtype != b.dtype or a.dtype is None:
        return False
    if a.shape is None or b.shape is None:
        return True
    return len(a.shape) == len(b.shape) and all(
        x == y
        for x, y in zip(a.shape, b.shape, strict=True)
        if isinstance(x, int) and isinstance(y, int)
    )


def _not_finite(problem: _Problem, before: ir.Model, after: ir.Model, result: Result) -> Diagnostic:
    """The diagnostic of an overflow, with the first value that it shows in."""
    at = where = note = ""
    names = shared_names(after, before, result.renamed)
    for value, _, actual, expected in pairs(after, before, problem.trial.feeds, names):
        if lost_finite(actual, expected):
            node = value.producer()
            assert node is not None  # pairs() takes the outputs of nodes
            at, where = show_node(node), location(node)
            note = f"the first value that is no longer finite: {value.name}"
            break
    return Diagnostic(
        "verify.finite",
        f"{problem.pass_} is wrong: output {problem.output!r} is NaN or infinite where it was not,"
        f" at {problem.trial.label}",
        at=at,
        where=where,
        notes=(note,) if note else (),
        help="a value may be out of the range of a narrower format: keep its node in float32",
    )


def lost_finite(after: npt.NDArray[Any], before: npt.NDArray[Any]) -> bool:
    """Whether an element is NaN or infinite after that was neither before."""
    if after.shape != before.shape or after.dtype.kind in "OUS" or before.dtype.kind in "OUS":
        return False
    was, is_ = (np.isfinite(array.astype(np.float64)) for array in (before, after))
    return bool((was & ~is_).any())


def blamed(error: VerifyError, pass_: Pass) -> VerifyError:
    """The same problems, each with a note that names the pass they came up after."""
    return VerifyError(
        dataclasses.replace(d, notes=(*d.notes, f"after the pass {pass_}"))
        for d in error.diagnostics
    )
