"""Raises a model's default-domain opset from 7 or later to 25, in place.

Between these versions few operators changed what an existing node means; the table below has them
all, and a test reads every schema of the `onnx` package to see that none is missing. Working in
place keeps names, metadata and functions, and never serialises weights, so size does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.diagnostics import Diagnostic, InputError

OLDEST = 7
NEWEST = 25

Adapter = Callable[[ir.Node, "Scope"], None]


@dataclass
class Scope:
    """Where an adapted node lives: makes constants and other nodes in front of it."""

    graph: ir.Graph | ir.Function

    def ints(self, before: ir.Node, values: list[int], stem: str) -> ir.Value:
        """An int64 [len(values)] constant, made by a Constant node in front of ``before``."""
        return self.constant(before, np.asarray(values, dtype=np.int64), stem)

    def constant(self, before: ir.Node, array: npt.NDArray[Any], stem: str) -> ir.Value:
        """The array, made by a Constant node in front of ``before``."""
        made = self.op(before, "Constant", [], stem, value=ir.tensor(array))
        made.dtype, made.shape = ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape)
        return made

    def op(
        self, before: ir.Node, op: str, inputs: Sequence[ir.Value | None], stem: str, **attrs: Any
    ) -> ir.Value:
        """The output of a new node in front of ``before``."""
        node = ir.node(op, inputs, attributes=attrs)
        node.outputs[0].name = f"{before.outputs[0].name}_{stem}"
        self.graph.insert_before(before, node)
        return node.outputs[0]


def raise_opset(model: ir.Model) -> int:
    """Bring ``model`` to opset 25; returns the version it had.

    Raises:
        InputError: the version is outside 7..25, or a node has no equal form in 25.
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
                help="export it again, at opset 17 or later"
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
        owner = node.graph
        assert owner is not None  # it came out of the graph's own traversal
        for since, adapt in _ADAPTERS.get(node.op_type, ()):
            if version < since:
                _adapt(adapt, node, Scope(owner))


def _adapt(adapt: Adapter, node: ir.Node, scope: Scope) -> None:
    """Adapt ``node``, which may lack what its operator demands or have it of another type."""
    try:
        adapt(node, scope)
    except (IndexError, KeyError, TypeError) as error:
        raise InputError(
            Diagnostic(
                "onnx.malformed",
                f"{node.op_type} cannot be understood: {type(error).__name__}: {error}",
                at=_shown(node),
            )
        ) from error


def _shown(node: ir.Node) -> str:
    return str(node.name or next((v.name for v in node.outputs if v.name), node.op_type))


# -- the operators that changed -------------------------------------------------------------------


def _become_inputs(*names: str) -> Adapter:
    """The attributes ``names``, lists of integers or one, are the inputs behind the first now."""

    def adapt(node: ir.Node, scope: Scope) -> None:
        for position, name in enumerate(names, 1):
            attribute = node.attributes.pop(name, None)
            if attribute is not None:
                one = attribute.type == ir.AttributeType.INT
                values = [attribute.as_int()] if one else list(attribute.as_ints())
                _set_input(node, position, scope.ints(node, values, name))

    return adapt


def _set_input(node: ir.Node, position: int, value: ir.Value | None) -> None:
    if position >= len(node.inputs):
        node.resize_inputs(position + 1)
    node.replace_input_with(position, value)


def _float_inputs(**names: int) -> Adapter:
    """The attributes ``names``, one number each, are inputs now, at these positions.

    They are of the data's dtype, which files seldom tell of inner values: CastLike finds it.
    """

    def adapt(node: ir.Node, scope: Scope) -> None:
        data = node.inputs[0]
        for name, position in names.items():
            attribute = node.attributes.pop(name, None)
            if attribute is None:
                continue
            number = scope.constant(node, np.asarray(attribute.as_float(), np.float32), name)
            if data is not None and data.dtype != ir.DataType.FLOAT:
                number = scope.op(node, "CastLike", [number, data], f"{name}_like_data")
            _set_input(node, position, number)

    return adapt


def _forget(name: str, must_be: int | None = None) -> Adapter:
    """The attribute ``name`` went; where it is not ``must_be``, nothing in 25 is equal."""

    def adapt(node: ir.Node, scope: Scope) -> None:
        attribute = node.attributes.pop(name, None)
        if attribute is not None and must_be is not None and attribute.as_int() != must_be:
            raise _no_equal(node, f"{node.op_type} with {name}={attribute.as_int()}")

    return adapt


def _becomes(op_type: str) -> Adapter:
    """The operator has another name now."""

    def adapt(node: ir.Node, scope: Scope) -> None:
        node.op_type = op_type

    return adapt


def _no_equal(node: ir.Node, what: str) -> InputError:
    return InputError(
        Diagnostic(
            "onnx.opset",
            f"{what} has no equal in opset {NEWEST}",
            at=_shown(node),
            help="export the model again, at opset 17 or later",
        )
    )


def _batched_scan(node: ir.Node, scope: Scope) -> None:
    """Scan before 9 had a batch dim in all that it scans."""
    raise _no_equal(node, "Scan of opset 8")


