"""``netlathe bench``: latency of models, measured in turn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from netlathe.cli import options, render
from netlathe.cli.request import capture

if TYPE_CHECKING:
    from netlathe.pipeline.interfaces import Captured


@click.command()
@click.argument(
    "models", metavar="MODEL [MODEL ...]", nargs=-1, required=True, type=click.Path(path_type=Path)
)
@click.option(
    "--rounds",
    type=click.IntRange(min=3),
    default=20,
    show_default=True,
    metavar="N",
    help="How often each model is timed.",
)
@click.option(
    "--warmup",
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
    metavar="N",
    help="Runs of each model before that.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    metavar="N",
    help="Threads to compute with.  [default: NETLATHE_THREADS, else every CPU this process has]",
)
@options.cache()
@options.sizes()
@options.as_json()
def bench(
    models: tuple[Path, ...],
    rounds: int,
    warmup: int,
    threads: int | None,
    kv_cache: bool,
    dims: dict[str, int],
    as_json: bool,
) -> None:
    """Measure the latency of models in turn.

    Every MODEL runs in ONNX Runtime, and is shown with its ratio to the first. The models take
    turns (A B C, C B A, ...) in one process, so that a machine that slows down slows all of them;
    the ratio of the medians is what to trust. Optimizations are on, as in an application.

    \b
    netlathe bench model.onnx out --dims batch=1,sequence=128 --threads 1
    """
    from netlathe.execute import ort
    from netlathe.execute.timing import in_turn

    threads = threads or ort.default_threads()
    captured = [capture(path, kv_cache=kv_cache, dims=dims) for path in models]
    names = _names(models)
    runs = {name: _runner(one, threads) for name, one in zip(names, captured, strict=True)}
    found = in_turn(runs, rounds=rounds, warmup=warmup, progress=render.Bars())
    first = found[names[0]]
    if as_json:
        render.print_json(
            {
                "threads": threads,
                "rounds": rounds,
                "models": [
                    {
                        "model": one.source,
                        "dims": one.dynamic,
                        **vars(found[name]),
                        "ratio": found[name].median_ms / first.median_ms,
                    }
                    for name, one in zip(names, captured, strict=True)
                ],
            }
        )
        return
    render.table(
        "",
        ("model", "#median", "#quartiles", "#ratio", "at"),
        (
            (
                name,
                f"{found[name].median_ms:.2f} ms",
                f"{found[name].low_ms:.2f} to {found[name].high_ms:.2f} ms",
                f"{found[name].median_ms / first.median_ms:.2f}",
                render.sizes(one.dynamic),
            )
            for name, one in zip(names, captured, strict=True)
        ),
    )
    render.line(f"({rounds} rounds, {threads} thread{'s' if threads > 1 else ''})")


def _names(models: tuple[Path, ...]) -> list[str]:
    """The paths as they were given; a number behind one that comes again."""
    return [
        str(path) if path not in models[:at] else f"{path} ({at + 1})"
        for at, path in enumerate(models)
    ]


def _runner(captured: Captured, threads: int) -> Callable[[], object]:
    """A function that runs the model once: a file as it lies on disk, anything else as captured."""
    from netlathe.backends import onnx_file
    from netlathe.execute import ort
    from netlathe.execute.compare import inputs_of

    feeds = inputs_of(captured.model, captured.sample(captured.dynamic, 0))
    file = Path(captured.source)
    if file.is_file():
        session = onnx_file.open_file(file, optimize=True, exact=False, threads=threads)
        return lambda: session.run(None, feeds)
    whole = ort.Session(captured.model, optimize=True, threads=threads, max_bytes=1 << 62)
    return lambda: whole.run(feeds)
