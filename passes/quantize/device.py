"""The arithmetic of `scheme` and `rounding` in torch, where a weight lies: for solvers that need data.

A weight is a matrix [rows, columns] here, scales and zero points are [rows, groups] in float64. Of the same
numbers both give the same scales, up to the order in which errors are added up. Ranges of small floats and
with fractional zero points are left to `rounding`.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch

from netlathe.execute.torch_ops import storage
from netlathe.passes.quantize import rounding
from netlathe.passes.quantize.layout import Layout
from netlathe.passes.quantize.rounding import STEPS, TURNS, Clip, signed
from netlathe.passes.quantize.scheme import Scheme

Array = npt.NDArray[Any]
_AT_ONCE = {"cpu": 1 << 16, "cuda": 1 << 24}  # elements in float64


def to_matrix(weight: torch.Tensor, layout: Layout) -> torch.Tensor:
    """A weight of ``layout.dims`` with its groups at the end, those of an output following each other."""
    if layout.axis is None:
        return weight.reshape(1, -1)
    stored = weight.reshape(layout.stored)
    moved = stored.movedim(layout.axis, -1 if layout.block else 0)
    return moved.reshape(moved.shape[0] if not layout.block else -1, _columns(layout))


def from_matrix(matrix: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The reverse of :func:`to_matrix`, in ``layout.stored`` dims."""
    axis = layout.axis
    if axis is None:
        return matrix.reshape(layout.stored)
    dims = list(layout.stored)
    moved = [*dims[:axis], *dims[axis + 1 :]]
    moved = [*moved, dims[axis]] if layout.block else [dims[axis], *moved]
    return matrix.reshape(moved).movedim(-1 if layout.block else 0, axis).contiguous()


def _columns(layout: Layout) -> int:
    assert layout.axis is not None
    return layout.stored[layout.axis] if layout.block else layout.size


