"""Pipelines of several passes on a language model: perplexity and KL against parameters, bytes and latency.

    python benchmarks/bench_compose.py MODEL CALIBRATION VALIDATION [--device cuda] [--rows rows.jsonl]
    python benchmarks/bench_compose.py --plot docs/composing.svg --rows rows.jsonl

See ``language.py`` for the texts and the protocol. Steps of a pipeline take equal shares of one budget of
parameters, and quantization comes last. Latency is that of one window of 512 tokens in ONNX Runtime with its
default optimizations on one thread, the dense model and the other one in turn; the table has the ratio of
the medians. ``--rows`` appends what was measured as JSON, one line a pipeline, and what is there is not
measured again. Bars, at no more bytes of weights than ONNX Runtime's own quantizer leaves: two attentions
dropped and int4, KL below 0.1462; sliced by 20 % and int4, below 0.7652.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

if TYPE_CHECKING:
    from language import Ids
    from matplotlib.axes import Axes  # pyright: ignore[reportMissingImports]

FOLD = "fold_norms(untie=True)"
DROP = "drop(kind='joint', params={}, score='kl', search='greedy')"
PRUNE = "prune(scope=('ffn', 'heads'), params={})"
SLICE = FOLD + ", slice(parameters={}, basis='loss', refit=True)"
TIE = "tie_blocks(params={}, score='kl', search='greedy')"
STEPS: Mapping[str, Sequence[str]] = {
    "drop": (DROP,),
    "prune": (PRUNE,),
    "slice": (SLICE,),
    "tie": (TIE,),
    "drop + prune": (DROP, PRUNE),
    "drop + slice": (DROP, SLICE),
    "prune + slice": (PRUNE, SLICE),
    "drop + prune + slice": (DROP, PRUNE, SLICE),
}
SHARES = (0.9, 0.8, 0.7)
# In groups that divide every width, with both tables in float16.
HALF = "{'weights': 'float16', 'group_size': 0, 'symmetric': True}"
TABLES = "vectors='float16', overrides={'embed_tokens': HALF, 'lm_head': HALF}".replace(
    "HALF", HALF
)
SOLVED = "symmetric=False, scales='float16', clip='mse', solver='gptq', sweeps=3"
INT4 = f"quantize(weights='int4', group_size=64, {SOLVED}, {TABLES})"
FINE = INT4.replace("=64", "=32")
PRUNE_64 = "prune(scope='ffn', params={}, round_to=64)"
PRUNE_32 = "prune(scope='ffn', params={}, round_to=32)"
SLICE_32 = SLICE.replace("refit=True", "refit=True, round_to=32")
# The peers' rows: what they drop or slice, then int4 in groups of 64 with both tables in float16.
PEERS = {
    "LLM-Drop, 2 attentions, int4": (22.35, 0.1462),
    "SliceGPT 20 %, int4": (24.13, 0.7652),
}

BARS = ("drop 2 attentions, symmetric int4", "slice 20 %, int4")  # ours, for each of these


def pipelines() -> dict[str, str]:
    """Name -> pipeline."""
    found = {"dense": ""}
    for share in SHARES:
        for name, steps in STEPS.items():
            if name == "tie" and share < 0.8:
                continue
            each = round(share ** (1 / len(steps)), 3)
            made = [s.format(round(1 - each, 3) if s is SLICE else each) for s in steps]
            found[f"{name}, {share}"] = ", ".join(made)
    found["int4"] = INT4
    found["drop 2 attentions, int4"] = f"drop(count=2, score='kl', search='greedy'), {INT4}"
    symmetric = INT4.replace("symmetric=False, ", "", 1)
    found["drop 2 attentions, symmetric int4"] = (
        f"drop(count=2, score='kl', search='greedy'), {symmetric}"
    )
    found["slice 20 %, int4"] = f"{SLICE_32.format(0.15)}, {FINE}"
    for share in SHARES[:2]:
        half, third = round(share**0.5, 3), round(share ** (1 / 3), 3)
        found[f"drop, {share}, int4"] = f"{DROP.format(share)}, {INT4}"
        found[f"drop + prune, {share}, int4"] = (
            f"{DROP.format(half)}, {PRUNE_64.format(half)}, {INT4}"
        )
        found[f"drop + prune + slice, {share}, int4"] = (
            f"{DROP.format(third)}, {PRUNE_32.format(third)},"
            f" {SLICE_32.format(round(1 - third, 3))}, {FINE}"
        )
    return found


# -- measuring --------------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row a pipeline that is not in the file yet."""
    from bench_language import made
    from language import Judge, texts

    from netlathe.analysis.cost import cost
    from netlathe.api import capture
    from netlathe.diagnostics import NetLatheError

    calibration, validation = texts(args.model, args.calibration, args.validation, args.windows)
    dense = capture(args.model).model
    judge = Judge(dense, validation, args.device)
    known = {row["name"] for row in rows_of(args.rows)}
    first, step = args.part
    for name, pipeline in list(pipelines().items())[first::step]:
        if name in known:
            continue
        start = time.perf_counter()
        row: dict[str, Any] = {"name": name, "pipeline": pipeline}
        try:
            model = made(dense, pipeline, calibration, args.device)
        except NetLatheError as error:
            yield row | {"refused": error.diagnostics[0].message}
            continue
        row["seconds"] = time.perf_counter() - start
        costs, fidelity = cost(model), judge.of(model)
        row |= {"params": costs.params, "bytes": costs.bytes}
        row |= {"perplexity": fidelity.perplexity, "kl": fidelity.kl, "top1": fidelity.top1}
        yield row | latencies(dense, model, validation[:1], args.rounds)


