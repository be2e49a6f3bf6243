"""Reads weights several at a time, in order: making their bytes takes longer than handing them on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import onnx_ir as ir

T = TypeVar("T")
# What is read and not yet taken has at most so many bytes, and is one tensor at least.
AHEAD_BYTES = 512 << 20
_MOST_THREADS = 8
_WORTH_BYTES = 4 << 20  # for less, threads cost more than they save


def ahead(
    tensors: Sequence[ir.TensorProtocol],
    function: Callable[[ir.TensorProtocol], T],
    most: int = AHEAD_BYTES,
) -> Iterator[T]:
    """``function`` of each tensor, in order; it reads up to ``most`` bytes of them at a time.

    It runs in other threads, of which there are no more than NETLATHE_THREADS: numpy and torch compute and
    copy without the interpreter's lock.
    """
    from netlathe.execute.ort import default_threads  # which reads by this module

    threads = 1
    if sum(tensor.nbytes for tensor in tensors) >= _WORTH_BYTES:
        threads = min(_MOST_THREADS, default_threads(), len(tensors))
    if threads == 1:
        for tensor in tensors:
            yield function(tensor)
        return
    waiting: deque[tuple[Future[T], int]] = deque()
    held, todo = 0, deque(tensors)
    with ThreadPoolExecutor(threads, "weights") as pool:
        try:
            while todo or waiting:
                while todo and (not waiting or held + todo[0].nbytes <= most):
                    tensor = todo.popleft()
                    waiting.append((pool.submit(function, tensor), tensor.nbytes))
                    held += tensor.nbytes
                future, size = waiting.popleft()
                made = future.result()
                del future
                held -= size
                yield made
                del made
        finally:
            pool.shutdown(cancel_futures=True)
