"""Passes made from options that a user wrote, and errors that say what each option takes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import pydantic

from netlathe.diagnostics import Diagnostic, OptionError, did_you_mean

if TYPE_CHECKING:
    from netlathe.pipeline.pass_ import Pass

P = TypeVar("P", bound="Pass")
Place = Callable[[str], str]  # option -> what a diagnostic shows as the place it was given at

_SUBJECTS = ("Input ", "Value error, ", "Assertion failed, ")  # how pydantic's messages begin
_LIMITS = {
    "minimum": ">=",
    "exclusiveMinimum": ">",
    "maximum": "<=",
    "exclusiveMaximum": "<",
}


def make(pass_type: type[P], values: Mapping[str, Any], place: Place) -> P:
    """``pass_type`` with these options, taken as JSON data is: lists for tuples, but no "1" for 1.

    Raises:
        OptionError: with every unknown, missing or impossible option.
    """
    try:
        text = json.dumps(dict(values))
    except (TypeError, ValueError) as error:
        what = "numbers, strings, True, False, None, lists and dicts of these"
        message = f"{pass_type.name}: options are {what} ({error})"
        raise OptionError(Diagnostic("option.value", message, at=place(""))) from error
    try:
        return pydantic.TypeAdapter(pass_type).validate_json(text, strict=True)
    except pydantic.ValidationError as error:
        raise OptionError(explain(pass_type, error, place)) from error


def explain(
    pass_type: type[Pass], error: pydantic.ValidationError, place: Place = lambda option: ""
) -> list[Diagnostic]:
    """What pydantic found, in terms of the pass' options."""
    specs = option_schemas(pass_type)
    found = error.errors(include_url=False)
    return [_explain(pass_type.name, specs, one, place) for one in _distinct(found)]


def option_schemas(pass_type: type[Pass]) -> dict[str, dict[str, Any]]:
    """The JSON schema of every option, by name."""
    schema = pydantic.TypeAdapter(pass_type).json_schema()
    found: dict[str, dict[str, Any]] = schema.get("properties", {})
    return found


def takes(spec: Mapping[str, Any]) -> str:
    """What an option takes: ``'attention' | 'ffn'``, ``integer >= 0``, ``one or several of string``."""
    if (several := _several(spec)) is not None:
        return f"one or several of {takes(several)}"
    if "anyOf" in spec:
        return " | ".join(takes(choice) for choice in spec["anyOf"])
    if "enum" in spec:
        return " | ".join(repr(choice) for choice in spec["enum"])
    if "const" in spec:
        return repr(spec["const"])
    text = str(spec.get("type", "any"))
    if "items" in spec:
        text += f" of {takes(spec['items'])}"
    limits = [f"{sign} {spec[key]}" for key, sign in _LIMITS.items() if key in spec]
    return f"{text} {' and '.join(limits)}".rstrip()


def _several(spec: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What an option takes one of, or an array."""
    choices = spec.get("anyOf", ())
    items = [choice["items"] for choice in choices if "items" in choice]
    return next((one for one in items if one in choices and len(choices) == 2), None)


def _distinct(errors: list[Any]) -> Iterator[Any]:
    """The first error of each option: a union gives one per member."""
    seen = set()
    for error in errors:
        option = error["loc"][:1]
        if option not in seen or not option:
            seen.add(option)
            yield error


def _explain(
    name: str, specs: Mapping[str, Mapping[str, Any]], error: Mapping[str, Any], place: Place
) -> Diagnostic:
    first, *inner = error["loc"] or ("",)
    option = str(first)
    if error["type"] == "unexpected_keyword_argument":
        message = f"{name} has no option {option!r}"
        help_ = did_you_mean(option, list(specs)) if specs else f"{name} takes no options"
        return Diagnostic("option.unknown", message, at=place(option), help=help_)
    spec = specs.get(option, {})
    help_ = f"{option} takes {takes(spec)}: {spec.get('description', '')}" if spec else ""
    if error["type"] == "missing":
        message = f"{name} needs the option {option!r}"
        return Diagnostic("option.missing", message, at=place(option), help=help_)
    says = error["msg"]
    for subject in _SUBJECTS:
        says = says.removeprefix(subject)
    says = says.replace("should be", "must be", 1)
    given = error["input"]
    if not option:  # the options contradict each other
        return Diagnostic("option.value", f"{name}: {says}", at=place(option))
    choices = (_several(spec) or spec).get("enum")
    if isinstance(given, str) and choices:
        help_ = f"{did_you_mean(given, choices)} ({help_})"
    element = "".join(f"[{i}]" for i in inner if isinstance(i, int))
    message = f"{name}: {option}{element} {says}, got {given!r}"
    return Diagnostic("option.value", message, at=place(option), help=help_)
