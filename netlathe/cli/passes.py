"""``netlathe passes``: the passes, their options, and the schema of a recipe."""

from __future__ import annotations

from inspect import getdoc
from typing import TYPE_CHECKING, Any

import click

from netlathe.cli import options, render

if TYPE_CHECKING:
    from netlathe.pipeline.pass_ import Pass


@click.command()
@click.argument("name", required=False)
@click.option("--schema", is_flag=True, help="Print the JSON schema of a recipe file.")
@options.as_json()
def passes(name: str | None, schema: bool, as_json: bool) -> None:
    """List the passes, or the options of one.

    \b
    netlathe passes
    netlathe passes quantize
    netlathe passes --schema > recipe.schema.json
    """
    from netlathe.pipeline import recipe, registry
    from netlathe.pipeline.pass_ import summary

    if schema:
        render.print_json(recipe.json_schema())
    elif name is not None:
        found = registry.find_pass(name)
        if as_json:
            render.print_json(_describe(found))
        else:
            _show(found)
    elif as_json:
        render.print_json([_describe(pass_type) for pass_type in registry.passes().values()])
    else:
        render.table(
            "",
            ("pass", "exactness", ""),
            ((n, _exactness(p), summary(p)) for n, p in registry.passes().items()),
        )
        render.line("\n`netlathe passes NAME` shows a pass' options.")


def _exactness(pass_type: type[Pass]) -> str:
    return type(pass_type.exactness).__name__.lower()


def _options(pass_type: type[Pass]) -> list[dict[str, Any]]:
    """One row per option, from the schema that also checks recipes."""
    from netlathe.pipeline.validation import option_schemas, takes

    return [
        {
            "option": name,
            "takes": takes(spec),
            "required": "default" not in spec,
            "default": spec.get("default"),
            "help": spec.get("description", ""),
        }
        for name, spec in option_schemas(pass_type).items()
    ]


def _describe(pass_type: type[Pass]) -> dict[str, Any]:
    from netlathe.pipeline.pass_ import summary

    return {
        "name": pass_type.name,
        "version": pass_type.version,
        "exactness": _exactness(pass_type),
        "summary": summary(pass_type),
        "options": _options(pass_type),
    }


def _show(pass_type: type[Pass]) -> None:
    render.line(f"{pass_type.name}  ({_exactness(pass_type)})")
    render.line(getdoc(pass_type) or "")
    rows = _options(pass_type)
    if not rows:
        render.line("\nIt takes no options.")
        return
    render.line()
    render.table(
        "",
        ("option", "default", "takes", ""),
        (
            (
                row["option"],
                "(required)" if row["required"] else repr(row["default"]),
                row["takes"],
                row["help"],
            )
            for row in rows
        ),
    )
