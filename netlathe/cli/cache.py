"""``netlathe cache``: what finished work takes, and giving it back."""

from __future__ import annotations

from pathlib import Path

import click

from netlathe.cli import options, render
from netlathe.cli.request import open_cache
from netlathe.diagnostics import Diagnostic, InputError

_KINDS = {
    "capture": "captured models",
    "step": "passes",
    "piece": "pieces of passes",
    "artifact": "artifacts",
}


@click.command()
@click.option("--cache", type=click.Path(path_type=Path), metavar="DIR", help="Another folder.")
@click.option("--clear", is_flag=True, help="Remove everything that no run is using.")
@click.option(
    "--limit",
    metavar="SIZE",
    help="Keep no more than SIZE, such as 50G, from now on; what was used longest ago goes.",
)
@options.as_json()
def cache(cache: Path | None, clear: bool, limit: str | None, as_json: bool) -> None:
    """Show, bound or clear the cache of finished work.

    compile and plan keep there what passes made and solved, and find it again by what it was made from:
    model, passes and their code, calibration data, seed, target, versions. It is safe to remove at any
    time, to share between runs and to be killed in.

    \b
    netlathe cache
    netlathe cache --limit 50G
    netlathe cache --clear
    """
    from netlathe.pipeline.cache import parse_size, show

    wanted = None if limit is None else parse_size(limit)
    # A limit may come before the first run, which makes the folder, too.
    if cache is not None and wanted is None and not cache.is_dir():
        raise InputError(Diagnostic("cache.missing", "there is no such folder", at=str(cache)))
    opened = open_cache(cache, none=False)
    assert opened is not None
    if wanted is not None:
        opened.set_limit(wanted)
    removed, left = opened.clear() if clear else (0, 0)
    held = opened.held()
    kinds = {
        kind: {
            "entries": sum(entry.kind == kind for entry in held),
            "bytes": sum(entry.size for entry in held if entry.kind == kind),
        }
        for kind in _KINDS
    }
    total = sum(entry.size for entry in held)
    if as_json:
        render.print_json(
            {"folder": opened.folder, "limit": opened.limit, "bytes": total, "kinds": kinds}
        )
        return
    if clear:
        used = f"; {left} are in use" if left else ""
        render.line(f"removed {removed} entries{used}")
    render.line(f"{opened.folder}: {show(total)} of at most {show(opened.limit)}")
    rows = ((_KINDS[k], n["entries"], show(n["bytes"])) for k, n in kinds.items() if n["entries"])
    render.table("", ("", "#entries", "#size"), rows)
