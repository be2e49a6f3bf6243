"""Axis analysis: which dims, attributes and literals must change together, and the edits that do it.

    axes = analyse(model)
    ffn = next(group for group in axes.groups if group.size == 160)
    delete(axes, {ffn: [3, 17]})

Read `algebra` for what an axis is, `pattern` and `signatures` for how operators relate them, `relate`
for how a graph is walked, `groups` for the result, and `edits` and `basis` for what changes a model.
"""

from netlathe.analysis.axes.basis import Stretch, rotate, scale, to_rotate, to_scale
from netlathe.analysis.axes.edits import delete, permute
from netlathe.analysis.axes.groups import Axes, Group, Member, analyse
from netlathe.analysis.axes.relate import Edit, Pin
from netlathe.analysis.axes.report import Row, report
from netlathe.analysis.axes.selection import Selection

__all__ = [
    "Axes",
    "Edit",
    "Group",
    "Member",
    "Pin",
    "Row",
    "Selection",
    "Stretch",
    "analyse",
    "delete",
    "permute",
    "report",
    "rotate",
    "scale",
    "to_rotate",
    "to_scale",
]
