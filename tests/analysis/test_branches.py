"""Residual branches: found on every family, told from what only looks like one, removed with their own."""

from __future__ import annotations

from typing import Any

import networkx as nx
import numpy as np
import onnx_ir as ir
import pytest

from netlathe.analysis.blocks import blocks
from netlathe.analysis.branches import Branch, removal, residual_branches
from netlathe.analysis.cores import Caches
from netlathe.analysis.flow import Flow
from netlathe.analysis.removal import Operand, remove
from netlathe.ir import provenance
from tests import zoo, zoo_ir
from tests.analysis.residual import X, attention, cached, ffn, typed
from tests.ir.onnx_text import matrix

IMAGE = "float[b,4,6,6] x"


def found(made: ir.Model) -> list[tuple[str, str | None]]:
    """Kind and value of every branch."""
    return [(branch.kind, branch.value.name) for branch in residual_branches(made)]


def only(made: ir.Model) -> Branch:
    """The one branch."""
    (branch,) = residual_branches(made)
    return branch


# -- families -------------------------------------------------------------------------------------

# attention, ffn, conv, blocks, of them not removable: counted by hand from the configs in tests/zoo.py.
EXPECTED = {
    "minilm": (6, 6, 0, 6, 0),
    "llama": (2, 2, 0, 2, 0),
    "bert": (2, 2, 0, 2, 0),
    "gpt2": (2, 2, 0, 2, 0),
    "opt": (2, 2, 0, 2, 0),
    "mistral": (2, 2, 0, 2, 0),
    "qwen2": (2, 2, 0, 2, 0),
    "phi": (2, 2, 0, 2, 0),  # parallel
    "gemma": (2, 2, 0, 2, 0),
    "falcon": (2, 2, 0, 2, 0),  # parallel
    "vit": (2, 2, 0, 2, 0),
    "swin": (4, 4, 0, 4, 0),  # two stages of a plain and a shifted block
    "resnet": (
        0,
        0,
        4,
        4,
        2,
    ),  # stages of 1, 2, 1; the last two stages begin with a strided shortcut
    "mobilenet_v2": (0, 0, 10, 10, 0),  # 17 inverted residuals, 7 of which change the shape
    "efficientnet": (0, 0, 0, 0, 0),  # one block a stage, and each changes the shape
    "convnext": (0, 4, 0, 4, 0),  # a depthwise convolution, then an MLP
    "segformer": (3, 3, 0, 3, 0),  # 1 + 2
    "t5": (6, 4, 0, 4, 0),  # encoder: 2; decoder: 2 + 2 that attend to the encoder
    "whisper": (6, 4, 0, 4, 0),
    "mixtral": (2, 2, 0, 2, 0),
}
QUICK = ("llama", "gpt2", "resnet", "t5", "phi", "convnext")


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in zoo.NAMES]
)
def test_every_family(name: str) -> None:
    made = zoo_ir.captured(name)
    branches = residual_branches(made)
    kinds = [branch.kind for branch in branches]
    counts = tuple(kinds.count(kind) for kind in ("attention", "ffn", "conv"))
    grouped = blocks(branches)
    refused = sum(bool(block.reason) for block in grouped)
    assert (*counts, len(grouped), refused) == EXPECTED[name]
    assert sum(counts) == len(branches)
    crossing = [b for b in branches if b.crosses]
    assert len(crossing) == (2 if name in ("t5", "whisper") else 0)
    assert all((b.norm is not None) == (name in ("minilm", "bert")) for b in branches)
    assert all(b.channel_axis == (1 if "conv" in name or counts[2] else -1) for b in branches)
    _has_a_layer_each(made, grouped)


def _has_a_layer_each(made: ir.Model, grouped: list[Any]) -> None:
    """Blocks do not mix layers, and what they free are the weights of their layer."""
    for block in grouped:
        assert block.module_path and not block.module_path.startswith(".")
        names = [v.name or "" for v in removal(made, block.branches).weights]
        matrices = [n for n in names if n.endswith(".weight") and "convolution" not in n]
        assert all(name.startswith(block.module_path) for name in matrices)


def test_a_parallel_block_shares_its_norm() -> None:
    made = zoo_ir.captured("phi")
    one, two = residual_branches(made)[:2]
    assert (one.kind, two.kind) == ("attention", "ffn") and one.is_parallel and two.is_parallel
    assert one.split is two.split and one.total is two.total and one.block == two.block
    alone = {v for branch in (one, two) for v in removal(made, [branch]).weights}
    both = set(removal(made, [one, two]).weights)
    norm = {v.name for v in both - alone}
    assert {"model.layers.0.input_layernorm.weight", "model.layers.0.input_layernorm.bias"} <= norm


