"""What goes wrong in practice: refused with a reason, or done as asked; and runs that were killed."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import netlathe
from netlathe.execute import ort
from netlathe.execute.compare import inputs_of, relative_error
from netlathe.ir import normal, verify, weights
from netlathe.passes.quantize import Quantize
from netlathe.pipeline.ledger import Entry
from netlathe.pipeline.pass_ import Context
from netlathe.pipeline.registry import find_target
from tests import zoo_ir
from tests.ir.onnx_text import matrix, model

Array = np.ndarray[Any, np.dtype[Any]]


def settled(inputs: str, body: str, **constants: Any) -> ir.Model:
    made = model(inputs, "float y", body, **constants)
    normal.normalize(made)
    return made


def quantized(before: ir.Model, pass_: Quantize, ctx: Context) -> tuple[ir.Model, list[Entry]]:
    chosen = pass_.choose(before, ctx)
    after = before.clone()
    pass_.edit(after, chosen, ctx)
    normal.normalize(after)
    assert verify.verify(after) == []
    return after, chosen


# -- quantized already ------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["int8", "int4", "int3", "nf4", "float16", "float8e4m3fn"])
def test_codes_are_quantized_again_where_asked_for(first: Any) -> None:
    body = "a = MatMul (x, w) r = Relu (a) y = MatMul (r, v)"
    before = settled("float[b,s,32] x", body, w=matrix(32, 48), v=matrix(48, 16, seed=1))
    ctx = Context(calibration=[{"x": matrix(2, 40, 32, seed=2)}])
    once, _ = quantized(before, Quantize(min_size=0, weights=first), ctx)
    fed = {"x": matrix(2, 7, 32, seed=3)}
    plain = Quantize(min_size=0, weights="int4", group_size=16, solver="gptq")
    assert {e.status for e in plain.choose(once, ctx)} <= {"refused", "applied", "skipped"}
    again = Quantize(min_size=0, weights="int4", group_size=16, solver="gptq", requantize=True)
    twice, chosen = quantized(once, again, ctx)
    assert {e.candidate: e.status for e in chosen} == {"w": "applied", "v": "applied"}
    expected = ort.run(again.simulate(once.clone(), chosen).model, fed)["y"]
    assert np.array_equal(ort.run(twice, fed)["y"], expected)
    # The same as if the model had held these floats from the start.
    floats = before.clone()
    for name in ("w", "v"):
        value = next(v for n in once.graph for v in n.outputs if v.name == name)
        probe = once.clone()
        probe.graph.outputs.append(
            next(v for n in probe.graph for v in n.outputs if v.name == name)
        )
        floats.graph.initializers[name].const_value = ir.tensor(ort.run(probe, fed)[name])
        assert value.name == name
    assert [e.to_json() for e in plain.choose(floats, ctx)] == [e.to_json() for e in chosen]


def test_nothing_is_quantized_again_unasked() -> None:
    before = settled("float[b,s,32] x", "y = MatMul (x, w)", w=matrix(32, 48))
    once, _ = quantized(before, Quantize(min_size=0, weights="int4"), Context())
    (entry,) = Quantize(min_size=0).choose(once, Context())
    assert (entry.status, entry.reason) == ("refused", "INT4: quantized already")


# -- weights and data -------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["rtn", "gptq"])
@pytest.mark.parametrize("weights_", ["int4", "int3", "nf4", "codebook2", "float4e2m1"])
def test_channels_of_zeros_stay_zero(weights_: Any, solver: Any) -> None:
    w = matrix(32, 8)
    w[:, 3] = 0
    before = settled("float[b,s,32] x", "y = MatMul (x, w)", w=w)
    fed = {"x": matrix(2, 40, 32, seed=2)}
    pass_ = Quantize(min_size=0, weights=weights_, solver=solver, clip="mse", group_size=16)
    after, _ = quantized(before, pass_, Context(calibration=[fed]))
    output = ort.run(after, fed)["y"]
    assert (output[..., 3] == 0).all() and np.isfinite(output).all() and output[..., 2].any()


@pytest.mark.parametrize("solver", ["rtn", "gptq"])
def test_channels_that_are_not_finite_are_refused(solver: Any) -> None:
    w = matrix(32, 8)
    w[4, 3] = np.nan
    body = "a = MatMul (x, w) y = MatMul (a, v)"
    before = settled("float[b,s,32] x", body, w=w, v=matrix(8, 8))
    ctx = Context(calibration=[{"x": matrix(2, 40, 32, seed=2)}])
    if solver == "gptq":
        with pytest.raises(netlathe.PassError, match="a is not finite in calibration sample 0"):
            Quantize(min_size=0, solver=solver).choose(before, ctx)
        return
    first, second = Quantize(min_size=0).choose(before, ctx)
    assert (first.status, first.reason) == ("refused", "it holds NaN or infinity")
    assert second.status == "applied"


def test_singular_inputs_are_damped_and_the_ledger_says_so() -> None:
    before = settled("float[b,s,32] x", "y = MatMul (x, w)", w=matrix(32, 8))
    x = np.repeat(matrix(2, 40, 4, seed=2), 8, axis=-1)  # of 32 inputs 4 are different
    pass_ = Quantize(min_size=0, weights="int4", solver="gptq", damping=1e-30)
    after, (entry,) = quantized(before, pass_, Context(calibration=[{"x": x}]))
    assert "damped by" in entry.reason and "singular" in entry.reason
    assert 1e-30 < entry.detail["damping"] <= 1 and np.isfinite(ort.run(after, {"x": x})["y"]).all()


def test_data_that_never_reaches_a_layer() -> None:
    body = "z = Mul (x, none) a = MatMul (z, w) y = MatMul (x, v)"
    held = {"w": matrix(16, 8), "v": matrix(16, 8, seed=1), "none": np.zeros(1, np.float32)}
    before = model("float[t,16] x", "float a, float y", body, **held)
    normal.normalize(before)
    ctx = Context(calibration=[{"x": matrix(30, 16)}])
    *solved, left = Quantize(min_size=0, weights="int4", solver="gptq").choose(before, ctx)
    assert [entry.status for entry in solved] == ["applied", "applied"]
    assert "its input is always 0: to nearest" in solved[0].reason
    assert (left.status, left.left_out) == ("skipped", False), "strictness objects"
    assert left.candidate == "solver='gptq' of w"
    captured = netlathe.Captured(
        before, "before", "onnx", {}, lambda sizes, seed: ctx.calibration[0]
    )
    with pytest.raises(netlathe.GateError, match="skipped solver='gptq' of w"):
        netlathe.compile(
            captured,
            [Quantize(min_size=0, weights="int4", solver="gptq")],
            calibration=ctx.calibration,
            strict=True,
        )
    for form in ("integer", "qdq"):
        with pytest.raises(
            netlathe.PassError, match="calibration data never reaches z: it is always 0"
        ):
            Quantize(min_size=0, activations="int8", activation_form=form).choose(before, ctx)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["integer", "qdq"])
@pytest.mark.parametrize("how", ["minmax", "mse"])
def test_a_signal_of_any_length_has_a_range(form: Any, how: Any) -> None:
    """[batch, channels, length]: what comes last has no fixed size."""
    body = "a = Conv (x, v) r = Relu (a) y = Conv (r, w)"
    before = settled("float[b,4,n] x", body, v=matrix(8, 4, 3), w=matrix(8, 8, 3, seed=1))
    fed = {"x": matrix(3, 4, 40)}
    pass_ = Quantize(min_size=0, activations="int8", activation_form=form, activation_range=how)
    after, _ = quantized(before, pass_, Context(calibration=[fed]))
    assert relative_error(ort.run(after, fed)["y"], ort.run(before, fed)["y"]) < 0.1


@pytest.mark.parametrize("form", ["integer", "qdq"])
def test_a_state_that_starts_from_zeros_is_no_lack_of_data(form: Any) -> None:
    body = (
        "d = Shape <start=0, end=1> (x) e = Concat <axis=0> (d, width) h = ConstantOfShape (e)"
        " a = MatMul (h, w) b = MatMul (x, v) c = Add (a, b) t = Tanh (c) y = MatMul (t, w)"
    )
    before = settled("float[b,8] x", body, w=matrix(16, 16), v=matrix(8, 16), width=[16])
    fed = {"x": matrix(30, 8)}
    pass_ = Quantize(min_size=0, activations="int8", activation_form=form)
    after, _ = quantized(before, pass_, Context(calibration=[fed]))
    error = relative_error(ort.run(after, fed)["y"], ort.run(before, fed)["y"])
    assert error < 0.1


@pytest.mark.parametrize(
    "target, settings, options, says",
    [
        ("onnx", {"opset": 20}, {"weights": "mxfp4"}, "cannot hold mxfp4: a tensor of float4e2m1"),
        (
            "onnx",
            {"opset": 23},
            {"weights": "mxfp4"},
            "does not take tensor.float8e8m0. at opset 23",
        ),
        ("onnx-ort", {"opset": 18}, {"weights": "float8e5m2"}, "float8e5m2 cannot exist"),
        ("onnx", {"opset": 22}, {"overrides": {"v": {"weights": "nvfp4"}}}, "cannot hold nvfp4"),
        (
            "onnx",
            {"opset": 18},
            {
                "activations": "float8e4m3fn",
                "weights": "float8e4m3fn",
                "activation_form": "qdq",
            },
            "float8e4m3fn cannot exist",
        ),
    ],
)
def test_what_a_target_cannot_hold_is_refused_before_work_starts(
    target: str, settings: dict[str, Any], options: dict[str, Any], says: str
) -> None:
    before = settled(
        "float[b,32] x", "h = MatMul (x, w) y = MatMul (h, v)", w=matrix(32, 32), v=matrix(32, 32)
    )
    made = find_target(target, **settings)[1]
    with pytest.raises(netlathe.OptionError, match=says):  # no data is asked for
        Quantize(min_size=0, solver="gptq", **options).choose(before, Context(target=made))
    newer = find_target(target, opset=24)[1]
    ctx = Context(target=newer, calibration=[{"x": matrix(40, 32)}])
    assert {e.status for e in Quantize(min_size=0, **options).choose(before, ctx)} == {"applied"}


def test_a_tied_table_is_quantized_from_both_sides_or_from_none() -> None:
    """An override or an exception for the head holds for the table, which is the same weight."""
    body = "e = Gather (w, i) t = Transpose <perm = [1, 0]> (w) y = MatMul (e, t)"
    before = settled("int64[b,s] i", body, w=matrix(64, 32))
    fed = {"i": np.arange(12).reshape(2, 6)}
    skipped = Quantize(min_size=0, embeddings=False).choose(before, Context())
    assert skipped[0].status == "skipped" and "tied to a product" in skipped[0].reason
    after, (entry,) = quantized(before, Quantize(min_size=0), Context())
    assert "shared by y, e" in entry.reason
    held = [v for v in after.graph.initializers.values() if v.dtype == ir.DataType.INT8]
    assert len(held) == 1, "stored once"
    moved = ort.run(after, fed)["y"] - ort.run(before, fed)["y"]
    assert 0 < np.abs(moved).max() < 1


def test_groups_that_pruning_made_ragged(tmp_path: Path) -> None:
    body = "a = MatMul (x, w) r = Relu (a) y = MatMul (r, v)"
    made = settled("float[b,s,32] x", body, w=matrix(32, 64), v=matrix(64, 32, seed=1))
    ir.save(made, tmp_path / "model.onnx")
    pipeline = (
        "prune(ratio=0.3, round_to=1, score='l2', compensate='none'),"
        " quantize(min_size=0, group_size=32)"
    )
    steps = netlathe.compile(tmp_path / "model.onnx", pipeline).steps
    by_name = {entry.candidate: entry for entry in steps[-1].entries}
    assert by_name["w"].status == "applied" and by_name["v"].status == "skipped"
    assert "groups of 32 do not divide the 45 elements that are summed over" in by_name["v"].reason
    with pytest.raises(netlathe.GateError, match=r"min_coverage=0\.9 asks for"):
        netlathe.compile(tmp_path / "model.onnx", pipeline[:-1] + ", min_coverage=0.9)")
    with pytest.raises(netlathe.GateError, match="skipped v: groups of 32"):
        netlathe.compile(tmp_path / "model.onnx", pipeline, strict=True)


# -- killed, and the same again ---------------------------------------------------------------------

SCRIPT = """
    import os, signal, sys
    import numpy as np
    import netlathe
    from netlathe.pipeline.pass_ import SilentProgress

    class Killing(SilentProgress):
        def track(self, items, description, total=None):
            for number, item in enumerate(items):
                if description == "solving" and number == 2:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield item

    data = [dict(np.load({data!r}))]
    netlathe.compile({model!r}, {passes!r}, calibration=data, cache_dir={cache!r}, progress=Killing())
