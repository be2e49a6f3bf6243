"""Matrix products in all their spellings."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from tvm import tirx

from netlathe.backends.tvm import packing, storage
from netlathe.backends.tvm.arm import codes, products
from netlathe.backends.tvm.cuda import eight, matrices
from netlathe.backends.tvm.cuda import products as cuda_products
from netlathe.backends.tvm.cuda.machine import Gpu
from netlathe.backends.tvm.kernel import Kernel
from netlathe.backends.tvm.kernels import gemm, gemv, limbs
from netlathe.backends.tvm.kernels import reduce as template
from netlathe.backends.tvm.lowering import Lowering
from netlathe.backends.tvm.ops import dots
from netlathe.backends.tvm.ops.op import D, Op, Rule, broadcast_index, is_cheap
from netlathe.backends.tvm.packing import Recipe
from netlathe.backends.tvm.tir import Code, Expr, Index, i64
from netlathe.backends.tvm.values import Lazy, Normed, Pending, Ready, Store, Value
from netlathe.ir import dims, weights
from netlathe.ir.dims import Shape


def _matmul(op: Op) -> Sequence[Value]:
    constant = op.node.inputs[1]
    pair = eight.of_pair if isinstance(op.low.machine, Gpu) else dots.pair_product
    if (made := pair(op)) is not None:
        return [made]
    if constant is not None and op.value(0).rank >= 1:
        if isinstance(op.low.machine, Gpu) and (made := cuda_products.beside(op)) is not None:
            return [made]
        if _is_matrix(constant) and _is_plain(constant):
            left = cuda_products.left(op)
            return [by_constant(op.low, left, constant, op.dtype(), op.shape())]
        if isinstance(op.low.machine, Gpu):
            if eight.dequantized(constant) is not None:
                left = cuda_products.left(op)
                for of in (cuda_products.of_quantized, eight.of_weight):
                    if (held := of(op.low, left, constant, op.shape())) is not None:
                        return [held]
        elif (quantized := _quantized(constant)) is not None:
            return [by_quantized(op.low, op.ready(0), quantized, op.dtype(), op.shape())]
    return [product(op.low, op.value(0), op.value(1), op.dtype())]


def _is_matrix(value: ir.Value | None) -> bool:
    return value is not None and weights.is_weight(value) and len(value.shape or ()) == 2


def _is_plain(value: ir.Value) -> bool:
    """Whether the kernel can load the elements as vectors."""
    return value.dtype in (D.FLOAT, D.DOUBLE, D.FLOAT16, D.BFLOAT16, D.INT32, D.INT64)


def _quantized(value: ir.Value) -> ir.Node | None:
    """The DequantizeLinear that makes ``value`` from a constant matrix of integers."""
    node = value.producer()
    if node is None or node.op_type != "DequantizeLinear" or value.dtype != D.FLOAT:
        return None
    if not _is_matrix(node.inputs[0]) or not all(weights.is_weight(v) for v in node.inputs if v):
        return None
    data = node.inputs[0]
    whole = data is not None and data.dtype is not None and data.dtype.is_integer()
    return node if whole else None


def by_quantized(low: Lowering, a: Ready, node: ir.Node, dtype: D, shape: Shape) -> Pending:
    """``a`` [..., K] times a constant [K, N] that stays quantized: it is scaled in the kernel."""
    if (made := codes.by_quantized(low, a, node, dtype, shape)) is not None:
        return made
    data, scale = node.inputs[0], node.inputs[1]
    assert data is not None and scale is not None and data.const_value is not None
    tensor = data.const_value
    inner, columns = tensor.shape.numpy()
    cut = gemm.panels(low.machine, columns, storage.computed(dtype))
    axis = node.attributes.get_int("axis", 1) % 2
    block = node.attributes.get_int("block_size", 0) or 0
    # Rows of K that share a scale; with one per row (axis 0, no blocks) each row is a block.
    rows = (block if axis == 0 else inner) if block else (1 if axis == 0 else inner)
    if tuple(scale.shape or ()) in ((), (1,)):
        rows = inner
    blocks = -(-inner // rows)

    if block and axis == 1:  # scales [K, N / block]: one row of K a block
        rows, blocks = 1, inner
    layout = _layout(low, tensor.dtype, inner, rows)
    if layout is not None and low.machine.dot_bytes:
        cut = limbs.shared(cut)

    def parameter(value: ir.Value, what: str) -> Ready:
        return low.parameter(
            value.name or what,
            D.FLOAT,
            (cut.count, blocks, cut.width),
            Recipe(packing.scales, (_name(value),), (axis, block, cut.count, cut.width)),
            (value, what, cut),
        )

    if layout is not None:
        values = low.parameter(
            _name(data),
            D.INT32,
            (cut.count, inner // layout.rows, cut.width),
            Recipe(
                packing.word_panels,
                (_name(data),),
                (cut.count, cut.width, layout.bits, layout.offset),
            ),
            (data, "words", cut),
        )
    else:
        values = low.parameter(
            _name(data),
            tensor.dtype,
            (cut.count, inner, cut.width),
            Recipe(packing.panels, (_name(data),), (cut.count, cut.width)),
            (data, "packed", cut),
        )
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    zeros = parameter(zero, "zeros") if zero is not None else None
    scales = parameter(scale, "scales")
    weight = gemm.Weight(values, scales, zeros, rows, blocks, layout)
    return _packed(a, weight, cut, inner, dtype, shape)


def _layout(low: Lowering, dtype: D, inner: int, block: int) -> gemv.Words | None:
    """Words for numbers of 4 bits, and for those of 8 where a row of A is split into limbs."""
    layout = gemv.Words(dtype)
    if dtype in (D.INT4, D.UINT4):
        return layout if inner % layout.rows == 0 else None
    if dtype not in (D.INT8, D.UINT8) or not low.machine.dot_bytes:
        return None
    return layout if block % gemv.STEP == 0 and inner % block == 0 else None


def by_constant(
    low: Lowering, a: Ready | Normed, constant: ir.Value, dtype: D, shape: Shape
) -> Pending:
    """``a`` [..., K] times a constant [K, N], packed at compile time."""
    if isinstance(low.machine, Gpu):
        return cuda_products.of_constant(low, a, constant, dtype, shape)
    a = low.force(a)
    if (made := products.by_constant(low, a, constant, dtype, shape)) is not None:
        return made
    tensor = constant.const_value
    assert tensor is not None
    inner, columns = tensor.shape.numpy()
    cut = gemm.panels(low.machine, columns, storage.computed(dtype))
    weight = low.parameter(
        constant.name or "weight",
        tensor.dtype,
        (cut.count, inner, cut.width),
        Recipe(packing.panels, (_name(constant),), (cut.count, cut.width)),
        (constant, "packed", cut),
    )
    return _packed(a, gemm.Weight(weight), cut, inner, dtype, shape)


def _name(value: ir.Value) -> str:
    assert value.name is not None  # the IR has no constant without one
    return value.name


def _packed(
    a: Ready, weight: gemm.Weight, cut: gemm.Panels, inner: int, dtype: D, shape: Shape
) -> Pending:
    flat = a.viewed((dims.product(a.shape[:-1]), inner))
    lead = shape[:-1] if a.rank > 1 else ()

    def build(kernel: Kernel, store: Store) -> str:
        return gemm.packed(kernel, flat, weight, cut, kernel.shape(lead), inner, store)

    return Pending(dtype, shape, build)


def product(low: Lowering, a: Value, b: Value, dtype: D) -> Value:
    """A numpy matmul of two computed values."""
    a, b = (value if value.rank > 1 else low.operand(value) for value in (a, b))
    left = _padded(a, (1,) * (2 - a.rank) + a.shape if a.rank < 2 else a.shape)
    right = _padded(b, (*b.shape, 1) if b.rank < 2 else b.shape)
    batch = _batch(left.shape[:-2], right.shape[:-2])
    if isinstance(low.machine, Gpu):
        made = matrices.product(low, left, right, dtype, batch)
        if made is not None:
            return _as_numpy(low, made, a, b)
    # Each element is read by many tiles.
    left, right = (v if is_cheap(v) else low.force(v) for v in (left, right))
    whole = (*batch, left.shape[-2], right.shape[-1])
    columns = right.shape[-1]
    cut = gemm.panels(
        low.machine, columns if isinstance(columns, int) else 1 << 20, storage.computed(dtype)
    )

    def spread(value: Value) -> Lazy:
        shape = (*batch, *value.shape[-2:])

        def element(code: Code, index: Index) -> Expr:
            item = value.at(code, broadcast_index(code, value, index, shape))
            return _as(item, storage.computed(dtype))

        return Lazy(dtype, shape, element, cheap=True)

    wide_left, wide_right = spread(left), spread(right)

    def build(kernel: Kernel, store: Store) -> str:
        if isinstance(low.machine, Gpu):
            whole_batch = kernel.shape(batch)
            return cuda_products.of_values(kernel, wide_left, wide_right, whole_batch, store)
        return gemm.batched(kernel, wide_left, wide_right, cut, kernel.shape(batch), store)

    return _as_numpy(low, Pending(dtype, whole, build), a, b)


def _as_numpy(low: Lowering, made: Pending, a: Value, b: Value) -> Value:
    """A product [..., rows, columns] without the axes that a vector does not have."""
    shape = made.shape[:-2]
    shape += (a.shape[-2:-1] if a.rank > 1 else ()) + (b.shape[-1:] if b.rank > 1 else ())
    return made if shape == made.shape else low.force(made).viewed(shape)


def _as(item: Expr, dtype: str) -> Expr:
    return item if str(item.ty.dtype) == dtype else tirx.Cast(dtype, item)


def _batch(a: Shape, b: Shape) -> Shape:
    return dims.broadcast([a, b]).shape


def _padded(value: Value, shape: Shape) -> Value:
    if shape == value.shape:
        return value
    if isinstance(value, Ready):
        return value.viewed(shape)
    leading = shape[-value.rank :] == value.shape if value.rank else True

    def element(code: Code, index: Index) -> Expr:
        return value.at(code, index[-value.rank :] if leading else index[: value.rank])

    return Lazy(value.dtype, shape, element, cheap=is_cheap(value))


def _gemm(op: Op) -> Sequence[Value]:
    from netlathe.backends.tvm.ops.elementwise import like
    from netlathe.backends.tvm.ops.movement import transposed
    from netlathe.backends.tvm.ops.op import combine

    a, b = op.value(0), op.value(1)
    if op.integer("transA"):
        a = transposed(op, a, [1, 0])
    if op.integer("transB"):
        b = transposed(op, b, [1, 0])
    alpha, beta = op.real("alpha", 1.0), op.real("beta", 1.0)
    made: Value = product(op.low, a, b, op.dtype())
    if alpha != 1.0:
        made = combine(op.low, lambda code, x: x * like(x, alpha), [made], op.dtype(), made.shape)
    if op.has(2):
        made = combine(
            op.low,
            lambda code, x, c: x + (c if beta == 1.0 else c * like(c, beta)),
            [made, op.value(2)],
            op.dtype(),
            op.shape(),
        )
    return [made]


def _einsum(op: Op) -> Sequence[Value]:
    """The sum over all letters that the result does not have, as the equation states it."""
    operands = [op.low.force(op.value(i)) for i in range(len(op.node.inputs))]
    terms, result = _letters(op.text("equation"), [operand.rank for operand in operands])
    sizes = {
        letter: dim
        for term, operand in zip(terms, operands, strict=True)
        for letter, dim in zip(term, operand.shape, strict=True)
        if dim != 1 or letter not in result
    }
    summed = [
        letter for letter in dict.fromkeys("".join(map("".join, terms))) if letter not in result
    ]
    dtype, shape = op.dtype(), op.shape()

    def build(kernel: Kernel, store: Store) -> str:
        def element(code: Code, kept: list[Expr], inner: list[Expr]) -> Expr:
            at = dict(zip(result, kept, strict=True)) | dict(zip(summed, inner, strict=True))
            whole = None
            for term, operand in zip(terms, operands, strict=True):
                index = [
                    i64(0) if dim == 1 else at[letter]
                    for letter, dim in zip(term, operand.shape, strict=True)
                ]
                item = operand.at(code, index)
                whole = item if whole is None else whole * item
            return whole

        return template.reduce(
            kernel,
            kernel.shape(shape),
            [kernel.size(sizes.get(letter, 1)) for letter in summed],
            False,
            storage.computed(dtype),
            template.COMBINE["sum"],
            element,
            store,
        )

    return [Pending(dtype, shape, build)]


def _letters(equation: str, ranks: Sequence[int]) -> tuple[list[list[str]], list[str]]:
    """The letters of every operand and of the result; dims of an ellipsis are numbered from the right."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = []
    for text, rank in zip(left.split(","), ranks, strict=True):
        before, dots, after = text.partition("...")
        count = rank - len(before) - len(after) if dots else 0
        terms.append([*before, *(str(n) for n in range(count - 1, -1, -1)), *after])
    spread = max((term for term in terms), key=lambda t: sum(c.isdigit() for c in t))
    numbers = [letter for letter in spread if letter.isdigit()]
    if arrow:
        before, dots, after = right.partition("...")
        return terms, [*before, *(numbers if dots else []), *after]
    every = [letter for term in terms for letter in term if not letter.isdigit()]
    return terms, [*numbers, *sorted(letter for letter in set(every) if every.count(letter) == 1)]


ROWS: dict[str, Rule] = {
    "Einsum": _einsum,
    "MatMul": _matmul,
    "Gemm": _gemm,
}
