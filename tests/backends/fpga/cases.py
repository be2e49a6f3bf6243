"""Layers with random numbers, and what they must give: plain loops over int64, nothing of the backend's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from netlathe.backends.fpga import cost
from netlathe.backends.fpga.isa import Instruction
from netlathe.backends.fpga.layers import Builder
from netlathe.backends.fpga.program import link
from netlathe.backends.fpga.spec import PATTERNS, Spec
from netlathe.backends.fpga.tensors import Image, Scale, Window
from netlathe.ir import edit

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Layer:
    """A product: [height, width, channels] to ``out`` channels."""

    size: tuple[int, int]
    channels: int
    out: int
    window: Window = field(default_factory=Window)
    groups: int = 1
    pattern: str = ""
    nibbles: bool = False
    table: bool = False
    raw: bool = False


@dataclass
class Built:
    """A layer's program, memory with its input, and what must come out."""

    builder: Builder
    program: list[Instruction]
    memory: Array
    output: Image
    expected: Array

    def got(self, memory: Array) -> Array:
        """What ``memory`` holds for the output."""
        if self.output.group > 1:
            return self.builder.get_sums(memory, self.output)
        return self.builder.get(memory, self.output)


@contextmanager
def pairs_wherever_they_can() -> Iterator[None]:
    """Whatever the cost says."""
    with pytest.MonkeyPatch.context() as patch:

        def last(ways: Sequence[cost.Layer], name: str) -> tuple[int, tuple[int, int]]:
            return len(ways) - 1, cost.tiling(ways[-1], name)

        patch.setattr(cost, "plan", last)
        yield


def build(layer: Layer, spec: Spec, seed: int) -> Built:
    """With random weights, scales that use the whole range, a zero point of each side, and a bias."""
    rng = np.random.default_rng(seed)
    per = layer.channels // layer.groups
    # Around 0: else a zero point far from it makes most results saturate.
    low, high = (-7, 8) if layer.nibbles else (-127, 128)
    weights = rng.integers(low, high, (layer.out, per, *layer.window.kernel)).astype(np.int8)
    weights.reshape(-1)[0] = low - 1
    if layer.pattern:
        weights = _pruned(weights, layer.pattern)
    spread = (5 if layer.nibbles else 74) * 74 * np.sqrt(per * np.prod(layer.window.kernel)) / 60
    scale = Scale(
        rng.integers(-20000, 20000, layer.out),
        rng.integers(1 << 15, 1 << 16, layer.out),
        np.full(layer.out, int(16 + np.log2(max(2, spread)))) + rng.integers(-1, 2, layer.out),
        int(rng.integers(-128, 128)),
        rng.integers(-128, 128, 256).astype(np.int8) if layer.table else None,
    )
    zero = int(rng.integers(-128, 128))
    builder = Builder(spec)
    x = builder.image(*layer.size, layer.channels)
    y = builder.product(
        "layer",
        x,
        weights,
        scale,
        layer.window,
        groups=layer.groups,
        zero=zero,
        pattern=PATTERNS[layer.pattern] if layer.pattern else None,
        nibbles=layer.nibbles,
        raw=layer.raw,
    )
    memory = builder.memory()
    values = rng.integers(-128, 128, (*layer.size, layer.channels)).astype(np.int8)
    builder.put(memory, x, values)
    sums = convolved(values.astype(np.int64) - zero, weights, layer) + scale.bias
    expected = sums if layer.raw else requantized(sums, scale)
    return Built(builder, link(builder.steps), memory, y, expected)


def in_four_bits(model: ir.Model) -> ir.Model:
    """The same integer graph with weights from -8 to 7: another network, with the same operators."""
    made = model.clone()
    for node in made.graph:
        if node.op_type in ("ConvInteger", "MatMulInteger"):
            weight, codes = node.inputs[1], edit.const_array(node.inputs[1])
            assert weight is not None and codes is not None
            weight.const_value = ir.tensor(codes >> 4, name=weight.name)
    return made


