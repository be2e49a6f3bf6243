"""A whole network: programs for the core, and the rest on the host.

Shapes are those of the arrays that come in: programs are made when a shape is seen first, and kept. Where
there are ``lengths``, parts without images have templates (:mod:`netlathe.backends.fpga.template`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.analysis.cost import Meter, cost
from netlathe.backends.fpga import launch, partition, recognise, report, template
from netlathe.backends.fpga.host import Host, Reference
from netlathe.backends.fpga.launch import Launch
from netlathe.backends.fpga.model import Memory
from netlathe.backends.fpga.partition import OnCore, OnHost
from netlathe.backends.fpga.recognise import Operation, Pool, Product
from netlathe.backends.fpga.spec import Spec
from netlathe.backends.fpga.template import Template
from netlathe.diagnostics import Diagnostic, InputError, LowerError, did_you_mean
from netlathe.pipeline.pass_ import Feeds

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Rtl:
    """What runs on the simulated core instead of its model.

    ``layers``: names, or True for all; ``behaviour``: how memory answers; ``waves``: a folder for a VCD
    file of every launch.
    """

    layers: bool | Collection[str] = False
    behaviour: Memory = field(default_factory=Memory)
    waves: Path | None = None

    def takes(self, operation: Operation) -> bool:
        """Whether ``operation`` runs there."""
        return self.layers if isinstance(self.layers, bool) else operation.name in self.layers


@dataclass
class Last:
    """Of the last run: launches in order, calls of the host, and what ran on the simulated core."""

    launches: list[Launch] = field(default_factory=list)
    host: list[tuple[int, dict[str, Array], dict[str, Array]]] = field(default_factory=list)
    rtl: list[dict[str, Any]] = field(default_factory=list)


class Network:
    """Runs a model whose integer part is the core's; the host is ONNX Runtime until another is set.

    Args:
        lengths: row counts (tokens times the batch) that templates are for; each serves shorter ones too.

    Raises:
        LowerError: nothing in it is the core's, or what is cannot be done: everything is listed.
    """

    def __init__(self, model: ir.Model, spec: Spec, lengths: Sequence[int] = ()) -> None:
        if lacks := gaps(model, spec):
            raise LowerError(lacks)
        self.model, self.spec, self.lengths = model, spec, sorted(lengths)
        self.found = recognise.operations(model)
        self.parts = partition.parts(model, self.found)
        self.host: Host = Reference(self.hosted)
        self.launches: dict[tuple[OnCore, tuple[tuple[int, ...], ...]], Launch] = {}
        self.templates: dict[OnCore, list[Template]] = {}
        self.last = Last()
        self._pieces: dict[tuple[int, tuple[int, ...]], list[OnCore]] = {}

    @property
    def hosted(self) -> dict[int, ir.Model]:
        """The host's parts by their numbers."""
        return {n: part.model for n, part in enumerate(self.parts) if isinstance(part, OnHost)}

    def run(self, feeds: Feeds, rtl: Rtl | None = None) -> dict[str, Array]:
        """Outputs by name; the core is the instruction set's model but for what ``rtl`` names.

        Raises:
            InputError: ``rtl`` names a layer that the core does not have.
            VerifyError: the simulated core and its model differ.
        """
        rtl = rtl or Rtl()
        self._check_names(rtl)
        known: dict[str, Array] = {
            value.name or "": np.asarray(feeds[value.name or ""])
            for value in self.model.graph.inputs
        }
        self.last = Last()
        for number, part in enumerate(self.parts):
            if isinstance(part, OnHost):
                given = {name: known[name] for name in part.inputs}
                made = self.host.run(number, given)
                self.last.host.append((number, given, made))
                known |= made
                continue
            for piece in self._cut(number, part, rtl):
                known |= self._on_core(piece, known, rtl)
        return {value.name or "": known[value.name or ""] for value in self.model.graph.outputs}

    def prepare(self) -> None:
        """Make the templates for all ``lengths``, where a part has no images."""
        for part in self.parts:
            widths = _row_widths(part) if isinstance(part, OnCore) else None
            if isinstance(part, OnCore) and widths is not None:
                for rows in self.lengths:
                    self._template(part, widths, rows)

    def reports(self, memory: Memory) -> list[dict[str, Any]]:
        """Of the last run, layer by layer: cycles, what limited them, utilization, bytes."""
        return [one for made in self.last.launches for one in report.layers(made, memory)]

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

    # -- the core -----------------------------------------------------------------------------------

    def _check_names(self, rtl: Rtl) -> None:
        if isinstance(rtl.layers, bool):
            return
        names = [operation.name for operation in self.found]
        for name in rtl.layers:
            if name not in names:
                raise InputError(
                    Diagnostic(
                        "fpga.layer",
                        f"the core has no layer {name!r}",
                        help=did_you_mean(name, names),
                    )
                )

    def _cut(self, number: int, part: OnCore, rtl: Rtl) -> list[OnCore]:
        """``part`` as launches: what runs on the model together, and what does not layer by layer."""
        wanted = tuple(n for n, item in enumerate(part.operations) if rtl.takes(item))
        if rtl.layers is True or not wanted:
            return [part]
        if (number, wanted) not in self._pieces:
            self._pieces[number, wanted] = list(_pieces(part, wanted))
        return self._pieces[number, wanted]

    def _on_core(self, part: OnCore, known: Mapping[str, Array], rtl: Rtl) -> dict[str, Array]:
        given = {value: known[value.name or ""] for value in part.inputs}
        if not all(array.size for array in given.values()):
            raise InputError(
                Diagnostic("run.feeds", f"{part.operations[0].name} has no row to compute")
            )
        by_sample = _has_images(part)
        samples = next(iter(given.values())).shape[0] if by_sample else 1
        parts: list[dict[ir.Value, Array]] = []
        for sample in range(samples):
            arrays = {
                value: array[sample : sample + 1] if by_sample else array
                for value, array in given.items()
            }
            made = self._launch(part, arrays)
            parts.append(self._launched(made, part, arrays, rtl))
            self.last.launches.append(made)
        return {value.name or "": np.concatenate([p[value] for p in parts]) for value in parts[0]}

    def _launch(self, part: OnCore, arrays: Mapping[ir.Value, Array]) -> Launch:
        key = part, tuple(array.shape for array in arrays.values())
        if key not in self.launches:
            shapes = {value: array.shape for value, array in arrays.items()}
            self.launches[key] = self._patched(part, shapes) or launch.build(
                part, shapes, self.spec
            )
        return self.launches[key]

    def _patched(self, part: OnCore, shapes: Mapping[ir.Value, tuple[int, ...]]) -> Launch | None:
        """A launch by a template; None where there is none for these shapes."""
        counts = {math.prod(shape[:-1]) for shape in shapes.values()}
        if _has_images(part) or len(counts) > 1:
            return None
        (rows,) = counts
        if not any(rows <= length for length in self.lengths):
            return None
        widths = {value: shape[-1] for value, shape in shapes.items()}
        return self._template(part, widths, rows).launch(rows)

    def _template(self, part: OnCore, widths: Mapping[ir.Value, int], rows: int) -> Template:
        """The one that covers ``rows``: it ends at the next length, or at ``rows`` if that begins later."""
        found = self.templates.setdefault(part, [])
        for one in found:
            if one.low <= rows <= one.high:
                return one
        end = next(length for length in self.lengths if length >= rows)
        if any(one.high == end for one in found):
            end = rows
        found.append(template.build(part, widths, end, self.spec))
        return self._template(part, widths, rows)

    def _launched(
        self, made: Launch, part: OnCore, arrays: Mapping[ir.Value, Array], rtl: Rtl
    ) -> dict[ir.Value, Array]:
        if not rtl.takes(part.operations[0]):
            return made.run(arrays)
        waves = None
        if rtl.waves is not None:
            rtl.waves.mkdir(parents=True, exist_ok=True)
            waves = rtl.waves / f"launch-{len(self.last.rtl)}.vcd"
        results, cycles = made.run_rtl(arrays, rtl.behaviour, waves)
        self.last.rtl.append(
            {
                "layers": [operation.name for operation in part.operations],
                "instructions": len(made.program),
                "cycles": cycles,
                "waves": None if waves is None else str(waves),
            }
        )
        return results


