"""How quantized weights stand in a graph, as standard ONNX: codes, scales, and what reads them.

    integers, float8    DequantizeLinear(codes, scales[, zero points])
    nf4, codebooks      Gather(table, Cast(DequantizeLinear(codes))) * scales, by blocks
    zeros="float"       (DequantizeLinear(codes) - zero points) * scales, by blocks
    float16, bfloat16   Cast(codes)
    mxfp4               DequantizeLinear(codes, scales in float8e8m0, output_dtype=FLOAT)
    nvfp4               DequantizeLinear(codes, DequantizeLinear(scales in float8e4m3fn, tensor scale))
    bit planes          codes that ONNX has no type for: bit i of 8 codes in a row is one byte of plane i

        p: u8[3,m,1] -> BitShift right by 0..7, BitwiseAnd 1 -> u8[3,m,8] -> BitShift left by 0, 1, 2
                     -> BitwiseOr of the planes -> u8[m,8] -> Reshape: u8[k,n]

Every reader gets floats right before the first of them runs; a lookup takes rows of codes and
dequantizes only these, where ONNX can express it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.analysis.products import is_lookup, num_index_axes
from netlathe.ir import edit, provenance, weights
from netlathe.passes.quantize.layout import Layout
from netlathe.passes.quantize.scheme import Scheme

Array = npt.NDArray[Any]
CREATED_BY = "quantize"


_LOOKED_UP = frozenset(
    {ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
)


class Editor:
    """Replaces weights one by one; ``renamed`` says which are gone."""

    def __init__(self, model: ir.Model) -> None:
        self._graph = model.graph
        self.taken = edit.names_in(model.graph)
        self._places: dict[ir.Graph, dict[ir.Node, tuple[int, ir.Node]]] = {}
        self.renamed: dict[str, str | None] = {}

    def replace(
        self,
        weight: ir.Value,
        codes: ir.TensorProtocol,
        scales: Array,
        zeros: Array,
        layout: Layout,
        scheme: Scheme,
    ) -> None:
        """Let all readers of ``weight`` read ``codes`` (in stored dims) as numbers again.

        ``scales`` and ``zeros`` have the shape that DequantizeLinear wants; where the scheme has no zero
        points these are not looked at.
        """
        home, name = weight.graph, weight.name
        assert isinstance(home, ir.Graph) and name is not None
        made = _Numbers(self, home, weight, codes, scales, zeros, layout, scheme)
        places = self._places_in(home)
        for node, position in list(weight.uses()):
            if is_lookup(node, position):
                made.look_up(node)
        readers = list(weight.uses())
        if not readers:
            edit.drop_if_unread(weight)
            self.renamed[name] = None
            return
        nodes = made.whole()
        for node in nodes:
            provenance.mark(node, created_by=CREATED_BY, like=readers[0][0])
        # Right before the first reader: a float copy lives no longer than it must.
        first = min((places[node] for node, _ in readers), key=lambda place: place[0])
        home.insert_before(first[1], nodes)
        result = nodes[-1].outputs[0]
        for node, position in readers:
            node.replace_input_with(position, result)
        edit.drop_if_unread(weight)
        result.name = name  # the same values, up to rounding

    def constant(self, home: ir.Graph, array: Array | ir.TensorProtocol, name: str) -> ir.Value:
        """A new initializer."""
        return edit.constant(home, array, name, self.taken)

    def node(
        self, op_type: str, inputs: Sequence[ir.Value | None], name: str, **attributes: Any
    ) -> ir.Node:
        """A new node whose output gets a free name."""
        free = edit.unique_name(self._graph, name, self.taken)
        return edit.node(op_type, inputs, attributes, name=free)

    def _places_in(self, home: ir.Graph) -> dict[ir.Node, tuple[int, ir.Node]]:
        """For every node, those in subgraphs too, which node of ``home`` it is in and where that is."""
        if home not in self._places:
            self._places[home] = {
                inner: (at, node)
                for at, node in enumerate(home)
                for inner in (node, *_inside(node))
            }
        return self._places[home]


class _Numbers:
    """One quantized weight; its constants are made when the first reader needs them."""

    def __init__(
        self,
        editor: Editor,
        home: ir.Graph,
        weight: ir.Value,
        codes: ir.TensorProtocol,
        scales: Array,
        zeros: Array,
        layout: Layout,
        scheme: Scheme,
    ) -> None:
        self.editor, self.home, self.layout, self.scheme = editor, home, layout, scheme
        assert weight.name is not None and weight.dtype is not None
        self.name, self.dtype = weight.name, weight.dtype
        self.codes = editor.constant(home, codes, f"{self.name}_{scheme.weights}")
        self.scale: ir.Value | None = None
        self.zero: ir.Value | None = None
        kind = scheme.format.kind
        if kind != "cast":
            units = scales / scheme.tensor_scale if scheme.tensor_scale else scales
            held = units.astype(scheme.scale_type.numpy())
            self.scale = editor.constant(home, held, f"{self.name}_scale")
        if scheme.asymmetric:
            held = zeros.astype(scheme.zero_type.numpy())
            self.zero = editor.constant(home, held, f"{self.name}_zero_point")

    # -- all of it ----------------------------------------------------------------------------------

    def whole(self) -> list[ir.Node]:
        """The nodes that make the weight, the last one its value."""
        nodes: list[ir.Node] = []
        match self.scheme.format.kind:
            case "cast":
                return [self._widened(self.codes, self.dtype)]
            case "table":
                nodes = self._by_hand()
            case "integer" if self.scheme.fractional:
                nodes = self._by_hand()
            case "integer" | "float":
                codes, zero = self.codes, self.zero
                if self.scheme.format.dtype is None:
                    nodes = self._unpacked()
                    codes = nodes[-1].outputs[0]
                    if zero is not None and zero.dtype != ir.DataType.UINT8:
                        nodes.append(self._widened(zero, ir.DataType.UINT8))
                        zero = nodes[-1].outputs[0]
                assert self.scale is not None
                nodes += self._dequantized(
                    codes, self.scale, zero, self.layout.axis, self.layout.block
                )
        if self.layout.flat:
            nodes.append(self._reshape(nodes[-1].outputs[0], self.layout.dims))
        if self.dtype != ir.DataType.FLOAT:
            nodes.append(self._cast(nodes[-1].outputs[0], self.dtype))
        return nodes

    def _by_hand(self) -> list[ir.Node]:
        """T[c] s, or (c - z) s; codes are widened by a DequantizeLinear, which nothing folds away."""
        editor, name, layout = self.editor, self.name, self.layout
        if self.scheme.format.dtype is None:
            made = self._unpacked()
            made.append(self._cast(made[-1].outputs[0], ir.DataType.FLOAT))
        else:
            one = editor.constant(self.home, np.array(1, np.float32), f"{name}_one")
            made = self._dequantized(self.codes, one, None, None, 0, "index")
        if self.scheme.format.kind == "table":
            table = editor.constant(self.home, self.scheme.table, f"{name}_table")
            made.append(self._cast(made[-1].outputs[0], ir.DataType.INT32))
            of_table = [table, made[-1].outputs[0]]
            made.append(editor.node("Gather", of_table, f"{name}_units", axis=0))
        # Scales meet what they are for by broadcasting: blocks get an axis of their own.
        dims = list(layout.stored)
        if layout.axis is not None and layout.block:
            at = layout.axis
            dims[at : at + 1] = [dims[at] // layout.block, layout.block]
        if dims != list(layout.stored):
            made.append(self._reshape(made[-1].outputs[0], dims))
        if self.zero is not None:
            made += self._with_groups("Sub", made[-1].outputs[0], self.zero, "zero_points")
        assert self.scale is not None
        made += self._with_groups("Mul", made[-1].outputs[0], self.scale, "scales")
        if dims != list(layout.stored):
            made.append(self._reshape(made[-1].outputs[0], layout.stored))
        return made

    def _with_groups(
        self, op_type: str, units: ir.Value, of_groups: ir.Value, what: str
    ) -> list[ir.Node]:
        """A node with what every group has one of, widened to float32."""
        layout, shape = self.layout, list(self.layout.scale_dims)
        if layout.axis is not None and layout.block:
            shape.insert(layout.axis + 1, 1)
        elif layout.axis is not None:
            shape += [1] * (len(layout.stored) - layout.axis - 1)
        assert of_groups.const_value is not None
        held = of_groups.const_value.numpy().reshape(shape)
        edit.drop_if_unread(of_groups)
        value, nodes = self.editor.constant(self.home, held, f"{self.name}_{what}"), []
        if value.dtype != ir.DataType.FLOAT:
            nodes.append(self._widened(value, ir.DataType.FLOAT))
            value = nodes[-1].outputs[0]
        nodes.append(self.editor.node(op_type, [units, value], f"{self.name}_less_{what}"))
        return nodes

    def _unpacked(self) -> list[ir.Node]:
        """Codes from their bit planes: uint8, or int8 where they are signed."""
        editor, name, bits = self.editor, self.name, self.scheme.format.bits

        def made(
            op_type: str, inputs: Sequence[ir.Value], what: str, **attributes: Any
        ) -> ir.Value:
            nodes.append(editor.node(op_type, inputs, f"{name}_{what}", **attributes))
            return nodes[-1].outputs[0]

        def constant(array: Any, what: str, dtype: Any = np.uint8) -> ir.Value:
            return editor.constant(self.home, np.asarray(array, dtype), f"{name}_{what}")

        nodes: list[ir.Node] = []
        right = constant(np.arange(8), "positions")
        left = constant(np.arange(bits).reshape(-1, 1, 1), "planes")
        shifted = made("BitShift", [self.codes, right], "shifted", direction="RIGHT")
        bit = made("BitwiseAnd", [shifted, constant(1, "bit")], "bits")
        placed = made("BitShift", [bit, left], "placed", direction="LEFT")
        nodes.append(ir.node("Split", [placed], {"axis": 0, "num_outputs": bits}, num_outputs=bits))
        planes = list(nodes[-1].outputs)
        for plane in planes:
            plane.name = edit.unique_name(self.home, f"{name}_plane", editor.taken)
        whole = planes[0]
        for plane in planes[1:]:
            whole = made("BitwiseOr", [whole, plane], "code")
        dims = self.layout.stored
        if (size := math.prod(dims)) % 8:
            flat = made("Reshape", [whole, constant([-1], "flat", np.int64)], "padded", allowzero=0)
            ends = [constant([n], w, np.int64) for n, w in ((0, "start"), (size, "end"))]
            axes = [constant([n], w, np.int64) for n, w in ((0, "axis"), (1, "step"))]
            whole = made("Slice", [flat, *ends, *axes], "unpadded")
        shape = constant(dims, "stored", np.int64)
        whole = made("Reshape", [whole, shape], "codes", allowzero=0)
        if self.scheme.lowest < 0:
            wide = made("Cast", [whole], "wide", to=ir.DataType.INT32.value)
            lowest = constant(self.scheme.lowest, "lowest", np.int32)
            signed = made("Add", [wide, lowest], "signed")
            made("Cast", [signed], "signed_codes", to=ir.DataType.INT8.value)
        for node in nodes:
            if node.op_type == "Cast":
                node.attributes["saturate"] = ir.AttrInt64("saturate", 1)
                node.attributes["round_mode"] = ir.AttrString("round_mode", "up")
        return nodes

    # -- some rows of it ----------------------------------------------------------------------------

    def look_up(self, lookup: ir.Node) -> None:
        """Let a lookup take rows of codes and dequantize only these, if ONNX can express it."""
        indices, made = lookup.inputs[1], lookup.outputs[0]
        layout, scheme = self.layout, self.scheme
        own, block, width = layout.axis, layout.block, layout.dims[-1]
        new = num_index_axes(lookup)
        assert indices is not None
        if new is None or layout.flat or scheme.format.dtype is None:
            return
        if (
            self.codes.dtype not in _LOOKED_UP
        ):  # ONNX has no lookup in tables of 4 bits, nor of float8
            return
        if scheme.format.kind == "cast":
            rows = self._taken_rows(lookup, self.codes, "rows")
            nodes = [rows, self._cast(rows.outputs[0], self.dtype)]
            edit.replace(lookup, nodes, {made: nodes[-1].outputs[0]}, CREATED_BY)
            return
        by_hand = scheme.format.kind == "table" or scheme.fractional
        if by_hand or (own == 0 and (block or len(layout.dims) > 2)):
            return
        by_row = own == 0
        nodes = [self._taken_rows(lookup, self.codes, scheme.weights)]
        rows_of = nodes[0].outputs[0]
        parameters: list[ir.Value | None] = []
        for held, what in ((self.scale, "scale"), (self.zero, "zero_point")):
            if held is None or own is None or not (by_row or block):
                parameters.append(held)
                continue
            nodes.append(self._taken_rows(lookup, held, what))
            taken = nodes[-1].outputs[0]
            if by_row and new:  # one block per row: [..., d] with scales [..., 1]
                last = self.editor.constant(self.home, np.array([new]), f"{made.name}_axes")
                nodes.append(self.editor.node("Unsqueeze", [taken, last], f"{made.name}_{what}s"))
                taken = nodes[-1].outputs[0]
            parameters.append(taken)
        axis: int | None
        if own is None:
            axis, block = None, 0
        elif by_row:
            axis, block = (new, width) if new else (0, 0)
        else:
            axis = own - 1 + new
        scale, zero = parameters
        assert scale is not None
        nodes += self._dequantized(rows_of, scale, zero, axis, block)
        if self.dtype != ir.DataType.FLOAT:
            nodes.append(self._cast(nodes[-1].outputs[0], self.dtype))
        edit.replace(lookup, nodes, {made: nodes[-1].outputs[0]}, CREATED_BY)

    def _taken_rows(self, lookup: ir.Node, table: ir.Value, what: str) -> ir.Node:
        attributes = {name: a.value for name, a in lookup.attributes.items()}
        name = f"{lookup.outputs[0].name}_{what}"
        return self.editor.node(lookup.op_type, [table, lookup.inputs[1]], name, **attributes)

    # -- single nodes -------------------------------------------------------------------------------

    def _dequantized(
        self,
        codes: ir.Value,
        scale: ir.Value,
        zero: ir.Value | None,
        axis: int | None,
        block: int,
        what: str = "dequantized",
    ) -> list[ir.Node]:
        """DequantizeLinear to float32, whatever the type of the scales; the last node is the result."""
        nodes: list[ir.Node] = []
        to = 0
        if self.scheme.weights == "mxfp4":  # a scale without a mantissa is no type for a result
            to = ir.DataType.FLOAT.value
        elif self.scheme.tensor_scale:
            whole = np.array(self.scheme.tensor_scale, np.float32)
            of_all = self.editor.constant(self.home, whole, f"{self.name}_tensor_scale")
            name = f"{self.name}_scales"
            nodes.append(self._scaled(scale, of_all, name=name, axis=None, block=0))
            nodes[0].metadata_props[provenance.STORED] = self.scheme.weights
            scale = nodes[0].outputs[0]
        elif self.scheme.scales != "float32":
            # Not output_dtype: ONNX Runtime's fusion into MatMulNBits does not look at it.
            make = self._widened if weights.is_weight(scale) else self._cast
            nodes.append(make(scale, ir.DataType.FLOAT))
            scale = nodes[0].outputs[0]
        inputs = [codes, scale] if zero is None else [codes, scale, zero]
        nodes.append(
            self._scaled(*inputs, name=f"{codes.name}_{what}", axis=axis, block=block, to=to)
        )
        return nodes

    def _scaled(
        self, *inputs: ir.Value, name: str, axis: int | None, block: int, to: int = 0
    ) -> ir.Node:
        attributes = {"axis": 1 if axis is None else axis, "block_size": block, "output_dtype": to}
        return self.editor.node("DequantizeLinear", inputs, name, **attributes)

    def _widened(self, constant: ir.Value, to: ir.DataType) -> ir.Node:
        """A Cast of a constant, which stays as narrow as it is."""
        node = self._cast(constant, to)
        node.metadata_props[provenance.STORED] = self.scheme.weights
        return node

    def _cast(self, value: ir.Value, to: ir.DataType) -> ir.Node:
        name = f"{value.name}_cast"
        return self.editor.node("Cast", [value], name, to=to.value, saturate=1, round_mode="up")

    def _reshape(self, value: ir.Value, dims: Sequence[int]) -> ir.Node:
        shape = self.editor.constant(self.home, np.array(dims, np.int64), f"{self.name}_shape")
        return self.editor.node("Reshape", [value, shape], f"{value.name}_shaped", allowzero=0)


def to_planes(codes: Array, bits: int, lowest: int) -> Array:
    """``codes`` as bit planes, uint8 [bits, size / 8 rounded up, 1]: code i is bit i % 8 of byte i // 8."""
    flat = (codes.reshape(-1).astype(np.int16) - lowest).astype(np.uint8)
    eights = np.pad(flat, (0, -flat.size % 8)).reshape(-1, 8)
    planes = [np.packbits(eights >> i & 1, axis=1, bitorder="little") for i in range(bits)]
    return np.stack(planes)


