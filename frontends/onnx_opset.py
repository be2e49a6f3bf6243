"""Raises a model's default-domain opset from 13 or later to 25, in place.

Between these versions few operators changed what an existing node means; the table below has them
all, and a test reads every schema of the `onnx` package to see that none is missing. Working in
place keeps names, metadata and functions, and never serialises weights, so size does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from netlathe.diagnostics import Diagnostic, InputError

OLDEST = 13
NEWEST = 25

Adapter = Callable[[ir.Node, "Scope"], None]


@dataclass
class Scope:
    """Where an adapted node lives: makes int64 constants beside it."""

    graph: ir.Graph | ir.Function

    def ints(self, before: ir.Node, values: list[int], stem: str) -> ir.Value:
        """An int64 [len(values)] constant, made by a Constant node in front of ``before``."""
        node = ir.node(
            "Constant",
            [],
            attributes={"value": ir.tensor(np.asarray(values, dtype=np.int64))},
        )
        node.outputs[0].name = f"{before.outputs[0].name}_{stem}"
        node.outputs[0].dtype = ir.DataType.INT64
        node.outputs[0].shape = ir.Shape([len(values)])
        self.graph.insert_before(before, node)
        return node.outputs[0]


def raise_opset(model: ir.Model) -> int:
    """Bring ``model`` to opset 25; returns the version it had.

    Raises:
        InputError: the version is outside 13..25, or a node has no equal form in 25.
    """
    version = model.opset_imports.get("")
    if version is None:
        version = model.opset_imports.get("ai.onnx")
    if version is None:
        raise InputError(
            Diagnostic("onnx.opset", "the model imports no version of the default ONNX domain")
        )
    if not OLDEST <= version <= NEWEST:
        older = version < OLDEST
        raise InputError(
            Diagnostic(
                "onnx.opset",
                f"the model is of opset {version}; {OLDEST} to {NEWEST} can be read",
                help="export it again at opset 17 or later"
                if older
                else "upgrade NetLathe, or export at an earlier opset",
            )
        )
    for function in model.functions.values():
        inner = function.opset_imports.get("", version)
        _raise(function, inner)
        function.opset_imports[""] = NEWEST
    _raise(model.graph, version)
    model.opset_imports[""] = NEWEST
    model.opset_imports.pop("ai.onnx", None)
    for function in model.functions.values():
        function.opset_imports.pop("ai.onnx", None)
    return version


def _raise(graph: ir.Graph | ir.Function, version: int) -> None:
    for node in list(ir.traversal.RecursiveGraphIterator(graph)):
        if node.domain not in ("", "ai.onnx"):
            continue
        node.version = None  # the model's import says it
        since_adapter = _ADAPTERS.get(node.op_type)
        if since_adapter is not None and version < since_adapter[0]:
            owner = node.graph
            assert owner is not None  # it came out of the graph's own traversal
            since_adapter[1](node, Scope(owner))


# -- the operators that changed -------------------------------------------------------------------


def _axes_become_input(node: ir.Node, scope: Scope) -> None:
    """Reduce* before 18: the `axes` attribute is the second input now."""
    axes = node.attributes.pop("axes", None)
    if axes is not None:
        node.resize_inputs(2)
        node.replace_input_with(1, scope.ints(node, list(axes.as_ints()), "axes"))


def _split_counts(node: ir.Node, scope: Scope) -> None:
    """Split before 18: an even split needs to say into how many."""
    if len(node.inputs) < 2 or node.inputs[1] is None:
        node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))


def _old_roi_align(node: ir.Node, scope: Scope) -> None:
    """RoiAlign before 16 did not shift by half a pixel; the new default does."""
    name = "coordinate_transformation_mode"
    node.attributes.setdefault(name, ir.AttrString(name, "output_half_pixel"))


def _grid_sample_modes(node: ir.Node, scope: Scope) -> None:
    """GridSample before 20 called its modes bilinear and bicubic."""
    mode = node.attributes.get("mode")
    renamed = {"bilinear": "linear", "bicubic": "cubic"}
    if mode is not None and mode.as_string() in renamed:
        node.attributes["mode"] = ir.AttrString("mode", renamed[mode.as_string()])


def _dft_axis(node: ir.Node, scope: Scope) -> None:
    """DFT before 20: the `axis` attribute (default 1) is the third input, a scalar, now."""
    attribute = node.attributes.pop("axis", None)
    axis = attribute.as_int() if attribute is not None else 1
    constant = ir.node("Constant", [], attributes={"value": ir.tensor(np.int64(axis))})
    constant.outputs[0].name = f"{node.outputs[0].name}_axis"
    scope.graph.insert_before(node, constant)
    node.resize_inputs(3)
    node.replace_input_with(2, constant.outputs[0])


def _group_norm_scales(node: ir.Node, scope: Scope) -> None:
    """GroupNormalization before 21 has one scale a group: repeat it for every channel."""
    data, groups = node.inputs[0], node.attributes["num_groups"].as_int()
    channels = data.shape[1] if data is not None and data.shape is not None else None
    if not isinstance(channels, int):
        raise InputError(
            Diagnostic(
                "onnx.opset",
                "GroupNormalization of an opset before 21 needs a known number of channels",
                at=str(node.name),
                help="export the model again at opset 21 or later",
            )
        )
    for i in (1, 2):
        value = node.inputs[i]
        steps = [("Unsqueeze", [1]), ("Expand", [groups, channels // groups]), ("Reshape", [-1])]
        for op, literal in steps:
            made = ir.node(op, [value, scope.ints(node, literal, f"{op.lower()}_{i}")])
            made.outputs[0].name = f"{node.outputs[0].name}_{op.lower()}ed_{i}"
            scope.graph.insert_before(node, made)
            value = made.outputs[0]
        node.replace_input_with(i, value)


def _inference_batch_norm(node: ir.Node, scope: Scope) -> None:
    """BatchNormalization before 14 trains where it has more than one output: refused."""
    if len([v for v in node.outputs if v.name]) > 1 and any(v.uses() for v in node.outputs[1:]):
        raise InputError(
            Diagnostic(
                "onnx.training",
                "BatchNormalization in training mode: the model was exported for training",
                at=str(node.name),
                help="export the model in eval mode",
            )
        )
    node.resize_outputs(1)


_REDUCTIONS = (
    *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax"),
    *("ReduceMean", "ReduceMin", "ReduceProd", "ReduceSumSquare"),
)
# operator -> (the opset that changed it, what makes an older node say the same in it)
_ADAPTERS: Mapping[str, tuple[int, Adapter]] = {
    **{name: (18, _axes_become_input) for name in _REDUCTIONS},
    "BatchNormalization": (14, _inference_batch_norm),
    "DFT": (20, _dft_axis),
    "GridSample": (20, _grid_sample_modes),
    "GroupNormalization": (21, _group_norm_scales),
    "RoiAlign": (16, _old_roi_align),
    "Split": (18, _split_counts),
}