def _softmax_of_rows(node: ir.Node, scope: Scope) -> None:
    """Softmax and the like before 13 take all dims from ``axis`` (default 1) on as one."""
    x = node.inputs[0]
    attribute = node.attributes.pop("axis", None)
    axis = attribute.as_int() if attribute is not None else 1
    if x is not None and x.shape is not None:
        axis += len(x.shape) if axis < 0 else 0
        if all(dim == 1 for dim in x.shape[axis + 1 :]):
            node.attributes["axis"] = ir.AttrInt64("axis", axis)
            return
    rows = scope.op(node, "Flatten", [x], "rows", axis=axis)
    result = scope.op(node, node.op_type, [rows], "of_rows", axis=-1)
    shape = scope.op(node, "Shape", [x], "shape")
    node.op_type = "Reshape"
    _set_input(node, 0, result)
    _set_input(node, 1, shape)


def _upsample_scales(node: ir.Node, scope: Scope) -> None:
    """Upsample before 9: the `scales` attribute is the second input now."""
    scales = np.asarray(node.attributes.pop("scales").as_floats(), np.float32)
    _set_input(node, 1, scope.constant(node, scales, "scales"))


def _resize_by_corner(node: ir.Node, scope: Scope) -> None:
    """Upsample, and Resize before 11, count from the corner; only their scales are given."""
    scales = node.inputs[1]
    _set_input(node, 2, scales)
    _set_input(node, 1, None)
    literal = None if scales is None else ir.convenience.get_const_tensor(scales)
    factors = np.ones(1) if literal is None else literal.numpy()
    attribute = node.attributes.get("mode")
    mode = attribute.as_string() if attribute is not None else "nearest"
    mode = "linear" if mode == "bilinear" else mode
    # ONNX Runtime rounds up along axes that it makes smaller; the standard does not say.
    smaller, larger = bool((factors < 1).any()), bool((factors > 1).any())
    by = "asymmetric"
    if mode == "nearest" and smaller and larger:
        shrink = scope.constant(node, np.minimum(factors, 1), "shrink")
        data = scope.op(
            node,
            "Resize",
            [node.inputs[0], None, shrink],
            "smaller",
            mode=mode,
            coordinate_transformation_mode=by,
            nearest_mode="ceil",
        )
        _set_input(node, 0, data)
        _set_input(node, 2, scope.constant(node, np.maximum(factors, 1), "grow"))
        smaller = False
    for name, value in (
        ("mode", mode),
        ("coordinate_transformation_mode", by),
        ("nearest_mode", "ceil" if smaller else "floor"),
    ):
        node.attributes[name] = ir.AttrString(name, value)


def _resize_without_empty(node: ir.Node, scope: Scope) -> None:
    """Resize before 13 had to be given a region and scales, empty where they do not count."""
    mode = node.attributes.get("coordinate_transformation_mode")
    text = mode.as_string() if mode is not None else ""
    if text == "tf_half_pixel_for_nn":
        raise _no_equal(node, f"Resize with coordinates by {text}")
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        node.replace_input_with(2, None)
    if text != "tf_crop_and_resize" and len(node.inputs) > 1:
        node.replace_input_with(1, None)


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
                at=_shown(node),
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
    """BatchNormalization before 14 trains where it has more than one output: refused.

    Whether anything reads the others does not matter: the first is normalized by the batch then.
    """
    if len([v for v in node.outputs if v.name]) > 1:
        raise InputError(
            Diagnostic(
                "onnx.training",
                "BatchNormalization in training mode: the model was exported for training",
                at=_shown(node),
                help="export the model in eval mode",
            )
        )
    node.resize_outputs(1)


def _inference_dropout(node: ir.Node, scope: Scope) -> None:
    """Dropout before 12 had a `ratio`, for training only, and no set mask where it drops nothing."""
    node.attributes.pop("ratio", None)
    if any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
        raise _no_equal(node, f"{node.op_type} whose mask is used")
    node.resize_outputs(1)


_REDUCTIONS = (
    *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax"),
    *("ReduceMean", "ReduceMin", "ReduceProd", "ReduceSumSquare"),
)
# operator -> by age: the opset that changed it, and what makes an older node say the same in it
_ADAPTERS: Mapping[str, tuple[tuple[int, Adapter], ...]] = {
    **{name: ((18, _become_inputs("axes")),) for name in _REDUCTIONS},
    **{name: ((13, _become_inputs("axes")),) for name in ("ReduceSum", "Squeeze", "Unsqueeze")},
    **{name: ((13, _softmax_of_rows),) for name in ("Hardmax", "LogSoftmax", "Softmax")},
    "BatchNormalization": ((9, _forget("spatial", 1)), (14, _inference_batch_norm)),
    "Clip": ((11, _float_inputs(min=1, max=2)),),
    "DFT": ((20, _dft_axis),),
    "Dropout": ((12, _inference_dropout),),
    "GridSample": ((20, _grid_sample_modes),),
    "GroupNormalization": ((21, _group_norm_scales),),
    "Pad": ((11, _become_inputs("pads")), (11, _float_inputs(value=2))),
    "Resize": ((11, _resize_by_corner), (13, _resize_without_empty)),
    "RoiAlign": ((16, _old_roi_align),),
    "Scan": ((9, _batched_scan),),
    "Scatter": ((11, _becomes("ScatterElements")),),
    "Slice": ((10, _become_inputs("starts", "ends", "axes")),),
    "Split": ((13, _become_inputs("split")), (18, _split_counts)),
    "TopK": ((10, _become_inputs("k")),),
    "Upsample": ((9, _upsample_scales), (10, _resize_by_corner), (10, _becomes("Resize"))),
}
