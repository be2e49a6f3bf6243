"""The command ``netlathe``: exit code 0 when done, 1 when a gate failed, 2 for bad input or usage."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence

import click

from netlathe.diagnostics import Diagnostic, InputError, NetLatheError

INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Errors go to stderr; with ``--json`` stdout carries them as JSON too.
    """
    from netlathe.cli.app import app

    words = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in words
    try:
        code = app.main(args=words, prog_name="netlathe", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, click.Abort):
        print("interrupted: nothing was written", file=sys.stderr)
        return INTERRUPTED
    except click.ClickException as wrong:
        wrong.show()
        return 2
    except BrokenPipeError:  # `netlathe inspect ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except NetLatheError as error:
        return report(error, as_json=as_json)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        return report(
            InputError(Diagnostic("io", f"{place}{error.strerror or error}")), as_json=as_json
        )


def report(error: NetLatheError, *, as_json: bool) -> int:
    """Show an error the way the user asked for and return its exit code."""
    if as_json:
        rows = [vars(diagnostic) for diagnostic in error.diagnostics]
        print(json.dumps({"errors": rows, "exit_code": error.exit_code}, indent=1))
    for line in [str(error), *getattr(error, "__notes__", [])]:
        print(line, file=sys.stderr)
    return error.exit_code
