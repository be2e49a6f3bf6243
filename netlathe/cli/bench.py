"""``netlathe bench``: latency of models, measured in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from netlathe.cli import options, render
from netlathe.cli.request import capture
from netlathe.diagnostics import Diagnostic, InputError

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

    A folder that was compiled for TVM runs in TVM's runtime, with the inputs of the first MODEL of
    another kind; everything else runs in ONNX Runtime. Each is shown with its ratio to the first.
    The models take turns (A B C, C B A, ...) in one process, so that a machine that slows down
    slows all of them; the ratio of the medians is what to trust. Optimizations are on, as in an
    application, and all use the same number of threads.

    \b
    netlathe bench model.onnx out --dims batch=1,sequence=128 --threads 1
    netlathe bench out/onnx out/tvm --threads 2
    """
    from netlathe.execute import ort
    from netlathe.execute.timing import in_turn

    threads = threads or ort.default_threads()
    names = _names(models)
    entrants = _entrants(models, names, threads, kv_cache=kv_cache, dims=dims)
    runs = {name: entrant.run for name, entrant in entrants.items()}
    found = in_turn(runs, rounds=rounds, warmup=warmup, progress=render.Bars())
    first = found[names[0]]
    if as_json:
        render.print_json(
            {
                "threads": threads,
                "rounds": rounds,
                "models": [
                    {
                        "model": entrant.source,
                        "runtime": entrant.runtime,
                        "dims": entrant.dims,
                        **vars(found[name]),
                        "ratio": found[name].median_ms / first.median_ms,
                    }
                    for name, entrant in entrants.items()
                ],
            }
        )
        return
    render.table(
        "",
        ("model", "runs in", "#median", "#quartiles", "#ratio", "at"),
        (
            (
                name,
                entrant.runtime,
                f"{found[name].median_ms:.2f} ms",
                f"{found[name].low_ms:.2f} to {found[name].high_ms:.2f} ms",
                f"{found[name].median_ms / first.median_ms:.2f}",
                render.sizes(entrant.dims),
            )
            for name, entrant in entrants.items()
        ),
    )
    render.line(f"({rounds} rounds, {threads} thread{'s' if threads > 1 else ''})")


@dataclass(frozen=True)
class _Entrant:
    """A model ready to be timed."""

    source: str
    runtime: str
    dims: Mapping[str, int]
    run: Callable[[], object]


def _entrants(
    models: tuple[Path, ...],
    names: list[str],
    threads: int,
    *,
    kv_cache: bool,
    dims: dict[str, int],
) -> dict[str, _Entrant]:
    """The models by name, in the order they were given."""
    compiled = [path for path in models if _is_for_tvm(path)]
    captured = {
        name: capture(path, kv_cache=kv_cache, dims=dims)
        for path, name in zip(models, names, strict=True)
        if path not in compiled
    }
    if not captured:
        raise InputError(
            Diagnostic(
                "bench.inputs",
                "an artifact for TVM does not say which inputs make sense",
                at=str(models[0]),
                help="name the model it was made from too, or its ONNX artifact",
            )
        )
    judge = next(iter(captured.values()))
    return {
        name: _Entrant(
            captured[name].source,
            "ONNX Runtime",
            captured[name].dynamic,
            _runner(captured[name], threads),
        )
        if name in captured
        else _Entrant(str(path), "TVM", judge.dynamic, _tvm_runner(path, judge, threads))
        for path, name in zip(models, names, strict=True)
    }


def _is_for_tvm(path: Path) -> bool:
    return all((path / name).is_file() for name in ("meta.json", "model.so"))


def _tvm_runner(folder: Path, judge: Captured, threads: int) -> Callable[[], object]:
    """A function that runs the artifact once, with the inputs of ``judge``."""
    from netlathe.backends.tvm import runtime
    from netlathe.execute.compare import inputs_of

    feeds = inputs_of(judge.model, judge.sample(judge.dynamic, 0))
    try:
        model = runtime.load(folder, threads=threads)
        model.run(feeds)
    except runtime.ArtifactError as error:
        raise InputError(Diagnostic("bench.artifact", str(error), at=str(folder))) from error
    return lambda: model.run(feeds)


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
