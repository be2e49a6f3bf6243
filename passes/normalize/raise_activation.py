"""Raises element-wise formulas to Gelu, Swish, HardSigmoid, HardSwish, Softplus and Mish.

x * 0.5 * (1 + erf(x / sqrt(2)))                                 -> Gelu(approximate="none")
x * 0.5 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 * x^3)))          -> Gelu(approximate="tanh")
x * sigmoid(alpha * x),  x / (1 + exp(-x))                       -> Swish(alpha)
clip(x + 3, 0, 6) / 6,  clip(alpha * x + beta, 0, 1)             -> HardSigmoid(alpha, beta)
x * hard_sigmoid(x; 1/6, 1/2)                                    -> HardSwish
log(1 + exp(x))                                                  -> Softplus
x * tanh(softplus(x))                                            -> Mish
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from netlathe.passes.normalize.match import (
    Found,
    NoMatch,
    Pattern,
    node_of,
    number,
    number_of,
    op,
    operands,
    outermost,
    product,
    scalar,
    var,
)
from netlathe.passes.normalize.rewrite import Builder, Proposal, dims_of

_THROUGH = ("Add", "Mul", "Div", "Tanh", "Log", "Clip")
_HOPS = 4  # the longest formula ends four nodes after its anchor
_Attributes = Mapping[str, Any]  # float or str


@dataclass(frozen=True)
class Formula:
    """What ``op_type`` looks like when it is written out, and the attributes that follow."""

    op_type: str
    pattern: Pattern
    attributes: Callable[[Found], _Attributes] = lambda _: {}


@dataclass(frozen=True)
class Activations:
    """The formulas that may stand around one kind of node; ``hint`` says where it is worth a look."""

    anchor: str
    hint: Callable[[ir.Node], bool]
    formulas: Sequence[Formula]

    def anchors(self, graph: ir.Graph) -> Iterable[ir.Node]:
        """The nodes around which one of the formulas may stand."""
        return (n for n in graph if n.domain == "" and n.op_type == self.anchor and self.hint(n))

    def propose(self, anchor: ir.Node) -> Proposal:
        """The op in place of the first formula that fits around ``anchor``.

        Raises:
            NoMatch: what stands there is something else.
        """
        refusals: list[NoMatch] = []
        for formula in self.formulas:
            try:
                found = outermost(formula.pattern, anchor, _THROUGH, _HOPS)
            except NoMatch as refusal:
                refusals.append(refusal)
                continue
            root, attributes = found.nodes[0].outputs[0], formula.attributes(found)
            build = Builder()
            raised = build.op(formula.op_type, found.values["x"], shape=dims_of(root), **attributes)
            says = f"{formula.op_type} from {len(found.nodes)} nodes"
            return Proposal(
                formula.op_type, {root: raised}, build, says, trial="wide", detail=attributes
            )
        raise refusals[0]


# -- the formulas ---------------------------------------------------------------------------------

_x = var("x")


def _one_plus(value: Pattern) -> Pattern:
    return op("Add", value, number(1.0))


_square = op("Pow", _x, number(2.0)) | op("Mul", _x, _x)
_cube = op("Pow", _x, number(3.0)) | op("Mul", _x, _square)
_cubic = op("Add", _x, op("Mul", _cube, number(0.044715)) | product(_x, _square, number(0.044715)))
_factored = product(
    _x, number(math.sqrt(2 / math.pi)), _one_plus(op("Mul", _square, number(0.044715)))
)
_erf = op("Erf", op("Div", _x, number(math.sqrt(2))) | op("Mul", _x, number(math.sqrt(0.5))))
_tanh = op("Tanh", op("Mul", _cubic, number(math.sqrt(2 / math.pi))) | _factored)

GELU = Formula("Gelu", product(_x, number(0.5), _one_plus(_erf)), lambda _: {"approximate": "none"})
GELU_TANH = Formula(
    "Gelu", product(_x, number(0.5), _one_plus(_tanh)), lambda _: {"approximate": "tanh"}
)
SWISH = Formula(
    "Swish",
    op("Mul", _x, op("Sigmoid", _x))
    | op("Mul", _x, op("Sigmoid", op("Mul", _x, scalar("alpha"))))
    | op("Div", _x, _one_plus(op("Exp", op("Neg", _x)))),
    lambda found: {"alpha": found.number("alpha") if "alpha" in found.values else 1.0},
)

_relu6 = op(
    "Clip", op("Add", _x, number(3.0)), number(0.0), number(6.0), called="clip(x + 3, 0, 6)"
)
_linear = op(
    "Add", op("Mul", _x, scalar("alpha")) | op("Div", _x, scalar("1/alpha")), scalar("beta")
)
HARD_SWISH = Formula(
    "HardSwish",
    op("Mul", _x, op("HardSigmoid", _x))
    | op("Div", op("Mul", _x, _relu6), number(6.0))
    | op("Mul", _x, op("Div", _relu6, number(6.0)))
    | product(_x, _relu6, number(1 / 6)),
)


def _hard_sigmoid_attributes(found: Found) -> _Attributes:
    if "beta" not in found.values:
        return {"alpha": 1 / 6, "beta": 0.5}
    divided = "1/alpha" in found.values
    alpha = 1 / found.number("1/alpha") if divided else found.number("alpha")
    return {"alpha": alpha, "beta": found.number("beta")}


HARD_SIGMOID = Formula(
    "HardSigmoid",
    op("Div", _relu6, number(6.0))
    | op("Mul", _relu6, number(1 / 6))
    | op("Clip", _linear, number(0.0), number(1.0)),
    _hard_sigmoid_attributes,
)
SOFTPLUS = Formula("Softplus", op("Log", _one_plus(op("Exp", _x))))
MISH = Formula("Mish", op("Mul", _x, op("Tanh", op("Softplus", _x))))


# -- where to look --------------------------------------------------------------------------------


def _always(_: ir.Node) -> bool:
    return True


def _near_gelu(node: ir.Node) -> bool:
    """A factor near 0.0447 stands within four nodes before."""
    frontier = [node]
    for _ in range(4):
        frontier = [p for n in frontier for v in operands(n) if (p := v.producer()) is not None]
        for before in frontier:
            factors = [number_of(v) for v in operands(before)] if before.op_type == "Mul" else []
            if any(f is not None and math.isclose(f, 0.044715, rel_tol=0.02) for f in factors):
                return True
    return False


def _multiplies_its_argument(node: ir.Node) -> bool:
    """A Sigmoid of something times that something: not the gate of a GLU or of squeeze-excite."""
    argument = node.inputs[0]
    producer = node_of(argument, "Mul", "Div", "Add", "Sub", "Neg")
    near = {argument, *(producer.inputs if producer is not None else ())}
    multiplied = [user for user, _ in node.outputs[0].uses() if user.op_type == "Mul"]
    return any(v in near for user in multiplied for v in user.inputs if v is not node.outputs[0])


def _in_one_plus_exp_minus(node: ir.Node) -> bool:
    """``exp(-x)`` that a one is added to, under a division."""
    sums = [user for user, _ in node.outputs[0].uses() if user.op_type == "Add"]
    divided = [u for add in sums for u, _ in add.outputs[0].uses() if u.op_type == "Div"]
    return node_of(node.inputs[0], "Neg") is not None and bool(divided)


def _under_log(node: ir.Node) -> bool:
    sums = [user for user, _ in node.outputs[0].uses() if user.op_type == "Add"]
    return any(u.op_type == "Log" for add in sums for u, _ in add.outputs[0].uses())


def _clips_a_shifted_value(node: ir.Node) -> bool:
    add = node_of(node.inputs[0], "Add")
    return add is not None and any(number_of(value) is not None for value in operands(add))


def _fits_hard_swish(node: ir.Node) -> bool:
    """HardSwish has no attributes: only 1/6 and 1/2 fit, under a product with the argument."""
    alpha, beta = (node.attributes.get(name) for name in ("alpha", "beta"))
    fits = alpha is not None and math.isclose(alpha.as_float(), 1 / 6, rel_tol=1e-5)
    return fits and beta is not None and beta.as_float() == 0.5 and _multiplies_its_argument(node)


def _under_tanh(node: ir.Node) -> bool:
    return any(user.op_type == "Tanh" for user, _ in node.outputs[0].uses())


ACTIVATIONS = (
    Activations("Erf", _always, [GELU]),
    Activations("Tanh", _near_gelu, [GELU_TANH]),
    Activations("Sigmoid", _multiplies_its_argument, [SWISH]),
    Activations("Exp", _in_one_plus_exp_minus, [SWISH]),
    Activations("Exp", _under_log, [SOFTPLUS]),
    Activations("Clip", _clips_a_shifted_value, [HARD_SWISH, HARD_SIGMOID]),
    Activations("HardSigmoid", _fits_hard_swish, [HARD_SWISH]),
    Activations("Softplus", _under_tanh, [MISH]),
)
