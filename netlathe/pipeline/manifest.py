"""The manifest: what a compilation was made from, what was decided, and what was measured.

``compilation`` holds everything that the result depends on and that follows from it. It names no
time and no absolute path, so that two runs on the same machine give the same bytes; ``digest`` is
its SHA-256, which the artifact carries too. What differs from run to run stands beside it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import netlathe
from netlathe.ir import sparsity, weights
from netlathe.pipeline import text
from netlathe.pipeline.fingerprint import graph_digest, weights_digest
from netlathe.pipeline.inputs import describe_calibration, describe_pass, describe_target
from netlathe.pipeline.interfaces import Artifact, Captured, Target
from netlathe.pipeline.pass_ import Context, Pass
from netlathe.pipeline.run import Compiled
from netlathe.pipeline.step import Step

FORMAT = 1
FILE = "manifest.json"

_BASE = ("numpy", "onnx", "onnx-ir", "onnxruntime")
_CHUNK = 16 << 20


def inputs(
    captured: Captured,
    passes: Sequence[Pass],
    context: Context,
    target: Target | None = None,
    tools: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What a compilation starts from; ``tools`` are versions of what builds for ``target``.

    Reads every weight of the captured model once.
    """
    return {
        "versions": {**_versions(captured, context, target), **(tools or {})},
        "source": _source(captured),
        "pipeline": text.render(passes),
        "passes": [describe_pass(pass_) for pass_ in passes],
        "seed": context.seed,
        "calibration": describe_calibration(context.calibration),
        "target": None if target is None else describe_target(target),
    }


def build(
    compiled: Compiled, target: Target | None = None, tools: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The manifest of a compilation, as JSON data; ``target`` is what an artifact is built for."""
    passes = [step.pass_ for step in compiled.steps]
    compilation = {
        **inputs(compiled.captured, passes, compiled.context, target, tools),
        "capture": [entry.to_json() for entry in compiled.captured.entries],
        "steps": [_step(step) for step in compiled.steps],
        "result": {
            "graph": graph_digest(compiled.model),
            "sparsity": sparsity.table(compiled.model),
        },
    }
    return {
        "format": FORMAT,
        "digest": digest(compilation),
        "compilation": compilation,
        "timings": [
            {
                "pass": str(step.pass_),
                "seconds": step.seconds,
                "check_seconds": step.check_seconds,
                "peak_bytes": step.peak_bytes,
            }
            for step in compiled.steps
        ],
    }


def digest(compilation: dict[str, Any]) -> str:
    """SHA-256 over the compilation part of a manifest, as hex."""
    text_ = json.dumps(compilation, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text_.encode()).hexdigest()


def describe(artifact: Artifact, files: list[Path], folder: Path) -> dict[str, Any]:
    """What an artifact says about itself, and size and SHA-256 of every file of it."""
    return {
        "report": artifact.report(),
        "files": {
            file.relative_to(folder).as_posix(): {
                "bytes": file.stat().st_size,
                "sha256": file_digest(file),
            }
            for file in sorted(files)
        },
    }


def _versions(captured: Captured, context: Context, target: Target | None) -> dict[str, str]:
    """Versions of what took part; whether torch did does not depend on who else imported it."""
    frontend = captured.frontend
    torch_builds = target is not None and target.backend == "torch"
    packages = [*_BASE]
    if frontend != "onnx_file" or context.calibration or torch_builds:
        packages.append("torch")
    if frontend == "huggingface":
        packages.append("transformers")
    return {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "netlathe": netlathe.__version__,
        **{name: metadata.version(name) for name in packages},
    }


def _source(captured: Captured) -> dict[str, Any]:
    """Where the model came from: names and digests, not places."""
    path = Path(captured.source)
    return {
        "name": path.name if path.exists() else captured.source,
        "frontend": captured.frontend,
        "dynamic": dict(captured.dynamic),
        "files": {
            name: file_digest(file)
            for name, file in sorted({file.name: file for file in source_files(captured)}.items())
        },
        "graph": graph_digest(captured.model),
        "weights": weights_digest(captured.model),
    }


def source_files(captured: Captured) -> list[Path]:
    """The files that are known to make up the source, its mapped weights among them."""
    path = Path(captured.source)
    files = {path} if path.is_file() else set()
    files.update(captured.files.values())
    if (path / "config.json").is_file():
        files.add(path / "config.json")
    return sorted(files | weights.files(captured.model))


def _step(step: Step) -> dict[str, Any]:
    def size(cost: Any) -> dict[str, Any]:
        return {"params": cost.params, "bytes": cost.bytes, "macs": cost.macs}

    return {
        "pass": str(step.pass_),
        "changed": step.changed,
        "ledger": [entry.to_json() for entry in step.entries],
        "statistics": step.statistics,
        "cost": {"before": size(step.cost_before), "after": size(step.cost_after)},
        "check": dataclasses.asdict(step.check),
        "loss": None if step.loss is None else dataclasses.asdict(step.loss),
        "total_loss": None if step.total_loss is None else dataclasses.asdict(step.total_loss),
    }


def file_digest(file: Path) -> str:
    """SHA-256 over the bytes of a file."""
    state = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            state.update(chunk)
    return state.hexdigest()
