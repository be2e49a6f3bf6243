"""Timing several functions against each other in one process, so that a drifting machine is fair.

Absolute times on a shared machine mean little; the ratio of medians taken in turn does.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from netlathe.pipeline.pass_ import Progress, SilentProgress

_REST_S = 0.005  # threads of ONNX Runtime have gone to sleep by then


@dataclass(frozen=True)
class Timing:
    """Times of one function in milliseconds: median, and the quartiles around it."""

    median_ms: float
    low_ms: float
    high_ms: float
    runs: int


def in_turn(
    functions: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 20,
    warmup: int = 2,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.perf_counter,
    rest_s: float = _REST_S,
) -> dict[str, Timing]:
    """Run every function once a round, A B C A B C ..., and return the median of each.

    Rounds are alternately forward and backward, so that no function always follows the same one. There is
    a rest of ``rest_s`` before each run: idle threads of the runtime before it spin for a while, on the same
    cores (those of TVM's pool for 0.1 s, though they yield to others).
    ``clock`` gives seconds: ``time.thread_time`` of what runs on one thread does not count other processes.

    Raises:
        ValueError: ``rounds`` is below 3: quartiles need that many.
    """
    if rounds < 3:
        raise ValueError(f"rounds must be at least 3, got {rounds}")
    for function in functions.values():
        for _ in range(warmup):
            function()
    taken: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for number in (progress or SilentProgress()).track(range(rounds), "measuring", rounds):
        for name in names if number % 2 == 0 else reversed(names):
            time.sleep(rest_s)
            start = clock()
            functions[name]()
            taken[name].append(1e3 * (clock() - start))
    timings = {}
    for name, times in taken.items():
        low, median, high = statistics.quantiles(times, n=4)
        timings[name] = Timing(median, low, high, rounds)
    return timings
