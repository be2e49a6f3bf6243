"""Raises decomposed normalizations to RMSNormalization, LayerNormalization, InstanceNormalization
and GroupNormalization.

    x / sqrt(mean(x^2) + eps) * w                       -> RMSNormalization(x, w)
    (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps)   -> LayerNormalization, over trailing axes
    the same over all axes behind the channels          -> InstanceNormalization
    reshape(x, [b, groups, -1]), InstanceNormalization, reshape back, scale, shift
                                                        -> GroupNormalization

The square may be Pow or Mul; the root Sqrt, Pow(0.5) or Pow(-0.5), under Div or Reciprocal; scale and
shift may be absent (then ones and zeros are written out). Half-precision inputs that are cast up for the
norm and down again before the scale become ``stash_type=1``; other casts stay where they are.
Norms over a leading axis (channels first) stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from netlathe.ir.edit import const_array
from netlathe.passes.normalize.match import (
    Found,
    NoMatch,
    attribute,
    node_of,
    number,
    numbers_of,
    op,
    operands,
    outermost,
    scalar,
    shown,
    used_elsewhere,
    var,
)
from netlathe.passes.normalize.rewrite import (
    Builder,
    Dims,
    Proposal,
    dims_of,
    text_of,
)

_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)

# c is what is divided by its own RMS: x itself, or x minus its mean
_c = var("c")
_square = op("Pow", _c, number(2.0)) | op("Mul", _c, _c)
_mean = op("ReduceMean", _square, var("axes"), keepdims=1, called="mean(x^2)")
_shifted = op("Add", _mean, scalar("eps"), called="mean(x^2) + eps")
_root = op("Sqrt", _shifted, called="sqrt(mean(x^2) + eps)") | op("Pow", _shifted, number(0.5))
_inverse = (
    op("Reciprocal", _root, called="1 / sqrt(mean(x^2) + eps)")
    | op("Div", number(1.0), _root)
    | op("Pow", _shifted, number(-0.5))
)
_normalized = (
    op("Div", _c, _root)
    | op("Mul", _c, _inverse)
    | op("Mul", _c, op("Mul", _inverse, var("scale")), called="x * (scale / rms)")
)
_outside = op("Add", op("Sqrt", _mean) | op("Pow", _mean, number(0.5)), scalar("eps"))
_HOPS = 6  # Add, Sqrt, Reciprocal, Mul with the scale, Mul


class Norms:
    """RMSNormalization, LayerNormalization and InstanceNormalization."""

    def anchors(self, graph: ir.Graph) -> Iterable[ir.Node]:
        """Every mean of a square."""
        for node in graph:
            if node.domain == "" and node.op_type == "ReduceMean":
                square = node_of(node.inputs[0], "Pow", "Mul")
                if square is not None and (
                    square.inputs[0] is square.inputs[1] or _is_square(square)
                ):
                    yield node

    def propose(self, anchor: ir.Node) -> Proposal:
        """The norm in place of what stands around the mean of a square.

        Raises:
            NoMatch: what stands there is something else.
        """
        through = ("Add", "Sqrt", "Pow", "Reciprocal", "Div", "Mul")
        try:
            found = outermost(_normalized, anchor, through, _HOPS)
        except NoMatch as refusal:
            try:
                outermost(_outside, anchor, through, _HOPS)
            except NoMatch:
                raise refusal from None
            raise NoMatch("epsilon is added to the root, not under it", anchor) from None
        axes = _axes(anchor, found)
        x, centred = _centred(found.values["c"], axes)
        return _Norm(found, x, axes, centred).proposal()


def _is_square(node: ir.Node) -> bool:
    exponent = const_array(node.inputs[1]) if node.op_type == "Pow" else None
    return exponent is not None and exponent.size == 1 and float(exponent.reshape(-1)[0]) == 2.0


def _axes(mean: ir.Node, found: Found) -> tuple[int, ...]:
    """The reduced axes, counted from the front."""
    axes = numbers_of(found.values["axes"])
    if not axes:
        raise NoMatch("the axes of the mean are not known", mean)
    rank = len(dims_of(found.values["c"]))
    return tuple(sorted(axis % rank for axis in axes))


def _centred(c: ir.Value, axes: tuple[int, ...]) -> tuple[ir.Value, bool]:
    """What is normalized, and whether its mean is subtracted: ``c = x - mean(x)`` over ``axes``."""
    subtraction = node_of(c, "Sub")
    mean = None if subtraction is None else node_of(subtraction.inputs[1], "ReduceMean")
    if subtraction is None or mean is None or mean.inputs[0] is not subtraction.inputs[0]:
        return c, False
    x = operands(subtraction)[0]
    own = numbers_of(mean.inputs[1]) if len(mean.inputs) > 1 else None
    rank = len(dims_of(x))
    if own is None or tuple(sorted(a % rank for a in own)) != axes:
        raise NoMatch(f"the mean is over other axes than the variance's {list(axes)}", mean)
    if attribute(mean, "keepdims", 1) != 1:
        raise NoMatch("the mean drops the reduced axes", mean)
    return x, True


@dataclass
class _Norm:
    """A normalization without its affine tail: ``found`` ends at the normalized value."""

    found: Found
    x: ir.Value
    axes: tuple[int, ...]
    centred: bool

    def proposal(self) -> Proposal:
        dims = dims_of(self.x)
        trailing = tuple(range(self.axes[0], len(dims)))
        if self.axes != trailing:
            wanted = "LayerNormalization" if self.centred else "RMSNormalization"
            raise NoMatch(
                f"mean over axes {list(self.axes)} of {len(dims)}; {wanted} takes the last axes",
                self.found.nodes[-1],
            )
        root = self.found.nodes[0].outputs[0]
        x, root = _stashed(self.x, root)
        over_space = self.centred and self.axes == tuple(range(2, len(dims)))
        normalized_dims = dims[self.axes[0] :]
        channels = (dims[1], *[1] * (len(dims) - 2)) if len(dims) > 2 else ()

        scale = self.found.values.get("scale")
        if scale is None:
            scale, root = _tail(
                root, "Mul", (normalized_dims, channels) if over_space else (normalized_dims,)
            )
        shift: ir.Value | None = None
        if self.centred and scale is not None:
            shift, root = _tail(root, "Add", (dims_of(scale),))
        per_channel = over_space and (
            len(dims) > 3 if scale is None else _without_leading_ones(dims_of(scale)) == channels
        )
        op_type = "InstanceNormalization" if per_channel else "LayerNormalization"
        if not self.centred:
            op_type = "RMSNormalization"
        width = dims[1:2] if per_channel else normalized_dims
        return self._build(op_type, x, root, scale, shift, width)

    def _build(
        self,
        op_type: str,
        x: ir.Value,
        root: ir.Value,
        scale: ir.Value | None,
        shift: ir.Value | None,
        width: Dims,
    ) -> Proposal:
        build = Builder()
        affine = [_as_vector(build, scale, width, 1.0, x.dtype)]
        if op_type == "InstanceNormalization" or shift is not None:
            affine.append(_as_vector(build, shift, width, 0.0, x.dtype))
        eps = self.found.number("eps")
        attributes: dict[str, int | float] = {"epsilon": eps}
        if op_type != "InstanceNormalization":
            attributes |= {"axis": self.axes[0], "stash_type": 1}
        raised = build.op(op_type, x, *affine, shape=dims_of(root), dtype=root.dtype, **attributes)
        says = f"{op_type} over {text_of(width)}, epsilon {eps:g}"
        return Proposal(
            op_type, {root: raised}, build, says, trial="small_rows", detail={"epsilon": eps}
        )


def _stashed(x: ir.Value, normalized: ir.Value) -> tuple[ir.Value, ir.Value]:
    """``x`` before its cast up and the normalized value after its cast down, where both are there."""
    up = node_of(x, "Cast")
    before = None if up is None else up.inputs[0]
    readers = [node for node, _ in normalized.uses()]
    if before is None or before.dtype not in _HALF or used_elsewhere(normalized, *readers[:1]):
        return x, normalized
    down = readers[0] if readers else None
    if down is None or down.op_type != "Cast" or down.outputs[0].dtype != before.dtype:
        return x, normalized
    return before, down.outputs[0]


def _tail(
    value: ir.Value, op_type: str, allowed: Iterable[Dims]
) -> tuple[ir.Value | None, ir.Value]:
    """The weight that the only reader of ``value`` multiplies or adds, and that reader's output."""
    readers = [node for node, _ in value.uses()]
    if len(readers) != 1 or value.is_graph_output() or readers[0].op_type != op_type:
        return None, value
    weights = [operand for operand in operands(readers[0]) if operand is not value]
    if len(weights) != 1 or weights[0].shape is None or weights[0].dtype != value.dtype:
        return None, value
    held = _without_leading_ones(dims_of(weights[0]))
    if held not in [_without_leading_ones(dims) for dims in allowed if dims]:
        return None, value
    if readers[0].outputs[0].shape != value.shape:
        return None, value
    return weights[0], readers[0].outputs[0]


