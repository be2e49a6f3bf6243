"""Small captured models to judge plug-ins on, and a way to write one more in a few lines.

    model = from_text("gate", "(float[batch, 4] x) => (float[batch, 4] y) { y = Sigmoid(x) }")

Each is typed, raised and in normal form, with module paths and dynamic dims, as frontends deliver
them. Weights are drawn from a seed and scaled so that activations neither vanish nor grow: an error
of one part in a thousand shows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.numpy_helper
import onnx.parser
import onnx_ir as ir

from netlathe.diagnostics import Diagnostic, InputError
from netlathe.execute import samples
from netlathe.ir import normal, verify
from netlathe.passes.normalize import raise_operators
from netlathe.pipeline.interfaces import Captured

Array = npt.NDArray[Any]

_HEADER = f'<ir_version: 13, opset_import: ["": {verify.OPSET}]> model '


def models() -> list[Captured]:
    """One model of each structure that passes and backends meet, made anew; its ``source`` names it.

    ==============  =============================================================================
    ``empty``       no node but an Identity, and no weight
    ``mlp``         two products with biases around a Relu, on a residual stream
    ``convolution``  a plain, a grouped and a strided convolution with batch norms, a Concat, a sum
    ``encoder``     embeddings, masked attention and Gelu, two pre-norm blocks with LayerNormalization
    ``decoder``     causal grouped-query attention with rotary positions, a gate, RMSNormalization, and
                    an embedding that is the head's weight too (tied)
    ``shared``      one weight that two layers read
    ``subgraphs``   an If and a Loop whose bodies hold and capture weights
    ``recurrent``   an LSTM and what reads its last state
    ``half``        float16 throughout
    ``quantized``   integer weights behind DequantizeLinear
    ==============  =============================================================================
    """
    return [_BUILT[name](name) for name in _BUILT]


def from_text(
    name: str, text: str, weights: Mapping[str, Array] | None = None, *, seed: int = 0
) -> Captured:
    """The model whose graph is ``text`` in ONNX's textual form, at the IR's opset.

    ``(float[batch, 4] x) => (float[batch, 3] y) { ["/head/MatMul"] y = MatMul(x, w) }`` reads ``x`` and a
    weight ``w``. A label in brackets names a node: this one stands in the module ``head``.
    ``weights`` are the initializers, by name. ``seed`` is added to the seeds of samples.

    Raises:
        InputError: the text cannot be parsed, or nothing in it reads one of the weights.
        VerifyError: the model is not sound.
    """
    try:
        proto = onnx.parser.parse_model(_HEADER + text)
    except onnx.parser.ParseError as error:
        raise InputError(
            Diagnostic("testing.text", f"the text is no ONNX model: {error}", at=name)
        ) from error
    arrays = dict(weights or {})
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in arrays.items())
    made = ir.from_proto(proto)
    for key, array in arrays.items():
        value = made.graph.initializers[key]
        if not value.uses():
            raise InputError(Diagnostic("testing.weight", f"nothing reads {key!r}", at=name))
        value.const_value = ir.tensor(np.array(array), name=key)  # a copy, which can be written to
    return from_model(name, made, seed=seed)


def from_model(name: str, model: ir.Model, *, seed: int = 0) -> Captured:
    """``model``, which is brought into normal form in place, as a frontend delivers it.

    Raises:
        VerifyError: the model is not sound.
    """
    normal.normalize(model)
    raise_operators(model)
    normal.normalize(model)
    verify.check(model)
    return Captured(
        model=model,
        source=name,
        frontend="netlathe.testing",
        dynamic=samples.dynamic_dims(model),
        sample=lambda sizes, other: samples.synthesize(model, sizes, seed + other),
    )


# -- the models -----------------------------------------------------------------------------------

_D, _H, _V = 16, 32, 24  # width of the stream, of what is hidden in a block, of the vocabulary


class _Draw:
    """Weights by shape; a matrix [k, n] is scaled by k ** -0.5."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def matrix(self, *shape: int, fan_in: int = 0) -> Array:
        scale = (fan_in or shape[0]) ** -0.5
        return np.asarray(self._rng.standard_normal(shape) * scale, np.float32)

    def vector(self, size: int, mean: float = 0.0) -> Array:
        return (mean + 0.2 * self._rng.standard_normal(size)).astype(np.float32)

    def positive(self, size: int) -> Array:
        return self._rng.uniform(0.5, 1.5, size).astype(np.float32)


