"""A distribution that exists on sys.path only: what a plugin looks like once it is installed."""

from __future__ import annotations

from pathlib import Path

import pytest

MODULE = '''
from netlathe import Exact, Pass, Result, option, options


@options
class Polish(Pass):
    """Does nothing, carefully."""

    name = "polish"
    version = 3
    exactness = Exact()
    strokes: int = option(default=1, ge=1, le=9, help="how often")
    tool: str = option(default="cloth", help="what with")

    def run(self, model, ctx):
        return Result(False)
'''


def install(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str = "shiny",
    entries: str = "[netlathe.passes]\npolish = {module}:Polish\n",
    source: str = MODULE,
    requires: str = "",
) -> str:
    """Put the distribution ``name`` with one module on sys.path; the module's name."""
    module = f"{name}_module"
    home = folder / name
    info = home / f"{name}-1.5.dist-info"
    info.mkdir(parents=True)
    (home / f"{module}.py").write_text(source)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n{requires}")
    (info / "entry_points.txt").write_text(entries.format(module=module))
    monkeypatch.syspath_prepend(str(home))
    return module
