"""If, Loop and Scan. A body is a callable (an executor's program or an fx module) of its inputs,
followed by what it captures from the graphs around it; it returns a tuple."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .row import Row, number, row

Body = Callable[..., tuple[Tensor, ...]]


def if_(
    cond: Tensor, *captured: Tensor, then_branch: Body, else_branch: Body
) -> tuple[Tensor, ...]:
    """If: only the branch taken is run. Both are given the captures of both."""
    return (then_branch if bool(number(cond)) else else_branch)(*captured)


def loop(
    m: Tensor | None,
    cond: Tensor | None,
    *values: Tensor,
    body: Body,
    carried: int,
    scanned: int,
) -> tuple[Tensor, ...]:
    """Loop: ``carried`` values go round, ``scanned`` outputs of every iteration are stacked.

    The body takes (iteration, condition, carried ..., captured ...) and returns (condition,
    carried ..., scanned ...).
    """
    limit = sys.maxsize if m is None else int(number(m))
    running = True if cond is None else bool(number(cond))
    state, captured = values[:carried], values[carried:]
    device = next((v.device for v in values), torch.device("cpu"))
    stacks: list[list[Tensor]] = [[] for _ in range(scanned)]
    iteration = 0
    while running and iteration < limit:
        counter = torch.tensor(iteration, dtype=torch.int64, device=device)
        condition, *results = body(counter, torch.tensor(True, device=device), *state, *captured)
        state = tuple(results[:carried])
        for stack, value in zip(stacks, results[carried:], strict=True):
            stack.append(value)
        running = bool(number(condition))
        iteration += 1
    # Of no iterations nothing is known but the rank: one empty dim.
    return (*state, *(torch.stack(s) if s else torch.zeros(0, device=device) for s in stacks))


def scan(
    *values: Tensor | None,
    body: Body,
    num_scan_inputs: int,
    inputs: int,
    scan_input_axes: Sequence[int] | None = None,
    scan_input_directions: Sequence[int] | None = None,
    scan_output_axes: Sequence[int] | None = None,
    scan_output_directions: Sequence[int] | None = None,
    directions: Sequence[int] | None = None,
    opset: int = 9,
) -> tuple[Tensor, ...]:
    """Scan: over slices of the last ``num_scan_inputs`` of ``inputs`` values; captures follow.

    Opset 8 scans every batch entry on its own and has sequence lengths first.
    """
    given, captured = values[:inputs], values[inputs:]
    if opset < 9:
        return _scan_batches(given, captured, body, num_scan_inputs, directions)
    first = inputs - num_scan_inputs
    state = list(given[:first])
    axes = list(scan_input_axes or [0] * num_scan_inputs)
    backwards = list(scan_input_directions or [0] * num_scan_inputs)
    sequences = []
    for x, axis, reverse in zip(given[first:], axes, backwards, strict=True):
        assert x is not None
        slices = x.unbind(axis)
        sequences.append(slices[::-1] if reverse else slices)
    stacks: list[list[Tensor]] = []
    for step in zip(*sequences, strict=True):
        results = body(*state, *step, *captured)
        state = list(results[:first])
        stacks = stacks or [[] for _ in results[first:]]
        for stack, value in zip(stacks, results[first:], strict=True):
            stack.append(value)
    out_axes = list(scan_output_axes or [0] * len(stacks))
    out_backwards = list(scan_output_directions or [0] * len(stacks))
    scanned = [
        torch.stack(stack[::-1] if reverse else stack, axis)
        for stack, axis, reverse in zip(stacks, out_axes, out_backwards, strict=True)
    ]
    return (*(s for s in state if s is not None), *scanned)


def _scan_batches(
    given: Sequence[Tensor | None],
    captured: Sequence[Tensor | None],
    body: Body,
    num_scan_inputs: int,
    directions: Sequence[int] | None,
) -> tuple[Tensor, ...]:
    lengths, *batched = given
    results = []
    for b in range(next(x.shape[0] for x in batched if x is not None)):
        entry = [None if x is None else x[b] for x in batched]
        if lengths is not None:
            length = int(lengths[b])
            first = len(entry) - num_scan_inputs
            entry[first:] = [None if x is None else x[:length] for x in entry[first:]]
        results.append(
            scan(
                *entry,
                *captured,
                body=body,
                num_scan_inputs=num_scan_inputs,
                inputs=len(entry),
                scan_input_directions=directions,
            )
        )
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True))


ROWS: dict[str, Row] = {
    "If": row(if_, "cond"),
    "Loop": row(loop, "m", "cond"),
    "Scan": row(scan, facts=("opset",)),
}
