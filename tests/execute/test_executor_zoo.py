"""The executor on whole exported models: against eager torch, ONNX Runtime, and symbolic sizes."""

from __future__ import annotations

import pytest
import torch

from netlathe.execute import ort
from netlathe.execute.compare import relative_error
from netlathe.execute.executor import Executor
from netlathe.execute.fx import to_fx
from netlathe.execute.symbolic import check_symbolic
from tests import zoo

# The project's bar: max|difference| as a share of the RMS, in float32.
BOUND = 1e-5
# ONNX Runtime's own distance from eager torch on MobileNetV2 (one BatchNorm behind each of 50 convs).
ORT_BOUND = 1e-4
QUICK = ("llama", "gpt2", "resnet", "t5")
NAMES = [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in zoo.NAMES]


@pytest.mark.parametrize("name", NAMES)
def test_raw_exports(name: str) -> None:
    recipe, model = zoo.build(name), zoo.exported(name)
    executor, module = Executor(model), to_fx(model)
    for sizes in recipe.sizes:
        given = recipe.feeds(sizes, 1)
        arrays = {value.name or "": given[value.name or ""].numpy() for value in model.graph.inputs}
        actual = executor.run(arrays)
        emitted = module(**{key: given[key] for key in arrays})
        judged = ort.run(model, arrays)
        with torch.no_grad():
            eager = recipe.module(**given)
        compared = 0
        for output, tensor in actual.items():
            assert relative_error(tensor.numpy(), judged[output]) < ORT_BOUND
            assert relative_error(emitted[output].detach().numpy(), tensor.numpy()) < BOUND
            if output in eager and isinstance(eager[output], torch.Tensor):
                assert relative_error(tensor.numpy(), eager[output].numpy()) < BOUND
                compared += 1
        assert compared


@pytest.mark.parametrize("name", NAMES)
def test_raw_exports_work_for_all_sizes(name: str) -> None:
    assert check_symbolic(zoo.exported(name)) == []
