"""The ONNX project's node tests, lowered for a GPU: every loop of every kernel is inside of a grid."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import pytest
from onnx.backend.test.case.test_case import TestCase

pytest.importorskip("tvm", reason="the tvm extra is not installed")

from tvm import tirx

from netlathe.backends.tvm.cuda.machine import gpu
from netlathe.backends.tvm.kernel import SCHEDULE
from netlathe.backends.tvm.lowering import Lowering
from tests.backends.tvm.test_tvm_nodes import EXCLUDED, QUICK, _prepared
from tests.execute.test_node_backend import CASES
from tests.ir.onnx_text import normal_model

FAMILIES = ("sm_90a", "sm_80")


def _parameters() -> list[Any]:
    lowered = [case for case in CASES if case.name not in EXCLUDED and "_expanded" not in case.name]
    return [
        pytest.param(case, id=case.name, marks=[] if number % QUICK == 0 else [pytest.mark.slow])
        for number, case in enumerate(lowered)
    ]


def on_host(statement: Any) -> Iterator[Any]:
    """The statements that no grid is around."""
    if isinstance(statement, tirx.AttrStmt):
        if statement.attr_key != "thread_extent":
            yield from on_host(statement.body)
        return
    yield statement
    if isinstance(statement, tirx.SeqStmt):
        for inner in statement.seq:
            yield from on_host(inner)
    elif isinstance(statement, tirx.IfThenElse):
        yield from on_host(statement.then_case)
        if statement.else_case is not None:
            yield from on_host(statement.else_case)


@pytest.mark.parametrize("case", _parameters())
def test_node(case: TestCase) -> None:
    assert case.model is not None
    model = _prepared(ir.serde.deserialize_model(case.model))
    for arch in FAMILIES:
        lowered = Lowering(model, gpu([arch])).run()
        kernels: list[Any] = [
            function
            for _, function in lowered.module.functions_items()
            if isinstance(function, tirx.PrimFunc) and SCHEDULE in function.attrs
        ]
        assert len(kernels) == lowered.kernels
        for kernel in kernels:
            for statement in on_host(kernel.body):
                assert not isinstance(statement, (tirx.For, tirx.While, tirx.BufferStore))


@pytest.mark.parametrize("arch", FAMILIES)
def test_loads_may_be_moved_only_where_kernels_in_front_have_ended(arch: str) -> None:
    """nvcc takes what nothing else is said to reach for constant, and ptxas reads it before the wait."""
    model = normal_model("g (float[40, 256] x) => (float[40, 256] y) { y = Softmax (x) }")
    functions = Lowering(model, gpu([arch])).run().module.functions_items()
    kernels: list[Any] = [f for _, f in functions if isinstance(f, tirx.PrimFunc)]
    assert kernels
    for kernel in kernels:
        assert bool(kernel.attrs["tirx.noalias"]) == (arch == "sm_80")


def stored(statement: Any, conditions: int = 0) -> Iterator[tuple[str, int]]:
    """Of each store within grids: where it goes, and the number of conditions around it."""
    if isinstance(statement, tirx.BufferStore):
        buffer: Any = statement.buffer
        yield buffer.scope(), conditions
    elif isinstance(statement, tirx.SeqStmt):
        for inner in statement.seq:
            yield from stored(inner, conditions)
    elif isinstance(statement, tirx.IfThenElse):
        yield from stored(statement.then_case, conditions + 1)
        if statement.else_case is not None:
            yield from stored(statement.else_case, conditions + 1)
    elif hasattr(statement, "body"):
        yield from stored(statement.body, conditions)


@pytest.mark.parametrize(
    "node", ["Softmax (x)", "RMSNormalization (x, gain)", "LayerNormalization (x, gain)"]
)
def test_of_no_rows_nothing_is_written(node: str) -> None:
    """TVM launches a block where there is nothing to do, too, unless it is told not to."""
    text = f"""<ir_version: 12, opset_import: ["" : 25]>
        g (float[n, 4096] x, float[4096] gain) => (float[n, 4096] y) {{ y = {node} }}"""
    lowered = Lowering(normal_model(text), gpu(["sm_90a"])).run()
    kernel: Any
    (kernel,) = (f for _, f in lowered.module.functions_items() if isinstance(f, tirx.PrimFunc))
    conditions = [count for scope, count in stored(kernel.body) if scope == "global"]
    assert conditions and min(conditions) >= 1
