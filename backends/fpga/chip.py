"""Which results stay on the chip between two layers, and where in ``hidden``.

A result is kept if an operation that reads it can read it there, and there is room until the last such
operation is done. It is stored as well if anyone needs it in memory: another launch, the host, a convolution
with pads (LOAD fills those beside what it brings) or a grouped one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace

import onnx_ir as ir

from netlathe.backends.fpga.choices import Choices
from netlathe.backends.fpga.recognise import Operation, Pool, Product, Rename, Sum
from netlathe.backends.fpga.spec import Spec
from netlathe.backends.fpga.tensors import Image, Place


class Chip:
    """``hidden`` while the operations of a launch are built one after the other."""

    def __init__(
        self,
        spec: Spec,
        items: Sequence[Operation],
        leaving: AbstractSet[ir.Value],
        choices: Choices,
    ) -> None:
        self.spec, self.items, self.leaving, self.choices = spec, items, leaving, choices
        self._held: list[tuple[int, int, int]] = []  # first vector, one past the last, last reader

    def place(self, number: int, images: Mapping[ir.Value, Image]) -> Place:
        """Where the result of operation ``number`` goes; ``images`` has its inputs."""
        item = self.items[number]
        if isinstance(item, Rename):
            return Place()
        height, width, channels = _size(item, images)
        readers = self._readers(item.output)
        able = [n for n in readers if self._reads_there(self.items[n])]
        stored = item.output in self.leaving or len(able) < len(readers)
        if not able:
            return Place()
        size = height * width * self.spec.hidden_pitch(channels)
        self._held = [held for held in self._held if held[2] >= number]
        at = self.choices.choose(lambda: self._gap(size))
        if at is None:
            return Place()
        self._held.append((at, at + size, max(able)))
        return Place(stored, at)

    def seen(self, item: Operation, image: Image) -> Image:
        """``image`` as ``item`` reads it: in memory, if it cannot read it on the chip."""
        if image.hidden >= 0 and not self._reads_there(item):
            return replace(image, hidden=-1)
        return image

    def _readers(self, value: ir.Value) -> list[int]:
        return [n for n, item in enumerate(self.items) if value in item.inputs]

    def _reads_there(self, item: Operation) -> bool:
        if isinstance(item, Product):
            return item.groups == 1 and not any(item.window.pads)
        if isinstance(item, Sum):
            return True
        return isinstance(item, Pool) and (item.window is None or not any(item.window.pads))

    def _gap(self, size: int) -> int | None:
        """The first stretch of ``size`` vectors that nobody holds."""
        at = 0
        for first, end, _ in sorted(self._held):
            if first - at >= size:
                break
            at = max(at, end)
        return at if at + size <= self.spec.hidden_vectors else None


def _size(item: Operation, images: Mapping[ir.Value, Image]) -> tuple[int, int, int]:
    """Height, width and channels of the result."""
    x = images[item.inputs[0]]
    if isinstance(item, Product):
        height, width = item.window.output(x.height, x.width)
        return height, width, item.weights.shape[0]
    if isinstance(item, Pool):
        height, width = item.window.output(x.height, x.width) if item.window else (1, 1)
        return height, width, x.channels
    return x.height, x.width, x.channels
