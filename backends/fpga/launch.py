"""A launch: a program for operations that follow each other, at one shape of their inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.backends.fpga import agreement, cost
from netlathe.backends.fpga.chip import Chip
from netlathe.backends.fpga.choices import Choices
from netlathe.backends.fpga.emit import refuse_overflow
from netlathe.backends.fpga.isa import Instruction
from netlathe.backends.fpga.kernel import Kernel
from netlathe.backends.fpga.layers import Builder
from netlathe.backends.fpga.model import Machine, Memory, Timing, cycles
from netlathe.backends.fpga.partition import OnCore
from netlathe.backends.fpga.program import link
from netlathe.backends.fpga.recognise import Operation, Pool, Product, Rename, Sum
from netlathe.backends.fpga.sparsity import pattern_of
from netlathe.backends.fpga.spec import Spec
from netlathe.backends.fpga.tensors import Image, Place, Window

Array = npt.NDArray[Any]


@dataclass
class Launch:
    """A program, memory as it is before it runs, and where inputs and outputs lie in that.

    ``own``: built for its shape, not patched from a template.
    """

    builder: Builder
    program: list[Instruction]
    memory: Array
    inputs: dict[ir.Value, Image]
    outputs: dict[ir.Value, Image]
    own: bool = True

    def timing(self, memory: Memory) -> list[Timing]:
        """When every instruction runs."""
        return cycles(self.program, self.builder.spec, memory)

    def run(self, arrays: Mapping[ir.Value, Array]) -> dict[ir.Value, Array]:
        """Outputs, by the instruction set's model."""
        memory = self._filled(arrays)
        Machine(self.builder.spec, memory).run(self.program)
        return self._results(memory, arrays)

    def run_rtl(
        self, arrays: Mapping[ir.Value, Array], behaviour: Memory, waves: Path | None
    ) -> tuple[dict[ir.Value, Array], int]:
        """Outputs and cycles of the core itself, simulated; ``waves`` is where a VCD file is written.

        Raises:
            VerifyError: the model says otherwise, of a bit or of a cycle.
            MissingExtraError, LowerError: as :func:`netlathe.backends.fpga.simulate.run`.
        """
        memory, spec = self._filled(arrays), self.builder.spec
        ran = agreement.run(self.program, memory, spec, behaviour, waves)
        return self._results(ran.memory, arrays), ran.cycles

    def _filled(self, arrays: Mapping[ir.Value, Array]) -> Array:
        memory = self.memory.copy()
        for value, image in self.inputs.items():
            self.builder.put(memory, image, _as_image(arrays[value]))
        return memory

    def _results(self, memory: Array, arrays: Mapping[ir.Value, Array]) -> dict[ir.Value, Array]:
        made = {}
        for value, image in self.outputs.items():
            read = self.builder.get_sums if image.group > 1 else self.builder.get
            made[value] = _as_array(read(memory, image), value, arrays)
        return made


def refuse(operation: Operation, spec: Spec) -> None:
    """Raise if the core cannot do ``operation`` at any size of its inputs.

    Raises:
        LowerError: a sum can leave 32 bits; the inputs of one output are more than the scratchpad holds;
            weights follow an N:M pattern that the core lacks.
    """
    if isinstance(operation, Product):
        refuse_overflow(operation.name, operation.weights, operation.scale, operation.zero)
        pattern, window = pattern_of(operation, spec), operation.window
        pitch = Kernel(spec, operation.weights, operation.groups, pattern, nibbles=False).pitch
        cost.check_window(spec, operation.name, window.span(0) * window.span(1) * pitch)


def build(
    part: OnCore,
    shapes: Mapping[ir.Value, Sequence[int]],
    spec: Spec,
    choices: Choices | None = None,
) -> Launch:
    """The program for inputs of ``shapes``: [..., k], or [1, c, h, w] where there are images.

    ``choices`` are noted, or followed where they come from an earlier program.

    Raises:
        LowerError: as :func:`refuse`; a tile is beyond a field of an instruction.
    """
    builder = Builder(spec, choices=choices or Choices())
    images = {value: builder.image(*_size(shape)) for value, shape in shapes.items()}
    inputs, leaving = dict(images), set(part.outputs)
    chip = Chip(spec, part.operations, leaving, builder.choices)
    for number, item in enumerate(part.operations):
        seen = {value: chip.seen(item, images[value]) for value in item.inputs}
        images[item.output] = _build(builder, item, seen, chip.place(number, images))
    outputs = {value: images[value] for value in part.outputs}
    return Launch(builder, link(builder.steps, spec.queue), builder.memory(), inputs, outputs)


def _build(
    builder: Builder, item: Operation, images: Mapping[ir.Value, Image], place: Place
) -> Image:
    x = images[item.inputs[0]]
    if isinstance(item, Product):
        return builder.product(
            item.name, x, item.weights, item.scale, item.window, groups=item.groups, zero=item.zero,
            pattern=pattern_of(item, builder.spec), raw=item.raw,
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


def _size(shape: Sequence[int]) -> tuple[int, int, int]:
    """Height, width and channels: of one image [1, c, h, w], else of rows [..., k]."""
    if len(shape) == 4:
        return shape[2], shape[3], shape[1]
    return 1, int(np.prod(shape[:-1])), shape[-1]


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
