"""The twenty models of the zoo through the frontends: equal to eager, and raised as their family is built.

Judged by ONNX Runtime and by the executor, at two sizes of every dynamic dim, apart from the frontends'
own comparison.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch

from netlathe.execute import ort
from netlathe.execute.compare import relative_error
from netlathe.execute.executor import Executor
from netlathe.frontends.checkpoint import read_checkpoint
from netlathe.frontends.huggingface import HuggingFaceDirectory
from netlathe.frontends.onnx_file import OnnxFile
from netlathe.frontends.torch_module import TorchModule
from netlathe.ir import fold, verify
from netlathe.pipeline.interfaces import Captured
from tests import zoo

# max|difference| as a share of the output's RMS: the project's bar for float32.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Family:
    """What a model's graph must consist of; counted from its configuration by hand.

    ``kv_heads`` are the key heads of its attentions: they stay unrepeated.
    """

    attention: int = 0
    rms: int = 0
    layer: int = 0
    rope: int = 0
    gelu: int = 0
    swish: int = 0
    kv_heads: frozenset[int] = frozenset()

    @property
    def ops(self) -> dict[str, int]:
        return {
            "Attention": self.attention,
            "RMSNormalization": self.rms,
            "LayerNormalization": self.layer,
            "RotaryEmbedding": self.rope,
            "Gelu": self.gelu,
            "Swish": self.swish,
        }


def heads(*counts: int) -> frozenset[int]:
    return frozenset(counts)


FAMILIES: Mapping[str, Family] = {
    # 6 layers: two norms each and one of the embeddings
    "minilm": Family(attention=6, layer=6 * 2 + 1, gelu=6, kv_heads=heads(12)),
    # 2 layers from here on: two norms each and a final one; queries and keys are rotated
    "llama": Family(attention=2, rms=2 * 2 + 1, rope=2 * 2, swish=2, kv_heads=heads(2)),
    # the embeddings' norm; the masked head has a norm and a GELU of its own
    "bert": Family(attention=2, layer=2 * 2 + 2, gelu=2 + 1, kv_heads=heads(4)),
    "gpt2": Family(attention=2, layer=2 * 2 + 1, gelu=2, kv_heads=heads(4)),
    "opt": Family(attention=2, layer=2 * 2 + 1, kv_heads=heads(4)),  # ReLU
    "mistral": Family(attention=2, rms=2 * 2 + 1, rope=2 * 2, swish=2, kv_heads=heads(2)),
    "qwen2": Family(attention=2, rms=2 * 2 + 1, rope=2 * 2, swish=2, kv_heads=heads(2)),
    # attention and feed-forward side by side, behind one norm
    "phi": Family(attention=2, layer=2 + 1, rope=2 * 2, gelu=2, kv_heads=heads(4)),
    "gemma": Family(attention=2, rms=2 * 2 + 1, rope=2 * 2, gelu=2, kv_heads=heads(1)),
    "falcon": Family(attention=2, layer=2 + 1, rope=2 * 2, gelu=2, kv_heads=heads(1)),
    "vit": Family(attention=2, layer=2 * 2 + 1, gelu=2, kv_heads=heads(4)),
    # 2 + 2 layers; the embeddings' norm, one where patches merge, a final one
    "swin": Family(attention=4, layer=4 * 2 + 3, gelu=4, kv_heads=heads(2, 4)),
    "resnet": Family(),
    "mobilenet_v2": Family(),
    # stem and top; 3 blocks with one behind the depthwise convolution and one in the squeeze, and
    # one behind the expansion of the 2 blocks that expand
    "efficientnet": Family(swish=2 + 3 * 2 + 2),
    # 4 layers; the stem's norm, one where patches merge, a final one
    "convnext": Family(layer=4 + 3, gelu=4),
    # 1 + 2 layers; a norm at either end of both stages, and one where keys are reduced
    "segformer": Family(attention=3, layer=3 * 2 + 2 * 2 + 1, gelu=3, kv_heads=heads(1, 2)),
    # encoder and decoder of 2 layers, whose decoder also looks at the encoder; final norms; ReLU
    "t5": Family(attention=2 + 2 * 2, rms=2 * 2 + 1 + 2 * 3 + 1, kv_heads=heads(4)),
    # the same with LayerNorm; two GELUs in the convolutional stem
    "whisper": Family(
        attention=2 + 2 * 2, layer=2 * 2 + 1 + 2 * 3 + 1, gelu=2 + 2 + 2, kv_heads=heads(4)
    ),
    "mixtral": Family(attention=2, rms=2 * 2 + 1, rope=2 * 2, swish=2, kv_heads=heads(2)),
}

# Which implementation a directory is captured with where it is not the configured one.
SWITCHED: Mapping[str, str] = {
    "mixtral": "captured with batched_mm experts",
}

QUICK_MODULES = ("llama", "bert", "resnet", "t5", "mixtral")
QUICK_DIRECTORIES = ("gemma", "falcon", "vit")
QUICK_FILES = ("qwen2", "convnext", "minilm")
# `aten::diff` has no form at opset 14: the old exporter refuses.
NO_OLD_FORM = ("whisper",)


def names(quick: tuple[str, ...], without: tuple[str, ...] = ()) -> list[Any]:
    known = [n for n in zoo.NAMES if n not in without]
    return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in known]


def assert_equal_to_eager(captured: Captured, model: zoo.ZooModel) -> None:
    """In ONNX Runtime and in the executor, at two sizes; outputs by name, inputs with ours."""
    executor = Executor(captured.model)
    for seed, sizes in enumerate(model.sizes):
        kwargs = model.feeds(sizes, seed)
        with torch.no_grad():
            eager = model.module(**kwargs)
        feeds = {name: tensor.numpy() for name, tensor in kwargs.items()}
        in_runtime, in_executor = ort.run(captured.model, feeds), executor.run(feeds)
        assert in_runtime.keys() == in_executor.keys() <= set(model.outputs)
        for name, actual in in_runtime.items():
            expected = eager[name].numpy()
            assert relative_error(actual, expected) <= TOLERANCE, (name, sizes)
            assert relative_error(in_executor[name].numpy(), expected) <= TOLERANCE, (name, sizes)


def assert_raised(captured: Captured, family: Family) -> None:
    graph = captured.model.graph
    counted = Counter(node.op_type for node in graph)
    assert {op: counted[op] for op in family.ops} == family.ops
    found = {node.inputs[1].shape[1] for node in graph if node.op_type == "Attention"}  # type: ignore[union-attr,index]  # typed, 4-D
    assert found == family.kv_heads
    refused = [e for e in captured.entries if e.status != "applied"]
    assert not refused, "a construct of a known family was left as it was"
    applied = Counter(e.detail.get("op") for e in captured.entries if "error" in e.detail)
    # what the exporter writes as one op is not raised; nothing is counted twice
    assert all(applied[op] <= count for op, count in family.ops.items() if op != "Attention")


@pytest.mark.parametrize("name", names(QUICK_MODULES))
def test_a_module(name: str) -> None:
    model = zoo.build(name)
    captured = TorchModule(kwargs=model.kwargs, dynamic=model.dynamic).capture(model.module)
    graph = captured.model.graph
    assert [v.name for v in graph.inputs] == list(model.kwargs)
    assert [v.name for v in graph.outputs] == list(model.outputs)
    assert captured.model.opset_imports[""] == 25
    assert captured.dynamic == dict(model.sizes[0])
    assert_equal_to_eager(captured, model)
    assert_raised(captured, FAMILIES[name])
    assert verify.verify(captured.model) == []


@pytest.mark.parametrize("name", names(QUICK_DIRECTORIES))
def test_a_directory(name: str, tmp_path: Path) -> None:
    model = zoo.build(name)
    module: Any = model.module
    module.save_pretrained(tmp_path)
    size = {"size": {"height": 32, "width": 32}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(size))  # ResNet's config has none
    captured = HuggingFaceDirectory().capture(tmp_path)
    assert {v.name for v in captured.model.graph.inputs} == set(model.kwargs)
    assert_equal_to_eager(captured, model)
    assert_raised(captured, FAMILIES[name])
    switched = [e.reason for e in captured.entries if "captured with" in e.reason][:-1]
    expected = SWITCHED.get(name)
    assert [reason.startswith(expected or "") for reason in switched] == [True] * bool(expected)
    assert_weights_stay_in_their_file(captured, tmp_path)


def assert_weights_stay_in_their_file(captured: Captured, folder: Path) -> None:
    (entry,) = [e for e in captured.entries if e.candidate == "weights"]
    mapped, total = (int(word) for word in entry.reason.split(" weights")[0].split(" of "))
    assert mapped == total > 0
    sizes = {place.length for place in read_checkpoint(folder).values()}
    held = {
        name: value.const_value.nbytes
        for name, value in captured.model.graph.initializers.items()
        if isinstance(value.const_value, ir.Tensor) and value.const_value.nbytes in sizes
    }
    # a weight so small that its transposition is kept as it is
    assert all(size <= fold.LAZY_BYTES for size in held.values()), held


class Positional(torch.nn.Module):
    """A model called by position, as the old exporter wants it, that returns a tuple."""

    def __init__(self, model: zoo.ZooModel) -> None:
        super().__init__()
        self.inner = model.module
        self._inputs, self._outputs = tuple(model.kwargs), model.outputs

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        got = self.inner(**dict(zip(self._inputs, tensors, strict=True)))
        return tuple(got[name] for name in self._outputs)


@pytest.mark.parametrize("name", names(QUICK_FILES, without=NO_OLD_FORM))
def test_an_old_file(name: str, tmp_path: Path) -> None:
    """Written at opset 14 by the TorchScript exporter, which takes everything apart."""
    model = zoo.build(name)
    file = tmp_path / "old.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and warns of every branch it freezes
        torch.onnx.export(
            Positional(model).eval(),
            tuple(model.kwargs.values()),
            file,
            dynamo=False,
            opset_version=14,
            input_names=list(model.kwargs),
            output_names=list(model.outputs),
            dynamic_axes=model.dynamic,
        )
    captured = OnnxFile().capture(file)
    assert_equal_to_eager(captured, model)
    assert_raised(captured, FAMILIES[name])


def test_every_model_has_a_family() -> None:
    assert list(FAMILIES) == list(zoo.NAMES)
