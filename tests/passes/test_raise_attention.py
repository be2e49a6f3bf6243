"""Attention written out becomes Attention on four dims, with unrepeated heads and one scale."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from tests.passes.raising import SIZES, assert_close, feeds, graph, node, ops, raised, refusals, run

Q, K, V = "float[b,4,s,8] q", "float[b,4,t,8] k", "float[b,4,t,8] v"
QKV = f"{Q}, {K}, {V}"
SCORES = "kt = Transpose<perm=[0,1,3,2]>(k) z = MatMul(q, kt)"
OUT = "p = Softmax<axis=-1>(l) y = MatMul(p, v)"
NUMBERS: dict[str, Any] = dict(
    root=math.sqrt(8), inverse=1 / math.sqrt(8), zero=0.0, cap=5.0, fill=-3.4e38
)


@pytest.mark.parametrize(
    ("inputs", "scores", "scale", "mask"),
    [
        ("", "l = Div(z, root)", 8**-0.5, None),
        ("", "l = Mul(inverse, z)", 8**-0.5, None),
        ("", "l = Neg(z) ", None, None),
        (", float[b,1,s,t] m", "d = Div(z, root) l = Add(d, m)", 8**-0.5, ["b", "1", "s", "t"]),
        (", float[b,1,1,t] m", "l = Add(m, z)", 1.0, ["b", "1", "s", "t"]),
        (", float[s,t] m", "d = Mul(z, inverse) l = Add(d, m)", 8**-0.5, ["s", "t"]),
        (
            ", float[1,4,s,t] bias, float[b,1,1,t] m",
            "d = Add(z, bias) l = Add(d, m)",
            1.0,
            ["b", "4", "s", "t"],
        ),
        (", float[b,1,s,t] m", "a = Add(z, m) l = Div(a, root)", 8**-0.5, ["b", "1", "s", "t"]),
        (", bool[b,1,s,t] c", "l = Where(c, z, fill)", 1.0, ["b", "1", "s", "t"]),
        (
            ", bool[b,1,s,t] c, float[1,4,s,t] bias",
            "d = Div(z, root) e = Add(d, bias) n = Not(c) l = Where(n, fill, e)",
            8**-0.5,
            ["b", "4", "s", "t"],
        ),
    ],
)
def test_eager(inputs: str, scores: str, scale: float | None, mask: list[str] | None) -> None:
    model = graph(QKV + inputs, f"{SCORES} {scores} {OUT}", **NUMBERS)
    after, entries = raised(model)
    if scale is None:
        assert "no product of queries and keys behind the softmax" in refusals(entries)
        return
    attention = node(after, "Attention")
    assert {"MatMul", "Softmax", "Transpose"} & set(ops(after)) == set()
    assert attention.attributes["scale"].as_float() == pytest.approx(scale)
    assert [e.status for e in entries] == ["applied"]
    held = attention.inputs[3] if len(attention.inputs) > 3 else None
    if mask is None:
        assert held is None
    else:
        assert held is not None and held.shape is not None
        assert [str(d) for d in held.shape] == mask


def test_rows_without_a_key_stay_even_under_a_fill() -> None:
    """-1e9 leaves digits of a score of hundreds, and the softmax of a row that keeps no key shows them."""
    model = graph(
        f"{QKV}, bool[b,1,s,t] c", f"{SCORES} l = Where(c, z, low) {OUT}", low=-1e9, **NUMBERS
    )
    after, entries = raised(model)
    assert ops(after)["Attention"] == 1, entries
    fed = feeds(model, SIZES[0], seed=0)
    fed["q"] *= 1000
    fed["c"][0, 0, 1] = False
    (before,), (now,) = run(model, fed), run(after, fed)
    assert_close(before[0, :, 1], fed["v"][0].mean(1))
    assert_close(now, before)


GUARDED = "p = Softmax<axis=-1>(l) empty = IsNaN(p) g = Where(empty, zero, p) y = MatMul(g, v)"


def test_rows_without_a_key_are_zero_before_and_after() -> None:
    """TorchScript's exporter wrote a guard for them around the softmax; Attention has it built in."""
    model = graph(f"{QKV}, float[b,1,s,t] m", f"{SCORES} l = Add(z, m) {GUARDED}", **NUMBERS)
    after, entries = raised(model)
    assert ops(after) == {"Attention": 1}
    assert [e.status for e in entries] == ["applied"]
    fed = feeds(model, SIZES[0], seed=0)
    fed["m"] = np.where(fed["m"] > 0, 0, -np.inf).astype(np.float32)
    fed["m"][0, 0, 1] = -np.inf
    (before,), (now,) = run(model, fed), run(after, fed)
    assert not before[0, :, 1].any(), "the guard makes an empty row zero"
    assert_close(now, before)


