"""Rotates residual streams to axes of their own and deletes those that matter least (SliceGPT).

The parts: `segments` finds what turns by one matrix, `statistics` collects what bases are made of on
the sliced prefix, `bases` makes them, `narrow` edits the weights, `pass_` decides and accounts.
"""

from netlathe.passes.slice.bases import hadamard, loss_weighted, principal
from netlathe.passes.slice.pass_ import Slice
from netlathe.passes.slice.segments import Layout, Segment, lay_out

__all__ = ["Layout", "Segment", "Slice", "hadamard", "lay_out", "loss_weighted", "principal"]
