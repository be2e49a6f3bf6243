"""What is one group and what is two, in graphs small enough to see it; and what pins a group."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from netlathe.analysis.axes import edits
from netlathe.analysis.axes.groups import Axes, Group, analyse
from netlathe.diagnostics import PassError
from netlathe.execute import compare, ort
from netlathe.ir import normal, verify
from tests.ir.onnx_text import matrix, model


def analysed(body: str, width: int = 4, **weights: object) -> Axes:
    """The analysis of ``x [b, s, width] -> y``, in normal form."""
    made = model(f"float[b,s,{width}] x", "float y", body, **weights)
    normal.normalize(made)
    return analyse(made)


def terms(axes: Axes, name: str) -> str:
    """The dims of a weight, in terms of groups named by their sizes."""
    value = axes.model.graph.initializers[name]
    shown = " ".join(axes.term(value, dim) for dim in range(len(value.shape or ())))
    for group in sorted(axes.groups, key=lambda g: -len(g.name)):
        shown = shown.replace(group.name, f"<{group.size}>")
    return shown


def group(axes: Axes, name: str, dim: int, index: int = 0) -> Group:
    """One of the groups that a dim of a weight is made of."""
    return axes.of(axes.model.graph.initializers[name], dim)[index]


def same(axes: Axes, *places: tuple[str, int]) -> bool:
    """Whether dims are made of the same groups."""
    return len({axes.of(axes.model.graph.initializers[n], dim) for n, dim in places}) == 1


# -- what belongs together ----------------------------------------------------------------------------


def test_a_split_at_other_places_than_the_concat_makes_the_finest_groups() -> None:
    axes = analysed(
        "a = MatMul(x, w) c = MatMul(x, v) u = Concat<axis=2>(a, c)"
        " l, r = Split<axis=2>(u, n) p = MatMul(l, wl) q = MatMul(r, wr) y = Add(p, q)",
        w=matrix(4, 3), v=matrix(4, 5), n=[4, 4], wl=matrix(4, 2), wr=matrix(4, 2),
    )  # fmt: skip
    assert terms(axes, "w") == "<4> <3>" and terms(axes, "v") == "<4> [<1> | <4>]"
    assert terms(axes, "wl") == "[<3> | <1>] <2>" and terms(axes, "wr") == "<4> <2>"
    sizes = {use.spot: g.size for g in axes.groups for use in g.uses if use.node.op_type == "Split"}
    assert sizes == {(1, 0): 1, (1, 1): 4}


def test_a_residual_stream_is_one_group_and_each_hidden_width_another() -> None:
    axes = analysed(
        "h = MatMul(x, i) a = MatMul(h, w1) r = Relu(a) c = MatMul(r, w2) z = Add(h, c)"
        " n = RMSNormalization<axis=-1>(z, g) y = MatMul(n, o)",
        i=matrix(4, 6), w1=matrix(6, 8), w2=matrix(8, 6), g=matrix(6), o=matrix(6, 2),
    )  # fmt: skip
    assert same(axes, ("i", 1), ("w1", 0), ("w2", 1), ("g", 0), ("o", 0))
    assert same(axes, ("w1", 1), ("w2", 0)) and not same(axes, ("w1", 0), ("w1", 1))
    assert [g.allows("delete") for g in axes.groups] == [
        False,
        True,
        True,
        False,
    ]  # x, h, hidden, y


def test_grouped_queries_share_a_key_head() -> None:
    axes = analysed(
        """q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv)
        y = Attention<q_num_heads=6, kv_num_heads=2>(q, k, v)""",
        wq=matrix(4, 6 * 5), wk=matrix(4, 2 * 5), wv=matrix(4, 2 * 3),
    )  # fmt: skip
    assert terms(axes, "wq") == "<4> (<2> (<3> <5>))"  # kv heads, queries of each, head size
    assert terms(axes, "wk") == "<4> (<2> <5>)" and terms(axes, "wv") == "<4> (<2> <3>)"
    assert group(axes, "wq", 1, 0) is group(axes, "wk", 1, 0) is group(axes, "wv", 1, 0)
    assert group(axes, "wq", 1, 2) is group(axes, "wk", 1, 1) is not group(axes, "wv", 1, 1)
    heads = {use.spot for use in group(axes, "wk", 1, 0).uses}
    assert heads == {"q_num_heads", "kv_num_heads"}


@pytest.mark.parametrize("how", ["split", "stacked"])
def test_fused_projections_have_a_segment_for_each(how: str) -> None:
    split = "q, k, v = Split<axis=2>(f, n)"
    stacked = """s = Reshape(f, n) t = Transpose<perm=[2,0,1,3]>(s)
        q = Gather<axis=0>(t, zero) k = Gather<axis=0>(t, one) v = Gather<axis=0>(t, two)"""
    axes = analysed(
        f"f = MatMul(x, w) {split if how == 'split' else stacked}"
        " a = Attention<q_num_heads=2, kv_num_heads=2>(q, k, v) y = MatMul(a, o)",
        w=matrix(4, 18), n=[6, 6, 6] if how == "split" else [0, 0, 3, 6], o=matrix(6, 2),
        zero=np.array(0), one=np.array(1), two=np.array(2),
    )  # fmt: skip
    if how == "split":  # the value's width is its own
        assert terms(axes, "w") == "<4> [(<2> <3>) | (<2> <3>) | (<2> <3>)]"
        assert len(axes.of(axes.model.graph.initializers["w"], 1)) == 3
    else:  # one reshape for all three: they are of one width
        assert terms(axes, "w") == "<4> ([<1> | <1> | <1>] (<2> <3>))"
    assert all(g.allows("delete") for g in axes.of(axes.model.graph.initializers["o"], 0))


def test_tied_embeddings_are_one_weight() -> None:
    made = model(
        "int64[b,s] ids", "float y",
        "h = Gather<axis=0>(table, ids) r = Relu(h) t = Transpose<perm=[1,0]>(table) y = MatMul(r, t)",
        table=matrix(9, 6),
    )  # fmt: skip
    normal.normalize(made)
    axes = analyse(made)
    assert terms(axes, "table") == "<9> <6>" and len(axes.groups) == 2
    words, width = axes.groups
    assert width.allows("delete") and [pin.reason for pin in words.pins] == [
        "Gather looks up positions that graph input ids holds",
        "graph output y has it",
    ]


def test_parallel_branches_read_one_stream_and_add_to_it() -> None:
    axes = analysed(
        "n = LayerNormalization(h, g) a = MatMul(n, wa) c = Relu(a) d = MatMul(c, va)"
        " e = MatMul(n, we) f = MatMul(e, ve) p = Add(d, f) z = Add(h, p) h = MatMul(x, i)"
        " y = MatMul(z, o)",
        i=matrix(4, 6), g=matrix(6), wa=matrix(6, 8), va=matrix(8, 6), we=matrix(6, 8),
        ve=matrix(8, 6), o=matrix(6, 2),
    )  # fmt: skip
    assert same(axes, ("i", 1), ("g", 0), ("wa", 0), ("we", 0), ("va", 1), ("ve", 1), ("o", 0))
    assert not same(axes, ("wa", 1), ("we", 1))


def test_a_channel_shuffle_mixes_groups_and_channels() -> None:
    made = model(
        "float[b,3,4,4] x", "float y",
        """a = Conv(x, w) s = Reshape(a, n) t = Transpose<perm=[0,2,1,3,4]>(s) u = Reshape(t, m)
        y = Conv<group=2>(u, v)""",
        w=matrix(8, 3, 1, 1), n=[0, 2, 4, 4, 4], m=[0, 8, 4, 4], v=matrix(6, 4, 1, 1),
    )  # fmt: skip
    normal.normalize(made)
    axes = analyse(made)
    assert terms(axes, "w").startswith("(<2> (<2> <2>)) ")
    attribute = [use for g in axes.groups for use in g.uses if use.spot == "group"]
    assert len(attribute) == 1


def test_no_deletion_takes_groups_of_a_convolution_and_channels_of_those_that_stay() -> None:
    made = model(
        "float[b,3,5] x", "float y",
        """h = Conv(x, i) a = Conv<group=2>(h, v) r = Reshape(a, m)
        t = Transpose<perm=[0,2,1,3]>(r) f = Reshape(t, n) c = Conv<group=2>(f, w) z = Add(h, c)
        y = Conv(z, o)""",
        i=matrix(8, 3, 1), v=matrix(8, 4, 1), m=[0, 2, 4, 5], n=[0, 8, 5], w=matrix(8, 4, 1),
        o=matrix(2, 8, 1),
    )  # fmt: skip
    normal.normalize(made)
    axes = analyse(made)
    assert terms(axes, "i").startswith("(<2> <4>)") and terms(axes, "v").startswith(
        "(<2> (<2> <2>))"
    )
    groups, channels = (group(axes, "i", 0, index) for index in (0, 1))
    assert channels.allows("delete") and group(axes, "v", 0, 1).allows("delete")
    assert (
        groups is group(axes, "v", 0) and not groups.allows("delete") and groups.allows("permute")
    )
    assert {pin.reason for pin in groups.forbidding("delete")} == {
        "Conv has it in the number of its groups and in the channels of each"
    }


def test_a_chain_of_shuffles_does_not_carry_rows_that_stay() -> None:
    """What one half keeps is in a row of every shuffle before: 12 of them would stand in its term."""
    unit = (
        "l{0}, r{0} = Split<axis=2>(z{0}, n) c{0} = MatMul(r{0}, w{0})"
        " u{0} = Concat<axis=2>(l{0}, c{0}) v{0} = Reshape(u{0}, two)"
        " t{0} = Transpose<perm=[0,1,3,2]>(v{0}) z{1} = Reshape(t{0}, one) "
    )
    body = "z0 = MatMul(x, i) " + "".join(unit.format(at, at + 1) for at in range(12))
    axes = analysed(
        body + "y = MatMul(z12, o)",
        4,
        i=matrix(4, 8), n=[4, 4], two=[0, 0, 2, 4], one=[0, 0, 8], o=matrix(8, 2),
        **{f"w{at}": matrix(4, 4) for at in range(12)},
    )  # fmt: skip
    last = axes.model.graph.initializers["w11"]
    assert len(axes.of(last, 0)) <= 8
    assert all(g.pins or g.least == 1 for g in axes.groups if not g.allows("delete"))


def test_pixel_shuffle_keeps_its_blocks() -> None:
    made = model(
        "float[b,3,4,4] x", "float y", "a = Conv(x, w) p = DepthToSpace<blocksize=2>(a) y = Conv(p, v)",
        w=matrix(20, 3, 1, 1), v=matrix(2, 5, 1, 1),
    )  # fmt: skip
    normal.normalize(made)
    axes = analyse(made)
    channels = group(axes, "v", 1)
    assert terms(axes, "w").startswith("(<2> (<2> <5>)) ") and channels.allows("delete")
    block = group(axes, "w", 0)
    assert block.size == 2 and not block.allows("delete")
    assert block.pins[0].reason == "DepthToSpace lays blocks of them out in space"


@pytest.mark.parametrize("clip", ["", "Clip(i, low, high)", "Clip(i, , high)"])
def test_experts_go_with_their_column_of_the_router(clip: str) -> None:
    bounds = {"low": np.array(0), "high": np.array(5)} if clip else {}
    made = model(
        "float[b,4] x", "float y",
        f"""l = MatMul(x, router) p = Softmax<axis=-1>(l) w, i = TopK<axis=-1>(p, two)
        j = {clip or "Identity(i)"} f = Reshape(j, flat) e = Gather<axis=0>(experts, f) r = Unsqueeze(x, one)
        t = Expand(r, twice) s = Reshape(t, rows) u = Unsqueeze(s, last) m = MatMul(e, u)
        q = Squeeze(m, last) y = MatMul(q, o)""",
        router=matrix(4, 6), two=[2], flat=[-1], experts=matrix(6, 5, 4), one=[1], twice=[1, 2, 1],
        rows=[-1, 4], last=[2], o=matrix(5, 3), **bounds,
    )  # fmt: skip
    normal.normalize(made)
    axes = analyse(made)
    assert same(axes, ("router", 1), ("experts", 0))
    experts = group(axes, "router", 1)
    assert experts.least == 2 and experts.allows("delete")
    with pytest.raises(PassError, match="1 of 6 positions of g1 would be left, 2 must stay"):
        edits.delete(axes, {experts: [0, 1, 2, 3, 4]})


def test_equal_vectors_that_several_read_do_not_make_their_widths_one() -> None:
    axes = analysed(
        "a = MatMul(x, w) n = RMSNormalization<axis=-1>(a, ones) c = MatMul(n, v)"
        " d = RMSNormalization<axis=-1>(c, ones) y = MatMul(d, o)",
        w=matrix(4, 6), v=matrix(6, 6), o=matrix(6, 2), ones=np.ones(6, np.float32),
    )  # fmt: skip
    assert not same(axes, ("w", 1), ("v", 1))
    edits.delete(axes, {group(axes, "w", 1): [0, 5], group(axes, "v", 1): [3]})
    verify.check(axes.model)
    norms = [node for node in axes.model.graph if node.op_type == "RMSNormalization"]
    widths = [node.inputs[1].const_value.numpy() for node in norms]  # type: ignore[union-attr]
    np.testing.assert_allclose(widths[0], np.full(4, np.sqrt(6 / 4)), rtol=1e-6)
    np.testing.assert_allclose(widths[1], np.full(5, np.sqrt(6 / 5)), rtol=1e-6)


# -- caches -----------------------------------------------------------------------------------------


def _cached(kind: str) -> ir.Model:
    kv = "float[b,2,p,3] pk, float[b,2,p,5] pv"
    if kind == "concat":
        body = """k = Concat<axis=2>(pk, k1) v = Concat<axis=2>(pv, v1)
            a = Attention<scale=0.5>(q, k, v)"""
    else:
        body = "a, k, v = Attention<scale=0.5>(q, k1, v1, , pk, pv)"
    made = model(
        f"float[b,s,4] x, {kv}", "float[b,s,2] y, float k, float v",
        f"""f = MatMul(x, wq) g = MatMul(x, wk) h = MatMul(x, wv)
        q0 = Reshape(f, nq) k0 = Reshape(g, nk) v0 = Reshape(h, nv)
        q = Transpose<perm=[0,2,1,3]>(q0) k1 = Transpose<perm=[0,2,1,3]>(k0)
        v1 = Transpose<perm=[0,2,1,3]>(v0) {body}
        t = Transpose<perm=[0,2,1,3]>(a) m = Reshape(t, no) y = MatMul(m, wo)""",
        wq=matrix(4, 12), wk=matrix(4, 6), wv=matrix(4, 10), wo=matrix(20, 2),
        nq=[0, 0, 4, 3], nk=[0, 0, 2, 3], nv=[0, 0, 2, 5], no=[0, 0, 20],
    )  # fmt: skip
    normal.normalize(made)
    return made


@pytest.mark.parametrize("kind", ["concat", "attention"])
def test_a_cache_changes_with_its_heads(kind: str) -> None:
    made = _cached(kind)
    axes = analyse(made)
    heads = group(axes, "wk", 1, 0)
    assert heads.interface == ("pk", "pv", "k", "v") and heads.allows("delete")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 4)).astype(np.float32)
    pk, pv = (rng.standard_normal((2, 2, 6, n)).astype(np.float32) for n in (3, 5))
    # Without the first head: its queries' rows of the output projection are zero.
    masked = made.clone()
    value = masked.graph.initializers["wo"]
    assert value.const_value is not None
    array = value.const_value.numpy().copy()
    array[:10] = 0
    value.const_value = ir.tensor(array)
    expected = ort.run(masked, {"x": x, "pk": pk, "pv": pv})
    edits.delete(axes, {heads: [0]})
    verify.check(made)
    assert [str(v.shape) for v in made.graph.inputs[1:]] == ["[b,1,p,3]", "[b,1,p,5]"]
    actual = ort.run(made, {"x": x, "pk": pk[:, 1:], "pv": pv[:, 1:]})
    assert compare.relative_error(actual["y"], expected["y"]) < 1e-5
    np.testing.assert_array_equal(actual["k"], expected["k"][:, 1:])
    np.testing.assert_array_equal(actual["v"], expected["v"][:, 1:])


# -- pins -------------------------------------------------------------------------------------------


def test_an_operator_without_a_signature_pins_what_it_touches_and_is_named() -> None:
    axes = analysed(
        "h = MatMul(x, w) u = Det(s) a = MatMul(h, v) y = Mul(a, u) s = Unsqueeze(h, one)",
        w=matrix(4, 6), v=matrix(6, 2), one=[0],
    )  # fmt: skip
    (pin,) = {pin.reason for pin in group(axes, "w", 1).pins}
    assert pin == "Det has no axis signature"
    with pytest.raises(PassError, match="delete is not possible: Det has no axis signature"):
        edits.delete(axes, {group(axes, "w", 1): [0]})


def test_an_operator_of_another_domain_pins_both_sides() -> None:
    made = model(
        "float[b,4] x", "float y", "h = MatMul(x, w) r = Relu(h) y = MatMul(r, v)",
        w=matrix(4, 6), v=matrix(6, 2),
    )  # fmt: skip
    (relu,) = [node for node in made.graph if node.op_type == "Relu"]
    relu.domain, relu.op_type = "com.example", "Mystery"
    normal.normalize(made)
    axes = analyse(made)
    assert not group(axes, "w", 1).allows("permute") and not group(axes, "v", 0).allows("delete")
    assert {pin.reason for pin in group(axes, "w", 1).pins} == {
        "com.example::Mystery has no axis signature"
    }
    # What it makes has no shape, so the next operator cannot say anything either.
    assert {pin.reason for pin in group(axes, "v", 0).pins} == {
        "MatMul has an operand r of unknown shape"
    }


@pytest.mark.parametrize(
    "node", ["Cast<to=1>(i)", "Clip(i, , high)", "Clip(i, low)"], ids=["cast", "above", "below"]
)
def test_positions_that_are_computed_with_pin_their_axis(node: str) -> None:
    made = model(
        "float[b,4] x", "float y",
        f"l = MatMul(x, w) w1, i = TopK<axis=-1>(l, one) j = {node} f = Cast<to=1>(j) y = Mul(f, w1)",
        w=matrix(4, 6), one=[1], high=np.array(4), low=np.array(1),
    )  # fmt: skip
    normal.normalize(made)
    reasons = {pin.reason for pin in group(analyse(made), "w", 1).pins}
    assert reasons == {f"{node.split('<')[0].split('(')[0]} computes with its positions"}


def test_what_no_common_split_expresses_is_pinned() -> None:
    axes = analysed(
        "h = MatMul(x, w) r = Reshape(h, n) t = Transpose<perm=[0,1,3,2]>(r) s = Reshape(t, m)"
        " z = Add(h, s) y = MatMul(z, o)",
        w=matrix(4, 6), n=[0, 0, 2, 3], m=[0, 0, 6], o=matrix(6, 2),
    )  # fmt: skip
    assert all(not g.allows("delete") for g in axes.of(axes.model.graph.initializers["w"], 1))
    reasons = {pin.reason for g in axes.groups for pin in g.pins}
    assert "Add looks at it in a way that no common split expresses" in reasons


def test_a_dim_of_several_groups_keeps_a_position() -> None:
    axes = analysed(
        "a = MatMul(x, w) c = MatMul(x, v) u = Concat<axis=2>(a, c) r = Relu(u)"
        " l, m = Split<axis=2>(r, n) p = MatMul(l, wl) q = MatMul(m, wr) y = Add(p, q)",
        w=matrix(4, 3), v=matrix(4, 5), n=[4, 4], wl=matrix(4, 2), wr=matrix(4, 2),
    )  # fmt: skip
    three, one = axes.of(axes.model.graph.initializers["wl"], 0)
    edits.delete(axes, {one: [0], three: [1]})
    verify.check(axes.model)
    axes = analyse(axes.model)
    assert terms(axes, "wl") == "<2> <2>"


def test_a_part_without_positions_adds_nothing() -> None:
    """The definition of RotaryEmbedding puts an empty rest behind what turns."""
    axes = analysed(
        "h = MatMul(x, w) t, e = Split<axis=2>(h, n) u = Concat<axis=2>(t, e) z = Add(u, h)"
        " y = MatMul(z, o)",
        w=matrix(4, 6), n=[6, 0], o=matrix(6, 2),
    )  # fmt: skip
    assert same(axes, ("w", 1), ("o", 0)) and group(axes, "w", 1).allows("delete")


def test_control_flow_pins_what_its_branches_read() -> None:
    made = model(
        "float[b,4] x, bool c", "float y",
        """h = MatMul(x, w)
        z = If (c) <then_branch = t () => (float p) { p = Relu(h) },
                    else_branch = e () => (float q) { q = Neg(h) }>
        y = MatMul(z, v)""",
        w=matrix(4, 6), v=matrix(6, 2),
    )  # fmt: skip
    normal.normalize(made)
    axes = analyse(made)
    assert not group(axes, "w", 1).allows("delete") and not group(axes, "v", 0).allows("delete")
    assert {pin.reason for pin in group(axes, "w", 1).pins} == {"If has no axis signature"}
