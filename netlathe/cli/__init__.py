"""The command ``netlathe``.

Exit codes: 0 done; 1 a gate failed; 2 bad input or usage, or a pass that failed; 70 a defect of NetLathe
itself, shown with its traceback; 130, 143 and 141 when interrupted, terminated, or cut off from the reader of
its output.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from typing import NoReturn

import click

from netlathe.diagnostics import Diagnostic, InputError, NetLatheError

DEFECT = 70  # EX_SOFTWARE of sysexits.h
# 128 + the signal, as shells report it.
INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM
UNREAD = 128 + 13  # SIGPIPE, which not every system has


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Errors go to stderr; with ``--json`` stdout carries them as JSON too.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in words
    try:
        with _terminable():
            return _run(words)
    except NetLatheError as error:
        return report(error, as_json=as_json)
    except click.ClickException as wrong:
        wrong.show()
        if as_json:
            print_errors([Diagnostic("cli.usage", wrong.format_message())], 2)
        return 2
    except (KeyboardInterrupt, click.Abort):
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except _Terminated:
        print("terminated", file=sys.stderr)
        return TERMINATED
    except BrokenPipeError:  # `netlathe inspect ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNREAD
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        problem = Diagnostic("io", f"{place}{error.strerror or error}")
        return report(InputError(problem), as_json=as_json)
    except Exception as error:
        traceback.print_exc()
        print(
            "this is a defect of NetLathe: please report it with the lines above", file=sys.stderr
        )
        if as_json:
            print_errors([Diagnostic("defect", f"{type(error).__name__}: {error}")], DEFECT)
        return DEFECT


def _run(words: list[str]) -> int:
    """Parse and run; not by click's own ``main``, which takes a closed pipe for exit code 1."""
    from netlathe.cli.app import app

    try:
        with app.make_context("netlathe", words) as ctx:
            code = app.invoke(ctx)
    except click.exceptions.NoArgsIsHelpError as shown:  # `netlathe` alone
        shown.show()
        return 2
    except click.exceptions.Exit as done:  # --help, --version
        code = done.exit_code
    sys.stdout.flush()  # here a closed pipe can still be told
    return code if isinstance(code, int) else 0


def report(error: NetLatheError, *, as_json: bool) -> int:
    """Show an error the way the user asked for and return its exit code."""
    if as_json:
        print_errors(error.diagnostics, error.exit_code)
    for line in [str(error), *getattr(error, "__notes__", [])]:
        print(line, file=sys.stderr)
    return error.exit_code


def print_errors(diagnostics: Sequence[Diagnostic], exit_code: int) -> None:
    """Errors as the one JSON document on stdout."""
    rows = [vars(diagnostic) for diagnostic in diagnostics]
    print(json.dumps({"errors": rows, "exit_code": exit_code}, indent=1))


class _Terminated(BaseException):
    """SIGTERM arrived: unwinds the stack as Ctrl-C does, so that what is half written goes."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return

    def stop(number: int, frame: object) -> NoReturn:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
