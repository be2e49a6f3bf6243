"""Dependency files for make and ninja: what an output was made from, so that they know when it is old."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from netlathe.cli.request import onnx_of
from netlathe.diagnostics import Diagnostic, InputError

if TYPE_CHECKING:
    from netlathe.pipeline.interfaces import Captured


def check(depfile: Path) -> None:
    """Return if ``depfile`` can be written.

    Raises:
        InputError: it is a folder, or its folder is not there.
    """
    if depfile.is_dir() or not depfile.parent.is_dir():
        what = "is a folder" if depfile.is_dir() else f"{depfile.parent} is not a folder"
        raise InputError(
            Diagnostic("depfile.path", f"the depfile cannot be written: {what}", at=str(depfile))
        )


def write(depfile: Path, output: Path, sources: Iterable[Path]) -> None:
    """Write ``output: source source ...``.

    Raises:
        InputError: a name holds a line break, which neither tool can read.
    """
    names = [str(output), *sorted({str(source) for source in sources})]
    if broken := [name for name in names if "\n" in name or "\r" in name]:
        raise InputError(
            Diagnostic("depfile.name", f"a depfile cannot hold the name {broken[0]!r}")
        )
    target, *rest = map(_escape, names)
    depfile.write_text(" \\\n  ".join([f"{target}:", *rest]) + "\n", "utf-8")


def _escape(name: str) -> str:
    """As GCC writes names, which make and ninja both read.

    A space or # is escaped by a backslash, and so are the backslashes right before it; $ is doubled.
    """
    escaped = ""
    for at, character in enumerate(name):
        if character in " \t#":
            head = name[:at]
            escaped += "\\" * (len(head) - len(head.rstrip("\\"))) + "\\"
        escaped += "$$" if character == "$" else character
    return escaped


def sources(captured: Captured, *more: Path | None) -> set[Path]:
    """Every file that went into a compilation of ``captured``, and ``more``."""
    import onnx_ir as ir

    from netlathe.ir import weights
    from netlathe.pipeline import manifest

    path = Path(captured.source)
    found = set(manifest.source_files(captured))
    if path.is_dir():
        found.update(path.glob("*.safetensors.index.json"))
    elif (file := onnx_of(captured)) is not None:  # weights folded away are no longer in the graph
        found |= {file, *weights.files(ir.load(file))}
    return found | {file for file in more if file is not None}
