"""Folding of norms: the models of the zoo in float32 and float64, and small graphs for every reason."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from netlathe.analysis import linear
from netlathe.execute import ort, samples
from netlathe.execute.compare import relative_error
from netlathe.execute.executor import Executor
from netlathe.ir import normal, weights
from netlathe.passes.fold_norms import TOLERANCE, FoldNorms
from netlathe.passes.normalize import raise_operators
from netlathe.pipeline.ledger import Entry
from netlathe.pipeline.pass_ import Context, Result
from tests import zoo
from tests.passes import raising
from tests.passes.folding import assert_sound, copy_of, in_float64

# In float64 what is left is rounding: 2**-52 times the same 84 ulp, and a model of tens of nodes.
DOUBLE = 1e-13


def fold(model: ir.Model, *, untie: bool = False) -> Result:
    """Run the pass; the model must verify and be in normal form afterwards."""
    result = FoldNorms(untie=untie).run(model, Context())
    assert_sound(model)
    return result


def check(model: ir.Model, *, untie: bool = False) -> Result:
    """Fold a small graph of one output; it must give what it gave, under the same name."""
    before = copy_of(model)
    result = fold(model, untie=untie)
    raising.assert_same(before, model, TOLERANCE)
    return result


def captured(name: str) -> ir.Model:
    """A model of the zoo in normal form, raised."""
    model = zoo.exported(name)
    normal.normalize(model)
    raise_operators(model)
    normal.normalize(model)
    return model


def statuses(entries: list[Entry]) -> list[str]:
    return [entry.status for entry in entries]


# -- whole models -------------------------------------------------------------------------------------

# name -> (LayerNormalizations, RMSNormalizations) before, LayerNormalizations after, and untied
PRE_NORM = {
    "llama": ((0, 5), 0, 0),
    "mistral": ((0, 5), 0, 0),
    "qwen2": ((0, 5), 0, 0),
    "gemma": ((0, 5), 0, 0),
    "gpt2": ((5, 0), 1, 0),
    "opt": ((5, 0), 1, 0),
    "phi": ((3, 0), 0, 0),
    "falcon": ((3, 0), 1, 0),
    "vit": ((5, 0), 0, 0),
    "whisper": ((12, 0), 2, 1),
    "t5": ((0, 12), 0, 0),
    "mixtral": ((0, 5), 0, 0),
    "swin": ((11, 0), 6, 6),
    "segformer": ((11, 0), 3, 3),
}
TIED = ("qwen2", "gemma", "gpt2", "opt", "falcon", "whisper", "t5")


CASES = [*((name, False) for name in PRE_NORM), *((name, True) for name in TIED)]


@pytest.mark.parametrize(("name", "untie"), CASES)
def test_models_of_the_zoo(name: str, untie: bool) -> None:
    model = captured(name)
    before, double = copy_of(model), in_float64(model)
    result = fold(model, untie=untie)

    (norms, rms), left, left_untied = PRE_NORM[name]
    old, new = raising.ops(before), raising.ops(model)
    assert (old["LayerNormalization"], old["RMSNormalization"]) == (norms, rms)
    assert new["LayerNormalization"] == (left_untied if untie else left)
    assert new["RMSNormalization"] == norms + rms - new["LayerNormalization"]
    assert sum(e.candidate in _norms(before) for e in result.entries) == norms + rms
    table = {"whisper": "proj_out.weight"}.get(name, "lm_head.weight")
    untied = before.graph.initializers[table].shape if untie else None
    assert result.statistics["parameters_added"] == (np.prod(untied.numpy()) if untied else 0)
    scales = [_scale(node) for node in model.graph if node.op_type == "RMSNormalization"]
    folded = [e for e in result.entries if "folded into" in e.reason]
    assert sum(bool((scale == 1).all()) for scale in scales) == len(folded)

    recipe = zoo.build(name)
    trials = [recipe.feeds(sizes, number) for number, sizes in enumerate(recipe.sizes)]
    inputs = [value.name or "" for value in before.graph.inputs]
    for trial in trials:
        feeds = {name: trial[name].numpy() for name in inputs}
        expected, actual = ort.run(before, feeds), ort.run(model, feeds)
        for output, array in expected.items():
            assert relative_error(actual[output], array) < TOLERANCE
    floats = (name for name in inputs if trials[0][name].is_floating_point())
    wide = {name: trials[0][name].numpy() for name in inputs}
    wide |= {name: wide[name].astype(np.float64) for name in floats}
    exact = Executor(double).run(wide)
    FoldNorms(untie=untie).run(double, Context())
    for output, tensor in Executor(double).run(wide).items():
        assert relative_error(tensor.numpy(), exact[output].numpy()) < DOUBLE


def _norms(model: ir.Model) -> set[str]:
    kinds = ("LayerNormalization", "RMSNormalization")
    return {n.outputs[0].name or "" for n in model.graph if n.op_type in kinds}


def _scale(node: ir.Node) -> np.ndarray:
    value = node.inputs[1]
    assert value is not None
    return weights.array(value)


def test_a_second_run_finds_nothing_to_do() -> None:
    model = captured("vit")
    fold(model)
    text = ir.to_proto(model).SerializeToString()
    result = fold(model)
    assert not result.changed and set(statuses(result.entries)) == {"skipped"}
    assert ir.to_proto(model).SerializeToString() == text


@pytest.mark.parametrize("name", ["bert", "minilm"])
def test_post_norm_is_refused(name: str) -> None:
    model = captured(name)
    text = ir.to_proto(model).SerializeToString()
    result = FoldNorms().run(model, Context())
    assert not result.changed and set(statuses(result.entries)) == {"refused"}
    assert "post-norm" in " ".join(e.reason for e in result.entries)
    assert ir.to_proto(model).SerializeToString() == text


def test_convolutions_read_the_stream_of_convnext_without_a_norm() -> None:
    model = captured("convnext")
    result = fold(model)
    assert not result.changed
    assert any(
        "takes add_60 of its residual stream without a norm" in e.reason for e in result.entries
    )


# -- small graphs -------------------------------------------------------------------------------------

WIDTH = 8


def constants(**shapes: tuple[int, ...]) -> dict[str, Any]:
    """Seeded weights: scales near one, everything else normal."""
    rng = np.random.default_rng(0)
    made = {}
    for name, shape in shapes.items():
        array = rng.standard_normal(shape)
        made[name] = (1 + 0.3 * array if name.startswith("g") else array).astype(np.float32)
    return made


NORMS = {"g": (WIDTH,), "s": (WIDTH,), "g2": (WIDTH,), "s2": (WIDTH,)}
LAYER = {"w": (WIDTH, 6), "k": (6,), "v": (6, WIDTH), "u": (WIDTH, 5), "table": (9, WIDTH)}
# x = table[ids], x += relu(norm(x) w + k) v, y = norm(x) u
BLOCK = (
    "x = Gather(table, ids) n = LayerNormalization(x, g, s) a = MatMul(n, w) c = Add(a, k)"
    " r = Relu(c) d = MatMul(r, v) e = Add(x, d) m = LayerNormalization(e, g2, s2) y = MatMul(m, u)"
)


def block(body: str = BLOCK, inputs: str = "int64[b,s] ids", **more: tuple[int, ...]) -> ir.Model:
    arrays = constants(**NORMS, **LAYER, **more)
    used = body.replace("(", " ").replace(")", " ").replace(",", " ").split()
    return raising.graph(inputs, body, **{k: a for k, a in arrays.items() if k in used})


def test_a_pre_norm_block() -> None:
    model = block()
    result = check(model)
    assert statuses(result.entries) == ["applied"] * 3
    assert raising.ops(model) == {
        "Gather": 1,
        "RMSNormalization": 2,
        "MatMul": 3,
        "Add": 3,  # the last layer had no bias to take in the norm's
        "Relu": 1,
    }
    assert {"s", "s2"}.isdisjoint(model.graph.initializers)
    # All that is added to the stream has a mean of zero.
    for name in ("table", "v"):
        array = weights.array(model.graph.initializers[name])
        assert np.abs(array.astype(np.float64).mean(axis=1)).max() < WIDTH * 2.0**-24
    for name in ("table", "v", "w", "u"):
        tensor = model.graph.initializers[name].const_value
        assert tensor is not None and weights.is_recipe(tensor)


def test_what_is_another_value_has_another_name() -> None:
    model = block()
    before = {v.name for n in model.graph for v in n.outputs}
    result = check(model)
    after = {v.name for n in model.graph for v in n.outputs}
    assert set(result.renamed) == before - after == {"x", "n", "d", "e", "m", "a"}
    assert set(result.renamed.values()) == {None}


def test_the_stream_may_be_moved_joined_scaled_and_split() -> None:
    body = (
        "x = Gather(table, ids) c = Concat<axis = 1>(cls, x) p = Add(c, pos) f = Mul(p, half)"
        " t = Transpose<perm = [2, 0, 1]>(f) q = Transpose<perm = [1, 2, 0]>(t)"
        " n = LayerNormalization(q, g, s) a = MatMul(n, w) r = Relu(a) d = MatMul(r, v)"
        " e = Add(q, d) h = Gather<axis = 1>(e, first) m = LayerNormalization(h, g2, s2)"
        " y = MatMul(m, u)"
    )
    arrays = constants(**NORMS, **LAYER, cls=(1, 2, WIDTH), pos=(5, WIDTH))
    del arrays["k"]
    model = raising.graph("int64[1,3] ids", body, **arrays, half=0.5, first=np.array(0))
    result = check(model)
    assert statuses(result.entries) == ["applied"] * 3
    assert raising.ops(model)["LayerNormalization"] == 0


def test_through_moves_and_factors_to_the_layer() -> None:
    """The bias of a norm is scaled as what it is added to."""
    body = BLOCK.replace(
        "y = MatMul(m, u)", "h = Mul(m, half) t = Unsqueeze(h, one) y = MatMul(t, u)"
    )
    arrays = constants(**NORMS, **LAYER) | {"half": 0.5, "one": [1]}
    model = raising.graph("int64[b,s] ids", body, **arrays)
    assert statuses(check(model).entries) == ["applied"] * 3


def test_who_asks_for_a_size_reads_no_channel() -> None:
    """As a recurrent layer does that makes its first state for what a norm gives it."""
    body = BLOCK.replace(
        "y = MatMul(m, u)",
        "z = MatMul(m, u) length = Shape<start=1, end=2>(m)"
        " at = Slice(rows, zero, length, zero) y = Add(z, at)",
    )
    arrays = constants(**NORMS, **LAYER, rows=(16, 5))
    model = raising.graph("int64[b,s] ids", body, zero=[0], **arrays)
    assert "Shape" in raising.ops(model)
    assert statuses(check(model).entries) == ["applied"] * 3


def test_a_convolution_takes_in_a_norm_only_where_it_does_not_pad() -> None:
    body = "n = RMSNormalization(x, g) t = Transpose<perm = [0, 3, 1, 2]>(n) y = Conv<{}>(t, w)"
    for pads, size in (("pads = [0, 0, 0, 0]", 2), ("pads = [1, 1, 1, 1]", 3)):
        arrays = constants(g=(WIDTH,), w=(4, WIDTH, size, size))
        model = raising.graph(f"float[b,6,6,{WIDTH}] x", body.format(pads), **arrays)
        assert statuses(check(model).entries) == ["applied"]  # a scale alone passes padding
    body = body.replace("RMSNormalization(x, g)", "LayerNormalization(x, g, s)")
    body = f"x = MatMul(z, v) {body}"
    for pads, said in (("pads = [0, 0, 0, 0]", "applied"), ("pads = [1, 1, 1, 1]", "refused")):
        arrays = constants(g=(WIDTH,), s=(WIDTH,), w=(4, WIDTH, 3, 3), v=(5, WIDTH))
        model = raising.graph("float[b,6,6,5] z", body.format(pads), **arrays)
        entries = check(model).entries
        assert entries[-1].status == said
        assert ("pads with zeros" in entries[-1].reason) == (said == "refused")


def test_a_grouped_convolution_takes_in_a_norm() -> None:
    arrays = constants(g=(WIDTH,), s=(WIDTH,), w=(4, 4, 1, 1), v=(5, WIDTH))
    body = (
        "x = MatMul(z, v) n = LayerNormalization(x, g, s) t = Transpose<perm = [0, 3, 1, 2]>(n)"
        " y = Conv<group = 2>(t, w)"
    )
    model = raising.graph("float[b,6,6,5] z", body, **arrays)
    assert statuses(check(model).entries) == ["applied", "applied"]


# Two norms on a stream that starts from a table, and a head that is the same table.
TIED_BLOCK = BLOCK.replace(
    "y = MatMul(m, u)",
    "c2 = MatMul(m, w2) r2 = Relu(c2) d2 = MatMul(r2, v2) e2 = Add(e, d2)"
    " o = LayerNormalization(e2, g3, s3) h = Transpose(table) y = MatMul(o, h)",
)
SECOND = {"w2": (WIDTH, 6), "v2": (6, WIDTH), "g3": (WIDTH,), "s3": (WIDTH,)}


def test_a_tied_embedding_is_centred_behind_the_lookup() -> None:
    model = block(TIED_BLOCK, **SECOND)
    size = weights.num_bytes(model)
    result = check(model)
    assert statuses(result.entries) == ["applied", "applied", "applied", "skipped"]
    assert "by ReduceMean and Sub from table" in result.entries[0].reason
    assert "shares table with Gather" in result.entries[-1].reason
    assert "untie=True adds 72 parameters" in result.entries[-1].reason
    assert raising.ops(model)["ReduceMean"] == raising.ops(model)["LayerNormalization"] == 1
    assert weights.num_bytes(model) <= size


def test_a_tied_embedding_may_be_untied() -> None:
    model = block(TIED_BLOCK, **SECOND)
    result = check(model, untie=True)
    assert statuses(result.entries) == ["applied"] * 4
    assert result.statistics["parameters_added"] == 72
    assert raising.ops(model)["LayerNormalization"] == raising.ops(model)["ReduceMean"] == 0
    assert {"table", "table_untied"} <= set(model.graph.initializers)


def test_a_tied_embedding_may_be_untied_later() -> None:
    model = block(TIED_BLOCK, **SECOND)
    check(model)
    result = check(model, untie=True)
    assert statuses(result.entries) == ["skipped", "skipped", "applied"]
    assert raising.ops(model)["LayerNormalization"] == 0


def test_an_activation_that_starts_a_stream_is_centred_by_nodes() -> None:
    body = BLOCK.replace("x = Gather(table, ids)", "x = Tanh(ids)")
    model = block(body, f"float[b,s,{WIDTH}] ids")
    result = check(model)
    assert "by ReduceMean and Sub from x" in result.entries[0].reason
    assert raising.ops(model)["RMSNormalization"] == 2


def test_a_weight_that_all_layers_share_is_centred_once() -> None:
    body = (
        "x = Gather(table, ids) n = LayerNormalization(x, g, s) a = MatMul(n, w) r = Relu(a)"
        " d = MatMul(r, v) e = Add(x, d) m = LayerNormalization(e, g2, s2) c = MatMul(m, u2)"
        " q = Relu(c) f = MatMul(q, v) h = Add(e, f) o = LayerNormalization(h, g3) y = MatMul(o, u)"
    )
    model = block(body, u2=(WIDTH, 6), g3=(WIDTH,))
    result = check(model)
    assert statuses(result.entries) == ["applied"] * 4
    assert result.statistics["parameters_added"] == 0
    readers = [n.inputs[1] for n in model.graph if n.op_type == "MatMul"]
    assert readers.count(model.graph.initializers["v"]) == 2


def test_a_norm_that_keeps_its_scale_may_still_lose_its_mean() -> None:
    """It has no bias, so an RMSNormalization says the same."""
    body = (
        "x = Gather(table, ids) n = LayerNormalization(x, g) t = Tanh(n) d = MatMul(t, sq)"
        " e = Add(x, d) m = LayerNormalization(e, g2, s2) y = MatMul(m, u)"
    )
    model = block(body, sq=(WIDTH, WIDTH))
    entries = check(model).entries
    assert statuses(entries) == ["applied"] * 3
    assert "it keeps its scale: Tanh t reads it" in entries[1].reason
    assert "n" in {v.name for node in model.graph for v in node.outputs}


# -- what is left alone, and why ----------------------------------------------------------------------

REFUSED = {
    "Add y takes its output into a residual stream": (
        "float[b,s,6] z",
        "x = MatMul(z, v) n = LayerNormalization(x, g, s) a = MatMul(n, sq) y = Add(n, a)",
    ),
    "MatMul y takes e of its residual stream without a norm": (
        "int64[b,s] ids",
        "x = Gather(table, ids) z = Gather(table2, ids) e = Add(x, z)"
        " n = LayerNormalization(e, g, s) a = MatMul(n, sq) y = MatMul(e, a)",
    ),
    "RMSNormalization m reads the same residual stream": (
        "int64[b,s] ids",
        "x = Gather(table, ids) n = LayerNormalization(x, g, s) a = MatMul(n, sq)"
        " m = RMSNormalization(x, g2) c = MatMul(m, sq2) y = Mul(a, c)",
    ),
    "Tanh x has no constant weights": (
        "float[b,s,8] z",
        "x = Tanh(z) n = LayerNormalization(x, g, s) y = MatMul(n, sq)",
    ),
    "Conv z works in groups of channels": (
        "float[b,8,6,6] x",
        "z = Conv<group = 8>(x, dw) t = Transpose<perm = [0, 2, 3, 1]>(z)"
        " n = LayerNormalization(t, g, s) y = MatMul(n, sq)",
    ),
    "x comes from outside": (
        "float[b,s,8] x",
        "n = LayerNormalization(x, g, s) y = MatMul(n, sq)",
    ),
    "is not a constant of the width": (
        "float[b,s,8] x, float[8] z",
        "n = RMSNormalization(x, z) y = MatMul(n, sq)",
    ),
    "more than the last axis": (
        "float[b,4,8] x",
        "n = RMSNormalization<axis = 1>(x, square) y = MatMul(n, sq)",
    ),
    "Sigmoid a reads it, which is not linear": (
        "float[b,s,8] x",
        "n = RMSNormalization(x, g) a = Sigmoid(n) c = MatMul(n, sq) y = Mul(a, c)",
    ),
    "y is an output of the graph": ("float[b,s,8] x", "y = RMSNormalization(x, g)"),
    "joins it with something else": (
        "float[b,s,8] x",
        "n = RMSNormalization(x, g) c = Concat<axis = 1>(n, x) y = MatMul(c, sq)",
    ),
    "in a subgraph reads it": (
        "float[b,s,8] x, bool z",
        "n = RMSNormalization(x, g) y = If(z) <then_branch = t () => (float[b,s,8] o) {o = MatMul(n, sq)},"
        " else_branch = f () => (float[b,s,8] p) {p = Relu(x)}>",
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_is_left_alone_with_the_reason(reason: str) -> None:
    inputs, body = REFUSED[reason]
    more = {"sq": (8, 8), "sq2": (8, 8), "dw": (8, 1, 3, 3), "square": (4, 8), "table2": (9, 8)}
    arrays = constants(**NORMS, **LAYER, **more)
    model = raising.graph(inputs, body, **{k: a for k, a in arrays.items() if f"{k}" in body})
    text = ir.to_proto(model).SerializeToString()
    result = FoldNorms().run(model, Context())
    refused = [e for e in result.entries if e.status == "refused"]
    assert any(reason in entry.reason for entry in refused), result.entries
    if reason.startswith(("RMSNormalization m", "MatMul y")):
        return  # the other norm of the graph may be folded
    assert not result.changed and ir.to_proto(model).SerializeToString() == text


def test_a_model_without_norms_says_so() -> None:
    (entry,) = fold(raising.graph("float[b,4] x", "y = Relu(x)")).entries
    assert entry.status == "skipped" and "no LayerNormalization" in entry.reason


def test_weights_are_rounded_once() -> None:
    model = captured("llama")
    norm = next(n for n in model.graph if n.op_type == "RMSNormalization")
    layer = next(n for n in model.graph if n.op_type == "MatMul")
    scale, weight = norm.inputs[1], layer.inputs[1]
    assert scale is not None and weight is not None
    exact = weights.array(scale).astype(np.float64)[:, None] * weights.array(weight)
    fold(model)
    np.testing.assert_array_equal(weights.array(weight), exact.astype(np.float32))


def test_half_precision_stays_half_precision() -> None:
    arrays = {k: a.astype(np.float16) for k, a in constants(**NORMS, **LAYER).items()}
    model = raising.graph("int64[b,s] ids", BLOCK, dtype="float16", **arrays)
    before = copy_of(model)
    assert statuses(fold(model).entries) == ["applied"] * 3
    feeds = raising.feeds(model, {"b": 2, "s": 5}, 0)
    expected, actual = ort.run(before, feeds)["y"], ort.run(model, feeds)["y"]
    assert actual.dtype == np.float16
    # Ten values on the way, each rounded to 2**-11 in either model.
    assert relative_error(actual, expected) < 10 * 2.0**-11


@pytest.mark.parametrize("elements", [16, 1000], ids=["many pieces", "one piece"])
def test_a_big_weight_is_computed_in_pieces(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    monkeypatch.setattr(linear, "_AT_ONCE", elements)
    model = block()
    check(model)


def test_what_the_layers_make_is_unmoved() -> None:
    """Keys and values of a cache leave the model behind the layers."""
    model = block()
    before = copy_of(model)
    fold(model)
    feeds = samples.synthesize(before, {}, 0)
    expected, actual = (ort.run(m, feeds, ["c", "r"]) for m in (before, model))
    for name in ("c", "r"):
        assert relative_error(actual[name], expected[name]) < TOLERANCE
