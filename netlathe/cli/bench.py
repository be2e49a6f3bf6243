"""``netlathe bench``: latency of models, measured in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from netlathe.cli import options, render
from netlathe.cli.request import capture
from netlathe.diagnostics import Diagnostic, InputError

if TYPE_CHECKING:
    from netlathe.analysis.roofline import Ceilings, Work
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

    Of the roofline: the least time that the model's products, or reading its weights once, take at the
    rates that this machine reaches, as a share of the time taken. The rates are measured in the same turns.

    \b
    netlathe bench model.onnx out --dims batch=1,sequence=128 --threads 1
    netlathe bench out/onnx out/tvm --threads 2
    """
    from netlathe.execute import ceilings, ort
    from netlathe.execute.timing import in_turn

    threads = threads or ort.default_threads()
    names = _names(models)
    entrants = _entrants(models, names, threads, kv_cache=kv_cache, dims=dims)
    probes = ceilings.probes(threads)
    runs = {**{name: entrant.run for name, entrant in entrants.items()}, **probes}
    found = in_turn(runs, rounds=rounds, warmup=warmup, progress=render.Bars())
    first = found[names[0]]
    most = ceilings.ceilings(found)
    bounds = {
        name: _bound(entrant, most, found[name].median_ms) for name, entrant in entrants.items()
    }
    if as_json:
        render.print_json(
            {
                "threads": threads,
                "rounds": rounds,
                "warmup": warmup,
                "ceilings": vars(most),
                "models": [
                    {
                        "model": entrant.source,
                        "runtime": entrant.runtime,
                        "dims": entrant.dims,
                        **vars(found[name]),
                        "ratio": found[name].median_ms / first.median_ms,
                        "roofline": bounds[name],
                    }
                    for name, entrant in entrants.items()
                ],
            }
        )
        return
    render.table(
        "",
        ("model", "runs in", "#median", "#quartiles", "#ratio", "#of roofline", "bound by", "at"),
        (
            (
                name,
                entrant.runtime,
                f"{found[name].median_ms:.2f} ms",
                f"{found[name].low_ms:.2f} to {found[name].high_ms:.2f} ms",
                f"{found[name].median_ms / first.median_ms:.2f}",
                f"{bound['share']:.0%}" if (bound := bounds[name]) is not None else "-",
                bound["bound_by"] if bound is not None else "-",
                render.sizes(entrant.dims),
            )
            for name, entrant in entrants.items()
        ),
    )
    render.line(
        f"({rounds} rounds after {warmup} of warm-up, {threads} thread{'s' if threads > 1 else ''};"
        f" {most.float_ops / 1e9:.0f} GFLOP/s in float32, {most.byte_ops / 1e9:.0f} GOP/s of bytes,"
        f" {most.bytes / 1e9:.1f} GB/s)"
    )


@dataclass(frozen=True)
class _Entrant:
    """A model ready to be timed."""

    source: str
    runtime: str
    dims: Mapping[str, int]
    run: Callable[[], object]
    work: Work | None  # None where it is not known


def _bound(entrant: _Entrant, most: Ceilings, taken_ms: float) -> dict[str, Any] | None:
    """The least time of an entrant, what makes it, and its share of the time taken."""
    work = entrant.work.at(entrant.dims) if entrant.work is not None else None
    if work is None:
        return None
    least, by = work.least_ms(most)
    return {**vars(work), "least_ms": least, "bound_by": by, "share": least / taken_ms}


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
        name: _in_onnx_runtime(captured[name], threads)
        if name in captured
        else _in_tvm(path, judge, threads)
        for path, name in zip(models, names, strict=True)
    }


def _is_for_tvm(path: Path) -> bool:
    return all((path / name).is_file() for name in ("meta.json", "model.so"))


def _in_tvm(folder: Path, judge: Captured, threads: int) -> _Entrant:
    """The artifact, with the inputs of ``judge``."""
    from netlathe.analysis.roofline import Work
    from netlathe.backends.tvm import runtime
    from netlathe.execute.compare import inputs_of

    feeds = inputs_of(judge.model, judge.sample(judge.dynamic, 0))
    try:
        model = runtime.load(folder, threads=threads)
        model.run(feeds)
    except runtime.ArtifactError as error:
        raise InputError(Diagnostic("bench.artifact", str(error), at=str(folder))) from error
    # What is measured is this CPU: it bounds nothing that a GPU does.
    told = model.meta.get("work") if not model.meta.get("archs") else None
    work = None if told is None else Work.from_json(told)
    return _Entrant(str(folder), "TVM", judge.dynamic, lambda: model.run(feeds), work)


def _names(models: tuple[Path, ...]) -> list[str]:
    """The paths as they were given; a number behind one that comes again."""
    return [
        str(path) if path not in models[:at] else f"{path} ({at + 1})"
        for at, path in enumerate(models)
    ]


def _in_onnx_runtime(captured: Captured, threads: int) -> _Entrant:
    from netlathe.analysis.roofline import work

    run = _runner(captured, threads)
    known = work(captured.model)
    return _Entrant(captured.source, "ONNX Runtime", captured.dynamic, run, known)


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
