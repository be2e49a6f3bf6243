"""What is installed, by name: passes, frontends, backends and targets, ours and those of plugins.

All come from entry points in the groups ``netlathe.passes``, ``netlathe.frontends`` and
``netlathe.backends``; nothing registers itself by being imported. Listings leave out what lacks an
optional dependency; asking for it says which extra to install. Anything else that is wrong with an
entry point is an error that names the distribution it came from.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Generic, TypeVar

from netlathe.diagnostics import (
    Diagnostic,
    InputError,
    MissingExtraError,
    OptionError,
    did_you_mean,
)
from netlathe.pipeline.interfaces import Backend, Frontend, Target
from netlathe.pipeline.pass_ import Pass

T = TypeVar("T")

# "transformers>=5.0; extra == 'hf'": the module's distribution and the extra that brings it.
_REQUIREMENT = re.compile(r"\s*(?P<name>[\w.-]+).*;.*extra\s*==\s*['\"](?P<extra>[^'\"]+)['\"]")


def passes() -> dict[str, type[Pass]]:
    """Every pass by name, sorted.

    Raises:
        OptionError: two distributions offer the same name, or an entry point is broken.
    """
    return _PASSES.load_all()


def pass_names() -> list[str]:
    """The names of all passes, without importing any."""
    return sorted(_PASSES.entries())


def find_pass(name: str) -> type[Pass]:
    """The pass called ``name``.

    Raises:
        OptionError: there is none, there are two, or it is broken.
        MissingExtraError: it needs an extra that is not installed.
    """
    return _PASSES.find(name)


def distribution_of(pass_: Pass) -> str:
    """Name and version of the distribution that ``pass_`` comes from; its module where none does."""
    for entry in metadata.entry_points(group=_PASSES.name):
        home = f"{type(pass_).__module__}:{type(pass_).__qualname__}"
        if f"{entry.module}:{entry.attr}" == home and entry.dist is not None:
            return f"{entry.dist.name} {entry.dist.version}"
    return type(pass_).__module__


def frontends() -> dict[str, type[Frontend]]:
    """Every frontend by name, sorted; see :func:`passes`."""
    return _FRONTENDS.load_all()


def find_frontend(source: Any) -> type[Frontend]:
    """The frontend that takes ``source``.

    Raises:
        InputError: no frontend takes it.
        MissingExtraError: one might, but lacks its extra.
        OptionError: an entry point is broken.
    """
    lacking: dict[str, _Lack] = {}
    for name, frontend in _FRONTENDS.load_lightest_first():
        if isinstance(frontend, _Lack):
            lacking[name] = frontend
        elif frontend.accepts(source):
            return frontend
    shown = (
        str(source)
        if isinstance(source, str | Path)
        else f"an object of type {type(source).__name__}"
    )
    if lacking:
        raise MissingExtraError(
            Diagnostic(
                "extra.missing",
                f"no installed frontend takes {shown}; "
                + "; ".join(f"{name} needs {lack.says}" for name, lack in lacking.items()),
                help=" or ".join(dict.fromkeys(lack.install for lack in lacking.values())),
            )
        )
    raise InputError(
        Diagnostic(
            "frontend.none",
            f"no frontend takes {shown}",
            help=f"there are {', '.join(_FRONTENDS.entries())}: give an ONNX file, a .pt2 file,"
            " a local Hugging Face directory, an nn.Module, a torch.fx.GraphModule or an ExportedProgram",
        )
    )


def backends() -> dict[str, type[Backend]]:
    """Every backend by name, sorted; see :func:`passes`."""
    return _BACKENDS.load_all()


def targets() -> list[Target]:
    """Every target of every backend, by name."""
    return sorted(
        (target for backend in backends().values() for target in backend.targets()),
        key=lambda target: target.name,
    )


def find_target(name: str, **settings: Any) -> tuple[Backend, Target]:
    """The target called ``name`` with ``settings`` over its defaults, and the backend for it.

    Raises:
        OptionError: there is no such target, or it has no such setting, or one is out of range.
        MissingExtraError: its backend lacks its extra.
    """
    backend, target = _find_target(name)
    if unknown := sorted(set(settings) - set(target.settings)):
        taken = sorted(target.settings)
        raise OptionError(
            Diagnostic(
                "target.setting",
                f"target {name} has no setting {', '.join(unknown)}",
                help=did_you_mean(unknown[0], taken) if taken else f"{name} takes no settings",
            )
        )
    made, target = backend(), dataclasses.replace(target, settings={**target.settings, **settings})
    made.check(target)
    return made, target


def _find_target(name: str) -> tuple[type[Backend], Target]:
    if name in _BACKENDS.entries():  # a backend's main target has its name: no other is imported
        backend = _BACKENDS.find(name)
        for target in backend.targets():
            if target.name == name:
                return backend, target
    loaded, lacking = _BACKENDS.load()
    offers = [(backend, target) for backend in loaded.values() for target in backend.targets()]
    found = [(backend, target) for backend, target in offers if target.name == name]
    if len(found) > 1:
        names = " and ".join(sorted(backend.name for backend, _ in found))
        message = f"more than one backend has a target {name!r}: {names}"
        raise OptionError(Diagnostic("target.duplicate", message))
    if not found:
        absent = [f"{n} needs {lack.says}" for n, lack in lacking.items()]
        raise OptionError(
            Diagnostic(
                "target.unknown",
                f"there is no target {name!r}",
                notes=(f"backends that are not installed: {', '.join(absent)}",) if absent else (),
                help=did_you_mean(name, sorted(target.name for _, target in offers)),
            )
        )
    return found[0]


# -- entry points ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Lack:
    """An optional dependency that an entry point misses."""

    distribution: str
    extra: str
    module: str

    @property
    def says(self) -> str:
        return f"the {self.extra!r} extra of {self.distribution} ({self.module} is not installed)"

    @property
    def install(self) -> str:
        return f"pip install '{self.distribution}[{self.extra}]'"

    def error(self, purpose: str) -> MissingExtraError:
        message = f"{purpose} needs {self.says}"
        return MissingExtraError(Diagnostic("extra.missing", message, help=self.install))


class _Lacking(Exception):
    """Raised while an entry point is loaded; never leaves this module."""

    def __init__(self, lack: _Lack) -> None:
        super().__init__(lack.says)
        self.lack = lack


@dataclass(frozen=True)
class _Group(Generic[T]):
    """The entry points of one group, each of which must give a subclass of ``base``."""

    kind: str
    name: str
    base: type[T]

    def entries(self) -> dict[str, metadata.EntryPoint]:
        """Entry points by name, sorted; none is imported."""
        found: dict[str, metadata.EntryPoint] = {}
        for entry in metadata.entry_points(group=self.name):
            first = found.setdefault(entry.name, entry)
            if first is not entry and first != entry:
                one, two = sorted((_distribution(first), _distribution(entry)))
                raise OptionError(
                    Diagnostic(
                        f"{self.kind}.duplicate",
                        f"the {self.kind} {entry.name!r} comes from two distributions:"
                        f" {one} and {two}",
                        help=f"uninstall one of them: pip uninstall {two}",
                    )
                )
        return dict(sorted(found.items()))

    def find(self, name: str) -> type[T]:
        entries = self.entries()
        if name not in entries:
            raise OptionError(
                Diagnostic(
                    f"{self.kind}.unknown",
                    f"there is no {self.kind} {name!r}",
                    help=did_you_mean(name, list(entries)),
                )
            )
        try:
            return self._import(entries[name])
        except _Lacking as lacking:
            raise lacking.lack.error(f"the {self.kind} {name!r}") from lacking

    def load(self) -> tuple[dict[str, type[T]], dict[str, _Lack]]:
        """What can be imported, and what lacks an optional dependency."""
        offers = sorted(self.load_lightest_first(), key=lambda offer: offer[0])
        return (
            {name: found for name, found in offers if not isinstance(found, _Lack)},
            {name: found for name, found in offers if isinstance(found, _Lack)},
        )

    def load_lightest_first(self) -> Iterator[tuple[str, type[T] | _Lack]]:
        """One after the other, those that need no extra first: they are imported in no time."""
        for name, entry in sorted(self.entries().items(), key=lambda e: (bool(e[1].extras), e[0])):
            try:
                yield name, self._import(entry)
            except _Lacking as error:
                yield name, error.lack

    def load_all(self) -> dict[str, type[T]]:
        return self.load()[0]

    def _import(self, entry: metadata.EntryPoint) -> type[T]:
        try:
            found = entry.load()
        except ModuleNotFoundError as error:
            if lack := _lack(entry, error.name or ""):
                raise _Lacking(lack) from error
            raise self._broken(entry, f"{type(error).__name__}: {error}") from error
        except Exception as error:  # the module is another project's: anything may happen in it
            raise self._broken(entry, f"{type(error).__name__}: {error}") from error
        if not (isinstance(found, type) and issubclass(found, self.base)):
            raise self._broken(entry, f"{entry.value} is no {self.base.__name__}")
        own = getattr(found, "name", None)
        if own != entry.name:
            raise self._broken(entry, f"{entry.value} calls itself {own!r}")
        if not entry.name.isidentifier():  # it could not be written in a pipeline's text
            raise self._broken(entry, f"{entry.name!r} is no Python identifier")
        return found

    def _broken(self, entry: metadata.EntryPoint, why: str) -> OptionError:
        return OptionError(
            Diagnostic(
                f"{self.kind}.broken",
                f"the {self.kind} {entry.name!r} of {_distribution(entry)} cannot be loaded: {why}",
                at=f"{entry.name} = {entry.value}",
                help=f"repair or uninstall {_distribution(entry)}",
            )
        )


_PASSES = _Group[Pass]("pass", "netlathe.passes", Pass)  # type: ignore[type-abstract]  # compared with, not made
_FRONTENDS = _Group[Frontend]("frontend", "netlathe.frontends", Frontend)  # type: ignore[type-abstract]
_BACKENDS = _Group[Backend]("backend", "netlathe.backends", Backend)  # type: ignore[type-abstract]


def _distribution(entry: metadata.EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else "(no distribution)"


def _lack(entry: metadata.EntryPoint, module: str) -> _Lack | None:
    """The extra that would bring ``module``: the entry point's own, or the one that requires it."""
    root = module.partition(".")[0]
    if entry.dist is None:
        return None
    requirements = list(_extra_requirements(entry.dist.requires or ()))
    for name, extra in requirements:  # an extra may be made of others: netlathe[torch]
        if _canonical(name) == _canonical(root) != _canonical(entry.dist.name):
            return _Lack(entry.dist.name, next(iter(entry.extras), extra), root)
    return None


def _extra_requirements(requirements: Iterable[str]) -> Iterator[tuple[str, str]]:
    for text in requirements:
        if match := _REQUIREMENT.match(text):
            yield match["name"], match["extra"]


def _canonical(name: str) -> str:
    """The name of a distribution as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()
