"""Ops that move, select, repeat and place elements, and those that make tensors from shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor

from . import host
from .row import Ints, Row, along, axes_of, ints, number, row
from .storage import TORCH_DTYPE, by_bits, in_order

# -- shape ----------------------------------------------------------------------------------------


def reshape(data: Tensor, shape: Ints, *, allowzero: int = 0) -> Tensor:
    """Reshape: 0 copies the dim at the same place unless ``allowzero``, -1 is what remains."""
    target = ints(shape)
    if not allowzero:
        target = [
            data.shape[i] if isinstance(n, int) and n == 0 else n for i, n in enumerate(target)
        ]
    return data.reshape(target)


def flatten(input: Tensor, *, axis: int = 1) -> Tensor:
    """Flatten to 2-D around an axis; torch's flatten keeps the others apart."""
    axis = axis if axis >= 0 else axis + input.dim()
    return input.reshape(math.prod(input.shape[:axis]), math.prod(input.shape[axis:]))


def squeeze(data: Tensor, axes: Ints | None = None) -> Tensor:
    """Squeeze: the named dims, which must be 1 (torch would leave others alone), or all that are."""
    if axes is None:
        return data.squeeze()
    gone = axes_of(axes, data.dim())
    for axis in gone:
        if data.shape[axis] != 1:
            raise ValueError(f"dim {axis} of {tuple(data.shape)} is not 1: it cannot be squeezed")
    return data.reshape([n for i, n in enumerate(data.shape) if i not in gone])


def unsqueeze(data: Tensor, axes: Ints) -> Tensor:
    """Unsqueeze: axes count in the result."""
    rank = data.dim() + len(ints(axes))
    for axis in sorted(axes_of(axes, rank)):
        data = data.unsqueeze(axis)
    return data


def transpose(data: Tensor, *, perm: Sequence[int] | None = None) -> Tensor:
    """Transpose; without ``perm`` the dims are reversed."""
    return data.permute(*(range(data.dim() - 1, -1, -1) if perm is None else perm))


def expand(input: Tensor, shape: Ints) -> Tensor:
    """Expand: a two-way broadcast, so a dim of the target may be 1 where the input's is larger."""
    target = ints(shape)
    rank = max(input.dim(), len(target))
    target = [1] * (rank - len(target)) + target
    sizes = [1] * (rank - input.dim()) + list(input.shape)
    return input.expand(
        [-1 if _is_one(t) and i >= rank - input.dim() else t for i, t in enumerate(target)]
        if not all(_is_one(s) for s in sizes)
        else target
    )


def _is_one(size: object) -> bool:
    # A symbolic size is never taken for 1: that would be a guard.
    return isinstance(size, int) and size == 1


def tile(input: Tensor, repeats: Ints) -> Tensor:
    """Tile."""
    return input.repeat(ints(repeats))


def identity(input: Tensor) -> Tensor:
    """Identity."""
    return input


# -- select ---------------------------------------------------------------------------------------


def slice_(
    data: Tensor,
    starts: Ints,
    ends: Ints,
    axes: Ints | None = None,
    steps: Ints | None = None,
) -> Tensor:
    """Slice: as Python does, negative steps (which torch refuses) included."""
    first, last = ints(starts), ints(ends)
    over = list(range(len(first))) if axes is None else axes_of(axes, data.dim())
    by = [1] * len(first) if steps is None else ints(steps)
    for start, end, axis, step in zip(first, last, over, by, strict=True):
        if step > 0:
            index = [slice(None)] * data.dim()
            index[axis] = slice(start, end, step)
            data = data[tuple(index)]
        else:
            size = data.shape[axis]
            picked = range(size)[slice(start, None if end < -size else end, step)]
            data = data.index_select(axis, torch.tensor(list(picked), device=data.device))
    return data


