"""GPTQ where a weight's rows have inputs of their own: convolutions and stacked experts, against numpy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from netlathe.execute import ort
from netlathe.ir import normal
from netlathe.passes.quantize import Quantize, gptq
from netlathe.passes.quantize.scheme import Scheme
from netlathe.pipeline.ledger import Entry
from netlathe.pipeline.pass_ import Context, Feeds
from tests.ir.onnx_text import matrix, model

Array = np.ndarray[Any, np.dtype[Any]]
INT4: dict[str, Any] = {"min_size": 0, "weights": "int4", "solver": "gptq"}


def settled(inputs: str, body: str, **constants: Any) -> ir.Model:
    made = model(inputs, "float y", body, **constants)
    normal.normalize(made)
    return made


def solved(made: ir.Model, data: Sequence[Feeds], pass_: Quantize) -> dict[str, Entry]:
    """Quantize; ONNX Runtime must read what the reference holds, bit for bit."""
    chosen = pass_.choose(made, Context(calibration=data))
    after = made.clone()
    pass_.edit(after, chosen, Context())
    normal.normalize(after)
    reference = pass_.simulate(made.clone(), chosen).model
    fed = dict(data[0])
    assert np.array_equal(ort.run(after, fed)["y"], ort.run(reference, fed)["y"])
    return {entry.candidate: entry for entry in chosen}


def expect(entry: Entry, w: Array, x: Array, rows: slice = slice(None)) -> None:
    """The codes of some rows of a matrix [rows, columns] are those for inputs ``x`` [samples, columns]."""
    s, z = (
        entry.arrays[key].reshape(len(entry_rows(entry)), -1)[rows] for key in ("scales", "zeros")
    )
    h = x.astype(np.float64).T @ x.astype(np.float64) / len(x)
    wanted = gptq.solve(
        w.astype(np.float64),
        h,
        s,
        z,
        Scheme(weights="int4"),
        damping=0.01,
        act_order=True,
        sweeps=0,
    )
    # Sums in another order may move a number across the middle of two codes, and its row with it.
    same = (entry_rows(entry)[rows] == wanted.codes).all(1).mean()
    assert same >= 0.9


def entry_rows(entry: Entry) -> Array:
    """Codes as [rows, columns], outputs being the first axis of a convolution or the last but one."""
    codes = entry.arrays["codes"]
    return (
        codes.reshape(codes.shape[0], -1) if codes.ndim != 3 else codes.reshape(-1, codes.shape[-1])
    )


@pytest.mark.parametrize("group_size", [0, 8])
@pytest.mark.parametrize(
    ("groups", "attributes"),
    [
        (1, "pads = [1, 1, 1, 1]"),
        (1, "strides = [2, 2], dilations = [2, 1]"),
        (2, "pads = [0, 1, 0, 1]"),
    ],
)
def test_convolutions(groups: int, attributes: str, group_size: int) -> None:
    w = matrix(12, 8 // groups, 2, 2)
    body = f"y = Conv <group = {groups}, {attributes}> (x, w)"
    made = settled("float[b,8,9,9] x", body, w=w)
    data = [{"x": matrix(2, 8, 9, 9, seed=i)} for i in range(3)]
    entry = solved(made, data, Quantize(group_size=group_size, **INT4))["w"]
    assert "gptq" in entry.reason and entry.detail["error"] < 0.02
    (node,) = made.graph
    pads = node.attributes.get_ints("pads") or (0, 0, 0, 0)
    for part in range(groups):
        own = slice(part * 8 // groups, (part + 1) * 8 // groups)
        x = torch.tensor(np.concatenate([f["x"] for f in data]))[:, own]
        x = torch.nn.functional.pad(x, (pads[1], pads[3], pads[0], pads[2]))
        patches = torch.nn.functional.unfold(
            x,
            (2, 2),
            dilation=tuple(node.attributes.get_ints("dilations") or (1, 1)),
            stride=tuple(node.attributes.get_ints("strides") or (1, 1)),
        )
        rows = slice(part * 12 // groups, (part + 1) * 12 // groups)
        flat = patches.permute(0, 2, 1).reshape(-1, patches.shape[1]).numpy()
        expect(entry, w.reshape(12, -1)[rows], flat, rows)


def test_depthwise_and_pointwise() -> None:
    body = "h = Conv <group = 8, pads = [1, 1, 1, 1]> (x, d) y = Conv (h, p)"
    made = settled("float[b,8,6,6] x", body, d=matrix(8, 1, 3, 3), p=matrix(6, 8, 1, 1, seed=1))
    data = [{"x": matrix(2, 8, 6, 6, seed=i)} for i in range(2)]
    found = solved(made, data, Quantize(**INT4))
    assert all("gptq" in entry.reason for entry in found.values())
    # Once more with groups: 8 divide the one and not the other's 9 elements.
    found = solved(made, data, Quantize(group_size=8, **INT4))
    assert found["d"].status == "skipped" and "gptq" in found["p"].reason


def test_gptq_beats_nearest_for_convolutions() -> None:
    made = settled("float[b,8,9,9] x", "y = Conv (x, w)", w=matrix(12, 8, 3, 3))
    mixed = [matrix(2, 8, 9, 9, seed=i) for i in range(3)]
    data: list[Feeds] = [{"x": m + 2 * m.mean(1, keepdims=True)} for m in mixed]
    lost = {}
    for solver in ("rtn", "gptq"):
        pass_ = Quantize(min_size=0, weights="int3", solver=solver)  # type: ignore[arg-type]
        chosen = pass_.choose(made, Context(calibration=data))
        after = made.clone()
        pass_.edit(after, chosen, Context())
        fed = dict(data[0])
        lost[solver] = float(np.square(ort.run(after, fed)["y"] - ort.run(made, fed)["y"]).mean())
    assert lost["gptq"] < 0.8 * lost["rtn"]


ROUTED = {
    "left": "g = GatherND (w, i) y = MatMul (g, x)",  # [n, out, in] @ [n, in, 1]
    "right": "g = Gather (w, i) y = MatMul (x, g)",  # [n, 1, in] @ [n, in, out]
}


@pytest.mark.parametrize("group_size", [0, 8])
@pytest.mark.parametrize("side", sorted(ROUTED))
def test_experts_are_solved_on_what_is_routed_to_them(side: str, group_size: int) -> None:
    w = matrix(4, 12, 16)
    stored = w if side == "left" else np.ascontiguousarray(w.transpose(0, 2, 1))
    shape, index = ("n,16,1", "n,1") if side == "left" else ("n,1,16", "n")
    made = settled(f"float[{shape}] x, int64[{index}] i", ROUTED[side], w=stored)
    ids = [
        np.random.default_rng(s).integers(0, 3, 40) for s in range(3)
    ]  # the last is never chosen
    data = [
        {
            "x": matrix(40, 16, seed=s).reshape([40, 16, 1] if side == "left" else [40, 1, 16]),
            "i": chosen.reshape([40, 1] if side == "left" else [40]),
        }
        for s, chosen in enumerate(ids)
    ]
    entry = solved(made, data, Quantize(group_size=group_size, **INT4))["w"]
    assert "calibration data never reaches part 3 of 4: to nearest" in entry.reason
    assert entry.detail["unfed"] == [3]
    x = np.concatenate([d["x"].reshape(40, 16) for d in data])
    which = np.concatenate(ids)
    codes = entry.arrays["codes"]
    if side == "right":
        codes = codes.transpose(0, 2, 1)
    per = 16 // (group_size or 16)
    s, z = (entry.arrays[k].reshape(4, 12, per) for k in ("scales", "zeros"))
    for expert in range(3):
        rows = x[which == expert].astype(np.float64)
        wanted = gptq.solve(
            w[expert].astype(np.float64),
            rows.T @ rows / len(rows),
            s[expert],
            z[expert],
            Scheme(weights="int4"),
            damping=0.01,
            act_order=True,
            sweeps=0,
        )
        assert (codes[expert] == wanted.codes).all(1).mean() >= 0.9
    wide = np.repeat(s[3], 16 // per, 1)
    assert np.array_equal(codes[3], np.clip(np.rint(w[3] / wide), -8, 7))


def test_stacks_without_an_index() -> None:
    w = matrix(3, 16, 12)
    made = settled("float[3,t,16] x", "y = MatMul (x, w)", w=w)
    data: list[Feeds] = [{"x": matrix(3, 30, 16, seed=s)} for s in range(3)]
    entry = solved(made, data, Quantize(**INT4))["w"]
    codes = entry.arrays["codes"].transpose(0, 2, 1)
    s, z = (entry.arrays[k].reshape(3, 12, 1) for k in ("scales", "zeros"))
    for expert in range(3):
        rows = np.concatenate([f["x"][expert] for f in data]).astype(np.float64)
        moment = rows.T @ rows / len(rows)
        scheme = Scheme(weights="int4")
        wanted = gptq.solve(
            w[expert].T.astype(np.float64), moment, s[expert], z[expert], scheme,
            damping=0.01, act_order=True, sweeps=0,
        )  # fmt: skip
        assert (codes[expert] == wanted.codes).all(1).mean() >= 0.9
    shared = settled("float[t,16] x", "y = MatMul (x, w)", w=w)
    assert "gptq" in solved(shared, [{"x": matrix(30, 16, seed=4)}], Quantize(**INT4))["w"].reason


def test_an_input_that_is_always_zero() -> None:
    body = "z = Mul (x, zero) y = MatMul (z, w)"
    made = settled("float[t,16] x", body, w=matrix(16, 8), zero=np.zeros(1, np.float32))
    entry = solved(made, [{"x": matrix(30, 16)}], Quantize(**INT4))["w"]
    assert "its input is always 0: to nearest" in entry.reason
