"""A whole network: programs for the core, and the rest on the host.

Shapes are those of the arrays that come in: programs are made when a shape is seen first, and kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.analysis.cost import Meter, cost
from netlathe.backends.fpga import recognise, simulate
from netlathe.backends.fpga.chip import Chip
from netlathe.backends.fpga.emit import Report
from netlathe.backends.fpga.isa import Instruction
from netlathe.backends.fpga.layers import Builder
from netlathe.backends.fpga.model import Machine, Memory, Timing, cycles
from netlathe.backends.fpga.program import link
from netlathe.backends.fpga.recognise import Operation, Pool, Product, Rename, Sum
from netlathe.backends.fpga.spec import Pattern, Spec
from netlathe.backends.fpga.tensors import Image, Place, Window
from netlathe.diagnostics import LowerError
from netlathe.execute import ort
from netlathe.pipeline.pass_ import Feeds

Array = npt.NDArray[Any]
# Picojoules of an int8 product and its sum, of a byte of a small SRAM and of DRAM, at 45 nm (Horowitz,
# ISSCC 2014, fig. 1.1.9: 0.2 + 0.1; 10 and 1300 for 8 bytes). For comparing programs, not a power supply.
PJ_MAC, PJ_SRAM, PJ_DRAM = 0.3, 1.25, 160.0


@dataclass
class Launch:
    """A program for one shape of its inputs."""

    builder: Builder
    program: list[Instruction]
    memory: Array
    inputs: dict[ir.Value, Image]
    outputs: dict[ir.Value, Image]

    def timing(self, memory: Memory) -> list[Timing]:
        """When every instruction runs."""
        return cycles(self.program, self.builder.spec, memory)


class Network:
    """Runs a model whose integer part is the core's.

    Raises:
        LowerError: nothing in it is the core's.
    """

    def __init__(self, model: ir.Model, spec: Spec) -> None:
        self.model, self.spec = model, spec
        self.found = recognise.operations(model)
        if not any(isinstance(operation, Product) for operation in self.found):
            raise LowerError(recognise.nothing())
        self.groups = list(recognise.groups(model, self.found))
        self.launches: dict[tuple[int, tuple[tuple[int, ...], ...]], Launch] = {}
        self._hosts: dict[int, ir.Model] = {}
        self._last: list[Launch] = []

    def run(self, feeds: Feeds, *, hardware: bool = False) -> dict[str, Array]:
        """Outputs by name; the core is the instruction set's model, with ``hardware`` the RTL."""
        known: dict[ir.Value, Array] = {
            value: np.asarray(feeds[value.name or ""]) for value in self.model.graph.inputs
        }
        self._last = []
        for number, (core, items) in enumerate(self.groups):
            if core:
                self._on_core(number, items, known, hardware)
            else:
                self._on_host(number, items, known)
        return {value.name or "": known[value] for value in self.model.graph.outputs}

    def reports(self, memory: Memory) -> list[dict[str, Any]]:
        """Of the last run, layer by layer: cycles, what limited them, utilization, bytes."""
        made = []
        for launch in self._last:
            times = launch.timing(memory)
            start = 0
            for report in launch.builder.reports:
                end = max((t.done for t in times[report.first : report.last]), default=start)
                made.append(_layer_report(report, max(1, end - start), self.spec))
                start = max(start, end)
        return made

    def shares(self) -> dict[str, float | None]:
        """Which part of the operators, and of the multiplications at default sizes, runs on the core.

        Multiplications are None if those of some operator cannot be known.
        """
        mine = sum(len(operation.nodes) for operation in self.found)
        products = [o.nodes[0] for o in self.found if isinstance(o, Product)]
        meter, total = Meter(self.model), cost(self.model).macs
        macs = [meter.macs(node) for node in products]
        known = total and not any(n is None for n in macs)
        return {
            "operators": mine / sum(1 for _ in self.model.graph),
            "macs": sum(n or 0 for n in macs) / total if total and known else None,
        }

    # -- the host -----------------------------------------------------------------------------------

    def _on_host(self, number: int, nodes: list[ir.Node], known: dict[ir.Value, Array]) -> None:
        inside = {value for node in nodes for value in node.outputs}
        needed = {
            value: None
            for node in nodes
            for value in node.inputs
            if value is not None and value not in inside and value in known
        }
        results = [
            value
            for value in inside
            if value.is_graph_output() or any(reader not in nodes for reader in value.consumers())
        ]
        if number not in self._hosts:
            graph = ir.convenience.extract(self.model.graph, inputs=list(needed), outputs=results)
            self._hosts[number] = ir.Model(graph, ir_version=self.model.ir_version)
        part = self._hosts[number]
        got = ort.run(part, {value.name or "": known[value] for value in needed})
        for value in results:
            known[value] = got[value.name or ""]

    # -- the core -----------------------------------------------------------------------------------

    def _on_core(
        self, number: int, items: list[Operation], known: dict[ir.Value, Array], hardware: bool
    ) -> None:
        made = {item.output for item in items}
        needed = [v for item in items for v in item.inputs if v not in made]
        needed = list(dict.fromkeys(needed))
        samples = known[needed[0]].shape[0] if self._by_sample(items) else 1
        parts: list[dict[ir.Value, Array]] = []
        for sample in range(samples):
            arrays = {
                v: known[v][sample : sample + 1] if self._by_sample(items) else known[v]
                for v in needed
            }
            key = number, tuple(array.shape for array in arrays.values())
            if key not in self.launches:
                self.launches[key] = self._launch(items, arrays)
            parts.append(self._run(self.launches[key], arrays, hardware))
            self._last.append(self.launches[key])
        for value in parts[0]:
            known[value] = np.concatenate([part[value] for part in parts])

    @staticmethod
    def _by_sample(items: list[Operation]) -> bool:
        """Whether there are images, of which the core takes one at a time."""
        return any(isinstance(i, Pool) or (isinstance(i, Product) and i.is_conv) for i in items)

    def _launch(self, items: list[Operation], arrays: Mapping[ir.Value, Array]) -> Launch:
        builder = Builder(self.spec)
        images: dict[ir.Value, Image] = {}
        for value, array in arrays.items():
            images[value] = builder.image(*_size(array))
        inputs = dict(images)
        leaving = {i.output for i in items if i.output.is_graph_output() or self._leaves(i, items)}
        chip = Chip(self.spec, items, leaving)
        for number, item in enumerate(items):
            seen = {value: chip.seen(item, images[value]) for value in item.inputs}
            images[item.output] = self._build(builder, item, seen, chip.place(number, images))
        outside = {item.output: images[item.output] for item in items if item.output in leaving}
        program = link(builder.steps, self.spec.queue)
        return Launch(builder, program, builder.memory(), inputs, outside)

    @staticmethod
    def _leaves(item: Operation, items: list[Operation]) -> bool:
        inside = {node for other in items for node in other.nodes}
        return any(reader not in inside for reader in item.output.consumers())

    def _build(
        self, builder: Builder, item: Operation, images: Mapping[ir.Value, Image], place: Place
    ) -> Image:
        x = images[item.inputs[0]]
        if isinstance(item, Product):
            return builder.product(
                item.name, x, item.weights, item.scale, item.window, groups=item.groups,
                zero=item.zero, pattern=self._pattern(item), raw=item.raw,
                nibbles=bool(np.abs(item.weights.astype(int) + 0.5).max() < 8), place=place,
            )  # fmt: skip
        if isinstance(item, Sum):
            terms = [(images[v], f) for v, f in zip(item.inputs, item.factors, strict=True)]
            return builder.add(item.name, terms, item.scale, place)
        if isinstance(item, Pool):
            window = item.window or Window(kernel=(x.height, x.width))
            return builder.pool(
                item.name, x, window, item.scale, maximum=item.window is not None, zero=item.zero,
                place=place,
            )  # fmt: skip
        assert isinstance(item, Rename)
        return x

    def _pattern(self, item: Product) -> Pattern | None:
        """The first pattern of the core that the weights follow, if it pays."""
        if item.groups != 1:
            return None
        wide = item.weights.transpose(0, 2, 3, 1)
        for pattern in self.spec.kept:
            pad = -wide.shape[-1] % pattern.group
            grouped = np.pad(wide, ((0, 0),) * 3 + ((0, pad),))
            used = (grouped.reshape(-1, pattern.group) != 0).sum(1)
            if used.max(initial=0) <= pattern.kept and wide.shape[-1] >= self.spec.rows * 2:
                return pattern
        return None

    def _run(
        self, launch: Launch, arrays: Mapping[ir.Value, Array], hardware: bool
    ) -> dict[ir.Value, Array]:
        builder, memory = launch.builder, launch.memory.copy()
        for value, image in launch.inputs.items():
            builder.put(memory, image, _as_image(arrays[value]))
        if hardware:
            memory = simulate.run(launch.program, memory, self.spec).memory
        else:
            Machine(self.spec, memory).run(launch.program)
        made = {}
        for value, image in launch.outputs.items():
            got = builder.get_sums(memory, image) if image.group > 1 else builder.get(memory, image)
            made[value] = _as_array(got, value, arrays)
        return made