def test_module_paths_are_those_of_the_sublayers() -> None:
    paths = [b.module_path for b in residual_branches(zoo_ir.captured("t5"))]
    assert paths[:2] == [
        "encoder.block.0.layer.0.SelfAttention",
        "encoder.block.0.layer.1.DenseReluDense",
    ]
    assert paths[5] == "decoder.block.0.layer.1.EncDecAttention"


# -- forms ----------------------------------------------------------------------------------------


def test_pre_norm_and_its_parts() -> None:
    made = typed(ffn("f", "x") + " y = Add(x, f3)")
    branch = only(made)
    assert (branch.kind, branch.reason, branch.norm) == ("ffn", "", None)
    assert branch.split is branch.skip is branch.rest is made.graph.inputs[0]
    assert branch.total is branch.join.outputs[0] is made.graph.outputs[0]
    assert [node.op_type for node in branch.region] == [
        "RMSNormalization",
        "MatMul",
        "Relu",
        "MatMul",
    ]
    assert branch.nodes == branch.region
    assert {v.name for v in branch.weights} == {"g", "up", "down"}


def test_the_order_of_operands_does_not_matter() -> None:
    assert found(typed(ffn("f", "x") + " y = Add(f3, x)")) == [("ffn", "f3")]


def test_a_bias_belongs_to_the_branch() -> None:
    made = typed(ffn("f", "x") + " d = Add(f3, c) y = Add(d, x)", c=matrix(8))
    assert found(made) == [("ffn", "d")]
    assert "c" in {v.name for v in only(made).weights}


def test_post_norm_keeps_its_norm() -> None:
    body = """u = MatMul(x, up) r = Relu(u) d = MatMul(r, down) t = Add(d, x)
        y = LayerNormalization(t, g)"""
    branch = only(typed(body))
    assert branch.norm is not None and branch.norm.op_type == "LayerNormalization"
    assert branch.norm not in branch.nodes and branch.total.name == "t"


def test_the_final_norm_of_a_pre_norm_model_is_no_post_norm() -> None:
    branch = only(typed(ffn("f", "x") + " t = Add(x, f3) y = RMSNormalization(t, g)"))
    assert branch.norm is None


@pytest.mark.parametrize("sum_", ["t = Add(a3, f3) y = Add(t, x)", "t = Add(x, a3) y = Add(t, f3)"])
def test_parallel_branches(sum_: str) -> None:
    made = typed(attention("a", "x") + ffn("f", "x") + sum_)
    one, two = residual_branches(made)
    assert [(one.kind, one.value.name), (two.kind, two.value.name)] == [
        ("attention", "a3"),
        ("ffn", "f3"),
    ]
    assert one.block == two.block and one.is_parallel and two.is_parallel
    assert one.total is two.total is made.graph.outputs[0]
    assert one.skip is two.skip is made.graph.inputs[0]


def test_parallel_products_of_one_branch_stay_together() -> None:
    low_rank = "l = MatMul(f2, wa) m = MatMul(l, wb) t = Add(f3, m)"
    made = typed(ffn("f", "x") + low_rank + " y = Add(x, t)", wa=matrix(16, 2), wb=matrix(2, 8))
    assert found(made) == [("ffn", "t")]
    shared = typed(ffn("f", "x") + ffn("e", "x") + " t = Add(f3, e3) y = Add(t, x)")
    assert found(shared) == [("ffn", "t")]  # experts and a shared expert


def test_a_sum_with_something_else() -> None:
    made = typed(ffn("f", "x") + " t = Add(x, f3) y = Add(t, z)", inputs=f"{X}, float[b,s,8] z")
    branch = only(made)
    assert branch.value.name == "f3" and branch.total.name == "t"


def test_an_adapter_is_a_branch_inside_a_branch() -> None:
    adapter = "p = MatMul(a3, wa) r = Relu(p) q = MatMul(r, wb) t = Add(a3, q)"
    made = typed(attention("a", "x") + adapter + " y = Add(t, x)", wa=matrix(8, 2), wb=matrix(2, 8))
    assert found(made) == [("ffn", "q"), ("attention", "t")]
    inner, outer = residual_branches(made)
    assert inner.join in outer.region and inner.split.name == "a3"


def test_what_holds_a_layer_is_neither_attention_nor_ffn() -> None:
    layer = attention("a", "x") + " h = Add(x, a3) " + ffn("f", "h") + " k = Add(h, f3)"
    made = typed(f"{layer} m = MatMul(k, wo) y = Add(x, m)")
    assert found(made) == [("attention", "a3"), ("ffn", "f3"), ("other", "m")]


