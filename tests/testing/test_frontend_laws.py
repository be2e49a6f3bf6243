"""Every law of frontends: an honest frontend keeps it, and one that breaks it and nothing else is caught."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from netlathe import Captured, Frontend
from netlathe.diagnostics import Diagnostic, InputError
from netlathe.pipeline.ledger import Entry
from netlathe.pipeline.pass_ import Feeds
from netlathe.testing import check_frontend, from_text, frontend_cases

TEXT = """(float[{dim}, 4] x) => (float[{dim}, 3] y) {{
    ["{label}"] h = MatMul(x, weight)  ["/head/Tanh"] y = Tanh(h) }}"""


@dataclass
class Layer:
    """A source: y = tanh(x @ weight)."""

    weight: np.ndarray = field(
        default_factory=lambda: np.random.default_rng(0).standard_normal((4, 3), np.float32)
    )


class Toy(Frontend):
    """Captures a Layer."""

    name = "toy"
    dim, label = "batch", "/head/MatMul"

    @classmethod
    def accepts(cls, source: Any) -> bool:
        return isinstance(source, Layer)

    def capture(self, source: Layer) -> Captured:
        if source.weight.shape != (4, 3):
            raise InputError(Diagnostic("toy.shape", "the weight is no [4, 3]"))
        made = self.made(source)
        return dataclasses.replace(made, frontend=self.name)

    def made(self, source: Layer) -> Captured:
        text = TEXT.format(dim=self.dim, label=self.label)
        return from_text("layer", text, {"weight": source.weight})


class Nameless(Toy):
    name = "no name"


class Greedy(Toy):
    @classmethod
    def accepts(cls, source: Any) -> bool:
        return True


class Anonymous(Toy):
    def capture(self, source: Layer) -> Captured:
        return dataclasses.replace(super().capture(source), frontend="another")


class Untyped(Toy):
    def capture(self, source: Layer) -> Captured:
        captured = super().capture(source)
        for node in captured.model.graph:
            if node.op_type == "MatMul":
                node.outputs[0].shape = None
        return captured


class Homeless(Toy):
    label = "MatMul"


class Fixed(Toy):
    dim = "2"


class Dices(Toy):
    def capture(self, source: Layer) -> Captured:
        captured = super().capture(source)
        rng = np.random.default_rng()

        def sample(sizes: Mapping[str, int], seed: int) -> Feeds:
            shape = ({**captured.dynamic, **sizes}["batch"], 4)
            return {"x": rng.standard_normal(shape, np.float32)}

        return dataclasses.replace(captured, sample=sample)


class Rounds(Toy):
    def made(self, source: Layer) -> Captured:
        return super().made(Layer(source.weight.astype(np.float16).astype(np.float32)))


NUMBERS = itertools.count()


class Counts(Toy):
    def capture(self, source: Layer) -> Captured:
        entries = [Entry("layer", "applied", f"capture number {next(NUMBERS)}")]
        return dataclasses.replace(super().capture(source), entries=entries)


class Consumes(Toy):
    def capture(self, source: Layer) -> Captured:
        captured = super().capture(source)
        source.weight = source.weight / 2
        return captured


class Seeds(Toy):
    def capture(self, source: Layer) -> Captured:
        np.random.seed(0)
        return super().capture(source)


class Crashes(Toy):
    def capture(self, source: Layer) -> Captured:
        if source.weight.shape != (4, 3):
            raise IndexError("weight")
        return super().capture(source)


def run(source: Layer) -> Any:
    return lambda feeds: {"y": np.tanh(feeds["x"] @ source.weight)}


def cases(frontend: Frontend) -> list[Any]:
    source = Layer()
    wrong = [Layer(np.zeros((2, 3), np.float32))]
    return frontend_cases(frontend, source, run(source), dynamic=["batch"], wrong=wrong)


BROKEN: list[tuple[str, type[Toy]]] = [
    ("protocol", Nameless),
    ("accepts", Greedy),
    ("captures", Anonymous),
    ("form", Untyped),
    ("provenance", Homeless),
    ("dynamic", Fixed),
    ("samples", Dices),
    ("parity", Rounds),
    ("repeatable", Counts),
    ("random_state", Seeds),
    ("errors", Crashes),
]


def test_an_honest_frontend_keeps_every_law() -> None:
    source = Layer()
    wrong = [Layer(np.zeros((2, 3), np.float32))]
    check_frontend(Toy(), source, run(source), dynamic=["batch"], wrong=wrong)


@pytest.mark.parametrize(("law", "kind"), BROKEN, ids=[kind.__name__ for _, kind in BROKEN])
def test_each_law_can_be_broken_alone(law: str, kind: type[Toy]) -> None:
    found = {str(case): case.diagnostics() for case in cases(kind())}
    assert [name for name, diagnostics in found.items() if diagnostics] == [law]
    assert found[law][0].code == f"conformance.{law}" and found[law][0].help


def test_the_law_of_sources() -> None:
    """A source that is used up differs from its captures as well: the law is judged by itself."""
    source = Layer()
    made = frontend_cases(Consumes(), source, run(source), dynamic=["batch"])
    (case,) = [case for case in made if str(case) == "untouched"]
    (found,) = case.diagnostics()
    assert "after capture() the source gives another 'y'" in found.message


def test_every_law_is_broken_by_some_frontend() -> None:
    laws = {law for law, _ in BROKEN} | {"untouched"}
    assert {str(case) for case in cases(Toy())} == laws


def test_damaged_files_are_made_for_files_only() -> None:
    source = Layer()
    made = frontend_cases(Toy(), source, run(source), dynamic=["batch"])
    (case,) = [case for case in made if str(case) == "errors"]
    assert "give wrong= sources" in case.diagnostics()[0].message
