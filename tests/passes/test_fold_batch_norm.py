"""Folding of BatchNormalization: against eager torch, ONNX Runtime and float64, on graphs and models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.version_converter
import onnx_ir as ir
import pytest
import torch
from torch import nn

from netlathe.execute import ort, samples
from netlathe.execute.compare import relative_error
from netlathe.execute.executor import Executor
from netlathe.frontends.onnx_opset import raise_opset
from netlathe.ir import normal, weights
from netlathe.passes.fold_batch_norm import TOLERANCE, FoldBatchNorm
from netlathe.passes.normalize import raise_operators
from netlathe.pipeline.pass_ import Context, Result
from tests import zoo
from tests.passes import raising
from tests.passes.folding import assert_sound, copy_of, in_float64

# float64, 50 layers, each with sums of up to some thousand terms: 2**-52 * 50 * 64.
DOUBLE = 1e-12


def fold(model: ir.Model) -> Result:
    """Run the pass; the model must verify and be in normal form afterwards."""
    result = FoldBatchNorm().run(model, Context())
    assert_sound(model)
    return result


def settled(norm: nn.modules.batchnorm._BatchNorm, rng: torch.Generator) -> nn.Module:
    """A norm with parameters and statistics of a trained one."""
    for tensor in (norm.weight.data, norm.running_var):
        assert isinstance(tensor, torch.Tensor)
        tensor.copy_(0.5 + torch.rand(tensor.shape, generator=rng))
    for tensor in (norm.bias.data, norm.running_mean):
        assert isinstance(tensor, torch.Tensor)
        tensor.copy_(torch.randn(tensor.shape, generator=rng))
    return norm


def written(layers: nn.Sequential, shape: str) -> ir.Model:
    """The layers as an ONNX graph that shares their parameters."""
    lines, constants, value = [], {}, "x"
    for number, layer in enumerate(layers):
        arrays = {k: v.detach().numpy() for k, v in layer.state_dict().items()}
        out = "y" if number == len(layers) - 1 else f"v{number}"
        names = {k: f"w{number}_{k}" for k in arrays}
        if isinstance(layer, nn.modules.conv._ConvNd):
            op = "ConvTranspose" if layer.transposed else "Conv"
            pads = [*layer.padding, *layer.padding] if not isinstance(layer.padding, str) else []
            bias = f", {names['bias']}" if layer.bias is not None else ""
            strides = list(layer.stride)
            lines.append(
                f"{out} = {op}<group = {layer.groups}, strides = {strides}, pads = {pads}>"
                f"({value}, {names['weight']}{bias})"
            )
        elif isinstance(layer, nn.Linear):
            arrays["weight"] = arrays["weight"].T
            product = f"{out}_product" if layer.bias is not None else out
            lines.append(f"{product} = MatMul({value}, {names['weight']})")
            if layer.bias is not None:
                lines.append(f"{out} = Add({product}, {names['bias']})")
        else:
            assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
            read = ", ".join(names[k] for k in ("weight", "bias", "running_mean", "running_var"))
            lines.append(f"{out} = BatchNormalization<epsilon = {layer.eps}>({value}, {read})")
            arrays.pop("num_batches_tracked")
        constants |= {names[k]: np.ascontiguousarray(a) for k, a in arrays.items()}
        value = out
    return raising.graph(f"float{shape} x", "\n".join(lines), **constants)


LAYERS: dict[str, tuple[str, tuple[int, ...], Callable[[], list[nn.Module]]]] = {
    "conv": ("[b,6,s,9]", (2, 6, 8, 9), lambda: [nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8)]),
    "no bias": ("[b,6,9]", (2, 6, 9), lambda: [nn.Conv1d(6, 8, 3, bias=False), nn.BatchNorm1d(8)]),
    "grouped": (
        "[b,6,5,5]",
        (2, 6, 5, 5),
        lambda: [nn.Conv2d(6, 8, 3, groups=2), nn.BatchNorm2d(8)],
    ),
    "depthwise": (
        "[b,6,5,5]",
        (2, 6, 5, 5),
        lambda: [nn.Conv2d(6, 12, 3, groups=6, bias=False), nn.BatchNorm2d(12)],
    ),
    "3-D": ("[b,2,4,4,4]", (2, 2, 4, 4, 4), lambda: [nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3)]),
    "transposed": (
        "[b,6,5,5]",
        (2, 6, 5, 5),
        lambda: [nn.ConvTranspose2d(6, 8, 3, stride=2, padding=1, groups=2), nn.BatchNorm2d(8)],
    ),
    "linear": ("[b,6]", (3, 6), lambda: [nn.Linear(6, 8), nn.BatchNorm1d(8)]),
    "linear, no bias": ("[b,6]", (3, 6), lambda: [nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8)]),
    "before a conv": ("[b,6,5,5]", (2, 6, 5, 5), lambda: [nn.BatchNorm2d(6), nn.Conv2d(6, 8, 3)]),
    "before a grouped conv": (
        "[b,6,5,5]",
        (2, 6, 5, 5),
        lambda: [nn.BatchNorm2d(6), nn.Conv2d(6, 9, 3, groups=3, bias=False)],
    ),
    "before a linear": ("[b,6]", (3, 6), lambda: [nn.BatchNorm1d(6), nn.Linear(6, 8)]),
    "before a linear without bias": (
        "[b,6]",
        (3, 6),
        lambda: [nn.BatchNorm1d(6), nn.Linear(6, 8, bias=False)],
    ),
    "between": (
        "[b,4,5,5]",
        (2, 4, 5, 5),
        lambda: [nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5)],
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_equals_eager_torch(name: str) -> None:
    shape, size, make = LAYERS[name]
    rng = torch.Generator().manual_seed(0)
    layers = nn.Sequential(*make()).eval()
    for layer in layers:
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            settled(layer, rng)
    model = written(layers, shape)
    result = fold(model)
    assert {entry.status for entry in result.entries} == {"applied"}
    assert "BatchNormalization" not in raising.ops(model)
    x = torch.randn(size, generator=rng)
    with torch.no_grad():
        expected = layers.double()(x.double()).numpy()
    assert relative_error(ort.run(model, {"x": x.numpy()})["y"].astype(np.float64), expected) < 2e-6


def test_folded_weights_are_recipes() -> None:
    rng = torch.Generator().manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 4, 1), settled(nn.BatchNorm2d(4), rng)).eval()
    model = written(layers, "[b,3,5,5]")
    fold(model)
    (conv,) = model.graph
    assert [v and v.name for v in conv.inputs] == ["x", "w0_weight", "w0_bias"]
    for value in conv.inputs[1:]:
        assert value is not None and value.const_value is not None
        assert weights.is_recipe(value.const_value)
    assert set(model.graph.initializers) == {"w0_weight", "w0_bias"}


# -- what stands between or behind --------------------------------------------------------------------

NORM = "BatchNormalization({}, scale, bias, mean, variance)"


def parameters(width: int = 4, **more: np.ndarray) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    made = {name: rng.standard_normal(width) for name in ("scale", "bias", "mean")}
    made["variance"] = 0.5 + rng.random(width)
    return {name: a.astype(np.float32) for name, a in (made | more).items()}


def weight(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape)


def check(model: ir.Model) -> Result:
    """Fold a graph of one output; it must give what it gave, under the same name."""
    before = copy_of(model)
    result = fold(model)
    raising.assert_same(before, model, 5e-6)
    return result


def test_through_a_bias_and_a_transposition() -> None:
    model = raising.graph(
        "float[b,s,3] x",
        f"a = MatMul(x, w) c = Add(a, k) d = Transpose<perm = [0, 2, 1]>(c) y = {NORM.format('d')}",
        **parameters(w=weight(3, 4), k=weight(4)),
    )
    result = check(model)
    assert [n.op_type for n in model.graph] == ["MatMul", "Add", "Transpose"]
    assert set(result.renamed) == {"a", "c", "d"}
    assert not {"a", "c"} & {v.name for n in model.graph for v in n.outputs}


def test_through_a_channel_bias_of_another_shape() -> None:
    model = raising.graph(
        "float[b,3,s,s] x",
        f"a = Conv(x, w, c) d = Add(a, k) y = {NORM.format('d')}",
        **parameters(w=weight(4, 3, 1, 1), c=weight(4), k=weight(1, 4, 1, 1)),
    )
    check(model)
    assert raising.ops(model) == {"Conv": 1, "Add": 1}


def test_takes_in_products_and_sums_behind_it() -> None:
    model = raising.graph(
        "float[b,3,s,s] x",
        f"a = Conv(x, w) n = {NORM.format('a')} m = Mul(n, f) t = Add(m, k) y = Mul(t, two)",
        **parameters(
            w=weight(4, 3, 1, 1), f=weight(4, 1, 1), k=weight(1, 4, 1, 1), two=np.array(2.0)
        ),
    )
    check(model)
    assert raising.ops(model) == {"Conv": 1}


def test_takes_in_what_follows_even_where_it_cannot_be_folded() -> None:
    model = raising.graph(
        "float[b,4,s,s] x",
        f"r = Relu(x) n = {NORM.format('r')} m = Mul(n, f) t = Add(m, k) y = Relu(t)",
        **parameters(f=weight(4, 1, 1), k=weight(4, 1, 1)),
    )
    (entry,) = check(model).entries
    assert entry.status == "applied" and "took in Mul and Add" in entry.reason
    assert raising.ops(model) == {"BatchNormalization": 1, "Relu": 2}


def test_a_product_that_leaves_the_range_of_the_format_is_not_taken_in() -> None:
    arrays = parameters(f=np.full((4, 1, 1), 60000.0), scale=np.full(4, 2.0))
    model = raising.graph(
        "float16[b,4,s,s] x",
        f"r = Relu(x) n = {NORM.format('r')} m = Mul(n, f) y = Relu(m)",
        dtype="float16",
        **{name: array.astype(np.float16) for name, array in arrays.items()},
    )
    (entry,) = fold(model).entries
    assert entry.status == "skipped" and raising.ops(model)["Mul"] == 1


def test_a_bias_that_others_read_is_copied() -> None:
    """Exporters give convolutions without a bias one zero bias for all."""
    model = raising.graph(
        "float[b,3,s,s] x",
        f"a = Conv(x, w, zero) n = {NORM.format('a')} c = Conv(x, v, zero) y = Add(n, c)",
        **parameters(w=weight(4, 3, 1, 1), v=weight(4, 3, 1, 1), zero=np.zeros(4)),
    )
    (entry,) = check(model).entries
    assert entry.status == "applied"
    first, second = (n for n in model.graph if n.op_type == "Conv")
    held = [conv.inputs[2] for conv in (first, second)]
    assert [value and value.name for value in held] == ["w.bias", "zero"]


def test_a_weight_used_twice_with_the_same_norm_stays_one() -> None:
    model = raising.graph(
        "float[b,3,s,s] x, float[b,3,s,s] z",
        f"a = Conv(x, w) m = {NORM.format('a')} c = Conv(z, w) n = {NORM.format('c')} y = Sub(m, n)",
        **parameters(w=weight(4, 3, 1, 1)),
    )
    assert {entry.status for entry in check(model).entries} == {"applied"}
    first, second = (n for n in model.graph if n.op_type == "Conv")
    assert first.inputs[1:] == second.inputs[1:]
    assert set(model.graph.initializers) == {"w", "w.bias"}


# -- what is left alone, and why ----------------------------------------------------------------------

REFUSED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "its weight w too": (
        "float[b,3,s,s] x, float[b,3,s,s] z",
        f"a = Conv(x, w) n = {NORM.format('a')} c = Conv(z, w) y = Add(n, c)",
        parameters(w=weight(4, 3, 1, 1)),
    ),
    "reads a too": (
        "float[b,3,s,s] x",
        f"a = Conv(x, w) n = {NORM.format('a')} r = Relu(a) y = Add(n, r)",
        parameters(w=weight(4, 3, 1, 1)),
    ),
    "pads with zeros": (
        "float[b,4,s,s] x",
        f"r = Relu(x) n = {NORM.format('r')} y = Conv<pads = [1, 1, 1, 1]>(n, w)",
        parameters(w=weight(2, 4, 3, 3)),
    ),
    "Relu r is not linear": (
        "float[b,4,s,s] x",
        f"r = Relu(x) n = {NORM.format('r')} y = Relu(n)",
        parameters(),
    ),
    "comes from outside": ("float[b,4,s,s] x", f"y = {NORM.format('x')}", parameters()),
    "is an output of the graph": (
        "float[b,4,s,s] x",
        f"r = Relu(x) y = {NORM.format('r')}",
        parameters(),
    ),
    "adds it up differently at the border": (
        "float[b,4,s,s] x",
        f"r = Relu(x) n = {NORM.format('r')} y = ConvTranspose(n, w)",
        parameters(w=weight(4, 2, 3, 3)),
    ),
    "reads v too": (
        "float[b,4] x",
        f"r = Relu(x) n = {NORM.format('r')} p = MatMul(n, v) q = MatMul(x, v) y = Add(p, q)",
        parameters(v=weight(4, 5)),
    ),
    "training mode": (
        "float[b,4] x",
        "y, m, v = BatchNormalization<training_mode = 1>(x, scale, bias, mean, variance)",
        parameters(),
    ),
    "parameter computed is not a constant": (
        "float[b,4] x, float[4] z",
        "computed = Relu(z) y = BatchNormalization(x, computed, bias, mean, variance)",
        parameters(),
    ),
    "no finite factor": (
        "float[b,3,s,s] x",
        "a = Conv(x, w) y = BatchNormalization<epsilon = 0.0>(a, scale, bias, mean, variance)",
        parameters(w=weight(4, 3, 1, 1), variance=np.array([1.0, 0.0, 1.0, 1.0])),
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_is_left_alone_with_the_reason(reason: str) -> None:
    inputs, body, constants = REFUSED[reason]
    model = raising.graph(inputs, body, **constants)
    before = ir.to_proto(model).SerializeToString()
    result = FoldBatchNorm().run(model, Context())
    assert not result.changed
    (entry,) = result.entries
    assert entry.status in ("skipped", "refused") and reason in entry.reason, entry
    assert ir.to_proto(model).SerializeToString() == before


def test_a_scale_alone_passes_a_padded_convolution() -> None:
    zero = np.zeros(4)
    model = raising.graph(
        "float[b,4,s,s] x",
        f"r = Relu(x) n = {NORM.format('r')} y = Conv<pads = [1, 1, 1, 1]>(n, w)",
        **parameters(w=weight(2, 4, 3, 3), bias=zero, mean=zero),
    )
    (entry,) = check(model).entries
    assert entry.status == "applied"


def test_a_model_without_one_says_so() -> None:
    model = raising.graph("float[b,4] x", "y = Relu(x)")
    (entry,) = fold(model).entries
    assert entry.status == "skipped" and "no BatchNormalization" in entry.reason


def test_half_precision_stays_half_precision() -> None:
    arrays = parameters(w=weight(4, 3, 1, 1))
    model = raising.graph(
        "float16[b,3,s,s] x",
        f"a = Conv(x, w) y = {NORM.format('a')}",
        dtype="float16",
        **{name: array.astype(np.float16) for name, array in arrays.items()},
    )
    before = copy_of(model)
    fold(model)
    feeds = raising.feeds(model, {"b": 2, "s": 5}, 0)
    expected, actual = ort.run(before, feeds)["y"], ort.run(model, feeds)["y"]
    assert actual.dtype == np.float16
    # Every weight and value is rounded to 2**-11 once or twice in either.
    assert relative_error(actual, expected) < 8 * 2.0**-11


# -- whole models -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet", "mobilenet_v2", "efficientnet", "segformer"])
def test_models_of_the_zoo(name: str) -> None:
    model = zoo.exported(name)
    normal.normalize(model)
    raise_operators(model)
    normal.normalize(model)
    before, double = copy_of(model), in_float64(model)
    norms = raising.ops(model)["BatchNormalization"]
    result = fold(model)
    assert raising.ops(model)["BatchNormalization"] == 0
    assert [e.status for e in result.entries] == ["applied"] * norms
    assert weights.num_bytes(model) < weights.num_bytes(before)
    recipe = zoo.build(name)
    feeds = {k: v.numpy() for k, v in recipe.feeds(recipe.sizes[0], 1).items()}
    expected, actual = ort.run(before, feeds), ort.run(model, feeds)
    # A net of 50 layers multiplies its rounding errors, those of the dense model as well.
    assert relative_error(actual["logits"], expected["logits"]) < 10 * TOLERANCE
    wide = {k: v.astype(np.float64) for k, v in feeds.items()}
    exact = Executor(double).run(wide)["logits"].numpy()
    folded = copy_of(double)
    fold(folded)
    assert relative_error(Executor(folded).run(wide)["logits"].numpy(), exact) < DOUBLE


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50", "inception_v2", "densenet121", "shufflenet"])
def test_models_of_other_exporters(name: str) -> None:
    """Caffe's nets as the onnx package holds them, with random weights in place of constant ones."""
    folder = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
    model = ir.from_proto(_with_weights(onnx.load(folder / f"light_{name}.onnx")))
    raise_opset(model)
    normal.normalize(model)
    double = in_float64(model)
    before = raising.ops(model)
    result = fold(model)
    left = raising.ops(model)["BatchNormalization"]
    if name == "densenet121":  # norms behind a Concat stay, their Mul and Add do not
        assert 0 < left < before["BatchNormalization"]
    else:
        assert left == 0
    assert raising.ops(model)["Mul"] == 0
    assert {e.status for e in result.entries} == {"applied"}
    feeds = samples.synthesize(double, {}, 0)
    expected = Executor(double).run(feeds)
    fold(double)
    for output, tensor in Executor(double).run(feeds).items():
        # Random weights make logits of some hundreds, which a softmax turns from absolute into relative.
        assert relative_error(tensor.numpy(), expected[output].numpy()) < 1000 * DOUBLE


