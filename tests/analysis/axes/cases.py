"""One small graph per operator and form of it, with what "not there" means to the operator.

Sizes are drawn at random; a dim of an operand is a letter, a number or a product of them (``n*h``).
``absent`` says what an operand holds at positions that are gone, so that the operator at its full size
computes what the one at its edited size must: 0 under a sum, -inf under a maximum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from netlathe.ir import normal
from tests.ir.onnx_text import model

Array = npt.NDArray[Any]
Sizes = Mapping[str, int]
Fill = Callable[[Array, Array, Sizes], Array]  # (values, where they are kept, sizes) -> values
Operand = str | Callable[[Sizes, np.random.Generator], Array | list[int]]


@dataclass(frozen=True)
class Case:
    """``body`` in ONNX text, with ``{n}`` for a size; what it calls y, z, ... are its outputs."""

    name: str
    body: str
    operands: Mapping[str, Operand]
    absent: Mapping[str, float | Fill] = field(default_factory=dict)
    outputs: tuple[str, ...] = ("y",)
    sizes: Mapping[str, int] = field(default_factory=dict)  # fixed ones
    alike: bool = False  # its signature is that of other cases: left to the long tests

    def drawn(self, seed: int) -> dict[str, int]:
        """The sizes of all letters."""
        rng = np.random.default_rng(seed)
        sizes = {letter: int(rng.integers(2, 5)) for letter in "abcdefghijklmnopqrstuvwxyz"}
        return {**sizes, **self.sizes}

    def build(self, seed: int) -> ir.Model:
        """The graph with random contents, typed; operands are initializers."""
        sizes, rng = self.drawn(seed), np.random.default_rng(seed + 1)
        arrays = {
            name: _random(operand, sizes, rng) if isinstance(operand, str) else operand(sizes, rng)
            for name, operand in self.operands.items()
        }
        outputs = ", ".join(f"float {name}" for name in self.outputs)
        made = model("", outputs, self.body.format(**sizes), **arrays)
        for value in made.graph.outputs:
            value.type = None
        normal.types.annotate(made)
        return made


def _random(operand: str, sizes: Sizes, rng: np.random.Generator) -> Array:
    return rng.standard_normal(shape(operand, sizes)).astype(np.float32)


def shape(operand: str, sizes: Sizes) -> list[int]:
    """``b n*h 1`` with sizes put in."""
    return [
        int(np.prod([sizes.get(factor) or int(factor) for factor in dim.split("*")]))
        for dim in operand.split()
    ]


def ints(of: str, low: int = 0, high: str = "") -> Operand:
    """Random integers below a size."""

    def make(sizes: Sizes, rng: np.random.Generator) -> Array:
        top = int(np.prod(shape(high, sizes))) if high else 4
        return rng.integers(low, top, shape(of, sizes))

    return make


def bools(of: str) -> Operand:
    """Random booleans."""
    return lambda sizes, rng: rng.random(shape(of, sizes)) < 0.5


def listed(text: str) -> Operand:
    """A list of sizes: ``0 n*h -1``."""

    def make(sizes: Sizes, _: np.random.Generator) -> list[int]:
        return [
            int(np.prod([sizes[f] if f in sizes else int(f) for f in item.split("*")]))
            for item in text.split()
        ]

    return make


def rows(*positions: int) -> Operand:
    """Positions as GatherND reads them, one a row."""
    return lambda sizes, _: np.array(positions)[:, None]


def scalar(number: int | str) -> Operand:
    """A number without dims."""
    return lambda sizes, _: np.array(sizes[number] if isinstance(number, str) else number)


def floats(*numbers: float) -> Operand:
    """These numbers; of a single one a scalar."""
    shape = (-1,) if len(numbers) > 1 else ()
    return lambda sizes, _: np.array(numbers, np.float32).reshape(shape)


def positive(of: str) -> Operand:
    """Random numbers above 0.5."""
    return lambda sizes, rng: (np.abs(_random(of, sizes, rng)) + 0.5).astype(np.float32)


def mean_over(*axes: int) -> Fill:
    """The mean of what is kept, so that nothing else deviates from it."""

    def fill(values: Array, kept: Array, _: Sizes) -> Array:
        total = np.sum(np.where(kept, values, 0), axis=axes, keepdims=True, dtype=np.float64)
        count = np.sum(np.broadcast_to(kept, values.shape), axis=axes, keepdims=True)
        count = np.maximum(count, 1)  # rows of which nothing is kept are not looked at
        return np.where(kept, values, total / count).astype(values.dtype)

    return fill


def group_mean(values: Array, kept: Array, sizes: Sizes) -> Array:
    """The mean of what is kept of each group of channels: values are [b, (g c), s]."""
    groups = (values.shape[0], sizes["g"], -1)
    kept = np.broadcast_to(kept, values.shape).reshape(groups)
    return mean_over(2)(values.reshape(groups), kept, sizes).reshape(values.shape)


_INF = float("inf")
_SHOWN = ("Abs", "Acos", "Identity", "Neg", "Relu", "Tanh")
_UNARY = """
    Abs Acos Acosh Asin Asinh Atan Atanh Ceil Celu Cos Cosh Elu Erf Exp Floor Gelu HardSigmoid HardSwish
    Identity LeakyRelu Log Mish Neg Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin Sinh Softplus
    Softsign Sqrt Swish Tan Tanh ThresholdedRelu
