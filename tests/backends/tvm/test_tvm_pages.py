"""Weights are written so that Linux maps them by huge pages."""

from __future__ import annotations

import io

import numpy as np
import onnx_ir as ir
import pytest

from netlathe.backends.tvm import packing
from netlathe.backends.tvm.artifact import PAGE, write_constants
from netlathe.backends.tvm.packing import Parameter, Recipe


class Recorded(io.RawIOBase):
    """A file that keeps how it was written."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert whence == io.SEEK_SET and offset == self.tell()
        return offset

    def tell(self) -> int:
        return sum(map(len, self.pieces))

    def write(self, data: object) -> int:
        self.pieces.append(bytes(data))  # type: ignore[call-overload]
        return len(self.pieces[-1])


@pytest.mark.parametrize("sizes", [(3, 5 << 18, 7), (PAGE // 4, 1, 1), (3 << 18, 1 << 19, 11)])
def test_weights_are_written_in_whole_pages(sizes: tuple[int, ...]) -> None:
    arrays = {
        f"w{number}": np.random.default_rng(number).normal(size=size).astype(np.float32)
        for number, size in enumerate(sizes)
    }
    parameters = [
        Parameter(name, "float32", array.shape, Recipe(packing.as_it_is, (name,)))
        for name, array in arrays.items()
    ]
    raw = Recorded()
    with io.BufferedWriter(raw, PAGE) as file:
        offsets = write_constants(
            file, parameters, {name: ir.tensor(array) for name, array in arrays.items()}
        )
        file.flush()
        pieces = list(raw.pieces)
    assert {len(piece) for piece in pieces[:-1]} <= {PAGE} and len(pieces[-1]) <= PAGE
    written = b"".join(pieces)
    for array, offset in zip(arrays.values(), offsets, strict=True):
        assert offset % 64 == 0
        found = np.frombuffer(written, np.float32, array.size, offset)
        np.testing.assert_array_equal(found, array)
