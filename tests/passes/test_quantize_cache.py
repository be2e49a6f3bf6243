"""The key-value cache in 8 and 4 bits: codes against numpy, and greedy text in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from netlathe.backends.onnx_file import OnnxBackend, run_file
from netlathe.diagnostics import PassError
from netlathe.execute import ort
from netlathe.execute.executor import Executor
from netlathe.frontends.huggingface import HuggingFaceDirectory
from netlathe.ir import coded, normal, verify
from netlathe.ir.coded import Coding
from netlathe.passes.quantize_cache import QuantizeCache
from netlathe.pipeline.interfaces import Captured
from netlathe.pipeline.pass_ import Context
from netlathe.pipeline.run import run
from tests import zoo
from tests.ir.onnx_text import model

Array = np.ndarray[Any, np.dtype[Any]]
BODY = "present = Concat <axis=2> (past, new) y = Neg (present)"
INPUTS = "float[b,2,p,16] past, float[b,2,s,16] new"
CODES: Any = {8: "int8", 4: "int4"}
EVERY = [(bits, scales) for bits in (8, 4) for scales in ("float16", "float32")]


def settled(
    inputs: str = INPUTS, body: str = BODY, outputs: str = "float y, float present"
) -> ir.Model:
    made = model(inputs, outputs, body)
    normal.normalize(made)
    return made


def edited(before: ir.Model, **options: Any) -> ir.Model:
    pass_, after = QuantizeCache(**options), before.clone()
    pass_.edit(after, pass_.choose(before, Context()), Context())
    normal.normalize(after)
    assert verify.verify(after) == []
    return after


def data(*lengths: int, seed: int = 0) -> list[Array]:
    rng = np.random.default_rng(seed)
    made = [rng.standard_normal((2, 2, n, 16)).astype(np.float32) ** 3 for n in lengths]
    for x in made:
        if x.shape[2] > 2:
            x[0, 0, 1] = 0  # a vector of zeros
            x[1, 1, 2] = np.abs(x[1, 1, 2]) + 1  # one that does not reach zero
    return made


# -- the codes ----------------------------------------------------------------------------------------


def by_hand(x: Array, bits: int, scales: str) -> tuple[list[Array], Array]:
    """What is stored of x, one vector after the other, and what it is read as."""
    stored: list[list[Any]] = [[], [], []]
    read = np.empty(x.shape, np.float32)
    kind = np.dtype(scales).type
    least = np.float32(2.0**-24 if scales == "float16" else 2.0**-120)
    for at in np.ndindex(x.shape[:-1]):
        v = x[at]
        if bits == 8:
            s = kind(max(np.float32(np.abs(v).max()) / np.float32(127), least))
            z = 0.0
            q = np.clip(np.rint(v / np.float32(s)), -128, 127)
            stored[0].append(q.astype(np.int8))
        else:
            low, high = min(v.min(), np.float32(0)), max(v.max(), np.float32(0))
            s = kind(max((high - low) / np.float32(15), least))
            z = float(np.clip(np.rint(-low / np.float32(s)), 0, 15))
            q = np.clip(np.rint(v / np.float32(s)) + z, 0, 15)
            halves = q.astype(int)[:8], q.astype(int)[8:]
            stored[0].append(np.array([a + 16 * b for a, b in zip(*halves, strict=True)], np.uint8))
        stored[1].append([s])
        stored[2].append([np.uint8(z)])
        read[at] = (q - z).astype(np.float32) * np.float32(s)
    found = [np.array(part).reshape(*x.shape[:-1], -1) for part in stored]
    return found if bits == 4 else found[:2], read


@pytest.mark.parametrize("bits, scales", EVERY)
def test_codes_are_those_by_hand(bits: Any, scales: Any) -> None:
    after = edited(settled(), codes=f"int{bits}", scales=scales)
    past, new = data(3, 5)
    (old, _), (fresh, _) = by_hand(past, bits, scales), by_hand(new, bits, scales)
    names = ["past", "past.scale", "past.zero_point"][: len(old)]
    fed = {**dict(zip(names, old, strict=True)), "new": new}
    assert [v.name for v in after.graph.inputs] == [*names, "new"]
    for got in (ort.run(after, fed), {k: v.numpy() for k, v in Executor(after).run(fed).items()}):
        for name, a, b in zip(names, old, fresh, strict=True):
            joined = got[name.replace("past", "present")]
            assert joined.dtype == a.dtype
            assert np.array_equal(joined, np.concatenate([a, b], 2))
        _, both = by_hand(np.concatenate([past, new], 2), bits, scales)
        assert np.array_equal(got["y"], -both)


@pytest.mark.parametrize("bits, scales", EVERY)
def test_the_coder_of_feeds_is_the_same(bits: Any, scales: Any) -> None:
    how = Coding("int8" if bits == 8 else "int4", scales, "s", "z" if bits == 4 else "")
    (x,) = data(5)
    stored, read = by_hand(x, bits, scales)
    made = coded.encode(x, how)
    for a, b in zip(made, stored, strict=True):
        assert a.dtype == b.dtype and np.array_equal(a, b)
    assert np.array_equal(coded.decode(*made), read)
    step = np.asarray(stored[1], np.float32)
    assert (np.abs(read - x) <= step * (0.5 if bits == 8 else 1.0) + 2.0**-10 * np.abs(x)).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_the_manager_checks_it(bits: Any) -> None:
    made = settled("float[batch,2,p,16] past, float[batch,2,s,16] new")
    sizes = {"batch": 1, "p": 3, "s": 2}

    def sample(sizes: Any, seed: int) -> dict[str, Array]:
        rng = np.random.default_rng(seed)
        of = {"past": sizes["p"], "new": sizes["s"]}
        shapes = {n: (sizes["batch"], 2, length, 16) for n, length in of.items()}
        return {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}

    captured = Captured(made, "made", "text", sizes, sample)
    done = run(captured, [QuantizeCache(codes=CODES[bits])], Context())
    (step,) = done.steps
    assert step.check.error == 0.0 and step.check.against == "simulated reference"
    assert step.changed


# -- what is none, and what cannot be -------------------------------------------------------------------


@pytest.mark.parametrize(
    "inputs, body, options, status, why",
    [
        (
            INPUTS,
            "present = Concat <axis=2> (new, past) y = Neg (present)",
            {},
            "skipped",
            "no cache",
        ),
        (INPUTS, BODY + " z = Abs (past)", {}, "refused", "Abs z reads it as well"),
        (INPUTS.replace("16", "15"), BODY, {"codes": "int4"}, "refused", "no whole bytes"),
        (INPUTS, BODY.replace("axis=2", "axis=3"), {}, "refused", "along the axis that shares"),
        (INPUTS.replace("float[", "double["), BODY, {}, "refused", "double: only float32"),
        (INPUTS, BODY + " z = Shape (past)", {"codes": "int4"}, "refused", "asks for its width"),
    ],
)
def test_what_stays_as_it_is(
    inputs: str, body: str, options: dict[str, Any], status: str, why: str
) -> None:
    kind = "double" if "double" in inputs else "float"
    outputs = f"{kind} y, {kind} present" + (", float z" if "z = Abs" in body else "")
    outputs += ", int64[4] z" if "z = Shape" in body else ""
    before = settled(inputs, body, outputs)
    entries = {e.candidate: e for e in QuantizeCache(**options).choose(before, Context())}
    assert entries["past"].status == status and why in entries["past"].reason


def test_the_ledger_counts_bytes() -> None:
    found = {e.candidate: e for e in QuantizeCache(codes="int4").choose(settled(), Context())}
    assert "11 bytes for 64, here and in present" in found["past"].reason
    assert (found["new"].status, found["new"].left_out) == ("skipped", True)
    with pytest.raises(PassError, match="matches no input"):
        QuantizeCache(ignore=("layers.0",)).choose(settled(), Context())
    (kept, _) = QuantizeCache(ignore=("past",)).choose(settled(), Context())
    assert kept.left_out and "ignored" in kept.reason


# -- text ---------------------------------------------------------------------------------------------

STEPS = 12


def empty_cache(inputs: list[ir.Value], batch: int) -> dict[str, Array]:
    past = {}
    for value in inputs:
        if str(value.name).startswith("past"):
            assert value.shape is not None and value.dtype is not None
            dims = [batch, int(str(value.shape[1])), 0, int(str(value.shape[3]))]
            past[value.name or ""] = np.zeros(dims, value.dtype.numpy())
    return past


def generated(step: Any, inputs: list[ir.Value], ids: Array) -> tuple[Array, Array]:
    """Greedy text with ``step`` (feeds -> outputs), and the logits of each of its tokens."""
    past = empty_cache(inputs, len(ids))
    new, seen = ids, []
    for _ in range(STEPS):
        mask = np.ones((len(ids), ids.shape[1]), np.int64)
        got = step({"input_ids": new, "attention_mask": mask, **past})
        seen.append(got["logits"][:, -1])
        new = got["logits"][:, -1].argmax(-1, keepdims=True).astype(np.int64)
        ids = np.concatenate([ids, new], 1)
        past = {name: got[name.replace("past_key_values", "present")] for name in past}
    return ids, np.stack(seen, 1)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Captured:
    folder = tmp_path_factory.mktemp("llama")
    module: Any = zoo.build("llama").module
    module.config.use_cache = True
    torch.manual_seed(0)
    module.save_pretrained(folder)
    return HuggingFaceDirectory(cache=True).capture(folder)


@pytest.mark.parametrize("bits, far", [(8, 0.02), pytest.param(4, 0.3, marks=pytest.mark.slow)])
def test_generation(llama: Captured, tmp_path: Path, bits: Any, far: float) -> None:
    """Text from the file that is written, in ONNX Runtime; it is that of the float reference."""
    pass_ = QuantizeCache(codes=CODES[bits])
    done = run(llama, [pass_], Context())
    assert done.steps[0].check.error is not None
    assert {e.status for e in done.steps[0].entries} == {"applied"}
    artifact = OnnxBackend().compile(done.model, OnnxBackend.targets()[0])
    artifact.sample = None
    artifact.save(tmp_path)
    session = ort.Session(ir.load(tmp_path / "model.onnx"))
    inputs = list(done.model.graph.inputs)
    ids = np.array([[5, 17, 99, 23], [7, 3, 64, 120]])
    text, logits = generated(session.run, inputs, ids)
    chosen = pass_.choose(llama.model, Context())
    reference = ort.Session(pass_.simulate(llama.model.clone(), chosen).model)
    wanted, same = generated(reference.run, list(llama.model.graph.inputs), ids)
    # The reference rounds its past anew in every step, which of int8 changes nothing.
    steps = slice(None) if bits == 8 else slice(1)
    assert np.array_equal(text[:, : 4 + STEPS if bits == 8 else 5][:, 4:], wanted[:, 4:][:, steps])
    assert np.abs(logits - same)[:, steps].max() <= 1e-4 * np.abs(same).max()
    dense = ort.Session(llama.model)
    _, floats = generated(dense.run, list(llama.model.graph.inputs), ids)
    error = np.sqrt(
        np.square(logits[:, :4] - floats[:, :4]).mean() / np.square(floats[:, :4]).mean()
    )
    assert error <= far
    # With optimizations, as a user runs it: the whole prompt at once and by parts give the same cache.
    mask = np.ones((2, 4), np.int64)
    empty = empty_cache(inputs, 2)
    whole = run_file(
        tmp_path / "model.onnx",
        {"input_ids": ids, "attention_mask": mask, **empty},
        optimize=True,
        exact=False,
    )
    first = session.run({"input_ids": ids[:, :2], "attention_mask": mask[:, :2], **empty})
    past = {n: first[n.replace("past_key_values", "present")] for n in empty}
    rest = session.run({"input_ids": ids[:, 2:], "attention_mask": mask, **past})
    key = np.abs(whole["present.0.key"].astype(int) - rest["present.0.key"].astype(int))
    assert key.max() <= 1 or bits == 4  # a packed byte holds two codes
    assert np.mean(key > 0) <= 0.01
