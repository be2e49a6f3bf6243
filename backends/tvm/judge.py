"""Holds what an artifact computes against the IR in ONNX Runtime.

Where activations are quantized, one ulp before a rounding is a whole step after it, and steps add up: two
exact programs may end far apart. So the artifact tells its codes, the outputs of every rounding, and the
judge starts each stretch of the graph between roundings with them. In a stretch there is nothing but
arithmetic, and the bound of floats holds: a code must be what some x rounds to that is no further from the
judge's x than that bound. That is the judge's own code, or beside a tie the one next to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.backends.tvm import codes
from netlathe.diagnostics import Diagnostic, VerifyError
from netlathe.execute import ort, samples
from netlathe.execute.compare import relative_error
from netlathe.ir.provenance import location
from netlathe.pipeline import verification
from netlathe.pipeline.pass_ import Feeds

Array = npt.NDArray[Any]
D = ir.DataType

# max|artifact - IR| as a share of the RMS, by the narrowest float in the graph: the project's bar for
# float32 (other orders of sums, other polynomials), and 16 ulp of the half formats.
_BOUND = 1e-4
_ORDERS = 10  # as many times what one rounding moves an output by in an ill-conditioned model
_NARROW = {D.FLOAT16: 16 * 2**-10, D.BFLOAT16: 16 * 2**-7}


def bound_of(model: ir.Model) -> float:
    """max|artifact - IR| as a share of the RMS that arithmetic may cost ``model``."""
    dtypes = {value.dtype for node in model.graph.all_nodes() for value in node.outputs}
    return max([_BOUND, *(bound for dtype, bound in _NARROW.items() if dtype in dtypes)])


def check(
    model: ir.Model,
    sample: Feeds | None,
    run: Callable[[Feeds], Feeds],
    tell: Callable[[ir.Model], Callable[[Feeds], Feeds]],
) -> dict[str, float]:
    """How far ``run`` is from ``model``, on ``sample`` or on data made up, as :func:`compare` reports it.

    ``tell`` compiles a model of :func:`codes.telling`.

    Raises:
        VerifyError: as :func:`compare`, or another output came with the codes.
    """
    feeds = sample
    if feeds is None:
        feeds = samples.synthesize(model, samples.dynamic_dims(model), seed=0)
    names = [value.name or "" for value in model.graph.inputs if not value.is_initializer()]
    feeds = {name: feeds[name] for name in names}
    told = outputs = run(feeds)
    if codes.of(model):
        told = tell(codes.telling(model))(feeds)
        for name, array in outputs.items():
            if told[name].tobytes() != array.tobytes():
                raise VerifyError(
                    Diagnostic(
                        "tvm.differs",
                        f"output {name!r} is another one where the codes are told too",
                        help="report this with the model",
                    )
                )
    return compare(model, feeds, told)


def compare(model: ir.Model, feeds: Feeds, told: Feeds) -> dict[str, float]:
    """The largest error of ``told``, the outputs and codes that an artifact made of ``feeds``; the bound.

    Of a model that rounds, ``codes`` counts the codes, and ``ties`` those that are not the judge's own.

    Raises:
        VerifyError: an output is beyond the bound, or a code is none that the IR may round to.
    """
    bound = bound_of(model)
    judge = _Judge(model, bound)
    given = {f"{name}/given": told[name] for name in judge.given}
    found = ort.run(judge.model, {**feeds, **given}, judge.asked)
    problems = [d for rounding in judge.roundings if (d := rounding.wrong(told, found)) is not None]
    errors = {name: relative_error(told[name], found[name]) for name in judge.plain}
    # Sums of halves are in float32, in whatever order.
    slack = verification.ROUNDINGS * (_ORDERS if bound == _BOUND else 1)
    bounds = verification.bounds(judge.model, errors, found, {**feeds, **given}, bound, slack=slack)
    worst = max(errors, key=lambda n: (not errors[n] <= bounds[n], errors[n]), default="")
    bound = bounds.get(worst, bound)
    if worst and not errors[worst] <= bound:
        problems.append(
            Diagnostic(
                "tvm.differs",
                f"output {worst!r} of the artifact is off by {errors[worst]:.1e} of its RMS"
                f" (at most {bound:.1e})",
                help="report this with the model",
            )
        )
    if problems:
        raise VerifyError(problems)
    report = {"error": errors.get(worst, 0.0), "bound": bound}
    if judge.roundings:
        report["codes"] = sum(told[rounding.codes].size for rounding in judge.roundings)
        report["ties"] = sum(rounding.ties(told, found) for rounding in judge.roundings)
    return report


class _Judge:
    """``model``, a copy, in which whatever reads a code reads an input that stands for it.

    ``given`` names these codes, ``plain`` the outputs that are no codes.
    """

    def __init__(self, model: ir.Model, bound: float) -> None:
        self.model = model.clone()
        graph = self.model.graph
        rounding = [node for node in graph if codes.rounds(node)]
        self.given: list[str] = []
        for value in (value for node in rounding for value in node.outputs):
            assert value.name is not None
            given = ir.Value(name=f"{value.name}/given", type=value.type, shape=value.shape)
            for user, index in tuple(value.uses()):
                user.replace_input_with(index, given)
            graph.inputs.append(given)
            self.given.append(value.name)
        self.roundings = [_Rounding(node, bound, graph) for node in rounding]
        made = {value for node in rounding for value in node.outputs}
        self.plain = [value.name or "" for value in graph.outputs if value not in made]
        self.asked = [*self.plain, *(name for each in self.roundings for name in each.asked)]


class _Rounding:
    """A node that rounds, and nodes behind it that say between what its codes must lie."""

    def __init__(self, node: ir.Node, bound: float, graph: ir.Graph) -> None:
        self.codes, *self._rest = (value.name or "" for value in node.outputs)
        self.asked = [self.codes]
        self._where = location(node)
        self._bound = bound
        self._nodes: list[ir.Node] = []
        if node.op_type in codes.INTEGER_OPERATORS:
            x: ir.Value | None = self._sum(node)
            scales = list(node.inputs[6:8])
            attributes = {}
        else:
            x, *scales = node.inputs
            attributes = dict(node.attributes)
        assert x is not None and x.dtype is not None
        wide = x if x.dtype in (D.FLOAT, D.DOUBLE) else self._add("Cast", [x], to=D.FLOAT.value)
        slack = self._slack(wide)
        if self._rest:  # by what the artifact found, which is held against these three
            self._ask("slack", slack)
            self._ask("least", self._add("ReduceMin", [wide], keepdims=0))
            self._ask("most", self._add("ReduceMax", [wide], keepdims=0))
            inputs = {value.name: value for value in graph.inputs}
            scales = [inputs[f"{name}/given"] for name in self._rest]
            attributes = {}
        for name, operator in (("low", "Sub"), ("high", "Add")):
            end = self._add(operator, [wide, slack])
            if wide is not x:
                end = self._add("Cast", [end], to=x.dtype.value)
            self._ask(name, self._add("QuantizeLinear", [end, *scales], **attributes))
        graph.insert_after(node, self._nodes)

    def _slack(self, x: ir.Value) -> ir.Value:
        """The bound times the RMS of the finite elements of ``x``."""
        number = np.float64 if x.dtype == D.DOUBLE else np.float32
        most = self._constant(np.finfo(number).max.astype(number))
        finite = self._add("LessOrEqual", [self._add("Abs", [x]), most])
        kept = self._add("Where", [finite, x, self._constant(number(0))])
        mean = self._add("ReduceMean", [self._add("Mul", [kept, kept])], keepdims=0)
        return self._add("Mul", [self._add("Sqrt", [mean]), self._constant(number(self._bound))])

    def _sum(self, node: ir.Node) -> ir.Value:
        """What an operator on codes rounds: the convolution or product of what they stand for, in float32."""
        a, a_scale, a_zero, b, b_scale, b_zero = node.inputs[:6]
        assert a is not None and a_scale is not None and b_scale is not None
        conv = node.op_type == "QLinearConv"
        operands = [
            self._dequantized(a, a_scale, a_zero, -2),
            self._dequantized(b, b_scale, b_zero, 0 if conv else -1),
        ]
        if len(node.inputs) > 8 and node.inputs[8] is not None:
            scale = self._add("Mul", [a_scale, b_scale])
            bias = self._add("Cast", [node.inputs[8]], to=D.FLOAT.value)
            operands.append(self._add("Mul", [bias, scale]))
        made = self._add("Conv" if conv else "MatMul", operands, **dict(node.attributes))
        made.dtype = D.FLOAT
        return made

    def _dequantized(
        self, x: ir.Value | None, scale: ir.Value, zero: ir.Value | None, axis: int
    ) -> ir.Value:
        if all(
            dim == 1 for dim in scale.shape or ()
        ):  # one for all, as a vector of one element too
            none = self._add("Constant", [], value=ir.tensor(np.zeros(0, np.int64)))
            scale = self._add("Reshape", [scale, none])
            zero = None if zero is None else self._add("Reshape", [zero, none])
        return self._add("DequantizeLinear", [x, scale, zero], axis=axis)

    def _constant(self, number: Any) -> ir.Value:
        return self._add("Constant", [], value=ir.tensor(np.asarray(number)))

    def _add(self, op_type: str, inputs: Sequence[ir.Value | None], **attributes: Any) -> ir.Value:
        node = ir.node(op_type, inputs, attributes)
        node.outputs[0].name = f"{self.codes}/judge{len(self._nodes)}"
        self._nodes.append(node)
        return node.outputs[0]

    def _ask(self, name: str, value: ir.Value) -> None:
        value.name = f"{self.codes}/{name}"
        self.asked.append(value.name)

    # -- what it found ------------------------------------------------------------------------------

    def ties(self, told: Feeds, found: Feeds) -> int:
        """How many codes are not the judge's own."""
        return int(np.count_nonzero(_numbers(told[self.codes]) != _numbers(found[self.codes])))

    def wrong(self, told: Feeds, found: Feeds) -> Diagnostic | None:
        """What is wrong with them."""
        actual = told[self.codes]
        if actual.shape != found[self.codes].shape or actual.dtype != found[self.codes].dtype:
            return self._said(f"is {actual.dtype}{list(actual.shape)}")
        if self._rest and (text := self._wrong_range(told, found)):
            return self._said(text)
        ends = [_numbers(found[f"{self.codes}/{name}"]) for name in ("low", "high")]
        low, high = np.minimum(*ends), np.maximum(*ends)  # a scale may be negative
        outside = ~((low <= _numbers(actual)) & (_numbers(actual) <= high))
        if not outside.any():
            return None
        first = tuple(int(i) for i in np.argwhere(outside)[0])
        return self._said(
            f"has {np.count_nonzero(outside)} of {actual.size} codes that the IR does not round to:"
            f" first {actual[first]} at {list(first)}, not {low[first]:g} to {high[first]:g}"
        )

    def _wrong_range(self, told: Feeds, found: Feeds) -> str:
        """Whether a dynamic scale and zero point are not those of the least and the largest element."""
        slack, least, most = (
            float(found[f"{self.codes}/{name}"]) for name in ("slack", "least", "most")
        )
        scale, zero = (float(_numbers(told[name])) for name in self._rest)
        below, above = max(-least, 0.0), max(most, 0.0)
        if not abs(255 * scale - (below + above)) <= 2 * slack:
            return f"has the scale {scale:g}, not {(below + above) / 255:g}"
        low = np.rint(255 * max(below - slack, 0) / max(below + above, 1e-38))
        high = np.rint(min(255 * (below + slack) / max(below + above, 1e-38), 255))
        if not low <= zero <= high:
            return f"has the zero point {zero:g}, not {low:g} to {high:g}"
        return ""

    def _said(self, text: str) -> Diagnostic:
        return Diagnostic(
            "tvm.differs",
            f"value {self.codes!r} of the artifact {text}",
            where=self._where,
            help="report this with the model",
        )


def _numbers(codes: Array) -> Array:
    return codes.astype(np.float64)
