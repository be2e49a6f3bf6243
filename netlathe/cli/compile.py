"""``netlathe compile``: run passes over a model, check every one, write the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from netlathe.cli import depfile as depfiles
from netlathe.cli import options, render
from netlathe.cli.request import Request, capture, model_path, open_cache

if TYPE_CHECKING:
    from netlathe.pipeline.interfaces import Artifact
    from netlathe.pipeline.run import Compiled


@click.command("compile")
@options.model()
@options.pipeline()
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    required=True,
    help="The folder to write; it is there whole or not at all.",
)
@click.option("--overwrite", is_flag=True, help="Replace DIR, if NetLathe wrote it.")
@click.option(
    "--locked",
    is_flag=True,
    help="Differ in nothing from the manifest.json in DIR, or write nothing and explain.",
)
@options.cache()
@options.sizes()
@options.work()
@click.option(
    "--no-verify",
    is_flag=True,
    help="Do not compare outputs after every pass; structure and types are checked still.",
)
@click.option(
    "--depfile",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write what DIR was made from, for make and ninja.",
)
@options.as_json()
@click.option("-v", "--verbose", is_flag=True, help="Show every candidate, time and memory.")
def compile_(
    model: Path,
    passes: str | None,
    recipe: Path | None,
    calibration: Path | None,
    seed: int | None,
    strict: bool,
    target: str | None,
    opset: int | None,
    settings: dict[str, Any],
    output: Path,
    overwrite: bool,
    locked: bool,
    kv_cache: bool,
    dims: options.Dims,
    cache: Path | None,
    no_cache: bool,
    no_verify: bool,
    depfile: Path | None,
    as_json: bool,
    verbose: bool,
) -> None:
    """Run passes over MODEL and write the result.

    Every pass is checked: one that should change nothing must leave the outputs as they were, and
    one that loses accuracy on purpose must equal a reference that was made without its own code.
    What fails a check is not written, and the exit code is 1.

    \b
    Store the weights of an ONNX file in 8 bits, as opset 21:
      netlathe compile resnet.onnx --passes 'fold_batch_norm, quantize(weights="int8")' \\
          --opset 21 -o resnet-int8
    Drop the least important feed-forward branch of an encoder, judged on real sentences:
      netlathe compile my-encoder/ --passes 'drop(kind="ffn", count=1)' \\
          --calibration sentences.txt -o smaller
    Give what was given before, or fail and say what differs:
      netlathe compile resnet.onnx --recipe small.yaml -o out --locked
    From a build system:
      netlathe compile model.onnx --recipe small.yaml -o out --overwrite --depfile out.d

    Finished work is kept in a cache. A run that was killed goes on with the pass or layer it was in when
    the same command is given again.

    DIR holds the model, manifest.json (what was decided, checked and measured, and from what), and
    the tokenizer and generation files of a Hugging Face directory.
    """
    from netlathe.pipeline import lock, manifest, run
    from netlathe.pipeline import output as outputs

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
    read = [file for file in (model_path(model), recipe, request.calibration) if file is not None]
    finished = open_cache(cache, none=no_cache)
    if finished is not None:
        read.append(finished.folder)
    held = lock.load(output) if locked else None
    outputs.check_output(output, overwrite=overwrite or locked, sources=read)
    if depfile is not None:
        depfiles.check(depfile)
    captured = capture(model, kv_cache=kv_cache, dims=dims, cache=finished)
    context = request.context(captured)
    if held is not None:
        tools = request.backend.tools(request.build_for)
        made = manifest.inputs(captured, request.passes, context, request.build_for, tools)
        lock.check_inputs(held, made)
    compiled = run.run(
        captured,
        request.passes,
        context,
        strict=request.strict,
        verify=not no_verify,
        observer=render.Steps(verbose=verbose),
        cache=finished,
        backend=request.backend,
    )
    with render.working(f"building for {request.target} and writing {output}"):
        artifact = compiled.save(output, overwrite=overwrite, locked=locked)
    written = json.loads((output / outputs.MARKER).read_text("utf-8"))
    if depfile is not None:
        first = next(iter(written["artifact"]["files"]))
        read = [path for pass_ in request.passes for path in pass_.files()]
        sources = depfiles.sources(captured, recipe, request.calibration, *read)
        depfiles.write(depfile, output / first, sources)
    if as_json:
        render.print_json({"output": output, **written})
    else:
        _show(compiled, artifact, output, verified=not no_verify, verbose=verbose)


def _show(
    compiled: Compiled, artifact: Artifact, output: Path, *, verified: bool, verbose: bool
) -> None:
    from netlathe.analysis.cost import cost

    for step in compiled.steps:
        render.ledger(step, every=verbose)
    render.line()
    dense = cost(compiled.dense, compiled.captured.dynamic)
    render.steps(dense, compiled.steps, checked=verified)
    render.line(f"(MACs at {render.sizes(compiled.captured.dynamic)})")
    if verbose and compiled.steps:
        render.line()
        render.timings(compiled.steps)
    render.line()
    for file in sorted(path for path in output.rglob("*") if path.is_file()):
        render.line(f"{file}  {render.size(file.stat().st_size)}")
    for text in _judged(artifact):
        render.line(text)


def _judged(artifact: Artifact) -> list[str]:
    """What the runtime made of what was written."""
    report = artifact.report()
    lines = []
    for way in ("optimizations_off", "optimizations_on", "read_back"):
        if (error := report.get(f"error_{way}")) is not None:
            bound = report.get(f"bound_{way}")
            if bound is not None:
                limit = f"of at most {bound:.1e}"
            else:
                cosine, least = (report[f"{key}_{way}"] for key in ("cosine", "least_cosine"))
                limit = f"in integer kernels (cosine {cosine:.6f} of at least {least:.6f})"
            lines.append(f"run with {way.replace('_', ' ')}: {error:.1e} {limit}")
    dialect = report.get("dialect")
    if dialect is not None:
        counts = ", ".join(f"{n} {op}" for op, n in dialect["operators"].items()) or "none"
        lines.append(f"operators of ONNX Runtime's own: {counts}")
        lines += [f"{name} stays standard ONNX: {why}" for name, why in dialect["left"].items()]
    rounding = report.get("bound_optimizations_on", 0.0)  # what explains it without 8 bits
    if (error := report.get("error_default_settings", 0.0)) > rounding:
        hint = (
            "the target's setting accuracy_level=1 keeps"
            if dialect is not None
            else "the session option session.qdq_matmulnbits_accuracy_level=1 keeps"
        )
        lines.append(
            f"run with default settings: {error:.1e} (cosine {report['cosine_default_settings']:.5f}),"
            f" as ONNX Runtime then rounds activations to 8 bits too; {hint} them in float32"
        )
    if (error := report.get("error")) is not None:
        bound = report.get("bound")
        limit = "" if bound is None else f" of at most {bound:.1e}"
        lines.append(f"run beside ONNX Runtime: {error:.1e}{limit}")
    if "codes" in report:
        lines.append(f"codes: {report['codes']}, beside a tie the other one: {report['ties']}")
    if "cycles" in report:
        lines.append(
            f"on the core: {report['operators']:.1%} of operators, {report['macs']:.1%} of"
            f" multiplications; {report['cycles']} cycles, utilization {report['utilization']:.0%}"
        )
    for part, where in (("it", report), ("the host's code", report.get("host_parts", {}))):
        if reason := where.get("not_run"):
            lines.append(f"note: {part} was not run here: {reason}")
    return lines
