"""The ready models, models from text, and entry points."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest

from netlathe.diagnostics import InputError, VerifyError
from netlathe.execute import ort
from netlathe.ir import verify
from netlathe.passes.quantize import Quantize
from netlathe.testing import ConformanceError, check_entry_point, from_text, models
from netlathe.testing.laws import bits
from netlathe.testing.sizes import trials
from tests.pipeline.plugin import MODULE, install

SQUARE = "(float[batch, 4] x) => (float[batch, 4] y) { y = MatMul(x, w) }"


def test_models_are_sound_alike_each_time_and_neither_vanish_nor_grow() -> None:
    again = {captured.source: captured for captured in models()}
    for captured in models():
        assert verify.verify(captured.model) == []
        assert bits(captured.model) == bits(again[captured.source].model)
        labels = [label for label, _ in trials(captured)]
        assert len(labels) == 3 and labels[-1].startswith(next(iter(captured.dynamic)) + "=1")
        for _, feeds in trials(captured):
            for array in ort.run(captured.model, feeds).values():
                assert 0.05 < np.sqrt(np.mean(np.square(array.astype(np.float64)))) < 5


def test_what_is_wrong_with_a_text_is_said() -> None:
    with pytest.raises(InputError, match="the text is no ONNX model"):
        from_text("bad", "(float[batch, 4] x) => {")
    with pytest.raises(InputError, match="nothing reads 'v'"):
        weights = {name: np.ones((4, 4), np.float32) for name in "vw"}
        from_text("bad", SQUARE, weights)
    with pytest.raises(VerifyError, match=r"verify\.width"):
        from_text("bad", SQUARE, {"w": np.ones((3, 4), np.float32)})


def test_weights_are_copied() -> None:
    array = np.ones((4, 4), np.float32)
    captured = from_text("copied", SQUARE, {"w": array})
    before = bits(captured.model)
    array[:] = 0
    assert bits(captured.model) == before


# -- entry points ---------------------------------------------------------------------------------


def test_an_entry_point_that_leads_to_its_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_entry_point(Quantize)
    module = install(tmp_path, monkeypatch)
    check_entry_point(importlib.import_module(module).Polish)


def test_an_absent_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = install(tmp_path, monkeypatch, "mute", entries="[other]\na = {module}:Polish\n")
    with pytest.raises(ConformanceError, match="no entry point of the group") as caught:
        check_entry_point(importlib.import_module(module).Polish)
    assert 'polish = "mute_module:Polish"' in str(caught.value)


def test_an_entry_point_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = install(tmp_path, monkeypatch, "first")
    other = MODULE.replace("class Polish", "class Shine")
    second = install(tmp_path, monkeypatch, "second", "[other]\na = {module}:Shine\n", other)
    with pytest.raises(ConformanceError, match=f"leads to {first}:Polish and not to {second}"):
        check_entry_point(importlib.import_module(second).Shine)


def test_two_entry_points_of_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = install(tmp_path, monkeypatch, "one")
    polish = importlib.import_module(module).Polish
    install(tmp_path, monkeypatch, "two")
    with pytest.raises(ConformanceError, match=r"comes from (two and one|one and two)"):
        check_entry_point(polish)


def test_an_entry_point_to_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = "[netlathe.passes]\npolish = {module}:Polisch\n"
    module = install(tmp_path, monkeypatch, "typo", entries)
    with pytest.raises(ConformanceError, match="cannot be loaded: it raised AttributeError"):
        check_entry_point(importlib.import_module(module).Polish)