def split(
    input: Tensor,
    split: Ints | None = None,
    *,
    axis: int = 0,
    num_outputs: int | None = None,
    output_count: int,
) -> tuple[Tensor, ...]:
    """Split; without sizes into equal parts, the last smaller."""
    if split is not None:
        return tuple(torch.split(input, ints(split), axis))
    part = -(-input.shape[axis] // output_count)
    return tuple(torch.split(input, part, axis))


def concat(*inputs: Tensor, axis: int) -> Tensor:
    """Concat."""
    return torch.cat(inputs, axis)


def gather(data: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    """Gather: the dims of ``indices`` stand in place of ``axis``; negative indices count from the end."""
    axis %= data.dim()
    flat = _wrap(indices, data.shape[axis]).reshape(-1)
    shape = [*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :]]
    return data.index_select(axis, flat).reshape(shape)


def _wrap(indices: Tensor, size: int) -> Tensor:
    indices = indices.to(torch.int64)
    return torch.where(indices < 0, indices + size, indices)


def gather_elements(data: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    """GatherElements."""
    return torch.gather(data, axis, _wrap(indices, data.shape[axis]))


def gather_nd(data: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    """GatherND: the last dim of ``indices`` addresses the dims after the batch dims."""
    depth = indices.shape[-1]
    batch = [
        along(torch.arange(n, device=data.device), i, indices.dim() - 1)
        for i, n in enumerate(data.shape[:batch_dims])
    ]
    where = [_wrap(indices[..., i], data.shape[batch_dims + i]) for i in range(depth)]
    return data[tuple(batch + where)]


def compress(input: Tensor, condition: Tensor, *, axis: int | None = None) -> Tensor:
    """Compress: a condition shorter than the axis leaves the rest out."""
    if axis is None:
        input, axis = input.reshape(-1), 0
    return input.index_select(axis, torch.nonzero(condition).reshape(-1))


def non_zero(x: Tensor) -> Tensor:
    """NonZero: [rank, count], transposed against torch."""
    return torch.nonzero(x).T


def unique(
    x: Tensor, *, axis: int | None = None, sorted: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unique: the values, where each first stands, which is where, how often; sorted or in order."""
    if axis is None:
        x, axis = x.reshape(-1), 0
    values, inverse, counts = torch.unique(
        x, sorted=True, return_inverse=True, return_counts=True, dim=axis
    )
    position = torch.arange(inverse.numel(), device=x.device)
    first = torch.full((counts.numel(),), inverse.numel(), device=x.device)
    first = first.scatter_reduce(0, inverse, position, "amin")
    if not sorted:
        order = torch.argsort(first)
        values = values.index_select(axis, order)
        inverse = torch.argsort(order)[inverse]
        first, counts = first[order], counts[order]
    return values, first, inverse, counts


def top_k(
    x: Tensor, k: Ints, *, axis: int = -1, largest: int = 1, sorted: int = 1
) -> tuple[Tensor, Tensor]:
    """TopK: of equal values the one with the lower index comes first, which torch.topk leaves open."""
    count = number(k)
    keys = in_order(x)
    order = torch.argsort(keys, dim=axis, descending=bool(largest), stable=True)
    indices = order.narrow(axis, 0, count)
    return by_bits(torch.gather)(x, axis, indices), indices


def reverse_sequence(
    input: Tensor, sequence_lens: Tensor, *, batch_axis: int = 1, time_axis: int = 0
) -> Tensor:
    """ReverseSequence: the first ``sequence_lens[b]`` steps of each batch entry, backwards."""
    steps = along(torch.arange(input.shape[time_axis], device=input.device), time_axis, input.dim())
    lengths = along(sequence_lens, batch_axis, input.dim())
    source = torch.where(steps < lengths, lengths - 1 - steps, steps)
    return torch.gather(input, time_axis, source.expand(input.shape))


# -- place ----------------------------------------------------------------------------------------

_REDUCE = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def scatter_elements(
    data: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0, reduction: str = "none"
) -> Tensor:
    """ScatterElements."""
    where = _wrap(indices, data.shape[axis])
    if reduction == "none":
        return data.scatter(axis, where, updates)
    return data.scatter_reduce(axis, where, updates, _REDUCE[reduction], include_self=True)


def scatter_nd(
    data: Tensor, indices: Tensor, updates: Tensor, *, reduction: str = "none"
) -> Tensor:
    """ScatterND: on rows addressed by the last dim of ``indices``, all dims after them together."""
    depth = indices.shape[-1]
    flat = torch.zeros(indices.shape[:-1], dtype=torch.int64, device=data.device)
    for i in range(depth):
        flat = flat * data.shape[i] + _wrap(indices[..., i], data.shape[i])
    rows = data.reshape(math.prod(data.shape[:depth]), math.prod(data.shape[depth:]))
    where = flat.reshape(-1, 1).expand(-1, rows.shape[1])
    new = updates.reshape(where.shape)
    return scatter_elements(rows, where, new, reduction=reduction).reshape(data.shape)


def tensor_scatter(
    past_cache: Tensor,
    update: Tensor,
    write_indices: Tensor | None = None,
    *,
    axis: int = -2,
    mode: str = "linear",
) -> Tensor:
    """TensorScatter: ``update`` written into each batch entry of a cache from its own position on."""
    rank, axis = past_cache.dim(), axis % past_cache.dim()
    where = along(torch.arange(update.shape[axis], device=update.device), axis, rank)
    if write_indices is not None:
        where = where + along(write_indices, 0, rank)
    if mode == "circular":
        where = where % past_cache.shape[axis]
    return past_cache.scatter(axis, where.expand(update.shape), update)


def pad(
    data: Tensor,
    pads: Ints,
    constant_value: Tensor | float | None = None,
    axes: Ints | None = None,
    *,
    mode: str = "constant",
    value: float = 0.0,
) -> Tensor:
    """Pad: all begins, then all ends; negative ones crop. ``value`` is the attribute of opset 2."""
    amounts = ints(pads)
    over = axes_of(axes, data.dim())
    begins = dict(zip(over, amounts[: len(over)], strict=True))
    ends = dict(zip(over, amounts[len(over) :], strict=True))
    if mode == "constant":
        filling = value if constant_value is None else number(constant_value)
        widths = [
            width
            for axis in reversed(range(data.dim()))
            for width in (begins.get(axis, 0), ends.get(axis, 0))
        ]
        return F.pad(data, widths, value=filling)
    for axis in over:
        data = _pad_by_index(data, axis, begins[axis], ends[axis], mode)
    return data


def _pad_by_index(data: Tensor, axis: int, begin: int, end: int, mode: str) -> Tensor:
    size = data.shape[axis]
    # A crop comes first: what is cropped is not reflected.
    start, stop = max(0, -begin), size - max(0, -end)
    data = data.narrow(axis, start, stop - start)
    begin, end, size = max(0, begin), max(0, end), stop - start
    if begin == 0 and end == 0:
        return data
    at = torch.arange(-begin, size + end, device=data.device)
    if mode == "edge":
        at = at.clamp(0, size - 1)
    elif mode == "wrap":
        at = at % size
    else:  # reflect: a triangle wave with the period 2 (size - 1)
        period = max(2 * (size - 1), 1)
        at = at % period
        at = torch.minimum(at, period - at)
    return data.index_select(axis, at)


def center_crop_pad(
    input_data: Tensor, shape: Ints, *, axes: Sequence[int] | None = None
) -> Tensor:
    """CenterCropPad: crop or zero-pad to ``shape`` about the centre; what is odd goes to the end."""
    over = axes_of(axes, input_data.dim())
    widths = [0] * (2 * input_data.dim())
    for axis, target in zip(over, ints(shape), strict=True):
        extra = target - input_data.shape[axis]
        begin = extra // 2 if extra >= 0 else -((-extra) // 2)
        last = 2 * (input_data.dim() - 1 - axis)  # F.pad lists the last axis first
        widths[last : last + 2] = [begin, extra - begin]
    return F.pad(input_data, widths)


def trilu(input: Tensor, k: Ints | None = None, *, upper: int = 1) -> Tensor:
    """Trilu."""
    diagonal = 0 if k is None else number(k)
    return torch.triu(input, diagonal) if upper else torch.tril(input, diagonal)


def depth_to_space(input: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """DepthToSpace: the block stands before (DCR) or after (CRD) the channel in the depth."""
    n, depth, h, w = input.shape
    c = depth // blocksize**2
    if mode == "DCR":
        x = input.reshape(n, blocksize, blocksize, c, h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        x = input.reshape(n, c, blocksize, blocksize, h, w).permute(0, 1, 4, 2, 5, 3)
    return x.reshape(n, c, h * blocksize, w * blocksize)


def space_to_depth(input: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """SpaceToDepth."""
    n, c, h, w = input.shape
    b = blocksize
    x = input.reshape(n, c, h // b, b, w // b, b)
    x = x.permute(0, 3, 5, 1, 2, 4) if mode == "DCR" else x.permute(0, 1, 3, 5, 2, 4)
    return x.reshape(n, c * b * b, h // b, w // b)


# -- make -----------------------------------------------------------------------------------------


def constant_of_shape(input: Ints, *, value: float = 0.0, dtype: int = 1) -> Tensor:
    """ConstantOfShape, on the CPU: it may be a shape itself, and else is placed where it is used."""
    return torch.tensor(value, dtype=TORCH_DTYPE[ir.DataType(dtype)]).expand(ints(input))


def range_(start: Ints | Tensor, limit: Ints | Tensor, delta: Ints | Tensor) -> Tensor:
    """Range on the CPU, of the type of its inputs; of shape values, int64."""
    tensor = next((x for x in (start, limit, delta) if isinstance(x, Tensor)), None)
    dtype = torch.int64 if tensor is None else tensor.dtype
    first, end, step = number(start), number(limit), number(delta)
    if not dtype.is_floating_point:
        return torch.arange(first, end, step, dtype=dtype)
    # torch computes the count in the tensor's type, which may be one off for float16.
    count = max(math.ceil((end - first) / step), 0)
    values: Tensor = torch.arange(count, dtype=torch.float64) * step + first
    return values.to(dtype)


def eye_like(input: Tensor, *, dtype: int | None = None, k: int = 0) -> Tensor:
    """EyeLike: ones on the ``k``-th diagonal."""
    target = input.dtype if dtype is None else TORCH_DTYPE[ir.DataType(dtype)]
    rows, columns = input.shape
    i = torch.arange(rows, device=input.device).unsqueeze(1)
    j = torch.arange(columns, device=input.device)
    return (j - i == k).to(target)


def one_hot(indices: Tensor, depth: Ints, values: Tensor, *, axis: int = -1) -> Tensor:
    """OneHot: ``values`` = [off, on]; an index outside [-depth, depth) gives only off."""
    count = int(number(depth))
    at = indices.to(torch.int64) if not indices.is_floating_point() else indices
    at = torch.where(at < 0, at + count, at).unsqueeze(axis)
    positions = along(torch.arange(count, device=indices.device), axis, indices.dim() + 1)
    return torch.where(at == positions, values[1], values[0])


ROWS: dict[str, Row] = {
    "Shape": row(host.shape, on_host=host.shape),
    "Size": row(host.size, on_host=host.size),
    "Reshape": row(reshape, "shape", on_host=host.reshape),
    "Flatten": row(flatten),
    "Squeeze": row(squeeze, "axes", on_host=host.squeeze),
    "Unsqueeze": row(unsqueeze, "axes", on_host=host.unsqueeze),
    "Transpose": row(transpose),
    "Expand": row(expand, "shape"),
    "Tile": row(by_bits(tile), "repeats"),
    "Identity": row(identity, on_host=host.identity),
    "Slice": row(by_bits(slice_), "starts", "ends", "axes", "steps", on_host=host.slice_),
    "Split": row(split, "split", on_host=host.split, facts=("output_count",)),
    "Concat": row(by_bits(concat), on_host=host.concat),
    "Gather": row(by_bits(gather), on_host=host.gather),
    "GatherElements": row(by_bits(gather_elements)),
    "GatherND": row(by_bits(gather_nd)),
    "Compress": row(by_bits(compress)),
    "NonZero": row(non_zero),
    "Unique": row(unique),
    "TopK": row(top_k, "k"),
    "ReverseSequence": row(by_bits(reverse_sequence)),
    "Scatter": row(by_bits(scatter_elements)),
    "ScatterElements": row(by_bits(scatter_elements)),
    "ScatterND": row(by_bits(scatter_nd)),
    "TensorScatter": row(by_bits(tensor_scatter)),
    "Pad": row(by_bits(pad), "pads", "constant_value", "axes"),
    "CenterCropPad": row(by_bits(center_crop_pad), "shape"),
    "Trilu": row(by_bits(trilu), "k"),
    "DepthToSpace": row(depth_to_space),
    "SpaceToDepth": row(space_to_depth),
    "ConstantOfShape": row(constant_of_shape, "input"),
    "Range": row(range_, "start", "limit", "delta"),
    "EyeLike": row(eye_like),
    "OneHot": row(by_bits(one_hot), "depth"),
}
