"""What pipelines of passes cost a language model: parameters, perplexity, KL and top-1 agreement.

    python benchmarks/bench_language.py MODEL CALIBRATION VALIDATION [--set NAME] [--setting "drop(count=2)"]

MODEL is a Hugging Face directory or an ONNX file of a language model; see ``language.py`` for the texts and
the protocol. One row a pipeline; the first is the dense model. ``--windows N`` is a quick look: N windows
for calibration, every second of N for validation.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import onnx_ir as ir
from language import Ids, Judge, feeds, texts

from netlathe.analysis.cost import cost
from netlathe.api import capture
from netlathe.diagnostics import NetLatheError
from netlathe.ir import normal, verify, weights
from netlathe.pipeline.pass_ import Context
from netlathe.pipeline.text import parse

FOLD = "fold_norms(untie=True)"
# Both tables in float16, as most tools leave them; vectors too; the embedding alone; tables in int8.
HALF = "{'weights': 'float16', 'group_size': 0, 'symmetric': True}"
BYTE = "{'weights': 'int8', 'group_size': 0, 'symmetric': True}"
TABLES = f"overrides={{'embed_tokens': {HALF}, 'lm_head': {HALF}}}"
HALVES = f"vectors='float16', {TABLES}"
HEAD = f"vectors='float16', overrides={{'embed_tokens': {HALF}}}"
BYTES = f"vectors='float16', overrides={{'embed_tokens': {BYTE}, 'lm_head': {BYTE}}}"
SOLVED = "scales='float16', clip='mse', solver='gptq', sweeps=3"
GROUPED = f"group_size=64, symmetric=False, {SOLVED}, {HALVES}"
SPARSE = (
    "",
    "score='wanda', ",
    "score='wanda', refine=True, ",
    "score='sparsegpt', ",
    "score='sparsegpt', sweeps=5, ",
    "score='wanda', sweeps=20, ",
)
ORDERED = ("score='wanda', permute=True, ", "score='sparsegpt', sweeps=5, permute=True, ")
# Token by token, with one scale for all data, and with 4-bit weights; then weights alone.
TOKEN = "quantize(activations='int8', activation_scales='token')"
STATIC = "quantize(activations='int8')"
W4A8 = (
    "quantize(weights='int4', group_size=64, activations='int8', activation_scales='token',"
    " activation_form='qdq')"
)
SMOOTHED = ("equalize(alpha=0.5), ", "equalize(alpha=0.7), ", "equalize(alpha=0.85), ")
ROTATED = tuple(
    f"{FOLD}, rotate({options}), "
    for options in ("online=True", "", "basis='random', online=True", "basis='pca', online=True")
)


def rtn(bits: int, more: str = "", group: int = 64) -> str:
    """Weights to nearest, tables in float16."""
    options = f"weights='int{bits}', group_size={group}, scales='float16'{more}"
    return f"quantize({options}, {TABLES})"


def gptq(bits: int, more: str = "") -> str:
    """The same by GPTQ."""
    return rtn(bits, f", clip='mse', solver='gptq', sweeps=3{more}")


def awq(bits: int, more: str = "", group: int = 64) -> str:
    """AWQ's search for these weights."""
    return (
        f"equalize(method='awq', weights='int{bits}', group_size={group}{more}, ignore='lm_head'), "
    )