def gaps(model: ir.Model, spec: Spec) -> list[Diagnostic]:
    """Everything that keeps the integer part of ``model`` from running on the core."""
    found = recognise.operations(model)
    if not any(isinstance(operation, Product) for operation in found):
        return [recognise.nothing()]
    lacks: list[Diagnostic] = []
    for operation in found:
        try:
            launch.refuse(operation, spec)
        except LowerError as error:
            lacks += error.diagnostics
    return lacks


def _pieces(part: OnCore, wanted: Collection[int]) -> Iterator[OnCore]:
    together: list[Operation] = []
    for number, item in enumerate(part.operations):
        if number in wanted:
            if together:
                yield OnCore(tuple(together))
            yield OnCore((item,))
            together = []
        else:
            together.append(item)
    if together:
        yield OnCore(tuple(together))


def _row_widths(part: OnCore) -> dict[ir.Value, int] | None:
    """Elements a row of each input; None if there are images, or a width that is no number."""
    if _has_images(part):
        return None
    found = {}
    for value in part.inputs:
        width = value.shape[-1] if value.shape is not None and len(value.shape) else None
        if not isinstance(width, int):
            return None
        found[value] = width
    return found


def _has_images(part: OnCore) -> bool:
    """Of images the core takes one at a time."""
    return any(
        isinstance(item, Pool) or (isinstance(item, Product) and item.is_conv)
        for item in part.operations
    )
