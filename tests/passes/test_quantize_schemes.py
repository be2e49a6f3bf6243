"""Every scheme against formulas in float64: codes, scales, bytes, and what two runtimes read."""

from __future__ import annotations

import itertools
import math
from typing import Any

import ml_dtypes
import numpy as np
import onnx.reference
import onnx_ir as ir
import pytest

from netlathe.analysis.cost import cost
from netlathe.backends import opset as opsets
from netlathe.diagnostics import GateError, OptionError, PassError
from netlathe.execute import ort
from netlathe.execute.compare import inputs_of
from netlathe.execute.executor import Executor
from netlathe.ir import normal, verify, weights
from netlathe.passes.quantize import Quantize
from netlathe.passes.quantize.graph import to_planes
from netlathe.pipeline import text
from netlathe.pipeline.ledger import Entry
from netlathe.pipeline.pass_ import Context
from tests.ir.onnx_text import feeds, matrix, model

Array = np.ndarray[Any, np.dtype[Any]]
SIZES = ({"b": 2, "s": 5}, {"b": 3, "s": 8})
INTEGERS = ["int8", "int6", "int5", "int4", "int3", "int2"]
OTHERS = ["nf4", "float8e4m3fn", "float8e5m2", "float16", "bfloat16"]


def settled(inputs: str, body: str, **constants: Any) -> ir.Model:
    made = model(inputs, "float y", body, **constants)
    normal.normalize(made)
    return made


def product(w: Array) -> ir.Model:
    return settled(f"float[b,s,{w.shape[0]}] x", "y = MatMul (x, w)", w=w)


def checked(before: ir.Model, pass_: Quantize) -> tuple[ir.Model, list[Entry]]:
    """Quantize; ONNX Runtime and our executor must read what the reference holds, bit for bit."""
    chosen = pass_.choose(before, Context())
    after = before.clone()
    pass_.edit(after, chosen, Context())
    normal.normalize(after)
    assert verify.verify(after) == []
    reference = pass_.simulate(before.clone(), chosen)
    for seed, sizes in enumerate(SIZES):
        fed = feeds(before, sizes, seed)
        expected = ort.run(reference.model, inputs_of(before, fed))["y"]
        assert np.array_equal(ort.run(after, inputs_of(after, fed))["y"], expected)
        wanted = Executor(reference.model).run(fed)["y"].numpy()
        assert np.array_equal(Executor(after).run(fed)["y"].numpy(), wanted)
    assert cost(after).macs == cost(before).macs
    if not is_by_hand(pass_):  # tables, scales and zero points are floats like others there
        assert cost(after).params == cost(before).params
    return after, chosen


def is_by_hand(pass_: Quantize) -> bool:
    return pass_.weights in ("nf4", "codebook4", "codebook3", "codebook2") or pass_.zeros == "float"


def read(after: ir.Model, name: str = "w") -> Array:
    """The weight as the executor makes it of what is stored."""
    value = next(v for n in after.graph for v in n.outputs if v.name == name)
    probe = after.clone()
    fed = feeds(after, SIZES[0])
    return np.asarray(Executor(probe).run(fed, [value.name or ""])[name].numpy())


# -- the numbers ------------------------------------------------------------------------------------


def groups_of(w: Array, size: int) -> Array:
    """Columns of [k, n] cut into groups along k: [n, k/size, size]."""
    return w.T.reshape(w.shape[1], -1, size or w.shape[0]).astype(np.float64)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [0, 16, 32])
