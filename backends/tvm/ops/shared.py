"""What several read, written by one kernel: the floats, and the codes that QuantizeLinears make of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import onnx_ir as ir

from netlathe.backends.tvm import storage
from netlathe.backends.tvm.cuda.machine import Gpu
from netlathe.backends.tvm.kernel import Kernel
from netlathe.backends.tvm.kernels import general
from netlathe.backends.tvm.lowering import Lowering
from netlathe.backends.tvm.ops import dots, quantize
from netlathe.backends.tvm.ops.op import Op
from netlathe.backends.tvm.tir import Code, Expr, Index
from netlathe.backends.tvm.values import ChannelsLast, Pending, Store, Value


def quantizers(low: Lowering, output: ir.Value) -> Mapping[ir.Node, ir.Node]:
    """The QuantizeLinears of ``output`` by constants for the whole tensor; to each the first of its kind.

    Other scales may come later, or need more than the element that they divide. None on a GPU, whose kernels
    have last steps of their own.
    """
    found: dict[ir.Node, ir.Node] = {}
    if isinstance(low.machine, Gpu):
        return found
    kinds: dict[object, ir.Node] = {}
    for node, place in output.uses():
        if node.op_type != "QuantizeLinear" or node.domain or place != 0:
            continue
        settings = [value for value in node.inputs[1:] if value is not None]
        if not all(quantize.is_literal(value) for value in settings):
            continue
        held = [value.const_value.numpy().tobytes() for value in settings if value.const_value]
        types = [value.dtype for value in (*settings, *node.outputs)]
        kind = (*types, *held, *(str(attribute) for attribute in node.attributes.values()))
        found[node] = kinds.setdefault(kind, node)
    return found


def written(
    low: Lowering, output: ir.Value, value: Value, by: Mapping[ir.Node, ir.Node], floats: bool
) -> Value:
    """``value``, pending or not computed, in memory if ``floats``; its kernel writes the codes of ``by`` too.

    These are left in ``low.made``, for when their nodes are visited.
    """
    takers: list[Store] = []
    inner = value.last if isinstance(value, ChannelsLast) else value

    def take(kernel: Kernel, store: Store) -> str:
        takers.append(store)
        return ""

    # Stands for the elements in the middle of the kernel: what is appended to it takes them from there.
    element = Pending(inner.dtype, inner.shape, take)
    low.values[output] = _like(value, element)
    firsts = list(dict.fromkeys(by.values()))
    codes = [quantize.ROWS["QuantizeLinear"](Op(low, node))[0] for node in firsts]
    outputs = [low.values[output]] if floats else []
    outputs += [dots.shifted(low, made) for made in codes]

    kernel = Kernel(low)
    for made in outputs:
        last = made.last if isinstance(made, ChannelsLast) else made
        assert isinstance(last, Pending)
        out = kernel.write(last.dtype, last.shape)
        last.build(kernel, general.into(out, last.dtype, kernel.shape(last.shape)))

    def store(code: Code, index: Index, item: Expr) -> None:
        item = code.bind(storage.rounded(code, inner.dtype, item))
        for taker in takers:
            taker(code, index, item)

    if isinstance(inner, Pending):
        schedule = inner.build(kernel, store)
    else:
        schedule = general.elementwise(kernel, inner, store)
    ready = kernel.finish(schedule)
    held = [_like(made, one) for made, one in zip(outputs, ready, strict=True)]
    results = {
        node: dots.unshifted(low, lies, made)
        for node, lies, made in zip(firsts, held[len(held) - len(firsts) :], codes, strict=True)
    }
    low.made.update({node: [results[first]] for node, first in by.items()})
    return held[0] if floats else value


def _like(value: Value, inner: Value) -> Value:
    """``inner`` in the order of ``value``: channels last, or as usual."""
    if isinstance(value, ChannelsLast):
        return replace(value, dtype=inner.dtype, last=inner)
    return inner
