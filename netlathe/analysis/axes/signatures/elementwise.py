"""Operators that act on every position by itself."""

from __future__ import annotations

from netlathe.analysis.axes.signature import Signature, Site, Table

_POINTWISE = Signature("... -> ...")
_POSITIVE = Signature("... -> ...", linear="0", positive=True)  # f(s x) = s f(x) for s > 0
_COMBINED = Signature("..., ... -> ...")


def _cast(s: Site) -> Signature:
    """From float to float the numbers stay what they are up to rounding; integers stay positions."""
    to = s.integer("to")
    source, target = s.dtype(), s.node.outputs[0].dtype
    if source is None or target is None or to != target:
        s.refuse("casts a value of unknown dtype")
    if source.is_floating_point() and target.is_floating_point():
        return Signature("... -> ...", linear="0")
    if source.is_integer() and target.is_integer():
        return Signature("... -> ...", linear="0", moves=True)
    return _POINTWISE


def _several(s: Site) -> Signature:
    """Any number of inputs: a sum, a mean, or the largest or smallest of them."""
    every = range(len(s.node.inputs))
    return Signature(
        ", ".join("..." for _ in every) + " -> ...",
        linear=" + ".join(map(str, every)),
        positive=s.node.op_type in ("Max", "Min"),
    )


_UNARY = """
    Acos Acosh Asin Asinh Atan Atanh BitwiseNot Ceil Celu Cos Cosh Elu Erf Exp Floor Gelu HardSigmoid
    HardSwish IsInf IsNaN Log Mish Not Reciprocal Round Selu Shrink Sigmoid Sign Sin Sinh Softplus
    Softsign Sqrt Swish Tan Tanh ThresholdedRelu
"""
_BINARY = """
    And BitShift BitwiseAnd BitwiseOr BitwiseXor Equal Greater GreaterOrEqual Less LessOrEqual Mod Or
    Pow Xor
"""

TABLE: Table = {
    **dict.fromkeys(_UNARY.split(), _POINTWISE),
    **dict.fromkeys(_BINARY.split(), _COMBINED),
    **dict.fromkeys(("Abs", "LeakyRelu", "Relu"), _POSITIVE),
    "Neg": Signature("... -> ...", linear="0"),
    "Identity": Signature("... -> ...", linear="0", moves=True),
    "Cast": _cast,
    "Clip": Signature("..., _, _ -> ..."),  # bounds are scalars
    **dict.fromkeys(("Add", "Sub"), Signature("..., ... -> ...", linear="0 + 1")),
    "Mul": Signature("..., ... -> ...", linear="0*1"),
    "Div": Signature("..., ... -> ...", linear="0"),
    "PRelu": Signature("..., ... -> ...", linear="0", positive=True),
    "Where": Signature("..., ..., ... -> ...", linear="1 + 2", moves=True),
    **dict.fromkeys(("Max", "Mean", "Min", "Sum"), _several),
}