@pytest.mark.parametrize("name", INTEGERS)
def test_integers_are_nearest_multiples(name: str, group: int, symmetric: bool) -> None:
    w = matrix(64, 6) * np.float32(0.05)
    options = {"weights": name, "group_size": group, "symmetric": symmetric}
    after, (entry,) = checked(product(w), Quantize(min_size=0, **options))
    made, wide = groups_of(read(after), group), groups_of(w, group)
    bits = int(name[3:])
    if symmetric and bits == 8:
        step = np.abs(wide).max(-1) / 127
    elif symmetric:
        step = np.abs(wide).max(-1) / 2 ** (bits - 1)
    else:
        step = (np.maximum(wide.max(-1), 0) - np.minimum(wide.min(-1), 0)) / (2**bits - 1)
    step = step[..., None]
    # All are multiples of the scale; float32 rounds the scale and each multiple once, 2**-24 each.
    units = made / step
    assert np.abs(units - np.rint(units)).max() <= 2**bits * 2 * 2.0**-24
    # Each is the nearest, but where the range ends: symmetric codes have one less on the short side, and a
    # zero point that is rounded cuts half a step off.
    clipped = 1.0 if bits < 8 or not symmetric else 0.5
    error = np.abs(made - wide) / step
    assert error.max() <= clipped + 2**bits * 2.0**-23
    assert np.mean(error <= 0.5 + 2**bits * 2.0**-23) >= 0.85
    span = np.rint(units).max(-1) - np.rint(units).min(-1)
    assert span.max() <= 2**bits - 1
    assert entry.detail["scales"] == 6 * (64 // (group or 64))


@pytest.mark.parametrize("group", [0, 32])
def test_nf4_takes_the_nearest_of_its_table(group: int) -> None:
    w = matrix(64, 6)
    after, _ = checked(product(w), Quantize(min_size=0, weights="nf4", group_size=group))
    made, wide = groups_of(read(after), group), groups_of(w, group)
    most = np.abs(wide).max(-1, keepdims=True)
    # bitsandbytes' table, in as many digits as the paper prints.
    table = np.array(
        [
            -1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0,
            0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1,
        ]
    )  # fmt: skip
    nearest = np.abs(wide[..., None] / most[..., None] - table).min(-1)
    assert np.abs(np.abs(made - wide) / most - nearest).max() <= 1e-4  # digits of the table
    assert np.abs(made / most).max() == 1.0


@pytest.mark.parametrize("name, largest", [("float8e4m3fn", 448), ("float8e5m2", 57344)])
@pytest.mark.parametrize("group", [0, 16])
def test_small_floats_are_the_nearest(name: Any, largest: float, group: int) -> None:
    w = matrix(64, 6)
    after, _ = checked(product(w), Quantize(min_size=0, weights=name, group_size=group))
    made, wide = groups_of(read(after), group), groups_of(w, group)
    scale = (np.abs(wide).max(-1, keepdims=True) / largest).astype(np.float32)
    every = np.arange(256, dtype=np.uint8).view(
        getattr(ml_dtypes, name.replace("float8", "float8_"))
    )
    numbers = every.astype(np.float64)
    numbers = numbers[np.isfinite(numbers)]
    distance = np.abs((wide / scale)[..., None] - numbers).min(-1)
    assert np.allclose(
        np.abs(made / scale - wide / scale), distance, rtol=0, atol=largest * 2.0**-23
    )


def e2m1(x: Array) -> Array:
    """The nearest of the numbers that a sign, two bits of exponent and one of mantissa make; ties to even."""
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    distance = np.abs(np.abs(x)[..., None] - table)
    tie = distance == distance.min(-1, keepdims=True)
    even = tie & (np.arange(8) % 2 == 0)  # the last bit of the code
    at = np.where(even.any(-1), even.argmax(-1), tie.argmax(-1))
    return np.asarray(np.copysign(table[at], x))


@pytest.mark.parametrize("name, group", [("float4e2m1", 32), ("mxfp4", 0), ("nvfp4", 0)])
def test_four_bit_floats(name: Any, group: int) -> None:
    w = matrix(64, 6) * np.float32(0.3)
    w[:32, 0] = 0  # a group of zeros
    w[0, 1] = 2.0**3  # a power of two at the top
    after, _ = checked(product(w), Quantize(min_size=0, weights=name, group_size=group))
    size = {"mxfp4": 32, "nvfp4": 16}.get(name, group)
    wide = groups_of(w, size)
    most = np.abs(wide).max(-1, keepdims=True)
    if name == "mxfp4":
        scale = np.array([2.0 ** (math.floor(math.log2(m)) - 2) if m else 1.0 for m in most.flat])
        scale = scale.reshape(most.shape)
    elif name == "nvfp4":
        whole = np.float32(np.abs(w).max() / (6 * 448))
        small = (most / 6 / whole).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
        scale = np.where(most > 0, small * whole, 1.0).astype(np.float32)
    else:
        scale = np.where(most > 0, most / 6, 1.0).astype(np.float32)
    clipped = np.clip(wide / scale, -6, 6)
    made = groups_of(read(after), size)
    assert np.array_equal(made, (e2m1(clipped) * scale).astype(np.float32))
    # The form that is exchanged, judged by ONNX: its reference evaluator reads the same weight.
    fed = feeds(after, SIZES[0])
    proto = ir.to_proto(after)
    (judged,) = onnx.reference.ReferenceEvaluator(proto).run(["w"], fed)
    assert np.array_equal(np.asarray(judged), read(after))
    stored = {v.dtype for v in after.graph.initializers.values()}
    assert ir.DataType.FLOAT4E2M1 in stored
    assert (ir.DataType.FLOAT8E8M0 in stored) == (name == "mxfp4")
    assert (ir.DataType.FLOAT8E4M3FN in stored) == (name == "nvfp4")


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_half_formats_are_casts(name: Any) -> None:
    w = matrix(64, 6)
    after, (entry,) = checked(product(w), Quantize(min_size=0, weights=name))
    dtype = np.float16 if name == "float16" else ml_dtypes.bfloat16
    assert np.array_equal(read(after), w.astype(dtype).astype(np.float32))
    assert (entry.reason, entry.detail["bytes"]) == (name, 2 * w.size)


@pytest.mark.parametrize("clip", ["percentile", "mse"])
@pytest.mark.parametrize("name", ["int8", "int4", "int2", "nf4", "float8e4m3fn", "float4e2m1"])
def test_clipped_ranges(name: str, clip: str) -> None:
    w = matrix(64, 6).astype(np.float64) ** 3
    made = {}
    for how in ("none", clip):
        pass_ = Quantize(min_size=0, weights=name, clip=how, group_size=32, percentile=90.0)  # type: ignore[arg-type]
        after, _ = checked(product(w.astype(np.float32)), pass_)
        made[how] = read(after)
    error = {how: np.square(groups_of(v - w, 32)).sum(-1) for how, v in made.items()}
    if clip == "mse":
        assert (error["mse"] <= error["none"] + 1e-12).all() and error["mse"].sum() < error[
            "none"
        ].sum()
    else:
        inner = np.abs(np.percentile(groups_of(w, 32), [10, 90], axis=-1)).max(0)
        most = np.abs(groups_of(made["percentile"], 32)).max(-1)
        assert (most <= inner * (1 + 2.0**-9)).all(), "as far as the percentile, and a rounded step"


def test_a_scale_search_finds_the_best_of_a_fine_grid() -> None:
    w = matrix(16, 4, seed=3)
    after, _ = checked(product(w), Quantize(min_size=0, weights="int3", clip="mse"))
    mine = np.square(read(after).astype(np.float64) - w).sum(0)
    for n in range(4):
        column = w[:, n].astype(np.float64)
        grid = np.concatenate([np.linspace(0.02, 1.2, 4000), -np.linspace(0.02, 1.2, 4000)])
        scale = (grid * np.abs(column).max() / 4)[:, None]
        best = np.square(np.clip(np.rint(column / scale), -4, 3) * scale - column).sum(1).min()
        assert mine[n] <= 1.02 * best  # the search goes in steps of 1 % and fits what it finds


# -- layouts, readers and storage ---------------------------------------------------------------------

SCHEMES = [
    {"weights": "int4", "group_size": 16},
    {"weights": "int4", "group_size": 16, "symmetric": False, "scales": "float16"},
    {"weights": "int3", "group_size": 16, "symmetric": False},
    {"weights": "int3", "scales": "float16"},
    {"weights": "int8", "per_tensor": True},
    {"weights": "int6", "per_tensor": True, "symmetric": False},
    {"weights": "nf4", "group_size": 16},
    {"weights": "nf4", "per_tensor": True, "scales": "float16"},
    {"weights": "codebook4"},
    {"weights": "codebook3", "group_size": 16, "scales": "bfloat16"},
    {"weights": "codebook2", "group_size": 16},
    {"weights": "int4", "group_size": 16, "symmetric": False, "zeros": "float", "scales": "float16"},
    {"weights": "int2", "symmetric": False, "zeros": "float", "clip": "hqq"},
    {"weights": "float8e4m3fn", "scales": "bfloat16"},
    {"weights": "float8e5m2", "group_size": 16},
    {"weights": "bfloat16"},
    {"weights": "float4e2m1", "group_size": 16, "scales": "float16"},
    {"weights": "mxfp4"},
    {"weights": "nvfp4"},
]  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_schemes_reach_every_reader(scheme: dict[str, Any]) -> None:
    pass_ = Quantize(min_size=0, **scheme)
    checked(settled("float[b,32,s] x", "y = MatMul (w, x)", w=matrix(6, 32)), pass_)
    checked(settled("float[b,3,s,32] x", "y = MatMul (x, w)", w=matrix(3, 32, 6)), pass_)
    checked(settled("float[b,4,9,s] x", "y = Conv (x, w)", w=matrix(6, 4, 4, 4)), pass_)
    for ids in ("int64[b,s]", "int64[b]", "int64"):
        checked(settled(f"{ids} i", "y = Gather (w, i)", w=matrix(9, 32)), pass_)
    body = "e = Gather (w, i) n = Neg (e) t = Transpose <perm=[1,0]> (w) y = MatMul (n, t)"
    _, (entry,) = checked(settled("int64[b,s] i", body, w=matrix(9, 32)), pass_)
    assert entry.status == "applied"


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_bytes_are_the_arithmetic(scheme: dict[str, Any]) -> None:
    w = matrix(128, 48)
    pass_ = Quantize(min_size=0, **scheme)
    after, (entry,) = checked(product(w), pass_)
    name = scheme["weights"]
    bits = {"float8e4m3fn": 8, "float8e5m2": 8, "bfloat16": 16}.get(name, 4)
    bits = int(name[-1]) if name.startswith(("int", "codebook")) else bits
    size: int = {"mxfp4": 32, "nvfp4": 16}.get(name) or scheme.get("group_size", 128)
    groups = 1 if scheme.get("per_tensor") else 48 * 128 // size
    one = (
        1
        if name in ("mxfp4", "nvfp4")
        else 0
        if bits == 16
        else 2
        if scheme.get("scales", "")[-2:] == "16"
        else 4
    )
    zero = 8 * one if scheme.get("zeros") == "float" else 4 if bits <= 4 else 8
    zeros = 0 if scheme.get("symmetric", True) else math.ceil(groups * zero / 8)
    wanted = 128 * 48 * bits // 8 + groups * one + zeros + 4 * (name == "nvfp4")
    if name.startswith("codebook"):
        wanted += 4 * 2**bits
    assert entry.detail["bytes"] == wanted
    # What stands beside it (shapes, the table of nf4, the positions of bits) does not grow with it.
    assert 0 <= weights.num_bytes(after) - wanted <= 128


def test_planes_hold_the_codes() -> None:
    for bits, size in itertools.product((2, 3, 5, 6), (1, 8, 21)):
        codes = np.random.default_rng(bits).integers(-(1 << bits - 1), 1 << bits - 1, size)
        planes = to_planes(codes.astype(np.int8), bits, -(1 << bits - 1))
        assert planes.shape == (bits, math.ceil(size / 8), 1)
        again = sum(
            (int(planes[i, n // 8, 0]) >> n % 8 & 1) << i for i in range(bits) for n in [size - 1]
        )
        assert again - (1 << bits - 1) == codes[-1]


@pytest.mark.parametrize("opset", [18, 21, 24, 25])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_every_opset(scheme: dict[str, Any], opset: int) -> None:
    before = product(matrix(64, 32))
    after, _ = checked(before, Quantize(min_size=0, **scheme))
    fed = feeds(before, SIZES[0])
    expected = ort.run(after, fed)["y"]
    lowered = after.clone()
    if opsets.gaps(after, opset):
        name = scheme["weights"]
        packed_zeros = name == "int3" and not scheme.get("symmetric", True)  # in UINT4
        since = {"float4e2m1": 23, "nvfp4": 23, "mxfp4": 24}.get(name, 21)
        assert opset < since and ("float8" in name or "4" in name or packed_zeros), (
            "types came later"
        )
        return
    opsets.lower(lowered, opset)
    assert np.abs(ort.run(lowered, fed)["y"] - expected).max() <= 1e-5 * np.abs(expected).max()
    # By default ONNX Runtime rounds x to 8 bits in front of 4-bit weights: 1/254 of its largest each,
    # sqrt(64) of them in a sum, which is as large as sqrt(64) products.
    fast = ort.run(lowered, fed, optimize=True)["y"]
    assert (
        np.abs(fast - expected).max() <= 4 * np.abs(fed["x"]).max() / 254 * np.abs(expected).max()
    )


# -- what cannot be ---------------------------------------------------------------------------------


def test_groups_that_do_not_divide_are_skipped_with_an_offer() -> None:
    (entry,) = Quantize(min_size=0, weights="int4", group_size=128).choose(
        product(matrix(576, 4)), Context()
    )
    assert (entry.status, entry.reason) == (
        "skipped",
        "groups of 128 do not divide the 576 elements that are summed over;"
        " group_size=64, 32, 16 would",
    )
    (entry,) = Quantize(min_size=0, weights="int4", group_size=16).choose(
        product(matrix(9, 4)), Context()
    )
    assert entry.reason.endswith("no power of 2 does")
    (entry,) = Quantize(min_size=0, weights="mxfp4").choose(product(matrix(48, 4)), Context())
    assert entry.reason.endswith("48 elements that are summed over; mxfp4 has no others")


def test_coverage_that_is_asked_for() -> None:
    before = settled(
        "float[b,s,576] x",
        "h = MatMul (x, w) y = MatMul (h, v)",
        w=matrix(576, 64),
        v=matrix(64, 64, seed=1),
    )
    pass_ = Quantize(weights="int4", group_size=64, min_coverage=1.0)
    assert {e.status for e in pass_.choose(before, Context())} == {"applied"}
    with pytest.raises(GateError) as caught:
        Quantize(weights="int4", group_size=128, min_coverage=0.5).choose(before, Context())
    assert "0.0% of the weights' elements" in str(caught.value)
    assert "w is skipped: groups of 128 do not divide" in str(caught.value)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"weights": "nf4", "symmetric": False}, "nf4 has no zero points"),
        ({"weights": "float16", "group_size": 32}, "float16 has no scales"),
        ({"weights": "int4", "group_size": 32, "per_tensor": True}, "has no groups"),
        ({"weights": "int4", "group_size": 20}, "no multiple of 8"),
        ({"zeros": "float"}, "give symmetric=False as well"),
        ({"group_axis": "output"}, "give group_size as well"),
        ({"weights": "codebook2", "codebook": (0.0, 1.0)}, "has 4 numbers"),
        ({"weights": "codebook2", "codebook": (-1.0, 0.5, 0.0, 1.0)}, "does not ascend"),
        ({"weights": "int2", "codebook": (-1.0, 0.0, 0.5, 1.0)}, "numbers of its own"),
        ({"symmetric": False, "clip": "hqq"}, "those that are codes would come back"),
        ({"weights": "mxfp4", "group_size": 64}, "a float8e8m0 scale for 32 elements"),
        ({"weights": "nvfp4", "scales": "float16"}, "a float8e4m3fn scale for 16 elements"),
        ({"overrides": {"w": {"weights": "nf4", "symmetric": False}}}, "nf4 has no zero points"),
    ],
)
def test_settings_that_contradict_each_other(options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        Quantize(min_size=0, **options).choose(product(matrix(64, 8)), Context())


def test_overrides() -> None:
    before = settled(
        "float[b,s,64] x",
        "h = MatMul (x, w) y = MatMul (h, v)",
        w=matrix(64, 64),
        v=matrix(64, 64, seed=1),
    )
    (pass_,) = text.parse(
        'quantize(weights="int4", group_size=32, overrides={"v": {"weights": "int8", "group_size": 0}})'
    )
    assert isinstance(pass_, Quantize)
    assert text.parse(str(pass_)) == [pass_]
    _, chosen = checked(before, pass_)
    assert [e.detail["weights"] for e in chosen] == ["int4", "int8"]
    assert [e.detail["scales"] for e in chosen] == [128, 64]
    with pytest.raises(PassError, match="overrides='u' matches no weight"):
        Quantize(overrides={"u": {"weights": "int4"}}).choose(before, Context())
    with pytest.raises(OptionError, match="overrides"):
        text.parse('quantize(overrides={"w": {"weight": "int4"}})')


def test_vectors_in_half_precision() -> None:
    body = (
        "a = MatMul (x, w) b = Add (a, bias) n = LayerNormalization <axis = -1> (b, scale, shift)"
    )
    half = matrix(16, seed=3).astype(np.float16).astype(np.float32)
    before = settled(
        "float[b,16] x",
        body + " y = Identity (n)",
        w=matrix(16, 16),
        bias=matrix(16, seed=1),
        scale=half,
        shift=np.full(16, 1e5, np.float32),
    )
    after, chosen = checked(before, Quantize(min_size=0, vectors="float16"))
    by_name = {entry.candidate: entry for entry in chosen}
    assert "none of 16" in by_name["scale"].reason, "it was float16 before"
    assert by_name["bias"].status == "applied" and "none" not in by_name["bias"].reason
    assert by_name["shift"].status == "refused" and "too much" in by_name["shift"].reason
    assert np.array_equal(read(after, "bias"), matrix(16, seed=1).astype(np.float16))
    held = {v.dtype for n, v in after.graph.initializers.items() if "scale" in n or "bias" in n}
    assert ir.DataType.FLOAT16 in held
    with pytest.raises(OptionError, match="leave it out"):
        Quantize(vectors="float16", correct_bias=True).choose(before, Context())
