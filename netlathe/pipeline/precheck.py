"""Pipelines that cannot work, found before any work is done."""

from __future__ import annotations

from collections.abc import Sequence

from netlathe.diagnostics import Diagnostic, OptionError
from netlathe.pipeline.pass_ import Pass, no_data


def check(passes: Sequence[Pass], *, data: bool) -> None:
    """Check that every pass can come behind those before it, and has what it needs.

    ``data`` says whether there is calibration data. Asked are :meth:`Pass.cannot_follow` and
    :meth:`Pass.needs_data`.

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
        if not data and (option := pass_.needs_data()):
            problems.append(no_data(str(pass_), option))
    if problems:
        raise OptionError(problems)
