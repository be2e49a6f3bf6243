"""Writes what was compiled: the artifact of a backend, its manifest, and the files that travel along."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from netlathe.execute.compare import inputs_of
from netlathe.ir import weights
from netlathe.pipeline import cache_artifact, lock, manifest, output, registry
from netlathe.pipeline.cache import Material
from netlathe.pipeline.interfaces import Artifact, Captured
from netlathe.pipeline.pass_ import Lossy
from netlathe.pipeline.run import Compiled

_DEFAULT_TARGET = "onnx"


def save(
    compiled: Compiled,
    folder: Path,
    target_name: str | None,
    *,
    overwrite: bool,
    locked: bool,
    settings: Mapping[str, Any],
) -> Artifact:
    """See :meth:`Compiled.save`."""
    chosen = compiled.context.target
    if target_name is None and chosen is not None:
        settings = {**chosen.settings, **settings}
    name = target_name or (chosen.name if chosen is not None else _DEFAULT_TARGET)
    backend, target = registry.find_target(name, **settings)
    sources = list(_sources(compiled.captured))
    held = lock.load(folder) if locked else None
    overwrite = overwrite or locked
    output.check_output(folder, overwrite=overwrite, sources=sources)
    artifact = None
    if compiled.cached is None:
        artifact = backend.compile(compiled.model, target)  # or every gap, before any work
    made = manifest.build(compiled, target, backend.tools(target))
    material: Material | None = None
    known = None
    if compiled.cached is not None:
        material = compiled.cached.artifact_material(compiled.model, backend, made["digest"])
        if material is not None:
            known = cache_artifact.recall(
                compiled.cached.cache, material, lambda: backend.compile(compiled.model, target)
            )
    artifact = artifact or known or backend.compile(compiled.model, target)
    sample = compiled.captured.sample(compiled.captured.dynamic, compiled.context.seed)
    artifact.sample = inputs_of(compiled.model, sample)
    artifact.stamp(made["digest"])

    def write(part: Path) -> None:
        weights.give_back(compiled.dense)  # what the passes and the digests have read
        files = artifact.save(part)
        if compiled.cached is not None and material is not None and known is None:
            cache_artifact.keep(compiled.cached.cache, material, artifact, files, part)
        output.copy_files(travelling(compiled), part)
        made["artifact"] = manifest.describe(artifact, files, part)
        text = json.dumps(made, indent=1) + "\n"
        if held is not None:
            lock.check(held, made)
            text = (folder / manifest.FILE).read_text("utf-8")  # it stays as it is, times included
        (part / manifest.FILE).write_text(text, "utf-8")

    output.write_whole(folder, write, overwrite=overwrite, sources=sources)
    return artifact


def travelling(compiled: Compiled) -> dict[str, Path]:
    """What goes along: name in the artifact -> file.

    A config states widths and depth. Of a model that has other ones by now it would build another model,
    without a word: it goes under a name that no library looks for.
    """
    files = dict(compiled.captured.files)
    if "config.json" in files and _is_smaller(compiled):
        files["config.original.json"] = files.pop("config.json")
    return files


def _is_smaller(compiled: Compiled) -> bool:
    """Whether passes took widths or blocks away: less is computed, or a weight has another shape."""
    for step in compiled.steps:
        before, after = step.cost_before.macs, step.cost_after.macs
        if isinstance(step.pass_.exactness, Lossy) and after is not None and before is not None:
            if after < before:
                return True
    left = compiled.model.graph.initializers
    return any(
        name in left and left[name].shape != value.shape
        for name, value in compiled.dense.graph.initializers.items()
        if value.shape is not None and len(value.shape) > 1
    )


def _sources(captured: Captured) -> Iterator[Path]:
    """What must not be overwritten."""
    if Path(captured.source).exists():
        yield Path(captured.source)
    yield from manifest.source_files(captured)
