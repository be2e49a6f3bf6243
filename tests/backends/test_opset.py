"""The ONNX project's node tests, lowered to every opset from 17 on: the same results, or a stated gap.

Each test is raised to the IR's opset, lowered, and run by ONNX Runtime. It must give what the test
expects within the test's own tolerance, or else, where ONNX Runtime itself is known to differ from the
standard's reference, what ONNX Runtime makes of the node before it was lowered.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
from onnx.backend.test.case.test_case import TestCase

from netlathe.backends import opset as opsets
from netlathe.diagnostics import LowerError, NetLatheError
from netlathe.execute import ort
from netlathe.execute.compare import relative_error
from netlathe.frontends.onnx_opset import NEWEST, OLDEST, raise_opset
from netlathe.ir import normal, types
from netlathe.passes.normalize import raise_operators
from tests import zoo
from tests.execute.test_node_backend import CASES
from tests.ir.test_types_nodes import array

Mode = Literal["constants", "inputs"]  # whether integer operands such as axes are known

# What no older opset can say: a pattern of the reason, and the newest opset that has the gap.
GAPS: Mapping[str, int] = {
    r"BitwiseAnd of uint64|BitwiseOr of uint64|BitwiseXor of uint64": 17,
    r"Col2Im does not exist": 17,
    r"LpPool with dilations": 17,
    r"Resize with antialias": 17,
    r"Resize that keeps the aspect ratio": 17,
    r"Scatter\w+ with reduction='(max|min)'": 17,
    r"AveragePool with dilations": 18,
    r"DeformConv does not exist": 18,
    r"Resize in half_pixel_symmetric mode": 18,
    r"Cast does not take tensor\(float8": 18,
    r"Cast has no attribute 'saturate'": 18,
    r"GridSample of other than images": 19,
    r"ImageDecoder does not exist": 19,
    r"Cast does not take tensor\(u?int4\)": 20,
    # A window that starts in the padding: counted before opset 22, left out since.
    r"Pool with ceil_mode has a window in the padding": 21,
    r"Cast does not take tensor\(float4e2m1\)": 22,
    r"Cast does not take tensor\(u?int2\)": 24,
}
# The same, of operands that are not known when the model is lowered.
GAPS_OF_INPUTS: Mapping[str, int] = {
    r"the axes of Reduce\w+ are not constant": 17,
    r"the axes of Pad are not constant": 17,
    r"the pads of a wrapping Pad are not constant": 18,
    r"the axis of DFT is not a constant": 19,
    r"the size of AffineGrid is not a constant": 19,
}

# Kernels of ONNX Runtime 1.32 that do not compute, or refuse, what the standard says at that opset.
# What they were given is the operator as the standard has it: nothing was rewritten there.
KERNELS: Mapping[tuple[str, int], str] = {
    **{
        (f"test_attention_4d_with_past_and_present_qk_matmul_bias_{n}d_mask_causal", v): "qk output"
        for n in (3, 4)
        for v in (23, 24)
    },
    ("test_attention_4d_diff_heads_mask4d_padded_kv", 24): "nonpad_kv_seqlen with a mask",
    ("test_attention_4d_padded_kv_bf16", 24): "nonpad_kv_seqlen with a mask",
    ("test_attention_4d_causal_padded_kv_bf16", 24): "nonpad_kv_seqlen with a mask",
}

# One rounding of the type, where ours or ONNX Runtime's rounds once more; else 84 ulp of float32.
TOLERANCE: Mapping[str, float] = {"float16": 2.0**-9, "bfloat16": 2.0**-6}


def load(case: TestCase, mode: Mode) -> tuple[ir.Model, dict[str, Any]] | None:
    """The typed model at the IR's opset, and its feeds; None where the opset is not read."""
    assert case.model is not None and case.data_sets is not None
    version = next((o.version for o in case.model.opset_import if not o.domain), 0)
    if not OLDEST <= version <= NEWEST or case.name == "test_scan_sum":  # Scan of opset 8
        return None
    model = ir.from_proto(onnx.ModelProto.FromString(case.model.SerializeToString()))
    if version < NEWEST:
        raise_opset(model)
    feeds: dict[str, Any] = {}
    many = len(model.graph.inputs) > 1
    for value, data in zip(list(model.graph.inputs), case.data_sets[0][0], strict=True):
        held = array(data)
        small = held.dtype.kind in "iub" and held.size <= 64 and held.ndim <= 1
        assert value.name is not None
        if mode == "constants" and many and small:
            value.const_value = ir.Tensor(held, dtype=value.dtype, name=value.name)
            model.graph.inputs.remove(value)
            model.graph.initializers[value.name] = value
        else:
            feeds[value.name] = held
    types.annotate(model)
    return model, feeds


def in_scope() -> Iterator[TestCase]:
    for case in CASES:
        if not case.name.endswith("_expanded") and "ai_onnx_ml" not in case.name:
            yield case


def run(model: ir.Model, feeds: Mapping[str, Any]) -> dict[str, npt.NDArray[Any]] | str:
    """Results, or why ONNX Runtime has none: it lacks a kernel, or takes no such feed (float4)."""
    try:
        return ort.run(model, feeds)
    except NetLatheError as failure:
        return failure.diagnostics[0].message