BITS = ((4, ""), (3, ", symmetric=False"))
SETS = {
    "drop": [
        f"drop(kind='{kind}', count={count}{how})"
        for kind, counts in (("attention", (2, 4, 6)), ("ffn", (1, 2, 3)), ("block", (1, 2, 3)))
        for count in counts
        for how in (
            ", score='uniform'",
            "",
            ", score='angular'",
            ", score='mse'",
            ", score='kl'",
            ", score='perplexity', search='greedy'",
            ", score='mse', search='greedy'",
            ", score='kl', search='greedy'",
        )
    ]
    + [
        "drop(kind='joint', count=4, score='kl', search='greedy')",
        "drop(kind='joint', params=0.9, score='kl')",
        "drop(kind='joint', params=0.9, score='kl', search='greedy')",
    ],
    "tie_blocks": [
        f"tie_blocks(kind='{kind}', count={count}{how})"
        for kind in ("block", "attention", "ffn")
        for count in (1, 2, 3)
        for how in ("", ", score='kl'", ", score='kl', search='greedy'")
    ],
    # The parameters that the peers' settings leave, and the scores and allocations at one of them.
    "prune": [
        "prune(scope=('ffn',), params=22.34e6)",
        "prune(scope=('ffn',), params=21.59e6)",
        "prune(scope=('ffn',), params=20.92e6)",
        "prune(scope=('ffn',), params=19.78e6)",
        "prune(scope=('ffn', 'heads', 'kv_groups'), params=21.59e6)",
        "prune(scope=('ffn', 'heads', 'kv_groups'), params=19.78e6)",
        *(
            f"prune(scope=('ffn',), params=22.34e6, {rest})"
            for rest in (
                "score='random', compensate='none'",
                "score='l2', compensate='none'",
                "score='group_norm', compensate='none'",
                "score='fpgm', compensate='none'",
                "score='wanda', compensate='none'",
                "score='cfsp', compensate='none'",
                "score='cfsp', allocation='cfsp', compensate='none'",
                "score='flap', allocation='flap', compensate='bias'",
                "score='taylor', allocation='uniform', compensate='none'",
                "score='taylor', compensate='none'",
                "score='obd', allocation='uniform', compensate='none'",
                "score='l2', allocation='layer_adaptive', compensate='none'",
                "score='obd', allocation='layer_adaptive', compensate='none'",
                "score='obd', compensate='none'",
                "score='obd', compensate='bias'",
                "allocation='layer_adaptive'",
            )
        ),
        "prune(scope=('ffn', 'heads', 'kv_groups'), params=19.78e6, allocation='layer_adaptive')",
    ],
    # Rows of peers at as many bytes or fewer, then what else bytes can be spent on.
    "quantize": [
        f"quantize(weights='int8', scales='float16', {HEAD})",
        f"quantize(weights='int4', group_size=64, scales='float16', {HALVES})",
        f"quantize(weights='int4', group_size=64, {SOLVED}, {HALVES})",
        f"quantize(weights='int4', group_size=32, {SOLVED}, {HALVES})",
        f"quantize(weights='int4', group_size=128, {SOLVED}, {HALVES})",
        f"quantize(weights='int4', group_size=64, {SOLVED}, {HEAD})",
        f"quantize(weights='int3', group_size=64, symmetric=False, {SOLVED}, {HALVES})",
        f"quantize(weights='int2', group_size=32, symmetric=False, {SOLVED}, {HALVES})",
        f"quantize(activations='int8', activation_scales='token', scales='float16', {HALVES})",
        f"quantize(bits=3.5, formats=('int3', 'int4'), sensitivity='kl', {GROUPED})",
        f"quantize(bits=3, formats=('int2', 'int3', 'int4'), sensitivity='kl', {GROUPED})",
        f"quantize(weights='int4', group_size=64, symmetric=False, {SOLVED}, {HALVES})",
        f"quantize(weights='int4', group_size=128, low_rank=2, low_rank_basis='input', {SOLVED}, {HALVES})",
        f"quantize(weights='int4', group_size=128, low_rank=3, low_rank_basis='input',"
        f" low_rank_stored='int8', {SOLVED}, {HALVES})",
        f"quantize(weights='int4', group_size=128, low_rank=2, {SOLVED}, {HALVES})",
        f"quantize(weights='int3', group_size=64, low_rank=2, low_rank_basis='input', symmetric=False,"
        f" {SOLVED}, {HALVES})",
        f"quantize(weights='int2', group_size=64, low_rank=4, low_rank_basis='input', symmetric=False,"
        f" {SOLVED}, {HALVES})",
        f"quantize(bits=3, formats=('int2', 'int4'), sensitivity='kl', {GROUPED})",
        f"quantize(bits=3, formats=('int2', 'int4'), sensitivity='mse', {GROUPED})",
        f"quantize(bits=3, formats=('int2', 'int4'), sensitivity='lim', {GROUPED})",
        f"quantize(bits=3, formats=('int2', 'int4'), sensitivity='zd', {GROUPED})",
        f"quantize(weights='int3', group_size=64, {SOLVED}, {HALVES})",
        f"quantize(weights='int4', group_size=64, scales='float16', clip='mse', {HALVES})",
        f"quantize(weights='int4', group_size=64, scales='float16', clip='mse', solver='gptq', {HALVES})",
        f"quantize(weights='int4', group_size=32, symmetric=False, {SOLVED}, {HALVES})",
        f"quantize(weights='nf4', group_size=64, clip='mse', solver='gptq', sweeps=3, {HALVES})",
        f"quantize(weights='int6', group_size=64, {SOLVED}, {BYTES})",
        f"quantize(weights='int4', group_size=32, {SOLVED}, {BYTES})",
        "quantize(weights='int8', activations='int8')",
    ],
    # Zeros in all layers but the head, by each way to choose them; then with quantization behind.
    "sparsify": [
        f"sparsify({pattern}{way}ignore=('lm_head',))"
        for pattern, ways in (
            ("", (*SPARSE, *ORDERED)),
            ("pattern='unstructured', ", SPARSE),
            ("pattern='4:8', ", (*SPARSE[1:5], *ORDERED[:1])),
            ("pattern='1:4', ", (*SPARSE[1:5], *ORDERED[:1])),
        )
        for way in ways
    ]
    + [
        f"sparsify(score='sparsegpt', sweeps=5, ignore=('lm_head',)), {quantize}"
        for quantize in (
            f"quantize(weights='int8', scales='float16', {TABLES})",
            f"quantize(weights='int4', group_size=64, scales='float16', clip='mse', {TABLES})",
            f"quantize(weights='int4', group_size=64, {SOLVED}, {TABLES})",
        )
    ]
    + [
        f"sparsify(pattern='{tile}', {way}ignore=('lm_head',))"
        for tile in ("4x4", "1x8")
        for way in (SPARSE[1], SPARSE[4])
    ],
    # What makes a model quantize better, before `quantize` and without: its baselines.
    "transforms": [
        *(f"{before}{TOKEN}" for before in ("", *SMOOTHED, *ROTATED, f"{FOLD}, ")),
        *(f"{before}{STATIC}" for before in ("", *SMOOTHED, *ROTATED[:2])),
        *(f"{before}{W4A8}" for before in ("", "equalize, ", *ROTATED[:2])),
        *(
            f"{before}{solver(bits, more)}"
            for solver in (rtn, gptq)
            for bits, more in BITS
            for before in ("", awq(bits, more), *ROTATED[:2])
        ),
        rtn(4, group=128),
        awq(4, group=128) + rtn(4, group=128),
        *(rtn(bits, f"{more}, correct_bias=True") for bits, more in BITS),
        *(gptq(bits, f"{more}, correct_bias=True") for bits, more in BITS),
    ],
    # Ways to quantize activations, with weights of the same bits; and small floats as weights.
    "activations": [
        *(
            f"quantize(weights='{number}', activations='{number}', activation_scales='{scales}',"
            f" activation_form='qdq', activation_range='{range_}')"
            for number, scales, range_ in (
                ("int8", "token", "minmax"),
                ("int8", "static", "minmax"),
                ("int8", "static", "percentile"),
                ("int8", "static", "mse"),
                ("float8e4m3fn", "token", "minmax"),
                ("float8e4m3fn", "static", "minmax"),
            )
        ),
        "quantize(activations='uint8', activation_scales='tensor')",
        W4A8,
        "quantize(weights='int4', group_size=64, activations='int8', activation_form='qdq')",
        *(
            f"quantize(weights='{weights}'{more}, {TABLES})"
            for weights, more in (
                ("float8e4m3fn", ", scales='float16'"),
                ("float4e2m1", ", group_size=32, scales='float16', clip='mse'"),
                ("nf4", ", group_size=32, clip='mse'"),
                ("mxfp4", ""),
                ("mxfp4", ", clip='mse'"),
                ("nvfp4", ""),
                ("nvfp4", ", clip='mse'"),
            )
        ),
    ],
    # SliceGPT (arXiv 2401.15024) at its ratios, and one basis at as many parameters or fewer.
    "slice": [
        *(f"{FOLD}, slice(ratio={r}, adapters=True, full='head')" for r in (0.1, 0.2, 0.25, 0.3)),
        *(
            f"{FOLD}, slice(parameters={share}, basis='{basis}', refit={refit})"
            for share in (0.05, 0.09, 0.135, 0.201)
            for basis in ("pca", "loss")
            for refit in (False, True)
        ),
        *(
            f"{FOLD}, slice(parameters={share}, basis='loss', refit={refit}, cut=True)"
            for share in (0.05, 0.09, 0.135, 0.201)
            for refit in (False, True)
        ),
    ],
}