@pytest.mark.parametrize(
    "body",
    [
        "empty = IsNaN(p) g = Where(empty, cap, p)",  # not zero
        "empty = IsNaN(z) g = Where(empty, zero, p)",  # not of the weights
        "empty = IsNaN(p) g = Where(empty, p, zero)",  # the other way round
    ],
)
def test_what_is_no_guard_stays(body: str) -> None:
    model = graph(QKV, f"{SCORES} p = Softmax<axis=-1>(z) {body} y = MatMul(g, v)", **NUMBERS)
    after, _ = raised(model)
    assert "Attention" not in ops(after)


def test_scaled_transposed_keys_of_repeated_heads() -> None:
    """k is repeated, transposed and scaled, in this order: one transposition is left of none."""
    repeat = "k1 = Unsqueeze(k, at) k2 = Expand(k1, five) k3 = Reshape(k2, four)"
    values = "v1 = Unsqueeze(v, at) v2 = Expand(v1, five) v3 = Reshape(v2, four)"
    body = (
        f"{repeat} {values} kt0 = Transpose<perm=[0,1,3,2]>(k3) kt = Mul(kt0, inverse)"
        " qs = Mul(q, inverse) z = MatMul(qs, kt) p = Softmax<axis=-1>(z) y = MatMul(p, v3)"
    )
    inputs = "float[b,4,s,8] q, float[b,2,7,8] k, float[b,2,7,8] v"
    model = graph(inputs, body, at=[2], five=[1, 2, 2, 7, 8], four=[0, 4, 7, 8], **NUMBERS)
    after, entries = raised(model)
    assert ops(after) == {"Attention": 1}, entries
    attention = node(after, "Attention")
    assert attention.attributes["scale"].as_float() == pytest.approx(1 / 8)
    assert [v.name for v in attention.inputs[:3] if v is not None] == ["q", "k", "v"]


def test_softcap() -> None:
    """Gemma 2: cap * tanh(scores / cap), then the mask."""
    body = (
        f"{SCORES} r = Div(z, root) c = Div(r, cap) h = Tanh(c) w = Mul(h, cap) l = Add(w, m) {OUT}"
    )
    after, _ = raised(graph(f"{QKV}, float[b,1,s,t] m", body, **NUMBERS))
    attention = node(after, "Attention")
    assert attention.attributes["softcap"].as_float() == 5.0
    assert attention.attributes["scale"].as_float() == pytest.approx(8**-0.5)


def test_scaled_queries_and_keys() -> None:
    """BERT in old files scales q, Whisper q before the heads are split, some both q and k."""
    body = (
        "qs = Mul(x, inverse) qr = Reshape(qs, heads) q = Transpose<perm=[0,2,1,3]>(qr)"
        f" kt0 = Transpose<perm=[0,1,3,2]>(k) kt = Div(kt0, root) z = MatMul(q, kt) l = Add(z, m) {OUT}"
    )
    model = graph(
        f"float[b,s,32] x, {K}, {V}, float[b,1,s,t] m", body, heads=[0, 0, 4, 8], **NUMBERS
    )
    after, _ = raised(model)
    assert node(after, "Attention").attributes["scale"].as_float() == pytest.approx(1 / 8)
    assert "Mul" not in ops(after)


def test_keys_that_come_transposed_in_one_step() -> None:
    """[b,t,h,d] to [b,h,d,t] at once, as composed transpositions are."""
    body = f"kt = Transpose<perm=[0,2,3,1]>(k) z = MatMul(q, kt) l = Div(z, root) {OUT}"
    after, _ = raised(graph(f"{Q}, float[b,t,4,8] k, {V}", body, **NUMBERS))
    assert ops(after) == {"Transpose": 1, "Attention": 1}


def test_multi_query() -> None:
    """Falcon: one key and value head for all queries."""
    body = f"{SCORES} l = Div(z, root) {OUT}"
    after, _ = raised(graph(f"{Q}, float[b,1,t,8] k, float[b,1,t,8] v", body, **NUMBERS))
    assert ops(after) == {"Attention": 1}


