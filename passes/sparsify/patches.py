"""What a convolution multiplies with its kernels, as a value of the model: its second moment can be measured.

    y = Conv(x, w: f32[o,i,3,3])   ->   p = Conv(x, e: f32[i*9,i,3,3])    beside it, with the same attributes

Each kernel of ``e`` is 1 at one place: a position of ``p`` holds the patch under the kernel, as im2col does,
input channels slowest.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from netlathe.ir import edit, types, weights

_MOST = 1 << 13  # columns of a kernel: beyond, channels are taken by themselves


def with_patches(model: ir.Model, names: Sequence[str]) -> tuple[ir.Model, dict[str, str]]:
    """A copy of the model with the patches of convolutions by their weights' names, as outputs."""
    probed = model.clone()
    graph = probed.graph
    taken, made = edit.names_in(graph), dict[str, str]()
    for name in names:
        weight = graph.initializers[name]
        node = next(iter(weight.consumers()))
        value = node.inputs[0]
        assert value is not None and value.dtype is not None
        dims = weights.array(weight).shape
        columns = int(np.prod(dims[1:]))
        one = np.eye(columns, dtype=value.dtype.numpy()).reshape(columns, *dims[1:])
        kernels = edit.constant(graph, one, f"{name}_places", taken)
        attributes = {key: attribute.value for key, attribute in node.attributes.items()}
        copy = edit.node(
            "Conv",
            [value, kernels],
            attributes,
            name=edit.unique_name(graph, f"{name}_patches", taken),
            dtype=value.dtype,
        )
        graph.insert_before(node, copy)
        graph.outputs.append(copy.outputs[0])
        made[name] = copy.outputs[0].name or ""
    types.annotate(probed)
    return probed, made


def fits(node: ir.Node, columns: int) -> bool:
    """Whether the patches of a convolution can be put beside it: no groups, and not too many columns."""
    return node.attributes.get_int("group", 1) == 1 and columns <= _MOST
