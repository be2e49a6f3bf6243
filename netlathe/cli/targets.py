"""``netlathe targets``: what can be built for."""

from __future__ import annotations

import click

from netlathe.cli import options, render
from netlathe.pipeline import registry


@click.command()
@options.as_json()
def targets(as_json: bool) -> None:
    """List the targets that --target takes, ours and those of installed plugins."""
    found = [target for backend in registry.backends().values() for target in backend.targets()]
    if as_json:
        render.print_json([{"name": t.name, "backend": t.backend, "help": t.help} for t in found])
        return
    render.table("", ("target", "backend", ""), ((t.name, t.backend, t.help) for t in found))
