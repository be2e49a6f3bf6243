"""Arguments and options that several commands share, so that they read and behave the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from netlathe.diagnostics import Diagnostic, OptionError

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def model(name: str = "model") -> Decorator:
    """MODEL: an ONNX file or a local Hugging Face directory."""
    return click.argument(name, metavar=name.upper(), type=click.Path(path_type=Path))


def passes() -> Decorator:
    """--passes or --recipe, of which exactly one must be given."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        function = click.option(
            "--recipe",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="A YAML recipe; `netlathe passes --schema` prints its JSON schema.",
        )(function)
        return click.option(
            "--passes",
            metavar="TEXT",
            help="What to run, in order, such as \"cleanup, drop(kind='ffn', count=1)\".",
        )(function)

    return add


def calibration() -> Decorator:
    """--calibration: real data for the passes that measure."""
    return click.option(
        "--calibration",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Data for passes that measure: .npz (an array per graph input) or .txt (a text a line).",
    )


def seed() -> Decorator:
    """--seed: the one source of randomness."""
    return click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)


def cache() -> Decorator:
    """--kv-cache: capture a causal language model with its cache."""
    return click.option(
        "--kv-cache", is_flag=True, help="Capture a causal language model with its KV cache."
    )


def as_json() -> Decorator:
    """--json: the same content for a script."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")


def sizes() -> Decorator:
    """--dims: sizes for the dynamic dimensions."""
    return click.option(
        "--dims",
        metavar="NAME=SIZE,...",
        callback=_parse_sizes,
        help="Sizes of dynamic dimensions, such as batch=1,sequence=128.",
    )


def _parse_sizes(
    ctx: click.Context, parameter: click.Parameter, text: str | None
) -> dict[str, int]:
    given: dict[str, int] = {}
    for part in (text or "").split(","):
        if not part.strip():
            continue
        name, _, size = part.partition("=")
        if not size.strip().isdigit() or int(size) < 1:
            raise OptionError(
                Diagnostic(
                    "cli.dims",
                    f"--dims takes NAME=SIZE with a positive size, got {part.strip()!r}",
                    help="for example --dims batch=1,sequence=128",
                )
            )
        given[name.strip()] = int(size)
    return given
