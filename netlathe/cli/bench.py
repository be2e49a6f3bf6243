"""``netlathe bench``: latency of models, measured in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from netlathe.cli import options, render
from netlathe.cli.request import capture_all, compiled_for, onnx_of
from netlathe.diagnostics import Diagnostic, InputError

if TYPE_CHECKING:
    from netlathe.analysis.roofline import Ceilings, Work
    from netlathe.execute.timing import Timing
    from netlathe.pipeline.interfaces import Captured
    from netlathe.pipeline.pass_ import Feeds


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
@click.option(
    "--inputs-of",
    metavar="MODEL",
    type=click.Path(path_type=Path),
    help="Take the inputs of this model, which is not timed.",
)
@options.cache()
@options.sizes()
@options.as_json()
def bench(
    models: tuple[Path, ...],
    rounds: int,
    warmup: int,
    threads: int | None,
    inputs_of: Path | None,
    kv_cache: bool,
    dims: options.Dims,
    as_json: bool,
) -> None:
    """Measure the latency of models in turn.

    A folder that was compiled for TVM runs in TVM's runtime, with the inputs of the first MODEL of
    another kind, or of --inputs-of; everything else runs in ONNX Runtime. Each is shown with its ratio to
    the first. What was compiled for a GPU is replayed as a CUDA graph, inputs and results in its memory.
    The models take turns (A B C, C B A, ...) in one process, so that a machine that slows down
    slows all of them; the ratio of the medians is what to trust. Optimizations are on, as in an
    application, and all use the same number of threads.

    Of the roofline: the least time that the model's products, or reading its weights once, take at the
    rates that this machine reaches, as a share of the time taken. The rates are measured in the same turns;
    that of a GPU's arithmetic is its peak. Of a language model, the tokens of its input are counted: many
    in a prefill, one in a step of decoding.

    \b
    netlathe bench model.onnx out --dims batch=1,sequence=128 --threads 1
    netlathe bench out/onnx out/tvm --threads 2
    netlathe bench gpu --inputs-of model.onnx --dims batch=1,sequence=1,past=512
    """
    from netlathe.execute import ort
    from netlathe.execute.timing import in_turn

    threads = threads or ort.default_threads()
    names = _names(models)
    entrants = _entrants(models, names, inputs_of, threads, kv_cache=kv_cache, dims=dims)
    probes = _probes(entrants, threads)
    runs = {**{name: entrant.run for name, entrant in entrants.items()}, **probes}
    found = in_turn(runs, rounds=rounds, warmup=warmup, progress=render.Bars())
    first = found[names[0]]
    most = _ceilings(entrants, found)
    bounds = {
        name: _bound(entrant, most[entrant.place], found[name].median_ms)
        for name, entrant in entrants.items()
    }
    rates = {name: entrant.rate(found[name].median_ms) for name, entrant in entrants.items()}
    if as_json:
        render.print_json(
            {
                "threads": threads,
                "rounds": rounds,
                "warmup": warmup,
                "ceilings": {place: vars(ceilings) for place, ceilings in most.items()},
                "models": [
                    {
                        "model": entrant.source,
                        "runtime": entrant.runtime,
                        "dims": entrant.dims,
                        **vars(found[name]),
                        "ratio": found[name].median_ms / first.median_ms,
                        "tokens_per_s": rates[name],
                        "roofline": bounds[name],
                    }
                    for name, entrant in entrants.items()
                ],
            }
        )
        return
    render.table(
        "",
        (
            "model",
            "runs in",
            "#median",
            "#quartiles",
            "#ratio",
            "#tokens/s",
            "#weights",
            "#of roofline",
            "bound by",
            "at",
        ),
        (
            (
                name,
                entrant.runtime,
                f"{found[name].median_ms:.2f} ms",
                f"{found[name].low_ms:.2f} to {found[name].high_ms:.2f} ms",
                f"{found[name].median_ms / first.median_ms:.2f}",
                "-" if (rate := rates[name]) is None else f"{rate:.4g}",
                f"{bound['bytes'] / 2**20:.1f} MiB" if (bound := bounds[name]) is not None else "-",
                f"{bound['share']:.0%}" if bound is not None else "-",
                bound["bound_by"] if bound is not None else "-",
                render.sizes(entrant.dims),
            )
            for name, entrant in entrants.items()
        ),
    )
    render.line(
        f"({rounds} rounds after {warmup} of warm-up, {threads} thread{'s' if threads > 1 else ''};"
        f" {'; '.join(_told(place, ceilings) for place, ceilings in most.items())})"
    )


def _told(place: str, most: Ceilings) -> str:
    floats = "float32" if place == _CPU else "halves at the peak"
    return (
        f"{place}: {most.float_ops / 1e9:.0f} GFLOP/s in {floats},"
        f" {most.byte_ops / 1e9:.0f} GOP/s of bytes, {most.bytes / 1e9:.1f} GB/s"
    )


_CPU, _GPU = "CPU", "GPU"


@dataclass(frozen=True)
class _Entrant:
    """A model ready to be timed."""

    source: str
    runtime: str
    dims: Mapping[str, int]
    run: Callable[[], object]
    work: Work | None  # None where it is not known
    tokens: int | None = None  # of its input, where it is a language model's
    place: str = _CPU

    def rate(self, taken_ms: float) -> float | None:
        """Tokens a second."""
        return None if self.tokens is None else 1e3 * self.tokens / taken_ms


def _probes(entrants: Mapping[str, _Entrant], threads: int) -> dict[str, Callable[[], object]]:
    """What the rates are measured by of every place that something runs in."""
    from netlathe.execute import ceilings, gpu

    places = {entrant.place for entrant in entrants.values()}
    on_gpu: dict[str, Callable[[], object]] = {gpu.COPY: gpu.copies()} if _GPU in places else {}
    return {**(ceilings.probes(threads) if _CPU in places else {}), **on_gpu}


def _ceilings(entrants: Mapping[str, _Entrant], found: Mapping[str, Timing]) -> dict[str, Ceilings]:
    """The rates of every place."""
    from netlathe.execute import ceilings, gpu

    measured = {_CPU: ceilings.ceilings, _GPU: gpu.ceilings}
    places = dict.fromkeys(entrant.place for entrant in entrants.values())
    return {place: measured[place](found) for place in places}


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
    inputs_of: Path | None,
    threads: int,
    *,
    kv_cache: bool,
    dims: options.Dims,
) -> dict[str, _Entrant]:
    """The models by name, in the order they were given."""
    for path in models:
        _check_runs(path)
    compiled = [path for path in models if _is_for_tvm(path)]
    here = {name: path for path, name in zip(models, names, strict=True) if path not in compiled}
    paths = [*here.values(), *([] if inputs_of is None else [inputs_of])]
    found = capture_all(paths, kv_cache=kv_cache, dims=dims)
    if not found:
        raise InputError(
            Diagnostic(
                "bench.inputs",
                "an artifact for TVM does not say which inputs make sense",
                at=str(models[0]),
                help="name the model it was made from too, or its ONNX artifact; --inputs-of: not timed",
            )
        )
    captured = dict(zip(here, found, strict=False))
    judge = found[0 if inputs_of is None else -1]
    return {
        name: _in_onnx_runtime(captured[name], threads)
        if name in captured
        else _in_tvm(path, judge, threads)
        for path, name in zip(models, names, strict=True)
    }


def _check_runs(path: Path) -> None:
    """Refuse an artifact of another kind than those for TVM and ONNX Runtime."""
    if _is_for_tvm(path) or not (path / "meta.json").is_file():
        return
    if (target := compiled_for(path)) is None:
        return
    on_core = (path / "core.v").is_file()
    advice = (
        f"meta.json has its cycles; {path / 'model.onnx'} is its graph, which ONNX Runtime can run"
        if on_core
        else "main.c is a program that runs it"
    )
    raise InputError(
        Diagnostic(
            "bench.artifact",
            f"what was compiled for {target} does not run here",
            at=str(path),
            help=advice,
        )
    )


def _is_for_tvm(path: Path) -> bool:
    return all((path / name).is_file() for name in ("meta.json", "model.so"))


def _in_tvm(folder: Path, judge: Captured, threads: int) -> _Entrant:
    """The artifact, with the inputs of ``judge``."""
    from netlathe.analysis.roofline import Work, tokens_of
    from netlathe.backends.tvm import runtime
    from netlathe.execute import compare, gpu

    feeds = compare.inputs_of(judge.model, judge.sample(judge.dynamic, 0))
    run: Callable[[], object]
    try:
        model = runtime.load(folder, threads=threads)
        model.run(feeds)
        on_gpu = bool(model.meta.get("archs"))
        run = gpu.replayed(model, feeds) if on_gpu else lambda: model.run(feeds)
    except runtime.ArtifactError as error:
        raise InputError(Diagnostic("bench.artifact", str(error), at=str(folder))) from error
    told = model.meta.get("work")
    work = None if told is None else Work.from_json(told)
    how, place = ("TVM, CUDA graph", _GPU) if on_gpu else ("TVM", _CPU)
    tokens = tokens_of(judge.model, feeds)
    return _Entrant(str(folder), how, judge.dynamic, run, work, tokens, place)


def _names(models: tuple[Path, ...]) -> list[str]:
    """The paths as they were given; a number behind one that comes again."""
    return [
        str(path) if path not in models[:at] else f"{path} ({at + 1})"
        for at, path in enumerate(models)
    ]


def _in_onnx_runtime(captured: Captured, threads: int) -> _Entrant:
    from netlathe.analysis.roofline import tokens_of, work
    from netlathe.execute import compare

    feeds = compare.inputs_of(captured.model, captured.sample(captured.dynamic, 0))
    run, known = _runner(captured, feeds, threads), work(captured.model)
    tokens = tokens_of(captured.model, feeds)
    return _Entrant(captured.source, "ONNX Runtime", captured.dynamic, run, known, tokens)


def _runner(captured: Captured, feeds: Feeds, threads: int) -> Callable[[], object]:
    """A function that runs the model once: an ONNX file as it lies on disk, anything else as captured."""
    from netlathe.backends import onnx_file
    from netlathe.execute import ort

    file = onnx_of(captured)
    if file is not None:
        session = onnx_file.open_file(file, optimize=True, exact=False, threads=threads)
        return lambda: session.run(None, feeds)
    whole = ort.Session(captured.model, optimize=True, threads=threads, max_bytes=1 << 62)
    return lambda: whole.run(feeds)