def convolved(x: Array, weights: Array, layer: Layer) -> Array:
    """Sums, int64 [height, width, out]."""
    window, per = layer.window, weights.shape[1]
    top, left, bottom, right = window.pads
    padded = np.pad(x, ((top, bottom), (left, right), (0, 0)))
    height, width = window.output(*layer.size)
    each = layer.out // layer.groups
    made = np.zeros((height, width, layer.out), np.int64)
    for row in range(height):
        for column in range(width):
            for out in range(layer.out):
                first = out // each * per
                r, c = row * window.strides[0], column * window.strides[1]
                for v in range(window.kernel[0]):
                    for h in range(window.kernel[1]):
                        pixel = padded[r + v * window.dilations[0], c + h * window.dilations[1]]
                        taps = weights[out, :, v, h].astype(np.int64)
                        made[row, column, out] += pixel[first : first + per] @ taps
    return made


def requantized(sums: Array, scale: Scale) -> Array:
    """Halves up, in Python's own integers."""
    made = np.empty(sums.shape, np.int8)
    for place in np.ndindex(sums.shape):
        channel = place[-1]
        m, n = int(scale.multiplier[channel]), int(scale.shift[channel])
        value = (int(sums[place]) * m + (1 << (n - 1))) // (1 << n) + scale.zero
        value = max(-128, min(127, value))
        made[place] = value if scale.table is None else scale.table[value + 128]
    return made


def _pruned(weights: Array, name: str) -> Array:
    pattern = PATTERNS[name]
    wide = weights.transpose(0, 2, 3, 1)
    pad = -wide.shape[-1] % pattern.group
    groups = np.pad(wide, ((0, 0),) * 3 + ((0, pad),)).reshape(*wide.shape[:3], -1, pattern.group)
    order = np.argsort(-np.abs(groups.astype(int)), axis=-1, kind="stable")
    np.put_along_axis(groups, order[..., pattern.kept :], 0, axis=-1)
    flat = groups.reshape(*wide.shape[:3], -1)[..., : wide.shape[-1]]
    return np.ascontiguousarray(flat.transpose(0, 3, 1, 2))


SAME = Window((3, 3), pads=(1, 1, 1, 1))
LAYERS = {
    "one token": Layer((1, 1), 200, 24),
    "tokens": Layer((1, 37), 64, 40),
    "deeper than the weights": Layer((1, 2), 4400, 16),
    "a kernel in parts": Layer((3, 3), 520, 8, Window((3, 3))),
    "convolution": Layer((9, 11), 20, 12, SAME),
    "strides, uneven pads": Layer((12, 9), 16, 8, Window((3, 2), (2, 3), (1, 1), (0, 1, 2, 1))),
    "dilated": Layer((9, 9), 8, 8, Window((3, 3), (1, 1), (2, 2), (2, 2, 2, 2))),
    "depthwise": Layer((7, 7), 24, 24, SAME, groups=24),
    "groups across vectors": Layer((4, 4), 24, 36, groups=2),
    "groups within a vector": Layer((4, 4), 12, 12, SAME, groups=3),
    "raw": Layer((1, 30), 48, 20, raw=True),
    "raw image": Layer((5, 6), 16, 16, SAME, raw=True),
    "table": Layer((1, 20), 32, 16, table=True),
    "nibbles": Layer((1, 20), 40, 16, nibbles=True),
    "pairs": Layer((1, 50), 70, 40, nibbles=True),
    "pairs deeper than the weights": Layer((1, 30), 4400, 16, nibbles=True),
    "pairs in parts, raw": Layer((3, 9), 520, 32, Window((3, 3)), nibbles=True, raw=True),
    "pairs in a convolution": Layer((8, 9), 20, 30, SAME, nibbles=True, table=True),
    "pairs, raw": Layer((1, 30), 100, 26, nibbles=True, raw=True),
    "pairs in groups": Layer((5, 5), 48, 64, SAME, groups=2, nibbles=True),
    "2:4": Layer((1, 24), 64, 16, pattern="2:4"),
    "2:4, ragged": Layer((6, 6), 36, 10, SAME, pattern="2:4"),
    "2:4 in nibbles": Layer((1, 9), 64, 8, pattern="2:4", nibbles=True),
}
