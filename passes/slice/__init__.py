"""Rotates residual streams to axes of their own and deletes those that matter least (SliceGPT).

The parts: `segments` finds what turns by one matrix, `budget` and `widths` say how much of each is kept,
`statistics` collects what bases are made of on the sliced prefix, `bases` makes them, `refit` fits what reads
the stream, `narrow` edits the weights, `pass_` decides and accounts.

For a pass that only rotates: ``lay_out(model, cut=False)`` gives a copy of the model and its segments, each
with the stretch that turns with it; :func:`netlathe.analysis.axes.rotate` lets the weights of a stretch take
in a square basis such as ``hadamard(size, rng)``. Norms must be folded before, by ``fold_norms``.
"""

from netlathe.passes.slice.bases import hadamard, loss_weighted, principal
from netlathe.passes.slice.pass_ import Slice
from netlathe.passes.slice.segments import Layout, Segment, lay_out

__all__ = ["Layout", "Segment", "Slice", "hadamard", "lay_out", "loss_weighted", "principal"]