def latencies(dense: ir.Model, model: ir.Model, ids: Ids, rounds: int) -> dict[str, float]:
    """Median milliseconds of both models on one window, in turn, on one thread."""
    from language import as_feeds

    from netlathe.execute import ort
    from netlathe.execute.timing import in_turn

    runs = {}
    for name, each in (("dense_ms", dense), ("ms", model)):
        session, feeds = (
            ort.Session(each, optimize=True, exact=False, threads=1),
            as_feeds(each, ids),
        )
        runs[name] = lambda session=session, feeds=feeds: session.run(feeds)
    return {name: timing.median_ms for name, timing in in_turn(runs, rounds=rounds).items()}


# -- showing ----------------------------------------------------------------------------------------


def rows_of(file: Path | None) -> list[dict[str, Any]]:
    """What was measured before."""
    if file is None or not file.exists():
        return []
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


HEAD = (
    "| pipeline | parameters | MB | perplexity | KL | top-1 % | latency | s |\n"
    "|---|---|---|---|---|---|---|---|"
)


def shown(row: Mapping[str, Any]) -> str:
    """A row of the table."""
    if "refused" in row:
        return f"| {row['name']} | refused: {row['refused']} | | | | | | |"
    return (
        f"| {row['name']} | {row['params'] / 1e6:.2f}M | {row['bytes'] / 1e6:.2f}"
        f" | {row['perplexity']:.3f} | {row['kl']:.4f} | {100 * row['top1']:.2f}"
        f" | {row['ms'] / row['dense_ms']:.2f} | {row['seconds']:.0f} |"
    )


def plot(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """KL against parameters, latency and bytes, as an SVG that has the same bytes each time."""
    import matplotlib  # pyright: ignore[reportMissingImports]  # with the extra bench
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    matplotlib.rcParams.update(
        {"svg.hashsalt": "netlathe", "svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans"]}
    )
    figure = Figure(figsize=(15, 4.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3, sharey=True)
    good = [row for row in rows if "refused" not in row]
    float32 = [row for row in good if not row["name"].endswith("int4")]
    curves(left, float32, lambda row: row["params"] / 1e6)
    left.set(xlabel="parameters, millions", ylabel="KL to the dense model, nats a token")
    curves(middle, float32, lambda row: row["ms"] / row["dense_ms"])
    middle.set(xlabel="latency, dense = 1 (ONNX Runtime, one thread)")
    quantized = [row for row in good if row["name"].endswith("int4")]
    for at, row in enumerate(quantized):
        right.plot(row["bytes"] / 1e6, row["kl"], "o", color=f"C{at % 10}", label=row["name"])
    for name, (megabytes, kl) in PEERS.items():
        right.plot(megabytes, kl, "kx", label=name)
    right.set(xlabel="MB of weights, int4")
    for axes in (left, middle, right):
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
    left.legend(fontsize="small", frameon=False)
    right.legend(fontsize="x-small", frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    made = io.StringIO()
    figure.savefig(made, format="svg", metadata={"Date": None, "Creator": None})
    lines = [line.strip() for line in made.getvalue().splitlines()]
    file.write_text("\n".join([*lines, ""]), encoding="utf-8")


def curves(axes: Axes, rows: Sequence[Mapping[str, Any]], of: Any) -> None:
    """A line for each kind of pipeline through its shares; one that is best nowhere is thin."""
    for at, kind in enumerate(STEPS):
        own = [row for row in rows if row["name"].rpartition(", ")[0] == kind]
        style = "--" if "+" in kind else "-"
        found = sorted((of(row), row["kl"]) for row in own)
        if found:
            xs, ys = zip(*found, strict=True)
            axes.plot(xs, ys, style, marker="o", markersize=4, color=f"C{at}", label=kind)


def main() -> int:
    """Print the table, row by row; 0 where the peers' rows are beaten."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("model", type=Path, nargs="?", help="a Hugging Face directory")
    parser.add_argument("calibration", type=Path, nargs="?", help="text, text.xz or ids.npy")
    parser.add_argument("validation", type=Path, nargs="?", help="text, text.xz or ids.npy")
    parser.add_argument("--windows", type=int, help="a quick look with this many windows")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=15, help="runs that a latency is taken from")
    parser.add_argument(
        "--part", type=int, nargs=2, default=(0, 1), help="every so many of the pipelines, from one"
    )
    parser.add_argument("--rows", type=Path, help="keep what is measured here")
    parser.add_argument("--plot", type=Path, help="draw the rows, and measure nothing")
    args = parser.parse_args()
    if args.plot:
        plot(rows_of(args.rows), args.plot)
        return 0
    if args.validation is None:
        parser.error("give a model and two texts, or --plot")
    print(HEAD, flush=True)
    for row in rows_of(args.rows):
        print(shown(row), flush=True)
    found = rows_of(args.rows)
    for row in measure(args):
        found.append(row)
        print(shown(row), flush=True)
        if args.rows:
            with args.rows.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    named = {row["name"]: row for row in found}
    good = True
    for ours, peer in zip(BARS, PEERS, strict=True):
        if ours in named:
            megabytes, kl = PEERS[peer]
            row = named[ours]
            good &= "kl" in row and row["kl"] < kl and row["bytes"] <= megabytes * 1e6
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
