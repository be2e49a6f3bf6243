"""What must hold of every frontend, judged on one source: see :func:`check_frontend`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from netlathe.diagnostics import NetLatheError
from netlathe.execute import ort, samples
from netlathe.execute.compare import relative_error
from netlathe.frontends.compare import TOLERANCE
from netlathe.ir import normal, provenance, verify, weights
from netlathe.ir.printing import show_node
from netlathe.pipeline.fingerprint import feeds_digest
from netlathe.pipeline.interfaces import Captured, Frontend
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
from netlathe.testing.sizes import trials

Array = npt.NDArray[Any]
Run = Callable[[Feeds], Mapping[str, Array]]


def check_frontend(
    frontend: Frontend,
    source: Any,
    run: Run,
    *,
    dynamic: Collection[str],
    wrong: Sequence[Any] = (),
) -> None:
    """Judge ``frontend`` by every law, on ``source``.

    ``run`` computes what the source does by its own means: arrays by input name in, arrays by output
    name out. ``dynamic`` names the dims of the source that may have any size. ``wrong`` are sources
    that look like the frontend's own and cannot be captured; for a file, one that is absent and two
    that are damaged are added. The source should have modules, which captured nodes must name.

    Raises:
        ConformanceError: with every breach of every law.
    """
    check(frontend_cases(frontend, source, run, dynamic=dynamic, wrong=wrong))


def frontend_cases(
    frontend: Frontend,
    source: Any,
    run: Run,
    *,
    dynamic: Collection[str],
    wrong: Sequence[Any] = (),
) -> list[Case[Any]]:
    """The laws of :func:`check_frontend` one by one, for a test framework."""
    subject = Subject(frontend, source, run, dynamic, wrong)
    title = f"the frontend {getattr(frontend, 'name', type(frontend).__name__)}"
    return [Case(law, subject, title) for law in _LAWS]


class Subject:
    """A frontend and a source that it captures."""

    def __init__(
        self,
        frontend: Frontend,
        source: Any,
        run: Run,
        dynamic: Collection[str],
        wrong: Sequence[Any],
    ) -> None:
        self.frontend = frontend
        self.source = source
        self.run = run
        self.dynamic = frozenset(dynamic)
        self.wrong = tuple(wrong)

    @cached_property
    def tried(self) -> Captured | Exception:
        """What came out of the first capture."""
        try:
            return self.frontend.capture(self.source)
        except Exception as error:  # the plug-in's code: anything may happen in it
            return error

    @property
    def captured(self) -> Captured | None:
        """The captured model; None where capturing failed, which one law reports."""
        return self.tried if isinstance(self.tried, Captured) else None


def _of_captured(
    judge: Callable[[Subject, Captured], Iterator[Breach]],
) -> Callable[[Subject], Iterator[Breach]]:
    def over(subject: Subject) -> Iterator[Breach]:
        if subject.captured is not None:
            yield from judge(subject, subject.captured)

    return over


def _protocol(subject: Subject) -> Iterator[Breach]:
    frontend = subject.frontend
    if not isinstance(frontend, Frontend):
        yield Breach(f"{type(frontend).__name__} is no subclass of netlathe.Frontend")
    elif not isinstance(frontend.name, str) or not frontend.name.isidentifier():
        yield Breach(f"its name {frontend.name!r} is no identifier")


def _accepts(subject: Subject) -> Iterator[Breach]:
    accepts = type(subject.frontend).accepts
    if accepts(subject.source) is not True:
        yield Breach("it does not accept the source that it is for")
    for what, source in (("an object()", object()), ("None", None), ("a number", 3)):
        if accepts(source) is not False:
            yield Breach(f"it accepts {what}, which other frontends may be for")


def _captures(subject: Subject) -> Iterator[Breach]:
    tried = subject.tried
    if isinstance(tried, Exception):
        yield raised(tried)
    elif not isinstance(tried, Captured):
        yield Breach(f"capture() returned {type(tried).__name__} and no Captured")
    elif tried.frontend != subject.frontend.name:
        yield Breach(f"Captured.frontend is {tried.frontend!r}")


def _form(subject: Subject, captured: Captured) -> Iterator[Breach]:
    if problems := verify.verify(captured.model):
        yield from (Breach(d.message, at=d.at, notes=(d.code,)) for d in problems)
        return
    settled = fresh(captured.model)
    normal.normalize(settled)
    if bits(settled) != bits(captured.model):
        was = {show_node(node) for node in captured.model.graph}
        news = [f"becomes {s}" for n in settled.graph if (s := show_node(n)) not in was]
        yield Breach("bringing it into normal form changes it", notes=tuple(news[:3]))


def _provenance(subject: Subject, captured: Captured) -> Iterator[Breach]:
    for node in captured.model.graph.all_nodes():
        reads = [v.name for v in node.inputs if v is not None and _is_parameter(v)]
        if reads and not provenance.module_path(node):
            yield Breach(
                f"the node that reads {reads[0]} names no module of the source", at=show_node(node)
            )
            return


def _is_parameter(value: Any) -> bool:
    tensor = value.const_value
    return weights.is_weight(value) and tensor.size > 1 and tensor.dtype.is_floating_point()


def _dynamic(subject: Subject, captured: Captured) -> Iterator[Breach]:
    inputs = {name for value in captured.model.graph.inputs for name in samples.free_dims(value)}
    if inputs != subject.dynamic:
        yield Breach(f"the dims that may vary are {sorted(inputs)}, not {sorted(subject.dynamic)}")
    if set(captured.dynamic) != inputs:
        yield Breach(f"Captured.dynamic names {sorted(captured.dynamic)}, not {sorted(inputs)}")


def _samples(subject: Subject, captured: Captured) -> Iterator[Breach]:
    one, again = (captured.sample(captured.dynamic, 5) for _ in range(2))
    if feeds_digest(one) != feeds_digest(again):
        yield Breach("sample() gives two things for one seed")
    for _, feeds in trials(captured):
        for value in captured.model.graph.inputs:
            array = feeds.get(value.name or "")
            if array is None or value.dtype is None or array.dtype != value.dtype.numpy():
                yield Breach(f"sample() gives no {value.dtype} for the input {value.name!r}")


def _parity(subject: Subject, captured: Captured) -> Iterator[Breach]:
    for label, feeds in trials(captured):
        actual, expected = ort.run(captured.model, feeds), subject.run(feeds)
        if sorted(actual) != sorted(expected):
            yield Breach(f"its outputs are {sorted(actual)}, the source's {sorted(expected)}")
            return
        for name, array in expected.items():
            error = relative_error(actual[name], np.asarray(array))
            if not error <= TOLERANCE:
                yield Breach(
                    f"output {name!r} is off by {error:.2g} of its RMS at {label} (at most"
                    f" {TOLERANCE:.0e})"
                )


def _repeatable(subject: Subject, captured: Captured) -> Iterator[Breach]:
    with seeded(1):
        again = subject.frontend.capture(subject.source)
    if bits(again.model) != bits(captured.model):
        yield Breach("two captures give two models")
    elif [e.to_json() for e in again.entries] != [e.to_json() for e in captured.entries]:
        yield Breach("two captures give two ledgers")


def _untouched(subject: Subject, captured: Captured) -> Iterator[Breach]:
    feeds = captured.sample(captured.dynamic, 0)
    before = {name: np.array(array) for name, array in subject.run(feeds).items()}
    subject.frontend.capture(subject.source)
    for name, array in subject.run(feeds).items():
        if relative_error(np.asarray(array), before[name]) != 0:
            yield Breach(f"after capture() the source gives another {name!r}")


def _random_state(subject: Subject, captured: Captured) -> Iterator[Breach]:
    with seeded(3):
        before = random_state()
        subject.frontend.capture(subject.source)
        captured.sample(captured.dynamic, 0)
        yield from list(random_state_breaches(before))


def _errors(subject: Subject) -> Iterator[Breach]:
    with tempfile.TemporaryDirectory() as folder:
        wrong = [*subject.wrong, *_damaged(subject.source, Path(folder))]
        if not wrong:
            yield Breach("nothing to judge it by: give wrong= sources that cannot be captured")
        for source in wrong:
            shown = source if isinstance(source, str | Path) else f"a {type(source).__name__}"
            try:
                subject.frontend.capture(source)
            except NetLatheError as error:
                if not all(d.code and d.message for d in error.diagnostics) or not str(error):
                    yield Breach(f"{shown}: its {type(error).__name__} says nothing")
            except Exception as error:  # the plug-in's code: anything may happen in it
                yield raised(error, f"{shown} raised no NetLatheError but")
            else:
                yield Breach(f"{shown} is captured")


def _damaged(source: Any, folder: Path) -> Iterator[Path]:
    """Of a file: one that is absent, one that breaks off, and one of noise."""
    if not isinstance(source, str | Path):
        return
    path = Path(source)
    yield folder / f"absent{path.suffix}"
    if path.is_file():
        data = path.read_bytes()
        for name, content in (("half", data[: len(data) // 2]), ("noise", b"\xff\x00 no model")):
            file = folder / f"{name}{path.suffix}"
            file.write_bytes(content)
            yield file


_LAWS: Sequence[Law[Subject]] = (
    Law(
        "protocol",
        "a frontend has a name that is an identifier",
        "derive from netlathe.Frontend and set name",
        _protocol,
    ),
    Law(
        "accepts",
        "a frontend accepts its own kind of source and no other",
        "look at the type, or at the path; importing and reading are for capture()",
        _accepts,
    ),
    Law(
        "captures",
        "its source is captured",
        "return netlathe.Captured; netlathe.frontends.finish makes one from a raw graph",
        _captures,
    ),
    Law(
        "form",
        "the captured model is sound and in normal form",
        "call netlathe.ir.normal.normalize(model) at the end, or end with netlathe.frontends.finish",
        _of_captured(_form),
    ),
    Law(
        "provenance",
        "nodes name the modules of the source that they come from",
        "write them with netlathe.ir.provenance.mark(node, module=...)",
        _of_captured(_provenance),
    ),
    Law(
        "dynamic",
        "dims that may vary in the source may vary in the captured model",
        "name the dims of graph inputs, and list the names in Captured.dynamic",
        _of_captured(_dynamic),
    ),
    Law(
        "samples",
        "samples are valid feeds and depend on their seed alone",
        "use netlathe.execute.samples.synthesize",
        _of_captured(_samples),
    ),
    Law(
        "parity",
        "the captured model computes what the source does, at every size",
        "find the node with netlathe.frontends.compare.first_differing_node",
        _of_captured(_parity),
    ),
    Law(
        "repeatable",
        "the same source gives the same model",
        "leave addresses, counters and the order of sets out of names",
        _of_captured(_repeatable),
    ),
    Law(
        "untouched",
        "capturing leaves the source as it was",
        "work on a copy, and restore modes (training, devices) that were changed",
        _of_captured(_untouched),
    ),
    Law(
        "random_state",
        "global random state is left alone",
        "use a generator of your own: numpy.random.default_rng(seed)",
        _of_captured(_random_state),
    ),
    Law(
        "errors",
        "a source that cannot be captured gives an InputError or CaptureError",
        "say what is wrong with it in a Diagnostic, where, and what to do",
        _errors,
    ),
)
