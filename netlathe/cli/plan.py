"""``netlathe plan``: what compile would do, touching nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from netlathe.cli import options, render
from netlathe.cli.request import Request, capture, open_cache


@click.command()
@options.model()
@options.pipeline()
@options.cache()
@options.sizes()
@options.work()
@options.as_json()
@click.option("-v", "--verbose", is_flag=True, help="Show every candidate, skipped ones too.")
def plan(
    model: Path,
    passes: str | None,
    recipe: Path | None,
    calibration: Path | None,
    seed: int | None,
    strict: bool,
    target: str | None,
    opset: int | None,
    settings: dict[str, Any],
    kv_cache: bool,
    dims: options.Dims,
    cache: Path | None,
    no_cache: bool,
    as_json: bool,
    verbose: bool,
) -> None:
    """Show what passes would do to MODEL.

    Every candidate is listed with what is decided about it and why, and what that would save;
    nothing is written, but for what compile would have to solve again: that goes into the cache.
    With --strict the exit code is 1 if a pass would skip a candidate.

    \b
    netlathe plan model.onnx --passes 'cleanup, quantize(weights="int8")' -v
    """
    from netlathe.analysis.cost import cost
    from netlathe.pipeline import run

    request = Request.of(
        passes=passes,
        recipe=recipe,
        calibration=calibration,
        seed=seed,
        strict=strict,
        target=target,
        opset=opset,
        settings=settings,
    )
    finished = open_cache(cache, none=no_cache)
    captured = capture(model, kv_cache=kv_cache, dims=dims, cache=finished)
    steps = run.plan(
        captured,
        request.passes,
        request.context(captured),
        strict=request.strict,
        cache=finished,
    )
    dense = cost(captured.model, captured.dynamic)
    if as_json:
        render.print_json(
            {
                "model": captured.source,
                "captured": _sizes(dense),
                "steps": [
                    {
                        "pass": str(step.pass_),
                        "changed": step.changed,
                        "ledger": [entry.to_json() for entry in step.entries],
                        "after": _sizes(step.cost_after),
                    }
                    for step in steps
                ],
            }
        )
        return
    for step in steps:
        render.ledger(step, every=verbose)
    render.line()
    render.steps(dense, steps, checked=False)
    render.line(f"(MACs at {render.sizes(captured.dynamic)})")


def _sizes(cost: object) -> dict[str, object]:
    return {name: getattr(cost, name) for name in ("params", "bytes", "macs")}
