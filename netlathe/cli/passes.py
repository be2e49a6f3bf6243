"""``netlathe passes``: the passes, their options, and the schema of a recipe."""

from __future__ import annotations

import inspect
from typing import Any

import click
import pydantic

from netlathe.cli import options, render
from netlathe.pipeline import recipe, registry
from netlathe.pipeline.pass_ import Pass, summary


@click.command()
@click.argument("name", required=False)
@click.option("--schema", is_flag=True, help="Print the JSON schema of a recipe file.")
@options.as_json()
def passes(name: str | None, schema: bool, as_json: bool) -> None:
    """List the passes, or show the options of the pass NAME."""
    if schema:
        render.print_json(recipe.json_schema())
        return
    if name is not None:
        _show(registry.find_pass(name), as_json)
        return
    found = registry.passes()
    if as_json:
        render.print_json([_describe(pass_type) for pass_type in found.values()])
        return
    render.table(
        "",
        ("pass", "exactness", ""),
        ((n, type(p.exactness).__name__.lower(), summary(p)) for n, p in found.items()),
    )
    render.out.print("\n`netlathe passes NAME` shows a pass' options.")


def _options(pass_type: type[Pass]) -> list[dict[str, Any]]:
    """One row per option, from the schema that also checks recipes."""
    schema = pydantic.TypeAdapter(pass_type).json_schema()
    rows = []
    for option, spec in schema.get("properties", {}).items():
        limits = {
            word: spec[key]
            for key, word in (
                ("minimum", ">="),
                ("exclusiveMinimum", ">"),
                ("maximum", "<="),
                ("exclusiveMaximum", "<"),
            )
            if key in spec
        }
        choices = spec.get("enum") or [spec["const"]] if "const" in spec or "enum" in spec else []
        rows.append(
            {
                "option": option,
                "type": spec.get("type", "any"),
                "default": spec.get("default"),
                "choices": choices,
                "limits": " ".join(f"{word} {limit}" for word, limit in limits.items()),
                "help": spec.get("description", ""),
            }
        )
    return rows


def _describe(pass_type: type[Pass]) -> dict[str, Any]:
    return {
        "name": pass_type.name,
        "version": pass_type.version,
        "exactness": type(pass_type.exactness).__name__.lower(),
        "summary": summary(pass_type),
        "options": _options(pass_type),
    }


def _show(pass_type: type[Pass], as_json: bool) -> None:
    if as_json:
        render.print_json(_describe(pass_type))
        return
    render.out.print(f"[bold]{pass_type.name}[/bold]  {type(pass_type.exactness).__name__.lower()}")
    render.out.print(inspect.getdoc(pass_type) or "", markup=False)
    render.table(
        "",
        ("option", "default", "takes", ""),
        (
            (
                row["option"],
                repr(row["default"]),
                " | ".join(map(repr, row["choices"])) or f"{row['type']} {row['limits']}".strip(),
                row["help"],
            )
            for row in _options(pass_type)
        ),
    )