def test_a_scaled_stream_and_a_scaled_branch() -> None:
    made = typed(
        ffn("f", "x") + " d = Mul(f3, c) e = Mul(x, two) y = Add(e, d)", c=matrix(8), two=2.0
    )
    branch = only(made)
    assert branch.value.name == "d" and branch.skip.name == "e" and branch.split.name == "x"


def test_attention_that_was_not_raised() -> None:
    body = """q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv) t = Transpose<perm=[0,2,1]>(k)
        s = MatMul(q, t) sc = Mul(s, c) m = Add(sc, mask) p = Softmax<axis=-1>(m) o = MatMul(p, v)
        d = MatMul(o, wo) y = Add(x, d)"""
    branch = only(typed(body, inputs=f"{X}, float[b,s,s] mask", c=0.5))
    assert branch.kind == "attention" and not branch.crosses


def test_a_router_is_no_attention() -> None:
    body = """r = MatMul(x, gate) p = Softmax<axis=-1>(r) u = MatMul(x, up) a = Relu(u)
        s = ReduceMax<keepdims=1>(p, last) w = Mul(a, s) d = MatMul(w, down) y = Add(x, d)"""
    assert only(typed(body, gate=matrix(8, 4), last=[-1])).kind == "ffn"


def test_cross_attention_reads_another_stream() -> None:
    body = """q = MatMul(x, wq) k = MatMul(e, wk) v = MatMul(e, wv)
        a = Attention<q_num_heads=2, kv_num_heads=2>(q, k, v) o = MatMul(a, wo) y = Add(x, o)"""
    branch = only(typed(body, inputs=f"{X}, float[b,t,8] e"))
    assert branch.kind == "attention" and branch.crosses
    assert [n.outputs[0].name for n in branch.region] == ["q", "a", "o"]
    assert {n.outputs[0].name for n in branch.nodes} == {"q", "k", "v", "a", "o"}


def test_what_others_need_stays() -> None:
    made = typed(ffn("f", "x") + " y = Add(x, f3)", outputs="float y, float f2")
    branch = only(made)
    assert [n.outputs[0].name for n in branch.nodes] == ["f3"]
    assert {v.name for v in branch.weights} == {"down"}


CONV: dict[str, Any] = {
    "w1": matrix(8, 4, 1, 1),
    "w2": matrix(8, 1, 3, 3),
    "w3": matrix(4, 8, 1, 1),
    "s1": matrix(2, 8, 1, 1),
    "s2": matrix(8, 2, 1, 1),
}
SE = """p = Conv({x}, w1) q = Relu(p) d = Conv<group=8, pads=[1,1,1,1], strides=[{n},{n}]>(q, w2)
    m = GlobalAveragePool(d) r = Conv(m, s1) t = Relu(r) u = Conv(t, s2) e = Sigmoid(u)
    w = Mul(d, e) z = Conv(w, w3)"""


def test_inverted_residual_with_squeeze_and_excite() -> None:
    made = typed(SE.format(x="x", n=1) + " y = Add(z, x)", inputs=IMAGE, **CONV)
    branch = only(made)
    assert (branch.kind, branch.channel_axis, branch.reason) == ("conv", 1, "")
    assert len(branch.nodes) == 10


def test_a_projection_on_the_shortcut_cannot_be_removed() -> None:
    body = f"i = Relu(x) {SE.format(x='i', n=2)} c = Conv<strides=[2,2]>(i, wp) y = Add(z, c)"
    branch = only(typed(body, inputs=IMAGE, wp=matrix(4, 4, 1, 1), **CONV))
    assert branch.kind == "conv" and branch.split.name == "i"
    assert branch.reason == "its shortcut is not the stream itself (Conv)"


def test_pooling_mixes_tokens() -> None:
    body = """p = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]>(x) n = Neg(x) d = Add(p, n)
        y = Add(x, d)"""
    assert found(typed(body, inputs=IMAGE)) == [("other", "d")]


def test_a_skip_over_a_deeper_part() -> None:
    body = f"i = Relu(x) {SE.format(x='i', n=2)} o = ConvTranspose<strides=[2,2]>(z, wt)"
    made = typed(body + " y = Add(i, o)", inputs=IMAGE, wt=matrix(4, 4, 2, 2), **CONV)
    assert found(made) == [("conv", "o")]


# -- what is none ---------------------------------------------------------------------------------

