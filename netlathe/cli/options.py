"""Arguments and options that several commands share, so that they read and behave the same."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from netlathe.diagnostics import Diagnostic, OptionError

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
_PATH = click.Path(path_type=Path)


def model(name: str = "model") -> Decorator:
    """MODEL: an ONNX or .pt2 file, a local Hugging Face directory, or a folder that `compile` wrote."""
    return click.argument(name, metavar=name.upper(), type=_PATH)


def pipeline() -> Decorator:
    """What to run and with what: --passes or --recipe, --calibration, --seed, --strict, --target."""
    return _together(
        click.option(
            "--passes",
            metavar="TEXT",
            help="What to run, in order, such as \"cleanup, drop(kind='ffn', count=1)\".",
        ),
        click.option(
            "--recipe",
            type=_PATH,
            metavar="FILE",
            help="The same as a YAML file; `netlathe passes --schema` prints its JSON schema."
            " Options given here win over what it says.",
        ),
        click.option(
            "--calibration",
            type=_PATH,
            metavar="FILE",
            help="Data for passes that measure: .npz (an array per graph input) or .txt (a text a"
            " line).",
        ),
        click.option(
            "--seed",
            type=click.IntRange(min=0),
            metavar="N",
            help="The one source of randomness.  [default: 0]",
        ),
        click.option(
            "--strict",
            is_flag=True,
            help="Fail (exit code 1) when a pass skips a candidate or has none.",
        ),
        click.option(
            "--target",
            metavar="NAME",
            help="What to build for; `netlathe targets` lists them.  [default: onnx]",
        ),
        click.option(
            "--opset", type=int, metavar="N", help="ONNX opset to write, 17 to 25.  [default: 24]"
        ),
        click.option(
            "--set",
            "settings",
            multiple=True,
            metavar="NAME=VALUE",
            callback=_parse_settings,
            help="A setting of the target, such as features=avx2; `netlathe targets` shows them.",
        ),
    )


def cache() -> Decorator:
    """--kv-cache: capture a causal language model with its cache."""
    return click.option(
        "--kv-cache",
        is_flag=True,
        help="Capture a causal language model with its key-value cache as inputs and outputs.",
    )


def work() -> Decorator:
    """--cache, --no-cache: where finished work is kept."""
    return _together(
        click.option(
            "--cache",
            type=_PATH,
            metavar="DIR",
            help="Where finished work is kept and found again; `netlathe cache` shows it."
            "  [default: $NETLATHE_CACHE, else the user's cache folder]",
        ),
        click.option(
            "--no-cache", is_flag=True, help="Do everything anew, and keep nothing of it."
        ),
    )


@dataclass(frozen=True)
class Dims:
    """What is asked of dynamic dimensions: the sizes to work at, and those that are to have but one."""

    sizes: Mapping[str, int]
    fixed: Mapping[str, int]

    def of(self, names: Iterable[str]) -> Dims:
        """What is asked of the dims called ``names``."""
        there = set(names)
        sizes, fixed = (
            {name: size for name, size in asked.items() if name in there}
            for asked in (self.sizes, self.fixed)
        )
        return Dims(sizes, fixed)


def sizes() -> Decorator:
    """--dims, --fix-dims: sizes for the dynamic dimensions, which a command takes together."""
    both = _together(
        click.option(
            "--dims",
            metavar="NAME=SIZE,...",
            callback=_parse_sizes,
            help="Sizes of dynamic dimensions to work at, such as batch=1,sequence=128: an ONNX file is"
            " captured at them too, other models at their own.",
        ),
        click.option(
            "--fix-dims",
            metavar="NAME=SIZE,...",
            callback=_parse_sizes,
            help="Dynamic dimensions of an ONNX file that are to have this size only.",
        ),
    )

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def given(*, dims: dict[str, int], fix_dims: dict[str, int], **more: Any) -> Any:
            return function(dims=Dims(dims, fix_dims), **more)

        return both(given)

    return add


def as_json() -> Decorator:
    """--json: the same content for a script."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")


def _together(*decorators: Decorator) -> Decorator:
    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return add


def _parse_settings(
    ctx: click.Context, parameter: click.Parameter, texts: tuple[str, ...]
) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for text in texts:
        name, equals, value = (word.strip() for word in text.partition("="))
        if not name or not equals:
            raise OptionError(
                Diagnostic(
                    "cli.set",
                    f"--set takes NAME=VALUE, got {text!r}",
                    help="for example --set features=avx2",
                )
            )
        given[name] = int(value) if value.isascii() and value.isdigit() else value
    return given


def _parse_sizes(
    ctx: click.Context, parameter: click.Parameter, text: str | None
) -> dict[str, int]:
    given: dict[str, int] = {}
    for part in (text or "").split(","):
        if not part.strip():
            continue
        name, _, size = (word.strip() for word in part.partition("="))
        if not name or not (size.isascii() and size.isdigit()) or int(size) < 1:
            raise OptionError(
                Diagnostic(
                    "cli.dims",
                    f"{parameter.opts[0]} takes NAME=SIZE with a positive size, got {part.strip()!r}",
                    help=f"for example {parameter.opts[0]} batch=1,sequence=128",
                )
            )
        given[name] = int(size)
    return given