def _empty(name: str) -> Captured:
    return from_text(
        name, f"(float[batch, {_D}] x) => (float[batch, {_D}] y) {{ y = Identity(x) }}"
    )


def _mlp(name: str) -> Captured:
    draw = _Draw(1)
    text = f"""(float[batch, {_D}] x) => (float[batch, {_D}] y) {{
        ["/mlp/up/MatMul"] a = MatMul(x, "mlp.up.weight")
        ["/mlp/up/Add"] b = Add(a, "mlp.up.bias")
        ["/mlp/act/Relu"] r = Relu(b)
        ["/mlp/down/MatMul"] c = MatMul(r, "mlp.down.weight")
        ["/mlp/down/Add"] d = Add(c, "mlp.down.bias")
        ["/Add"] y = Add(x, d)
    }}"""
    return from_text(
        name,
        text,
        {
            "mlp.up.weight": draw.matrix(_D, _H),
            "mlp.up.bias": draw.vector(_H),
            "mlp.down.weight": draw.matrix(_H, _D),
            "mlp.down.bias": draw.vector(_D),
        },
    )


def _convolution(name: str) -> Captured:
    draw = _Draw(2)
    weights: dict[str, Array] = {
        "stem.conv.weight": draw.matrix(8, 3, 3, 3, fan_in=27),
        "left.conv.weight": draw.matrix(8, 1, 3, 3, fan_in=9),
        "right.conv.weight": draw.matrix(8, 8, 1, 1, fan_in=8),
        "right.conv.bias": draw.vector(8),
        "tail.conv.weight": draw.matrix(8, 16, 3, 3, fan_in=144),
        "head.weight": draw.matrix(8, 5),
        "head.bias": draw.vector(5),
    }
    for part in ("stem", "left", "tail"):
        weights |= {
            f"{part}.norm.weight": draw.positive(8),
            f"{part}.norm.bias": draw.vector(8),
            f"{part}.norm.mean": draw.vector(8),
            f"{part}.norm.var": draw.positive(8),
        }

    def norm(part: str, x: str, y: str) -> str:
        four = ", ".join(f'"{part}.norm.{p}"' for p in ("weight", "bias", "mean", "var"))
        return f'["/{part}/norm/BatchNormalization"] {y} = BatchNormalization({x}, {four})'

    text = f"""(float[batch, 3, 8, 8] image) => (float[batch, 5] scores) {{
        ["/stem/conv/Conv"] s0 = Conv<pads = [1, 1, 1, 1]>(image, "stem.conv.weight")
        {norm("stem", "s0", "s1")}
        ["/stem/Relu"] s = Relu(s1)
        ["/left/conv/Conv"] l0 = Conv<pads = [1, 1, 1, 1], group = 8>(s, "left.conv.weight")
        {norm("left", "l0", "l1")}
        ["/left/Relu"] l = Relu(l1)
        ["/right/conv/Conv"] r = Conv(s, "right.conv.weight", "right.conv.bias")
        ["/Concat"] both = Concat<axis = 1>(l, r)
        ["/tail/conv/Conv"] t0 = Conv<pads = [1, 1, 1, 1]>(both, "tail.conv.weight")
        {norm("tail", "t0", "t1")}
        ["/Add"] sum = Add(t1, s)
        ["/pool/AveragePool"] p = AveragePool<kernel_shape = [2, 2], strides = [2, 2]>(sum)
        ["/GlobalAveragePool"] g = GlobalAveragePool(p)
        ["/Flatten"] f = Flatten(g)
        ["/head/MatMul"] h = MatMul(f, "head.weight")
        ["/head/Add"] scores = Add(h, "head.bias")
    }}"""
    return from_text(name, text, weights)


