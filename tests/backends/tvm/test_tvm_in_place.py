"""Outputs that are an input with some elements replaced: when they share memory, and whose is left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("tvm", reason="the tvm extra is not installed")

from netlathe.backends.tvm import runtime
from netlathe.backends.tvm.artifact import TvmArtifact
from netlathe.backends.tvm.cuda.machine import gpu
from netlathe.backends.tvm.lowering import Lowered, Lowering
from netlathe.backends.tvm.machine import machine
from netlathe.ir import normal

HEADS, ROOM, DEPTH = 2, 6, 16

STEP = """
    <ir_version: 12, opset_import: ["" : 25]>
    g (float[b, 2, s, 16] q, float[b, 2, s, 16] x, float[b, 2, s, 16] w, float[b, 2, 6, 16] k,
       float[b, 2, 6, 16] v, int64[b] first, int64[b] total)
      => (float[b, 2, s, 16] y, float[b, 2, 6, 16] nk, float[b, 2, 6, 16] nv)
    {
        nk = TensorScatter <axis = 2> (k, x, first)
        nv = TensorScatter <axis = 2> (v, w, first)
        y = Attention <is_causal = 1> (q, nk, nv, , , , total)
    }
    """


def model(text: str) -> ir.Model:
    made = ir.from_onnx_text(text)
    normal.normalize(made)
    return made


def lowered(text: str, *, on_gpu: bool = False) -> Lowered:
    return Lowering(model(text), gpu(["sm_90a"]) if on_gpu else machine("avx2")).run()


def scatter(
    rest: str, inputs: str = "", outputs: str = "", node: str = "n = TensorScatter (c, u, i)"
) -> str:
    """A cache ``c`` that becomes ``n``, and ``rest`` around it."""
    return f"""
        <ir_version: 12, opset_import: ["" : 25]>
        g (float[1, 8, 4] c, float[1, 1, 4] u, int64[1] i{inputs}) => (float[1, 8, 4] n{outputs})
        {{ {node} {rest} }}
        """


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> runtime.Model:
    folder = tmp_path_factory.mktemp("artifact")
    TvmArtifact(model(STEP), machine("avx2")).write(folder)  # samples would reach beyond the cache
    return runtime.load(folder)


def feeds(first: list[int], seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    count = len(first)
    given = {
        name: rng.standard_normal((count, HEADS, 2 if name in "qxw" else ROOM, DEPTH), np.float32)
        for name in "qxwkv"
    }
    return {**given, "first": np.array(first), "total": np.array(first) + 2}


def wanted(given: dict[str, Any]) -> dict[str, Any]:
    """What the step computes, in float64."""
    caches = {}
    for name, new in (("k", "x"), ("v", "w")):
        caches[f"n{name}"] = given[name].astype(np.float64)
        for row, start in enumerate(given["first"]):
            caches[f"n{name}"][row, :, start : start + 2] = given[new][row]
    scores = given["q"].astype(np.float64) @ caches["nk"].swapaxes(2, 3) / np.sqrt(DEPTH)
    seen = np.arange(ROOM) <= (given["first"][:, None] + np.arange(2))[:, None, :, None]
    powers = np.where(seen, np.exp(scores), 0.0)
    return {"y": powers / powers.sum(3, keepdims=True) @ caches["nv"], **caches}


def test_a_call_with_arrays_leaves_them_alone(step: runtime.Model) -> None:
    assert step.in_place == {"nk": "k", "nv": "v"}
    given = feeds([3, 0, 4], 0)
    kept = {name: array.copy() for name, array in given.items()}
    found = step.run(given)
    for name, value in wanted(given).items():
        assert np.abs(found[name] - value).max() <= 1e-5
    again = step.run(given)
    for name, array in given.items():
        assert np.array_equal(array, kept[name])
    for name, array in again.items():
        assert np.array_equal(array, found[name])


def test_a_cache_goes_from_call_to_call_without_a_copy(step: runtime.Model) -> None:
    """Each call reads what the ones before wrote, in the same memory."""
    caches: dict[str, Any] = {name: np.zeros((1, HEADS, ROOM, DEPTH), np.float32) for name in "kv"}
    names = [record["name"] for record in step.inputs]
    held = dict(zip(names, step.place({**feeds([0], 0), **caches}), strict=True))
    tensors = [held["k"], held["v"]]
    for start in (0, 2, 4):
        given = {**feeds([start], start), **caches}
        placed = dict(zip(names, step.place(given), strict=True))
        placed["k"], placed["v"] = tensors
        results = step.invoke([placed[name] for name in names])
        for old, new in zip(tensors, results[1:], strict=True):
            assert np.from_dlpack(old).ctypes.data == np.from_dlpack(new).ctypes.data
        found = wanted(given)
        assert np.abs(np.from_dlpack(results[0]) - found["y"]).max() <= 1e-5
        caches = {name: np.array(np.from_dlpack(results[1 + i])) for i, name in enumerate("kv")}
        assert np.abs(caches["k"] - found["nk"]).max() == 0.0
        tensors = list(results[1:])


def test_one_tensor_for_two_caches_is_refused(step: runtime.Model) -> None:
    given = feeds([1], 0)
    names = [record["name"] for record in step.inputs]
    placed = dict(zip(names, step.place(given), strict=True))
    placed["v"] = placed["k"]
    with pytest.raises(runtime.ArtifactError, match="written in place and shares memory"):
        step.invoke([placed[name] for name in names])
    found = step.run({**given, "v": given["k"]})  # arrays are copied first
    assert np.abs(found["y"] - wanted({**given, "v": given["k"]})["y"]).max() <= 1e-5


def test_a_cache_with_gaps_is_refused_by_name(step: runtime.Model) -> None:
    names = [record["name"] for record in step.inputs]
    placed = dict(zip(names, step.place(feeds([1], 0)), strict=True))
    placed["k"] = np.zeros((1, HEADS, ROOM + 2, DEPTH), np.float32)[:, :, :ROOM]
    with pytest.raises(runtime.ArtifactError, match="input 'k' is not contiguous"):
        step.invoke([placed[name] for name in names])


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize(
    "node",
    [
        "n = TensorScatter (c, u, i)",
        'n = TensorScatter <mode = "circular"> (c, u, i)',
        "n = ScatterElements <axis = 1> (c, at, u)",
        "j = Unsqueeze (z, z) r = Reshape (u, four) n = ScatterND (c, j2, r)",
    ],
    ids=["linear", "circular", "elements", "nd"],
)
def test_what_alone_reads_an_input_writes_into_it(node: str, on_gpu: bool) -> None:
    inputs = ", int64[1, 1, 4] at, int64[1, 2] j2, int64[2] four, int64[1] z"
    text = scatter("", inputs, "", node).replace("j = Unsqueeze (z, z) ", "")
    assert lowered(text, on_gpu=on_gpu).in_place == (("n", "c"),)


@pytest.mark.parametrize(
    "text",
    [
        scatter("m = Neg (c)", outputs=", float[1, 8, 4] m"),
        scatter("d = Identity (c)", outputs=", float[1, 8, 4] d"),
        scatter("", outputs=", float[1, 8, 4] c"),
        scatter("", node="b = Neg (c) n = TensorScatter (b, u, i)"),
        scatter("", node="b = TensorScatter (c, u, i) n = Neg (b)"),
        scatter("", node="t = Gather <axis = 1> (c, i) n = TensorScatter (c, t, i)"),
        scatter(
            "",
            ", int64[1, 1, 4] at",
            node='n = ScatterElements <axis = 1, reduction = "add"> (c, at, u)',
        ),
    ],
    ids=[
        "another reader",
        "copied out",
        "given out",
        "computed",
        "not given out",
        "reads itself",
        "adds",
    ],
)
def test_everything_else_is_copied(text: str) -> None:
    assert lowered(text).in_place == ()


@pytest.mark.parametrize("view", ["Identity (n)", "Reshape (n, shape)", "Squeeze (n, zero)"])
def test_what_else_is_given_out_of_it_has_memory_of_its_own(view: str, tmp_path: Path) -> None:
    """A view of the cache would change with the next call."""
    text = scatter(f"m = {view}", ", int64[2] shape, int64[1] zero", ", float[a, d] m").replace(
        "[a, d]", "[1, 8, 4]" if "Identity" in view else "[8, 4]"
    )
    made = model(text)
    TvmArtifact(made, machine("avx2")).write(tmp_path)
    loaded = runtime.load(tmp_path)
    assert loaded.in_place == {"n": "c"}
    rng = np.random.default_rng(0)
    given = {
        "c": rng.standard_normal((1, 8, 4), np.float32),
        "u": rng.standard_normal((1, 1, 4), np.float32),
        "i": np.array([2]),
        "shape": np.array([8, 4]),
        "zero": np.array([0]),
    }
    names = [record["name"] for record in loaded.inputs]
    placed = loaded.place({name: given[name] for name in names})
    n, m = (np.from_dlpack(result) for result in loaded.invoke(placed))
    assert np.shares_memory(n, np.from_dlpack(placed[names.index("c")]))
    assert not np.shares_memory(n, m)
    changed = given["c"].copy()
    changed[0, 2] = given["u"][0, 0]
    assert np.array_equal(n, changed) and np.array_equal(m.reshape(n.shape), changed)


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize(
    "text",
    [
        """g (float16[1, s, 128] q, float16[1, s, 128] x, float16[1, 64, 128] k, float16[1, 64, 128] v,
              int64[1] first, int64[1] total)
             => (float16[1, s, 128] y, float16[1, 64, 128] nk, float16[1, 64, 128] nv)
        {
            nk = TensorScatter (k, x, first)
            nv = TensorScatter (v, x, first)
            y = Attention <is_causal = 1, q_num_heads = 2, kv_num_heads = 2> (q, nk, nv, , , , total)
        }""",
        """g (float16[1, 2, s, 64] q, float16[1, 2, s, 64] x, float16[1, 2, 64, 64] k,
              float16[1, 2, 64, 64] v, int64[1] first, float16[1, 1, s, 64] k0, float16[1, 1, s, 1] u)
             => (float16[1, 2, s, 64] y, float16[1, 2, 64, 64] nk, float16[1, 1, s, 64] nm)
        {
            nk = TensorScatter <axis = 2> (k, x, first)
            nm = TensorScatter <axis = 3> (k0, u, first)
            y = Attention (q, nk, v, nm)
        }""",
        """g (float16[1, 2, s, 64] q, float16[1, 2, s, 64] x, float16[1, 2, 64, 64] k, int64[1] first,
              int64[1] total)
             => (float16[1, 2, s, 64] y, float16[1, 2, s, 64] z, float16[1, 2, 64, 64] nk)
        {
            nk = TensorScatter <axis = 2> (k, x, first)
            y = Attention <is_causal = 1> (q, nk, nk, , , , total)
            z = Attention <is_causal = 1> (y, nk, nk, , , , total)
        }""",
    ],
    ids=["packed heads", "a mask", "keys that are values, twice"],
)
def test_attention_takes_caches_written_in_place(text: str, on_gpu: bool) -> None:
    made = lowered(f'<ir_version: 12, opset_import: ["" : 25]> {text}', on_gpu=on_gpu)
    assert ("nk", "k") in made.in_place


def test_on_a_gpu_both_caches_and_the_queries_are_one_launch() -> None:
    """Keys and queries are turned, so that none of the three is in memory before."""
    text = """
        <ir_version: 12, opset_import: ["" : 25]>
        g (float16[1, 4, s, 64] q, float16[1, 4, s, 64] x, float16[1, 4, s, 64] w, float16[1, 4, 64, 64] k,
           float16[1, 4, 64, 64] v, float16[64, 32] cos, float16[64, 32] sin, int64[1, s] at, int64[1] first,
           int64[1] total)
          => (float16[1, 4, s, 64] y, float16[1, 4, 64, 64] nk, float16[1, 4, 64, 64] nv)
        {
            eq = RotaryEmbedding (q, cos, sin, at)
            ex = RotaryEmbedding (x, cos, sin, at)
            nk = TensorScatter <axis = 2> (k, ex, first)
            nv = TensorScatter <axis = 2> (v, w, first)
            y = Attention <is_causal = 1> (eq, nk, nv, , , , total)
        }
        """
    made = lowered(text, on_gpu=True)
    assert made.in_place == (("nk", "k"), ("nv", "v"))
    assert made.kernels == 2  # the three, and attention
