"""Sizes and shapes that the program hands to kernels: each is made once a run, and anew in the next."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("tvm", reason="the tvm extra is not installed")

import tvm
from tvm import relax

from netlathe.backends.tvm import build
from netlathe.backends.tvm.lowering import Lowering
from netlathe.backends.tvm.machine import machine
from netlathe.ir import normal
from tests.backends.tvm.in_process import InProcess

# The softmax of [n, m] and of its transpose, in turn; what is computed from dims is a size, too.
TEXT = """
    <ir_version: 10, opset_import: ["" : 25]>
    g (float[n, m] x) => (float[n, m] y, float[m, k] z) {
        a = Softmax (x) b = Transpose (a) c = Softmax (b) d = Transpose (c) e = Softmax (d)
        y = Softmax (e)
        f = Concat <axis = 0> (y, x) h = Softmax (f) z = Transpose (h)
    }
    """


def model() -> ir.Model:
    made = ir.from_onnx_text(TEXT)
    normal.normalize(made)
    return made


def test_each_is_made_once() -> None:
    chosen = machine("avx2")
    lowered = Lowering(model(), chosen).run()
    with build.target(chosen):
        main = build.relax_pipeline()(lowered.module)["main"]
    values = [binding.value for block in main.body.blocks for binding in block.bindings]
    assert not any(isinstance(value, relax.Var) for value in values)  # a copy, when it runs
    calls: list[Any] = [value for value in values if isinstance(value, tvm.ir.Call)]
    made = Counter(
        str(call)
        for call in calls
        if str(getattr(call.op, "global_symbol", "")).startswith("vm.builtin.make_")
        and "tuple" not in call.op.global_symbol
    )
    assert len(made) >= 4 and set(made.values()) == {1}
    kernels = [call for call in calls if isinstance(call.op, tvm.ir.GlobalVar)]
    handed = [argument for call in kernels for argument in call.args[1:]]
    sizes = [argument for argument in handed if not isinstance(argument.ty, relax.TensorType)]
    assert len(sizes) > len(kernels)  # or there was nothing to share


def softmax(x: Any) -> Any:
    powers = np.exp(x - x.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def test_the_next_run_has_its_own() -> None:
    runs = InProcess(model(), "avx2")
    rng = np.random.default_rng(0)
    for shape in ((3, 5), (7, 2), (3, 5), (1, 9)):
        x = rng.standard_normal(shape, np.float32)
        found = runs.run({"x": x})
        y = softmax(softmax(softmax(softmax(x.astype(np.float64)).T).T))
        z = softmax(np.concatenate([y, x])).T
        np.testing.assert_allclose(found["y"], y, atol=1e-6, rtol=0)
        np.testing.assert_allclose(found["z"], z, atol=1e-6, rtol=0)