def _encoder(name: str) -> Captured:
    draw = _Draw(3)
    weights: dict[str, Array] = {
        "embed.weight": draw.matrix(_V, _D, fan_in=1),
        "norm.weight": draw.vector(_D, 1.0),
        "norm.bias": draw.vector(_D),
        "zero": np.array(0, np.float32),
        "low": np.array(-1e4, np.float32),
        "axes": np.array([1, 2]),
    }
    body = [
        '["/embed/Gather"] x0 = Gather("embed.weight", ids)',
        "real = Cast<to = 9>(mask)",
        "wide = Unsqueeze(real, axes)",  # [batch, 1, 1, sequence]
        "bias = Where(wide, zero, low)",
    ]
    x = "x0"
    for i in range(2):
        at = f"layers.{i}"
        path = at.replace(".", "/")
        for part in ("attention_norm", "ffn_norm"):
            weights[f"{at}.{part}.weight"] = draw.vector(_D, 1.0)
            weights[f"{at}.{part}.bias"] = draw.vector(_D)
        for part in ("q", "k", "v", "o"):
            weights[f"{at}.attention.{part}.weight"] = draw.matrix(_D, _D)
            weights[f"{at}.attention.{part}.bias"] = draw.vector(_D)
        weights[f"{at}.ffn.up.weight"] = draw.matrix(_D, _H)
        weights[f"{at}.ffn.up.bias"] = draw.vector(_H)
        weights[f"{at}.ffn.down.weight"] = draw.matrix(_H, _D)
        weights[f"{at}.ffn.down.bias"] = draw.vector(_D)

        def linear(part: str, a: str, y: str, at: str = at, path: str = path) -> list[str]:
            where = f"/{path}/{part.replace('.', '/')}"
            return [
                f'["{where}/MatMul"] {y}_product = MatMul({a}, "{at}.{part}.weight")',
                f'["{where}/Add"] {y} = Add({y}_product, "{at}.{part}.bias")',
            ]

        def norm(part: str, a: str, y: str, at: str = at, path: str = path) -> str:
            scales = f'"{at}.{part}.weight", "{at}.{part}.bias"'
            return f'["/{path}/{part}/Norm"] {y} = LayerNormalization<axis = -1>({a}, {scales})'

        body += [
            norm("attention_norm", x, f"n{i}"),
            *(line for p in "qkv" for line in linear(f"attention.{p}", f"n{i}", f"{p}{i}")),
            f'["/{path}/attention/Attention"] a{i} ='
            f" Attention<q_num_heads = 2, kv_num_heads = 2>(q{i}, k{i}, v{i}, bias)",
            *linear("attention.o", f"a{i}", f"o{i}"),
            f'["/{path}/Add"] m{i} = Add({x}, o{i})',
            norm("ffn_norm", f"m{i}", f"f{i}"),
            *linear("ffn.up", f"f{i}", f"u{i}"),
            f'["/{path}/ffn/Gelu"] g{i} = Gelu(u{i})',
            *linear("ffn.down", f"g{i}", f"d{i}"),
            f'["/{path}/Add_1"] x{i + 1} = Add(m{i}, d{i})',
        ]
        x = f"x{i + 1}"
    body.append(
        f'["/norm/Norm"] hidden = LayerNormalization<axis = -1>({x}, "norm.weight", "norm.bias")'
    )
    head = (
        "(int64[batch, sequence] ids, int64[batch, sequence] mask)"
        f" => (float[batch, sequence, {_D}] hidden)"
    )
    return from_text(name, f"{head} {{ {' '.join(body)} }}", weights)