def test_windows_merged_into_the_batch() -> None:
    """Swin: batch times windows, a bias per head and a mask per window."""
    body = (
        f"{SCORES} d = Mul(z, inverse) e = Expand(wm, four) f = Reshape(e, windows) n = Add(bias, f)"
        f" l = Add(d, n) {OUT}"
    )
    rng = np.random.default_rng(0)
    model = graph(
        "float[6,2,9,8] q, float[6,2,9,8] k, float[6,2,9,8] v",
        body,
        wm=rng.standard_normal((1, 3, 1, 9, 9)).astype(np.float32),
        bias=rng.standard_normal((1, 2, 9, 9)).astype(np.float32),
        four=[2, 3, 1, 9, 9],
        windows=[-1, 1, 9, 9],
        **NUMBERS,
    )
    after, _ = raised(model)
    assert "Attention" in ops(after) and "MatMul" not in ops(after)


def test_heads_merged_into_the_batch() -> None:
    """Old OPT and Bloom: bmm over [b*h,s,d], the mask added to [b,h,s,t]."""
    body = (
        "q3 = Reshape(q, merged) k3 = Reshape(k, merged) v3 = Reshape(v, merged)"
        " kt = Transpose<perm=[0,2,1]>(k3) z3 = MatMul(q3, kt) z = Reshape(z3, apart) a = Add(z, m)"
        " a3 = Reshape(a, again) p = Softmax<axis=-1>(a3) o3 = MatMul(p, v3) y = Reshape(o3, out)"
    )
    model = graph(
        "float[b,4,5,8] q, float[b,4,7,8] k, float[b,4,7,8] v, float[b,1,5,7] m",
        body.replace("Reshape(q, merged)", "Reshape(q, merged_q)"),
        merged_q=[-1, 5, 8],
        merged=[-1, 7, 8],
        apart=[-1, 4, 5, 7],
        again=[-1, 5, 7],
        out=[-1, 4, 5, 8],
    )
    after, entries = raised(model)
    assert ops(after) == {"Attention": 1}, entries


def test_three_dims_without_heads() -> None:
    body = (
        f"kt = Transpose<perm=[0,2,1]>(k) z = MatMul(q, kt) d = Mul(z, inverse) l = Add(d, m) {OUT}"
    )
    inputs = "float[b,s,8] q, float[b,t,8] k, float[b,t,8] v, float[b,1,t] m"
    after, entries = raised(graph(inputs, body, **NUMBERS))
    assert "Attention" in ops(after) and "Softmax" not in ops(after), entries


def test_softmax_in_float32() -> None:
    body = (
        "kt = Transpose<perm=[0,1,3,2]>(k) z = MatMul(q, kt) d = Mul(z, inverse) c = Cast<to=1>(d)"
        " p0 = Softmax<axis=-1>(c) p = Cast<to=10>(p0) y = MatMul(p, v)"
    )
    inputs = QKV.replace("float", "float16")
    half = np.array(8**-0.5, np.float16)
    after, entries = raised(graph(inputs, body, dtype="float16", inverse=half), tolerance=2**-7)
    assert ops(after) == {"Attention": 1}, entries


ATTENTION = "y = Attention<scale: float = 0.25>(q, k, v)"
KV2 = f"{Q}, float[b,2,t,8] k0, float[b,2,t,8] v0"


def _repeat(name: str, *, as_tile: bool = False) -> str:
    axis, shape = ("one", "tiled") if as_tile else ("two", "inplace")
    return (
        f"{name}1 = Unsqueeze({name}0, {axis}) {name}2 = Expand({name}1, {shape})"
        f" {name} = Reshape({name}2, merged)"
    )


REPEAT: dict[str, Any] = dict(
    one=[1], two=[2], inplace=[1, 1, 2, 1, 1], tiled=[1, 2, 1, 1, 1], merged=[0, 4, -1, 8]
)


def test_repeated_heads_are_removed() -> None:
    model = graph(KV2, f"{_repeat('k')} {_repeat('v')} {ATTENTION}", **REPEAT)
    after, entries = raised(model)
    assert ops(after) == {"Attention": 1}, entries
    assert [v.name for v in node(after, "Attention").inputs if v] == ["q", "k0", "v0"]


