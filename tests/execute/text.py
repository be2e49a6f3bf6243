"""Models from ONNX text, with weights given as arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.numpy_helper
import onnx.parser
import onnx_ir as ir


def model(text: str, weights: dict[str, npt.NDArray[Any]] | None = None) -> ir.Model:
    """``text`` after the header; ``weights`` become initializers of those names."""
    header = '<ir_version: 10, opset_import: ["" : 23, "com.vendor" : 1, "own" : 1]>\n'
    proto = onnx.parser.parse_model(header + text)
    for name, array in (weights or {}).items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(proto)


def normal(*shape: int, seed: int = 0) -> npt.NDArray[Any]:
    """float32 standard normal numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
