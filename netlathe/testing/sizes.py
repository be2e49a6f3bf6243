"""The sizes at which models are compared: the defaults, larger ones, and one of everything."""

from __future__ import annotations

from collections.abc import Iterator

from netlathe.execute import ort
from netlathe.execute.compare import inputs_of
from netlathe.pipeline.interfaces import Captured
from netlathe.pipeline.pass_ import Feeds


def trials(captured: Captured) -> Iterator[tuple[str, Feeds]]:
    """A label and feeds for each choice of sizes that the model itself runs at."""
    dynamic = captured.dynamic
    choices = [dict(dynamic)]
    if dynamic:
        choices.append({name: size + size // 2 + 1 for name, size in dynamic.items()})
        choices.append(dict.fromkeys(dynamic, 1))
    for seed, sizes in enumerate(choices):
        feeds = inputs_of(captured.model, captured.sample(sizes, seed))
        label = ", ".join(f"{name}={size}" for name, size in sizes.items()) or "fixed shapes"
        if seed:  # the defaults must run
            try:
                ort.run(captured.model, feeds)
            except ort.RuntimeFailure:  # a table that is full, an even size, a multiple of a patch
                continue
        yield label, feeds
