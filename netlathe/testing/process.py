"""Runs a pass in another process, with another seed of Python's hashes, and tells what came out."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from netlathe.diagnostics import Diagnostic, PassError
from netlathe.pipeline.pass_ import Context, Feeds, Pass
from netlathe.pipeline.validation import make
from netlathe.testing.laws import bits

Told = tuple[str, str]  # digest of the model, the ledger as JSON


@dataclass(frozen=True)
class Job:
    """A model and calibration data in a folder."""

    folder: Path

    @classmethod
    def write(cls, folder: Path, model: ir.Model, ctx: Context) -> Job:
        """Write both into ``folder``, which is made."""
        folder.mkdir()
        ir.save(model, folder / "model.onnx")
        for number, feeds in enumerate(ctx.calibration):
            _save_arrays(feeds, folder / f"feeds{number}.onnx")
        return cls(folder)

    def read(self) -> tuple[ir.Model, Context]:
        """What was written."""
        files = sorted(self.folder.glob("feeds*.onnx"))
        return ir.load(self.folder / "model.onnx"), Context([_load_arrays(file) for file in files])


def outcome(pass_: Pass, model: ir.Model, ctx: Context) -> Told:
    """What ``pass_`` makes of ``model``."""
    result = pass_.run(model, ctx)
    entries = [entry.to_json() for entry in result.entries]
    return bits(model), json.dumps(entries, sort_keys=True, default=repr)


def elsewhere(pass_: Pass, jobs: Mapping[str, Job]) -> dict[str, Told]:
    """What ``pass_`` makes of every job in another process.

    Raises:
        PassError: it cannot be made there, or fails.
    """
    cls = type(pass_)
    module = sys.modules[cls.__module__]
    order = {
        "module": cls.__module__,
        "file": getattr(module, "__file__", None),
        "class": cls.__qualname__,
        "options": pass_.option_values(),
        "jobs": {name: str(job.folder) for name, job in jobs.items()},
    }
    own = os.environ.get("PYTHONHASHSEED", "random")
    environment = {
        **os.environ,
        "PYTHONHASHSEED": "1" if own != "1" else "2",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    done = subprocess.run(
        [sys.executable, "-m", "netlathe.testing.process"],
        input=json.dumps(order),
        capture_output=True,
        text=True,
        env=environment,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
        raise PassError(Diagnostic("testing.process", f"it fails in another process: {last}"))
    answer: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    return {name: (model, entries) for name, (model, entries) in answer.items()}


def main() -> None:
    """Read an order from standard input, carry it out, and print the answer as one line of JSON."""
    order = json.loads(sys.stdin.read())
    found: Any = _module(order["module"], order["file"])
    for part in order["class"].split("."):
        found = getattr(found, part)
    pass_ = make(found, order["options"], lambda option: "")
    answer = {
        name: outcome(pass_, *Job(Path(folder)).read()) for name, folder in order["jobs"].items()
    }
    print(json.dumps(answer))


def _module(name: str, file: str | None) -> Any:
    """The module, by its name, or from its file where a test runner gave it a name of its own."""
    if name != "__main__":
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            if file is None:
                raise
    spec = importlib.util.spec_from_file_location("netlathe_testing_subject", file or "")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _save_arrays(arrays: Feeds, file: Path) -> None:
    """As the initializers of a model without nodes, which hold every dtype."""
    values = [
        ir.Value(name=name, const_value=ir.tensor(np.asarray(array), name=name))
        for name, array in arrays.items()
    ]
    graph = ir.Graph([], [], nodes=[], initializers=values, opset_imports={"": 25})
    ir.save(ir.Model(graph, ir_version=13), file)


def _load_arrays(file: Path) -> dict[str, Any]:
    found = {}
    for name, value in ir.load(file).graph.initializers.items():
        assert value.const_value is not None
        found[name] = np.array(value.const_value.numpy())
    return found


if __name__ == "__main__":
    main()
