"""What must hold of every pass, judged on small models: see :func:`check_pass`."""

from __future__ import annotations

import copy
import dataclasses
import json
import keyword
import math
import tempfile
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import onnx_ir as ir
import yaml

from netlathe import Compiled, Step
from netlathe.analysis.cost import cost
from netlathe.diagnostics import NetLatheError, OptionError, VerifyError
from netlathe.execute import ort
from netlathe.execute.compare import differences, inputs_of
from netlathe.ir import coded, normal, verify, weights
from netlathe.ir.printing import show_node
from netlathe.pipeline import manifest, recipe, registry, text, verification
from netlathe.pipeline.fingerprint import feeds_digest
from netlathe.pipeline.interfaces import Captured
from netlathe.pipeline.ledger import Entry, Status
from netlathe.pipeline.pass_ import (
    NO_DATA,
    ChoosingPass,
    Context,
    Equivalent,
    Exact,
    Lossy,
    Pass,
    Reference,
    Result,
    summary,
)
from netlathe.pipeline.validation import make, option_schemas
from netlathe.testing import process
from netlathe.testing.laws import (
    Breach,
    Case,
    Law,
    bits,
    check,
    fresh,
    mapped,
    raised,
    random_state,
    random_state_breaches,
    seeded,
)
from netlathe.testing.models import models as ready_models

_CALIBRATION_SEEDS = (101, 102)
# A promise to be within this of the output's RMS, or more, promises nothing.
_NO_PROMISE = 1.0
# Weights below this many elements may be written anew: they are constants that count or shape.
_SMALL = 64
# Values inside a model cancel more than outputs do.
_INNER_SLACK = 10.0


def check_pass(pass_: Pass, models: Sequence[Captured] | None = None) -> None:
    """Judge ``pass_`` by every law, on ``models`` (by default those of :func:`netlathe.testing.models`).

    Models are as frontends deliver them; one without nodes is always added. Passes that measure are
    given calibration data made by ``Captured.sample``. At least one of the models must make the pass act.

    Raises:
        ConformanceError: with every breach of every law.
    """
    check(pass_cases(pass_, models))


def pass_cases(pass_: Pass, models: Sequence[Captured] | None = None) -> list[Case[Any]]:
    """The laws of :func:`check_pass` one by one, for a test framework:

    @pytest.mark.parametrize("case", pass_cases(MyPass(width=3)), ids=str)
    def test_my_pass_keeps_the_law(case):
        case.check()
    """
    subject = Subject(pass_, models)
    title = f"the pass {getattr(pass_, 'name', type(pass_).__name__)}"
    return [Case(law, subject, title) for law in _LAWS if _concerns(law, pass_)]


def _concerns(law: Law[Subject], pass_: Pass) -> bool:
    if law.name == "choice":
        return isinstance(pass_, ChoosingPass)
    return law.name != "reference" or isinstance(pass_.exactness, Lossy)


# -- a pass on models -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What a pass did to a model."""

    model: ir.Model
    result: Result
    chosen: Sequence[Entry]


