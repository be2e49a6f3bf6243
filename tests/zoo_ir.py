"""The zoo in the IR: raised, in normal form and with module paths, as passes get it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from netlathe.frontends import exporter_metadata
from netlathe.ir import normal
from netlathe.passes.normalize import raise_operators
from tests import zoo


def some(*names: str) -> list[Any]:
    """Parameters for every model of the zoo; those that are not named are slow."""
    slow = pytest.mark.slow
    return [name if name in names else pytest.param(name, marks=slow) for name in zoo.NAMES]


def captured(name: str) -> ir.Model:
    """The exported model; no comparison with the original is made."""
    return _captured(name).clone()


@lru_cache(maxsize=4)
def _captured(name: str) -> ir.Model:
    model = zoo.exported(name)
    exporter_metadata.condense(model)
    normal.normalize(model)
    raise_operators(model)
    normal.normalize(model)
    return model


def feeds(name: str, seed: int = 0) -> list[dict[str, npt.NDArray[Any]]]:
    """Feeds at the two sizes of the zoo."""
    recipe = _built(name)
    return [_arrays(recipe, sizes, seed + at) for at, sizes in enumerate(recipe.sizes)]


def _arrays(
    recipe: zoo.ZooModel, sizes: Mapping[str, int], seed: int
) -> dict[str, npt.NDArray[Any]]:
    return {key: np.asarray(value) for key, value in recipe.feeds(sizes, seed).items()}


@lru_cache(maxsize=4)
def _built(name: str) -> zoo.ZooModel:
    return zoo.build(name)
