"""The torch backend: what it saves runs in torch alone, without a pickle and without NetLathe."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from netlathe.backends.torch_fx import TorchBackend
from netlathe.diagnostics import LowerError
from netlathe.execute.executor import Executor
from tests.execute import text


def model() -> ir.Model:
    """A tiny language model that adds a position to its scores."""
    made = text.model(
        """
        g (int64[batch, sequence] ids) => (float[batch, sequence, 6] logits)
        {
            x = Gather<axis = 0>(embed, ids)
            h = MatMul(x, proj)
            start = Constant<value_int = 0>()
            step = Constant<value_int = 1>()
            dims = Shape<start = 1, end = 2>(ids)
            length = Squeeze(dims)
            positions = Range(start, length, step)
            places = Cast<to = 1>(positions)
            axis = Constant<value_ints = [1]>()
            column = Unsqueeze(places, axis)
            slope = Constant<value_floats = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]>()
            moved = Mul(column, slope)
            sum = Add(h, moved)
            logits = Softmax<axis = -1>(sum)
        }
        """,
        {"embed": text.normal(10, 6, seed=1), "proj": text.normal(6, 6, seed=2)},
    )
    for name in ("embed", "proj"):
        value = made.graph.initializers.pop(name)
        value.name = f"{name}.weight"
        made.graph.initializers[value.name] = value
    return made


TARGET = TorchBackend.targets()[0]


def test_run_equals_the_executor_at_other_sizes() -> None:
    artifact = TorchBackend().compile(model(), TARGET)
    for shape in ((1, 1), (2, 7), (5, 3)):
        feeds = {"ids": np.arange(np.prod(shape)).reshape(shape) % 10}
        expected = Executor(model()).run(feeds)["logits"].numpy()
        np.testing.assert_allclose(artifact.run(feeds)["logits"], expected, rtol=1e-6, atol=1e-7)


def test_the_saved_program_needs_torch_alone(tmp_path: Path) -> None:
    artifact = TorchBackend().compile(model(), TARGET)
    (path,) = artifact.save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt2"]
    entries = zipfile.ZipFile(path).infolist()
    assert not [e for e in entries if e.filename.endswith((".pt", ".pkl")) and e.file_size]
    script = (
        "import sys, torch\n"
        f"program = torch.export.load({str(path)!r})\n"
        "ids = torch.tensor([[1, 2, 3], [4, 5, 6]])\n"
        "print(program.module()(ids=ids)['logits'].sum(-1).allclose(torch.ones(2, 3)))\n"
        "print(sorted(program.state_dict))\n"
        "print('netlathe' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.split("\n")[:3] == [
        "True",
        "['embed.weight', 'proj.weight', 'slope']",
        "False",
    ]


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    contents = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (path,) = TorchBackend().compile(model(), TARGET).save(tmp_path / name)
        contents.append(path.read_bytes())
    assert contents[0] == contents[1]


def test_the_module_trains() -> None:
    artifact = TorchBackend().compile(model(), TARGET)
    artifact.module(torch.tensor([[1, 2]]))["logits"][..., 0].sum().backward()
    assert all(p.grad is not None for p in artifact.module.parameters())


def test_gaps_are_listed_before_work_starts() -> None:
    broken = text.model(
        """
        g (bool flag, float[2] x) => (float[2] z)
        {
            y = com.vendor.Twist(x)
            z = If(flag) <
                then_branch = yes () => (float[2] a) { a = Neg(y) },
                else_branch = no () => (float[2] b) { b = Abs(y) }>
        }
        """
    )
    codes = [d.code for d in TorchBackend().unsupported(broken, TARGET)]
    assert codes == ["execute.unsupported", "torch.control_flow"]
    with pytest.raises(LowerError):
        TorchBackend().compile(broken, TARGET)


def test_a_baked_size_is_refused() -> None:
    baked = text.model(
        """
        g (float[batch, 8] x) => (float[2, 2, 4] y) <int64[3] shape = {2, 2, 4}>
        { y = Reshape(x, shape) }
        """
    )
    with pytest.raises(LowerError, match=r"torch\.export"):
        TorchBackend().compile(baked, TARGET)
