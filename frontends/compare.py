"""Runs the original and the captured graph side by side, and names the first node that differs.

The judge of the captured graph is ONNX Runtime with optimizations off; the original runs wherever
it came from. Equal means: max|difference| is at most 1e-5 of the output's RMS. Where that is
exceeded and the original's own result moves as far when its intermediate values are disturbed by
single rounding errors, the model is ill-conditioned and the capture is not at fault. Nor is it where an
output is a Sigmoid's, whose kernels have the last bit of 1, and what the Sigmoid reads is equal.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.diagnostics import CaptureError, Diagnostic
from netlathe.execute import ort
from netlathe.execute.compare import relative_error
from netlathe.ir.printing import show_node
from netlathe.ir.provenance import module_path
from netlathe.pipeline.ledger import Entry
from netlathe.pipeline.pass_ import Feeds
from netlathe.pipeline.verification import MOST_MOVED, NOT_TOLD, last_bits_of_sigmoids, last_sigmoid

TOLERANCE = 1e-5  # of the output's RMS, float32
_INNER = 10 * TOLERANCE  # inner values cancel more than outputs do
_DOUBLINGS = 10  # of 16: up to 16384
_LARGEST_INPUTS = 1 << 22  # elements of all inputs, beyond which sizes are not doubled again
ROUNDING_SLACK = 8.0  # a graph has several rounding errors where `moved` makes one

Arrays = dict[str, npt.NDArray[Any]]
Sample = Callable[[Mapping[str, int], int], Feeds]


@dataclass(frozen=True)
class Original:
    """The model that a capture must equal.

    ``run`` gives its outputs; ``moved`` says how far each moves, of its RMS, with rounding errors strewn
    in, where the source can do that (it compares the source with itself, so that nothing that a capture
    does counts); ``intermediates`` every value it can observe, by names shared with the captured graph.
    ``example`` are feeds the user gave. ``bounds`` limits dynamic dims: name -> (low, high).
    """

    run: Callable[[Feeds], Arrays]
    intermediates: Callable[[Feeds], Arrays]
    moved: Callable[[Feeds], Mapping[str, float]] | None = None
    example: Feeds | None = None
    bounds: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    sizes: Sequence[Mapping[str, int]] = ()  # sizes to compare at; empty: chosen from the defaults
    asked: frozenset[str] = frozenset()  # dims whose default sizes someone has asked for
    fixable: bool = False  # the frontend can make dims fixed


def check_same(
    model: ir.Model,
    original: Original,
    dynamic: Mapping[str, int],
    sample: Sample,
    *,
    what: str,
) -> tuple[Entry, dict[str, int]]:
    """Compare at two sizes or more, a batch above 1 among them; the entry tells the largest errors.

    Also returned are sizes of the dynamic dims at which the original runs: ``dynamic``, or larger ones.

    Raises:
        CaptureError: an output differs, or the original cannot be run at a second size.
    """
    worst: dict[str, float] = {}
    untold: dict[str, str] = {}
    trials = list(_trials(original, dynamic, sample, what))
    results = ort.run_each(model, [trial.feeds for trial in trials])
    for trial, actual in zip(trials, results, strict=True):
        feeds, expected, label = trial.feeds, trial.expected, trial.label
        errors = {name: relative_error(actual[name], expected[name]) for name in expected}
        worst[label] = max(errors.values(), default=0.0)
        wrong = {name: e for name, e in errors.items() if not e <= TOLERANCE}
        if wrong:
            bits = last_bits_of_sigmoids(model, expected)
            small = [name for name, error in wrong.items() if error <= bits.get(name, 0.0)]
            for name, error in _before_sigmoids(model, original, feeds, small).items():
                if error is None:
                    untold[name] = NOT_TOLD.format(name)
                if error is None or error <= _INNER:
                    del wrong[name]
        if wrong and original.moved is not None:
            moved = original.moved(feeds)
            wrong = {name: e for name, e in wrong.items() if not e <= _allowed(moved[name])}
        if wrong:
            raise CaptureError(_difference(model, original, feeds, wrong, what, label))
    entry = Entry(
        "capture",
        "applied",
        f"equal to the original at {len(worst)} size{'s' if len(worst) != 1 else ''} (largest difference"
        f" {max(worst.values()):.1e} of the output's RMS"
        f"{''.join(f'; {why}' for why in untold.values())})",
        detail={"relative_error": worst},
    )
    asked = original.example is None and not original.sizes
    return entry, {**dynamic, **(trials[0].sizes if asked else {})}


def _allowed(moved: float) -> float:
    """What an output may be off by that moves so far by rounding; nothing where there is no telling."""
    return min(ROUNDING_SLACK * moved, MOST_MOVED) if np.isfinite(moved) else 0.0


def _before_sigmoids(
    model: ir.Model, original: Original, feeds: Feeds, outputs: Sequence[str]
) -> dict[str, float | None]:
    """How far what the Sigmoid of each output reads is off; None where the original does not show it."""
    if not outputs:
        return {}
    shown = {**feeds, **original.intermediates(feeds)}
    found: dict[str, float | None] = {}
    for value in model.graph.outputs:
        node = last_sigmoid(value) if value.name in outputs else None
        read = node.inputs[0] if node is not None else None
        if read is None or not read.name:
            continue
        name, made = read.name, ort.run(model, feeds, [read.name])[read.name]
        same = name in shown and shown[name].shape == made.shape
        found[value.name or ""] = relative_error(made, shown[name]) if same else None
    return found


@dataclass(frozen=True)
class _Trial:
    feeds: Feeds
    expected: Arrays  # what the original makes of them
    sizes: Mapping[str, int]
    label: str  # what names the trial in messages


def _label(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in sizes.items()) or "fixed shapes"


def _trials(
    original: Original, dynamic: Mapping[str, int], sample: Sample, what: str
) -> Iterator[_Trial]:
    """What the model is compared at."""
    if original.example is not None:
        expected = original.run(original.example)
        yield _Trial(original.example, expected, {}, "the example inputs")
    choices = list(original.sizes)
    if choices or not dynamic:
        if original.example is None:
            choices = choices or [{}]
        for seed, sizes in enumerate(choices):
            yield _trial(original, sizes, dynamic, sample, seed, what)
        return
    first = dynamic
    if original.example is None:
        trial = _trial(original, dynamic, dynamic, sample, 0, what, held=original.asked)
        first = trial.sizes
        yield trial
    other = _other_sizes(first, original.bounds, lambda n: n + n // 2 + 1)
    seed = 0 if original.example is not None else 1
    fixed = other == dict(first)  # by bounds: other data of the same size, then
    yield _trial(original, other, first, sample, seed, what, but=None if fixed else first)


def _trial(
    original: Original,
    sizes: Mapping[str, int],
    base: Mapping[str, int],
    sample: Sample,
    seed: int,
    what: str,
    but: Mapping[str, int] | None = None,
    held: frozenset[str] = frozenset(),
) -> _Trial:
    """The original at ``sizes``, or where it does not run there, at 2, 4, 8, ... times ``base``.

    Sizes ``but``, which are known already, do not count, and dims that are ``held`` stay. A dim may have to
    stay even, be a multiple of a patch, or hold a window of an audio signal.
    """
    failed: list[tuple[str, Exception]] = []
    for tried in (sizes, *_doublings(base, original.bounds, held)):
        if tried == but:
            continue
        feeds = sample(tried, seed)
        try:
            return _Trial(feeds, original.run(feeds), dict(tried), _label(tried))
        except Exception as error:
            failed.append((_label(tried), error))
        if sum(array.size for array in feeds.values()) > _LARGEST_INPUTS:
            break
    label, reason = failed[0]  # `sizes` were tried
    message = f"{what} itself fails at {label}: {type(reason).__name__}: {reason}"
    if not base:
        raise CaptureError(Diagnostic("capture.sizes", message)) from reason
    larger = "; larger ones fail, too" if len(failed) > 1 else ""
    help_ = "declare only dims dynamic that the model accepts at other sizes"
    help_ = help_to_fix(original, base, sample) or help_
    raise CaptureError(
        Diagnostic(
            "capture.sizes",
            message,
            notes=(f"a capture is compared with the original at two sizes{larger}",),
            help=help_,
        )
    ) from reason


def help_to_fix(original: Original, base: Mapping[str, int], sample: Sample) -> str:
    """How to capture it with dims fixed that it takes one size of; empty where there are none, or no way."""
    baked = _baked(original, base, sample) if original.fixable else {}
    if not baked:
        return ""
    return (
        f"of the sizes tried, it runs at {_label(baked)} alone: --fix-dims"
        f" {_label(baked).replace(' ', '')} (from Python: fixed={baked}) makes that fixed"
    )


def _baked(original: Original, base: Mapping[str, int], sample: Sample) -> dict[str, int]:
    """Dims of which the original takes one size only, 1 or a doubled one; empty where that is not it.

    Dims of one size may have to be equal: such a one is tried at others together with its like, too.
    """

    def runs(sizes: Mapping[str, int]) -> bool:
        feeds = sample(sizes, 0)
        if sum(array.size for array in feeds.values()) > _LARGEST_INPUTS:
            return False
        try:
            original.run(feeds)
        except Exception:  # whatever a model does at sizes that are not for it
            return False
        return True

    def vary(sizes: Mapping[str, int], names: Sequence[str]) -> bool:
        """Whether it runs with ``names``, all of one size, at another one."""
        size = sizes[names[0]]
        others = {size + size // 2 + 1, 2 * size, max(1, size // 2)} - {size}
        return any(runs({**sizes, **dict.fromkeys(names, other)}) for other in sorted(others))

    for larger in (base, *_doublings(base, original.bounds)):
        for ones in ({}, *({name: 1} for name in base), dict.fromkeys(base, 1)):
            sizes = {**larger, **ones}
            if not runs(sizes):
                continue
            held = [name for name in sizes if not vary(sizes, [name])]
            free: set[str] = set()
            for size in {sizes[name] for name in held}:
                alike = [name for name in held if sizes[name] == size]
                for group in (alike, *itertools.combinations(alike, 2)):
                    if len(group) > 1 and vary(sizes, group):
                        free.update(group)
            return {name: sizes[name] for name in held if name not in free}
    return {}


def _doublings(
    base: Mapping[str, int],
    bounds: Mapping[str, tuple[int, int]],
    held: frozenset[str] = frozenset(),
) -> Iterator[dict[str, int]]:
    """``base`` doubled, then only what is no batch of it doubled on, as far as anything grows."""
    sizes = dict(base)
    for _ in range(_DOUBLINGS):
        grown = {
            name: size
            if name in held or (sizes != base and "batch" in name)
            else min(2 * size, bounds.get(name, (1, 1 << 31))[1])
            for name, size in sizes.items()
        }
        if grown == sizes:
            return
        yield grown
        sizes = grown


def _other_sizes(
    dynamic: Mapping[str, int],
    bounds: Mapping[str, tuple[int, int]],
    grow: Callable[[int], int],
) -> dict[str, int]:
    """Another size for every dim, within its bounds and above 1 where they let it."""
    sizes: dict[str, int] = {}
    for name, default in dynamic.items():
        low, high = bounds.get(name, (1, 1 << 31))
        sizes[name] = int(np.clip(grow(default), low, high))
        if sizes[name] == default and default - 1 >= max(low, 1):
            sizes[name] = default - 1
    return sizes


# -- the first difference -------------------------------------------------------------------------


def _difference(
    model: ir.Model,
    original: Original,
    feeds: Feeds,
    wrong: Mapping[str, float],
    what: str,
    label: str,
) -> Diagnostic:
    """The diagnostic of a difference, at the first node whose value differs."""
    output, error = max(wrong.items(), key=lambda item: item[1])
    message = (
        f"the captured graph of {what} differs from the original at {label}: output {output!r} is"
        f" off by {error:.1e} of its RMS (allowed {TOLERANCE:.0e})"
    )
    node, node_error = first_differing_node(model, original.intermediates(feeds), feeds)
    if node is None:
        return Diagnostic("capture.differs", message, notes=("no inner value is shared",))
    return Diagnostic(
        "capture.differs",
        message,
        at=show_node(node),
        where=module_path(node),
        notes=(f"the first value that differs: {node.outputs[0].name!r}, by {node_error:.1e}",),
        help="please report this node; excluding its module from the capture avoids it",
    )


def first_differing_node(
    model: ir.Model, expected: Mapping[str, npt.NDArray[Any]], feeds: Feeds
) -> tuple[ir.Node | None, float]:
    """The first node, in topological order, that makes a value other than ``expected`` says."""
    makers = {
        str(value.name): node
        for node in model.graph
        for value in node.outputs
        if value.name in expected
    }
    actual = ort.run(model, feeds, list(makers))
    for name, node in makers.items():
        if actual[name].shape != expected[name].shape:
            continue  # the same name for a reshaped value, such as a layout the raising changed
        error = relative_error(actual[name], expected[name])
        if not error <= _INNER:
            return node, error
    return None, 0.0
