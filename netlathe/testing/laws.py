"""Laws, the cases that judge them, and the error that names those that are broken."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import random
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import onnx_ir as ir

from netlathe.diagnostics import Diagnostic, GateError
from netlathe.pipeline.fingerprint import graph_digest, weights_digest

S = TypeVar("S")


class ConformanceError(GateError):
    """A plug-in breaks laws of its kind: one diagnostic for each law and model."""


@dataclass(frozen=True)
class Breach:
    """How a law is broken; ``model`` is the model it was seen on."""

    message: str
    model: str = ""
    at: str = ""
    notes: tuple[str, ...] = ()

    def on(self, model: str) -> Breach:
        """The same, seen on ``model``."""
        return dataclasses.replace(self, model=model)


@dataclass(frozen=True)
class Law(Generic[S]):
    """Something that must hold of every plug-in of a kind.

    ``says`` is a sentence without a full stop, ``help`` what to do about a breach.
    """

    name: str
    says: str
    help: str
    judge: Callable[[S], Iterable[Breach]]


@dataclass(frozen=True)
class Case(Generic[S]):
    """One law and what it is judged on: the unit that a test framework runs."""

    law: Law[S]
    subject: S
    title: str  # what the subject is called in messages

    def __str__(self) -> str:
        return self.law.name

    def diagnostics(self) -> list[Diagnostic]:
        """Every breach; an empty list if the law holds."""
        return [self._diagnostic(breach) for breach in self._breaches()]

    def check(self) -> None:
        """Return if the law holds.

        Raises:
            ConformanceError: with every breach of it.
        """
        check([self])

    def _breaches(self) -> Iterator[Breach]:
        try:
            yield from self.law.judge(self.subject)
        except Exception as error:  # the plug-in's code: anything may happen in it
            yield raised(error)

    def _diagnostic(self, breach: Breach) -> Diagnostic:
        place = f" on the model {breach.model!r}" if breach.model else ""
        return Diagnostic(
            f"conformance.{self.law.name}",
            f"{self.title} breaks the law that {self.law.says}{place}: {breach.message}",
            at=breach.at,
            notes=breach.notes,
            help=self.law.help,
        )


def check(cases: Sequence[Case[Any]]) -> None:
    """Judge all ``cases``.

    Raises:
        ConformanceError: with every breach of every law.
    """
    if found := [diagnostic for case in cases for diagnostic in case.diagnostics()]:
        raise ConformanceError(found)


def raised(error: Exception, what: str = "raised") -> Breach:
    """An exception that should not have come out of a plug-in."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{Path(f.filename).name}:{f.lineno} in {f.name}" for f in frames[-3:]]
    first_line = (str(error).splitlines() or [""])[0]
    return Breach(f"{what} {type(error).__name__}: {first_line}", notes=tuple(places))


# -- looking at models ----------------------------------------------------------------------------


def bits(model: ir.Model) -> str:
    """SHA-256 over all that a model is: graph, names, types, metadata, and every weight's bytes."""
    state = hashlib.sha256(f"{graph_digest(model)} {weights_digest(model)}".encode())
    things: list[Any] = [model, model.graph, *model.graph.all_nodes()]
    for thing in things:
        state.update(repr((thing.doc_string, sorted(thing.metadata_props.items()))).encode())
    return state.hexdigest()


def fresh(model: ir.Model) -> ir.Model:
    """A copy that shares no bytes with ``model`` that could be written to."""
    copy = model.clone()
    for graph in copy.graphs():
        for name, value in graph.initializers.items():
            tensor = value.const_value
            if tensor is None or isinstance(tensor, ir.ExternalTensor | ir.LazyTensor):
                continue
            if tensor.dtype != ir.DataType.STRING:
                array = np.array(tensor.numpy())
                value.const_value = ir.Tensor(array, dtype=tensor.dtype, name=name)
    return copy


def mapped(model: ir.Model, folder: Path) -> ir.Model:
    """``model`` as a file in ``folder`` gives it, its weights mapped from another file."""
    file = folder / "model.onnx"
    ir.save(fresh(model), file, external_data="model.data", size_threshold_bytes=0)
    return ir.load(file)


# -- global random state --------------------------------------------------------------------------


def random_state() -> dict[str, bytes]:
    """A digest of every global generator that is there, by the name of its library."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    numpy = repr((kind, np.asarray(keys).tobytes(), rest))
    found = {"random": repr(random.getstate()), "numpy": numpy}
    if torch := sys.modules.get("torch"):
        found["torch"] = repr(torch.get_rng_state().numpy().tobytes())
    return {name: hashlib.sha256(text.encode()).digest() for name, text in found.items()}


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Global generators seeded with ``seed``, and as they were afterwards."""
    python, numpy = random.getstate(), np.random.get_state(legacy=True)
    torch = sys.modules.get("torch")
    state = torch.get_rng_state() if torch else None
    random.seed(seed)
    np.random.seed(seed)
    if torch:
        torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        if torch:
            torch.set_rng_state(state)


def random_state_breaches(before: dict[str, bytes]) -> Iterator[Breach]:
    """A breach for every global generator that has moved; one of a library that came since is new."""
    now = random_state()
    for name, state in before.items():
        if now[name] != state:
            yield Breach(f"the global generator of {name} has moved")
