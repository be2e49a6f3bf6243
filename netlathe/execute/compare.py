"""How far two results are apart, and where two models first differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.execute import ort

_AT_ONCE = 32  # values fetched together: few enough to hold, enough to make a session worth it


def relative_error(actual: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """max|actual - expected| as a share of expected's RMS; infinite where they cannot be compared.

    Non-finite numbers agree only with the same non-finite number at the same place; the RMS is taken
    over the finite ones. Integers and booleans are compared as numbers.
    """
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return float("inf")
    if expected.size == 0:
        return 0.0
    a, e = actual.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(e)
    if not np.array_equal(finite, np.isfinite(a)) or not np.array_equal(
        a[~finite], e[~finite], equal_nan=True
    ):
        return float("inf")
    if not finite.any():
        return 0.0
    difference = float(np.max(np.abs(a[finite] - e[finite])))
    if difference == 0.0:
        return 0.0
    rms = float(np.sqrt(np.mean(np.square(e[finite]))))
    return difference / rms if rms > 0 else float("inf")


@dataclass(frozen=True)
class Difference:
    """A value of ``a`` that is not what ``b`` makes of the same inputs."""

    name: str
    other: str  # its name in b
    error: float  # relative_error of a's value to b's
    value: ir.Value  # in a


def first_difference(
    a: ir.Model,
    b: ir.Model,
    feeds: Mapping[str, npt.NDArray[Any]],
    names: Mapping[str, str] | None = None,
    tolerance: float = 0.0,
) -> Difference | None:
    """The first value, in the order of ``a``'s nodes, that differs from its counterpart in ``b``.

    ``names`` maps values of ``a`` to values of ``b``; by default every name the two share. Values are
    compared a few at a time, so that a difference near the inputs costs a short run, and memory
    stays bounded. Both models take what they need of ``feeds``.

    Raises:
        RuntimeFailure: ONNX Runtime cannot run one of the models.
    """
    made = {v.name: v for node in a.graph for v in node.outputs if v.name}
    if names is None:
        others = {v.name for node in b.graph for v in node.outputs if v.name}
        names = {name: name for name in made if name in others}
    order = [name for name in made if name in names]
    for start in range(0, len(order), _AT_ONCE):
        some = order[start : start + _AT_ONCE]
        actual = ort.run(a, inputs_of(a, feeds), some)
        expected = ort.run(b, inputs_of(b, feeds), [names[name] for name in some])
        for name in some:
            error = relative_error(actual[name], expected[names[name]])
            if not error <= tolerance:
                return Difference(name, names[name], error, made[name])
    return None


def inputs_of(
    model: ir.Model, feeds: Mapping[str, npt.NDArray[Any]]
) -> dict[str, npt.NDArray[Any]]:
    """Those of ``feeds`` that ``model`` has an input for."""
    known = {value.name for value in model.graph.inputs}
    return {name: array for name, array in feeds.items() if name in known}
