"""What frontends deliver and what backends take: the two edges of the pipeline."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import onnx_ir as ir

from netlathe.diagnostics import Diagnostic
from netlathe.execute import samples
from netlathe.pipeline.ledger import Entry
from netlathe.pipeline.pass_ import Feeds


@dataclass
class Captured:
    """A model in the IR, with what is needed to run, calibrate, explain and ship it.

    ``model`` is typed, raised and in normal form. ``sample`` makes valid feeds for given dynamic sizes:
    ``sample({"batch": 2, "sequence": 16}, seed)``; ``dynamic`` names the dynamic dims with their
    default sizes. ``files`` travel unchanged into the artifact (tokenizer, generation config).
    ``tokenize`` turns texts into feeds where the source has a tokenizer.
    """

    model: ir.Model
    source: str  # what the user named, for messages and the manifest
    frontend: str
    dynamic: Mapping[str, int]
    sample: Callable[[Mapping[str, int], int], Feeds]
    entries: list[Entry] = field(default_factory=list)  # raises, switched implementations, ...
    files: Mapping[str, Path] = field(default_factory=dict)  # name in the artifact -> source file
    tokenize: Callable[[Sequence[str]], Feeds] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)  # JSON data for Frontend.recall


class Frontend(abc.ABC):
    """Brings one kind of model into the IR."""

    name: ClassVar[str]

    @classmethod
    @abc.abstractmethod
    def accepts(cls, source: Any) -> bool:
        """Whether ``source`` (a path or an object) looks like this frontend's kind of model."""

    @abc.abstractmethod
    def capture(self, source: Any) -> Captured:
        """Capture ``source``; frontend-specific settings are constructor arguments.

        Raises:
            InputError: the source cannot be read as what it claims to be.
            CaptureError: it was read, but the captured graph is not the same function.
        """

    def sources(self, source: Any) -> Mapping[str, Path] | None:
        """Every file that a capture of ``source`` depends on, by a name that does not tell its place.

        None where it depends on more than files: such a capture is not taken from a cache. Settings are
        the frontend's attributes; those that are no JSON data have the same effect.
        """
        return None

    def recall(
        self, source: Any, model: ir.Model, dynamic: Mapping[str, int], facts: Mapping[str, Any]
    ) -> Captured:
        """What :meth:`capture` gave for the same files, from the parts of it that can be written."""

        def sample(sizes: Mapping[str, int], seed: int) -> Feeds:
            return samples.synthesize(model, {**dynamic, **sizes}, seed)

        return Captured(model, str(source), self.name, dict(dynamic), sample, facts=facts)


@dataclass(frozen=True)
class Target:
    """What a backend builds for, as data: passes read widths, group sizes and dtypes from it."""

    name: str  # "onnx", "torch"
    backend: str
    help: str
    width_multiple: int = 1  # keep pruned widths a multiple of this
    dtypes: frozenset[ir.DataType] = frozenset()  # empty: every dtype of the IR
    settings: Mapping[str, Any] = field(default_factory=dict)  # backend-specific, e.g. opset


class Artifact(abc.ABC):
    """A compiled model in memory; ``sample`` may hold feeds for the checks that :meth:`save` makes."""

    sample: Feeds | None = None

    def stamp(self, manifest_digest: str) -> None:  # noqa: B027  # not every format has room for it
        """Record which manifest the artifact belongs to, where its format has room for that."""

    def report(self) -> dict[str, Any]:
        """What is worth knowing about the artifact, as JSON data; complete once it is saved."""
        return {}

    @abc.abstractmethod
    def run(self, feeds: Feeds) -> dict[str, Any]:
        """Run once; output name -> array."""

    @abc.abstractmethod
    def save(self, folder: Path) -> list[Path]:
        """Write into ``folder``, which exists and is empty, and return the files written."""


class Backend(abc.ABC):
    """Lowers the IR for a family of targets."""

    name: ClassVar[str]
    # No pass that keeps operators fills a gap, so that gaps are looked for before the first of such passes.
    gaps_last: ClassVar[bool] = False

    @classmethod
    @abc.abstractmethod
    def targets(cls) -> Sequence[Target]:
        """The targets this backend builds for."""

    def check(self, target: Target) -> None:  # noqa: B027  # most settings need no check
        """Return if every setting of ``target`` is within its range; no model is needed for that.

        Raises:
            OptionError: one is not.
        """

    def tools(self, target: Target) -> Mapping[str, str]:
        """Name -> version of what builds an artifact besides NetLathe and its base packages."""
        return {}

    @abc.abstractmethod
    def unsupported(self, model: ir.Model, target: Target) -> list[Diagnostic]:
        """Every gap between ``model`` and ``target``, before any work starts."""

    @abc.abstractmethod
    def compile(self, model: ir.Model, target: Target) -> Artifact:
        """Lower ``model``, which is left as it was.

        Raises:
            LowerError: with everything that :meth:`unsupported` lists.
        """
