"""Whether a plug-in is found by its name once its distribution is installed."""

from __future__ import annotations

from importlib import metadata

from netlathe.diagnostics import Diagnostic
from netlathe.pipeline.interfaces import Backend, Frontend
from netlathe.pipeline.pass_ import Pass
from netlathe.testing.laws import ConformanceError, raised

Plugin = type[Pass] | type[Frontend] | type[Backend]
_GROUPS = (
    (Pass, "netlathe.passes"),
    (Frontend, "netlathe.frontends"),
    (Backend, "netlathe.backends"),
)


def check_entry_point(plugin: Plugin) -> None:
    """Return if one entry point leads to ``plugin``, by its own name.

    Raises:
        ConformanceError: none does, or there is another of that name, or it cannot be loaded.
    """
    group = next(name for base, name in _GROUPS if issubclass(plugin, base))
    home = f"{plugin.__module__}:{plugin.__qualname__}"
    found = {  # an editable install may be listed twice
        (entry.dist.name if entry.dist is not None else "", entry.value): entry
        for entry in metadata.entry_points(group=group, name=plugin.name)
    }
    if wrong := _problem(plugin, group, home, list(found.values())):
        raise ConformanceError(
            Diagnostic(
                "conformance.entry_point",
                wrong,
                at=f'[project.entry-points."{group}"]\n{plugin.name} = "{home}"',
                help="put these lines into pyproject.toml, and install the distribution again",
            )
        )


def _problem(plugin: Plugin, group: str, home: str, found: list[metadata.EntryPoint]) -> str:
    if not found:
        return f"no entry point of the group {group} is called {plugin.name!r}"
    if len(found) > 1:
        names = " and ".join(str(entry.dist and entry.dist.name) for entry in found)
        return f"{plugin.name!r} in the group {group} comes from {names}"
    try:
        loaded = found[0].load()
    except Exception as error:  # importing another's module: anything may happen in it
        return f"{found[0].value} cannot be loaded: it {raised(error).message}"
    return (
        "" if loaded is plugin else f"{plugin.name!r} leads to {found[0].value} and not to {home}"
    )
