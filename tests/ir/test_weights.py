"""Lazy weights: right values, nothing held, chains that do not grow."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from netlathe.ir import weights
from tests.ir.onnx_text import matrix, model


def test_a_recipe_is_computed_at_every_reading_and_not_held() -> None:
    held: list[weakref.ref[np.ndarray]] = []

    def negate(array: np.ndarray) -> np.ndarray:
        result = -array
        held.append(weakref.ref(result))
        return result

    base = matrix(3, 4)
    made = weights.derived(ir.tensor(base), negate, ir.DataType.FLOAT, [3, 4], "w")
    assert not held  # nothing until it is read
    np.testing.assert_array_equal(made.numpy(), -base)
    assert made.tobytes() == (-base).tobytes()
    gc.collect()
    assert len(held) == 2 and all(reference() is None for reference in held)


def test_a_recipe_that_breaks_its_promise_says_so() -> None:
    made = weights.derived(ir.tensor(matrix(3, 4)), np.transpose, ir.DataType.FLOAT, [3, 4], "w")
    with pytest.raises(ValueError, match=r"w: recipe gave shape \(4, 3\), promised \(3, 4\)"):
        made.numpy()


def test_a_recipe_for_a_scalar_gives_a_scalar() -> None:
    base = ir.tensor(np.float32(3))
    made = weights.derived(base, lambda array: array * 2, ir.DataType.FLOAT, [], "w")
    assert made.numpy().shape == () and made.numpy() == 6


def test_transposes_do_not_pile_up() -> None:
    base = ir.tensor(matrix(2, 3, 4))
    made: ir.TensorProtocol = base
    expected = base.numpy()
    for _ in range(5):
        made = weights.transposed(made, [2, 0, 1])
        expected = expected.transpose(2, 0, 1)
    assert list(made.shape) == list(expected.shape)
    np.testing.assert_array_equal(made.numpy(), expected)
    assert weights.transposed(made, [2, 0, 1]) is base  # six turns are none


@pytest.mark.parametrize("shape", [(3, 5), (128, 300), (257, 129), (1, 400)])
def test_a_transposed_recipe_is_laid_out_in_rows(shape: tuple[int, int]) -> None:
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    made = weights.transposed(ir.tensor(array), (1, 0)).numpy()
    np.testing.assert_array_equal(made, array.T)
    assert made.flags.c_contiguous and made.dtype == array.dtype


def test_repeated_composition_is_right_for_narrow_dtypes() -> None:
    base = ir.tensor(matrix(4, 6).astype(ml_dtypes.bfloat16))
    turned = weights.transposed(base, [1, 0])
    wide = weights.derived(
        turned, lambda a: a.astype(np.float32), ir.DataType.FLOAT, [6, 4], "wide"
    )
    back = weights.transposed(wide, [1, 0])
    np.testing.assert_array_equal(back.numpy(), base.numpy().astype(np.float32))
    assert turned.tobytes() == np.ascontiguousarray(base.numpy().T).tobytes()


def test_digest_tells_bytes_dtypes_and_shapes_apart() -> None:
    array = np.arange(12, dtype=np.int32)
    same = ir.tensor(array.copy())
    assert weights.digest(ir.tensor(array)) == weights.digest(same)
    half = ir.tensor(np.array([1, 2, 3], ml_dtypes.int4))
    scalar = ir.tensor(np.array(2.0, np.float32))
    assert len({weights.digest(half), weights.digest(scalar)}) == 2
    others = [array.reshape(3, 4), array.view(np.float32), array + 1]
    digests = {weights.digest(ir.tensor(other)) for other in (array, *others)}
    assert len(digests) == 4


def test_num_bytes_counts_every_initializer_once() -> None:
    made = model("float[b,3] x", "float y", "u = Add(x, w) y = Mul(u, w)", w=matrix(3))
    assert weights.num_bytes(made) == 12


def test_array_refuses_what_is_not_constant() -> None:
    made = model("float[b,3] x", "float y", "y = Relu(x)")
    with pytest.raises(ValueError, match="x is not a constant"):
        weights.array(made.graph.inputs[0])


def test_parts_in_a_row_are_one_weight(tmp_path: Path) -> None:
    """A stack of experts whose files hold one entry each, then transposed."""
    parts = [matrix(2, 3, seed=i) for i in range(4)]
    (tmp_path / "w").write_bytes(b"".join(part.tobytes() for part in parts))
    mapped = [
        ir.ExternalTensor(
            *("w", i * 24, 24, ir.DataType.FLOAT),
            shape=ir.Shape([2, 3]),
            name=f"part{i}",
            base_dir=tmp_path,
        )
        for i in range(4)
    ]
    made = weights.joined(mapped, [4, 2, 3], "experts")
    assert weights.is_recipe(made) and made.dtype == ir.DataType.FLOAT
    np.testing.assert_array_equal(made.numpy(), np.stack(parts))
    turned = weights.transposed(made, [0, 2, 1])
    np.testing.assert_array_equal(turned.numpy(), np.stack(parts).transpose(0, 2, 1))
    holder = model("float[b,3] x", "float y", "y = MatMul(x, w)", w=matrix(4, 3, 2))
    holder.graph.initializers["w"].const_value = turned
    assert weights.files(holder) == {tmp_path / "w"}
    weights.give_back(holder)
    np.testing.assert_array_equal(turned.numpy(), np.stack(parts).transpose(0, 2, 1))


def test_parts_that_do_not_fill_the_shape_are_refused() -> None:
    made = weights.joined([ir.tensor(matrix(2, 3))] * 2, [5, 3], "w")
    with pytest.raises(ValueError, match="cannot reshape array of size 12"):
        made.numpy()
