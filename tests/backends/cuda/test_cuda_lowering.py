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