class Attempt:
    """A pass and a model that it is tried on."""

    def __init__(self, pass_: Pass, captured: Captured) -> None:
        self.pass_ = pass_
        self.captured = captured
        self.before = fresh(captured.model)  # as it was, to be looked at only
        self._pristine = fresh(captured.model)

    @property
    def name(self) -> str:
        """The model's."""
        return self.captured.source

    def start(self) -> ir.Model:
        """The model before the pass; it shares nothing that can be written to."""
        return fresh(self._pristine)

    def context(self) -> Context:
        """What the pass is given, made anew."""
        sample, sizes = self.captured.sample, self.captured.dynamic
        return Context([dict(sample(sizes, seed)) for seed in _CALIBRATION_SEEDS])

    def run(self, model: ir.Model, ctx: Context | None = None) -> Outcome:
        """The pass on ``model``, in place, in the way that the pipeline takes."""
        ctx = ctx or self.context()
        if isinstance(self.pass_, ChoosingPass):
            chosen = self.pass_.choose(model, ctx)
            return Outcome(model, self.pass_.edit(model, chosen, ctx), chosen)
        return Outcome(model, self.pass_.run(model, ctx), ())

    @cached_property
    def tried(self) -> Outcome | Exception:
        """What came out of it once."""
        try:
            return self.run(self.start())
        except Exception as error:  # the plug-in's code: anything may happen in it
            return error

    @property
    def done(self) -> Outcome | None:
        """What the pass did; None where it refused the model, or crashed on it."""
        tried = self.tried
        return tried if isinstance(tried, Outcome) and isinstance(tried.result, Result) else None

    @cached_property
    def sound(self) -> Outcome | None:
        """What the pass did, where the model after it can be run: others cannot be compared."""
        done = self.done
        if done is None or verify.verify(done.model) or any(_interface(self, done)):
            return None
        return done

    @cached_property
    def reference(self) -> Reference:
        """What the model after a lossy pass must equal, made as :func:`_reference` says."""
        assert self.done is not None
        return _simulated(self.pass_, self.start(), self.done.chosen)


class Subject:
    """A pass and all models that it is tried on."""

    def __init__(self, pass_: Pass, models: Sequence[Captured] | None) -> None:
        self.pass_ = pass_
        self._models = models

    @cached_property
    def attempts(self) -> list[Attempt]:
        """One for each model; they are made when the first law is judged."""
        ready = {captured.source: captured for captured in ready_models()}
        own = self._models
        chosen = list(ready.values()) if own is None else [*own, ready["empty"]]
        return [Attempt(self.pass_, captured) for captured in chosen]

    def find(self, name: str) -> type[Pass]:
        """The pass by its name, whether it is installed or not."""
        return type(self.pass_) if name == self.pass_.name else registry.find_pass(name)

    @cached_property
    def crashed(self) -> bool:
        """Whether it crashed on a model, so that other laws cannot be judged there."""
        return any(
            attempt.done is None and not isinstance(attempt.tried, NetLatheError)
            for attempt in self.attempts
        )

    @cached_property
    def acts(self) -> bool:
        """Whether it changed a model."""
        done = [attempt.done for attempt in self.attempts]
        return any(outcome is not None and outcome.result.changed for outcome in done)

    @cached_property
    def is_judged_by_others(self) -> bool:
        """Whether other laws already say why this one can be judged nowhere."""
        unsound = any(attempt.done and not attempt.sound for attempt in self.attempts)
        return self.crashed or not self.acts or unsound


def _each(
    judge: Callable[[Attempt], Iterable[Breach] | None],
) -> Callable[[Subject], Iterator[Breach]]:
    """Judge every model by itself; None means that the law says nothing about this one."""

    def over(subject: Subject) -> Iterator[Breach]:
        judged = False
        for attempt in subject.attempts:
            try:
                found = judge(attempt)
                if found is None:
                    continue
                judged = True
                yield from (breach.on(attempt.name) for breach in found)
            except Exception as error:  # the plug-in's code: anything may happen in it
                judged = True
                yield raised(error).on(attempt.name)
        if not judged and not subject.is_judged_by_others:
            names = ", ".join(attempt.name for attempt in subject.attempts)
            yield Breach(f"none of the models can tell: {names}")

    return over


# -- laws about the pass itself -------------------------------------------------------------------


def _protocol(subject: Subject) -> Iterator[Breach]:
    pass_ = subject.pass_
    cls = type(pass_)
    if not isinstance(pass_, Pass):
        yield Breach(f"{cls.__name__} is no subclass of netlathe.Pass")
        return
    name = getattr(cls, "name", None)
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
        yield Breach(f"its name {name!r} is no identifier, so no pipeline's text can hold it")
    if isinstance(cls.version, bool) or not isinstance(cls.version, int) or cls.version < 1:
        yield Breach(f"its version {cls.version!r} is no positive integer")
    if not dataclasses.is_dataclass(pass_):
        yield Breach("it is no dataclass: decorate it with @options")
        return
    if not getattr(cls, "__dataclass_params__").frozen:  # noqa: B009  # unknown to type checkers
        yield Breach("its options can be changed after it is made")
    if not summary(cls) or summary(cls).startswith(f"{cls.__name__}("):
        yield Breach("it has no docstring, whose first line `netlathe passes` shows")
    for option, spec in option_schemas(cls).items():
        if not spec.get("description"):
            yield Breach(f"its option {option!r} has no help: use option(default=..., help=...)")
    yield from _exactness(pass_)
    if copy.copy(pass_) != pass_:
        yield Breach("a copy of it is not equal to it")