class Rounder:
    """Numbers in units of their scale that codes can stand for, and these codes.

    ``dtype`` is that of the arithmetic; numbers are what float32 holds. Scales, zero points and masks
    broadcast against what is rounded. Where a mask is False, zero is the only number.
    """

    def __init__(self, scheme: Scheme, dtype: torch.dtype, device: torch.device | str) -> None:
        self.scheme = scheme
        self.is_table = scheme.format.kind == "table"
        self.is_float = scheme.format.kind == "float"
        self._table = torch.tensor(scheme.table, dtype=dtype, device=device)
        wide = self._table.double()
        self._middles = ((wide[1:] + wide[:-1]) / 2).to(dtype)

    def units(
        self,
        w: torch.Tensor,
        s: torch.Tensor,
        z: torch.Tensor | None,
        kept: torch.Tensor | None = None,
        *,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The number nearest to w / s, in ``out``; ``z`` is None where all zero points are 0."""
        x = torch.div(w, s, out=out)
        if self.is_table:
            x.copy_(self._table[torch.bucketize(x.contiguous(), self._middles)])
        elif self.is_float:
            self._to_float(x)
        elif self.scheme.fractional:
            assert z is not None
            x.add_(z).round_().clamp_(0, self.scheme.highest).sub_(z)
            if x.dtype != torch.float32:
                x.copy_(x.float())
        elif z is None:
            x.round_().clamp_(self.scheme.lowest, self.scheme.highest)
        else:
            low, high = self.scheme.lowest - z, self.scheme.highest - z
            torch.clamp(x.round_(), low, high, out=x)
        return x if kept is None else x.mul_(kept)

    def _to_float(self, x: torch.Tensor) -> None:
        """The nearest number of the small float, halves to the even one, in place."""
        info = ml_dtypes.finfo(self.scheme.code_type)  # type: ignore[no-untyped-call]
        x.clamp_(float(info.min), float(info.max))
        _, exponent = torch.frexp(x)  # |x| < 2^exponent
        step = torch.exp2((exponent - 1).clamp(min=info.minexp).to(x.dtype) - info.nmant)
        x.div_(step).round_().mul_(step)

    def codes(self, units: torch.Tensor, z: torch.Tensor | None) -> torch.Tensor:
        """Codes as bytes, of what :meth:`units` gave."""
        if self.is_table:
            return torch.bucketize(units.contiguous(), self._middles).to(torch.uint8)
        if self.is_float:
            made = units.cpu().double().numpy().astype(self.scheme.code_type)
            return torch.from_numpy(made.view(np.uint8)).to(units.device)
        if self.scheme.fractional:
            assert z is not None
            return (units + z).round_().to(torch.uint8)
        kind = torch.int8 if self.scheme.lowest < 0 else torch.uint8
        return (units if z is None else units + z).to(kind)

    def of_codes(self, codes: torch.Tensor, z: torch.Tensor | None) -> torch.Tensor:
        """The numbers, in units of their scale, that codes stand for."""
        if self.is_table:
            return self._table[codes.long()]
        if self.is_float:
            held = codes.cpu().numpy().view(self.scheme.code_type).astype(np.float64)
            return torch.tensor(held, dtype=self._table.dtype, device=codes.device)
        wide = codes.to(self._table.dtype)
        units = wide if z is None else wide - z
        return units.float().to(wide.dtype) if self.scheme.fractional else units


def numbers(
    codes: Array, layout: Layout, scheme: Scheme, scale: Array, zero: Array, device: str
) -> torch.Tensor:
    """What codes in stored dims stand for, bit for bit as `rounding.numbers`: float32, in the weight's dims.

    It is on ``device``.
    """
    rounder = Rounder(scheme, torch.float64, device)
    held = to_matrix(storage.from_numpy(codes, device), layout)
    rows = len(held)
    made = torch.empty(held.shape, dtype=torch.float32, device=device)
    s, z = (torch.tensor(a, device=device).reshape(rows, -1) for a in (scale, zero))
    step = max(1, _at_once(held) // held.shape[1])
    for start in range(0, rows, step):
        part = slice(start, start + step)
        size = held.shape[1] // s.shape[1]
        groups = held[part].reshape(-1, s.shape[1], size)
        units = rounder.of_codes(groups, z[part, :, None])
        made[part] = (units * s[part, :, None]).to(torch.float32).reshape(-1, held.shape[1])
    return from_matrix(made, layout).reshape(layout.dims)


def nearest(
    matrix: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, scheme: Scheme
) -> torch.Tensor:
    """The nearest codes of a matrix, as bytes."""
    rounder = Rounder(scheme, torch.float64, matrix.device)
    rows, columns = matrix.shape
    made = torch.empty(
        matrix.shape,
        dtype=byte_type(scheme),
        device=matrix.device,
    )
    step = max(1, _at_once(matrix) // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        groups = matrix[part].double().reshape(-1, scale.shape[1], columns // scale.shape[1])
        s, z = scale[part, :, None], zero[part, :, None]
        codes = rounder.codes(rounder.units(groups, s, z), z)
        made[part] = codes.reshape(-1, columns)
    return made


def byte_type(scheme: Scheme) -> torch.dtype:
    """The type of codes: of small floats their bits."""
    signed_ = scheme.format.kind == "integer" and scheme.lowest < 0
    return torch.int8 if signed_ else torch.uint8


def _at_once(tensor: torch.Tensor) -> int:
    return _AT_ONCE["cpu" if tensor.device.type == "cpu" else "cuda"]


# -- ranges -----------------------------------------------------------------------------------------


def ranges(
    matrix: torch.Tensor,
    groups: int,
    scheme: Scheme,
    clip: Clip = "none",
    percentile: float = 99.9,
    importance: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of each of ``groups`` groups of every row; see `rounding.ranges`."""
    rows, columns = matrix.shape
    size = columns // groups
    if scheme.format.kind == "float" or scheme.fractional:
        own = Layout((rows, columns), 1, size)
        importance_ = None if importance is None else importance.double().cpu().numpy()
        array = matrix.float().cpu().numpy()
        held = rounding.ranges(array, own, scheme, clip, percentile, importance_)
        return tensors(held, (rows, groups), matrix.device)
    scale = torch.empty(rows, groups, dtype=torch.float64, device=matrix.device)
    zero = torch.empty_like(scale)
    weight = None if importance is None else importance.double().reshape(1, groups, size)
    step = max(1, _at_once(matrix) // columns)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        wide = matrix[part].reshape(-1, size).double()
        match clip:
            case "none" | "hqq":  # without fractional zero points
                found = scales_for(wide, scheme)
            case "percentile":
                ends = [(100 - percentile) / 100, percentile / 100]
                at = torch.tensor(ends, dtype=torch.float64, device=wide.device)
                low, high = torch.quantile(wide, at, dim=1).unsqueeze(-1)
                found = scales_for(wide.clamp(low, high), scheme)
            case "mse":
                each = None if weight is None else weight.expand(part.stop - start, -1, -1)
                each = None if each is None else each.reshape(-1, size)
                found = _least_error(wide, scheme, each)
        scale[part], zero[part] = (a.reshape(-1, groups) for a in found)
    return scale, zero


def tensors(
    arrays: tuple[Array, Array], shape: tuple[int, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points that numpy found."""
    first, second = (torch.tensor(array.reshape(shape), device=device) for array in arrays)
    return first, second


def scales_for(
    groups: torch.Tensor, scheme: Scheme, shrink: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `scheme.scales_for`: of integers and tables."""
    low, high = groups.amin(1), groups.amax(1)
    if scheme.asymmetric:
        low, high = low.clamp(max=0) * shrink, high.clamp(min=0) * shrink
        scale = round_scales((high - low) / scheme.highest, scheme)
        return scale, torch.round(-low / scale).clamp(0, scheme.highest)
    most = torch.maximum(high, -low) * shrink
    if scheme.operand:
        most = torch.maximum(high / scheme.highest, low / scheme.lowest) * shrink
    elif scheme.format.kind == "integer" and scheme.format.bits < 8:
        most = torch.where(high > -low, -most, most) / -scheme.lowest
    elif scheme.format.kind == "integer":
        most = most / scheme.highest
    return round_scales(most, scheme), torch.zeros_like(low)


def round_scales(scale: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """As `scheme.round_scales`."""
    dtype = storage.TORCH_DTYPE[scheme.scale_type]
    info = torch.finfo(dtype)
    least = 2.0**-24 if scheme.scales == "float16" else float(info.tiny)
    held = scale.to(dtype).double()
    small = torch.copysign(torch.full_like(scale, least), scale)
    held = torch.where(held.abs() < least, small, held)
    return torch.where(scale == 0, 1.0, held)


def _least_error(
    groups: torch.Tensor, scheme: Scheme, weight: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `rounding.least_error`."""
    rounder = Rounder(scheme, torch.float64, groups.device)
    best_scale, best_zero = scales_for(groups, scheme)

    def errors(scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        s = scale[:, None]
        rest = rounder.units(groups, s, zero[:, None]).mul_(s)
        if rounder.is_table:
            rest = rest.float().double()
        rest.sub_(groups).square_()
        return (rest if weight is None else rest.mul_(weight)).sum(1)

    best = errors(best_scale, best_zero)

    def keep(scale: torch.Tensor, zero: torch.Tensor) -> None:
        error = errors(scale, zero)
        better = error < best
        torch.where(better, error, best, out=best)
        torch.where(better, scale, best_scale, out=best_scale)
        torch.where(better, zero, best_zero, out=best_zero)

    for shrink in STEPS[1:]:
        scale, zero = scales_for(groups, scheme, shrink)
        keep(scale, zero)
        if signed(scheme):
            keep(-scale, zero)
    for _ in range(TURNS):
        units = rounder.units(groups, best_scale[:, None], best_zero[:, None])
        w = units if weight is None else units * weight
        norm = (w * units).sum(1)
        fitted = (w * groups).sum(1) / norm
        fitted = torch.where(norm > 0, fitted, best_scale)
        keep(round_scales(fitted, scheme), best_zero.clone())
    return best_scale, best_zero
