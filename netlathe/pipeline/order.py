"""Orders of passes that cannot work, found before any work is done."""

from __future__ import annotations

from collections.abc import Sequence

from netlathe.diagnostics import Diagnostic, OptionError
from netlathe.pipeline.pass_ import Pass


def check(passes: Sequence[Pass]) -> None:
    """Check that every pass can come behind those before it; see :meth:`Pass.cannot_follow`.

    Raises:
        OptionError: with every pass that cannot, and why.
    """
    problems = []
    for at, pass_ in enumerate(passes):
        for earlier in passes[:at]:
            if reason := pass_.cannot_follow(earlier):
                message = f"{pass_} cannot come behind {earlier}: {reason}"
                help_ = f"put {pass_.name} in front of {earlier.name}"
                problems.append(Diagnostic("pipeline.order", message, help=help_))
    if problems:
        raise OptionError(problems)