def _exactness(pass_: Pass) -> Iterator[Breach]:
    exactness = getattr(pass_, "exactness", None)
    if not isinstance(exactness, Exact | Equivalent | Lossy):
        yield Breach(f"its exactness is {exactness!r}, no instance of Exact, Equivalent or Lossy")
    elif isinstance(exactness, Equivalent) and not 0 < exactness.tolerance < _NO_PROMISE:
        yield Breach(f"its tolerance {exactness.tolerance} is no share of an output")
    elif isinstance(exactness, Lossy):
        if not isinstance(pass_, ChoosingPass):
            yield Breach("it is lossy and no ChoosingPass: nothing says what it must equal")
        elif type(pass_).simulate is ChoosingPass.simulate:
            yield Breach("it is lossy and has no simulate(): nothing says what it must equal")


_NONSENSE = "\0no such value"


def _options(subject: Subject) -> Iterator[Breach]:
    cls, values = type(subject.pass_), subject.pass_.option_values()
    schemas = option_schemas(cls)
    wrong: list[tuple[str, Any]] = [("no_such_option", 1)]
    for option, spec in schemas.items():
        wrong.append((option, object()))
        wrong += [(option, value) for value in _outside(spec)]
    for option, value in wrong:
        shown = "an object()" if type(value) is object else repr(value)
        try:
            cls(**{**values, option: value})
        except OptionError:
            continue
        except Exception as error:
            yield raised(error, f"{option}={shown} raised")
        else:
            yield Breach(f"{option}={shown} is taken")


def _outside(spec: dict[str, Any]) -> Iterator[Any]:
    """Values that the schema of an option rules out."""
    for limit, step in (("minimum", -1), ("exclusiveMinimum", 0), ("exclusiveMaximum", 0)):
        if limit in spec:
            yield spec[limit] + step
    if "maximum" in spec:
        yield spec["maximum"] + 1
    if "enum" in spec:
        yield _NONSENSE


def _text(subject: Subject) -> Iterator[Breach]:
    pass_ = subject.pass_
    shown = str(pass_)
    try:
        again = text.parse(f"{shown}, {shown}", subject.find)
    except OptionError as error:
        yield Breach(f"its text {shown!r} cannot be read: {error.diagnostics[0].message}")
        return
    if again != [pass_, pass_] or text.render(again) != f"{shown}, {shown}":
        yield Breach(f"its text {shown!r} gives {text.render(again[:1])!r} when it is read")


def _recipe(subject: Subject) -> Iterator[Breach]:
    pass_ = subject.pass_
    values = json.loads(json.dumps(pass_.option_values(), allow_nan=False))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "recipe.yaml")
        document = {"passes": [{pass_.name: values} if values else pass_.name]}
        file.write_text(yaml.safe_dump(document, allow_unicode=True), "utf-8")
        try:
            (again,) = recipe.load(file, subject.find).passes
        except OptionError as error:
            yield Breach(f"its options {values} in a recipe: {error.diagnostics[0].message}")
            return
    if again != pass_:
        yield Breach(f"a recipe with its options {values} gives {again}")


# -- laws about what it does ----------------------------------------------------------------------


