"""A pipeline as text, in Python call syntax, and back: ``cleanup, drop(kind="ffn", count=1)``.

``render(parse(text))`` is the canonical form, which the manifest holds and `parse` takes again.
Values are Python literals, checked as strictly as in a recipe: ``count="1"`` is no integer.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from netlathe.diagnostics import Diagnostic, OptionError
from netlathe.pipeline import registry
from netlathe.pipeline.pass_ import Pass
from netlathe.pipeline.validation import make

# The text becomes the arguments of a call, so that it may span lines and Python's own parser tells
# where one pass ends; the first line of the call is then left out of every position.
_CALL = "_(\n{}\n)"
_EXAMPLE = 'for example: cleanup, drop(kind="ffn", count=1)'


def parse(text: str, find: Callable[[str], type[Pass]] | None = None) -> list[Pass]:
    """The passes that ``text`` names, in order, with their options.

    ``find`` looks a pass up by name; by default among those that are installed.

    Raises:
        OptionError: the text is no such list, a pass or option is unknown, or a value is out of
            range; the place is marked.
        MissingExtraError: a pass needs an extra that is not installed.
    """
    return [_pass(item, text, find or registry.find_pass) for item in _items(text)]


def render(passes: Iterable[Pass]) -> str:
    """The canonical text of ``passes``: options in order of declaration, defaults left out."""
    return ", ".join(str(pass_) for pass_ in passes)


def _items(text: str) -> list[ast.expr]:
    try:
        call = ast.parse(_CALL.format(text), mode="eval").body
    except SyntaxError as error:
        line, column = (error.lineno or 2) - 1, max((error.offset or 1) - 1, 0)
        raise _error("pipeline.syntax", error.msg, text, (line, column), _EXAMPLE) from error
    except (ValueError, RecursionError, MemoryError) as error:  # null bytes; nested too deeply
        raise _error("pipeline.syntax", str(error) or "too deep", text, None, _EXAMPLE) from error
    # With a parenthesis too many the text closes our call, and what is left is none.
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        raise _error("pipeline.syntax", "parentheses do not match", text, None, _EXAMPLE)
    if call.keywords:
        value = call.keywords[0].value
        message = "an option stands outside the parentheses of its pass"
        raise _error("pipeline.syntax", message, text, _place(value), _EXAMPLE)
    return call.args


def _pass(item: ast.expr, text: str, find: Callable[[str], type[Pass]]) -> Pass:
    call = item if isinstance(item, ast.Call) else ast.Call(item, [], [])
    name = call.func
    if not isinstance(name, ast.Name):
        message = "expected the name of a pass, with or without options"
        raise _error("pipeline.syntax", message, text, _place(item), _EXAMPLE)
    try:
        pass_type = find(name.id)
    except OptionError as error:
        raise _marked(error, text, _place(name)) from error
    if call.args:
        message = f"options of {name.id} are given by name"
        raise _error("pipeline.syntax", message, text, _place(call.args[0]), _EXAMPLE)
    values, places = _options(call, name.id, text)
    return make(pass_type, values, lambda option: _show(text, places.get(option, _place(name))))


def _options(
    call: ast.Call, name: str, text: str
) -> tuple[dict[str, Any], Mapping[str, tuple[int, int]]]:
    """The options by name, and the place of each."""
    values: dict[str, Any] = {}
    places: dict[str, tuple[int, int]] = {}
    for keyword in call.keywords:
        place = _place(keyword)
        if keyword.arg is None:
            raise _error("pipeline.syntax", "** has no meaning here", text, place, _EXAMPLE)
        if keyword.arg in values:
            message = f"{name} is given {keyword.arg} twice"
            raise _error("option.repeated", message, text, place)
        try:
            values[keyword.arg] = ast.literal_eval(keyword.value)
        except (ValueError, TypeError) as error:
            message = f"the value of {keyword.arg} is no literal"
            help_ = "numbers, quoted strings, True, False, None, and lists or tuples of these"
            place = _place(keyword.value)
            raise _error("pipeline.literal", message, text, place, help_) from error
        places[keyword.arg] = place
    return values, places


# -- places in the text ---------------------------------------------------------------------------


def _place(thing: ast.expr | ast.keyword) -> tuple[int, int]:
    """Line, counted from 1, and column in bytes, counted from 0."""
    return thing.lineno - 1, thing.col_offset


def _show(text: str, place: tuple[int, int] | None) -> str:
    """The line of the text that holds ``place``, with a caret under it."""
    lines = text.splitlines() or [""]
    if place is None:
        return text.strip()
    number, column = place
    if not 1 <= number <= len(lines):  # something is missing, which Python noticed at the end
        number, column = len(lines), len(lines[-1].encode())
    line = lines[number - 1]
    before = line.encode()[:column].decode(errors="replace")
    return f"{line}\n{' ' * len(before)}^"


def _error(
    code: str, message: str, text: str, place: tuple[int, int] | None, help_: str = ""
) -> OptionError:
    return OptionError(Diagnostic(code, message, at=_show(text, place), help=help_))


def _marked(error: OptionError, text: str, place: tuple[int, int]) -> OptionError:
    return OptionError(
        dataclasses.replace(d, at=d.at or _show(text, place)) for d in error.diagnostics
    )