def _size(array: Array) -> tuple[int, int, int]:
    """Height, width and channels: of one image [1, c, h, w], else of rows [..., k]."""
    if array.ndim == 4:
        return array.shape[2], array.shape[3], array.shape[1]
    return 1, int(np.prod(array.shape[:-1])), array.shape[-1]


def _as_image(array: Array) -> Array:
    return array[0].transpose(1, 2, 0) if array.ndim == 4 else array.reshape(1, -1, array.shape[-1])


def _as_array(image: Array, value: ir.Value, arrays: Mapping[ir.Value, Array]) -> Array:
    """Back in the shape of the graph: the rank is known, leading dims are those of the inputs."""
    rank = len(value.shape) if value.shape is not None else 2
    if rank == 4:
        return image.transpose(2, 0, 1)[None]
    lead = next(iter(arrays.values())).shape[:-1]
    rows = image.reshape(-1, image.shape[-1])
    if len(lead) == rank - 1 and int(np.prod(lead)) == len(rows):
        return rows.reshape(*lead, rows.shape[-1])
    return rows.reshape(*(1,) * (rank - 2), *rows.shape)


def _layer_report(report: Report, taken: int, spec: Spec) -> dict[str, Any]:
    sram = report.computed * (spec.rows + 1) * spec.columns  # a row of weights, and of activations
    moved = (report.beats_in + report.beats_out) * spec.beat_bytes
    energy = report.macs * PJ_MAC + sram * PJ_SRAM + moved * PJ_DRAM
    parts = {"load": report.beats_in, "compute": report.computed, "store": report.beats_out}
    return {
        "layer": report.name,
        "cycles": taken,
        "limit": max(parts, key=lambda name: parts[name]),
        "utilization": report.macs / (taken * spec.rows * spec.columns),
        "bytes_read": report.beats_in * spec.beat_bytes,
        "bytes_written": report.beats_out * spec.beat_bytes,
        "macs": report.macs,
        "energy_proxy_uj": energy * 1e-6,
    }