@pytest.mark.parametrize(
    "repeat",
    [
        "k1 = Unsqueeze(k0, two) k2 = Concat<axis=2>(k1, k1) k = Reshape(k2, merged)"
        " v1 = Unsqueeze(v0, two) v2 = Concat<axis=2>(v1, v1) v = Reshape(v2, merged)",
        "k = Gather<axis=1>(k0, index) v = Gather<axis=1>(v0, index)",
    ],
)
def test_heads_repeated_in_other_ways(repeat: str) -> None:
    after, entries = raised(graph(KV2, f"{repeat} {ATTENTION}", index=[0, 0, 1, 1], **REPEAT))
    assert ops(after) == {"Attention": 1}, entries


@pytest.mark.parametrize(
    "repeat",
    [
        f"{_repeat('k', as_tile=True)} {_repeat('v', as_tile=True)}",
        "k = Concat<axis=1>(k0, k0) v = Concat<axis=1>(v0, v0)",
        "k = Gather<axis=1>(k0, index) v = Gather<axis=1>(v0, index)",
    ],
)
def test_tiled_heads_are_refused(repeat: str) -> None:
    model = graph(KV2, f"{repeat} {ATTENTION}", index=[0, 1, 0, 1], **REPEAT)
    after, entries = raised(model)
    assert "in place" in refusals(entries)
    assert ops(after) == ops(model)


def test_a_single_head_may_be_repeated_in_any_way() -> None:
    model = graph(
        f"{Q}, float[b,1,t,8] k0, float[b,1,t,8] v0",
        f"k = Expand(k0, four) v = Concat<axis=1>(v0, v0, v0, v0) {ATTENTION}",
        four=[1, 4, 1, 1],
    )
    after, entries = raised(model)
    assert ops(after) == {"Attention": 1}, entries


def test_keys_repeated_but_values_not() -> None:
    model = graph(f"{KV2}, {V}", f"{_repeat('k')} {ATTENTION}", **REPEAT)
    assert "key heads are repeated 2 times, value heads 1 times" in refusals(raised(model)[1])


def test_three_dim_attention() -> None:
    model = graph(
        "float[b,s,32] q, float[b,t,16] k, float[b,t,16] v, float[b,1,s,t] m",
        "y = Attention<q_num_heads=4, kv_num_heads=2>(q, k, v, m)",
    )
    after, _ = raised(model)
    attention = node(after, "Attention")
    assert attention.attributes["scale"].as_float() == pytest.approx(8**-0.5)
    first = attention.inputs[0]
    assert first is not None and first.shape is not None and len(first.shape) == 4
    assert not {"q_num_heads", "kv_num_heads"} & {
        name for name, a in attention.attributes.items() if a.value
    }


@pytest.mark.parametrize(
    ("inputs", "body", "reason"),
    [
        ("", f"{SCORES} p = Softmax<axis=2>(z) y = MatMul(p, v)", "softmax over axis 2 of 4"),
        (
            "",
            f"{SCORES} l = Div(z, root) p = Softmax<axis=-1>(l) o = MatMul(p, v) s1 = ReduceSum(p, last)"
            " y = Add(o, s1)",
            "the attention weights p are also used by ReduceSum s1",
        ),
        ("", f"{SCORES} u = ReduceSum(z, last) l0 = Div(z, root) l = Sub(l0, u) {OUT}", "behind"),
        (", bool[b,1,s,t] c", f"{SCORES} l = Where(c, z, zero) {OUT}", "masked scores become"),
        (", float[b,4,s,1] m", f"{SCORES} l = Add(z, m) {OUT}", "does not broadcast"),
        (
            ", float[b,1,s,t] m",
            f"{SCORES} a = Add(z, m) c = Div(a, cap) h = Tanh(c) l = Mul(h, cap) {OUT}",
            "a mask is added before the softcap",
        ),
        (", float[b,4,1,1] f", f"{SCORES} l = Mul(z, f) {OUT}", "which is no constant"),
        ("", "z = MatMul(q, w) p = Softmax<axis=-1>(z) y = MatMul(p, g)", "behind the softmax"),
    ],
)
def test_near_misses(inputs: str, body: str, reason: str) -> None:
    w = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
    model = graph(QKV + inputs, body, last=[-1], w=w, g=w, **NUMBERS)
    after, entries = raised(model)
    assert reason in refusals(entries)
    assert ops(after) == ops(model)


def test_a_plain_softmax_is_no_candidate() -> None:
    assert raised(graph("float[b,s,8] x", "y = Softmax<axis=-1>(x)"))[1] == []
