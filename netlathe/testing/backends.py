"""What must hold of every backend, judged on small models: see :func:`check_backend`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx.parser
import onnx_ir as ir

from netlathe.diagnostics import Diagnostic, InputError, LowerError, NetLatheError, OptionError
from netlathe.execute import ort
from netlathe.execute.compare import relative_error
from netlathe.ir import verify
from netlathe.pipeline import output
from netlathe.pipeline.interfaces import Artifact, Backend, Captured, Target
from netlathe.pipeline.pass_ import Feeds
from netlathe.testing.laws import (
    Breach,
    Case,
    Law,
    bits,
    check,
    fresh,
    raised,
    random_state,
    random_state_breaches,
    seeded,
)
from netlathe.testing.models import models as ready_models
from netlathe.testing.sizes import trials

if sys.platform != "win32":
    import resource

Array = npt.NDArray[Any]
Runner = Callable[[Feeds], Mapping[str, Array]]
Load = Callable[[Path], Runner]

# max|artifact - IR| as a share of the IR's RMS: other orders of sums and other polynomials for exp, erf
# and tanh stay below it in float32. Of float16 and bfloat16 16 ulp.
_BOUND = 1e-4
_HALVES = {ir.DataType.FLOAT16: 16 * 2.0**-10, ir.DataType.BFLOAT16: 16 * 2.0**-7}
_SMALL_FILE = 200  # bytes that a file may have where a disk is said to be full


def check_backend(
    backend: Backend,
    load: Load,
    *,
    target: Target | None = None,
    models: Sequence[Captured] | None = None,
) -> None:
    """Judge ``backend`` by every law, on ``models`` (by default those of :func:`netlathe.testing.models`).

    ``load(folder)`` gives a function that runs what was saved there, by the means of whoever uses it:
    arrays by input name in, arrays by output name out. ``target`` is the backend's first unless another
    is given.

    Raises:
        ConformanceError: with every breach of every law.
    """
    check(backend_cases(backend, load, target=target, models=models))


def backend_cases(
    backend: Backend,
    load: Load,
    *,
    target: Target | None = None,
    models: Sequence[Captured] | None = None,
) -> list[Case[Any]]:
    """The laws of :func:`check_backend` one by one, for a test framework."""
    subject = Subject(backend, load, target, models)
    title = f"the backend {getattr(backend, 'name', type(backend).__name__)}"
    return [Case(law, subject, title) for law in _LAWS]


# -- a backend on models --------------------------------------------------------------------------


class Attempt:
    """A backend and a model that it is tried on."""

    def __init__(self, backend: Backend, target: Target, captured: Captured) -> None:
        self.backend = backend
        self.target = target
        self.captured = captured

    @property
    def name(self) -> str:
        """The model's."""
        return self.captured.source

    def start(self) -> ir.Model:
        """The model, with nothing shared that can be written to."""
        return fresh(self.captured.model)

    @cached_property
    def gaps(self) -> list[Diagnostic]:
        """What the backend says that it cannot express."""
        return list(self.backend.unsupported(self.start(), self.target))

    @cached_property
    def artifact(self) -> Artifact | None:
        """What it compiles; None where it says that it cannot, or cannot after all."""
        try:
            return None if self.gaps else self.backend.compile(self.start(), self.target)
        except Exception:  # the law of gaps reports it
            return None

    @cached_property
    def expected(self) -> list[tuple[str, Feeds, Mapping[str, Array]]]:
        """Sizes, feeds, and what the model makes of them."""
        session = ort.Session(self.captured.model)
        return [(label, feeds, session.run(feeds)) for label, feeds in trials(self.captured)]

    @property
    def bound(self) -> float:
        """How far the artifact may be from the model."""
        nodes = self.captured.model.graph.all_nodes()
        dtypes = {value.dtype for node in nodes for value in node.outputs}
        return max([_BOUND, *(limit for dtype, limit in _HALVES.items() if dtype in dtypes)])

    def compare(self, run: Runner) -> Iterator[Breach]:
        """What ``run`` gives against what the model gives."""
        for label, feeds, expected in self.expected:
            actual = run(feeds)
            if sorted(actual) != sorted(expected):
                yield Breach(f"at {label} its outputs are {', '.join(actual)}")
                continue
            for name, array in expected.items():
                error = relative_error(np.asarray(actual[name]), array)
                if not error <= self.bound:
                    yield Breach(
                        f"output {name!r} is off by {error:.2g} of its RMS at {label} (at most"
                        f" {self.bound:.1g})"
                    )