def _decoder(name: str) -> Captured:
    draw = _Draw(4)
    heads, shared, size = 4, 2, 4  # query heads, heads of keys and values, width of a head
    longest = 64
    angles = np.outer(np.arange(longest), 100.0 ** (-np.arange(size // 2) / (size // 2)))
    weights: dict[str, Array] = {
        "embed.weight": draw.matrix(_V, _D, fan_in=_D),
        "cos": np.cos(angles).astype(np.float32),
        "sin": np.sin(angles).astype(np.float32),
    }
    body = ['["/embed/Gather"] x0 = Gather("embed.weight", ids)']
    x = "x0"
    for i in range(2):
        at = f"layers.{i}"
        path = at.replace(".", "/")
        weights |= {
            f"{at}.attention_norm.weight": draw.vector(_D, 1.0),
            f"{at}.ffn_norm.weight": draw.vector(_D, 1.0),
            f"{at}.attention.q.weight": draw.matrix(_D, heads * size),
            f"{at}.attention.k.weight": draw.matrix(_D, shared * size),
            f"{at}.attention.v.weight": draw.matrix(_D, shared * size),
            f"{at}.attention.o.weight": draw.matrix(heads * size, _D),
            f"{at}.ffn.gate.weight": draw.matrix(_D, _H),
            f"{at}.ffn.up.weight": draw.matrix(_D, _H),
            f"{at}.ffn.down.weight": draw.matrix(_H, _D),
        }

        def product(part: str, a: str, y: str, at: str = at, path: str = path) -> str:
            where = f"/{path}/{part.replace('.', '/')}/MatMul"
            return f'["{where}"] {y} = MatMul({a}, "{at}.{part}.weight")'

        def norm(part: str, a: str, y: str, at: str = at, path: str = path) -> str:
            made = f'RMSNormalization<axis = -1>({a}, "{at}.{part}.weight")'
            return f'["/{path}/{part}/Norm"] {y} = {made}'

        def turn(a: str, y: str, count: int, path: str = path) -> str:
            made = f"RotaryEmbedding<num_heads = {count}>({a}, cos, sin, positions)"
            return f'["/{path}/attention/{y}"] {y} = {made}'

        body += [
            norm("attention_norm", x, f"n{i}"),
            product("attention.q", f"n{i}", f"q{i}"),
            product("attention.k", f"n{i}", f"k{i}"),
            product("attention.v", f"n{i}", f"v{i}"),
            turn(f"q{i}", f"qr{i}", heads),
            turn(f"k{i}", f"kr{i}", shared),
            f'["/{path}/attention/Attention"] a{i} = Attention<q_num_heads = {heads},'
            f" kv_num_heads = {shared}, is_causal = 1>(qr{i}, kr{i}, v{i})",
            product("attention.o", f"a{i}", f"o{i}"),
            f'["/{path}/Add"] m{i} = Add({x}, o{i})',
            norm("ffn_norm", f"m{i}", f"f{i}"),
            product("ffn.gate", f"f{i}", f"g{i}"),
            product("ffn.up", f"f{i}", f"u{i}"),
            f'["/{path}/ffn/Swish"] s{i} = Swish(g{i})',
            f'["/{path}/ffn/Mul"] p{i} = Mul(s{i}, u{i})',
            product("ffn.down", f"p{i}", f"d{i}"),
            f'["/{path}/Add_1"] x{i + 1} = Add(m{i}, d{i})',
        ]
        x = f"x{i + 1}"
    weights["norm.weight"] = draw.vector(_D, 1.0)
    body += [
        f'["/norm/Norm"] last = RMSNormalization<axis = -1>({x}, "norm.weight")',
        '["/head/Transpose"] head = Transpose<perm = [1, 0]>("embed.weight")',
        '["/head/MatMul"] logits = MatMul(last, head)',
    ]
    top = (
        "(int64[batch, sequence] ids, int64[batch, sequence] positions)"
        f" => (float[batch, sequence, {_V}] logits)"
    )
    return from_text(name, f"{top} {{ {' '.join(body)} }}", weights)


def _shared(name: str) -> Captured:
    draw = _Draw(5)
    text = f"""(float[batch, {_D}] x) => (float[batch, {_D}] y) {{
        ["/first/MatMul"] a = MatMul(x, "shared.weight")
        ["/first/Add"] b = Add(a, "shared.bias")
        ["/act/Tanh"] t = Tanh(b)
        ["/second/MatMul"] c = MatMul(t, "shared.weight")
        ["/second/Add"] y = Add(c, "shared.bias")
    }}"""
    weights = {"shared.weight": draw.matrix(_D, _D), "shared.bias": draw.vector(_D)}
    return from_text(name, text, weights)


def _subgraphs(name: str) -> Captured:
    draw = _Draw(6)
    text = f"""(bool flip, float[batch, {_D}] x) => (float[batch, {_D}] y) {{
        ["/up/MatMul"] h = MatMul(x, "up.weight")
        ["/choice/If"] c = If(flip) <
            then_branch = yes () => (float[batch, {_D}] t) {{
                ["/choice/yes/MatMul"] t0 = MatMul(h, "choice.weight")
                ["/choice/yes/Relu"] t = Relu(t0)
            }},
            else_branch = no () => (float[batch, {_D}] e) {{
                ["/choice/no/Tanh"] e0 = Tanh(h)
                ["/choice/no/MatMul"] e = MatMul(e0, "up.weight")
            }}
        >
        ["/steps/Loop"] y = Loop(three, , c) <
            body = step (int64 i, bool go, float[batch, {_D}] s)
                => (bool again, float[batch, {_D}] r) {{
                again = Identity(go)
                ["/steps/MatMul"] m = MatMul(s, "steps.weight")
                ["/steps/Add"] r = Add(m, x)
            }}
        >
    }}"""
    weights = {
        "up.weight": draw.matrix(_D, _D),
        "choice.weight": draw.matrix(_D, _D),
        "steps.weight": draw.matrix(_D, _D),
        "three": np.array(3),
    }
    return from_text(name, text, weights)


def _recurrent(name: str) -> Captured:
    draw = _Draw(7)
    hidden = 8
    text = f"""(float[sequence, batch, {_D}] x) => (float[batch, 3] y) {{
        ["/lstm/LSTM"] all, last = LSTM<hidden_size = {hidden}>(
            x, "lstm.w", "lstm.r", "lstm.b")
        ["/Squeeze"] state = Squeeze(last, first)
        ["/head/MatMul"] y = MatMul(state, "head.weight")
    }}"""
    weights: dict[str, Array] = {
        "lstm.w": draw.matrix(1, 4 * hidden, _D, fan_in=_D),
        "lstm.r": draw.matrix(1, 4 * hidden, hidden, fan_in=hidden),
        "lstm.b": draw.vector(8 * hidden).reshape(1, -1),
        "first": np.array([0]),
        "head.weight": draw.matrix(hidden, 3),
    }
    return from_text(name, text, weights)


def _half(name: str) -> Captured:
    draw = _Draw(8)
    text = f"""(float16[batch, {_D}] x) => (float16[batch, {_D}] y) {{
        ["/up/MatMul"] a = MatMul(x, "up.weight")
        ["/up/Add"] b = Add(a, "up.bias")
        ["/Relu"] r = Relu(b)
        ["/down/MatMul"] y = MatMul(r, "down.weight")
    }}"""
    weights = {
        "up.weight": draw.matrix(_D, _H).astype(np.float16),
        "up.bias": draw.vector(_H).astype(np.float16),
        "down.weight": draw.matrix(_H, _D).astype(np.float16),
    }
    return from_text(name, text, weights)


def _quantized(name: str) -> Captured:
    draw = _Draw(9)
    rng = np.random.default_rng(9)
    text = f"""(float[batch, {_D}] x) => (float[batch, {_D}] y) {{
        ["/up/Dequantize"] w = DequantizeLinear<axis = 1>("up.weight", "up.scale")
        ["/up/MatMul"] a = MatMul(x, w)
        ["/Relu"] r = Relu(a)
        ["/down/MatMul"] y = MatMul(r, "down.weight")
    }}"""
    weights: dict[str, Array] = {
        "up.weight": rng.integers(-127, 128, (_D, _H)).astype(np.int8),
        "up.scale": (draw.positive(_H) / 300).astype(np.float32),
        "down.weight": draw.matrix(_H, _D),
    }
    return from_text(name, text, weights)


_BUILT: Mapping[str, Callable[[str], Captured]] = {
    "empty": _empty,
    "mlp": _mlp,
    "convolution": _convolution,
    "encoder": _encoder,
    "decoder": _decoder,
    "shared": _shared,
    "subgraphs": _subgraphs,
    "recurrent": _recurrent,
    "half": _half,
    "quantized": _quantized,
}
