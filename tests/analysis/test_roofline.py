"""What a run takes at least: products of floats and of bytes, weights that are read whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from netlathe.analysis.cost import cost
from netlathe.analysis.roofline import Ceilings, Work, tokens_of, work
from netlathe.ir import normal
from tests import zoo_ir

CEILINGS = Ceilings(float_ops=1e9, byte_ops=4e9, bytes=1e8)


def quantized() -> ir.Model:
    """A table, a product of bytes, one of a dequantized weight alone, and one of two activations."""
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 25]>
        net (int64[b, t] ids, float[50, 8] table, int8[8, 6] w, int8[6, 10] v, float s, uint8 z)
            => (float[b, t, t] y) {
            x = Gather(table, ids)
            q = QuantizeLinear(x, s, z)
            d = DequantizeLinear(q, s, z)
            wd = DequantizeLinear(w, s)
            m = MatMul(d, wd)
            vd = DequantizeLinear(v, s)
            h = MatMul(m, vd)
            k = Transpose<perm=[0, 2, 1]>(h)
            y = MatMul(h, k)
        }"""
    )
    arrays: dict[str, npt.NDArray[Any]] = {
        "table": np.ones((50, 8), np.float32),
        "w": np.ones((8, 6), np.int8),
        "v": np.ones((6, 10), np.int8),
        "s": np.asarray(0.5, np.float32),
        "z": np.asarray(3, np.uint8),
    }
    for name, array in arrays.items():
        value = next(v for v in model.graph.inputs if v.name == name)
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(array, name=name)
        model.graph.register_initializer(value)
    normal.normalize(model)
    return model


def test_products_are_told_apart_and_rows_of_tables_do_not_count() -> None:
    found = work(quantized())
    assert found is not None
    at = found.at({"b": 3, "t": 7})
    assert at is not None
    assert at.byte_macs == 3 * 7 * 8 * 6
    assert at.float_macs == 3 * 7 * 6 * 10 + 3 * 7 * 7 * 10
    assert at.bytes == 8 * 6 + 6 * 10 + 4 + 1
    assert found.at({"b": 3}) is None


def test_it_can_be_written_down() -> None:
    found = work(quantized())
    assert found is not None
    sizes = {"b": 2, "t": 5}
    assert Work.from_json(found.to_json()).at(sizes) == found.at(sizes)


def test_the_longer_of_products_and_memory_is_the_least_time() -> None:
    assert Work(1_000_000, 4_000_000, 1000).least_ms(CEILINGS) == (4.0, "arithmetic")
    assert Work(1000, 0, 1_000_000).least_ms(CEILINGS) == (10.0, "memory")


@pytest.mark.parametrize("name", zoo_ir.some("llama"))
def test_the_products_are_those_that_cost_counts(name: str) -> None:
    model = zoo_ir.captured(name)
    found = work(model)
    assert found is not None
    for size in (2, 3):
        names = {str(s) for macs in (found.float_macs, found.byte_macs) for s in macs.free_symbols}
        at = found.at(dict.fromkeys(names, size))
        counted = cost(model, dict.fromkeys(names, size))
        assert at is not None and at.float_macs + at.byte_macs == counted.macs


def test_tokens_are_what_rows_of_a_table_are_taken_by() -> None:
    model = quantized()
    assert tokens_of(model, {"ids": np.zeros((2, 3), np.int64)}) == 6
    assert tokens_of(model, {}) is None


def test_what_chooses_no_rows_is_no_token() -> None:
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 25]>
        net (float[a, b] x, int64[a, b] at) => (float[a, b] y) { y = GatherElements(x, at) }"""
    )
    assert tokens_of(model, {"x": np.zeros((2, 3)), "at": np.zeros((2, 3), np.int64)}) is None