def _runs(subject: Subject) -> Iterator[Breach]:
    for attempt in subject.attempts:
        tried = attempt.tried
        if isinstance(tried, NetLatheError):
            if not tried.diagnostics or not all(d.code and d.message for d in tried.diagnostics):
                breach = Breach(f"its {type(tried).__name__} says nothing")
                yield breach.on(attempt.name)
        elif isinstance(tried, Exception):
            yield raised(tried).on(attempt.name)
        elif not isinstance(tried.result, Result):
            breach = Breach(f"it returned {type(tried.result).__name__} and no Result")
            yield breach.on(attempt.name)


def _acts(subject: Subject) -> Iterator[Breach]:
    if subject.acts or subject.crashed:
        return
    notes = [
        f"{attempt.name}: {attempt.tried.diagnostics[0].message}"
        for attempt in subject.attempts
        if isinstance(attempt.tried, NetLatheError) and attempt.tried.diagnostics
    ]
    yield Breach("no other law means anything where nothing happens", notes=tuple(notes))


def _choice(attempt: Attempt) -> Iterator[Breach] | None:
    pass_ = attempt.pass_
    if attempt.done is None or not isinstance(pass_, ChoosingPass):
        return None

    def judge() -> Iterator[Breach]:
        model = attempt.start()
        was = bits(model)
        pass_.choose(model, attempt.context())
        if bits(model) != was:
            yield Breach("the model is another after choose()")

    return judge()


def _form(attempt: Attempt) -> Iterator[Breach] | None:
    done = attempt.done
    if done is None:
        return None

    def judge() -> Iterator[Breach]:
        if problems := verify.verify(done.model):
            yield from (Breach(d.message, at=d.at, notes=(d.code,)) for d in problems)
            return
        settled = fresh(done.model)
        normal.normalize(settled)
        if bits(settled) != bits(done.model):
            yield Breach("bringing it into normal form changes it", notes=_news(done, settled))

    return judge()


def _news(done: Outcome, settled: ir.Model) -> tuple[str, ...]:
    """The first nodes that the normal form spells in another way."""
    was = {show_node(node) for node in done.model.graph}
    return tuple([f"becomes {s}" for n in settled.graph if (s := show_node(n)) not in was][:3])


def _interface(attempt: Attempt, done: Outcome) -> Iterator[Breach]:
    gone = {name for name, new in done.result.renamed.items() if new is None}
    removable = gone if isinstance(attempt.pass_.exactness, Lossy) else set()
    stored = coded.coded(done.model) if isinstance(attempt.pass_.exactness, Lossy) else {}
    beside = {name for how in stored.values() for name in how.names}
    for kind, old, new in (
        ("inputs", attempt.before.graph.inputs, done.model.graph.inputs),
        ("outputs", attempt.before.graph.outputs, done.model.graph.outputs),
    ):
        now = [_signature(value, stored) for value in new if value.name not in beside]
        named = {value.name for value in new}
        wanted = [_signature(v, stored) for v in old if v.name in named or v.name not in removable]
        if now != wanted:
            yield Breach(f"the {kind} were {', '.join(wanted)} and are {', '.join(now)}")


def _signature(value: ir.Value, stored: Container[str | None] = ()) -> str:
    """Name, dtype and the dims that callers rely on: of derived ones only that they are there.

    What holds codes now (``stored``) is what the model's own record says.
    """
    if value.name in stored:
        return f"{value.name}: codes"
    dtype = value.dtype.name.lower() if value.dtype is not None else "?"
    dims = value.shape if value.shape is not None else ()
    if value.is_graph_input():
        return f"{value.name}: {dtype}[{','.join(map(str, dims))}]"
    shown = [str(dim) if isinstance(dim, int) else "?" for dim in dims]
    return f"{value.name}: {dtype}[{','.join(shown)}]"


def _keeps_interface(attempt: Attempt) -> Iterator[Breach] | None:
    done = attempt.done
    return None if done is None else _interface(attempt, done)


