"""Attention for GPUs: what takes which node, what it is told of masks and caches, and that it compiles."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import sympy
import torch

pytest.importorskip("tvm", reason="the tvm extra is not installed")

from tvm import tirx

from netlathe.backends.tvm.cuda import decode, decode_merged, flash, flash_hopper
from netlathe.backends.tvm.cuda.artifact import CudaArtifact
from netlathe.backends.tvm.cuda.machine import ARCHITECTURES, gpu
from netlathe.backends.tvm.kernel import SCHEDULE
from netlathe.backends.tvm.kernels.attention import Spec
from netlathe.backends.tvm.lowering import Lowering
from netlathe.frontends.huggingface import HuggingFaceDirectory
from netlathe.ir import normal
from netlathe.passes.convert import Convert
from netlathe.passes.quantize_cache import QuantizeCache
from netlathe.pipeline.pass_ import Context
from netlathe.pipeline.run import run
from tests import zoo
from tests.backends.cuda.test_cuda_compile import _has_nvcc, resources

QKV = "bfloat16[b,8,s,64] q, bfloat16[b,2,t,64] k, bfloat16[b,2,t,64] v"
FAMILIES = [("sm_80", "sm_89"), ("sm_90a",)]
needs_nvcc = pytest.mark.skipif(not _has_nvcc(), reason="nvcc is not installed")

# key j <= query i + (keys - queries), as a comparison of two ranges
SEEN = """
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    sizes = Shape <start = 2, end = 3> (q)
    queries = Squeeze (sizes)
    places = Shape <start = 2, end = 3> (k)
    keys = Squeeze (places)
    past = Sub (keys, queries)
    own = Range (zero, queries, one)
    at = Add (own, past)
    axes = Constant <value_ints = [0, 1, 3]> ()
    row = Unsqueeze (at, axes)
    every = Range (zero, keys, one)
    others = Constant <value_ints = [0, 1, 2]> ()
    column = Unsqueeze (every, others)
    seen = LessOrEqual (column, row)
