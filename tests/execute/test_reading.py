"""Weights are read in order, several at a time, and no more of them than may be held."""

from __future__ import annotations

import threading
import time

import numpy as np
import onnx_ir as ir
import pytest

from netlathe.execute import reading
from netlathe.execute.ort import THREADS_VARIABLE

MIB = 1 << 20


def tensors(count: int, size: int = MIB) -> list[ir.TensorProtocol]:
    return [ir.tensor(np.full(size, at, np.uint8), name=f"w{at}") for at in range(count)]


@pytest.mark.parametrize("threads", ["1", "4"])
def test_in_order_whoever_is_first(monkeypatch: pytest.MonkeyPatch, threads: str) -> None:
    monkeypatch.setenv(THREADS_VARIABLE, threads)

    def read(tensor: ir.TensorProtocol) -> int:
        time.sleep(0.02 if tensor.name == "w0" else 0.0)
        return int(tensor.numpy()[0])

    assert list(reading.ahead(tensors(9), read)) == list(range(9))
    assert list(reading.ahead([], read)) == []


@pytest.mark.parametrize(("most", "at_once"), [(0, 1), (2 * MIB, 2), (64 * MIB, 4)])
def test_no_more_is_held_than_allowed(
    monkeypatch: pytest.MonkeyPatch, most: int, at_once: int
) -> None:
    monkeypatch.setenv(THREADS_VARIABLE, "4")
    lock, held, peak = threading.Lock(), 0, 0

    def read(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        nonlocal held, peak
        with lock:
            held += 1
            peak = max(peak, held)
        time.sleep(0.01)
        if most != 64 * MIB:  # read, and not yet taken
            return tensor
        with lock:
            held -= 1
        return tensor

    for _ in reading.ahead(tensors(8), read, most):
        if most != 64 * MIB:
            with lock:
                held -= 1
    assert 1 <= peak <= at_once


def test_what_cannot_be_read_is_raised_and_the_rest_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(THREADS_VARIABLE, "2")
    seen: list[str] = []

    def read(tensor: ir.TensorProtocol) -> str:
        seen.append(tensor.name or "")
        if tensor.name == "w1":
            raise OSError("gone")
        return tensor.name or ""

    found = reading.ahead(tensors(40), read, 2 * MIB)
    assert next(found) == "w0"
    with pytest.raises(OSError, match="gone"):
        next(found)
    assert len(seen) < 40