"""


def _unary() -> list[Case]:
    small = {"Acos", "Asin", "Atanh"}  # defined between -1 and 1
    made = []
    for op in _UNARY.split():
        scaled = "z = Mul(x, tenth) y = " if op in small else "y = "
        read = "z" if op in small else "x"
        operands: dict[str, Operand] = {"x": positive("a b c")}
        if op in small:
            operands["tenth"] = floats(0.05)
        if op == "Acosh":
            scaled, read = "z = Add(x, one) y = ", "z"
            operands["one"] = floats(1.0)
        made.append(Case(op, f"{scaled}{op}({read})", operands, alike=op not in _SHOWN))
    return made


def _reductions() -> list[Case]:
    absent: dict[str, float | Fill] = {
        **dict.fromkeys(("L1", "L2", "LogSum", "Sum", "SumSquare"), 0.0),
        **{"LogSumExp": -_INF, "Max": -_INF, "Mean": mean_over(0, 2), "Min": _INF, "Prod": 1.0},
    }
    return [
        Case(
            f"Reduce{kind}",
            f"y = Reduce{kind}<keepdims={int(kind[0] < 'M')}>(x, n)",
            {"x": positive("a b c"), "n": listed("0 2")},
            {"x": gone},
        )
        for kind, gone in absent.items()
    ]


def _concat_split() -> tuple[str, dict[str, Operand], dict[str, float | Fill], tuple[str, ...]]:
    body = "u = Concat<axis=1>(x, v) y, z = Split<axis=1>(u, n)"
    return body, {"x": "a 3", "v": "a 5", "n": listed("4 4")}, {}, ("y", "z")


def _two_of_four(sizes: Sizes, rng: np.random.Generator) -> Array:
    """Different positions of 4, as ScatterElements wants them."""
    return np.argsort(rng.random((sizes["a"], 4, sizes["c"])), axis=1)[:, :2]


def _bytes(of: str) -> Operand:
    return lambda sizes, rng: rng.integers(-100, 100, shape(of, sizes)).astype(np.int8)


def _attention() -> list[Case]:
    packed = "q_num_heads={q}, kv_num_heads={n}, scale=0.5"
    heads = {"n": 2, "r": 2, "q": 4, "h": 3, "v": 4, "s": 3, "t": 4, "p": 2}
    q, k, v = "b n*r s h", "b n t h", "b n t v"
    return [
        Case(
            "Attention",
            "y = Attention<scale=0.5>(q, k, v, m)",
            {"q": q, "k": k, "v": v, "m": "n*r s t"},
            {"q": 0.0},
            sizes=heads,
        ),
        Case(
            "Attention with a short mask",
            "y = Attention<scale=0.5>(q, k, v, m)",
            {"q": q, "k": k, "v": v, "m": bools("b 1 s 3")},
            {"k": 0.0},
            sizes=heads,
        ),
        Case(
            "Attention with a past",
            "y, z, w, x = Attention<scale=0.5>(q, k, v, , p, u)",
            {"q": q, "k": k, "v": v, "p": "b n p h", "u": "b n p v"},
            {"q": 0.0},
            ("y", "z", "w"),
            sizes=heads,
        ),
        Case(
            "Attention packed",
            f"y = Attention<{packed}>(q, k, v, m)",
            {"q": "b s n*r*h", "k": "b t n*h", "v": "b t n*v", "m": "b 1 s t"},
            {"q": 0.0},
            sizes=heads,
        ),
        Case(
            "RotaryEmbedding",
            "y = RotaryEmbedding(x, c, s)",
            {"x": "b n s 2*p", "c": "b s p", "s": "b s p"},
        ),
        Case(
            "RotaryEmbedding interleaved",
            "y = RotaryEmbedding<interleaved=1>(x, c, s)",
            {"x": "b n s 2*p", "c": "b s p", "s": "b s p"},
        ),
        Case(
            "RotaryEmbedding of a part",
            "y = RotaryEmbedding<rotary_embedding_dim=4, num_heads={n}>(x, c, s)",
            {"x": "b s n*6", "c": "b s 2", "s": "b s 2"},
        ),
        Case(
            "RotaryEmbedding of a table",
            "y = RotaryEmbedding(x, c, s, i)",
            {"x": "b n s 2*p", "c": "m p", "s": "m p", "i": ints("b s", high="m")},
            # ONNX Runtime wants a table of at least s rows, whatever the positions are.
            sizes={"m": 4},
        ),
    ]


CASES: list[Case] = [
    *_unary(),
    Case("IsNaN", "y = IsNaN(x)", {"x": "a b"}),
    Case("IsInf", "y = IsInf(x)", {"x": "a b"}),
    Case("Not", "y = Not(x)", {"x": bools("a b")}),
    Case("BitwiseNot", "y = BitwiseNot(x)", {"x": ints("a b")}),
    *(
        Case(op, f"y = {op}(x, w)", {"x": positive("a b c"), "w": positive("b 1")})
        for op in ("Add", "Sub", "Mul", "Div", "Pow", "PRelu", "Max", "Min", "Mean", "Sum")
    ),
    *(
        Case(op, f"y = {op}(x, w)", {"x": "b 1", "w": "a b c"}, alike=op != "Less")
        for op in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")
    ),
    *(
        Case(op, f"y = {op}(x, w)", {"x": bools("b c"), "w": bools("a 1 c")}, alike=True)
        for op in ("And", "Or", "Xor")
    ),
    *(
        Case(op, f"y = {op}(x, w)", {"x": ints("b c"), "w": ints("a 1 c", low=1)}, alike=True)
        for op in ("BitwiseAnd", "BitwiseOr", "BitwiseXor", "Mod")
    ),
    Case(
        "BitShift",
        'y = BitShift<direction="LEFT">(x, w)',
        {
            "x": lambda d, r: r.integers(0, 9, (d["a"], d["b"])).astype(np.uint32),
            "w": lambda d, r: r.integers(0, 3, (d["b"],)).astype(np.uint32),
        },
    ),
    Case("Where", "y = Where(c, x, w)", {"c": bools("b 1"), "x": "a b c", "w": "c"}),
    Case("Clip", "y = Clip(x, low)", {"x": "a b", "low": floats(0.1)}),
    Case("Cast", "y = Cast<to=7>(x)", {"x": "a b"}),
    Case("Cast float", "y = Cast<to=11>(x)", {"x": "a b"}),
    *_reductions(),
    Case("ArgMax", "y = ArgMax<axis=1, keepdims=0>(x)", {"x": "a b c"}, {"x": -_INF}),
    Case("ArgMin", "y = ArgMin<axis=0, keepdims=1>(x)", {"x": "a b c"}, {"x": _INF}),
    Case(
        "TopK",
        "y, z = TopK<axis=1>(x, k)",
        {"x": "a 5 c", "k": listed("2")},
        {"x": -_INF},
        ("y", "z"),
    ),
    Case("CumSum", "y = CumSum(x, n)", {"x": "a b c", "n": scalar(1)}, {"x": 0.0}),
    *(
        Case(op, f"y = {op}<axis=1>(x)", {"x": "a b c"}, {"x": -_INF})
        for op in ("Hardmax", "LogSoftmax", "Softmax")
    ),
    # -- contractions
    Case("MatMul", "y = MatMul(x, w)", {"x": "a b m k", "w": "k n"}, {"x": 0.0}),
    Case("MatMul batched", "y = MatMul(x, w)", {"x": "a 1 m k", "w": "b k n"}, {"w": 0.0}),
    Case("MatMul vectors", "y = MatMul(x, w)", {"x": "k", "w": "k"}, {"x": 0.0}),
    Case("MatMul row", "y = MatMul(x, w)", {"x": "k", "w": "b k n"}, {"x": 0.0}),
    Case("MatMul column", "y = MatMul(x, w)", {"x": "b m k", "w": "k"}, {"x": 0.0}),
    Case("Gemm", "y = Gemm<transB=1>(x, w, c)", {"x": "m k", "w": "n k", "c": "n"}, {"x": 0.0}),
    Case("Gemm transposed", "y = Gemm<transA=1>(x, w)", {"x": "k m", "w": "k n"}, {"w": 0.0}),
    Case(
        "Einsum",
        'y = Einsum<equation="bik,bkj,Qi->bQj">(x, w, v)',
        {"x": "b i k", "w": "b k j", "v": "q i"},
        {"x": 0.0},
    ),
    Case(
        "Einsum implicit",
        'y = Einsum<equation="...ij,jk">(x, w)',
        {"x": "a i j", "w": "j k"},
        {"x": 0.0},
    ),
    Case(
        "Conv", "y = Conv<pads=[1,1]>(x, w, c)", {"x": "b i 6", "w": "o i 3", "c": "o"}, {"x": 0.0}
    ),
    Case(
        "Conv grouped",
        "y = Conv<group={g}>(x, w)",
        {"x": "b g*i 5 5", "w": "g*o i 2 2"},
        {"x": 0.0},
    ),
    Case("Conv depthwise", "y = Conv<group={g}>(x, w, c)", {"x": "b g 5", "w": "g 1 2", "c": "g"}),
    Case(
        "ConvTranspose",
        "y = ConvTranspose<group={g}>(x, w, c)",
        {"x": "b g*i 4", "w": "g*i o 2", "c": "g*o"},
        {"x": 0.0},
    ),
    # -- normalizations
    Case(
        "LayerNormalization",
        "y = LayerNormalization<axis=-1, epsilon=0.1>(x, w, c)",
        {"x": "a b d", "w": "d", "c": "d"},
        {"x": mean_over(2)},
        sizes={"d": 5},
    ),
    Case(
        "LayerNormalization of two",
        "y = LayerNormalization<axis=1, epsilon=0.1>(x, w)",
        {"x": "a d e", "w": "d e"},
        {"x": mean_over(1, 2)},
        sizes={"d": 5},
    ),
    Case(
        "RMSNormalization",
        "y = RMSNormalization<axis=-1, epsilon=0.1>(x, w)",
        {"x": "a b d", "w": "d"},
        {"x": 0.0},
        sizes={"d": 5},
    ),
    Case(
        "RMSNormalization computed scale",
        "v = Add(w, u) y = RMSNormalization<axis=-1, epsilon=0.1>(x, v)",
        {"x": "a b d", "w": "d", "u": "d"},
        {"x": 0.0},
    ),
    Case(
        "RMSNormalization shared scale",
        "u = RMSNormalization<axis=-1>(x, w) y = RMSNormalization<axis=-1>(v, w) z = Mul(u, w)",
        {"x": "a b d", "v": "a d", "w": "d"},
        {"x": 0.0, "v": 0.0},
        ("y", "z"),
    ),
    Case(
        "GroupNormalization",
        "y = GroupNormalization<num_groups={g}, epsilon=0.1>(x, w, c)",
        {"x": "b g*c s", "w": "g*c", "c": "g*c"},
        {"x": group_mean},
    ),
    Case(
        "InstanceNormalization",
        "y = InstanceNormalization(x, w, c)",
        {"x": "b c 5", "w": "c", "c": "c"},
    ),
    Case(
        "BatchNormalization",
        "y = BatchNormalization(x, w, c, m, v)",
        {"x": "b c 3 2", "w": "c", "c": "c", "m": "c", "v": positive("c")},
    ),
    Case("LpNormalization", "y = LpNormalization<axis=1>(x)", {"x": "a b c"}, {"x": 0.0}),
    Case("LRN", "y = LRN<size=3>(x)", {"x": "b c 3 2"}),
    Case(
        "MeanVarianceNormalization", "y = MeanVarianceNormalization<axes=[0,2]>(x)", {"x": "a b c"}
    ),
    # -- movement
    Case("Reshape split", "y = Reshape(x, n)", {"x": "a b*c", "n": listed("0 b c")}),
    Case("Reshape merge", "y = Reshape(x, n)", {"x": "a b c", "n": listed("-1 c")}),
    Case("Reshape refine", "y = Reshape(x, n)", {"x": "2 a 6", "n": listed("2*a*2 3")}),
    Case("Reshape across", "y = Reshape(x, n)", {"x": "a 4 6", "n": listed("0 6 4")}),
    Case(
        "Reshape computed",
        "s = Shape<end=1>(x) t = Concat<axis=0>(s, n) y = Reshape(x, t)",
        {"x": "a b*c", "n": listed("b c")},
    ),
    Case("Flatten", "y = Flatten<axis=2>(x)", {"x": "a b c d"}),
    Case("Transpose", "y = Transpose<perm=[2,0,1]>(x)", {"x": "a b c"}),
    Case("Squeeze", "y = Squeeze(x, n)", {"x": "a 1 c 1", "n": listed("1 3")}),
    Case("Unsqueeze", "y = Unsqueeze(x, n)", {"x": "a b", "n": listed("0 2")}),
    Case("Expand", "y = Expand(x, n)", {"x": "1 b 1", "n": listed("a 1 1 c")}),
    Case("Tile", "y = Tile(x, n)", {"x": "a 1 c", "n": listed("2 b 1")}),
    Case("DepthToSpace", "y = DepthToSpace<blocksize=2>(x)", {"x": "b 4*c h w"}),
    Case("DepthToSpace CRD", 'y = DepthToSpace<blocksize=2, mode="CRD">(x)', {"x": "b 4*c h w"}),
    Case("SpaceToDepth", "y = SpaceToDepth<blocksize=2>(x)", {"x": "b c 2*h 2*w"}),
    # -- segments
    Case("Concat", "y = Concat<axis=1>(x, v, x)", {"x": "a b c", "v": "a d c"}),
    Case(
        "Split", "y, z = Split<axis=1>(x, n)", {"x": "a 5", "n": listed("3 2")}, outputs=("y", "z")
    ),
    Case(
        "Split in equal parts",
        "y, z = Split<axis=0, num_outputs=2>(x)",
        {"x": "2*a b"},
        outputs=("y", "z"),
    ),
    Case("Concat then Split", *_concat_split()),
    *(
        Case(
            f"Slice {start}:{end}:{step}",
            "y = Slice(x, b, e, a, s)",
            {
                "x": "n 7",
                "b": listed(str(start)),
                "e": listed(str(end)),
                "a": listed("1"),
                "s": listed(str(step)),
            },
        )
        for start, end, step in (
            (0, 3, 1),
            (2, 5, 1),
            (4, 99, 1),
            (-3, 99, 1),
            (0, 99, 2),
            (1, 99, 2),
            (3, 99, 3),
            (4, 6, 3),
            (2, 5, 2),
            (5, 99, 3),
            (99, -99, -1),
        )
    ),
    Case(
        "Slice rows",
        "y = Slice(x, b, e, a, s)",
        {"x": "n 12", "b": listed("7"), "e": listed("11"), "a": listed("1"), "s": listed("3")},
    ),
    Case("Pad", "y = Pad(x, p)", {"x": "a b c", "p": listed("1 0 2 0 0 1")}),
    Case("Pad axes", "y = Pad(x, p, , a)", {"x": "a b 1", "p": listed("2 1"), "a": listed("2")}),
    Case("Pad reflect", 'y = Pad<mode="reflect">(x, p)', {"x": "a 4", "p": listed("0 1 0 2")}),
    Case("Pad crop", "y = Pad(x, p)", {"x": "a 5", "p": listed("0 -1 0 2")}),
    # -- lookups
    Case("Gather one", "y = Gather<axis=1>(x, i)", {"x": "a 5 c", "i": scalar(-2)}),
    Case("Gather several", "y = Gather<axis=0>(x, i)", {"x": "6 b", "i": listed("4 5 0 2 -1 4")}),
    Case("Gather table", "y = Gather<axis=0>(x, i)", {"x": "n d", "i": ints("a b", high="n")}),
    Case(
        "GatherND one",
        "y = GatherND(x, i)",
        {"x": "6 b c", "i": rows(-2, 0, 1)},
    ),
    Case("GatherND several", "y = GatherND(x, i)", {"x": "4 4 c", "i": ints("a b 2")}),
    Case(
        "GatherND batch",
        "y = GatherND<batch_dims=1>(x, i)",
        {"x": "a n c", "i": ints("a b 1", high="n")},
    ),
    Case(
        "GatherElements",
        "y = GatherElements<axis=1>(x, i)",
        {"x": "a n c", "i": ints("a k c", high="n")},
    ),
    Case(
        "GatherElements of a part",
        "y = GatherElements<axis=1>(x, i)",
        {"x": "5 n", "i": ints("3 k", high="n")},
    ),
    Case(
        "ScatterElements",
        "y = ScatterElements<axis=1>(x, i, v)",
        {
            "x": "a 4 c",
            "i": _two_of_four,
            "v": "a 2 c",
        },
    ),
    Case(
        "ScatterND",
        "y = ScatterND(x, i, v)",
        {"x": "4 b", "i": rows(2, 0), "v": "2 b"},
    ),
    Case(
        "OneHot",
        "y = OneHot<axis=1>(i, n, v)",
        {"i": ints("a b"), "n": scalar(4), "v": floats(0.0, 1.0)},
    ),
    Case("Trilu", "y = Trilu(x)", {"x": "a b c"}),
    Case(
        "Range",
        "y = Range(a, b, c) z = Add(x, y)",
        {"a": scalar(0), "b": scalar("n"), "c": scalar(1), "x": ints("d n")},
        outputs=("z",),
    ),
    Case(
        "ConstantOfShape", "v = ConstantOfShape(n) y = Add(v, x)", {"n": listed("a b"), "x": "a b"}
    ),
    Case("Shape", "n = Shape(x) y = Expand(w, n)", {"x": "a b", "w": "a 1"}),
    # -- several nodes: positions that a router finds
    Case(
        "TopK of Gather",
        "u, i = TopK<axis=1>(x, k) j = Unsqueeze(i, o) y = Gather<axis=0>(w, j) z = Add(u, u)",
        {"x": "a 5", "k": listed("2"), "o": listed("2"), "w": "5 c d"},
        {"x": -_INF},
        ("y", "z"),
    ),
    Case(
        "TopK of GatherND",
        "u, i = TopK<axis=1>(x, k) j = Reshape(i, n) y = GatherND(w, j)",
        {"x": "a 5", "k": listed("2"), "n": listed("-1 1"), "w": "5 c d"},
        {"x": -_INF},
    ),
    Case(
        "ArgMax of OneHot",
        "i = ArgMax<axis=1, keepdims=0>(x) h = OneHot<axis=-1>(i, n, v) y = Mul(h, w)",
        {
            "x": "a 4",
            "n": scalar(4),
            "v": floats(0.0, 1.0),
            "w": "4",
        },
        {"x": -_INF},
    ),
    Case(
        "TopK of ScatterElements",
        "u, i = TopK<axis=1>(x, k) y = ScatterElements<axis=1>(w, i, u)",
        {"x": "a 5", "k": listed("2"), "w": "a 5"},
        {"x": -_INF},
    ),
    Case(
        "TopK of GatherElements",
        "u, i = TopK<axis=1>(x, k) y = GatherElements<axis=1>(w, i)",
        {"x": "a 5", "k": listed("2"), "w": "a 5"},
        {"x": -_INF},
    ),
    # -- attention
    *_attention(),
    # -- pools and resizing
    *(
        Case(op, f"y = {op}<kernel_shape=[2,2], pads=[0,1,0,0]>(x)", {"x": "b c 4 5"})
        for op in ("AveragePool", "LpPool", "MaxPool")
    ),
    *(Case(op, f"y = {op}(x)", {"x": "b c 4 5"}) for op in ("GlobalAveragePool", "GlobalMaxPool")),
    Case(
        "Resize scales",
        "y = Resize(x, , f)",
        {"x": "b c 3", "f": floats(1, 1, 2)},
    ),
    Case("Resize sizes", "y = Resize(x, , , f)", {"x": "b c 3", "f": listed("b c 6")}),
    # -- quantized
    Case("QuantizeLinear", "y = QuantizeLinear<axis=1>(x, s)", {"x": "a b c", "s": positive("b")}),
    Case(
        "DequantizeLinear",
        "y = DequantizeLinear<axis=0>(x, s, z)",
        {"x": _bytes("a b"), "s": positive("a"), "z": _bytes("a")},
    ),
    Case(
        "DequantizeLinear whole",
        "y = DequantizeLinear(x, s)",
        {"x": _bytes("a b"), "s": positive("")},
    ),
    Case(
        "DequantizeLinear blocks",
        "y = DequantizeLinear<axis=0, block_size={m}>(x, s)",
        {"x": _bytes("q*m b"), "s": positive("q b")},
    ),
]

# Parameters of a test over all cases.
CASE_PARAMS = [
    pytest.param(case, id=case.name, marks=pytest.mark.slow if case.alike else ()) for case in CASES
]