"""


def graph(
    body: str = "y = Attention <is_causal = 1> (q, k, v)", inputs: str = QKV, output: str = ""
) -> ir.Model:
    made = ir.from_onnx_text(
        f'<ir_version: 11, opset_import: ["" : 25]> g ({inputs}) =>'
        f" ({output or 'bfloat16[b,8,s,64] y'}) {{ {body} }}"
    )
    normal.normalize(made)
    return made


def schedules(model: ir.Model, archs: Sequence[str] = ("sm_90a",)) -> set[str]:
    """The schedules of every kernel that a model is lowered to."""
    lowered = Lowering(model, gpu(archs)).run()
    return {
        str(function.attrs[SCHEDULE])
        for _, function in lowered.module.functions_items()
        if isinstance(function, tirx.PrimFunc) and SCHEDULE in function.attrs
    }


@pytest.fixture
def specs(monkeypatch: pytest.MonkeyPatch) -> list[Spec]:
    """What the kernels on tensor cores are asked for, in order."""
    found: list[Spec] = []
    known = flash.attention

    def attention(kernel: Any, code: Any, spec: Spec, store: Any) -> str:
        found.append(spec)
        return known(kernel, code, spec, store)

    monkeypatch.setattr(flash, "attention", attention)
    return found


# -- which kernel ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("archs", FAMILIES, ids=["mma", "wgmma"])
@pytest.mark.parametrize(
    "inputs, body, schedule",
    [
        (QKV, "y = Attention (q, k, v)", "attention.flash"),
        (QKV, "y = Attention <is_causal = 1, scale = 0.2> (q, k, v)", "attention.flash"),
        (QKV.replace(",s,", ",4,"), "y = Attention (q, k, v)", "attention.decode"),
        (
            QKV.replace("[b,", "[1,").replace(",s,", ",16,"),
            "y = Attention (q, k, v)",
            "attention.decode",
        ),
        # with so many sequences heads fill a GPU
        (
            QKV.replace("[b,", "[17,").replace(",s,", ",16,"),
            "y = Attention (q, k, v)",
            "attention.flash",
        ),
        (QKV.replace(",s,", ",17,"), "y = Attention (q, k, v)", "attention.flash"),
        (QKV.replace(",64]", ",96]"), "y = Attention (q, k, v)", "attention.flash"),
        (QKV.replace(",64]", ",80]"), "y = Attention (q, k, v)", "attention.flash"),
        (
            QKV.replace(",64]", ",80]").replace(",s,", ",4,"),
            "y = Attention (q, k, v)",
            "attention.decode",
        ),
        (
            QKV.replace(",64]", ",72]").replace(",s,", ",4,"),
            "y = Attention (q, k, v)",
            "attention.products",
        ),
        (QKV.replace(",64]", ",72]"), "y = Attention (q, k, v)", "attention.flash"),
        (
            QKV.replace(",64]", ",72]").replace(",s,", ",5,"),
            "y = Attention (q, k, v)",
            "attention.flash",
        ),
        (
            QKV.replace(",s,", ",1,") + ", float[b,8,1,t] m",
            "y = Attention <softcap = 30.0> (q, k, v, m)",
            "attention.decode",
        ),
        (QKV.replace(",64]", ",84]"), "y = Attention (q, k, v)", "attention.warp"),
        (QKV.replace(",64]", ",264]"), "y = Attention (q, k, v)", "attention.products"),
        (QKV.replace("bfloat16", "float"), "y = Attention (q, k, v)", "attention.warp"),
        (QKV, "y = Attention <softcap = 30.0> (q, k, v)", "attention.flash"),
        (QKV, "y = Attention <scale = -0.2> (q, k, v)", "attention.products"),
        (QKV + ", bfloat16[s,t] m", "y = Attention (q, k, v, m)", "attention.flash"),
        (QKV + ", float[b,8,s,t] m", "y = Attention (q, k, v, m)", "attention.flash"),
        (QKV + ", bool[s,t] m", "y = Attention (q, k, v, m)", "attention.flash"),
        # a mask that may have fewer keys
        (QKV + ", bfloat16[s,u] m", "y = Attention (q, k, v, m)", "attention.products"),
        (QKV + ", bool[b,1,1,t] m", "y = Attention (q, k, v, m)", "attention.flash"),
        (QKV + ", bool[b,8,1,t] m", "y = Attention (q, k, v, m)", "attention.flash"),
        (QKV, SEEN + "y = Attention (q, k, v, seen)", "attention.flash"),
        # two masks that do not agree on the offset
        (QKV, SEEN + "y = Attention <is_causal = 1> (q, k, v, seen)", "attention.flash"),
        (
            QKV + ", int64[b] n",
            "y = Attention <is_causal = 1> (q, k, v, , , , n)",
            "attention.flash",
        ),
        (QKV + ", int64[b] n", SEEN + "y = Attention (q, k, v, seen, , , n)", "attention.flash"),
    ],
)
def test_what_takes_a_node(inputs: str, body: str, schedule: str, archs: Sequence[str]) -> None:
    shape = inputs.split("]")[0].rpartition("[")[2]
    kind = inputs.partition("[")[0]
    found = schedules(graph(body, inputs, f"{kind}[{shape}] y"), archs)
    assert {name for name in found if name.startswith("attention")} == {schedule}


@pytest.mark.parametrize(
    "attributes", ["left_window_size = 8", "right_window_size = 3", "left_window_size = 0"]
)
def test_windows_are_for_products(attributes: str) -> None:
    model = graph(f"y = Attention <{attributes}> (q, k, v)")
    assert "attention.products" in schedules(model)


@pytest.mark.parametrize("heads, expected", [(8, "products"), (9000, "warp")])
def test_scores_take_no_more_memory_than_they_are_worth(heads: int, expected: str) -> None:
    inputs = ", ".join(f"bfloat16[1,{heads},256,264] {name}" for name in "qkv")
    output = f"bfloat16[1,{heads},256,264] y"
    assert schedules(graph("y = Attention (q, k, v)", inputs, output)) == {f"attention.{expected}"}


def test_scores_that_are_asked_for_are_made_step_by_step() -> None:
    body = "y, , , scores = Attention <is_causal = 1> (q, k, v)"
    model = graph(body, output="bfloat16[b,8,s,64] y, bfloat16[b,8,s,t] scores")
    assert not any(name.startswith("attention") for name in schedules(model))


# -- what it is told ------------------------------------------------------------------------------------


def test_a_mask_of_ranges_is_an_offset(specs: list[Spec]) -> None:
    model = graph(
        SEEN + "mask = And (flags, seen) y = Attention (q, k, v, mask)",
        QKV + ", bool[b,1,1,t] flags",
    )
    made = schedules(model)
    (spec,) = specs
    assert spec.plain is not None and spec.plain.causal and spec.plain.lengths is None
    assert spec.plain.offset == sympy.Symbol("t", integer=True, positive=True) - sympy.Symbol(
        "s", integer=True, positive=True
    ) or str(spec.plain.offset) in ("t - s", "-s + t")
    assert spec.plain.allowed is not None and len(spec.plain.allowed.shape) == 2
    assert spec.groups == 4 and spec.scale == 0.125
    # The flags are read as they come, and nothing of size queries x keys is written.
    assert made == {"attention.flash"}


def test_a_range_that_starts_elsewhere_is_another_offset(specs: list[Spec]) -> None:
    shifted = SEEN.replace("Range (zero, keys", "Range (one, keys").replace(
        "keys = Sq", "less = Sq"
    )
    shifted = shifted.replace("past = Sub", "keys = Add (less, one) past = Sub")
    schedules(graph(shifted + "y = Attention (q, k, v, seen)"))
    (spec,) = specs
    assert spec.plain is not None and str(spec.plain.offset) in ("t - s", "-s + t")


def test_a_cache_that_comes_along_is_an_offset(specs: list[Spec]) -> None:
    inputs = QKV.replace(",t,", ",s,") + ", bfloat16[b,2,p,64] pk, bfloat16[b,2,p,64] pv"
    schedules(graph("y = Attention <is_causal = 1> (q, k, v, , pk, pv)", inputs))
    (spec,) = specs
    assert spec.plain is not None and spec.plain.causal and str(spec.plain.offset) == "p"


@pytest.mark.parametrize(
    "body, causal, flags",
    [
        # what is neither causal nor a flag for each key is read beside them
        ("both = And (flags, seen) mask = And (both, m)", True, True),
        ("mask = And (seen, m)", True, False),
        ("mask = And (m, flags)", False, True),
        # of two such parts the whole is
        ("both = And (seen, m) mask = And (both, n)", False, False),
    ],
)
def test_one_part_of_a_mask_may_be_of_any_kind(
    specs: list[Spec], body: str, causal: bool, flags: bool
) -> None:
    inputs = QKV + ", bool[b,1,1,t] flags, bool[s,t] m, bool[b,8,s,t] n"
    made = schedules(graph(SEEN + body + " y = Attention (q, k, v, mask)", inputs))
    (spec,) = specs
    assert spec.plain is not None and spec.plain.mask is not None
    assert spec.plain.causal == causal and (spec.plain.allowed is not None) == flags
    assert len(spec.plain.mask.shape) == 4 and "attention.flash" in made


def test_an_expanded_mask_is_read_as_it_was(specs: list[Spec]) -> None:
    body = """batch = Shape <start = 0, end = 1> (q)
        heads = Constant <value_ints = [8]> ()
        scores = Shape <start = 2> (m)
        to = Concat <axis = 0> (batch, heads, scores)
        wide = Expand (m, to)
        y = Attention (q, k, v, wide)"""
    assert schedules(graph(body, QKV + ", bfloat16[1,1,s,t] m")) == {"attention.flash"}
    (spec,) = specs
    assert spec.plain is not None and spec.plain.mask is not None
    assert spec.plain.mask.shape[:2] == (1, 1)


def test_flags_take_memory_once() -> None:
    """Of the kernels for few queries and for many only one runs."""
    model = graph("y = Attention (q, k, v, m)", QKV + ", bool[b,1,s,t] m")
    script = Lowering(model, gpu(["sm_90a"])).run().module.script()
    sizes = re.findall(r"work\d+: T.Buffer\(\(T.max\(T.Select\((not )?size1", script)
    assert sizes == ["", "not "]


@pytest.mark.parametrize("inputs", [QKV, QKV.replace(",64]", ",72]")], ids=["64", "72"])
def test_there_is_no_descriptor_of_nothing(inputs: str) -> None:
    """They are made where there are queries."""
    shape = inputs.split("]")[0].rpartition("[")[2]
    mask, output = "bool[b,1,s,t] m", f"bfloat16[{shape}] y"
    model = graph("y = Attention (q, k, v, m)", f"{inputs}, {mask}", output)
    module = Lowering(model, gpu(["sm_90a"])).run().module
    (text,) = (str(f) for _, f in module.functions_items() if isinstance(f, tirx.PrimFunc))
    before, found, _ = text.partition("tensormap_encode")
    assert found and "if size0 * T.int64(8) * size1 > T.int64(0):" in before


@pytest.mark.parametrize("depth", range(8, 257, 8))
@pytest.mark.parametrize("bias", ["", "bf16", "f32"])
def test_tiles_fit_shared_memory(depth: int, bias: str) -> None:
    shape = flash_hopper.Shape(depth, bias)
    assert shape.shared_bytes <= gpu(["sm_90a"]).shared_bytes
    # Slabs begin at multiples of 1 KB, as the swizzle needs, and results stay in registers.
    assert shape.tile_bytes % 1024 == 0 and (shape.ring >= 1) == bool(bias)
    assert depth // 2 + shape.keys // 2 + shape.keys // 4 <= 180


@pytest.mark.parametrize("scales", ["float16", "float32"])
def test_an_int8_cache_is_read_as_it_is(specs: list[Spec], scales: Any) -> None:
    wide = "kw = Cast <to = 1> (ks) vw = Cast <to = 1> (vs)"
    name = "float16"
    if scales == "float32":
        wide, name = "kw = Identity (ks) vw = Identity (vs)", "float"
    inputs = "bfloat16[b,8,s,64] q, int8[b,2,t,64] k, int8[b,2,t,64] v"
    model = graph(
        f"""{wide}
        kf = DequantizeLinear <axis = 3, block_size = 64> (k, kw)
        vf = DequantizeLinear <axis = 3, block_size = 64> (v, vw)
        kh = Cast <to = 16> (kf)
        vh = Cast <to = 16> (vf)
        y = Attention (q, kh, vh)""",
        f"{inputs}, {name}[b,2,t,1] ks, {name}[b,2,t,1] vs",
    )
    assert schedules(model) == {"attention.flash"}
    (spec,) = specs
    assert spec.coded is not None
    types = [value.dtype.name for value in spec.coded]
    assert types == ["INT8", "INT8", *[{"float16": "FLOAT16", "float32": "FLOAT"}[scales]] * 2]


# Keys and values from codes of 4 bits, as quantize_cache leaves them.
PACKED = """fifteen = Constant <value = uint8 {15}> ()
    four = Constant <value = uint8 {4}> ()
    kl = BitwiseAnd (k, fifteen)
    ku = BitShift <direction = "RIGHT"> (k, four)
    ka = Concat <axis = 3> (kl, ku)
    vl = BitwiseAnd (v, fifteen)
    vu = BitShift <direction = "RIGHT"> (v, four)
    va = Concat <axis = 3> (vl, vu)
    kf = DequantizeLinear <axis = 3, block_size = {depth}> (ka, ks, kz)
    vf = DequantizeLinear <axis = 3, block_size = {depth}> (va, vs, vz)
    kh = Cast <to = {code}> (kf)
    vh = Cast <to = {code}> (vf)
    y = Attention <is_causal = 1> (q, kh, vh)"""


def packed(half: str, depth: int, body: str = PACKED) -> ir.Model:
    """A node that reads a cache in int4."""
    body = body.replace("{depth}", str(depth)).replace("{code}", {"float16": "10"}.get(half, "16"))
    codes, beside = f"[b,2,t,{depth // 2}]", "[b,2,t,1]"
    inputs = f"{half}[b,8,s,{depth}] q, uint8{codes} k, uint8{codes} v"
    inputs += f", float{beside} ks, float{beside} vs, uint8{beside} kz, uint8{beside} vz"
    return graph(body, inputs, f"{half}[b,8,s,{depth}] y")


def test_an_int4_cache_is_read_as_it_is(specs: list[Spec]) -> None:
    """No kernel writes its codes apart."""
    assert schedules(packed("bfloat16", 64)) == {"attention.flash"}
    (spec,) = specs
    assert spec.coded is not None
    kinds = [value.dtype.name for value in spec.coded]
    assert kinds == ["UINT8", "UINT8", "FLOAT", "FLOAT", "UINT8", "UINT8"]


@pytest.mark.parametrize(
    "this, other",
    [
        ("{15}", "{7}"),
        ("{4}", "{3}"),
        ("RIGHT", "LEFT"),
        ('ku = BitShift <direction = "RIGHT"> (k,', 'ku = BitShift <direction = "RIGHT"> (v,'),
        ("(kl, ku)", "(ku, kl)"),
    ],
    ids=["mask", "shift", "direction", "bytes", "order"],
)
def test_other_halves_are_no_such_cache(specs: list[Spec], this: str, other: str) -> None:
    assert this in PACKED
    schedules(packed("bfloat16", 64, PACKED.replace(this, other)))
    (spec,) = specs
    assert spec.coded is None


def test_scales_for_other_groups_are_no_such_cache(specs: list[Spec]) -> None:
    model = graph(
        """kf = DequantizeLinear <axis = 3, block_size = 32> (k, ks)
        kh = Cast <to = 16> (kf)
        y = Attention (q, kh, v)""",
        "bfloat16[b,8,s,64] q, int8[b,2,t,64] k, bfloat16[b,2,t,64] v, float[b,2,t,2] ks",
    )
    schedules(model)
    (spec,) = specs
    assert spec.coded is None


@pytest.mark.slow
@pytest.mark.parametrize("codes", ["", "int8", "int4"], ids=["bfloat16", "int8", "int4"])
def test_a_captured_language_model(specs: list[Spec], codes: Any, tmp_path: Path) -> None:
    """Its mask and its cache, as capture and the passes leave them."""
    import transformers

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 160, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
    config = transformers.LlamaConfig(vocab_size=zoo.VOCAB, **sizes, **heads, use_cache=True)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    captured = HuggingFaceDirectory(cache=True).capture(tmp_path)
    passes = [*([QuantizeCache(codes=codes)] if codes else []), Convert(dtype="bfloat16")]
    made = schedules(run(captured, passes, Context()).model)
    assert made.isdisjoint({"attention.warp", "attention.products"}) and len(specs) == 2
    for spec in specs:
        assert spec.plain is not None and spec.plain.causal
        assert str(spec.plain.offset) == "past_sequence" and spec.plain.allowed is not None
        assert len(spec.coded or ()) == {"": 0, "int8": 4, "int4": 6}[codes]


# -- caches that are asked for before the kernels in front have ended -------------------------------------

LAYERS = """float16[b,8,s,64] q, float16[b,2,s,64] x, float16[b,2,t,64] k, float16[b,2,t,64] v,
    float16[b,2,t,64] k1, float16[b,2,t,64] v1, int64[b] first, int64[b] total"""
PLACED = """nk = TensorScatter <axis = 2> (k1, x, first)
    nv = TensorScatter <axis = 2> (v1, x, first)"""
CACHES = "float16[b,2,t,64] nk, float16[b,2,t,64] nv"


def asks_early(
    body: str, outputs: str = "", inputs: str = LAYERS, arch: str = "sm_90a"
) -> list[bool]:
    """Of each kernel that decodes, in the order of the calls, whether it does."""
    model = graph(body, inputs, "float16[b,8,s,64] z" + outputs)
    module = Lowering(model, gpu([arch])).run().module
    found = {}
    for name, function in module.functions_items():
        if isinstance(function, tirx.PrimFunc) and "part<" in (text := str(function)):
            assert ("part<true>" in text) != ("part<false>" in text)
            found[name.name_hint] = "part<true>" in text
    calls = re.findall(r"cls\.(attention_\w+)", module.script())
    return [found[name] for name in calls]


@pytest.mark.parametrize(
    "made, caches, outputs, expected",
    [
        ("", "k1, v1, , , , total", "", True),
        ("", "k1, v1", "", True),
        (PLACED, "nk, nv, , , , total", CACHES, True),
        (PLACED, "nk, v, , , , total", CACHES, True),
        # the result is no tensor of the caller's; rows may be any, or where only a kernel knows
        (PLACED, "nk, nv, , , , total", "", False),
        (PLACED.replace("axis =", 'mode = "circular", axis ='), "nk, nv, , , , total", CACHES, False),
        (PLACED.replace("x, first", "x, total", 1), "nk, nv, , , , total", CACHES, False),
        ("at = ReduceMax <keepdims = 0> (y, axes) first1 = Cast <to = 7> (at)"
         + PLACED.replace("first", "first1"), "nk, nv, , , , total", CACHES, False),
        ("at = ReduceMax <keepdims = 0> (y, axes) n = Cast <to = 7> (at)", "k1, v1, , , , n", "", False),
        ("nk = Concat <axis = 2> (k1, x) nv = Concat <axis = 2> (v1, x)", "nk, nv", "", False),
    ],
    ids=[
        "inputs",
        "whole inputs",
        "rows in place",
        "keys in place",
        "copies",
        "in a circle",
        "two places",
        "places made on the way",
        "lengths made on the way",
        "joined",
    ],
)  # fmt: skip
def test_which_caches_are_asked_for_early(
    made: str, caches: str, outputs: str, expected: bool
) -> None:
    body = f"""axes = Constant <value_ints = [1, 2, 3]> ()
        y = Attention <is_causal = 1> (q, k, v, , , , total) {made}
        z = Attention <is_causal = 1> (y, {caches})"""
    outputs = outputs and f", {outputs}"
    assert asks_early(body, outputs) == [True, expected]
    assert asks_early(body, outputs, arch="sm_80") == [False, False]


@pytest.mark.parametrize(
    "keys, expected",
    [("64", {"result"}), ("32768", {"merged"}), ("t", {"result", "merged"})],
    ids=["one part", "several", "either"],
)
def test_one_part_of_the_keys_is_not_merged(keys: str, expected: set[str]) -> None:
    inputs = QKV.replace("[b,", "[1,").replace(",s,", ",1,").replace(",t,", f",{keys},")
    module = (
        Lowering(graph("y = Attention (q, k, v)", inputs, "bfloat16[1,8,1,64] y"), gpu(["sm_90a"]))
        .run()
        .module
    )
    (text,) = (str(f) for _, f in module.functions_items() if isinstance(f, tirx.PrimFunc))
    assert set(re.findall(r"netlathe_decode_\w+::(merged|result)", text)) == expected


def test_what_is_there_before_the_first_node_is_there_for_all() -> None:
    """Lengths that a kernel makes, as of all layers of a decoder."""
    sum_ = "one = Constant <value_ints = [1]> () long = Add (first, one)"
    body = f"""{sum_} y = Attention <is_causal = 1> (q, k, v, , , , long) {PLACED}
        z = Attention <is_causal = 1> (y, nk, nv, , , , long)"""
    assert asks_early(body, f", {CACHES}") == [True, True]


def test_one_node_asks_for_nothing_early() -> None:
    assert asks_early("z = Attention (q, k1, v1)") == [False]


def test_long_prompts_alone_hold_nothing() -> None:
    inputs = LAYERS.replace(",s,", ",300,")
    body = "y = Attention (q, k, v) z = Attention (y, k1, v1)"
    model = graph(body, inputs, "float16[b,8,300,64] z")
    assert schedules(model) == {"attention.flash"}


DECODED = [
    *((16, depth) for depth in range(16, 257, 16)),
    *((bits, d) for bits in (8, 4) for d in decode.CODED_DEPTHS),
]


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
@pytest.mark.parametrize("bits, depth", DECODED)
def test_what_decoding_asks_for_ahead_fits(arch: str, bits: int, depth: int) -> None:
    if depth > 128 and arch != "sm_90a":
        return  # products'
    ahead = decode.FAR if gpu((arch,)).has_wgmma else decode.NEAR
    for products in (1, 2):
        shape = decode.Shape(depth, bits, 16, products, ahead)
        assert shape.slots >= 2 and shape.shared_bytes <= gpu((arch,)).shared_bytes
        # Copies are whole instructions of a warp, and a tile whole products.
        assert shape.keys * shape.bytes % 512 == 0 and shape.keys % (256 // bits) == 0


@pytest.mark.parametrize("bits, depth", DECODED)
def test_blocks_that_merge_leave_room_for_those_that_decode(bits: int, depth: int) -> None:
    """As many as a multiprocessor can have, so that none keeps a block of the next call from starting."""
    whole, reserved = 228 << 10, 1 << 10  # of a multiprocessor of sm_90, and for each block
    merging = 2048 // decode_merged.THREADS * (4 * decode_merged.SHARED + reserved)
    for products in (1, 2):
        shape = decode.Shape(depth, bits, 16, products, decode.FAR)
        assert shape.shared_bytes + reserved + merging <= whole


# -- compiled -------------------------------------------------------------------------------------------


def compiled(model: ir.Model, archs: Sequence[str]) -> None:
    """Every kernel is there for every architecture, fits a multiprocessor, and spills nothing."""
    artifact = CudaArtifact(model, gpu(archs))
    found = resources(artifact)
    assert {r.arch for r in found} == set(archs)
    names = {r.kernel.partition("_kernel")[0] for r in found}
    assert any(name.startswith("attention") for name in names)
    for r in found:
        assert r.spill_bytes == 0 and r.stack_bytes == 0, r
        assert r.registers * (384 if r.registers <= 168 else 128) <= 65536
        assert r.shared_bytes <= 48 << 10  # what is asked for at the launch is not in it


@needs_nvcc
@pytest.mark.parametrize("archs", FAMILIES, ids=["mma", "wgmma"])
def test_prefill_and_decode_compile(archs: Sequence[str]) -> None:
    compiled(graph(inputs=QKV.replace(",64]", ",128]"), output="bfloat16[b,8,s,128] y"), archs)


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("archs", FAMILIES, ids=["mma", "wgmma"])
@pytest.mark.parametrize("half, code", [("bfloat16", 16), ("float16", 10)])
@pytest.mark.parametrize("depth", [64, 96, 128])
def test_every_size_compiles(archs: Sequence[str], half: str, code: int, depth: int) -> None:
    inputs = f"{half}[b,8,s,{depth}] q, int8[b,2,t,{depth}] k, int8[b,2,t,{depth}] v"
    model = graph(
        f"""kf = DequantizeLinear <axis = 3, block_size = {depth}> (k, ks)
        vf = DequantizeLinear <axis = 3, block_size = {depth}> (v, vs)
        kh = Cast <to = {code}> (kf)
        vh = Cast <to = {code}> (vf)
        y = Attention <is_causal = 1> (q, kh, vh)
        z = Attention <is_causal = 1> (q, x, x)""",
        f"{inputs}, float[b,2,t,1] ks, float[b,2,t,1] vs, {half}[b,2,t,{depth}] x",
        f"{half}[b,8,s,{depth}] y, {half}[b,8,s,{depth}] z",
    )
    compiled(model, archs)
    compiled(packed(half, depth), archs)


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("archs", FAMILIES, ids=["mma", "wgmma"])
@pytest.mark.parametrize(
    "half, depth, mask, attributes",
    [
        ("bfloat16", 64, "bfloat16[1,8,s,t] m", ""),
        ("float16", 72, "float16[b,1,1,t] m", "is_causal = 1"),
        ("bfloat16", 128, "float[b,8,s,t] m", ""),
        ("bfloat16", 128, "bool[b,1,s,t] m", "softcap = 30.0"),
        ("float16", 40, "", "softcap = 30.0"),
        ("bfloat16", 256, "float[s,t] m", "softcap = 30.0"),
    ],
)
def test_scores_with_a_bias_or_a_cap_compile(
    archs: Sequence[str], half: str, depth: int, mask: str, attributes: str
) -> None:
    inputs = ", ".join(f"{half}[b,8,{rows},{depth}] {name}" for rows, name in ("sq", "tk", "tv"))
    body = f"y = Attention{attributes and f' <{attributes}>'} (q, k, v{', m' if mask else ''})"
    model = graph(body, inputs + (mask and f", {mask}"), f"{half}[b,8,s,{depth}] y")
    compiled(model, archs)