"""


def test_a_killed_run_goes_on_at_the_weight_where_it_stopped(tmp_path: Path) -> None:
    names = ["a", "b", "c", "d"]
    body = "a_ = MatMul (x, wa) b_ = MatMul (a_, wb) c_ = MatMul (b_, wc) d_ = MatMul (c_, wd) "
    arrays = {f"w{n}": matrix(32, 32, seed=k) for k, n in enumerate(names)}
    made = settled("float[b,s,32] x", body + "y = Relu (d_)", **arrays)
    ir.save(made, tmp_path / "model.onnx")
    np.savez(tmp_path / "data.npz", x=matrix(2, 60, 32, seed=9))
    passes = "quantize(min_size=0, weights='int4', group_size=16, solver='gptq', sweeps=1)"
    text = textwrap.dedent(SCRIPT).format(
        data=str(tmp_path / "data.npz"),
        model=str(tmp_path / "model.onnx"),
        passes=passes,
        cache=str(tmp_path / "cache"),
    )
    done = subprocess.run([sys.executable, "-c", text], check=False)
    assert done.returncode == -signal.SIGKILL
    data = [dict(np.load(tmp_path / "data.npz"))]
    again = netlathe.compile(
        tmp_path / "model.onnx", passes, calibration=data, cache_dir=tmp_path / "cache"
    )
    (step,) = again.steps
    assert (step.pieces, step.recalled_pieces) == (4, 2)
    plain = netlathe.compile(tmp_path / "model.onnx", passes, calibration=data)
    (other,) = plain.steps
    assert [e.to_json() for e in step.entries] == [e.to_json() for e in other.entries]
    for name, value in plain.model.graph.initializers.items():
        twin = again.model.graph.initializers[name]
        assert value.const_value is not None and twin.const_value is not None
        assert twin.const_value.tobytes() == value.const_value.tobytes()


def test_the_global_random_state_is_left_alone() -> None:
    import torch

    before = zoo_ir.captured("llama")
    data = [inputs_of(before, fed) for fed in zoo_ir.feeds("llama")]
    torch.manual_seed(1)
    np.random.seed(1)  # that it is not touched
    states = torch.random.get_rng_state(), str(np.random.get_state())
    pass_ = Quantize(min_size=0, weights="int4", solver="gptq", low_rank=1, low_rank_basis="input")
    first = pass_.choose(before, Context(calibration=data))
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert str(np.random.get_state()) == states[1]
    again = pass_.choose(before, Context(calibration=data))
    assert [e.to_json() for e in first] == [e.to_json() for e in again]
    assert weights.num_bytes(before) > 0
