"""How far two results are apart, and where two models first differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.execute import ort
from netlathe.ir import coded, interface

_AT_ONCE = 32  # values fetched together: few enough to hold, enough to make a session worth it


def relative_error(actual: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """max|actual - expected| as a share of expected's RMS; infinite where they cannot be compared.

    Non-finite numbers agree only with the same non-finite number at the same place; the RMS is taken
    over the finite ones. Integers and booleans are compared as numbers, strings for equality.
    """
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return float("inf")
    if actual.dtype.kind in "OUS":
        return 0.0 if np.array_equal(actual, expected) else float("inf")
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
    """How far a value of ``a`` is from what ``b`` makes of the same inputs."""

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
    if names is None:
        others = {v.name for node in b.graph for v in node.outputs if v.name}
        made = {v.name for node in a.graph for v in node.outputs if v.name}
        names = {name: name for name in made & others}
    for difference in differences(a, b, feeds, names):
        if not difference.error <= tolerance:
            return difference
    return None


def differences(
    a: ir.Model,
    b: ir.Model,
    feeds: Mapping[str, npt.NDArray[Any]],
    names: Mapping[str, str],
) -> Iterator[Difference]:
    """How far every value of ``a`` in ``names`` is from its counterpart in ``b``, in node order.

    See :func:`first_difference`.
    """
    for value, other, actual, expected in pairs(a, b, feeds, names):
        yield Difference(value.name or "", other, relative_error(actual, expected), value)


def pairs(
    a: ir.Model,
    b: ir.Model,
    feeds: Mapping[str, npt.NDArray[Any]],
    names: Mapping[str, str],
) -> Iterator[tuple[ir.Value, str, npt.NDArray[Any], npt.NDArray[Any]]]:
    """Values of ``a`` in ``names``, in node order, with their counterparts and what both come to.

    They are computed a few at a time, and not kept.
    """
    made = {v.name: v for node in a.graph for v in node.outputs if v.name and v.name in names}
    order = list(made)
    for start in range(0, len(order), _AT_ONCE):
        some = order[start : start + _AT_ONCE]
        actual = ort.run(a, inputs_of(a, feeds), some)
        expected = ort.run(b, inputs_of(b, feeds), [names[name] for name in some])
        for name in some:
            yield made[name], names[name], actual[name], expected[names[name]]


def inputs_of(
    model: ir.Model, feeds: Mapping[str, npt.NDArray[Any]]
) -> dict[str, npt.NDArray[Any]]:
    """Those of ``feeds`` that ``model`` has an input for, narrowed or encoded as passes have changed inputs.

    Feeds are those of the captured model, or fit ``model`` already.
    """
    known = {value.name for value in model.graph.inputs}
    left = interface.kept(model)
    fit = {n: interface.fit(array, n, left, {}) for n, array in feeds.items() if n in known}
    return coded.encoded(model, fit)
