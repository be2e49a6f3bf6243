"""Normalizations and activations that younger opsets name, in terms of older arithmetic."""

from __future__ import annotations

import math

import onnx_ir as ir

from .builder import Builder, Gap

FLOAT = ir.DataType.FLOAT


def rms_normalization(b: Builder) -> list[ir.Value]:
    """RMSNormalization: x / sqrt(mean(x^2) + eps) in stash_type, then times scale in x's type."""
    x, scale = b.need(0), b.need(1)
    wide = b.cast(x, ir.DataType(int(b.attribute("stash_type", 1))))
    axis = int(b.attribute("axis", -1))
    axes = list(range(axis, 0)) if axis < 0 else list(range(axis, b.rank(x)))
    mean = b("ReduceMean", b("Mul", wide, wide), b.const(axes), keepdims=1)
    root = b("Sqrt", b("Add", mean, b.like(float(b.attribute("epsilon", 1e-5)), mean)))
    normal = b.cast(b("Div", wide, root), b.dtype(scale))
    return [b.cast(b("Mul", normal, scale), b.dtype(b.node.outputs[0]))]


def group_normalization(b: Builder) -> list[ir.Value]:
    """GroupNormalization with per-channel scale: each group normalized, then scaled by channel."""
    x, scale, bias = b.need(0), b.need(1), b.need(2)  # [n, c, *s], [c], [c]
    dtype = b.dtype(x)
    wide = b.cast(x, ir.DataType(int(b.attribute("stash_type", 1))))
    groups = b.reshape(wide, [0, int(b.attribute("num_groups")), -1])  # [n, g, c/g * s]
    last = b.const([-1])
    centred = b("Sub", groups, b("ReduceMean", groups, last, keepdims=1))
    variance = b("ReduceMean", b("Mul", centred, centred), last, keepdims=1)
    root = b("Sqrt", b("Add", variance, b.like(float(b.attribute("epsilon", 1e-5)), variance)))
    normal = b("Reshape", b("Div", centred, root), b("Shape", x))
    spatial = list(range(1, b.rank(x) - 1))
    scale, bias = (b.unsqueeze(v, spatial) if spatial else v for v in (scale, bias))
    return [b("Add", b("Mul", b.cast(normal, dtype), scale), bias)]


def gelu(b: Builder) -> list[ir.Value]:
    """Gelu: x/2 * (1 + erf(x / sqrt 2)), or with tanh(sqrt(2/pi) * (x + 0.044715 x^3))."""
    x = b.need(0)
    if b.attribute("approximate", "none") == "tanh":
        cubed = b("Mul", b("Mul", x, x), x)
        inner = b("Add", x, b("Mul", cubed, b.like(0.044715, x)))
        gate = b("Tanh", b("Mul", inner, b.like(math.sqrt(2 / math.pi), x)))
    else:
        gate = b("Erf", b("Div", x, b.like(math.sqrt(2), x)))
    half = b("Mul", x, b.like(0.5, x))
    return [b("Mul", half, b("Add", gate, b.like(1.0, x)))]


def swish(b: Builder) -> list[ir.Value]:
    """Swish: x * sigmoid(alpha * x)."""
    x, alpha = b.need(0), float(b.attribute("alpha", 1.0))
    inner = x if alpha == 1.0 else b("Mul", x, b.like(alpha, x))
    return [b("Mul", x, b("Sigmoid", inner))]


def mish(b: Builder) -> list[ir.Value]:
    """Mish: x * tanh(softplus(x))."""
    x = b.need(0)
    return [b("Mul", x, b("Tanh", b("Softplus", x)))]


def cast_like(b: Builder) -> list[ir.Value]:
    """CastLike: Cast to a type that is known when the model is built."""
    attributes = {k: v for k, v in b.node.attributes.items() if k in ("saturate", "round_mode")}
    to = b.dtype(b.need(1))
    return [b("Cast", b.need(0), dtype=to, to=int(to), **attributes)]


def dft(b: Builder) -> list[ir.Value] | None:
    """DFT: since opset 20 its axis is an input; before, an attribute."""
    if b.opset >= 20:
        return None
    axis = -2
    if b.input(2) is not None:
        found = b.constant(b.input(2))
        if found is None:
            raise Gap("the axis of DFT is not a constant")
        axis = int(found)
    kept = {name: b.attribute(name, 0) for name in ("inverse", "onesided")}
    if axis < 0:
        axis += b.rank(b.need(0))
    dtype = b.dtype(b.need(0))
    return [b("DFT", b.need(0), b.input(1), dtype=dtype, axis=axis, **kept)]