NOT_BRANCHES = {
    "bias": "u = MatMul(x, wq) y = Add(u, c)",
    "low rank": "u = MatMul(x, wq) l = MatMul(x, wa) m = MatMul(l, wb) y = Add(u, m)",
    "gelu": "p = Mul(x, x) q = Mul(p, x) r = Mul(q, half) y = Add(x, r)",
    "decomposed norm": "m = ReduceMean<keepdims=1>(x, last) n = Neg(m) y = Add(x, n)",
    "two streams": """u = MatMul(x, up) r = Relu(u) d = MatMul(r, down) h = Relu(d) t = Add(x, h)
        v = MatMul(h, wq) y = Sub(t, v)""",
    "rotary": """r = Neg(x) p = Mul(x, z) q = Mul(r, z) t = Add(p, q) y = MatMul(t, wq)""",
}


@pytest.mark.parametrize("name", NOT_BRANCHES)
def test_what_only_looks_like_a_branch(name: str) -> None:
    made = typed(
        NOT_BRANCHES[name],
        inputs=f"{X}, float[b,s,8] z",
        c=matrix(8),
        wa=matrix(8, 2),
        wb=matrix(2, 8),
        half=0.5,
        last=[-1],
    )
    assert found(made) == []


def test_a_positional_embedding_is_no_branch() -> None:
    body = """e = Gather(table, ids) n = Shape<start=1>(ids) l = Squeeze(n) r = Range(zero, l, one)
        p = Gather(positions, r) h = Add(e, p) """
    made = typed(
        body + ffn("f", "h") + " y = Add(h, f3)",
        inputs="int64[b,s] ids",
        table=matrix(30, 8),
        positions=matrix(20, 8),
        zero=np.array(0),
        one=np.array(1),
    )
    assert found(made) == [("ffn", "f3")]
    assert only(made).split.name == "h"


def test_a_stream_that_the_branch_widens_cannot_do_without() -> None:
    branch = only(
        typed(ffn("f", "x") + " t = Add(f3, z) y = Add(x, t)", inputs=f"{X}, float[b,s,8] z")
    )
    assert branch.reason == ""
    body = "u = MatMul(x, up) m = MatMul(z, down) t = Add(x, m) y = Relu(t)"
    assert found(typed(body, inputs="float[1,8] x, float[b,16] z")) == []
    wide = "u = Expand(x, three) v = MatMul(u, wq) y = Add(x, v)"
    branch = only(typed(wide, inputs="float[1,8] x", three=[3, 8]))
    assert branch.reason == "without it the stream is f32[1,8] and not f32[3,8]"


# -- blocks ---------------------------------------------------------------------------------------

LAYERS = " ".join(
    f"{attention(f'a{i}', f'h{i}')} m{i} = Add(h{i}, a{i}3) {ffn(f'f{i}', f'm{i}')}"
    f" h{i + 1} = Add(m{i}, f{i}3)"
    for i in range(2)
)
STACK = f"h0 = Relu(x) {LAYERS} y = Relu(h2)"


def numbers(made: ir.Model) -> list[int]:
    return [branch.block for branch in residual_branches(made)]


def place(made: ir.Model, paths: dict[str, str]) -> ir.Model:
    """Give the nodes that make values with these beginnings a module path."""
    for node in made.graph:
        for start, path in paths.items():
            if (node.outputs[0].name or "").startswith(start):
                provenance.mark(node, module=path)
    return made


def test_blocks_without_module_paths() -> None:
    branches = residual_branches(typed(STACK))
    assert [b.block for b in branches] == [0, 0, 1, 1]
    first, second = blocks(branches)
    assert (first.start.name, first.end.name, second.end.name) == ("h0", "h1", "h2")


def test_paths_tell_layers_that_lost_a_part() -> None:
    body = f"{attention('a', 'x')} m = Add(x, a3) {ffn('f', 'm')} y = Add(m, f3)"
    assert numbers(typed(body)) == [0, 0]
    assert numbers(place(typed(body), {"a": "layers.0.attn", "f": "layers.1.mlp"})) == [0, 1]


def test_layers_with_two_ffns() -> None:
    layers = " ".join(
        f"{ffn(f'e{i}', f'h{i}')} k{i} = Add(h{i}, e{i}3) {attention(f'a{i}', f'k{i}')}"
        f" m{i} = Add(k{i}, a{i}3) {ffn(f'f{i}', f'm{i}')} h{i + 1} = Add(m{i}, f{i}3)"
        for i in range(2)
    )
    paths = {
        f"{part}{i}": f"encoder.layers.{i}.{part}" for i in range(2) for part in ("e", "a", "f")
    }
    made = place(typed(f"h0 = Relu(x) {layers} y = Relu(h2)"), paths)
    assert numbers(made) == [0, 0, 0, 1, 1, 1]


