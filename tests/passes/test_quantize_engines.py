"""Which engine reads which scheme, and that all that do read the same weights, bit for bit.

One model holds a weight in every scheme; the table in docs/quantized-inference.md is held against what runs.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx.reference
import onnx_ir as ir
import onnxruntime
import pytest

from netlathe.backends import opset as opsets
from netlathe.backends.onnx_file import DIALECT, OnnxBackend
from netlathe.execute import ort
from netlathe.execute.executor import Executor
from netlathe.ir import coded, normal, weights
from netlathe.passes.quantize import Quantize
from netlathe.passes.quantize_cache import QuantizeCache
from netlathe.pipeline.pass_ import Context
from netlathe.pipeline.registry import find_target
from tests.ir.onnx_text import matrix, model

Array = np.ndarray[Any, np.dtype[Any]]
DOCS = Path(__file__).parents[2] / "docs" / "quantized-inference.md"

SCHEMES: dict[str, dict[str, Any]] = {
    "int8": {"weights": "int8"},
    "int4": {"weights": "int4"},
    "int6": {"weights": "int6"},
    "int5": {"weights": "int5"},
    "int3": {"weights": "int3"},
    "int2": {"weights": "int2"},
    "nf4": {"weights": "nf4"},
    "codebook4": {"weights": "codebook4"},
    "codebook3": {"weights": "codebook3"},
    "codebook2": {"weights": "codebook2"},
    "float8e4m3fn": {"weights": "float8e4m3fn"},
    "float8e5m2": {"weights": "float8e5m2"},
    "float4e2m1": {"weights": "float4e2m1"},
    "mxfp4": {"weights": "mxfp4"},
    "nvfp4": {"weights": "nvfp4"},
    "float16": {"weights": "float16"},
    "bfloat16": {"weights": "bfloat16"},
}
FIXED = ("mxfp4", "nvfp4", "float16", "bfloat16")  # no groups to choose
ENGINES = ("executor", "ORT", "ORT, optimized", "reference evaluator", "TVM")


def variants(name: str) -> list[dict[str, Any]]:
    """A scheme in every granularity and with zero points, where it has these."""
    base = SCHEMES[name]
    if name in FIXED:
        return [base]
    made = [base, {**base, "group_size": 16}, {**base, "per_tensor": True}]
    if name.startswith("int"):
        zeros = [{**one, "symmetric": False} for one in made]
        made += [*zeros, *({**one, "zeros": "float"} for one in zeros)]
    made.append({**base, "group_size": 8, "group_axis": "output"})
    made.append({**base, "group_size": 32, "scales": "float16"})
    if name.startswith("int"):
        made.append({**made[-1], "symmetric": False, "zeros": "float", "clip": "hqq"})
    return made


@lru_cache
def quantized(name: str) -> tuple[ir.Model, dict[str, Array]]:
    """A model whose outputs are the weights as they are read, and what they must be."""
    settings = variants(name)
    names = [f"w{i}" for i in range(len(settings))]
    body = " ".join(f"y{i} = MatMul (x, w{i})" for i in range(len(names)))
    held = {n: matrix(64, 24, seed=i) for i, n in enumerate(names)}
    outputs = ", ".join(f"float y{i}" for i in range(len(names)))
    made = model("float[b,64] x", outputs, body, **held)
    normal.normalize(made)
    overrides: Any = {
        n: {key: value for key, value in one.items() if key != "clip"}
        for n, one in zip(names, settings, strict=True)
    }
    pass_ = Quantize(min_size=0, overrides=overrides)
    chosen = pass_.choose(made, Context())
    reference = pass_.simulate(made.clone(), chosen).model
    wanted = {n: weights.array(reference.graph.initializers[n]) for n in names}
    pass_.edit(made, chosen, Context())
    normal.normalize(made)
    read = {v.name: v for node in made.graph for v in node.outputs}
    made.graph.outputs.extend(read[n] for n in names)
    return made, wanted


def feeds() -> dict[str, Array]:
    return {"x": matrix(2, 64, seed=99)}


def read_by(engine: str, made: ir.Model, names: list[str]) -> dict[str, Array]:
    """The weights as an engine reads them; an exception says that it does not."""
    fed = feeds()
    if engine == "executor":
        return {n: a.numpy() for n, a in Executor(made).run(fed, names).items()}
    if engine == "reference evaluator":
        evaluator = onnx.reference.ReferenceEvaluator(ir.to_proto(made))
        return dict(zip(names, map(np.asarray, evaluator.run(names, fed)), strict=True))
    if engine == "TVM":
        pytest.importorskip("tvm", reason="the tvm extra is not installed")
        from tests.backends.tvm.in_process import InProcess

        found = InProcess(made).run(fed)
        return {n: np.asarray(found[n]) for n in names}
    lowered = made.clone()  # the file that is written, in ONNX Runtime as anyone has it
    opsets.lower(lowered, 24)
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    levels = onnxruntime.GraphOptimizationLevel
    optimize = engine == "ORT, optimized"
    settings.graph_optimization_level = (
        levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    )
    session = onnxruntime.InferenceSession(
        ir.to_proto(lowered).SerializeToString(), settings, providers=["CPUExecutionProvider"]
    )
    return dict(zip(names, map(np.asarray, session.run(names, fed)), strict=True))


def runs(engine: str, name: str) -> bool:
    """Whether an engine reads the scheme; then what it reads must be right."""
    made, wanted = quantized(name)
    try:
        found = read_by(engine, made, list(wanted))
    except Exception as error:  # every engine has its own
        assert re.search(r"NOT_IMPLEMENTED|tvm.unsupported", str(error)), error
        return False
    for key, expected in wanted.items():
        assert np.array_equal(found[key], expected), f"{engine} reads {key} of {name} differently"
    return True


def table() -> dict[str, dict[str, bool]]:
    """The table of weights in the docs: scheme -> engine -> yes or no."""
    return _table("engines")


def _table(mark: str) -> dict[str, dict[str, bool]]:
    text = DOCS.read_text().split(f"<!-- {mark} -->")[1].split("<!-- end -->")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    head = [cell.strip() for cell in lines[0].strip("|").split("|")][1:]
    made: dict[str, dict[str, bool]] = {}
    for line in lines[2:]:
        names, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        for name in re.findall(r"`([^`]+)`", names):
            made[name] = {e: cell.startswith("yes") for e, cell in zip(head, cells, strict=True)}
    return made


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("engine", [e for e in ENGINES if e != "TVM"])
def test_an_engine_reads_what_the_docs_say(engine: str, name: str) -> None:
    assert runs(engine, name) == table()[name][engine]


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEMES)
def test_tvm_reads_what_the_docs_say(name: str) -> None:
    assert runs("TVM", name) == table()[name]["TVM"]


@pytest.mark.parametrize("name", ["int8", "int4", "int3", "nf4", "float8e4m3fn", "bfloat16"])
def test_what_default_settings_do_to_products(name: str) -> None:
    """ONNX Runtime rounds x to 8 bits by block where it meets integers, unless it is told not to."""
    made, wanted = quantized(name)
    lowered = made.clone()
    del lowered.graph.outputs[len(wanted) :]
    opsets.lower(lowered, 24)
    x = matrix(8, 64, seed=99)
    errors = {}
    for level in ("4", "1"):  # 4 is the default
        settings = onnxruntime.SessionOptions()
        if level == "1":
            settings.add_session_config_entry(ort.ACTIVATIONS, level)
        session = onnxruntime.InferenceSession(
            ir.to_proto(lowered).SerializeToString(), settings, providers=["CPUExecutionProvider"]
        )
        results = [np.asarray(y) for y in session.run(None, {"x": x})]
        exact = [x.astype(np.float64) @ w for w in wanted.values()]
        errors[level] = [
            float(np.abs(y - e).max() / np.sqrt(np.square(e).mean()))
            for y, e in zip(results, exact, strict=True)
        ]
    assert max(errors["1"]) <= 64 * 2.0**-23  # 64 terms in another order
    if name.startswith("int"):
        # A step of x is at most max|x| / 127, half of it off, 0.29 of it RMS; sqrt(64) of them meet weights
        # as large as those of the exact sum: 0.29 * 4 sigma / 127 of the RMS, 4.5 times for the largest.
        for settings_, e, exactly in zip(variants(name), errors["4"], errors["1"], strict=True):
            rounds = settings_.get("zeros") != "float" and "group_axis" not in settings_
            assert 1e-3 <= e <= 4.5 * 0.29 * 4 / 127 if rounds else e == exactly, settings_
    else:
        assert errors["4"] == errors["1"]


def test_the_table_has_every_scheme() -> None:
    found = table()
    assert set(found) == set(SCHEMES) and all(set(row) == set(ENGINES) for row in found.values())


def stored() -> list[Any]:
    """Schemes in a file of standard ONNX, and those that the dialect of ONNX Runtime has its own way for."""
    quick = ("int4", "int3", "nf4", "nvfp4")
    made = [(name, "onnx") for name in SCHEMES] + [(name, DIALECT) for name in ("int8", "int4")]
    return [pytest.param(*one, marks=[] if one[0] in quick else pytest.mark.slow) for one in made]


@pytest.mark.parametrize("name, target", stored())
def test_bytes_on_disk(name: str, target: str) -> None:
    """A file takes what codes, scales and zero points do: 2 % more at most, graph and containers included."""
    for number, settings in enumerate(variants(name)):
        made = model(
            "float[b,512] x", "float y", "y = MatMul (x, w)", w=matrix(512, 1024, seed=number)
        )
        normal.normalize(made)
        (entry,) = Quantize(**settings).run(made, Context()).entries
        bits = (
            int(name[3:])
            if name.startswith("int")
            else int(re.findall(r"(?:float|nf|mxfp|nvfp|codebook)(\d+)", name)[0])
        )
        groups: int = {"mxfp4": 32, "nvfp4": 16}.get(name) or settings.get("group_size", 512)
        count = 1 if settings.get("per_tensor") else 512 * 1024 // groups
        scale = {"mxfp4": 1, "nvfp4": 1}.get(name, 2 if settings.get("scales") == "float16" else 4)
        zero: float = scale if settings.get("zeros") == "float" else 0.5 if bits <= 4 else 1
        zeros = 0 if settings.get("symmetric", True) else count * zero
        wanted = 512 * 1024 * bits / 8 + (0 if bits == 16 else count * scale) + zeros
        wanted += 4 * 2**bits if name.startswith("codebook") else 0
        assert abs(entry.detail["bytes"] - wanted) <= 8
        normal.normalize(made)
        artifact = OnnxBackend().compile(made, find_target(target)[1])
        size = len(ir.to_proto(artifact.model).SerializeToString())
        assert wanted <= size <= 1.02 * wanted, settings


# -- activations and caches -----------------------------------------------------------------------------

FORMS: dict[str, dict[str, Any]] = {
    "integer, static": {"activations": "int8"},
    "integer, static, int4": {"weights": "int4", "activations": "int8"},
    "integer, token": {"activations": "int8", "activation_scales": "token"},
    "integer, token, int4": {
        "weights": "int4", "activations": "int8", "activation_scales": "token",
    },
    "integer, tensor": {"activations": "uint8", "activation_scales": "tensor"},
    "qdq, static": {"activations": "uint8", "activation_form": "qdq"},
    "qdq, static, float8": {
        "weights": "float8e4m3fn",
        "activations": "float8e4m3fn",
        "activation_form": "qdq",
    },
    "qdq, token": {
        "weights": "int4",
        "group_size": 16,
        "activations": "int8",
        "activation_scales": "token",
        "activation_form": "qdq",
    },
    "qdq, tensor": {
        "activations": "uint8",
        "activation_scales": "tensor",
        "activation_form": "qdq",
    },
    "cache, int8": {"codes": "int8"},
    "cache, int4": {"codes": "int4"},
}  # fmt: skip


@lru_cache
def formed(name: str) -> tuple[ir.Model, dict[str, Array], dict[str, Array]]:
    """A model in some form, feeds, and what its reference makes of them."""
    if name.startswith("cache"):
        body = "present = Concat <axis=2> (past, new) m = MatMul (q, present) y = Neg (m)"
        inputs = "float[b,2,p,16] past, float[b,2,s,16] new, float[b,2,s,t] q"
        made = model(inputs, "float y, float present", body)
        fed = {"past": matrix(2, 2, 3, 16), "new": matrix(2, 2, 5, 16, seed=1)}
        fed["q"] = matrix(2, 2, 5, 8, seed=2)
        pass_: Any = QuantizeCache(**FORMS[name])
    else:
        body = "h = MatMul (x, w) p = Add (h, c) r = Relu (p) y = MatMul (r, v)"
        held = {"w": matrix(64, 32), "v": matrix(32, 16, seed=1), "c": matrix(32, seed=2)}
        made = model("float[b,s,64] x", "float y", body, **held)
        fed = {"x": matrix(2, 5, 64, seed=99)}
        pass_ = Quantize(min_size=0, **FORMS[name])
    normal.normalize(made)
    ctx = Context(calibration=[fed])
    chosen = pass_.choose(made, ctx)
    reference = pass_.simulate(made.clone(), chosen).model
    wanted = ort.run(reference, fed)
    pass_.edit(made, chosen, ctx)
    normal.normalize(made)
    return made, coded.encoded(made, fed), wanted


def computed_by(engine: str, made: ir.Model, fed: dict[str, Array]) -> dict[str, Array]:
    names = [v.name or "" for v in made.graph.outputs]
    if engine == "executor":
        return {n: a.numpy() for n, a in Executor(made).run(fed).items()}
    if engine == "reference evaluator":
        evaluator = onnx.reference.ReferenceEvaluator(ir.to_proto(made))
        return dict(zip(names, map(np.asarray, evaluator.run(names, fed)), strict=True))
    if engine == "TVM":
        pytest.importorskip("tvm", reason="the tvm extra is not installed")
        from tests.backends.tvm.in_process import InProcess

        return {n: np.asarray(a) for n, a in InProcess(made).run(fed).items()}
    lowered = made.clone()
    opsets.lower(lowered, 24)
    return ort.run(lowered, fed, optimize=engine == "ORT, optimized")


def form_runs(engine: str, name: str) -> bool:
    """Whether an engine runs a form; what it makes is then what the reference makes."""
    made, fed, wanted = formed(name)
    try:
        found = coded.decoded(made, computed_by(engine, made, fed))
    except Exception as error:  # every engine has its own
        assert re.search(r"NOT_IMPLEMENTED|tvm.unsupported", str(error)), error
        return False
    for key, expected in wanted.items():
        # Sums of floats in another order, of 64 terms at most; integers have no order.
        bound = 0.0 if name.startswith("integer, static") else 64 * 2.0**-23
        error = np.abs(found[key] - expected).max() / np.sqrt(np.square(expected).mean())
        assert error <= bound, f"{engine} makes {key} of {name} differently by {error:.2g}"
    return True


def forms_table() -> dict[str, dict[str, bool]]:
    return _table("forms")


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("engine", [e for e in ENGINES if e != "TVM"])
def test_an_engine_runs_what_the_docs_say(engine: str, name: str) -> None:
    assert form_runs(engine, name) == forms_table()[name][engine]


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_tvm_runs_what_the_docs_say(name: str) -> None:
    assert form_runs("TVM", name) == forms_table()[name]["TVM"]


@pytest.mark.parametrize("opset", [17, 19, 21])
@pytest.mark.parametrize("name", FORMS)
def test_forms_at_older_opsets(name: str, opset: int) -> None:
    made, fed, wanted = formed(name)
    if "float8" in name and opset < 19:
        (gap, *_) = opsets.gaps(made, opset)
        assert "float8e4m3fn cannot exist" in gap.message
        return
    lowered = made.clone()
    opsets.lower(lowered, opset)
    found = coded.decoded(made, ort.run(lowered, fed))
    for key, expected in wanted.items():
        assert np.array_equal(found[key], expected)
