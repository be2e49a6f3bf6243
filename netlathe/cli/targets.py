"""``netlathe targets``: what can be built for."""

from __future__ import annotations

import click

from netlathe.cli import options, render


@click.command()
@options.as_json()
def targets(as_json: bool) -> None:
    """List what can be built for.

    These are the names that --target takes, ours and those of installed plugins. Where a target needs
    an extra or a compiler that is not installed, compile says which, before it does any work.
    """
    from netlathe.pipeline import registry

    found = registry.targets()
    if as_json:
        rows = [
            {"name": t.name, "backend": t.backend, "help": t.help, "settings": t.settings}
            for t in found
        ]
        render.print_json(rows)
        return
    render.table(
        "",
        ("target", "backend", "settings", ""),
        (
            (t.name, t.backend, ", ".join(f"{k}={v}" for k, v in t.settings.items()), t.help)
            for t in found
        ),
    )
