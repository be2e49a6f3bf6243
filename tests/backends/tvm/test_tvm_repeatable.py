"""The same model gives the same library, packed weights and description, in whatever process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from tests.cli.conftest import network, tree

pytest.importorskip("tvm_ffi")


def test_two_processes_build_the_same_bytes_and_the_cache_has_them_too(tmp_path: Path) -> None:
    """Other hash seeds, so that no order of a set or a dict decides; addresses differ by themselves."""
    model = tmp_path / "network.onnx"
    onnx.save(network(), model)
    words = ["compile", str(model), "--passes", "fold_batch_norm", "--target", "tvm-x86"]
    cached = ["--cache", str(tmp_path / "cache")]
    made = []
    runs = {"first": ["--no-cache"], "second": cached, "recalled": cached}
    for number, (name, more) in enumerate(runs.items()):
        out = tmp_path / name
        done = subprocess.run(
            [sys.executable, "-m", "netlathe", *words, *more, "-o", str(out)],
            env={**os.environ, "PYTHONHASHSEED": str(number)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        files = tree(out)
        del files["manifest.json"]  # which holds times; its digest stands in meta.json
        made.append(files)
    assert made[0] == made[1] == made[2]
    assert {"model.so", "params.bin", "meta.json"} <= made[0].keys()
