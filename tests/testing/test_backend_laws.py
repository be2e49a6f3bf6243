"""Every law of backends: an honest backend keeps it, and one that breaks it and nothing else is caught."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from netlathe import Artifact, Backend, Captured, Target
from netlathe.diagnostics import Diagnostic, InputError, LowerError, OptionError
from netlathe.execute import ort
from netlathe.pipeline.pass_ import Feeds
from netlathe.testing import ConformanceError, backend_cases, check_backend, models

KNOWN = frozenset({"", "ai.onnx"})


class Toy(Backend):
    """Writes the model as one ONNX file."""

    name = "toy"

    @classmethod
    def targets(cls) -> Sequence[Target]:
        return [Target("toy", "toy", "a file", settings={"level": 1})]

    def check(self, target: Target) -> None:
        if not isinstance(target.settings["level"], int):
            raise OptionError(Diagnostic("target.setting", "level is a number"))

    def unsupported(self, model: ir.Model, target: Target) -> list[Diagnostic]:
        return [
            Diagnostic("toy.op", f"there is no {node.op_type}")
            for node in model.graph.all_nodes()
            if node.domain not in KNOWN or node.op_type == "Swish"  # ONNX Runtime lacks it
        ]

    def compile(self, model: ir.Model, target: Target) -> ToyArtifact:
        if found := self.unsupported(model, target):
            raise LowerError(found)
        return ToyArtifact(model.clone())


class ToyArtifact(Artifact):
    def __init__(self, model: ir.Model) -> None:
        self.model = model

    def run(self, feeds: Feeds) -> dict[str, Any]:
        return dict(ort.run(self.model, feeds))

    def save(self, folder: Path) -> list[Path]:
        file = folder / "toy.onnx"
        file.write_bytes(ir.to_proto(self.model).SerializeToString(deterministic=True))
        return [file]


def load(folder: Path) -> Callable[[Feeds], dict[str, Any]]:
    (file,) = folder.glob("*.onnx")
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda feeds: dict(zip(names, session.run(names, dict(feeds)), strict=True))


def some() -> list[Captured]:
    return [captured for captured in models() if captured.source in ("mlp", "convolution")]


def with_artifact(cls: type[ToyArtifact]) -> type[Toy]:
    """A Toy that makes artifacts of another kind."""

    class Other(Toy):
        def compile(self, model: ir.Model, target: Target) -> ToyArtifact:
            super().compile(model, target)
            return cls(model.clone())

    Other.__name__ = cls.__name__
    return Other


class Helpless(Toy):
    @classmethod
    def targets(cls) -> Sequence[Target]:
        return [Target("toy", "toy", "", settings={"level": 1})]


class Careless(Toy):
    def check(self, target: Target) -> None:
        """Takes everything."""


class Unable(Toy):
    def unsupported(self, model: ir.Model, target: Target) -> list[Diagnostic]:
        return [
            Diagnostic("toy.op", f"there is no {node.op_type}") for node in model.graph.all_nodes()
        ]


class Hasty(Toy):
    """Stops at the first gap."""

    def unsupported(self, model: ir.Model, target: Target) -> list[Diagnostic]:
        return super().unsupported(model, target)[:1]


class Late(Toy):
    """Finds out while it compiles."""

    def compile(self, model: ir.Model, target: Target) -> ToyArtifact:
        if len(list(model.graph)) > 10:
            raise LowerError(Diagnostic("toy.size", "too large"))
        return super().compile(model, target)


class Marks(Toy):
    def compile(self, model: ir.Model, target: Target) -> ToyArtifact:
        model.metadata_props["compiled_by"] = "toy"
        made = super().compile(model, target)
        made.model.metadata_props.clear()
        return made


class Wrong(ToyArtifact):
    def run(self, feeds: Feeds) -> dict[str, Any]:
        return {name: array * np.float32(1.001) for name, array in super().run(feeds).items()}


class Hides(ToyArtifact):
    def save(self, folder: Path) -> list[Path]:
        (folder / "more.txt").write_text("not listed")
        return super().save(folder)


class Swallows(ToyArtifact):
    def save(self, folder: Path) -> list[Path]:
        try:
            return super().save(folder)
        except OSError:
            return [folder / "toy.onnx"]


class Raw(ToyArtifact):
    def run(self, feeds: Feeds) -> dict[str, Any]:
        try:
            return super().run(feeds)
        except InputError as error:
            raise RuntimeError(str(error)) from error


NUMBERS = itertools.count()


class Counts(ToyArtifact):
    def save(self, folder: Path) -> list[Path]:
        self.model.metadata_props["number"] = str(next(NUMBERS))
        return super().save(folder)


class Seeds(ToyArtifact):
    def save(self, folder: Path) -> list[Path]:
        np.random.seed(0)
        return super().save(folder)


BROKEN: list[tuple[str, type[Toy]]] = [
    ("protocol", Helpless),
    ("settings", Careless),
    ("compiles", Unable),
    ("gaps", Hasty),
    ("gaps", Late),
    ("untouched", Marks),
    ("runs", with_artifact(Wrong)),
    ("saved", with_artifact(Hides)),
    ("whole", with_artifact(Swallows)),
    ("feeds", with_artifact(Raw)),
    ("repeatable", with_artifact(Counts)),
    ("random_state", with_artifact(Seeds)),
]


def test_an_honest_backend_keeps_every_law() -> None:
    check_backend(Toy(), load)


@pytest.mark.parametrize(("law", "kind"), BROKEN, ids=[kind.__name__ for _, kind in BROKEN])
def test_each_law_can_be_broken_alone(law: str, kind: type[Toy]) -> None:
    found = {str(c): c.diagnostics() for c in backend_cases(kind(), load, models=some())}
    assert [name for name, diagnostics in found.items() if diagnostics] == [law]
    assert found[law][0].code == f"conformance.{law}" and found[law][0].help


def test_every_law_is_broken_by_some_backend() -> None:
    assert {str(case) for case in backend_cases(Toy(), load)} == {law for law, _ in BROKEN}


def test_what_is_saved_is_run_too() -> None:
    def other(folder: Path) -> Callable[[Feeds], dict[str, Any]]:
        run = load(folder)
        return lambda feeds: {name: -array for name, array in run(feeds).items()}

    with pytest.raises(ConformanceError, match=r"'y' is off by .* of its RMS at batch=2") as caught:
        check_backend(Toy(), other, models=some())
    assert {d.code for d in caught.value.diagnostics} == {"conformance.saved"}
