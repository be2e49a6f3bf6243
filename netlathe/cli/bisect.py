"""``netlathe bisect``: which layers cause what a pass loses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from netlathe.cli import options, render
from netlathe.cli.request import Request, capture, open_cache
from netlathe.diagnostics import Diagnostic, GateError, InputError, OptionError, did_you_mean

if TYPE_CHECKING:  # a command's help must not wait for the imports
    import onnx_ir as ir

    from netlathe.pipeline.bisect import Found
    from netlathe.pipeline.interfaces import Captured
    from netlathe.pipeline.loss import Loss, Scale
    from netlathe.pipeline.pass_ import Feeds
    from netlathe.pipeline.step import Step

_PATH = click.Path(path_type=Path)
_SHOWN = 20  # candidates in the table; --verbose and --json tell of all


@click.command()
@options.model()
@click.option("--passes", metavar="TEXT", help="What is run, such as \"quantize(weights='int4')\".")
@click.option("--recipe", type=_PATH, metavar="FILE", help="The same as a YAML file.")
@click.option(
    "--of",
    type=_PATH,
    metavar="DIR",
    help="The same as in the manifest.json of a folder that `netlathe compile` wrote from MODEL.",
)
@click.option(
    "--calibration", type=_PATH, metavar="FILE", help="Data for passes that measure, .npz or .txt."
)
@click.option(
    "--data",
    type=_PATH,
    metavar="FILE",
    help="What losses are measured on.  [default: the calibration data, else synthetic inputs]",
)
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    metavar="N",
    help="How many feeds of it to look at, spread evenly.",
)
@click.option(
    "--step",
    metavar="PASS",
    help="The pass to look into, by name or number from 1.  [default: the one that loses most]",
)
@click.option(
    "--bound",
    type=click.FloatRange(min=0),
    metavar="LOSS",
    help="Find the few candidates without which the pass loses no more than this."
    "  [default: half of what it loses]",
)
@click.option(
    "--budget",
    type=click.IntRange(min=4),
    default=64,
    show_default=True,
    metavar="N",
    help="How many models to measure at most.",
)
@click.option(
    "--seed", type=click.IntRange(min=0), metavar="N", help="The one source of randomness."
)
@options.cache()
@options.sizes()
@options.work()
@options.as_json()
@click.option("-v", "--verbose", is_flag=True, help="Show every candidate.")
def bisect(
    model: Path,
    passes: str | None,
    recipe: Path | None,
    of: Path | None,
    calibration: Path | None,
    data: Path | None,
    samples: int,
    step: str | None,
    bound: float | None,
    budget: int,
    seed: int | None,
    kv_cache: bool,
    dims: options.Dims,
    cache: Path | None,
    no_cache: bool,
    as_json: bool,
    verbose: bool,
) -> int:
    """Find the layers that cause a quality drop.

    The passes are run over MODEL as `netlathe compile` runs them. Then one of them (the one that loses
    most) is run again with some of its candidates only: each alone, or where there are many in
    halves, the worst half first; and without the worst, as many as it takes to get below a bound.
    Losses are to the model before the pass: KL in nats a row for logits, else the share of the
    output's square that differs ("mse"). Nothing is written but finished work, into the cache.

    \b
    Which layers does 4 bits hurt most?
      netlathe bisect my-encoder/ --passes 'quantize(weights="int4")' --calibration sentences.txt
    A folder compiled before lost too much; what has to stay as it was for a KL of 0.02?
      netlathe bisect llm/ --of out --calibration texts.txt --data held-out.txt --bound 0.02

    "alone" is the loss with that candidate and no other, "without" that with all others, "layer" the
    share of the square of the layer's own output that is lost, as the ledger says, and "weight" that
    of its weight. The exit code is 1 if the bound cannot be met within the budget. Ctrl-C shows what
    was found so far.
    """
    from netlathe.pipeline import run
    from netlathe.pipeline.bisect import Trial
    from netlathe.pipeline.bisect import bisect as search

    text, given_seed = passes, seed
    if of is not None:
        if passes is not None or recipe is not None:
            raise OptionError(
                Diagnostic("cli.bisect", "--of says what is run, as do --passes and --recipe")
            )
        text, first = _written(of)
        given_seed = first if seed is None else seed
    request = Request.of(
        passes=text,
        recipe=recipe,
        calibration=calibration,
        seed=given_seed,
        strict=False,
        target=None,
        opset=None,
        settings={},
    )
    finished = open_cache(cache, none=no_cache)
    captured = capture(model, kv_cache=kv_cache, dims=dims, cache=finished)
    context = request.context(captured)
    bars = render.Bars()
    scale = _scale(captured, context.calibration, data, samples, bars)
    made = []
    for before, done, after, ctx in run.walk(captured, request.passes, context, cache=finished):
        made.append((before, done, ctx, _loss(scale, before, after) if done.changed else None))
    index = _chosen(step, [(done, lost) for _, done, _, lost in made])
    before, done, ctx, _ = made[index]
    found: Found | None = None
    trial = Trial(before, done, ctx, scale)
    try:
        work = search(trial, budget=budget, bound=bound)
        for so_far in bars.track(work, f"looking into {done.pass_.name}", budget):
            found = so_far
    except KeyboardInterrupt:
        if found is not None:
            _show([(d, lost) for _, d, _, lost in made], index, found, as_json, verbose)
        raise
    assert found is not None
    _show([(d, lost) for _, d, _, lost in made], index, found, as_json, verbose)
    return 0 if found.reverted is not None else GateError.exit_code


def _written(folder: Path) -> tuple[str, int]:
    """The passes and the seed that a folder was made with.

    Raises:
        InputError: it holds no manifest.
    """
    file = folder / "manifest.json"
    try:
        compilation = json.loads(file.read_text("utf-8"))["compilation"]
        return str(compilation["pipeline"]), int(compilation["seed"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = getattr(error, "strerror", None) or error
        message = f"no manifest that tells which passes were run: {why}"
        help_ = "give a folder that `netlathe compile` wrote, or --passes"
        raise InputError(
            Diagnostic("bisect.manifest", message, at=str(file), help=help_)
        ) from error


def _scale(
    captured: Captured,
    calibration: Sequence[Feeds],
    data: Path | None,
    samples: int,
    bars: render.Bars,
) -> Scale:
    """What losses are measured on."""
    from netlathe.pipeline import calibration_data
    from netlathe.pipeline.loss import Scale
    from netlathe.pipeline.verification import Bench

    feeds = list(calibration)
    if data is not None:
        calibration_data.check_file(data)
        feeds = list(calibration_data.load(data, captured))
    given = bool(feeds)
    if not given:
        feeds = [trial.feeds for trial in Bench(captured).trials]
    count = min(samples, len(feeds))
    spread = [feeds[at * len(feeds) // count] for at in range(count)]
    return Scale(spread, "calibration" if given else "samples", None, bars)


def _loss(scale: Scale, before: ir.Model, after: ir.Model) -> Loss | None:
    from netlathe.pipeline.loss import Subject

    return scale.loss(Subject(before), Subject(after))


def _damage(lost: Loss | None) -> float:
    if lost is None:
        return 0.0
    return lost.relative_rms**2 if lost.kl is None else lost.kl


def _chosen(step: str | None, made: list[tuple[Step, Loss | None]]) -> int:
    """Which pass to look into.

    Raises:
        OptionError: there is none like that, or none that loses anything.
    """
    from netlathe.pipeline.pass_ import Lossy

    if step is None:
        lossy = [at for at, (done, _) in enumerate(made) if isinstance(done.pass_.exactness, Lossy)]
        if not lossy:
            message = "none of the passes loses anything on purpose"
            raise OptionError(
                Diagnostic("cli.step", message, help="give --passes with one that does")
            )
        return max(lossy, key=lambda at: _damage(made[at][1]))
    names = [done.pass_.name for done, _ in made]
    if step.isdigit() and 1 <= int(step) <= len(made):
        return int(step) - 1
    if names.count(step) == 1:
        return names.index(step)
    message = f"--step {step}: {names.count(step) or 'none'} of the passes is called that"
    raise OptionError(
        Diagnostic("cli.step", message, help=did_you_mean(step, names) or f"1 to {len(made)}")
    )


def _show(
    made: list[tuple[Step, Loss | None]], index: int, found: Found, as_json: bool, verbose: bool
) -> None:
    done = made[index][0]
    if as_json:
        steps = [{"pass": str(d.pass_), "loss": _damage(lost)} for d, lost in made]
        render.print_json({"steps": steps, "pass": str(done.pass_), **found.to_json()})
        return
    rows = [(n + 1, str(d.pass_), render.loss(lost)) for n, (d, lost) in enumerate(made)]
    render.table("", ("#", "pass", "loss, to the model before"), rows)
    ranked = found.ranked
    shown = ranked if verbose else ranked[:_SHOWN]
    render.line()
    columns = ("candidate", "where", f"#{found.metric} alone", "#without", "#layer", "#weight")
    render.table(
        f"{done.pass_}: {found.metric} {_number(found.total)}",
        columns,
        (
            (
                c.entry.candidate,
                c.entry.where,
                _number(c.alone),
                _number(c.without),
                _number(c.entry.detail.get("error")),
                _number(c.weight),
            )
            for c in shown
        ),
    )
    if more := len(found.candidates) - len(shown):
        render.line(f"... and {more} more (-v shows those that were measured)")
    render.line(f"{found.measured} models measured{'' if found.complete else ', not finished'}")
    if found.reverted:
        names = ", ".join(repr(entry.candidate) for entry in found.reverted)
        many = len(found.reverted)
        render.line(
            f"without the worst {many} of {len(found.candidates)} it loses {_number(found.left)}"
            f" (bound {_number(found.bound)}); with ignore=({names}{',' if many == 1 else ''})"
        )
    elif found.reverted is not None:
        render.line(f"it loses no more than the bound of {_number(found.bound)}")
    elif found.complete:
        render.line(f"no few were found without which it loses at most {_number(found.bound)}")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