class Subject:
    """A backend, a target of it, and all models that it is tried on."""

    def __init__(
        self,
        backend: Backend,
        load: Load,
        target: Target | None,
        models: Sequence[Captured] | None,
    ) -> None:
        self.backend = backend
        self.load = load
        self._target = target
        self._models = models

    @cached_property
    def target(self) -> Target:
        """What it is asked to build for."""
        return self._target or self.backend.targets()[0]

    @cached_property
    def attempts(self) -> list[Attempt]:
        """One for each model; they are made when the first law is judged."""
        chosen = ready_models() if self._models is None else self._models
        return [Attempt(self.backend, self.target, captured) for captured in chosen]

    @cached_property
    def foreign(self) -> Attempt:
        """A model with two operators that no backend knows."""
        return Attempt(self.backend, self.target, _foreign())


def _foreign() -> Captured:
    proto = onnx.parser.parse_model(
        f"""<ir_version: 13, opset_import: ["": {verify.OPSET}, "testing.netlathe": 1]>
        foreign (float[batch, 4] x) => (float[batch, 4] y) {{
            ["/first/Unheard"] a = testing.netlathe.Unheard(x)
            ["/second/Unseen"] y = testing.netlathe.Unseen(a)
        }}"""
    )
    return Captured(ir.from_proto(proto), "foreign", "netlathe.testing", {}, lambda sizes, seed: {})


def _each(
    judge: Callable[[Subject, Attempt], Iterable[Breach]],
) -> Callable[[Subject], Iterator[Breach]]:
    """Judge every model that the backend compiles by itself."""

    def over(subject: Subject) -> Iterator[Breach]:
        for attempt in subject.attempts:
            try:
                if attempt.artifact is not None:
                    yield from (breach.on(attempt.name) for breach in judge(subject, attempt))
            except Exception as error:  # the plug-in's code: anything may happen in it
                yield raised(error).on(attempt.name)

    return over


# -- laws -----------------------------------------------------------------------------------------


def _protocol(subject: Subject) -> Iterator[Breach]:
    backend = subject.backend
    if not isinstance(backend, Backend):
        yield Breach(f"{type(backend).__name__} is no subclass of netlathe.Backend")
        return
    if not isinstance(backend.name, str) or not backend.name.isidentifier():
        yield Breach(f"its name {backend.name!r} is no identifier")
    targets = list(type(backend).targets())
    if not targets:
        yield Breach("it has no target")
    if len({target.name for target in targets}) < len(targets):
        yield Breach("two of its targets have one name")
    for target in targets:
        if target.backend != backend.name:
            yield Breach(f"its target {target.name} names the backend {target.backend!r}")
        if not target.help.strip():
            yield Breach(f"its target {target.name} has no help, which `netlathe targets` shows")
        json.dumps(dict(target.settings), allow_nan=False)  # raises: a manifest holds them


def _settings(subject: Subject) -> Iterator[Breach]:
    model = subject.attempts[0].start()
    for name in subject.target.settings:
        settings = {**subject.target.settings, name: object()}
        target = dataclasses.replace(subject.target, settings=settings)
        try:
            subject.backend.check(target)
            subject.backend.unsupported(model, target)
        except OptionError:
            continue
        yield Breach(f"{name}=an object() is taken")


def _compiles(subject: Subject) -> Iterator[Breach]:
    if not any(attempt.artifact is not None for attempt in subject.attempts):
        says = [
            f"{attempt.name}: {attempt.gaps[0].message}"
            for attempt in subject.attempts
            if attempt.gaps
        ]
        yield Breach("no other law means anything where nothing is built", notes=tuple(says))