def _without_leading_ones(dims: Dims) -> Dims:
    first = next((i for i, dim in enumerate(dims) if dim != 1), len(dims))
    return dims[first:]


def _as_vector(
    build: Builder, weight: ir.Value | None, width: Dims, fill: float, dtype: ir.DataType | None
) -> ir.Value:
    """The weight in the shape ``width``; a constant of ``fill`` where there is none."""
    sizes = [dim for dim in width if isinstance(dim, int)]
    if len(sizes) != len(width):
        raise NoMatch(f"the normalized dims {text_of(width)} are not fixed")
    if weight is None:
        assert dtype is not None
        if dtype == ir.DataType.BFLOAT16:
            raise NoMatch("a bfloat16 norm without a scale")
        return build.constant(np.full(sizes, fill, dtype.numpy()), "ones" if fill else "zeros")
    if dims_of(weight) == width:
        return weight
    return build.reshape(weight, sizes, sizes)


# -- GroupNormalization ---------------------------------------------------------------------------


class GroupNorms:
    """GroupNormalization written as InstanceNormalization over groups."""

    def anchors(self, graph: ir.Graph) -> Iterable[ir.Node]:
        """Every InstanceNormalization between two Reshapes."""
        for node in graph:
            if node.domain == "" and node.op_type == "InstanceNormalization":
                readers = [user for user, _ in node.outputs[0].uses()]
                if node_of(node.inputs[0], "Reshape") and [r.op_type for r in readers] == [
                    "Reshape"
                ]:
                    yield node

    def propose(self, anchor: ir.Node) -> Proposal:
        """GroupNormalization in place of reshape, normalize, reshape back, scale, shift.

        Raises:
            NoMatch: what stands there is something else.
        """
        inner, scale, shift = operands(anchor)
        split = node_of(inner, "Reshape")
        assert split is not None
        x = operands(split)[0]
        back = next(iter(anchor.outputs[0].uses()))[0].outputs[0]
        if not _all_equal(scale, 1.0) or not _all_equal(shift, 0.0):
            raise NoMatch(f"{shown(scale)} scales the groups before they are joined", anchor)
        dims, grouped = dims_of(x), dims_of(inner)
        if len(dims) < 3 or dims_of(back) != dims:
            raise NoMatch(f"{text_of(dims)} is not what {text_of(dims_of(back))} was", anchor)
        channels, groups = dims[1], grouped[1]
        if not isinstance(channels, int) or not isinstance(groups, int) or grouped[0] != dims[0]:
            raise NoMatch(f"{text_of(dims)} to {text_of(grouped)} does not group channels", split)
        if len(grouped) != 3 or channels % groups:
            raise NoMatch(f"{text_of(dims)} to {text_of(grouped)} does not group channels", split)
        per_channel = (channels, *[1] * (len(dims) - 2))
        gamma, root = _tail(back, "Mul", (per_channel,))
        beta, root = _tail(root, "Add", (per_channel,))
        build = Builder()
        affine = [
            _as_vector(build, gamma, (channels,), 1.0, x.dtype),
            _as_vector(build, beta, (channels,), 0.0, x.dtype),
        ]
        eps = float(attribute(anchor, "epsilon", 1e-5))
        raised = build.op(
            "GroupNormalization",
            x,
            *affine,
            shape=dims,
            epsilon=eps,
            num_groups=groups,
            stash_type=1,
        )
        says = f"GroupNormalization of {channels} channels in {groups} groups, epsilon {eps:g}"
        return Proposal("GroupNormalization", {root: raised}, build, says, detail={"epsilon": eps})


def _all_equal(value: ir.Value, number: float) -> bool:
    array = const_array(value)
    return array is not None and bool((array == number).all())