def as_codes(
    base: ir.TensorProtocol,
    codes: Array | Callable[[Array], Array],
    layout: Layout,
    scheme: Scheme,
) -> ir.TensorProtocol:
    """The tensor that is stored for ``codes``, or for what that function makes of ``base``: lazily."""
    form = scheme.format
    own = ir.DataType.INT8 if scheme.operand else form.dtype
    name = f"{base.name}_{scheme.weights}"

    def stored(array: Array) -> Array:
        if own is None:
            return to_planes(array, form.bits, scheme.lowest)
        if dtype in (ir.DataType.INT4, ir.DataType.UINT4):
            return array  # packed as it is stored
        return array.astype(dtype.numpy(), copy=False)

    dtype = ir.DataType.UINT8
    if own is not None:
        dtype = form.unsigned if scheme.asymmetric and form.unsigned else own
    dims: Sequence[int] = layout.stored
    if own is None:
        dims = (form.bits, -(-math.prod(dims) // 8), 1)
    if callable(codes):
        held, perm = weights.as_held(base)
        return weights.derived(
            held, lambda array: stored(codes(np.transpose(array, perm))), dtype, dims, name
        )

    if dtype.bitwidth == 8 and own is not None and codes.flags.owndata:
        return ir.Tensor(np.ascontiguousarray(stored(codes)), dtype=dtype, name=name)

    def read(array: Array) -> Array:
        made = np.array(stored(array))
        weights.give_back_array(codes)  # they may be mapped, and more than fit into memory
        return made

    return weights.derived(ir.Tensor(codes, name=name), read, dtype, dims, name)


def _inside(node: ir.Node) -> Iterator[ir.Node]:
    """The nodes of a node's subgraphs."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield from attribute.as_graph().all_nodes()
