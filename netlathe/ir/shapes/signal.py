"""Fourier transforms, the weights that go with them, and operators on text."""

from __future__ import annotations

import onnx_ir as ir

from netlathe.ir import dims
from netlathe.ir.dims import Dim
from netlathe.ir.shapes.elementwise import broadcast_shape
from netlathe.ir.types import Site, Type


def _scalar(s: Site, index: int) -> Dim:
    found = s.contents(index)
    return found[0] if found else None


def _dft(s: Site) -> list[Type]:
    """[..., n, ..., 1 or 2] -> [..., m, ..., 2]; the one-sided inverse is real, [..., m, ..., 1]."""
    shape = s.shape()
    if shape is None:
        return [Type(s.dtype(), None)]
    s.least_rank(0, 2)
    inverse, onesided = s.integer("inverse") == 1, s.integer("onesided") == 1
    wanted = (2,) if onesided and inverse else (1,) if onesided else (1, 2)
    if isinstance(shape[-1], int) and shape[-1] not in wanted:
        message = f"the last axis of {s.name(0)} has {shape[-1]} parts, not {' or '.join(map(str, wanted))}"
        s.fail("width", message, *s.show(0), help="1 is for real data, 2 for complex data")
    axis = _scalar(s, 2) if s.has(2) else -2
    if not isinstance(axis, int):
        return [Type(s.dtype(), (*(None,) * (len(shape) - 1), 1 if inverse and onesided else 2))]
    axis = s.checked_axis(axis, len(shape))
    if axis == len(shape) - 1:
        s.fail("axis", "the last axis holds real and imaginary parts")
    length: Dim = shape[axis]
    if s.has(1):
        length = _scalar(s, 1)
    elif inverse and onesided:
        length = dims.product((2, dims.subtract(length, 1)))
    if onesided and not inverse:
        length = dims.add(dims.divide(length, 2), 1)
    parts = 1 if inverse and onesided else 2
    size = s.fresh(axis) if length is None else length
    return [Type(s.dtype(), (*shape[:axis], size, *shape[axis + 1 : -1], parts))]


def _stft(s: Site) -> list[Type]:
    """[b, n, 1 or 2] -> [b, frames, bins, 2]"""
    signal, window = s.shape(), s.shape(2)
    s.rank(0, 3)
    s.rank(2, 1)
    step = _scalar(s, 1)
    if s.has(3):
        frame = _scalar(s, 3)
        if window is not None:
            what = "the window must be as long as a frame"
            frame = s.equal(frame, window[0], "width", what, *s.show(2))
    else:
        frame = window[0] if window is not None else (signal[1] if signal is not None else None)
    frames = None
    if signal is not None:
        room = dims.subtract(signal[1], frame)
        if isinstance(room, int) and room < 0:
            s.fail("window", f"a frame of {frame} is longer than the signal", *s.show(0, 2))
        frames = dims.add(dims.divide(room, step), 1)
    bins = dims.add(dims.divide(frame, 2), 1) if s.integer("onesided", 1) == 1 else frame
    batch = None if signal is None else signal[0]
    return [Type(s.dtype(), (batch, frames, bins, 2))]


def _mel(s: Site) -> list[Type]:
    bins = dims.add(dims.divide(_scalar(s, 1), 2), 1)
    return [Type(s.data_type("output_datatype") or ir.DataType.FLOAT, (bins, _scalar(s, 0)))]


def _tf_idf(s: Site) -> list[Type]:
    shape = s.shape()
    width = max(s.integers("ngram_indexes") or (-1,)) + 1
    if shape is None:
        return [Type(ir.DataType.FLOAT, None)]
    s.rank(0, 1, 2)
    return [Type(ir.DataType.FLOAT, (*shape[:-1], width))]


def _string_concat(s: Site) -> list[Type]:
    return [Type(ir.DataType.STRING, broadcast_shape(s, range(2)))]


def _string_normalizer(s: Site) -> list[Type]:
    shape = s.shape()
    s.rank(0, 1, 2)
    if shape is None:
        return [Type(ir.DataType.STRING, None)]
    words = shape[-1] if "stopwords" not in s.node.attributes else s.fresh(len(shape) - 1)
    return [Type(ir.DataType.STRING, (*shape[:-1], words))]


def _string_split(s: Site) -> list[Type]:
    shape = s.shape()
    parts = None if shape is None else (*shape, s.fresh(len(shape)))
    return [Type(ir.DataType.STRING, parts), Type(ir.DataType.INT64, shape)]


def _regex(s: Site) -> list[Type]:
    return [Type(ir.DataType.BOOL, s.shape())]


RULES = {
    "DFT": _dft,
    "MelWeightMatrix": _mel,
    "RegexFullMatch": _regex,
    "STFT": _stft,
    "StringConcat": _string_concat,
    "StringNormalizer": _string_normalizer,
    "StringSplit": _string_split,
    "TfIdfVectorizer": _tf_idf,
}