def _ledger(attempt: Attempt) -> Iterator[Breach] | None:
    done = attempt.done
    if done is None:
        return None

    def judge() -> Iterator[Breach]:
        entries = done.result.entries
        for entry in entries:
            if entry.status not in get_args(Status):
                yield Breach(f"{entry.candidate} has the status {entry.status!r}")
            if not entry.candidate or not entry.reason.strip() or "\n" in entry.reason:
                yield Breach(f"{entry.candidate!r} has no reason of one line: {entry.reason!r}")
            try:
                json.dumps(entry.to_json(), allow_nan=False)
            except (TypeError, ValueError) as error:
                yield Breach(f"the detail of {entry.candidate} is no JSON data: {error}")
        listed = {(e.candidate, e.status) for e in entries}
        if lost := [e.candidate for e in done.chosen if (e.candidate, e.status) not in listed]:
            yield Breach(f"candidates of choose() are lost or another status now: {lost}")
        applied = any(e.status == "applied" for e in entries)
        if applied != done.result.changed:
            says = "that it did" if done.result.changed else "that it did not"
            yield Breach(f"its result says {says} change the model, its entries say otherwise")
        elif applied and bits(done.model) == bits(attempt.before):
            yield Breach("it says that it changed the model, which is as it was")

    return judge()


def _idle(attempt: Attempt) -> Iterator[Breach] | None:
    done = attempt.done
    if done is None or done.result.changed:
        return None
    if bits(done.model) == bits(attempt.before):
        return iter(())
    return iter([Breach("it says that it changed nothing, and the model is another")])


def _given(attempt: Attempt) -> Iterator[Breach] | None:
    if attempt.done is None:
        return None

    def judge() -> Iterator[Breach]:
        original, ctx = attempt.start(), attempt.context()
        was, data = bits(original), [feeds_digest(feeds) for feeds in ctx.calibration]
        attempt.run(original.clone(), ctx)
        if bits(original) != was:
            yield Breach("it was given a clone, and the model that shares its weights has changed")
        if [feeds_digest(feeds) for feeds in ctx.calibration] != data:
            yield Breach("the calibration data has changed")

    return judge()


def _lazy(attempt: Attempt) -> Iterator[Breach] | None:
    if attempt.done is None:
        return None

    def judge() -> Iterator[Breach]:
        with tempfile.TemporaryDirectory() as folder:
            model = mapped(attempt.before, Path(folder))
            was = _tensors(model)
            done = attempt.run(model)
            now = _tensors(done.model)
            read = [
                name
                for name, tensor in now.items()
                if tensor.size >= _SMALL
                and name in was
                and not isinstance(tensor, ir.ExternalTensor | ir.LazyTensor)
                and weights.digest(tensor) == weights.digest(was[name])
            ]
            if read:
                yield Breach(f"unchanged weights were copied into memory: {', '.join(read[:3])}")
            weights.give_back(done.model)

    return judge()


