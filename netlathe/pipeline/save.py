"""Writes what was compiled: the artifact of a backend, its manifest, and the files that travel along."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from netlathe.execute.compare import inputs_of
from netlathe.ir import weights
from netlathe.pipeline import manifest, output, registry
from netlathe.pipeline.interfaces import Artifact, Captured
from netlathe.pipeline.run import Compiled

_DEFAULT_TARGET = "onnx"


def save(
    compiled: Compiled,
    folder: Path,
    target_name: str | None,
    *,
    overwrite: bool,
    settings: Mapping[str, Any],
) -> Artifact:
    """See :meth:`Compiled.save`."""
    chosen = compiled.context.target
    if target_name is None and chosen is not None:
        settings = {**chosen.settings, **settings}
    name = target_name or (chosen.name if chosen is not None else _DEFAULT_TARGET)
    backend, target = registry.find_target(name, **settings)
    sources = list(_sources(compiled.captured))
    output.check_output(folder, overwrite=overwrite, sources=sources)
    artifact = backend.compile(compiled.model, target)  # or every gap, before any work
    made = manifest.build(compiled, target)
    sample = compiled.captured.sample(compiled.captured.dynamic, compiled.context.seed)
    artifact.sample = inputs_of(compiled.model, sample)
    artifact.stamp(made["digest"])

    def write(part: Path) -> None:
        weights.give_back(compiled.dense)  # what the passes and the digests have read
        files = artifact.save(part)
        output.copy_files(compiled.captured.files, part)
        made["artifact"] = manifest.describe(artifact, files, part)
        (part / manifest.FILE).write_text(json.dumps(made, indent=1) + "\n", "utf-8")

    output.write_whole(folder, write, overwrite=overwrite, sources=sources)
    return artifact


def _sources(captured: Captured) -> Iterator[Path]:
    """What must not be overwritten."""
    if Path(captured.source).exists():
        yield Path(captured.source)
    yield from manifest.source_files(captured)
