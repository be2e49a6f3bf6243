"""Pipelines as text: what is read, what is written, and what errors show."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netlathe.diagnostics import OptionError
from netlathe.passes.prune import Prune
from netlathe.pipeline import registry, text
from netlathe.pipeline.pass_ import Pass
from tests.pipeline.plugin import install
from tests.pipeline.toy import Balance, Cut, ReluToMax


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the toy passes be installed."""
    known: dict[str, type[Pass]] = {"cut": Cut, "balance": Balance, "relu_to_max": ReluToMax}
    find = registry.find_pass
    monkeypatch.setattr(registry, "find_pass", lambda name: known.get(name) or find(name))


def test_a_pipeline() -> None:
    passes = text.parse('relu_to_max, cut(side="first", count=3), balance(factor=2)')
    assert passes == [ReluToMax(), Cut(side="first", count=3), Balance(factor=2.0)]
    assert text.render(passes) == "relu_to_max, cut(count=3, side='first'), balance(factor=2.0)"


@pytest.mark.parametrize(
    ("given_", "canonical"),
    [
        ("", ""),
        ("  \n", ""),
        ("cut", "cut"),
        ("cut()", "cut"),
        ("cut(count=2)", "cut"),  # the default
        ("cut,", "cut"),
        ("cut,\n  # the residual stays\n  balance(factor=3.5,)", "cut, balance(factor=3.5)"),
        ("balance(factor=1e-3)", "balance(factor=0.001)"),
        ("(cut)", "cut"),
    ],
)
def test_canonical_text(given_: str, canonical: str) -> None:
    assert text.render(text.parse(given_)) == canonical
    assert text.render(text.parse(canonical)) == canonical


@given(
    count=st.integers(0, 7),
    side=st.sampled_from(["last", "first"]),
    factor=st.floats(1e-300, 1e300, allow_nan=False),
)
def test_what_is_rendered_parses_to_the_same(count: int, side: str, factor: float) -> None:
    passes = [Cut(count=count, side=side), Balance(factor=factor)]  # type: ignore[arg-type]
    # no fixture runs around hypothesis' examples
    find, registry.find_pass = registry.find_pass, {"cut": Cut, "balance": Balance}.__getitem__  # type: ignore[assignment]
    try:
        assert text.parse(text.render(passes)) == passes
    finally:
        registry.find_pass = find


def shown(given_: str) -> list[str]:
    """The lines of the error that ``given_`` gives."""
    with pytest.raises(OptionError) as caught:
        text.parse(given_)
    return str(caught.value).splitlines()


def test_an_unknown_pass() -> None:
    assert shown("cut, cleenup(), balance") == [
        "error[pass.unknown]: there is no pass 'cleenup'",
        "  at  cut, cleenup(), balance",
        "           ^",
        "  help: did you mean cleanup?",
    ]


def test_an_unknown_option() -> None:
    assert shown("cut(cuont=3)") == [
        "error[option.unknown]: cut has no option 'cuont'",
        "  at  cut(cuont=3)",
        "          ^",
        "  help: did you mean count?",
    ]
    assert shown("relu_to_max(x=1)")[-1] == "  help: relu_to_max takes no options"


def test_a_value_out_of_range_names_option_limits_and_value() -> None:
    assert shown("cut(side='last', count=8)") == [
        "error[option.value]: cut: count must be less than 8, got 8",
        "  at  cut(side='last', count=8)",
        "                       ^",
        "  help: count takes integer >= 0 and < 8: how many channels to remove",
    ]


def test_a_choice_shows_near_names() -> None:
    lines = shown("cut(side='lats')")
    assert lines[0] == "error[option.value]: cut: side must be 'last' or 'first', got 'lats'"
    assert "did you mean last?" in lines[-1] and "'last' | 'first'" in lines[-1]


def test_all_wrong_options_at_once() -> None:
    lines = shown("cut(count=-1, side=3, deep=True)")
    assert len([line for line in lines if line.startswith("error")]) == 3


@pytest.mark.parametrize("value", ["'3'", "3.5", "True", "None", "[3]"])
def test_types_are_taken_strictly(value: str) -> None:
    assert "count must be a valid integer" in shown(f"cut(count={value})")[0]


@pytest.mark.parametrize(
    ("given_", "says", "caret"),
    [
        ("cut(", "was never closed", 4),
        ("cut balance", "", 0),
        ("cut)", "unmatched ')'", 4),
        ("cut, *cut", "expected the name of a pass", 5),
        ("cut, 'balance'", "expected the name of a pass", 5),
        ("ir.cut", "expected the name of a pass", 0),
        ("cut(1)", "options of cut are given by name", 4),
        ("cut(**x)", "** has no meaning here", 4),
        ("cut(count=n)", "the value of count is no literal", 10),
        ("cut(count=1+1)", "the value of count is no literal", 10),
        ("cut(count=1, count=2)", "cut is given count twice", 13),
        ("count=1", "an option stands outside", 6),
        ("cut,\ncut(\n  count=9)", "must be less than 8", 2),
        ("cut(side='é', count=9)", "must be less than 8", 14),
    ],
)
def test_carets(given_: str, says: str, caret: int) -> None:
    lines = shown(given_)
    assert any(says in line for line in lines if line.startswith("error"))
    carets = [line for line in lines if line.strip() == "^"]
    assert " " * (6 + caret) + "^" in carets


@pytest.mark.parametrize("given_", ["cut), (cut", "cut)(cut", "cut) + (cut", "\0", "(" * 5000])
def test_nothing_else_is_taken_for_a_pipeline(given_: str) -> None:
    assert shown(given_)[0].startswith("error[pipeline.syntax]")


@pytest.mark.parametrize("value", ["{1, 2}", "b'x'", "1j", "..."])
def test_values_that_no_option_can_have(value: str) -> None:
    assert "options are numbers, strings" in shown(f"cut(count={value})")[0]


def test_a_plugin_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch)
    assert text.render(text.parse("polish(strokes=3), cut")) == "polish(strokes=3), cut"
    assert "strokes must be less than or equal to 9" in shown("polish(strokes=10)")[0]


@pytest.mark.parametrize("one_or_more", ["'ffn'", "('ffn',)", "['ffn']"])
def test_one_name_may_be_given_as_it_is(one_or_more: str) -> None:
    made = Prune(ratio=0.5, scope=("ffn",), ignore=("layers.0",))
    assert text.parse(f"prune(ratio=0.5, scope={one_or_more}, ignore='layers.0')") == [made]
    assert Prune(ratio=0.5, scope=ast.literal_eval(one_or_more), ignore="layers.0") == made  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    with pytest.raises(OptionError, match="did you mean ffn"):
        text.parse("prune(ratio=0.5, scope='fnn')")
    with pytest.raises(OptionError, match=r"scope\[1\] must be"):
        text.parse("prune(ratio=0.5, scope=('ffn', 3))")