def _gaps(subject: Subject) -> Iterator[Breach]:
    for attempt in (*subject.attempts, subject.foreign):
        try:
            found = attempt.gaps
        except Exception as error:  # the plug-in's code: anything may happen in it
            yield raised(error, "unsupported() raised").on(attempt.name)
            continue
        if any(not isinstance(d, Diagnostic) or not d.code or not d.message for d in found):
            yield Breach("unsupported() lists what is no Diagnostic with a code").on(attempt.name)
            continue
        if attempt is subject.foreign and found:
            told = "\n".join(map(str, found))
            for op in ("Unheard", "Unseen"):
                if op not in told:
                    yield Breach(f"unsupported() lists a gap and not the operator {op}").on(
                        attempt.name
                    )
        yield from (breach.on(attempt.name) for breach in _compiles_as_told(attempt, found))


def _compiles_as_told(attempt: Attempt, found: Sequence[Diagnostic]) -> Iterator[Breach]:
    try:
        attempt.backend.compile(attempt.start(), attempt.target)
    except LowerError as error:
        told, listed = {d.message for d in error.diagnostics}, {d.message for d in found}
        if not found:
            yield Breach(f"unsupported() lists nothing, and compile() raised: {min(told)}")
        elif told != listed:
            yield Breach(f"compile() lists {len(told)} gaps and unsupported() {len(listed)}")
    except Exception as error:  # the plug-in's code: anything may happen in it
        yield raised(error, "compile() raised")
    else:
        if found:
            yield Breach(f"unsupported() lists {found[0].message!r}, and compile() raises nothing")


def _untouched(subject: Subject, attempt: Attempt) -> Iterator[Breach]:
    for what, call in (
        ("unsupported", subject.backend.unsupported),
        ("compile", subject.backend.compile),
    ):
        model = attempt.start()
        was = bits(model)
        call(model, subject.target)
        if bits(model) != was:
            yield Breach(f"the model is another after {what}()")


def _runs(subject: Subject, attempt: Attempt) -> Iterator[Breach]:
    assert attempt.artifact is not None  # or it is not judged
    yield from attempt.compare(attempt.artifact.run)


def _saved(subject: Subject, attempt: Attempt) -> Iterator[Breach]:
    artifact = subject.backend.compile(attempt.start(), subject.target)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "artifact")
        folder.mkdir()
        listed = sorted(file.resolve() for file in artifact.save(folder))
        found = sorted(path.resolve() for path in folder.rglob("*") if path.is_file())
        if listed != found or not found:
            names = ", ".join(str(file) for file in {*listed} ^ {*found}) or "nothing"
            yield Breach(f"save() wrote other files than it lists: {names}")
        if others := [p.name for p in Path(place).iterdir() if p != folder]:
            yield Breach(f"save() wrote beside its folder: {', '.join(others)}")
        json.dumps(artifact.report(), allow_nan=False)  # raises: a manifest holds it
        yield from attempt.compare(subject.load(folder))


def _whole(subject: Subject, attempt: Attempt) -> Iterator[Breach]:
    artifact = subject.backend.compile(attempt.start(), subject.target)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "artifact")
        sizes: list[int] = []

        def write(part: Path) -> None:
            with _full_disk():
                artifact.save(part)
            sizes.extend(file.stat().st_size for file in part.rglob("*") if file.is_file())

        try:
            output.write_whole(folder, write)
        except (OSError, NetLatheError):
            pass
        else:
            # Nothing was larger than fits, or what does not fit was swallowed.
            again = _sizes_of(subject, attempt)
            if sorted(sizes) != again:
                yield Breach(f"the disk was full and save() returned: {sorted(sizes)} of {again}")
        if left := [p.name for p in Path(place).iterdir() if p != folder]:
            yield Breach(f"a disk that is full leaves {', '.join(left)}")


def _sizes_of(subject: Subject, attempt: Attempt) -> list[int]:
    with tempfile.TemporaryDirectory() as place:
        files = subject.backend.compile(attempt.start(), subject.target).save(Path(place))
        return sorted(file.stat().st_size for file in files)


