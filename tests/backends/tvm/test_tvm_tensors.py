"""Tensors that a call is given as they lie in memory: which are refused before a kernel runs, and how."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("tvm", reason="the tvm extra is not installed")

import tvm_ffi

from netlathe.backends.tvm import runtime

INPUTS = [
    {"name": name, "dtype": stored, "stored": stored, "shape": ["n"]}
    for name, stored in (("cache", "float16"), ("x", "float16"), ("at", "int64"))
]
BYTES = np.zeros(4096, np.uint8)
BYTES = BYTES[-BYTES.ctypes.data % 256 :]  # begins at a multiple of 256


def lying(offset: int, stored: str, shape: tuple[int, ...]) -> Any:
    """An array that begins ``offset`` bytes behind a multiple of 256."""
    count = int(np.prod(shape)) * np.dtype(stored).itemsize
    return BYTES[offset : offset + count].view(stored).reshape(shape)


def check(cache: Any, x: Any, at: Any, vector: int = runtime.GPU_VECTOR) -> None:
    runtime.check_tensors(tvm_ffi, INPUTS, {"cache"}, [cache, x, at], vector)


def usual(**other: Any) -> dict[str, Any]:
    places = {
        "cache": (0, "float16", (4, 16)),
        "x": (512, "float16", (3, 8)),
        "at": (1024, "int64", (1,)),
    }
    return {**{name: lying(*place) for name, place in places.items()}, **other}


def test_tensors_apart_that_begin_at_multiples_of_16_are_taken() -> None:
    check(**usual())
    cache, x, at = (tvm_ffi.from_dlpack(array) for array in usual().values())
    check(cache, x, at)
    check(**usual(x=lying(128, "float16", (3, 8))))  # right behind the cache
    check(**usual(at=lying(512, "int64", (1,))))  # shares memory, and both are only read
    check(**usual(x=lying(64, "float16", (0, 8))))  # nothing, within the cache


@pytest.mark.parametrize("offset", [2, 4, 8, 30])
def test_a_view_at_an_odd_offset_is_refused_by_name(offset: int) -> None:
    x = lying(512 + offset, "float16", (3, 8))
    wanted = rf"input 'x' begins {offset % 16} bytes behind a multiple of 16, .*clone\(\)"
    with pytest.raises(runtime.ArtifactError, match=wanted):
        check(**usual(x=x))
    with pytest.raises(runtime.ArtifactError, match=wanted):
        check(**usual(x=tvm_ffi.from_dlpack(x)))
    check(**usual(x=x), vector=1)  # a CPU loads from anywhere


def test_a_tensor_smaller_than_a_vector_needs_no_more_than_its_own_size() -> None:
    """As one element of a vector of positions."""
    check(**usual(at=lying(1024 + 8, "int64", (1,))))
    with pytest.raises(runtime.ArtifactError, match=r"'at' begins 4 bytes behind a multiple of 8"):
        check(**usual(at=lying(1024 + 4, "int64", (1,))))
    with pytest.raises(runtime.ArtifactError, match=r"'at' begins 8 bytes behind a multiple of 16"):
        check(**usual(at=lying(1024 + 8, "int64", (2,))))


def test_gaps_are_refused_by_name() -> None:
    columns = lying(512, "float16", (4, 16))[:, :8]
    with pytest.raises(
        runtime.ArtifactError, match=r"'x' is not contiguous: its shape is \[4, 8\].*\[16, 1\]"
    ):
        check(**usual(x=columns))
    turned = lying(512, "float16", (4, 16)).T
    with pytest.raises(runtime.ArtifactError, match=r"'x' is not contiguous.*contiguous\(\)"):
        check(**usual(x=turned), vector=1)
    check(**usual(x=lying(512, "float16", (4, 16))[1:2]))  # strides of one element say nothing


@pytest.mark.parametrize("offset", [0, 32, 96])
def test_what_is_written_shares_memory_with_nothing(offset: int) -> None:
    with pytest.raises(
        runtime.ArtifactError, match="'cache' is written in place and shares memory with input 'x'"
    ):
        check(**usual(x=lying(offset, "float16", (2, 8))))
    with pytest.raises(runtime.ArtifactError, match=r"'cache' .* shares memory with input 'at'"):
        # A tensor that begins before both and ends between does not hide it.
        check(
            lying(256, "float16", (4, 16)), lying(0, "float16", (16, 8)), lying(320, "int64", (2,))
        )


def test_as_many_tensors_as_inputs() -> None:
    with pytest.raises(runtime.ArtifactError, match="2 tensors were given for 3 inputs: cache"):
        runtime.check_tensors(tvm_ffi, INPUTS, set(), list(usual().values())[:2], 1)