def _with_weights(proto: onnx.ModelProto) -> onnx.ModelProto:
    """At opset 13, with an initializer for every ConstantOfShape."""
    proto = onnx.version_converter.convert_version(proto, 13)
    rng = np.random.default_rng(0)
    sizes = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    kept = []
    for node in proto.graph.node:
        if node.op_type != "ConstantOfShape":
            kept.append(node)
            continue
        shape = sizes[node.input[0]]
        fan_in = max(1, int(np.prod(shape[1:])))
        array = rng.standard_normal(shape) * np.sqrt(2.0 / fan_in)
        if len(shape) == 1:  # scales, biases, means, variances alike
            array = 1.0 + 0.1 * rng.standard_normal(shape)
        tensor = onnx.numpy_helper.from_array(array.astype(np.float32), node.output[0])
        proto.graph.initializer.append(tensor)
    del proto.graph.node[:]
    proto.graph.node.extend(kept)
    read = {name for node in kept for name in node.input}
    inputs = [i for i in proto.graph.input if i.name in read and i.name not in sizes]
    constants = [t for t in proto.graph.initializer if t.name in read]
    del proto.graph.input[:], proto.graph.initializer[:]
    proto.graph.input.extend(inputs)
    proto.graph.initializer.extend(constants)
    return proto
