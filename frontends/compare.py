"""Runs the original and the captured graph side by side, and names the first node that differs.

The judge of the captured graph is ONNX Runtime with optimizations off; the original runs wherever
it came from. Equal means: max|difference| is at most 1e-5 of the output's RMS. Where that is
exceeded and the original's own result moves as far when its intermediate values are disturbed by
single rounding errors, the model is ill-conditioned and the capture is not at fault.
"""

from __future__ import annotations

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

TOLERANCE = 1e-5  # of the output's RMS, float32
ROUNDING_SLACK = 8.0  # a graph has several rounding errors where `disturbed` makes one

Arrays = dict[str, npt.NDArray[Any]]
Sample = Callable[[Mapping[str, int], int], Feeds]


@dataclass(frozen=True)
class Original:
    """The model that a capture must equal.

    ``run`` gives its outputs; ``disturbed`` the same with rounding errors strewn in, where the
    source can do that; ``intermediates`` every value it can observe, by names shared with the
    captured graph. ``example`` are feeds the user gave. ``bounds`` limits dynamic dims: name ->
    (low, high).
    """

    run: Callable[[Feeds], Arrays]
    intermediates: Callable[[Feeds], Arrays]
    disturbed: Callable[[Feeds], Arrays] | None = None
    example: Feeds | None = None
    bounds: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    sizes: Sequence[Mapping[str, int]] = ()  # sizes to compare at; empty: chosen from the defaults


def check_same(
    model: ir.Model,
    original: Original,
    dynamic: Mapping[str, int],
    sample: Sample,
    *,
    what: str,
) -> Entry:
    """Compare at two sizes or more, a batch above 1 among them; the entry tells the largest errors.

    Raises:
        CaptureError: an output differs, or the original cannot be run at a second size.
    """
    worst: dict[str, float] = {}
    trials = list(_trials(original, dynamic, sample, what))
    results = ort.run_each(model, [feeds for feeds, _, _ in trials])
    for (feeds, expected, label), actual in zip(trials, results, strict=True):
        errors = {name: relative_error(actual[name], expected[name]) for name in expected}
        worst[label] = max(errors.values(), default=0.0)
        wrong = {name: e for name, e in errors.items() if not e <= TOLERANCE}
        if wrong and original.disturbed is not None:
            noisy = original.disturbed(feeds)
            wrong = {
                name: e
                for name, e in wrong.items()
                if not e <= ROUNDING_SLACK * relative_error(noisy[name], expected[name])
            }
        if wrong:
            raise CaptureError(_difference(model, original, feeds, wrong, what, label))
    return Entry(
        "capture",
        "applied",
        f"equal to the original at {len(worst)} sizes (largest difference {max(worst.values()):.1e}"
        " of the output's RMS)",
        detail={"relative_error": worst},
    )


def _trials(
    original: Original, dynamic: Mapping[str, int], sample: Sample, what: str
) -> Iterator[tuple[Feeds, Arrays, str]]:
    """Feeds, what the original makes of them, and a label that names the sizes."""
    if original.example is not None:
        yield original.example, original.run(original.example), "the example inputs"
    choices = list(original.sizes)
    if not choices:
        first = {} if original.example is not None else dict(dynamic)
        choices = [c for c in (first,) if c]
        if dynamic:
            choices.append(_other_sizes(dynamic, original.bounds, lambda n: n + n // 2 + 1))
        elif original.example is None:
            choices = [{}]
    for seed, sizes in enumerate(choices):
        feeds = sample(sizes, seed)
        label = ", ".join(f"{k}={v}" for k, v in sizes.items()) or "fixed shapes"
        try:
            expected = original.run(feeds)
        except Exception as error:
            doubled = _other_sizes(dynamic, original.bounds, lambda n: 2 * n)
            if doubled == dict(sizes):
                raise _cannot_run(what, label, error) from error
            feeds = sample(doubled, seed)  # a dim may have to stay even, or a multiple of the patch
            label = ", ".join(f"{k}={v}" for k, v in doubled.items())
            try:
                expected = original.run(feeds)
            except Exception as second:
                raise _cannot_run(what, label, second) from second
        yield feeds, expected, label


def _cannot_run(what: str, label: str, error: Exception) -> CaptureError:
    return CaptureError(
        Diagnostic(
            "capture.sizes",
            f"{what} itself fails at {label}: {type(error).__name__}: {error}",
            notes=("a capture is compared with the original at a second size",),
            help="declare only dims dynamic that the model accepts at other sizes",
        )
    )


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
        if not error <= 10 * TOLERANCE:  # inner values cancel more than outputs do
            return node, error
    return None, 0.0
