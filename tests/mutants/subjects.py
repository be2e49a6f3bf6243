"""The passes that are mutated, each on models that it changes in all its ways."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from netlathe.passes.cleanup import Cleanup
from netlathe.passes.convert import Convert
from netlathe.passes.drop import Drop
from netlathe.passes.fold_batch_norm import FoldBatchNorm
from netlathe.passes.fold_norms import FoldNorms
from netlathe.passes.quantize import Quantize
from netlathe.pipeline.interfaces import Captured
from netlathe.pipeline.pass_ import Pass
from tests import zoo_ir
from tests.analysis.test_branches import cached
from tests.mutants.harness import Subject
from tests.passes import raising
from tests.pipeline.toy import captured_of

# Tables of the zoo have 128 rows of ids and 64 of positions.
_TEXT = ({"batch": 9, "sequence": 16}, {"batch": 3, "sequence": 64}, {"batch": 1, "sequence": 5})
_IMAGES = ({"batch": 3}, {"batch": 1})


def _zoo(name: str) -> Callable[[], Captured]:
    return lambda: captured_of(zoo_ir.captured(name), name)


def _seeded(**shapes: tuple[int, ...]) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    made: dict[str, Any] = {}
    for name, shape in shapes.items():
        array = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        made[name] = (1 + 0.2 * array if name.startswith("g") else array).astype(np.float32)
    return made


def _edited_by_hand() -> Captured:
    """What cleanup is for: pads, views, copies, zeros and ones that somebody left."""
    body = """
        p = Pad(x, pads)  c = Conv(p, w, zeros)  r = Relu(c)  q = Relu(r)
        t = Transpose<perm = [0, 2, 3, 1]>(q)  f = Reshape(t, rows)  u = Unsqueeze(f, one)
        v = Reshape(u, flat)  m = Mul(v, ones)  n = Shape(m)  e = Expand(row, n)  a = Add(m, e)
        i, j = Split<axis = 2>(a, sizes)  k = Concat<axis = 2>(i, j)  l = MatMul(k, head)
        d = Sub(l, half)  h = Mul(d, also)  s = Neg(h)  o = Neg(s)  z = Gather<axis = 2>(o, all)
        dead = Exp(z)  some = Gather<axis = 2>(z, two)  y = Tanh(some)
    """
    arrays = _seeded(w=(6, 3, 3, 3), head=(6, 5), row=(6,))
    arrays |= {"zeros": np.zeros(6, np.float32), "ones": np.ones(6, np.float32)}
    arrays |= {"half": 0.5, "also": 0.5, "pads": [0, 0, 1, 0, 0, 0, 1, 2], "sizes": [2, 4]}
    arrays |= {
        "rows": [0, -1, 6],
        "one": [1],
        "flat": [0, -1, 6],
        "all": [0, 1, 2, 3, 4],
        "two": [3, 1],
    }
    return captured_of(
        raising.graph("float[batch,3,7,5] x", body, **arrays), "a graph edited by hand"
    )


def _batch_norms() -> Captured:
    """Before and behind convolutions and products, in groups, transposed, shared, with a Mul behind."""
    body = """
        a = Conv<group = 2, pads = [1, 1, 1, 1]>(x, w1)  b = BatchNormalization(a, g1, b1, m1, v1)
        c = Relu(b)  d = BatchNormalization(c, g2, b2, m2, v2)  e = Conv(d, w2, k2)
        f = ConvTranspose<group = 2, strides = [2, 2]>(e, w3)
        h = BatchNormalization(f, g3, b3, m3, v3)  i = Mul(h, s3)  j = Add(i, t3)  k = Tanh(j)
        l = ReduceMean<keepdims = 0>(k, axes)  m = MatMul(l, w4)
        n = BatchNormalization(m, g4, b4, m4, v4)  o = Softplus(n)  q = MatMul(o, w5)  y = Add(q, k5)
    """
    shapes = {f"{kind}{n}": (8,) for n in (1, 2, 3, 4) for kind in "gbmv"}
    shapes |= {"w1": (8, 2, 3, 3), "w2": (8, 8, 2, 2), "k2": (8,), "w3": (8, 4, 2, 2)}
    shapes |= {"s3": (8, 1, 1), "t3": (8, 1, 1), "w4": (8, 8), "w5": (8, 3), "k5": (3,)}
    arrays = _seeded(**shapes)
    for n in (1, 2, 3, 4):
        arrays[f"v{n}"] = np.abs(arrays[f"v{n}"]) + np.float32(0.5)
    made = raising.graph("float[batch,4,6,6] x", body, axes=[2, 3], **arrays)
    return captured_of(made, "convolutions and norms")


def _caches() -> Captured:
    made: ir.Model = cached(size_from="x")
    return captured_of(made, "attentions with caches")


def _subject(
    pass_: Pass, model: str, make: Callable[[], Captured] | None = None, calibrated: bool = False
) -> Subject:
    images = ("resnet", "efficientnet", "vit", "mobilenet_v2")
    sizes: Sequence[dict[str, int]] = _IMAGES if model in images else _TEXT
    if make is not None:
        sizes = ({},)
    return Subject(pass_, model, make or _zoo(model), sizes, calibrated)


def subjects() -> list[Subject]:
    """All of them; models are made when they are asked for."""
    small = Quantize(min_size=0)
    return [
        _subject(Cleanup(), "a graph edited by hand", _edited_by_hand),
        _subject(Cleanup(), "mixtral"),
        _subject(Cleanup(), "efficientnet"),
        _subject(FoldBatchNorm(), "convolutions and norms", _batch_norms),
        _subject(FoldBatchNorm(), "resnet"),
        _subject(FoldBatchNorm(), "efficientnet"),
        _subject(FoldNorms(), "llama"),
        _subject(FoldNorms(), "gpt2"),
        _subject(FoldNorms(untie=True), "qwen2"),
        _subject(FoldNorms(), "vit"),
        _subject(Drop(kind="attention"), "attentions with caches", _caches, calibrated=True),
        _subject(Drop(kind="attention"), "llama", calibrated=True),
        _subject(Drop(kind="ffn"), "gpt2", calibrated=True),
        _subject(Drop(kind="block"), "phi", calibrated=True),
        _subject(Convert(dtype="float16"), "llama"),
        _subject(Convert(dtype="float16"), "resnet"),
        _subject(Convert(dtype="bfloat16"), "gpt2"),
        _subject(small, "llama"),
        _subject(small, "gpt2"),
        _subject(small, "resnet"),
        _subject(small, "mixtral"),
    ]


# Small ones, which show every pass and every kind of mistake.
QUICK = frozenset(
    {
        "cleanup on a graph edited by hand",
        "fold_batch_norm on convolutions and norms",
        "fold_batch_norm on resnet",
        "fold_norms on gpt2",
        "drop on attentions with caches",
        "drop(kind='ffn') on gpt2",
        "convert on llama",
        "convert on resnet",
        "quantize(min_size=0) on resnet",
        "quantize(min_size=0) on gpt2",
    }
)
