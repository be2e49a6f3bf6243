"""The artifact of an FPGA target: the core, its programs, and the graph they come from.

==========================  ===================================================================
core.v                      the core in Verilog, for simulation and synthesis
model.onnx                  the integer graph; the host runs what the core does not
launch-N.program            instructions of 32 bytes, little-endian, for the sizes of the sample
launch-N.memory             memory before the launch: weights, parameters, tables
meta.json                   the core's numbers, where inputs and outputs lie, cycles by layer
==========================  ===================================================================
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.backends.fpga import simulate
from netlathe.backends.fpga.boards import BOARDS, Board
from netlathe.backends.fpga.network import Launch, Network
from netlathe.backends.fpga.spec import Spec
from netlathe.diagnostics import Diagnostic, InputError, VerifyError
from netlathe.execute import ort, samples
from netlathe.execute.compare import relative_error
from netlathe.pipeline.interfaces import Artifact
from netlathe.pipeline.pass_ import Feeds

META_FILE, MODEL_FILE, CORE_FILE = "meta.json", "model.onnx", "core.v"
FORMAT = 2
# The host's float operators are the same kernels in smaller graphs; integers are equal bit for bit.
_BOUND = 1e-6


class FpgaArtifact(Artifact):
    """A model whose integer part runs on the core; ``run`` uses the instruction set's model.

    Raises:
        LowerError: nothing of the model is the core's.
    """

    def __init__(self, model: ir.Model, board: Board) -> None:
        self.board, self.network = board, Network(model, board.spec)
        self._manifest = ""
        self._report: dict[str, Any] = {}

    def run(self, feeds: Feeds) -> dict[str, npt.NDArray[Any]]:
        """Run once.

        Raises:
            InputError: a feed is missing.
        """
        names = [value.name or "" for value in self.network.model.graph.inputs]
        if missing := sorted(set(names) - set(feeds)):
            raise InputError(Diagnostic("run.feeds", f"inputs are missing: {', '.join(missing)}"))
        return self.network.run(feeds)

    def stamp(self, manifest_digest: str) -> None:
        """Record which manifest the artifact belongs to, in ``meta.json``."""
        self._manifest = manifest_digest

    def report(self) -> dict[str, Any]:
        """What runs where; after :meth:`save` cycles, limits and bytes of every layer."""
        return {
            "target": self.board.name,
            "analytical": self.board.analytical,
            **self.network.shares(),
            **self._report,
        }

    def save(self, folder: Path) -> list[Path]:
        """Run the sample, compare with the IR, and write the files.

        Raises:
            MissingExtraError: what writes Verilog is not installed.
            VerifyError: the programs compute something else than the graph.
            OSError: the folder cannot be written.
        """
        model, spec = self.network.model, self.network.spec
        feeds = self.sample
        if feeds is None:
            feeds = samples.synthesize(model, samples.dynamic_dims(model), seed=0)
        self._compare(feeds)
        (folder / CORE_FILE).write_text(simulate.verilog(spec), "utf-8")
        (folder / MODEL_FILE).write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
        files = [folder / CORE_FILE, folder / MODEL_FILE]
        layers = self.network.reports(self.board.memory)
        records = []
        for number, launch in enumerate(self.network.launches.values()):
            files += _write(launch, folder, number)
            records.append(_record(launch, number))
        cycles = sum(layer["cycles"] for layer in layers)
        macs = sum(layer["macs"] for layer in layers)
        self._report |= {
            "cycles": cycles,
            "utilization": macs / (cycles * spec.rows * spec.columns),
            "bytes_moved": sum(layer["bytes_read"] + layer["bytes_written"] for layer in layers),
            "energy_proxy_uj": sum(layer["energy_proxy_uj"] for layer in layers),
            "instruction_bytes": sum(record["instruction_bytes"] for record in records),
            "layers": layers,
        }
        meta = {
            "format": FORMAT,
            "core": {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec) if f.init},
            "manifest": self._manifest,
            "launches": records,
            **self.report(),
        }
        (folder / META_FILE).write_text(json.dumps(meta, indent=1) + "\n", "utf-8")
        return [*files, folder / META_FILE]

    def _compare(self, feeds: Feeds) -> None:
        expected = ort.run(self.network.model, feeds)
        actual = self.network.run(feeds)
        errors = {name: relative_error(actual[name], expected[name]) for name in expected}
        worst = max(errors, key=lambda name: errors[name])
        if not errors[worst] <= _BOUND:
            raise VerifyError(
                Diagnostic(
                    "fpga.differs",
                    f"output {worst!r} of the core and its host is off by {errors[worst]:.1e} of its RMS"
                    f" (at most {_BOUND:.0e})",
                    help="report this with the model",
                )
            )
        self._report["error"] = errors[worst]


def load(folder: Path) -> FpgaArtifact:
    """What :meth:`FpgaArtifact.save` wrote.

    Raises:
        InputError: a file is missing or damaged, or of another version.
    """
    try:
        meta = json.loads((folder / META_FILE).read_text("utf-8"))
        model = ir.load(folder / MODEL_FILE)
    except (OSError, ValueError) as error:
        raise InputError(
            Diagnostic("fpga.artifact", f"no artifact of an FPGA target: {error}", at=str(folder))
        ) from error
    if meta.get("format") != FORMAT:
        raise InputError(
            Diagnostic(
                "fpga.artifact",
                f"format {meta.get('format')}, and {FORMAT} is known",
                at=str(folder),
            )
        )
    core: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in meta["core"].items()
    }
    if meta.get("target") not in BOARDS:
        raise InputError(
            Diagnostic(
                "fpga.artifact",
                f"target {meta.get('target')!r} is not known",
                at=str(folder),
                help="known targets: " + ", ".join(BOARDS),
            )
        )
    return FpgaArtifact(model, replace(BOARDS[meta["target"]], spec=Spec(**core)))


def _write(launch: Launch, folder: Path, number: int) -> list[Path]:
    program, memory = folder / f"launch-{number}.program", folder / f"launch-{number}.memory"
    program.write_bytes(b"".join(i.encode().to_bytes(32, "little") for i in launch.program))
    memory.write_bytes(launch.memory.tobytes())
    return [program, memory]


def _record(launch: Launch, number: int) -> dict[str, Any]:
    beat = launch.builder.spec.beat_bytes

    def places(images: dict[ir.Value, Any]) -> list[dict[str, Any]]:
        return [
            {
                "name": value.name,
                "byte": image.address * beat,
                "height": image.height,
                "width": image.width,
                "channels": image.channels,
                "vectors": image.vectors,
                "bytes_an_element": image.group,
            }
            for value, image in images.items()
        ]

    return {
        "launch": number,
        "instruction_bytes": 32 * len(launch.program),
        "memory_bytes": int(np.asarray(launch.memory).nbytes),
        "inputs": places(launch.inputs),
        "outputs": places(launch.outputs),
    }