def _tensors(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    return {
        name: value.const_value
        for graph in model.graphs()
        for name, value in graph.initializers.items()
        if value.const_value is not None
    }


def _entries(entries: Iterable[Entry]) -> str:
    return json.dumps([entry.to_json() for entry in entries], sort_keys=True, default=repr)


def _repeatable(attempt: Attempt) -> Iterator[Breach] | None:
    if attempt.done is None:
        return None

    def judge() -> Iterator[Breach]:
        runs = []
        for seed in (1, 2):
            with seeded(seed):
                runs.append(attempt.run(attempt.start()))
        one, two = runs
        if bits(one.model) != bits(two.model):
            yield Breach("two runs give two models")
        elif _entries(one.result.entries) != _entries(two.result.entries):
            yield Breach("two runs give two ledgers")

    return judge()


def _process(subject: Subject) -> Iterator[Breach]:
    """One other process runs the pass on all models, which it reads from files."""
    tried = [attempt for attempt in subject.attempts if attempt.done is not None]
    if not tried:
        return
    with tempfile.TemporaryDirectory() as folder:
        jobs = {}
        for number, attempt in enumerate(tried):
            job = process.Job.write(Path(folder, str(number)), attempt.start(), attempt.context())
            jobs[attempt.name] = job
        here = {n: process.outcome(subject.pass_, *job.read()) for n, job in jobs.items()}
        there = process.elsewhere(subject.pass_, jobs)
        for name, (model, entries) in here.items():
            if there[name][0] != model:
                yield Breach("the model is another in another process").on(name)
            elif there[name][1] != entries:
                yield Breach("the ledger is another in another process").on(name)


def _random_state(attempt: Attempt) -> Iterator[Breach] | None:
    if attempt.done is None:
        return None

    def judge() -> Iterator[Breach]:
        model, ctx = attempt.start(), attempt.context()
        with seeded(3):
            before = random_state()
            attempt.run(model, ctx)
            yield from list(random_state_breaches(before))

    return judge()


def _names(attempt: Attempt) -> Iterator[Breach] | None:
    done = attempt.sound
    if done is None or not done.result.changed:
        return None

    def judge() -> Iterator[Breach]:
        old, new = _value_names(attempt.before), _value_names(done.model)
        for name, to in done.result.renamed.items():
            if name not in old:
                yield Breach(f"renamed lists {name!r}, which the model before it does not have")
            if to is not None and to not in new:
                yield Breach(f"renamed says that {name!r} is {to!r} now, which is nowhere")
        yield from _meanings(attempt, done)

    return judge()


def _value_names(model: ir.Model) -> set[str]:
    values = [*model.graph.inputs]
    for graph in model.graphs():
        values += [*graph.inputs, *graph.initializers.values()]
        values += [value for node in graph for value in node.outputs]
    return {value.name for value in values if value.name}


def _meanings(attempt: Attempt, done: Outcome) -> Iterator[Breach]:
    """Values that both models have by name, or by ``renamed``, and that are not the same."""
    exactness = attempt.pass_.exactness
    if isinstance(exactness, Lossy):
        against, bound = attempt.reference.model, attempt.reference.tolerance
    else:
        against = attempt.before
        bound = verification.tolerance(exactness, attempt.before, done.model)
    names = verification.shared_names(done.model, against, done.result.renamed)
    feeds = attempt.captured.sample(attempt.captured.dynamic, 5)
    for found in differences(done.model, against, feeds, names):
        if found.value.is_graph_output() or found.error <= _INNER_SLACK * bound:
            continue  # outputs are judged by themselves
        node = found.value.producer()
        yield Breach(
            f"{found.name!r} is not what {found.other!r} was (off by {found.error:.1g} of its"
            " RMS), and renamed does not say so",
            at=show_node(node) if node is not None else "",
        )
        return  # what follows from it differs as well


def _reference(attempt: Attempt) -> Iterator[Breach] | None:
    done = attempt.done
    if done is None or not done.result.changed:
        return None

    def judge() -> Iterator[Breach]:
        tolerance = attempt.reference.tolerance
        if not 0 <= tolerance < _NO_PROMISE:
            yield Breach(f"its tolerance {tolerance} is no share of an output")
        try:
            pass_ = _without_edit(attempt.pass_)
            again = _simulated(pass_, attempt.start(), _from_json(done.chosen))
        except Exception as error:
            yield raised(error, "without edit(), and from the ledger alone, simulate() raised")
            return
        if bits(again.model) != bits(attempt.reference.model):
            yield Breach("from the ledger alone simulate() makes another model")

    return judge()


def _simulated(pass_: Pass, before: ir.Model, chosen: Sequence[Entry]) -> Reference:
    assert isinstance(pass_, ChoosingPass)  # the only ones that are asked
    return pass_.simulate(before, chosen)


def _without_edit(pass_: Pass) -> Pass:
    """The same pass, made anew, that cannot edit."""

    def edit(self: Any, *args: Any, **kwargs: Any) -> Result:
        raise RuntimeError("simulate() must not use edit()")

    cls: Any = type(type(pass_).__name__, (type(pass_),), {"edit": edit})
    made: Pass = cls(**pass_.option_values())
    return made


def _from_json(entries: Sequence[Entry]) -> list[Entry]:
    """What a manifest and a file of arrays keep of the entries."""
    return [
        dataclasses.replace(entry, detail=json.loads(json.dumps(entry.detail))) for entry in entries
    ]


def _promise(attempt: Attempt) -> Iterator[Breach] | None:
    done = attempt.sound
    if done is None or not done.result.changed:
        return None

    def judge() -> Iterator[Breach]:
        pass_ = attempt.pass_
        bench = _bench(attempt)
        try:
            after = bench.run(done.model)
            if isinstance(pass_.exactness, Lossy):
                reference = attempt.reference
                bench.simulated(pass_, bench.dense, after, reference, done.result)
            else:
                bench.same(pass_, bench.dense, after, done.result)
        except (VerifyError, ort.RuntimeFailure) as error:
            for d in error.diagnostics:
                yield Breach(d.message, at=d.at, notes=d.notes)

    return judge()


def _bench(attempt: Attempt) -> verification.Bench:
    """The sizes of the pipeline's own check, and size 1 of every dynamic dim where the model takes it."""
    captured = dataclasses.replace(attempt.captured, model=fresh(attempt.before))
    bench = verification.Bench(captured)
    if captured.dynamic:
        ones = dict.fromkeys(captured.dynamic, 1)
        feeds = captured.sample(ones, 3)
        try:
            outputs = ort.run(captured.model, inputs_of(captured.model, feeds))
        except ort.RuntimeFailure:  # a convolution over more rows than one
            return bench
        bench.trials.append(verification.Trial(", ".join(f"{n}=1" for n in ones), feeds))
        bench.dense.outputs.append(outputs)
    return bench


def _data(attempt: Attempt) -> Iterator[Breach] | None:
    if attempt.done is None:
        return None

    def judge() -> Iterator[Breach]:
        if attempt.pass_.needs_data():
            return
        try:
            attempt.run(attempt.start(), Context())
        except NetLatheError as error:
            if any(problem.code == NO_DATA for problem in error.diagnostics):
                yield Breach("it needs calibration data, and needs_data() names no option")

    return judge()


def _onnx_ir(attempt: Attempt) -> Iterator[Breach] | None:
    done = attempt.done
    if done is None:
        return None

    def judge() -> Iterator[Breach]:
        model = attempt.start()
        bound = attempt.pass_.bind(attempt.context())
        result = ir.passes.Sequential(bound)(model)
        if result.modified != done.result.changed:
            yield Breach(f"bound to a context, modified is {result.modified}")
        if bits(result.model) != bits(done.model):
            yield Breach("bound to a context, it does something else than run()")
        try:
            called = attempt.pass_(attempt.start())
        except NetLatheError:  # it needs data, which only a context brings
            return
        if not isinstance(called, ir.passes.PassResult):
            yield Breach(f"called on a model it returns {type(called).__name__}")

    return judge()


def _manifest(attempt: Attempt) -> Iterator[Breach] | None:
    done = attempt.done
    if done is None:
        return None

    def judge() -> Iterator[Breach]:
        pass_ = attempt.pass_
        size = cost(attempt.before, attempt.captured.dynamic)
        step = Step(
            pass_,
            [],  # the ledger has a law of its own
            done.result.changed,
            dict(done.result.statistics),
            dict(done.result.renamed),
            size,
            size,
            verification.Check("nothing"),
        )
        captured = dataclasses.replace(attempt.captured, model=attempt.before)
        compiled = Compiled(captured, done.model, [step], attempt.context())
        written = json.loads(json.dumps(manifest.build(compiled), allow_nan=False))
        (told,) = written["compilation"]["passes"]
        if make(type(pass_), told["options"], lambda option: "") != pass_:
            yield Breach(f"its options {told['options']} give another pass when they are read back")
        for name, number in done.result.statistics.items():
            if not math.isfinite(number):
                yield Breach(f"the statistic {name} is {number}")

    return judge()


_LAWS: Sequence[Law[Subject]] = (
    Law(
        "protocol",
        "a pass is a frozen dataclass with a name, a version, help and an exactness",
        "decorate it with @options and set name and exactness, as in docs/plugins.md",
        _protocol,
    ),
    Law(
        "options",
        "a wrong option gives an OptionError",
        "decorate it with @options, and declare ranges with option(ge=..., lt=...) or Literal",
        _options,
    ),
    Law(
        "text",
        "a pass in a pipeline's text is read back as itself",
        "let options be numbers, strings, booleans, None, and tuples and dicts of them; keep Pass.__str__",
        _text,
    ),
    Law(
        "recipe",
        "a pass in a recipe is read back as itself",
        "let options be JSON data: numbers, strings, booleans, None, and tuples and dicts of them",
        _recipe,
    ),
    Law(
        "runs",
        "a pass runs on every model, or says by a NetLatheError why not",
        "skip what the pass is not for with a ledger entry; raise PassError with a Diagnostic for"
        " what cannot be done as asked",
        _runs,
    ),
    Law(
        "acts",
        "some model makes the pass act",
        "give models= one that the pass is for; netlathe.testing.from_text writes one",
        _acts,
    ),
    Law(
        "choice",
        "choosing touches nothing",
        "move every edit, of weights and metadata too, from choose() to edit()",
        _each(_choice),
    ),
    Law(
        "form",
        "the model after a pass is sound and in normal form",
        "call netlathe.ir.normal.normalize(model) after the last edit",
        _each(_form),
    ),
    Law(
        "interface",
        "inputs and outputs keep their names, order and types",
        "a new node takes the name of the output it makes (netlathe.ir.edit.replace does it); a lossy"
        " pass that removes one says so in Result.renamed",
        _each(_keeps_interface),
    ),
    Law(
        "ledger",
        "the ledger accounts for every candidate and for what happened",
        "return one Entry for each candidate: applied, skipped or refused, with a reason, and JSON data"
        " as detail",
        _each(_ledger),
    ),
    Law(
        "idle",
        "a pass that does not apply changes nothing",
        "look before you edit, and return Result(True) where anything changed",
        _each(_idle),
    ),
    Law(
        "given",
        "what a pass is given stays as it was: other models over the same weights, and data",
        "give a value a new tensor (netlathe.ir.weights.derived) instead of writing into its array",
        _each(_given),
    ),
    Law(
        "lazy",
        "weights mapped from a file can be used, and unchanged ones stay mapped",
        "move tensors as they are, and make new ones by netlathe.ir.weights.derived",
        _each(_lazy),
    ),
    Law(
        "repeatable",
        "the same input gives the same bytes",
        "take random numbers from ctx.rng(), and leave times and addresses out of results",
        _each(_repeatable),
    ),
    Law(
        "process",
        "the same input gives the same bytes in every process",
        "define the class at the top of a module; iterate over sorted things, not over sets; do not"
        " use hash() or id()",
        _process,
    ),
    Law(
        "random_state",
        "global random state is left alone",
        "take random numbers from ctx.rng()",
        _each(_random_state),
    ),
    Law(
        "names",
        "a value that keeps its name means the same, and renamed tells of the others",
        "give a value that means something else another name, and map the old one to None",
        _each(_names),
    ),
    Law(
        "reference",
        "a simulated reference is made without edit(), from the ledger alone",
        "build it from the Entry's detail (JSON data) and arrays, by other means than edit()",
        _each(_reference),
    ),
    Law(
        "promise",
        "the outputs are what the pass' exactness promises, at every size",
        "correct the edit, or state the exactness that holds",
        _each(_promise),
    ),
    Law(
        "data",
        "a pass that needs calibration data says so before anything runs",
        "name the option that needs it in needs_data()",
        _each(_data),
    ),
    Law(
        "onnx_ir",
        "a pass works as a pass of onnx_ir",
        "keep Pass.call and Pass.bind, and edit the model in place",
        _each(_onnx_ir),
    ),
    Law(
        "manifest",
        "a manifest holds the pass and gives it back",
        "let options and statistics be JSON data, and statistics finite numbers",
        _each(_manifest),
    ),
)
