"""Convolutions of each core under qemu, ragged and prime, against float64 and integer arithmetic of numpy."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tvm", reason="the tvm extra is not installed")

from netlathe.backends.tvm.arm.artifact import BareArtifact
from netlathe.backends.tvm.arm.cores import CORES
from tests.backends.tvm_arm.arm import Array, kernels_of, model_of, need_emulator
from tests.backends.tvm_arm.test_arm_kernels import ATTRIBUTES, disassembled

RNG = np.random.default_rng(0)
NUMPY = {"float": np.float32, "float16": np.float16, "int8": np.int8, "uint8": np.uint8}
RANGE = {"int8": (-128, 128), "uint8": (0, 256)}


@dataclass(frozen=True)
class Case:
    """Channels in and out, the window, and a plane of two pictures; ``pads`` as ONNX has them."""

    inputs: int
    outputs: int
    kernel: tuple[int, int] = (3, 3)
    plane: tuple[int, int] = (7, 7)
    stride: int = 1
    dilation: int = 1
    pads: tuple[int, int, int, int] = (1, 1, 1, 1)
    groups: int = 1

    @property
    def attributes(self) -> str:
        """As ONNX text."""
        s, d = self.stride, self.dilation
        return (
            f"pads = {list(self.pads)}, strides = [{s}, {s}], dilations = [{d}, {d}],"
            f" group = {self.groups}"
        )

    def expected(self, x: Array, w: Array, zero: int) -> Array:
        """In float64, or int64 of integers."""
        wide = np.float64 if x.dtype.kind == "f" else np.int64
        top, left, bottom, right = self.pads
        border = ((0, 0), (0, 0), (top, bottom), (left, right))
        padded = np.pad(x.astype(wide) - wide(zero), border)
        reach = [(k - 1) * self.dilation + 1 for k in self.kernel]
        views = np.lib.stride_tricks.sliding_window_view(padded, reach, (2, 3))
        s, d = self.stride, self.dilation
        views = views[:, :, ::s, ::s, ::d, ::d]
        parts = [
            np.einsum("bchwij,ocij->bohw", part, weight)
            for part, weight in zip(
                np.split(views, self.groups, 1), np.split(w.astype(wide), self.groups), strict=True
            )
        ]
        return np.concatenate(parts, 1)


CASES = [
    Case(8, 20),
    Case(5, 9, kernel=(2, 3), plane=(6, 8), pads=(1, 0, 0, 2)),
    Case(8, 12, stride=2, groups=2, plane=(9, 10)),
    Case(6, 17, kernel=(1, 1), plane=(5, 5), pads=(0, 0, 0, 0)),
    Case(3, 10, stride=2, plane=(9, 11)),
    Case(8, 12, dilation=2, pads=(2, 2, 2, 2), plane=(9, 9)),
    Case(16, 24, kernel=(1, 1), stride=2, plane=(8, 8), pads=(0, 0, 0, 0)),
    Case(4, 3, pads=(0, 0, 0, 0), plane=(3, 3)),  # one column
    Case(12, 24, groups=3, plane=(5, 4)),
    Case(7, 7, groups=7, plane=(6, 6)),
    Case(6, 6, groups=3, plane=(6, 6)),
    Case(40, 16, plane=(8, 13)),
    Case(8, 60, plane=(3, 12)),  # few columns, many channels
    Case(11, 11, groups=11, stride=2, plane=(6, 9)),
    # Few channels: windows are copied, runs one behind the other.
    Case(3, 20, kernel=(5, 5), stride=2, plane=(11, 13), pads=(2, 2, 2, 2)),
    Case(5, 9, dilation=2, plane=(9, 9), pads=(2, 2, 2, 2)),
    Case(1, 18, plane=(5, 9)),
]
# The largest error, of the RMS: sums of up to 360 products in float32, one after another; in float16 of 64.
BOUNDS = {np.float32: 5e-6, np.float16: 16 * 2**-11}


@dataclass
class Convolutions:
    """One model with every case in float32, float16, int8 and uint8, the last two around 77."""

    cases: list[Case]
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    nodes: list[str] = field(default_factory=list)
    constants: dict[str, Array] = field(default_factory=dict)
    feeds: dict[str, Array] = field(default_factory=dict)
    expected: dict[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for number, case in enumerate(self.cases):
            for kind in NUMPY:
                self._add(f"{kind}_{number}", case, kind)

    def _add(self, name: str, case: Case, kind: str) -> None:
        shape = (2, case.inputs, *case.plane)
        sizes = (case.outputs, case.inputs // case.groups, *case.kernel)
        floats = kind.startswith("float")
        x: Array
        w: Array
        if floats:
            x, w, zero = RNG.normal(size=shape), RNG.normal(size=sizes), 0
        else:
            x, w = RNG.integers(*RANGE[kind], shape), RNG.integers(-128, 128, sizes)
            zero = 77
            self.constants[f"{name}z"] = np.array(zero, NUMPY[kind])
            self.inputs.append(f"{kind} {name}z")
        x = self.feeds[f"{name}x"] = x.astype(NUMPY[kind])
        w = self.constants[f"{name}w"] = w.astype(NUMPY[kind] if floats else np.int8)
        self.inputs.append(f"{kind}{list(shape)} {name}x")
        self.inputs.append(f"{kind if floats else 'int8'}{list(sizes)} {name}w")
        y = self.expected[f"{name}y"] = case.expected(x, w, zero)
        self.outputs.append(f"{kind if floats else 'int32'}{list(y.shape)} {name}y")
        call = f"Conv<{case.attributes}>({name}x, {name}w)"
        if not floats:
            call = f"ConvInteger<{case.attributes}>({name}x, {name}w, {name}z)"
        self.nodes.append(f"{name}y = {call}")

    def built(self, core: str) -> BareArtifact:
        """Compiled for a core."""
        graph = f"g ({', '.join(self.inputs)}) => ({', '.join(self.outputs)})"
        model = model_of(f"{graph} {{ {' '.join(self.nodes)} }}", **self.constants)
        return BareArtifact(model, CORES[core], "convolutions")


SCHEDULES = {
    "cortex-a72": {"neon_float32", "neon_float32_conv"},
    "neoverse-n1": {"neon_dot", "neon_dot_conv"},
    "neoverse-v1": {"neon_matrix", "neon_matrix_conv"},
}
for _core in ("neoverse-n1", "neoverse-v1"):
    SCHEDULES[_core] |= SCHEDULES["cortex-a72"] | {"neon_float16", "neon_float16_conv"}


@pytest.mark.parametrize(
    ("core", "count"),
    [
        ("neoverse-v1", 4),
        pytest.param("neoverse-v1", None, marks=pytest.mark.slow),
        pytest.param("neoverse-n1", None, marks=pytest.mark.slow),
        pytest.param("cortex-a72", None, marks=pytest.mark.slow),
    ],
)
def test_convolutions(core: str, count: int | None) -> None:
    """Each kind has its own kernel; integers are exact."""
    need_emulator()
    made = Convolutions(CASES[:count])
    artifact = made.built(core)
    assert SCHEDULES[core] <= kernels_of(artifact)
    actual = artifact.run(made.feeds)
    for name, expected in made.expected.items():
        if actual[name].dtype == np.int32:
            np.testing.assert_array_equal(actual[name], expected, name)
            continue
        error = np.abs(actual[name] - expected).max()
        bound = BOUNDS[actual[name].dtype.type]
        assert error <= bound * np.sqrt(np.mean(np.square(expected))), name


@pytest.mark.slow
@pytest.mark.parametrize("core", ["neoverse-v1", "neoverse-n1"])
def test_what_lies_beside_a_window_is_no_part_of_it(core: str) -> None:
    """Registers of floats never read on into a neighbour that is infinite."""
    need_emulator()
    x = RNG.normal(size=(1, 5, 6, 6)).astype(np.float32)
    x[0, :, 5, 5] = np.inf
    w = RNG.normal(size=(9, 5, 3, 3)).astype(np.float32)
    text = (
        "g (float[1, 5, 6, 6] x, float[9, 5, 3, 3] w) => (float[1, 9, 4, 4] y) { y = Conv(x, w) }"
    )
    y = BareArtifact(model_of(text, w=w), CORES[core], "model").run({"x": x})["y"]
    finite = np.isfinite(y)
    assert finite.sum() == 9 * 15 and not finite[0, :, 3, 3].any()


@pytest.mark.slow
@pytest.mark.parametrize("core", ["neoverse-v1", "neoverse-n1", "cortex-a72"])
def test_no_instruction_beyond_the_core(core: str, tmp_path: Path) -> None:
    """As the core reads them, no instruction of the convolutions is unknown."""
    text = disassembled(Convolutions(CASES[:4]).built(core), ATTRIBUTES[core], tmp_path)
    assert "fmla" in text and "<unknown>" not in text