class Sweep:
    """All node tests at some opsets; what was found."""

    def __init__(self, mode: Mode) -> None:
        self.mode: Mode = mode
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.gaps: set[tuple[str, int]] = set()  # pattern, opset

    def run(self, targets: range | list[int]) -> None:
        for case in in_scope():
            loaded = load(case, self.mode)
            if loaded is None:
                continue
            model, feeds = loaded
            for target in targets:
                self._one(case, model, feeds, target)

    def _one(self, case: TestCase, model: ir.Model, feeds: dict[str, Any], target: int) -> None:
        lowered = model.clone()
        try:
            opsets.lower(lowered, target)
        except LowerError as error:
            self.counts["gap"] += 1
            for diagnostic in error.diagnostics:
                self._gap(case, diagnostic.message, target)
            return
        assert lowered.opset_imports[""] == target
        actual = run(lowered, feeds)
        if isinstance(actual, str):
            # Without a kernel at either opset there is no judge.
            if "NOT_IMPLEMENTED" in actual or isinstance(run(model, feeds), str):
                self.counts["not run"] += 1
            else:
                self._different(case, target, actual)
            return
        self.counts["run"] += 1
        assert case.data_sets is not None
        expected = [array(data) for data in case.data_sets[0][1]]
        for value, wanted in zip(lowered.graph.outputs, expected, strict=True):
            assert value.name is not None
            got = actual[value.name]
            if got.dtype != wanted.dtype or got.shape != wanted.shape:
                self._different(case, target, f"{got.dtype}{got.shape}")
            elif not close(got, wanted, case) and not self._as_before(
                model, feeds, value.name, got
            ):
                self._different(case, target, f"{value.name} differs")

    def _as_before(self, model: ir.Model, feeds: dict[str, Any], name: str, got: Any) -> bool:
        before = run(model, feeds)
        if isinstance(before, str):
            return False
        return relative_error(got, before[name]) <= TOLERANCE.get(got.dtype.name, 1e-5)

    def _gap(self, case: TestCase, message: str, target: int) -> None:
        known = dict(GAPS) | (dict(GAPS_OF_INPUTS) if self.mode == "inputs" else {})
        found = [p for p, newest in known.items() if re.search(p, message) and target <= newest]
        if not found:
            self.wrong.append(f"{case.name} at {target}: a gap that is not listed: {message}")
        self.gaps.update((pattern, target) for pattern in found)

    def _different(self, case: TestCase, target: int, what: str) -> None:
        if (case.name, target) not in KERNELS:
            self.wrong.append(f"{case.name} at {target}: {what}")


def close(got: npt.NDArray[Any], wanted: npt.NDArray[Any], case: TestCase) -> bool:
    if got.dtype.name in TOLERANCE and relative_error(got, wanted) <= TOLERANCE[got.dtype.name]:
        return True
    if got.dtype.kind not in "biufc":  # numpy compares its own types only
        got, wanted = got.astype(np.float32), wanted.astype(np.float32)
    return bool(np.allclose(got, wanted, rtol=case.rtol, atol=case.atol, equal_nan=True))


def test_node_tests_at_the_oldest_opset() -> None:
    """The most is rewritten there: nearly a quarter of the operators changed since."""
    sweep = Sweep("constants")
    sweep.run([17])
    assert not sweep.wrong, "\n".join(sweep.wrong)
    assert sweep.counts["run"] > 900
    assert sweep.counts["gap"] < 0.12 * sweep.counts["run"]  # mostly Casts to types of later opsets


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["constants", "inputs"])
def test_node_tests_at_every_opset(mode: Mode) -> None:
    sweep = Sweep(mode)
    sweep.run(opsets.OPSETS)
    assert not sweep.wrong, "\n".join(sweep.wrong)
    assert sweep.counts["run"] > 9000
    assert sweep.counts["gap"] < 0.05 * sweep.counts["run"]
    # The list tells the truth: every gap is there at its newest opset.
    stated = dict(GAPS) | (dict(GAPS_OF_INPUTS) if mode == "inputs" else {})
    assert {(pattern, newest) for pattern, newest in stated.items()} <= sweep.gaps


QUICK = ("llama", "swin")


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in zoo.NAMES]
)
def test_whole_models(name: str) -> None:
    """Raised captures at opsets before and behind LayerNormalization's neighbours, Attention, Swish."""
    recipe, model = zoo.build(name), zoo.exported(name)
    normal.normalize(model)
    raise_operators(model)
    normal.normalize(model)
    given = recipe.feeds(recipe.sizes[1], 1)
    feeds = {str(v.name): given[str(v.name)].numpy() for v in model.graph.inputs}
    expected = ort.run(model, feeds)
    for target in (17, 20, 22, 23, 24):
        lowered = model.clone()
        opsets.lower(lowered, target)
        for output, actual in ort.run(lowered, feeds).items():
            assert relative_error(actual, expected[output]) <= 1e-5, (target, output)


def test_a_scalar_stays_one() -> None:
    """What an operator is rewritten with has no dims of its own, either."""
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 25]>
        g (float x) => (float y) { y = Gelu(x) }
    """)
    lowered = model.clone()
    opsets.lower(lowered, 17)
    feeds = {"x": np.array(0.7, np.float32)}
    (expected,), (actual,) = ort.run(model, feeds).values(), ort.run(lowered, feeds).values()
    assert actual.shape == expected.shape == ()
    assert relative_error(actual, expected) <= 1e-5
