"""``netlathe verify``: whether a model is sound, and whether it is another one's function."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from netlathe.cli import options, render
from netlathe.cli.request import capture_all, onnx_of
from netlathe.diagnostics import Diagnostic, GateError, LowerError

if TYPE_CHECKING:
    from netlathe.pipeline.interfaces import Captured


@dataclass(frozen=True)
class Gate:
    """One check; ``passed`` is None where it could not be made, for the reason in ``detail``."""

    name: str
    passed: bool | None
    detail: str
    problems: tuple[Diagnostic, ...] = ()


@click.command()
@options.model()
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    metavar="OTHER",
    help="A model whose outputs MODEL must have.",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    metavar="SHARE",
    help="With --against: how far an output may be off at most, as a share of its RMS."
    "  [default: what rounding explains, 1e-05 in float32]",
)
@options.cache()
@options.sizes()
@options.as_json()
def verify(
    model: Path,
    against: Path | None,
    tolerance: float | None,
    kv_cache: bool,
    dims: options.Dims,
    as_json: bool,
) -> int:
    """Check that MODEL is sound.

    The exit code is 1 if a check fails. Its structure, types and shapes are checked by NetLathe's
    own rules, an ONNX file by the ONNX checker too, and it is run in ONNX Runtime with
    optimizations off and on. With --against its outputs must be those of OTHER, at two sizes of
    every dynamic dimension; where they are not, the first value that differs is named.

    \b
    netlathe verify model.onnx
    netlathe verify out --against model.onnx --tolerance 0.05
    """
    paths = [model] if against is None else [model, against]
    captured, *others = capture_all(paths, kv_cache=kv_cache, dims=dims)
    gates = [*_sound(captured), *_runs(captured)]
    gates += [_equal(captured, other, tolerance) for other in others]
    problems = [problem for gate in gates for problem in gate.problems]
    code = GateError.exit_code if any(gate.passed is False for gate in gates) else 0
    if as_json:
        render.print_json(
            {
                "model": captured.source,
                "checks": [
                    {"name": gate.name, "passed": gate.passed, "detail": gate.detail}
                    for gate in gates
                ],
                "errors": [vars(problem) for problem in problems],
                "exit_code": code,
            }
        )
    else:
        words = {True: "passed", False: "FAILED", None: "not run"}
        render.table("", ("check", "", ""), ((g.name, words[g.passed], g.detail) for g in gates))
    for problem in problems:
        render.err.print(str(problem), markup=False, soft_wrap=True)
    return code


def _sound(captured: Captured) -> Iterator[Gate]:
    """Structure and types; a capture that was not its original's function has raised already."""
    from netlathe.backends import onnx_file
    from netlathe.ir import verify as verifier

    entry = next(e for e in captured.entries if e.candidate == "capture")
    yield Gate("capture", True, entry.reason)
    problems = tuple(verifier.verify(captured.model))
    detail = f"{sum(1 for _ in captured.model.graph.all_nodes())} nodes"
    yield Gate("structure, types and shapes", not problems, detail, problems)
    file = onnx_of(captured)
    if file is not None:
        try:
            onnx_file.check_format(file)
        except LowerError as error:
            yield Gate("ONNX checker", False, error.diagnostics[0].message, error.diagnostics)
        else:
            yield Gate("ONNX checker", True, "with strict shape inference")


def _runs(captured: Captured) -> Iterator[Gate]:
    """What ONNX Runtime makes of the model as it lies on disk, against the IR."""
    from netlathe.backends import onnx_file
    from netlathe.execute import ort
    from netlathe.execute.compare import inputs_of

    file = onnx_of(captured)
    feeds = inputs_of(captured.model, captured.sample(captured.dynamic, 0))
    expected = ort.run(captured.model, feeds)
    for optimize in (False, True):
        name = f"ONNX Runtime, optimizations {'on' if optimize else 'off'}"
        try:
            if file is not None:
                actual = onnx_file.run_file(file, feeds, optimize=optimize)
            else:
                actual = ort.run(captured.model, feeds, optimize=optimize)
        except ort.RuntimeFailure as error:
            missing = onnx_file.lacks_kernel(error)
            problems = () if missing else error.diagnostics
            yield Gate(name, None if missing else False, error.diagnostics[0].message, problems)
            continue
        found = onnx_file.compare(captured.model, actual, expected, feeds, optimize=optimize)
        yield _compared(
            name, found.output, found.error, found.bound, render.sizes(captured.dynamic)
        )


def _equal(captured: Captured, other: Captured, tolerance: float | None) -> Gate:
    """The outputs of both models on the same inputs."""
    from netlathe.execute.compare import first_difference, inputs_of, relative_error
    from netlathe.ir.printing import show_node
    from netlathe.ir.provenance import location
    from netlathe.pipeline import verification
    from netlathe.pipeline.pass_ import Exact

    name = f"equal to {other.source}"
    names = [{str(v.name) for v in one.model.graph.outputs} for one in (captured, other)]
    if names[0] != names[1]:
        only = " and ".join(", ".join(sorted(part)) or "none" for part in names)
        problem = Diagnostic("verify.outputs", f"the outputs are not the same: {only}")
        return Gate(name, False, problem.message, (problem,))
    bound = tolerance
    if bound is None:
        bound = verification.tolerance(Exact(), captured.model, other.model)
    bench = verification.Bench(other)
    found = bench.run(captured.model)
    errors: dict[str, float] = {}
    for actual, expected in zip(found.outputs, bench.dense.outputs, strict=True):
        for output in expected:
            error = relative_error(actual[output], expected[output])
            errors[output] = max(errors.get(output, 0.0), error)
    worst = max(errors, key=lambda output: errors[output])
    gate = _compared(name, worst, errors[worst], bound, " and at ".join(bench.sizes))
    if gate.passed:
        return gate
    feeds = inputs_of(captured.model, bench.trials[0].feeds)
    first = first_difference(captured.model, other.model, feeds, tolerance=bound)
    if first is None:
        return gate
    node = first.value.producer()
    theirs = next(v for n in other.model.graph for v in n.outputs if v.name == first.other)
    by = f"by {first.error:.1e} of its RMS"
    if first.value.shape != theirs.shape:
        by = f"of shape {first.value.shape} for {theirs.shape}"
    problem = Diagnostic(
        "verify.first_difference",
        f"the first value of both that differs: {first.name!r}, {by}",
        at="" if node is None else show_node(node),
        where="" if node is None else location(node),
    )
    return Gate(gate.name, False, gate.detail, (*gate.problems, problem))


def _compared(name: str, output: str, error: float, bound: float, where: str) -> Gate:
    detail = f"off by {error:.1e} of the RMS of {output!r}, at most {bound:.1e}, at {where}"
    if error <= bound:
        return Gate(name, True, detail)
    return Gate(name, False, detail, (Diagnostic("verify.differs", f"{name}: {detail}"),))
