"""Rotary embeddings in their spellings become RotaryEmbedding, with cos and sin at half width."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from tests.passes.raising import graph, node, ops, raised, refusals

X = "float[b,3,s,8] x"
ANGLES = "float[b,s,4] f"
FREQUENCIES = (10000.0 ** (-np.arange(4) / 4)).astype(np.float32)
HALVES: dict[str, Any] = dict(
    first0=[0], first1=[4], second0=[4], second1=[2**62], last=[3], heads=[1], minus1=[-1]
)
ROTATE = (
    "a = Slice(x, first0, first1, last) c = Slice(x, second0, second1, last) n = Neg(c)"
    " rot = Concat<axis=-1>(n, a)"
)
COS_SIN = (
    "e = Concat<axis=-1>(f, f) co = Cos(e) si = Sin(e) cos = Unsqueeze(co, heads)"
    " sin = Unsqueeze(si, heads)"
)
SUM = "xc = Mul(x, cos) xs = Mul(rot, sin) y = Add(xc, xs)"


def _table_dims(model: ir.Model) -> list[list[str]]:
    tables = node(model, "RotaryEmbedding").inputs[1:3]
    return [[str(d) for d in table.shape or ()] for table in tables if table is not None]


def test_rotate_half() -> None:
    after, entries = raised(graph(f"{X}, {ANGLES}", f"{COS_SIN} {ROTATE} {SUM}", **HALVES))
    assert ops(after) == {"Cos": 1, "Sin": 1, "RotaryEmbedding": 1}
    rope = node(after, "RotaryEmbedding")
    assert rope.attributes["interleaved"].as_int() == 0
    assert rope.attributes["rotary_embedding_dim"].as_int() == 0
    assert _table_dims(after) == [["b", "s", "4"]] * 2
    assert [e.status for e in entries] == ["applied"]


def test_split_instead_of_slices() -> None:
    rotate = "a, c = Split<axis=3, num_outputs=2>(x) n = Neg(c) rot = Concat<axis=3>(n, a)"
    after, _ = raised(graph(f"{X}, {ANGLES}", f"{COS_SIN} {rotate} {SUM}", **HALVES))
    assert ops(after) == {"Cos": 1, "Sin": 1, "RotaryEmbedding": 1}


def test_tables_without_a_batch_are_expanded() -> None:
    """Positions 0, 1, 2, ...: one row for all samples, which ONNX Runtime would not take."""
    angles = (
        "sh = Shape<start=2, end=3>(x) n0 = Squeeze(sh) i = Range(zero, n0, step) p = Cast<to=1>(i)"
        " c1 = Unsqueeze(p, columns) f = Mul(c1, freq)"
    )
    model = graph(
        X,
        f"{angles} {COS_SIN} {ROTATE} {SUM}",
        zero=np.array(0),
        step=np.array(1),
        columns=[0, 2],
        freq=FREQUENCIES,
        **HALVES,
    )
    after, entries = raised(model)
    assert ops(after)["RotaryEmbedding"] == 1 and ops(after)["Expand"] == 2, entries
    assert _table_dims(after) == [["b", "s", "4"]] * 2
    assert "Concat" not in [n.op_type for n in after.graph if n.outputs[0].dtype == 1]


def test_tables_gathered_by_position() -> None:
    """A cos cache of whole width, as constant: it is halved."""
    angles = np.outer(np.arange(16), FREQUENCIES)
    full = np.concatenate([angles, angles], -1)
    body = (
        f"co = Gather(cache_cos, ids) si = Gather(cache_sin, ids) cos = Unsqueeze(co, heads)"
        f" sin = Unsqueeze(si, heads) {ROTATE} {SUM}"
    )
    model = graph(
        f"{X}, int64[b,s] ids",
        body,
        cache_cos=np.cos(full).astype(np.float32),
        cache_sin=np.sin(full).astype(np.float32),
        **HALVES,
    )
    after, _ = raised(model)
    assert ops(after) == {"Gather": 2, "RotaryEmbedding": 1}
    assert [v.shape for n, v in after.graph.initializers.items() if "cache" in n] == [
        ir.Shape([16, 4])
    ] * 2


def test_halves_with_half_width_tables() -> None:
    body = (
        "a, c = Split<axis=3, num_outputs=2>(x) co = Cos(f) si = Sin(f) cos = Unsqueeze(co, heads)"
        " sin = Unsqueeze(si, heads) ac = Mul(a, cos) cs = Mul(c, sin) u = Sub(ac, cs)"
        " cc = Mul(c, cos) as_ = Mul(a, sin) v = Add(cc, as_) y = Concat<axis=-1>(u, v)"
    )
    after, _ = raised(graph(f"{X}, {ANGLES}", body, **HALVES))
    assert ops(after) == {"Cos": 1, "Sin": 1, "RotaryEmbedding": 1}


INTERLEAVED = (
    "a = Slice(x, first0, second1, last, two) c = Slice(x, one1, second1, last, two) n = Neg(c)"
    " n1 = Unsqueeze(n, minus1) a1 = Unsqueeze(a, minus1) st = Concat<axis=-1>(n1, a1)"
    " rot = Reshape(st, flat)"
)
TWICE = (
    "f1 = Unsqueeze(f, minus1) f2 = Concat<axis=-1>(f1, f1) e = Reshape(f2, flat3) co = Cos(e)"
    " si = Sin(e) cos = Unsqueeze(co, heads) sin = Unsqueeze(si, heads)"
)


def test_interleaved() -> None:
    constants: dict[str, Any] = HALVES | {
        "two": [2],
        "one1": [1],
        "flat": [0, 3, -1, 8],
        "flat3": [0, -1, 8],
    }
    after, entries = raised(graph(f"{X}, {ANGLES}", f"{TWICE} {INTERLEAVED} {SUM}", **constants))
    assert ops(after)["RotaryEmbedding"] == 1, entries
    assert node(after, "RotaryEmbedding").attributes["interleaved"].as_int() == 1
    assert set(ops(after)) == {"Cos", "Sin", "RotaryEmbedding"}


def test_partial() -> None:
    """Phi: the first 8 of 12 dims are rotated, the rest passes."""
    body = (
        f"x = Slice(z, first0, eight, last) rest = Slice(z, eight, second1, last) {COS_SIN} {ROTATE}"
        " xc = Mul(x, cos) xs = Mul(rot, sin) r = Add(xc, xs) y = Concat<axis=-1>(r, rest)"
    )
    after, _ = raised(graph(f"float[b,3,s,12] z, {ANGLES}", body, eight=[8], **HALVES))
    assert ops(after) == {"Cos": 1, "Sin": 1, "RotaryEmbedding": 1}
    assert node(after, "RotaryEmbedding").attributes["rotary_embedding_dim"].as_int() == 8


def test_positions_before_heads() -> None:
    """x is [b,s,h,d]: the op stands between transpositions."""
    body = f"{COS_SIN} {ROTATE} {SUM}"
    constants: dict[str, Any] = HALVES | {"heads": [2]}
    after, _ = raised(graph(f"float[b,s,3,8] x, {ANGLES}", body, **constants))
    assert ops(after) == {"Cos": 1, "Sin": 1, "RotaryEmbedding": 1, "Transpose": 2}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            f"{COS_SIN} a, c = Split<axis=3, num_outputs=2>(x) n = Neg(a)"
            f" rot = Concat<axis=3>(c, n) {SUM}",
            "the negated part comes second",
        ),
        (
            f"{COS_SIN} a, c = Split<axis=3, num_outputs=2>(x) n = Neg(a)"
            f" rot = Concat<axis=3>(n, c) {SUM}",
            "are not its second and first half",
        ),
        (
            f"e = Concat<axis=-1>(f, g) co = Cos(e) si = Sin(e) cos = Unsqueeze(co, heads)"
            f" sin = Unsqueeze(si, heads) {ROTATE} {SUM}",
            "Concat e is not known to repeat itself along its last axis",
        ),
        (f"{COS_SIN} {ROTATE} xc = Mul(x, cos) xs = Mul(rot, sin) y = Sub(xc, xs)", "one Add"),
        (f"{COS_SIN} {ROTATE} xc = Mul(rot, cos) xs = Mul(rot, sin) y = Add(xc, xs)", "one Mul"),
        (f"{COS_SIN} {ROTATE} xc = Mul(z, cos) xs = Mul(rot, sin) y = Add(xc, xs)", "expected x * cos"),
    ],
    ids=["wrong sign", "wrong halves", "unequal halves", "difference", "no cos", "another x"],
)  # fmt: skip
def test_near_misses(body: str, reason: str) -> None:
    model = graph(f"{X}, {ANGLES}, float[b,s,4] g, float[b,3,s,8] z", body, **HALVES)
    after, entries = raised(model)
    assert reason in refusals(entries)
    assert ops(after) == ops(model)


def test_a_table_per_head_and_position_is_refused() -> None:
    body = f"co = Concat<axis=-1>(f, f) cos = Cos(co) sin = Sin(co) {ROTATE} {SUM}"
    model = graph(f"{X}, float[b,3,s,4] f", body, **HALVES)
    assert "does not hold one row per position" in refusals(raised(model)[1])
