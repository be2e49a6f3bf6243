"""The artifact of an FPGA target: the core, its programs, and the graph they come from.

==========================  ===================================================================
core.v                      the core in Verilog, for simulation and synthesis
host-N                      the host's parts: artifacts of the TVM backend, each with its loader
model.onnx, model.onnx.data the integer graph, from which the parts are cut
launch-N.program            instructions of 32 bytes, little-endian, for the sizes of the sample
launch-N.memory             memory before the launch: weights, parameters, tables
launch-N.patches            where there are lengths: what fewer rows add to which fields
meta.json                   the core's numbers, where inputs and outputs lie, cycles by layer
==========================  ===================================================================
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.backends.fpga import host as hosts
from netlathe.backends.fpga import simulate
from netlathe.backends.fpga.boards import BOARDS, Board
from netlathe.backends.fpga.launch import Launch
from netlathe.backends.fpga.network import Network, Rtl
from netlathe.backends.fpga.spec import Spec
from netlathe.backends.tvm import runtime
from netlathe.backends.tvm.artifact import inputs_of
from netlathe.diagnostics import Diagnostic, InputError, VerifyError
from netlathe.execute import ort, samples
from netlathe.execute.compare import relative_error
from netlathe.pipeline.interfaces import Artifact
from netlathe.pipeline.pass_ import Feeds

META_FILE, MODEL_FILE, CORE_FILE = "meta.json", "model.onnx", "core.v"
DATA_FILE = MODEL_FILE + ".data"
FORMAT = 4
# The host's float operators are the same kernels in smaller graphs; integers are equal bit for bit.
_BOUND = 1e-6


class FpgaArtifact(Artifact):
    """A model whose integer part runs on the core, and the rest on the host called ``host``.

    ``lengths`` are row counts (tokens times the batch) that programs are shared up to.

    Raises:
        LowerError: nothing of the model is the core's, or what is cannot be done, or the host cannot do the
            rest: everything is listed.
        OptionError, MissingExtraError: as :func:`netlathe.backends.fpga.host.require`.
    """

    def __init__(
        self, model: ir.Model, board: Board, host: str, lengths: Sequence[int] = ()
    ) -> None:
        self.board, self.network = board, Network(model, board.spec, lengths)
        self._compiled = hosts.make(host, self.network.hosted)
        self.network.host = self._compiled
        self._manifest = ""
        self._report: dict[str, Any] = {}

    def run(
        self,
        feeds: Feeds,
        *,
        rtl: bool | Collection[str] = False,
        vcd: str | Path | None = None,
    ) -> dict[str, npt.NDArray[Any]]:
        """Run once, on the instruction set's model.

        Args:
            feeds: arrays by input name.
            rtl: layers (names as in :meth:`report`), or True for all, that run on the core itself instead,
                simulated by Verilator. Each such run is compared with the model, bit for bit and cycle for
                cycle; a layer that is named runs as a launch of its own.
            vcd: a folder for the waves of every launch that ``rtl`` names: ``launch-N.vcd``.

        Raises:
            InputError: a feed is missing, unknown, or of another dtype or shape, or leaves the core no row;
                ``rtl`` names no layer of the core; ``vcd`` without ``rtl``.
            LowerError: the host's code is for another CPU; no C++ compiler.
            MissingExtraError: Verilator, or TVM's runtime, is not installed.
            VerifyError: the core and its model differ.
        """
        try:
            runtime.check_feeds(inputs_of(self.network.model), feeds)
        except runtime.ArtifactError as error:
            raise InputError(Diagnostic("run.feeds", str(error))) from error
        if vcd is not None and not rtl:
            raise InputError(
                Diagnostic(
                    "run.vcd",
                    "waves are those of the simulated core, and nothing runs there",
                    help="name layers, or all of them: rtl=True",
                )
            )
        waves = None if vcd is None else Path(vcd)
        results = self.network.run(feeds, Rtl(rtl, self.board.memory, waves))
        self._report["rtl"] = self.network.last.rtl
        return results

    def stamp(self, manifest_digest: str) -> None:
        """Record which manifest the artifact belongs to, in ``meta.json``."""
        self._manifest = manifest_digest

    def report(self) -> dict[str, Any]:
        """What runs where; after :meth:`save` cycles, limits and bytes of every layer.

        After :meth:`run` with ``rtl``, under ``rtl``: layers, cycles and waves of every launch there.
        """
        return {
            "target": self.board.name,
            "analytical": self.board.analytical,
            "host": self.network.host.name,
            **self.network.shares(),
            **self._report,
        }

    def save(self, folder: Path) -> list[Path]:
        """Run the sample, compare with the IR, and write the files.

        Raises:
            MissingExtraError: what writes Verilog is not installed.
            VerifyError: the programs, or the host's parts, compute something else than the graph.
            OSError: the folder cannot be written.
        """
        model, spec = self.network.model, self.network.spec
        feeds = self.sample
        if feeds is None:
            feeds = samples.synthesize(model, samples.dynamic_dims(model), seed=0)
        expected = self._compare(feeds)
        layers = self.network.reports(self.board.memory)
        hosted = self._save_host(folder, feeds, expected)
        (folder / CORE_FILE).write_text(simulate.verilog(spec), "utf-8")
        # Weights may lie in files of the source: all of them move.
        ir.save(model.clone(), folder / MODEL_FILE, external_data=DATA_FILE)
        files = [folder / CORE_FILE, folder / MODEL_FILE, *hosted]
        if (folder / DATA_FILE).exists():
            files.append(folder / DATA_FILE)
        self.network.prepare()
        templates = [one for found in self.network.templates.values() for one in found]
        own = [made for made in self.network.launches.values() if made.own]
        records = []
        for number, launch in enumerate([*own, *(one.longest for one in templates)]):
            files += _write(launch, folder, number)
            records.append(_record(launch, number))
        for number, one in enumerate(templates, len(own)):
            file = folder / f"launch-{number}.patches"
            file.write_bytes(b"".join(patch.encode() for patch in one.patches))
            files.append(file)
            records[number] |= {"rows": [one.low, one.high], "patches": len(one.patches)}
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
        if templates:
            shared, apart = (
                sum(getattr(t, n) for t in templates) for n in ("bytes", "bytes_apart")
            )
            self._report["templates"] = {
                "lengths": self.network.lengths,
                "bytes": shared,
                "bytes_of_a_program_for_every_length": apart,
                "bytes_saved": apart - shared,
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

    def _compare(self, feeds: Feeds) -> Feeds:
        """The model's outputs; those of the core and ONNX Runtime as its host are compared with them."""
        network = self.network
        expected = ort.run(network.model, feeds)
        network.host = hosts.Reference(network.hosted)
        try:
            actual = network.run(feeds)
        finally:
            network.host = self._compiled
        self._report["error"] = _worst(actual, expected)
        if not self._report["error"] <= _BOUND:
            raise VerifyError(
                Diagnostic(
                    "fpga.differs",
                    f"an output of the core is off by {self._report['error']:.1e} of its RMS"
                    f" (at most {_BOUND:.0e})",
                    help="report this with the model",
                )
            )
        return expected

    def _save_host(self, folder: Path, feeds: Feeds, expected: Feeds) -> list[Path]:
        """The host's code, checked part by part where this machine can run it; then all of the network."""
        host = self._compiled
        if not isinstance(host, hosts.Compiled):
            return []
        files = host.save(folder)
        checked: dict[str, Any] = {"parts": len(self.network.hosted)}
        if lack := host.lack():
            checked["not_run"] = lack
        else:
            checked |= host.check(folder, self.network.last.host)
            checked["error_of_outputs"] = _worst(self.network.run(feeds), expected)
        self._report["host_parts"] = checked
        return files


def _worst(actual: Feeds, expected: Feeds) -> float:
    return max(relative_error(actual[name], expected[name]) for name in expected)


def load(folder: str | Path, *, host: str | None = None) -> FpgaArtifact:
    """What :meth:`FpgaArtifact.save` wrote, to be run on the host it was made for, or on ``onnxruntime``.

    Raises:
        InputError: a file is missing or damaged, or of another version; ``host`` is neither.
    """
    folder = Path(folder)
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
    if host not in (None, meta["host"], hosts.REFERENCE):
        raise InputError(
            Diagnostic(
                "fpga.artifact",
                f"its host is {meta['host']}, and {host!r} was asked for",
                at=str(folder),
                help=f"compile with --set host={host}, or ask for {hosts.REFERENCE!r}",
            )
        )
    board = replace(BOARDS[meta["target"]], spec=Spec(**core))
    lengths = meta.get("templates", {}).get("lengths", ())
    made = FpgaArtifact(model, board, hosts.REFERENCE, lengths)
    if (host or meta["host"]) != hosts.REFERENCE:
        made.network.host = hosts.Saved(meta["host"], folder)
    return made


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