@contextlib.contextmanager
def _full_disk() -> Iterator[None]:
    """No file of this process may grow beyond a few bytes: writing fails as on a full disk."""
    if sys.platform == "win32":
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # else the signal ends the process
    resource.setrlimit(resource.RLIMIT_FSIZE, (_SMALL_FILE, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def _feeds(subject: Subject, attempt: Attempt) -> Iterator[Breach]:
    artifact = attempt.artifact
    assert artifact is not None  # or it is not judged
    feeds = dict(attempt.captured.sample(attempt.captured.dynamic, 0))
    name = next(iter(feeds))
    array = np.asarray(feeds[name])
    other = np.float64 if array.dtype != np.float64 else np.float32
    rest = {key: value for key, value in feeds.items() if key != name}
    for what, wrong, must_name in (
        (f"without the input {name!r}", rest, name),
        ("with an unknown input", {**feeds, "no_such_input": array}, "no_such_input"),
        (
            f"with the input {name!r} as {np.dtype(other)}",
            {**feeds, name: array.astype(other)},
            name,
        ),
        (f"with one dim more in {name!r}", {**feeds, name: array[None]}, name),
    ):
        try:
            artifact.run(wrong)
        except InputError as error:
            if must_name not in str(error):
                yield Breach(f"{what}: the error names no input: {error.diagnostics[0].message}")
        except Exception as error:  # the plug-in's code: anything may happen in it
            yield raised(error, f"{what} it raised no InputError but")
        else:
            yield Breach(f"{what} it runs")


def _repeatable(subject: Subject, attempt: Attempt) -> Iterator[Breach]:
    made = []
    for seed in (1, 2):
        with seeded(seed), tempfile.TemporaryDirectory() as place:
            artifact = subject.backend.compile(attempt.start(), subject.target)
            files = artifact.save(Path(place))
            made.append({str(f.relative_to(place)): f.read_bytes() for f in files})
    one, two = made
    if wrong := sorted(name for name in {*one, *two} if one.get(name) != two.get(name)):
        yield Breach(f"two builds differ in {', '.join(wrong)}")


def _random_state(subject: Subject, attempt: Attempt) -> Iterator[Breach]:
    with seeded(3), tempfile.TemporaryDirectory() as place:
        before = random_state()
        artifact = subject.backend.compile(attempt.start(), subject.target)
        artifact.save(Path(place))
        yield from list(random_state_breaches(before))


_LAWS: Sequence[Law[Subject]] = (
    Law(
        "protocol",
        "a backend has a name, and targets of its own with names and help",
        "set name, and let targets() return Target(name, backend, help, ...)",
        _protocol,
    ),
    Law(
        "settings",
        "a wrong setting of a target gives an OptionError",
        "look at the settings in check(), which needs no model",
        _settings,
    ),
    Law(
        "compiles",
        "some model can be built",
        "give models= some that the backend is for",
        _compiles,
    ),
    Law(
        "gaps",
        "unsupported() lists every gap, and compile() fails for these and no others",
        "let compile() raise LowerError with what unsupported() returns, and let that look at all nodes",
        _gaps,
    ),
    Law(
        "untouched",
        "building leaves the model as it was",
        "lower a clone: model.clone() shares the weights",
        _each(_untouched),
    ),
    Law(
        "runs",
        "an artifact computes what the model does, at every size",
        "compare value by value with netlathe.execute.compare.first_difference",
        _each(_runs),
    ),
    Law(
        "saved",
        "what is saved is complete and computes what the model does",
        "write into the folder that save() is given, and return the path of every file",
        _each(_saved),
    ),
    Law(
        "whole",
        "an artifact is written whole or not at all",
        "let errors of writing out of save(); the folder is then removed",
        _each(_whole),
    ),
    Law(
        "feeds",
        "wrong inputs give an InputError that names the input",
        "check names, dtypes and ranks in Artifact.run before anything runs",
        _each(_feeds),
    ),
    Law(
        "repeatable",
        "the same model gives the same bytes",
        "leave times, addresses and random names out of the files",
        _each(_repeatable),
    ),
    Law(
        "random_state",
        "global random state is left alone",
        "use a generator of your own: numpy.random.default_rng(seed)",
        _each(_random_state),
    ),
)
