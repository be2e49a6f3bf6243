"""Layers on the instruction set's model, against plain loops."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netlathe.backends.fpga.layers import Builder
from netlathe.backends.fpga.model import Machine
from netlathe.backends.fpga.program import link
from netlathe.backends.fpga.spec import Spec
from netlathe.backends.fpga.tensors import Image, Scale, Window
from netlathe.diagnostics import LowerError
from netlathe.execute import ort
from netlathe.passes.quantize.integer import multiplier_and_shift
from tests.backends.fpga.cases import LAYERS, Layer, build, pairs_wherever_they_can, requantized

SMALL = Spec()
WIDE = Spec(rows=16, columns=8, patterns=("2:4", "4:8", "1:4"))
LONG = Spec(rows=16, columns=16, beat_bytes=16, patterns=("4:8",))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("spec", [SMALL, WIDE], ids=["8x8", "16x8"])
def test_layers_are_exact(name: str, spec: Spec) -> None:
    built = build(LAYERS[name], spec, seed=len(name))
    Machine(spec, built.memory).run(built.program)
    np.testing.assert_array_equal(built.got(built.memory), built.expected)


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    kernel = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    dilations = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    span = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    pads = draw(st.tuples(*(st.integers(0, 2) for _ in range(4))))
    size = (draw(st.integers(span[0], 9)), draw(st.integers(span[1], 9)))
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    pattern = draw(st.sampled_from(["", "4:8"])) if groups == 1 else ""
    return Layer(
        size,
        groups * draw(st.integers(1, 20)),
        groups * draw(st.integers(1, 20)),
        Window(kernel, draw(st.tuples(st.integers(1, 3), st.integers(1, 3))), dilations, pads),
        groups,
        pattern,
        draw(st.booleans()),
        draw(st.booleans()),
    )


@given(layers(), st.sampled_from([WIDE, LONG]), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_any_layer_is_exact(layer: Layer, spec: Spec, seed: int) -> None:
    built = build(layer, spec, seed)
    Machine(spec, built.memory).run(built.program)
    np.testing.assert_array_equal(built.got(built.memory), built.expected)


@given(layers(), st.sampled_from([SMALL, WIDE, LONG]), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_any_layer_of_pairs_is_exact(layer: Layer, spec: Spec, seed: int) -> None:
    """By twos even where that does not pay; a step alone is not done by twos."""
    plain = replace(layer, nibbles=True, pattern="")
    with pairs_wherever_they_can():
        built = build(plain, spec, seed)
    steps = math.prod(plain.window.kernel) * -(-plain.channels // spec.rows)
    assert built.builder.reports[-1].paired == (steps > 1) or plain.groups > 1
    Machine(spec, built.memory).run(built.program)
    np.testing.assert_array_equal(built.got(built.memory), built.expected)


def test_sums_and_pools_are_exact() -> None:
    rng = np.random.default_rng(3)
    spec, builder = SMALL, Builder(SMALL)
    a, b = (builder.image(20, 19, 21) for _ in range(2))
    scale = Scale(np.array([-70000]), np.array([1]), np.array([16]), 7)
    total = builder.add("add", [(a, 40000), (b, 23456)], scale)
    pooled = builder.pool(
        "max",
        total,
        Window((3, 2), (2, 2), (1, 1), (1, 0, 1, 1)),
        Scale(np.array([0]), np.array([2]), np.array([1])),
        maximum=True,
        zero=-128,
    )
    mean = builder.pool(
        "mean",
        pooled,
        Window((pooled.height, pooled.width)),
        Scale(np.array([-7 * 100]), np.array([41000]), np.array([22]), 3),
        maximum=False,
        zero=0,
    )
    memory = builder.memory()
    values = [rng.integers(-128, 128, (20, 19, 21)).astype(np.int8) for _ in range(2)]
    for image, held in zip((a, b), values, strict=True):
        builder.put(memory, image, held)
    Machine(spec, memory).run(link(builder.steps))
    wide = [v.astype(np.int64) for v in values]
    sums = 40000 * wide[0] + 23456 * wide[1] - 70000
    shape = np.ones(21, np.int64)
    expected = requantized(sums, Scale(0 * shape, shape, 16 * shape, 7))
    np.testing.assert_array_equal(builder.get(memory, total), expected)
    padded = np.pad(expected, ((1, 1), (0, 1), (0, 0)), constant_values=-128)
    most = np.stack(
        [padded[v : v + 20 : 2, h : h + 19 : 2][:10, :10] for v in range(3) for h in range(2)]
    ).max(0)
    np.testing.assert_array_equal(builder.get(memory, pooled), most)
    sums = most.astype(np.int64).sum((0, 1), keepdims=True) - 700
    expected = requantized(sums, Scale(0 * shape, 41000 * shape, 22 * shape, 3))
    np.testing.assert_array_equal(builder.get(memory, mean), expected)


def _one(weights: np.ndarray, channels: int, spec: Spec = SMALL, bias: int = 0) -> None:
    builder = Builder(spec)
    out = weights.shape[0]
    scale = Scale(np.full(out, bias), np.full(out, 1 << 15), np.full(out, 20))
    builder.product("wide", builder.image(1, 1, channels), weights, scale)


def test_a_sum_that_can_leave_32_bits_is_refused() -> None:
    weights = np.full((9, 64, 1, 1), 127, np.int8)
    _one(weights, 64, bias=2**31 - 127 * 64 * 128 - 1)
    with pytest.raises(LowerError, match=r"wide: the sum of output channel 0 can reach 2147483648"):
        _one(weights, 64, bias=2**31 - 127 * 64 * 128)


def test_a_layer_beyond_the_scratchpads_is_refused_with_the_numbers() -> None:
    weights = np.ones((8, 70000, 1, 1), np.int8)
    with pytest.raises(
        LowerError, match=r"take 70000 bytes; half of the input scratchpad is 32768"
    ):
        _one(weights, 70000)


def test_patterns_that_the_core_lacks_are_refused() -> None:
    layer = Layer((1, 4), 64, 8, pattern="1:4")
    with pytest.raises(LowerError, match=r"no 1:4; it has 2:4"):
        build(layer, SMALL, 0)


def _float_scaled(sums: np.ndarray, ratio: float, zero: int) -> np.ndarray:
    """What a runtime makes of sums in float32: a product with the scale, and QuantizeLinear by 1."""
    text = """
        <ir_version: 10, opset_import: ["": 21]>
        g (int32[n] acc, float ratio, int8 zero) => (int8[n] y) {
            wide = Cast<to=1>(acc)
            scaled = Mul(wide, ratio)
            one = Constant<value_float=1.0>()
            y = QuantizeLinear(scaled, one, zero)
        }"""
    model = ir.serde.deserialize_model(onnx.parser.parse_model(text))
    feeds = {"acc": sums, "ratio": np.float32(ratio), "zero": np.int8(zero)}
    return ort.run(model, {name: np.asarray(array) for name, array in feeds.items()})["y"]


@given(st.floats(1e-6, 0.5), st.integers(-128, 127), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_a_layer_is_within_a_step_of_float_scales(ratio: float, zero: int, seed: int) -> None:
    """Sums over the whole range of the output and beyond, on the core's model and in ONNX Runtime."""
    rng = np.random.default_rng(seed)
    rows = 96
    multiplier, shift = (int(a) for a in multiplier_and_shift(np.array(ratio)))
    builder = Builder(SMALL)
    weights = np.eye(8, dtype=np.int8)[:, :, None, None]  # a sum is its bias, and a code at most
    bias = rng.integers(-140, 140, 8) / ratio
    ones = np.ones(8, np.int64)
    scale = Scale(bias.astype(np.int64), multiplier * ones, shift * ones, zero)
    y = builder.product("layer", builder.image(1, rows, 8), weights, scale)
    x = rng.integers(-128, 128, (1, rows, 8)).astype(np.int8)
    memory = builder.memory()
    builder.put(memory, Image(0, 1, rows, 8, 1), x)
    Machine(SMALL, memory).run(link(builder.steps))
    got = builder.get(memory, y).reshape(-1).astype(int)
    sums = (x.astype(np.int64) + scale.bias).reshape(-1)
    apart = np.abs(got - _float_scaled(sums.astype(np.int32), ratio, zero))
    assert apart.max() <= 1
    exact = sums * ratio
    # 0.004 of a step for the multiplier, and what float32 loses of numbers up to 140.
    near_a_half = np.abs(exact - np.floor(exact) - 0.5) < 0.006
    assert not apart[~near_a_half].any()
