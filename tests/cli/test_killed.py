"""SIGKILL at random points of a compile: no broken artifact, no broken cache, every rerun ends right."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PASSES = 'fold_batch_norm, cleanup, quantize(weights="int8", min_size=600)'
ROOT = Path(__file__).parents[2]


def kill(model: Path, folder: Path, points: int, seed: int) -> dict[str, float]:
    folder.mkdir()
    words = [sys.executable, "-m", "tests.cli.killer", str(model), PASSES, str(folder)]
    done = subprocess.run(
        [*words, str(points), str(seed)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    told: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return told


def test_killed_at_six_points(model: Path, tmp_path: Path) -> None:
    assert kill(model, tmp_path / "work", 6, seed=0)["points"] == 6


@pytest.mark.slow
def test_killed_at_two_hundred_points(model: Path, tmp_path: Path) -> None:
    told = kill(model, tmp_path / "work", 200, seed=1)
    assert told["points"] == 200 and told["resumed"] > 20  # not all before or behind the work
