"""The zoo's models through TVM against the executor, at two sizes from one compilation."""

from __future__ import annotations

import pytest

from netlathe.execute.compare import relative_error
from netlathe.execute.executor import Executor
from tests import zoo, zoo_ir

pytest.importorskip("tvm", reason="the tvm extra is not installed")

from tests.backends.tvm.in_process import InProcess

# The project's bar for TVM: max|difference| as a share of the output's RMS, in float32.
BOUND = 1e-4
QUICK = ("llama", "resnet", "t5")
NAMES = [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in zoo.NAMES]


@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_the_executor(name: str) -> None:
    model = zoo_ir.captured(name)
    artifact = InProcess(model)
    executor = Executor(model)
    inputs = [value.name or "" for value in model.graph.inputs if not value.is_initializer()]
    for feeds in zoo_ir.feeds(name):
        given = {name: feeds[name] for name in inputs}
        actual, expected = artifact.run(given), executor.run(given)
        assert actual.keys() == expected.keys()
        for output, tensor in expected.items():
            assert relative_error(actual[output], tensor.numpy()) < BOUND
