"""Refuses weights with NaN or infinity before any work is done with them, naming each tensor."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from netlathe.diagnostics import Diagnostic, InputError
from netlathe.execute.ort import default_threads

CHUNK = 1 << 22  # elements looked at together: bounds the check's memory to some 20 MB


def check_finite(
    weights: Iterable[tuple[str, npt.NDArray[Any]]],
    what: str,
    *,
    allow: frozenset[str] = frozenset(),
    bounds: frozenset[str] = frozenset(),
) -> None:
    """Look at every float weight once, a chunk at a time, in as many threads as may compute.

    ``allow`` names tensors that may hold -inf, as masks do, ``bounds`` those that may hold either infinity.

    Raises:
        InputError: with one diagnostic per tensor that holds NaN or infinity.
    """
    wrong = [
        Diagnostic(
            "weights.not_finite",
            f"weight {name!r} of {what} holds {problem}",
            help="the checkpoint is damaged or training diverged: use an earlier one",
        )
        for name, problem in _problems(weights, allow, bounds)
        if problem
    ]
    if wrong:
        raise InputError(wrong)


def _problems(
    weights: Iterable[tuple[str, npt.NDArray[Any]]], allow: frozenset[str], bounds: frozenset[str]
) -> Iterator[tuple[str, str]]:
    """What is wrong with each, in order; no more weights are held than threads."""
    threads = default_threads()
    waiting: deque[tuple[str, Future[str]]] = deque()
    with ThreadPoolExecutor(threads, "finite") as pool:
        for name, array in weights:
            infinite = (np.inf, -np.inf) if name in bounds else (-np.inf,) if name in allow else ()
            waiting.append((name, pool.submit(_problem, array, infinite)))
            del array  # a map of a file: it goes when it has been looked at
            if len(waiting) > threads:
                first, problem = waiting.popleft()
                yield first, problem.result()
        for name, problem in waiting:
            yield name, problem.result()


def _problem(array: npt.NDArray[Any], infinite: tuple[float, ...]) -> str:
    """What is wrong with the first offending element, or the empty string."""
    if not (np.issubdtype(array.dtype, np.floating) or array.dtype == ml_dtypes.bfloat16):
        return ""
    flat = array.reshape(-1)  # a view: weights are contiguous
    for start in range(0, flat.size, CHUNK):
        chunk = flat[start : start + CHUNK]
        finite = np.isfinite(chunk)
        for allowed in infinite:
            finite |= chunk == allowed
        if not finite.all():
            first = int(np.argmin(finite))
            index = tuple(int(i) for i in np.unravel_index(start + first, array.shape))
            count = int(np.count_nonzero(~finite))
            return (
                f"{chunk[first]} at {list(index)} ({count} such in its first {chunk.size} values)"
            )
    return ""
