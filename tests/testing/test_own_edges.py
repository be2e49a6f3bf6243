"""NetLathe's own frontends and backends keep the laws that it asks of others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import transformers

from netlathe.backends.onnx_file import OnnxBackend
from netlathe.backends.torch_fx import TorchBackend
from netlathe.backends.tvm import runtime
from netlathe.backends.tvm.backend import TvmBackend
from netlathe.execute.fx import argument_name
from netlathe.frontends.huggingface import HuggingFaceDirectory
from netlathe.frontends.onnx_file import OnnxFile
from netlathe.frontends.torch_fx import TorchFx
from netlathe.frontends.torch_module import TorchModule
from netlathe.pipeline.pass_ import Feeds
from netlathe.testing import Case, backend_cases, frontend_cases, models
from tests import zoo

Run = Callable[[Feeds], Mapping[str, Any]]


def onnx_runtime(file: Path) -> Run:
    """An ONNX file as a user runs it."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda feeds: dict(zip(names, session.run(names, dict(feeds)), strict=True))


def exported_program(folder: Path) -> Run:
    """A .pt2 file as a user runs it."""
    module = torch.export.load(folder / "model.pt2").module()

    def run(feeds: Feeds) -> Mapping[str, Any]:
        given = {argument_name(n): torch.from_numpy(np.asarray(a)) for n, a in feeds.items()}
        return {name: value.detach().numpy() for name, value in module(**given).items()}

    return run


def named(*names: str) -> list[Any]:
    return [captured for captured in models() if captured.source in names]


ONNX = backend_cases(OnnxBackend(), lambda folder: onnx_runtime(folder / "model.onnx"))
# torch.export takes seconds a model: two quickly, the laws that need no more.
QUICK = ("protocol", "settings", "feeds", "runs")
TORCH = backend_cases(TorchBackend(), exported_program, models=named("mlp", "quantized"))
TORCH_ALL = backend_cases(TorchBackend(), exported_program)
TVM = backend_cases(TvmBackend(), lambda folder: runtime.load(folder).run, models=named("mlp"))


@pytest.mark.parametrize("case", ONNX, ids=str)
def test_the_onnx_backend(case: Case[Any]) -> None:
    case.check()


@pytest.mark.parametrize("case", [c for c in TORCH if str(c) in QUICK], ids=str)
def test_the_torch_backend(case: Case[Any]) -> None:
    case.check()


@pytest.mark.slow
@pytest.mark.parametrize("case", TORCH_ALL, ids=str)
def test_the_torch_backend_on_all_models(case: Case[Any]) -> None:
    case.check()


@pytest.mark.slow
@pytest.mark.parametrize("case", TVM, ids=str)
def test_the_tvm_backend(case: Case[Any]) -> None:
    case.check()


class Block(torch.nn.Module):
    """Two layers and a norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = torch.nn.Linear(8, 16)
        self.norm = torch.nn.LayerNorm(16)
        self.down = torch.nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.nn.functional.gelu(self.norm(self.up(x))))


def block_run(module: torch.nn.Module) -> Run:
    def run(feeds: Feeds) -> Mapping[str, Any]:
        with torch.no_grad():
            return {"output": module(torch.from_numpy(np.asarray(feeds["x"]))).numpy()}

    return run


@pytest.mark.parametrize("kind", ["module", "graph"])
def test_the_torch_frontends(kind: str) -> None:
    with torch.random.fork_rng():
        block = Block().eval()
    settings: dict[str, Any] = {"args": (torch.ones(2, 8),), "dynamic": {"x": {0: "batch"}}}
    frontend: Any = TorchModule(**settings)
    source: torch.nn.Module = block
    wrong = torch.nn.Linear(3, 4)
    if kind == "graph":
        frontend, source = TorchFx(**settings), torch.fx.symbolic_trace(block)
        wrong = torch.fx.symbolic_trace(wrong)
    for case in frontend_cases(
        frontend, source, block_run(block), dynamic=["batch"], wrong=[wrong]
    ):
        case.check()


def test_the_frontend_of_onnx_files(tmp_path: Path) -> None:
    (captured,) = named("encoder")
    file = tmp_path / "encoder.onnx"
    ir.save(captured.model, file)
    cases = frontend_cases(OnnxFile(), file, onnx_runtime(file), dynamic=["batch", "sequence"])
    for case in cases:
        case.check()


def test_the_frontend_of_hugging_face_directories() -> None:
    folder = zoo.minilm_folder()
    model = transformers.AutoModel.from_pretrained(folder).eval()

    def run(feeds: Feeds) -> Mapping[str, Any]:
        with torch.no_grad():
            tensors = {name: torch.from_numpy(array) for name, array in feeds.items()}
            states, mask = model(**tensors)[0], tensors["attention_mask"][..., None]
            mean = (states * mask).sum(1) / mask.sum(1)
        return {"sentence_embedding": torch.nn.functional.normalize(mean).numpy()}

    cases = frontend_cases(HuggingFaceDirectory(), folder, run, dynamic=["batch", "sequence"])
    for case in cases:
        case.check()
