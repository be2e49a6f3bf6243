"""What this machine can do at best, measured beside what is held against it.

Rates of arithmetic are those of a product of 512 x 768 by a constant 768 x 3072 in ONNX Runtime, in float32
and of bytes, which its kernels do at nearly the peak. The rate of memory is that of finding the largest of
64 Mi float32 numbers, which no cache holds, in as many parts as there are threads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from netlathe.analysis.roofline import Ceilings
from netlathe.execute.timing import Timing

_M, _K, _N = 512, 768, 3072
_NUMBERS = 1 << 26
_FLOATS, _BYTES, _MEMORY = "float32 product", "product of bytes", "memory"


def probes(threads: int) -> dict[str, Callable[[], object]]:
    """Functions to be timed in turn with others, by name; see :func:`ceilings`."""
    rng = np.random.default_rng(0)
    parts = np.array_split(np.ones(_NUMBERS, np.float32), threads)
    pool = ThreadPoolExecutor(threads)
    floats = rng.normal(size=(_M + _N, _K)).astype(np.float32)
    small = rng.integers(0, 100, (_M + _N, _K))
    return {
        _FLOATS: _product("MatMul", floats[:_M], floats[_M:].T, TensorProto.FLOAT, threads),
        _BYTES: _product(
            "MatMulInteger",
            small[:_M].astype(np.uint8),
            small[_M:].T.astype(np.int8),
            TensorProto.INT32,
            threads,
        ),
        _MEMORY: parts[0].max if threads == 1 else lambda: list(pool.map(np.max, parts)),
    }


def ceilings(found: Mapping[str, Timing]) -> Ceilings:
    """The rates that the probes reached in their fastest quarter."""

    def per_second(name: str, amount: float) -> float:
        return 1e3 * amount / found[name].low_ms

    operations = 2.0 * _M * _K * _N
    return Ceilings(
        per_second(_FLOATS, operations),
        per_second(_BYTES, operations),
        per_second(_MEMORY, 4.0 * _NUMBERS),
    )


def _product(
    operator: str, a: npt.NDArray[Any], b: npt.NDArray[Any], result: int, threads: int
) -> Callable[[], object]:
    """The product of ``a`` by a constant ``b``, packed once."""
    graph = helper.make_graph(
        [helper.make_node(operator, ["a", "b"], ["y"])],
        "product",
        [helper.make_tensor_value_info("a", helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)],
        [helper.make_tensor_value_info("y", result, [_M, _N])],
        [numpy_helper.from_array(np.ascontiguousarray(b), "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    model.ir_version = 10
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda: session.run(None, {"a": a})
