"""What went wrong, where, and what to do: the one way NetLathe reports a problem.

A :class:`Diagnostic` is data; the exceptions below carry one or more of them, so that a stage can
collect every gap it sees before it raises once. The CLI maps exceptions to exit codes: 1 for a gate
that failed (:class:`GateError`), 2 for bad input or usage (every other :class:`NetLatheError`).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Diagnostic:
    """One problem, rendered as compiler users expect.

    ``code`` is ``stage.what`` in lower snake case, such as ``verify.width`` or ``onnx.truncated``.
    ``at`` shows the offending node, file or text (with a caret under it), ``where`` the module path
    in the user's model, ``help`` the way forward.
    """

    code: str
    message: str
    at: str = ""
    where: str = ""
    notes: tuple[str, ...] = ()
    help: str = ""

    def __str__(self) -> str:
        lines = [f"error[{self.code}]: {self.message}"]
        if self.at:
            lines.append("  at  " + self.at.replace("\n", "\n      "))
        if self.where:
            lines.append(f"  in  {self.where}")
        lines += [f"  note: {note}" for note in self.notes]
        if self.help:
            lines.append(f"  help: {self.help}")
        return "\n".join(lines)


class NetLatheError(Exception):
    """Base of every error that NetLathe raises on purpose; ``str()`` is ready to show to a user."""

    exit_code: ClassVar[int] = 2

    def __init__(self, diagnostics: Diagnostic | Iterable[Diagnostic]) -> None:
        if isinstance(diagnostics, Diagnostic):
            diagnostics = (diagnostics,)
        self.diagnostics: tuple[Diagnostic, ...] = tuple(diagnostics)
        super().__init__("\n".join(str(d) for d in self.diagnostics))


class InputError(NetLatheError):
    """A file, model, data set or folder that the user named cannot be used."""


class OptionError(NetLatheError):
    """An unknown or out-of-range pass, option, target, recipe key or command-line value."""


class MissingExtraError(NetLatheError):
    """The requested feature needs an optional dependency that is not installed."""


class CaptureError(NetLatheError):
    """A model could not be captured, or the captured graph differs from the original."""


class PassError(NetLatheError):
    """A pass could not do what was asked of it."""


class LowerError(NetLatheError):
    """A backend cannot express the model for the requested target."""


class GateError(NetLatheError):
    """A check that the user asked for (or that is on by default) did not hold."""

    exit_code: ClassVar[int] = 1


class VerifyError(GateError):
    """A model is malformed, or a pass changed what it must not change."""


_MOST_SHOWN = 24  # names: all that a table of ours has, and not every module of a network


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """A help line that shows names near ``name``, or those that are ``known`` when none is near."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        first = ", ".join(near[:-1])
        return f"did you mean {first} or {near[-1]}?" if first else f"did you mean {near[-1]}?"
    more = len(known) - _MOST_SHOWN
    shown = ", ".join(sorted(known)[:_MOST_SHOWN])
    return f"known: {shown}" + (f" and {more} more" if more > 0 else "")


def missing_extra(extra: str, module: str, purpose: str) -> MissingExtraError:
    """The one-line error for a feature whose optional dependency is absent."""
    return MissingExtraError(
        Diagnostic(
            "extra.missing",
            f"{purpose} needs the {extra!r} extra ({module} is not installed)",
            help=f"pip install 'netlathe[{extra}]'",
        )
    )
