"""Weights stay in their files: what a capture holds in memory of its own does not grow with the model.

The files are sparse, so gigabytes of zeros cost neither disk nor time to write.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux' counters"),
]

# Captures in a process of its own; prints the growth of its own (anonymous) memory, at most and at last.
SCRIPT = """
import re, sys, threading, time
from pathlib import Path
import torch, transformers, onnxruntime
from netlathe.execute import ort
from netlathe.frontends.{module} import {frontend}

def own():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10

small, large = sys.argv[1:]
{frontend}().capture(small)  # what libraries need once
before = most = own()
done = False

def watch():
    global most
    while not done:
        most = max(most, own())
        time.sleep(0.002)

watcher = threading.Thread(target=watch)
watcher.start()
captured = {frontend}().capture(large)
done = True
watcher.join()
print(most - before, own() - before)
"""

SEGMENT = 512 << 20  # what ONNX Runtime is given at once: netlathe.execute.ort.SEGMENT_BYTES
SLACK = 256 << 20  # activations, the exporter's own graphs, what the allocator keeps


def growth(module: str, frontend: str, small: Path, large: Path) -> tuple[int, int]:
    script = SCRIPT.format(module=module, frontend=frontend)
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(small), str(large)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "NETLATHE_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    most, last = run.stdout.split()[-2:]
    return int(most), int(last)


def llama(folder: Path, hidden: int, layers: int) -> int:
    """A LLaMA of zeros; bytes of its weights."""
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 256,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": [256, hidden], "model.norm.weight": [hidden]}
    for i in range(layers):
        root, kv = f"model.layers.{i}", hidden // 4
        shapes |= {
            f"{root}.self_attn.q_proj.weight": [hidden, hidden],
            f"{root}.self_attn.k_proj.weight": [kv, hidden],
            f"{root}.self_attn.v_proj.weight": [kv, hidden],
            f"{root}.self_attn.o_proj.weight": [hidden, hidden],
            f"{root}.mlp.gate_proj.weight": [3 * hidden, hidden],
            f"{root}.mlp.up_proj.weight": [3 * hidden, hidden],
            f"{root}.mlp.down_proj.weight": [hidden, 3 * hidden],
            f"{root}.input_layernorm.weight": [hidden],
            f"{root}.post_attention_layernorm.weight": [hidden],
        }
    return sparse_safetensors(folder / "model.safetensors", shapes)


def sparse_safetensors(file: Path, shapes: Mapping[str, list[int]]) -> int:
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 4
        for dim in shape:
            size *= dim
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, 8 + len(text) + at)
    return at


def test_a_directory_of_more_than_a_gigabyte(tmp_path: Path) -> None:
    llama(tmp_path / "small", 64, 1)
    weights = llama(tmp_path / "large", 2048, 7)
    assert weights > 1.2 * (1 << 30)
    most, last = growth(
        "huggingface", "HuggingFaceDirectory", tmp_path / "small", tmp_path / "large"
    )
    # Transposed weights are made for one session at a time.
    assert most < SEGMENT + SLACK < weights
    assert last < SLACK


def tower(folder: Path, width: int, count: int) -> Path:
    """``count`` products with zeros [width, width] in external data."""
    folder.mkdir()
    nodes, weights = [], []
    size = width * width * 4
    for i in range(count):
        nodes.append(helper.make_node("MatMul", [f"h{i}", f"w{i}"], [f"h{i + 1}"]))
        tensor = TensorProto(name=f"w{i}", data_type=TensorProto.FLOAT, dims=[width, width])
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "data"), ("offset", i * size), ("length", size)):
            tensor.external_data.add(key=key, value=str(value))
        weights.append(tensor)
    graph = helper.make_graph(
        nodes,
        "tower",
        [helper.make_tensor_value_info("h0", TensorProto.FLOAT, ["batch", width])],
        [helper.make_tensor_value_info(f"h{count}", TensorProto.FLOAT, ["batch", width])],
        weights,
    )
    (folder / "data").touch()
    os.truncate(folder / "data", count * size)
    path = folder / "model.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(path))
    return path


def test_a_file_of_more_than_two_gigabytes(tmp_path: Path) -> None:
    small, large = tower(tmp_path / "small", 64, 2), tower(tmp_path / "large", 12288, 4)
    assert (large.parent / "data").stat().st_size > 2.2 * (1 << 30)
    most, last = growth("onnx_file", "OnnxFile", small, large)
    assert most < SLACK
    assert last < SLACK
