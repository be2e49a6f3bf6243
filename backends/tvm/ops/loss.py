"""Losses, and dropout outside of training."""

from __future__ import annotations

from collections.abc import Sequence

from netlathe.backends.tvm.ops.elementwise import like
from netlathe.backends.tvm.ops.movement import repeated, wrapped
from netlathe.backends.tvm.ops.norm import log_softmax
from netlathe.backends.tvm.ops.op import D, Op, Rule, combine
from netlathe.backends.tvm.ops.reduction import reduced
from netlathe.backends.tvm.tir import Code, Expr, Index, cast, i64, select
from netlathe.backends.tvm.values import Lazy, Scalar, Value


def _likelihood(op: Op, logs: Value, target: Value, weight: Value | None) -> Value:
    """-weight * log-probability of the target class, reduced as the node says."""
    low = op.low
    logs = low.force(logs)
    ignored = op.integer("ignore_index", 0) if "ignore_index" in op.node.attributes else None
    shape = target.shape

    def factor(code: Code, at: Index) -> Expr:
        label = cast(target.at(code, at), "int64")
        if weight is None:
            made = like(logs.at(code, [at[0], i64(0), *at[1:]]), 1.0)
        else:
            made = weight.at(code, [wrapped(label, code.kernel.size(weight.shape[0]))])
        return made if ignored is None else select(label == i64(ignored), like(made, 0.0), made)

    def element(code: Code, at: Index) -> Expr:
        label = wrapped(target.at(code, at), code.kernel.size(logs.shape[1]))
        item = logs.at(code, [at[0], code.bind(label), *at[1:]])
        return like(item, 0.0) - item * factor(code, at)

    loss = Lazy(logs.dtype, shape, element, cost=6)
    kind = op.text("reduction", "mean")
    if kind == "none":
        return loss
    axes = list(range(len(shape)))
    whole = reduced(low, loss, axes, "sum", False)
    if kind == "sum":
        return whole
    factors = Lazy(logs.dtype, shape, factor, cost=4)
    count = low.force(reduced(low, factors, axes, "sum", False))
    return combine(low, lambda code, a, b: a / b, [whole, count], logs.dtype, ())


def _negative_log_likelihood(op: Op) -> Sequence[Value]:
    weight = op.operand(2) if op.has(2) else None
    return [_likelihood(op, op.operand(0), op.operand(1), weight)]


def _softmax_cross_entropy(op: Op) -> Sequence[Value]:
    logs = op.low.force(log_softmax(op.low, op.operand(0), 1))
    weight = op.operand(2) if op.has(2) else None
    return [_likelihood(op, logs, op.operand(1), weight), logs]


def _dropout(op: Op) -> Sequence[Value]:
    if op.has(2):
        training = op.array(2)
        if training is None or bool(training):
            raise op.gap("training mode")
    value = op.operand(0)
    return [value, repeated(Scalar(D.BOOL, (), True), value.shape)]


ROWS: dict[str, Rule] = {
    "NegativeLogLikelihoodLoss": _negative_log_likelihood,
    "SoftmaxCrossEntropyLoss": _softmax_cross_entropy,
    "Dropout": _dropout,
}