def test_ffns_alone_are_blocks_alone() -> None:
    body = f"{ffn('f', 'x')} h = Add(x, f3) {ffn('e', 'h')} y = Add(h, e3)"
    assert numbers(typed(body)) == [0, 1]
    # A mixer's layer adds twice.
    paths = {"f": "blocks.0.tokens", "h": "blocks.0", "e": "blocks.0.channels", "y": "blocks.0"}
    assert numbers(place(typed(body), paths)) == [0, 0]


# -- what goes ------------------------------------------------------------------------------------


def names(values: Any) -> list[str]:
    return [value.name for value in values]


def test_a_cache_goes_with_its_attention() -> None:
    made = cached()
    one, two = residual_branches(made)
    assert names(one.cache_inputs) == ["k0", "v0"] and names(one.cache_outputs) == ["nk0", "nv0"]
    gone = removal(made, [one])
    assert set(names(gone.cache_inputs)) == {"k0", "v0"} and not gone.stand_ins
    gone = removal(made, [two])
    assert set(names(gone.cache_outputs)) == {"nk1", "nv1"} and gone.reason == ""
    ((shape, other),) = gone.stand_ins  # another cache has the size that is still read
    assert shape.op_type == "Shape" and other.name == "k0"


def test_the_last_cache_stays_if_its_size_is_needed() -> None:
    made = cached()
    gone = removal(made, residual_branches(made))
    assert gone.reason == "the model reads a size from k1 that no other input has"
    made = cached(size_from="x")
    gone = removal(made, residual_branches(made))
    assert gone.reason == "" and len(gone.cache_inputs) == 4 and len(gone.cache_outputs) == 4


def test_a_cache_that_another_layer_reads_stays() -> None:
    body = """q = MatMul(x, wq) a = MatMul(x, wk) nk = Concat<axis=1>(k, a)
        c = Attention<q_num_heads=2, kv_num_heads=2>(q, nk, nk) o = MatMul(c, wo) h = Add(x, o)
        r = MatMul(h, wq) d = Attention<q_num_heads=2, kv_num_heads=2>(r, nk, nk)
        p = MatMul(d, wo) y = Add(h, p)"""
    made = typed(body, f"{X}, float[b,t,8] k", "float y, float nk")
    one, two = residual_branches(made)
    assert two.crosses and not one.crosses
    for branch in (one, two):
        assert names(branch.cache_inputs) == ["k"]
        assert not removal(made, [branch]).cache_inputs
        assert not removal(made, [branch]).cache_outputs
    both = removal(made, [one, two])
    assert names(both.cache_inputs) == ["k"] and names(both.cache_outputs) == ["nk"]


# -- against reachability ---------------------------------------------------------------------------


def random_graph(rng: np.random.Generator) -> ir.Graph:
    """A graph of Adds in which nothing is dead; its last node has two different operands."""
    values = [ir.Value(name="x", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.FLOAT))]
    nodes = []
    for index in range(int(rng.integers(8, 20))):
        first, second = (
            values[int(i)] for i in rng.integers(max(0, len(values) - 6), len(values), 2)
        )
        nodes.append(ir.node("Add", [first, second], name=f"n{index}"))
        values.append(nodes[-1].outputs[0])
    unread = [value for value in values[1:] if not value.uses()]
    more = [value for value in values[1:] if value.uses() and rng.random() < 0.1]
    return ir.Graph(values[:1], unread + more, nodes=nodes, opset_imports={"": 25})


def test_regions_and_removals_are_those_of_reachability() -> None:
    checked = 0
    for seed in range(60):
        graph = random_graph(np.random.default_rng(seed))
        flow = Flow(graph)
        edges: nx.DiGraph[Any] = nx.DiGraph()
        for node in graph:
            edges.add_edges_from((value, node) for value in node.inputs)
            edges.add_edges_from((node, value) for value in node.outputs)
        for node in graph:
            end = node.outputs[0]
            for start in (graph.inputs[0], next(iter(graph)).outputs[0]):
                expected = nx.descendants(edges, start) & (nx.ancestors(edges, end) | {end})
                assert set(flow.between(start, end)) == {n for n in expected if n in flow.nodes}
            if node.inputs[0] is node.inputs[1]:
                continue
            operand = Operand(node, 0)
            cut = edges.copy()
            cut.remove_edge(operand.value, node)
            needed = set(graph.outputs)
            needed |= {v for output in graph.outputs for v in nx.ancestors(cut, output)}
            dead = {n for n in graph if n not in needed}
            assert set(remove(flow, [operand], Caches()).nodes) == dead
            checked += bool(dead)
    assert checked > 100