def main() -> None:
    """Print the table, row by row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("model", type=Path, help="a Hugging Face directory, or an ONNX file")
    parser.add_argument("calibration", type=Path, help="text, text.xz or ids.npy")
    parser.add_argument("validation", type=Path, help="text, text.xz or ids.npy")
    parser.add_argument("--set", choices=sorted(SETS), default="drop", help="which settings")
    parser.add_argument("--setting", action="append", help="a pipeline in text form, instead")
    parser.add_argument("--windows", type=int, help="a quick look with this many windows")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    calibration, validation = texts(args.model, args.calibration, args.validation, args.windows)
    dense = capture(args.model).model
    judge = Judge(dense, validation, args.device)
    print(f"{len(calibration)} calibration and {len(validation)} validation windows")
    print(
        "| pipeline | params | MB of weights | MB on disk | ppl | KL | top-1 | s | peak RSS MiB |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for setting in ["", *(args.setting or SETS[args.set])]:
        start = time.perf_counter()
        try:
            model = made(dense, setting, calibration, args.device)
        except NetLatheError as error:
            print(f"| `{setting}` | refused: {error.diagnostics[0].message} | | | | | | | |")
            continue
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(
            f"| `{setting or 'dense'}` | {cost(model).params / 1e6:.2f}M"
            f" | {weights.num_bytes(model) / 1e6:.2f} | {size(model) / 1e6:.2f}"
            f" | {judge.of(model)} | {seconds:.1f} | {peak:.0f} |",
            flush=True,
        )


def made(dense: ir.Model, setting: str, calibration: Ids, device: str) -> ir.Model:
    """What a pipeline makes of a model; each pass is calibrated on what those before it made."""
    model = dense.clone()
    for pass_ in parse(setting) if setting else ():
        pass_.run(model, Context(calibration=feeds(model, calibration), device=device))
        normal.normalize(model)
        verify.check(model)
    return model


def size(model: ir.Model) -> int:
    """Bytes of a model in one ONNX file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        ir.save(model.clone(), path)
        return path.stat().st_size


if __name__ == "__main__":
    main()
